"""Encoded MPEG-4 stream -> motion grids and JPEGs of frames and I-frames, in one pass (PyAV, simplejpeg)."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import NamedTuple

import av
import numpy as np
import simplejpeg
from av.video.codeccontext import VideoCodecContext
from av.video.reformatter import ColorRange, VideoReformatter

from preprocess import residual
from preprocess.encode import pixels, side_data
from preprocess.schema import INTRA, MACROBLOCK, QUARTERS, Settings

# FFmpeg's AVMotionVector. PyAV's own way to an array builds this type anew for every frame, which takes longer.
RECORD = np.dtype(
    [
        *(("source", "i4"), ("w", "u1"), ("h", "u1"), ("src_x", "i2"), ("src_y", "i2"), ("dst_x", "i2")),
        *(("dst_y", "i2"), ("flags", "u8"), ("motion_x", "i4"), ("motion_y", "i4"), ("motion_scale", "u2")),
    ],
    align=True,
)
BATCH = 48  # packets encoded before they are decoded: encoder and decoder in turns of a frame empty each other's caches
MACROBLOCK_BITS = MACROBLOCK.bit_length() - 1
MVEXTRACTOR_COLUMNS = [name for name in RECORD.names or () if name != "flags"]
OURS = {"source": -1, "w": MACROBLOCK, "h": MACROBLOCK, "motion_scale": 2}
"""What is the same in all vectors of our encoder: from the previous frame, of whole macroblocks, half-pixel."""


class Group(NamedTuple):
    """A group of pictures: an I-frame and the P-frames (n - 1 of them) that follow."""

    frames: list[bytes]
    """JPEG of each frame at the size of the stored frames."""
    iframe: bytes
    """JPEG of the first at the encoded size."""
    motion: np.ndarray
    """int16 (n, rows, cols, 2), as `preprocess.schema` defines it."""
    residual: np.ndarray
    """uint16 (n, rows, cols), alike; nothing where it is not wanted."""


def groups(
    packets: Iterable[av.Packet], settings: Settings, file: Path | None = None, residuals: bool = False
) -> Iterator[Group]:
    """Every group of pictures of an encoded stream. Raises ValueError where it is not what our encoder makes.

    PyAV reads frames and vectors in one decode; where a `file` is named, mvextractor reads the vectors from what is
    put there. Vectors are turned into grids a group at a time: of single frames, what numpy costs a call would
    outweigh the rest.
    """
    small, full = VideoReformatter(), VideoReformatter()
    frames: list[bytes] = []
    records: list[bytes] = []
    lumas: list[np.ndarray] = []
    iframe = b""

    def group() -> Group:
        motion = grids(records, settings)
        return Group(frames, iframe, motion, residual.energies(lumas, motion) if residuals else np.empty(0))

    for number, (frame, vectors) in enumerate(decoded(packets) if file is None else decoded_twice(packets, file)):
        if frame.key_frame != (number % settings.gop == 0):
            raise ValueError(f"frame {number} of the encoded stream breaks the group of {settings.gop}")
        if frame.key_frame:
            if frames:
                yield group()
            frames, records, lumas = [], [], []
            iframe = compress(shrink(frame, full, settings.width, settings.height), settings.jpeg_quality)
        picture = shrink(frame, small, settings.frame_width, settings.frame_height)
        frames.append(compress(picture, settings.jpeg_quality))
        records.append(vectors)
        if residuals:
            lumas.append(residual.padded_luma(frame, settings.grid))
    if frames:
        yield group()


def decoded(packets: Iterable[av.Packet]) -> Iterator[tuple[av.VideoFrame, bytes]]:
    """Every frame of an encoded stream and its motion vectors, one RECORD each; an I-frame has none."""
    decoder = av.CodecContext.create("mpeg4", "r")
    assert isinstance(decoder, VideoCodecContext)
    decoder.thread_count, decoder.options = 1, {"flags2": "+export_mvs"}
    source = iter(packets)
    while batch := [*islice(source, BATCH)]:
        for packet in batch:
            for frame in decoder.decode(packet):  # without B-frames a packet is a frame, and none is held back
                yield frame, side_data(frame, "MOTION_VECTORS")


def decoded_twice(packets: Iterable[av.Packet], file: Path) -> Iterator[tuple[av.VideoFrame, bytes]]:
    """As `decoded`, but frame types and vectors are what mvextractor reads from the stream, which is put into `file`.

    It takes nothing but files, gives pictures in RGB only, and ends without a word on errors: so PyAV decodes the
    pictures a second time, from the same file, and the two are held against each other.
    """
    from mvextractor.videocap import VideoCap  # has wheels for Linux on x86-64 only

    with open(file, "wb") as stream:
        for packet in packets:
            stream.write(bytes(packet))
    capture = VideoCap()
    capture.set_decode_frames(False)
    if not capture.open(str(file)):
        raise ValueError("mvextractor cannot open the encoded stream")
    with av.open(str(file), "r", format="m4v") as container:
        container.streams.video[0].codec_context.thread_count = 1
        for number, frame in enumerate(container.decode(video=0)):
            read, _, vectors, kind = capture.read()
            if not read or kind != ("I" if frame.key_frame else "P"):
                raise ValueError(f"mvextractor finds {kind if read else 'no'} frame {number} in the encoded stream")
            records = np.zeros(len(vectors), RECORD)
            for name, column in zip(MVEXTRACTOR_COLUMNS, vectors.T):
                records[name] = column
            yield frame, records.tobytes()
    capture.release()


def grids(records: Sequence[bytes], settings: Settings) -> np.ndarray:
    """Vectors of n frames -> int16 (n, rows, cols, 2), quarter pixels, content from the previous frame to this one.

    FFmpeg's record points from this block back to its reference in units of 1/scale pixel, hence the sign; its dst is
    the block's centre. Its src is truncated to whole pixels and not used. Raises ValueError on anything our encoder
    does not make: other block sizes, other references, a second vector for a block.
    """
    cells = np.full((len(records), *settings.grid, 2), INTRA, np.int16)
    vectors = np.frombuffer(b"".join(records), RECORD)
    if not all((vectors[name] == value).all() for name, value in OURS.items()):
        raise ValueError("the encoded stream has vectors that are not half-pixel, 16x16 and from the previous frame")
    frame = np.repeat(np.arange(len(records)), [len(r) // RECORD.itemsize for r in records])
    row, column = (vectors[name] >> MACROBLOCK_BITS for name in ("dst_y", "dst_x"))  # floor; faster than to divide
    cell = np.ravel_multi_index((frame, row, column), cells.shape[:3])  # one index is several times faster than three
    for axis, name in enumerate(("motion_x", "motion_y")):
        cells.reshape(-1, 2)[cell, axis] = vectors[name] * (-QUARTERS // 2)
    if np.count_nonzero(cells[..., 0] != INTRA) != len(vectors):
        raise ValueError("the encoded stream has two vectors for one block")
    return cells


def shrink(frame: av.VideoFrame, scaler: VideoReformatter, width: int, height: int) -> av.VideoFrame:
    """Scale, and stretch the range: MPEG-4 is limited-range YUV, JPEG full-range."""
    return scaler.reformat(
        frame,
        width,
        height,
        "yuvj420p",
        src_color_range=ColorRange.MPEG,
        dst_color_range=ColorRange.JPEG,
        threads=1,  # else it starts threads, which take longer than the scaling
    )


def compress(picture: av.VideoFrame, quality: int) -> bytes:
    """JPEG of a full-range yuv420p picture; nothing is converted."""
    return simplejpeg.encode_jpeg_yuv_planes(*map(pixels, picture.planes), quality)
