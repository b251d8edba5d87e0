"""TV-L1 optical flow on the motion grid, beside finished shards: what table 4 holds against motion vectors.

The method is Zach, Pock and Bischof's of 2007 as scikit-image has it, with that library's usual parameters, in single
precision, between every frame and the one before it at the encoded size. That takes about half a second of CPU time a
frame of 340x256, more than a thousand times what the motion vectors take; a smaller picture would be faster in
proportion, but would lose the slow and small motion that flow is there to show.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from functools import partial
from importlib.metadata import PackageNotFoundError
from pathlib import Path
from typing import Any

import av
import numpy as np

from preprocess.codec import Codec, CodecError, check_time_limit, plain, spread
from preprocess.command import say
from preprocess.encode import pixels
from preprocess.pipeline import Progress, library_versions
from preprocess.schema import INTRA, MACROBLOCK, QUARTERS, Settings, beside_path
from preprocess.shards import Shard, ShardSet
from preprocess.writer import Busy, working, write_beside

LIBRARIES = ("av", "numpy", "scikit-image", "scipy")
ATTACHMENT = 15  # lambda: the smaller, the smoother
TIGHTNESS = 0.3  # theta: couples the data term to the regularisation
WARPS, ITERATIONS = 5, 10  # of each level of the pyramid; of each warp
TOLERANCE = 1e-4
BLACK, WHITE = 16, 235  # of limited-range luma, which MPEG-4 is
MOST = -INTRA - 1  # quarter pixels; one more, and its negative would read as no vector


def run(folder: Path, videos: Path, workers: int = 1, time_limit: float = 600.0) -> tuple[int, int]:
    """Compute the optical flow of every shard that has none, and write it beside the shard; (made, already there).

    Raises ValueError where the flow that is there belongs to other shards, where the extra is missing, or where a video
    is not the one that the shard holds.
    """
    check_time_limit(time_limit)
    try:
        versions = library_versions(LIBRARIES)
    except PackageNotFoundError as error:
        raise ValueError("optical flow needs scikit-image: pip install '.[preprocess,flow]'") from error
    shards = ShardSet(folder).shards
    # Flow that is there but is another shard's raises ValueError.
    todo = [shard for shard in shards if not beside_path(shard.path, "flow").exists() or shard.flow is None]
    with Progress(sum(map(len, todo))) as progress:

        def make(shard: Shard, codec: Codec) -> Path | None:
            try:
                return make_flow(shard, videos.absolute(), versions, time_limit, codec, progress)
            except Busy as busy:
                say(f"{busy}: left to it")
                progress.skip(len(shard))
                return None

        made = [path for path in spread(make, todo, workers) if path]
    return len(made), len(shards) - len(todo)


def make_flow(
    shard: Shard, videos: Path, versions: dict[str, str], time_limit: float, codec: Codec, progress: Progress
) -> Path:
    """The flow of one shard, from its videos encoded again. Raises ValueError where they are not those it holds."""

    def compute(path: str, held: int) -> dict[str, Any]:
        source = videos / path
        try:
            answer = codec.run("flow", source, journal.spool, shard.settings, time_limit)
            frames = answer["frames"]
            fault = "" if frames == held else f"it has {frames} frames, and the shard holds {held}"
        except CodecError as error:
            fault = plain(str(error), source, path)
        if fault:
            raise ValueError(
                f"no optical flow of {source} for {shard.path}: {fault}. Give the videos that the shards were made "
                "from as --videos"
            )
        progress.add(1, frames)
        return answer

    made_from = json.dumps([shard.sha256, versions], sort_keys=True)
    with working(beside_path(shard.path, "flow"), made_from, ("flow",)) as journal:
        progress.skip(len(journal.kept))
        for path, held in zip(shard.paths, np.diff(shard.frame_offset).tolist()):
            journal.next(partial(compute, path, held))
        return write_beside(shard.path, "flow", shard, shard.sha256, versions, journal.spool)


def maps(pictures: Iterable[av.VideoFrame], settings: Settings) -> Iterator[np.ndarray]:
    """Flow of every frame of the encoded stream: int16 (rows, cols, 2) as `preprocess.schema` defines it.

    The first is all `INTRA`: nothing precedes it. I-frames have flow as any other frame.
    """
    before = None
    for picture in pictures:
        now = luma(picture)
        yield np.full((*settings.grid, 2), INTRA, np.int16) if before is None else grid(displacement(before, now))
        before = now


def luma(frame: av.VideoFrame) -> np.ndarray:
    """Luma of a limited-range YUV frame, float32 (H, W), black 0 and white 1."""
    return (pixels(frame.planes[0]).astype(np.float32) - BLACK) / (WHITE - BLACK)


def displacement(before: np.ndarray, now: np.ndarray) -> np.ndarray:
    """(dx, dy) of the content from `before` to `now`, float32 (H, W, 2), in pixels, at its place in `now`.

    Both are luma (H, W) from 0 to 1.
    """
    from skimage.registration import optical_flow_tvl1  # of an extra

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
