"""Encoded MPEG-4 stream -> TV-L1 optical flow on the motion grid: what table 4 holds against motion vectors.

The method is Zach, Pock and Bischof's of 2007 as scikit-image has it, with that library's usual parameters, in single
precision, between every frame and the one before it at the encoded size. That takes about half a second of CPU time a
frame of 340x256, more than a thousand times what the motion vectors take; a smaller picture would be faster in
proportion, but would lose the slow and small motion that flow is there to show.
"""

from __future__ import annotations

from collections.abc import Iterator

import av
import numpy as np
from skimage.registration import optical_flow_tvl1

from preprocess.shards import INTRA, MACROBLOCK, QUARTERS, Settings

ATTACHMENT = 15  # lambda: the smaller, the smoother
TIGHTNESS = 0.3  # theta: couples the data term to the regularisation
WARPS, ITERATIONS = 5, 10  # of each level of the pyramid; of each warp
TOLERANCE = 1e-4
BLACK, WHITE = 16, 235  # of limited-range luma, which MPEG-4 is
MOST = -INTRA - 1  # quarter pixels; one more, and its negative would read as no vector


def maps(path: str, settings: Settings) -> Iterator[np.ndarray]:
    """Flow of every frame of the encoded stream: int16 (rows, cols, 2) as `preprocess.shards` defines it.

    The first is all `INTRA`: nothing precedes it. I-frames have flow as any other frame.
    """
    before = None
    with av.open(path) as container:
        stream = container.streams.video[0]
        stream.codec_context.thread_count = 1
        for frame in container.decode(stream):
            now = luma(frame)
            yield np.full((*settings.grid, 2), INTRA, np.int16) if before is None else grid(displacement(before, now))
            before = now


def luma(frame: av.VideoFrame) -> np.ndarray:
    """Luma of a limited-range YUV frame, float32 (H, W), black 0 and white 1."""
    plane = frame.planes[0]
    pixels = np.frombuffer(memoryview(plane), np.uint8).reshape(plane.height, plane.line_size)[:, : plane.width]
    return (pixels.astype(np.float32) - BLACK) / (WHITE - BLACK)


def displacement(before: np.ndarray, now: np.ndarray) -> np.ndarray:
    """(dx, dy) of the content from `before` to `now`, float32 (H, W, 2), in pixels, at its place in `now`.

    Both are luma (H, W) from 0 to 1.
    """
    # The library's answer is (rows, columns) such that now(x) = before(x + answer): where the content came from. What
    # we want is where it went, hence the sign.
    down, right = optical_flow_tvl1(
        now,
        before,
        attachment=ATTACHMENT,
        tightness=TIGHTNESS,
        num_warp=WARPS,
        num_iter=ITERATIONS,
        tol=TOLERANCE,
        prefilter=False,
        dtype=np.float32,
    )
    return -np.stack([right, down], axis=-1)


def grid(pixels: np.ndarray) -> np.ndarray:
    """Displacements (H, W, 2) in pixels -> their mean over each macroblock, int16 (rows, cols, 2) in quarter pixels.

    Where the grid overhangs the frame, the mean is that of the pixels inside.
    """
    mean = pixels.astype(np.float64)
    for axis, length in enumerate(pixels.shape[:2]):
        first = np.arange(0, length, MACROBLOCK)
        count = np.diff(first, append=length)
        mean = np.add.reduceat(mean, first, axis) / np.expand_dims(count, (1, 2) if axis == 0 else (0, 2))
    return np.rint(mean * QUARTERS).clip(-MOST, MOST).astype(np.int16)
