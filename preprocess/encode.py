"""Any video -> MPEG-4 Part 2 with a fixed group of pictures: every twelfth frame is an I-frame (section 2.2)."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
from av.stream import Disposition
from av.video.codeccontext import VideoCodecContext
from av.video.frame import PictureType
from av.video.reformatter import ColorRange, Colorspace, VideoReformatter

from preprocess.shards import Settings

TICK = Fraction(1, 25)  # time between frames of the encoded stream, seconds; nothing reads it
MIN_DECODED = 0.9  # half an AVI decodes without any error: what a container declares is held against what came out
NOT_VIDEO = ("tty",)  # FFmpeg renders text files as pictures
UNSPECIFIED_MATRIX = 2
TALLEST_SD = 576  # untagged video taller than this is BT.709 by convention, else BT.601


@dataclass
class Source:
    """What `packets` found in a video; complete once they are exhausted."""

    frames: int = 0
    """Frames decoded, hence encoded."""
    fps: float = 0.0
    """Average frame rate; 0 where none is declared."""
    height: int = 0
    """Height of the first frame as displayed, rotation applied, pixels."""
    width: int = 0
    errors: list[str] = field(default_factory=list)
    """The decoder's words on each packet that did not decode and was skipped."""
    hidden: int = 0
    """Frames that the container declares but means not to show: cut off by an edit list, or dropped when recorded."""


def packets(path: str, settings: Settings, source: Source) -> Iterator[av.Packet]:
    """Re-encode the first video stream of a file: I P P ... with an I-frame every settings.gop frames, in MPEG-4.

    Fills in `source`. Frames are taken as decoded, whatever their timestamps; one thread, so that equal input gives
    equal bytes; the picture is stretched to the encoded size, as CoViAR does. Raises ValueError where there is no video
    to store, with the decoder's own words, or where fewer than 90 % of the declared frames decode.
    """
    with av.open(path, metadata_errors="ignore") as container:
        if container.format.name in NOT_VIDEO:
            raise ValueError("a text file, not a video")
        streams = [s for s in container.streams.video if not s.disposition & Disposition.attached_pic]
        if not streams:
            raise ValueError("no video stream")
        stream = streams[0]
        if stream.codec_context is None:
            raise ValueError("a video stream that no decoder here knows")
        stream.codec_context.thread_count = 1
        declared = stream.frames
        encoder = _encoder(settings)
        scaler = VideoReformatter()  # one a stream: one a frame is five times slower and grows memory
        for frame in _decode(container, stream, source):
            if not source.frames:
                source.height, source.width = frame.height, frame.width
                if frame.rotation % 180:
                    source.height, source.width = frame.width, frame.height
            picture = _stretch(frame, scaler, settings.width, settings.height)
            picture.pts, picture.time_base, picture.pict_type = source.frames, TICK, PictureType.NONE
            source.frames += 1
            yield from encoder.encode(picture)
        if not source.frames:
            raise ValueError(f"no decodable frame ({source.errors[0]})" if source.errors else "no decodable frame")
        yield from encoder.encode()
        declared -= source.hidden
        if source.frames < MIN_DECODED * declared:
            detail = f", first error: {source.errors[0]}" if source.errors else ""
            raise ValueError(f"only {source.frames} of {declared} declared frames decode (at least 90 % must){detail}")
        source.fps = float(stream.average_rate or stream.guessed_rate or 0)


def _encoder(settings: Settings) -> VideoCodecContext:
    """An MPEG-4 Part 2 encoder of constant quantiser and fixed GOP: no B-frames, no I-frames at cuts, one thread.

    With `qscale` FFmpeg's encoder takes the quality of each frame, which is 0 here, and clips it to qmin and qmax: they
    alone set the quantiser. That quality is also what its search and its score of scene changes weigh bits with; at 0
    the score is never positive, so that no cut gets an I-frame (with a bit rate instead, most do).
    """
    encoder = av.CodecContext.create("mpeg4", "w")
    assert isinstance(encoder, VideoCodecContext)
    encoder.width, encoder.height, encoder.pix_fmt = settings.width, settings.height, "yuv420p"
    encoder.time_base, encoder.framerate = TICK, 1 / TICK
    encoder.thread_count, encoder.gop_size, encoder.max_b_frames = 1, settings.gop, 0
    quantiser = str(settings.quantiser)
    encoder.options = {"flags": "+qscale+bitexact", "qmin": quantiser, "qmax": quantiser}
    return encoder


def film(path: Path, pictures: Iterable[np.ndarray], rate: Fraction, codec: str | None = None) -> None:
    """Write RGB pictures, uint8 (H, W, 3) of one even size, as an mp4, nearly without loss. One thread: the same bytes.

    codec: an FFmpeg encoder; None takes `film_codec`.
    """
    name = codec or film_codec()
    # Without its macroblock tree, which reads memory that nobody wrote: the same frames would give different bytes.
    h264 = {"crf": "12", "preset": "veryfast", "x264-params": "mbtree=0"}
    options = h264 if name == "libx264" else {"qmin": "2", "qmax": "2"}
    with av.open(str(path), "w", format="mp4", options={"fflags": "+bitexact"}) as container:
        stream = container.add_stream(name, rate=rate, options=options)
        assert isinstance(stream, av.VideoStream)
        stream.codec_context.thread_count = 1
        for number, picture in enumerate(pictures):
            if not number:
                stream.height, stream.width, stream.pix_fmt = *picture.shape[:2], "yuv420p"
            frame = av.VideoFrame.from_ndarray(picture, format="rgb24")
            frame.pts, frame.time_base = number, 1 / rate
            container.mux(stream.encode(frame))
        container.mux(stream.encode())


def film_codec() -> str:
    """H.264 where this FFmpeg has an encoder for it, else MPEG-4."""
    return "libx264" if "libx264" in av.codec.codecs_available else "mpeg4"


def _decode(
    container: av.container.InputContainer, stream: av.video.stream.VideoStream, source: Source
) -> Iterator[av.VideoFrame]:
    """Frames of a stream; packets that do not decode are skipped and noted, and reading ends where the file breaks."""
    packets = container.demux(stream)
    counts_frames = container.format.name == "avi"  # its time stamps number the frames, dropped ones included
    last: int | None = None
    while True:
        try:
            packet = next(packets)
        except StopIteration:
            return
        except av.FFmpegError as error:
            source.errors.append(str(error))
            # The demuxer cannot go on, but the decoder still holds frames.
            yield from stream.codec_context.decode(None)
            return
        source.hidden += packet.is_discard
        if counts_frames and packet.dts is not None:
            source.hidden += max(0, packet.dts - last - 1) if last is not None else 0
            last = packet.dts
        try:
            yield from packet.decode()
        except av.FFmpegError as error:
            source.errors.append(str(error))


def _stretch(frame: av.VideoFrame, scaler: VideoReformatter, width: int, height: int) -> av.VideoFrame:
    """Upright, yuv420p, BT.601, limited range, width x height: what the MPEG-4 encoder takes and JPEG assumes."""
    quarter_turns = round(frame.rotation / 90) % 4  # anticlockwise, as the display matrix counts
    # The matrix is named only where it must change: naming it makes the scaler leave its fast path.
    untagged = frame.colorspace == UNSPECIFIED_MATRIX
    is_709 = frame.colorspace == Colorspace.ITU709 or (untagged and frame.height > TALLEST_SD)
    colours = {"src_colorspace": Colorspace.ITU709, "dst_colorspace": Colorspace.ITU601} if is_709 else {}
    if not quarter_turns:
        kept = frame.format.name, frame.width, frame.height, frame.color_range == ColorRange.JPEG, is_709
        if kept == ("yuv420p", width, height, False, False):
            return frame  # nothing to do, which the scaler does not see where the source does not name its range
        return scaler.reformat(frame, width, height, "yuv420p", dst_color_range=ColorRange.MPEG, threads=1, **colours)
    if quarter_turns % 2:
        width, height = height, width
    planes = scaler.reformat(
        frame, width, height, "yuv444p", dst_color_range=ColorRange.MPEG, **colours
    ).to_ndarray()  # (3, H, W)
    turned = np.ascontiguousarray(np.rot90(planes, quarter_turns, axes=(1, 2)), np.uint8)
    return av.VideoFrame.from_ndarray(turned, "yuv444p").reformat(format="yuv420p")
