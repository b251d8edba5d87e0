"""Encoded MPEG-4 stream -> motion grids (mvextractor) and JPEGs of frames and I-frames (PyAV, simplejpeg)."""

from __future__ import annotations

import os
import resource
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import NamedTuple

import av
import numpy as np
import simplejpeg
from av.video.reformatter import ColorRange, VideoReformatter
from mvextractor.videocap import VideoCap

from preprocess.shards import INTRA, MACROBLOCK, QUARTERS, Settings

# Columns of mvextractor's array, FFmpeg's AVMotionVector.
SOURCE, WIDTH, HEIGHT, DST_X, DST_Y, MOTION_X, MOTION_Y, SCALE = 0, 1, 2, 5, 6, 7, 8, 9


class Pictures(NamedTuple):
    """JPEG bytes of one frame; `iframe` only where the frame is intra-coded."""

    frame: bytes
    iframe: bytes | None


def motion(path: str, settings: Settings) -> Iterator[tuple[bool, np.ndarray]]:
    """(is I-frame, grid) of every frame; grid int16 (rows, cols, 2) as `preprocess.shards` defines it."""
    capture = VideoCap()
    # Vectors come several times faster when no picture is converted.
    capture.set_decode_frames(False)
    with _one_core_in_sight():
        opened = capture.open(path)
    if not opened:
        raise ValueError("mvextractor cannot open the encoded stream")
    try:
        while True:
            ok, _, vectors, kind = capture.read()
            if not ok:  # the end, or an error: the caller counts frames
                return
            yield kind == "I", grid(vectors, settings)
    finally:
        capture.release()


@contextmanager
def _one_core_in_sight() -> Iterator[None]:
    """While a stream is opened, show mvextractor one core: it starts a decoder thread for each (up to 16) it sees.

    It asks the C library, which from glibc 2.35 on reads a file of the kernel's and only failing that the set of cores
    this process may use. So that set shrinks to one core, and the limit on open files leaves room for the stream alone.
    """
    cores, (soft, hard) = os.sched_getaffinity(0), resource.getrlimit(resource.RLIMIT_NOFILE)
    free = os.open(os.devnull, os.O_RDONLY)
    os.close(free)
    try:
        os.sched_setaffinity(0, {min(cores)})
        resource.setrlimit(resource.RLIMIT_NOFILE, (free + 1, hard))
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
        # Threads inherit the set. With a C library that was not misled there are some, of every worker on one core.
        for thread in os.listdir("/proc/self/task"):
            with suppress(ProcessLookupError):
                os.sched_setaffinity(int(thread), cores)


def grid(vectors: np.ndarray, settings: Settings) -> np.ndarray:
    """Vectors (N, 10) of one frame -> int16 (rows, cols, 2), quarter pixels, content from previous frame to this one.

    FFmpeg's record points from this block back to its reference in units of 1/scale pixel, hence the sign; its dst is
    the block's centre. Its src is truncated to whole pixels and not used. Raises ValueError on anything our encoder
    does not make: other block sizes, other references, a second vector for a block.
    """
    cells = np.full((*settings.grid, 2), INTRA, np.int16)
    if not len(vectors):
        return cells
    if not (
        (vectors[:, SOURCE] == -1).all()
        and (vectors[:, WIDTH] == MACROBLOCK).all()
        and (vectors[:, HEIGHT] == MACROBLOCK).all()
        and (vectors[:, SCALE] == 2).all()
    ):
        raise ValueError("the encoded stream has vectors that are not half-pixel, 16x16 and from the previous frame")
    rows, cols = vectors[:, DST_Y] // MACROBLOCK, vectors[:, DST_X] // MACROBLOCK
    cells[rows, cols] = vectors[:, [MOTION_X, MOTION_Y]] * (-QUARTERS // 2)
    if np.count_nonzero(cells[..., 0] != INTRA) != len(vectors):
        raise ValueError("the encoded stream has two vectors for one block")
    return cells


def pictures(path: str, settings: Settings) -> Iterator[Pictures]:
    """JPEGs of every frame, from the YUV planes; I-frames in addition at the encoded size."""
    with av.open(path) as container:
        stream = container.streams.video[0]
        stream.codec_context.thread_count = 1
        small, full = VideoReformatter(), VideoReformatter()
        for frame in container.decode(stream):
            iframe = _jpeg(frame, full, settings.width, settings.height, settings) if frame.key_frame else None
            yield Pictures(_jpeg(frame, small, settings.frame_width, settings.frame_height, settings), iframe)


def _jpeg(frame: av.VideoFrame, scaler: VideoReformatter, width: int, height: int, settings: Settings) -> bytes:
    # MPEG-4 is limited-range YUV, JPEG full-range.
    picture = scaler.reformat(
        frame, width, height, "yuvj420p", src_color_range=ColorRange.MPEG, dst_color_range=ColorRange.JPEG
    )
    planes = [
        np.frombuffer(memoryview(p), np.uint8).reshape(p.height, p.line_size)[:, : p.width] for p in picture.planes
    ]
    return simplejpeg.encode_jpeg_yuv_planes(*planes, settings.jpeg_quality)
