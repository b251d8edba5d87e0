"""Any video -> MPEG-4 Part 2 with a fixed group of pictures: every twelfth frame is an I-frame (section 2.2)."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field
from fractions import Fraction
from functools import cache
from pathlib import Path
from typing import NamedTuple

import av
import numpy as np
from av.container import InputContainer
from av.sidedata.sidedata import SideDataContainer
from av.stream import Disposition
from av.video.codeccontext import VideoCodecContext
from av.video.frame import PictureType
from av.video.plane import VideoPlane
from av.video.reformatter import ColorPrimaries, ColorRange, Colorspace, ColorTrc, VideoReformatter
from av.video.stream import VideoStream

from preprocess.schema import Settings

TICK = Fraction(1, 25)  # time between frames of the encoded stream, seconds; nothing reads it
MIN_DECODED = 0.9  # half an AVI decodes without any error: what a container declares is held against what came out
UNCUT = 0.98  # of its declared duration: a file that goes on to there was not cut off
NOT_VIDEO = ("tty",)  # FFmpeg renders text files as pictures
ONLY_ITSELF = {"protocol_whitelist": "none"}  # playlists, references and patterns open no other file
ISO_MEDIA = "mov,mp4,m4a,3gp,3g2,mj2"
DECLARES_DURATION = ("matroska,webm", "flv", "asf", ISO_MEDIA)  # of others FFmpeg makes it up
VARIABLE = 0.1  # of constant rate is what has fewer steps between frames that are half a frame off; losses make few
UNSPECIFIED = 2  # matrix or primaries
TALLEST_SD = 576  # untagged video taller than this is BT.709 by convention, else BT.601
MATRICES = (Colorspace.ITU709, Colorspace.FCC, Colorspace.SMPTE240M, Colorspace.BT2020)  # that are not BT.601's
HIGH_DYNAMIC_RANGE = (ColorTrc.SMPTE2084, ColorTrc.ARIB_STD_B67)  # PQ, HLG
H264 = {"crf": "12", "preset": "veryfast"}
# x264 decides otherwise on a CPU with other instructions, and its macroblock tree reads memory that nobody wrote.
X264 = ["cpu-independent=1", "mbtree=0"]
BT601 = np.array([(16829, 33039, 6416), (-9714, -19070, 28784), (28784, -24103, -4681)])
"""Y, U and V of R, G and B, limited range, in parts of 65536."""


@dataclass
class Source:
    """What `packets` found in a video; complete once they are exhausted."""

    frames: int = 0
    """Frames decoded, hence encoded."""
    fps: float = 0.0
    """Average frame rate; 0 where none is declared."""
    height: int = 0
    """Height of the first frame as displayed, turned as the file asks, pixels."""
    width: int = 0
    errors: list[str] = field(default_factory=list)
    """The decoder's words on each packet that did not decode and was skipped, or is not there."""
    packets: int = 0
    """Packets of the video that were there."""
    corrupt_packets: int = 0
    """Packets that the demuxer marks as damaged, and that decoded all the same."""
    corrupt_frames: int = 0
    """Frames that the decoder marks as damaged: it filled in what it could not read."""
    hidden: int = 0
    """Frames that the container declares but means not to show: cut off by an edit list, or dropped when recorded."""
    times: list[float] = field(default_factory=list)
    """When each frame is shown, seconds; nan where the file does not say."""
    end: float = 0.0
    """When the last packet ends, audio's included, seconds."""

    @property
    def is_variable(self) -> bool:
        """Whether the frames do not come at the declared rate."""
        steps = np.diff(self.times) * self.fps
        return len(steps) > 0 and bool((abs(steps - 1) > 0.5).mean() > VARIABLE)

    def variable_times(self) -> list[float]:
        """Seconds from the first frame to each where the rate is variable; times that go back, as in AVI, are none."""
        if not self.is_variable or not (np.diff(self.times) > 0).all():
            return []
        return [round(t - self.times[0], 6) for t in self.times]

    @property
    def damage(self) -> int:
        """Packets that did not decode, or not wholly. (A damaged packet usually makes a damaged frame.)"""
        return len(self.errors) + max(self.corrupt_packets, self.corrupt_frames)


def packets(path: str, settings: Settings, source: Source) -> Iterator[av.Packet]:
    """Re-encode the best video stream of a file: I P P ... with an I-frame every settings.gop frames, in MPEG-4.

    Fills in `source`. The best stream has the most pixels, then the most frames. Frames are taken as decoded, whatever
    their timestamps; one thread, so that equal input gives equal bytes; the picture is stretched to the encoded size,
    as CoViAR does. Raises ValueError where there is no video to store, with the decoder's own words, or where fewer
    than 90 % of the declared frames decode; OSError, no av.FFmpegError, where the file cannot be read.
    """
    # FFmpeg is handed the open file, not its name: what fails in reading it is then no error of the video's.
    with ExitStack() as opened:
        file = opened.enter_context(open(path, "rb", buffering=0))
        if not os.fstat(file.fileno()).st_size:
            raise ValueError("an empty file")
        container = opened.enter_context(av.open(file, "r", metadata_errors="ignore", container_options=ONLY_ITSELF))
        if container.format.name in NOT_VIDEO:
            raise ValueError("a text file, not a video")
        stream = _best(container)
        stream.codec_context.thread_count = 1
        encoder = _encoder(settings)
        scaler = VideoReformatter()  # one a stream: one a frame is five times slower and grows memory
        for frame in _decode(container, stream, source):
            if not source.frames:
                source.height, source.width = frame.height, frame.width
                if _orientation(frame).transposed:
                    source.height, source.width = frame.width, frame.height
            source.times.append(float("nan") if frame.time is None else frame.time)
            source.corrupt_frames += frame.is_corrupt
            picture = _stretch(frame, scaler, settings.width, settings.height)
            picture.pts, picture.time_base, picture.pict_type = source.frames, TICK, PictureType.NONE
            source.frames += 1
            yield from encoder.encode(picture)
        if not source.frames:
            raise ValueError(f"no decodable frame ({source.errors[0]})" if source.errors else "no decodable frame")
        yield from encoder.encode()
        source.fps = float(stream.average_rate or stream.guessed_rate or 0)
        declared = _declared(container, stream, source)
        if source.frames < MIN_DECODED * declared:
            detail = f", first error: {source.errors[0]}" if source.errors else ""
            raise ValueError(f"only {source.frames} of {declared} declared frames decode (at least 90 % must){detail}")


def _best(container: InputContainer) -> VideoStream:
    """The stream that is the video: not a cover, not a preview."""
    streams = [s for s in container.streams.video if not s.disposition & Disposition.attached_pic]
    if not streams:
        raise ValueError("no video stream")
    streams = [s for s in streams if s.codec_context is not None]
    if not streams:
        raise ValueError("a video stream that no decoder here knows")
    return max(streams, key=lambda s: (s.frames != 1, s.codec_context.width * s.codec_context.height, s.frames))


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
    """Write RGB pictures, uint8 (H, W, 3) of one even size, as an mp4, nearly without loss.

    The same pictures give the same bytes, on any kind of CPU. codec: an FFmpeg encoder; None takes `film_codec`.
    """
    name = codec or film_codec()
    options = {**H264, "x264-params": ":".join(X264)} if name == "libx264" else {"qmin": "2", "qmax": "2"}
    with av.open(str(path), "w", format="mp4", options={"fflags": "+bitexact"}) as container:
        stream = container.add_stream(name, rate=rate, options=options)
        assert isinstance(stream, av.VideoStream)
        stream.codec_context.thread_count = 1
        for number, picture in enumerate(pictures):
            if not number:
                stream.height, stream.width, stream.pix_fmt = *picture.shape[:2], "yuv420p"
            frame = av.VideoFrame.from_ndarray(_yuv420p(picture), format="yuv420p")
            frame.pts, frame.time_base = number, 1 / rate
            container.mux(stream.encode(frame))
        container.mux(stream.encode())


def film_codec() -> str:
    """H.264 where this FFmpeg has an encoder for it, else MPEG-4."""
    return "libx264" if "libx264" in av.codec.codecs_available else "mpeg4"


def _yuv420p(picture: np.ndarray) -> np.ndarray:
    """RGB as BT.601 of limited range, planes below each other, uint8 (3H/2, W). FFmpeg's scaler rounds by CPU."""
    height, width = picture.shape[:2]
    colours = picture.astype(np.int32)
    squares = colours.reshape(height // 2, 2, width // 2, 2, 3).sum(axis=(1, 3))
    luma = (colours @ BT601[0] + (1 << 15) >> 16) + 16
    chroma = [(squares @ weights + (1 << 17) >> 18) + 128 for weights in BT601[1:]]
    return np.concatenate([plane.reshape(-1) for plane in (luma, *chroma)]).astype(np.uint8).reshape(-1, width)


def _decode(container: InputContainer, stream: VideoStream, source: Source) -> Iterator[av.VideoFrame]:
    """Frames of a stream; packets that do not decode are skipped and noted, and reading ends where the file breaks."""
    packets = container.demux(stream, *container.streams.audio)  # sound tells how far the file goes
    counts_frames = container.format.name == "avi"  # its time stamps number the frames, dropped ones included
    fragmented = container.format.name == ISO_MEDIA and not stream.frames
    last: int | None = None
    while True:
        try:
            packet = next(packets)
        except (StopIteration, IndexError):  # PyAV's, at the end, where a stream appeared in mid-file
            if fragmented:
                source.errors += ["a fragment promises more"] * (len(stream.index_entries) - source.packets)
            return
        except av.FFmpegError as error:
            source.errors.append(str(error))
            # The demuxer cannot go on, but the decoder still holds frames.
            yield from stream.codec_context.decode(None)
            return
        if packet.pts is not None:
            source.end = max(source.end, float((packet.pts + (packet.duration or 0)) * packet.time_base))
        if packet.stream is not stream:
            continue
        source.packets += packet.size > 0
        source.hidden += packet.is_discard
        if counts_frames and packet.dts is not None:
            source.hidden += max(0, packet.dts - last - 1) if last is not None else 0
            last = packet.dts
        try:
            yield from stream.codec_context.decode(packet)
            source.corrupt_packets += packet.is_corrupt
        except av.FFmpegError as error:
            source.errors.append(str(error))


def _declared(container: InputContainer, stream: VideoStream, source: Source) -> int:
    """How many frames the container promises to show, 0 where it does not say.

    Where it declares a duration instead of a count, that times the rate. Where the rate varies, a duration tells only
    whether the file goes on to its end: then what it holds is all there is.
    """
    if stream.frames:
        if container.format.name == ISO_MEDIA:  # an edit list takes most of what it hides out of the index
            return sum(not entry.is_discard for entry in stream.index_entries)
        return stream.frames - source.hidden
    if container.format.name not in DECLARES_DURATION:
        return 0
    last = max((t for t in source.times if t == t), default=0.0)  # damaged time stamps may go back, or be none
    if stream.duration and stream.time_base:
        duration = float(stream.duration * stream.time_base)
    else:
        duration = (container.duration or 0) / av.time_base
        if source.end >= UNCUT * duration:  # of the longest stream, which may be sound
            duration = min(duration, last + 1 / source.fps) if source.fps else 0
        if stream.start_time and stream.time_base:  # the video may begin after the sound
            duration -= float(stream.start_time * stream.time_base) - (container.start_time or 0) / av.time_base
    if source.is_variable and last >= MIN_DECODED * duration:
        return source.packets - source.hidden  # frames that are lost here and there look like a variable rate too
    return round(duration * source.fps) - source.hidden


# ---- pictures


def side_data(frame: av.VideoFrame, kind: str) -> bytes:
    """What FFmpeg attached to a frame, b"" where there is nothing of this kind."""
    # Not frame.side_data: it ties frame and side data into a cycle, so that frames by the dozen wait for the garbage
    # collector, and every new one is fresh memory. That takes a third of the time that decoding takes.
    data = SideDataContainer(frame).get(kind)  # type: ignore[call-arg]  # not in the stubs
    return b"" if data is None else bytes(data)


def pixels(plane: VideoPlane) -> np.ndarray:
    """A plane of 8 bits as an array (H, W) over its memory."""
    return np.ndarray((plane.height, plane.width), np.uint8, memoryview(plane), strides=(plane.line_size, 1))


class Orientation(NamedTuple):
    """How a stored picture becomes the one displayed: first transposed, then mirrored."""

    transposed: bool = False
    rows: int = 1
    """-1 where their order is turned round."""
    columns: int = 1


def _orientation(frame: av.VideoFrame) -> Orientation:
    """Of the display matrix, the nearest of the eight ways to lay a picture on its rectangle.

    In its first two columns the matrix maps x to a x + c y, and y to b x + d y (ISO/IEC 14496-12, 6.2.2).
    """
    matrix = side_data(frame, "DISPLAYMATRIX")
    if not matrix:
        return Orientation()
    a, b, _, c, d = np.frombuffer(matrix, np.int32)[:5].tolist()
    if abs(b) + abs(c) > abs(a) + abs(d):
        return Orientation(True, -1 if b < 0 else 1, -1 if c < 0 else 1)
    return Orientation(False, -1 if d < 0 else 1, -1 if a < 0 else 1)


def _stretch(frame: av.VideoFrame, scaler: VideoReformatter, width: int, height: int) -> av.VideoFrame:
    """Upright, yuv420p, BT.601, limited range, width x height: what the MPEG-4 encoder takes and JPEG assumes."""
    way = _orientation(frame)
    if way == Orientation():
        return _scale(frame, scaler, width, height)
    stored = _scale(frame, scaler, *((height, width) if way.transposed else (width, height)))
    upright = av.VideoFrame(width, height, "yuv420p")
    for source, target in zip(stored.planes, upright.planes):
        plane = pixels(source).T if way.transposed else pixels(source)
        pixels(target)[:] = plane[:: way.rows, :: way.columns]
    return upright


def _scale(frame: av.VideoFrame, scaler: VideoReformatter, width: int, height: int) -> av.VideoFrame:
    """yuv420p, BT.601, limited range, width x height, as stored.

    Of standard dynamic range only matrix and range are converted: the transfer curve and the primaries stay the
    source's, as in what decoders for training give. PQ and HLG are shown as a BT.709 display would show them.
    """
    if frame.color_trc in HIGH_DYNAMIC_RANGE:
        return _tone_mapped(scaler.reformat(frame, width, height, "yuv420p10le", threads=1))
    matrix = frame.colorspace
    if matrix == UNSPECIFIED and frame.height > TALLEST_SD:
        matrix = Colorspace.ITU709
    # The matrix is named only where it must change: naming it makes the scaler leave its fast path.
    changes = matrix in MATRICES
    colours = {"src_colorspace": matrix, "dst_colorspace": Colorspace.ITU601} if changes else {}
    kept = frame.format.name, frame.width, frame.height, frame.color_range == ColorRange.JPEG, changes
    if kept == ("yuv420p", width, height, False, False):
        return frame  # nothing to do, which the scaler does not see where the source does not name its range
    return scaler.reformat(frame, width, height, "yuv420p", dst_color_range=ColorRange.MPEG, threads=1, **colours)


def _tone_mapped(frame: av.VideoFrame) -> av.VideoFrame:
    """PQ or HLG as yuv420p of standard dynamic range, BT.601, limited range.

    In the light that a display of 1,000 nits would give, white is 203 nits (ITU-R BT.2408) and what is brighter is cut
    off; light becomes BT.709's primaries at gamma 2.4 (BT.1886).
    """
    if frame.colorspace == UNSPECIFIED:
        frame.colorspace = Colorspace.BT2020
    if frame.color_primaries == UNSPECIFIED:
        frame.color_primaries = ColorPrimaries.BT2020
    return _tone_mapper().reformat(
        frame,
        format="yuv420p",
        dst_colorspace=Colorspace.ITU601,
        dst_color_range=ColorRange.MPEG,
        dst_color_trc=ColorTrc.BT709,
        dst_color_primaries=ColorPrimaries.BT709,
        threads=1,
    )


@cache
def _tone_mapper() -> VideoReformatter:
    """One a process: it makes a table of all colours, which takes three seconds."""
    return VideoReformatter()
