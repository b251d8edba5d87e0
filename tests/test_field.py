"""Videos as phones, cameras and broken downloads leave them: each fault is really made, and one video converted."""

from __future__ import annotations

import struct
from collections.abc import Callable, Sequence
from fractions import Fraction
from pathlib import Path
from typing import NamedTuple

import av
import numpy as np
import pytest
import simplejpeg
from conftest import panned

from preprocess import codec, encode
from preprocess.shards import Settings
from preprocess.writer import Spool

TINY = Settings(width=64, height=48, frame_width=64, frame_height=48, quantiser=2, jpeg_quality=95)
SECOND = 25
FRAMES = panned(4 * SECOND, height=48, width=64)
X264 = {"crf": "12", "preset": "ultrafast"}


class Stored(NamedTuple):
    frames: np.ndarray
    """RGB (T, H, W, 3)."""
    errors: int
    source_size: list[int]
    fps: float


def convert(path: Path, settings: Settings = TINY) -> Stored:
    """One video through stage 1, in this process. Raises ValueError or av.FFmpegError where it is not stored."""
    folder = path.parent / f"{path.name}.stored"
    folder.mkdir()
    answer = codec.convert(str(path), Spool(folder), settings, lambda: None)
    ends = np.cumsum(answer["frame_bytes"])
    data = (folder / "frames").read_bytes()
    pictures = [simplejpeg.decode_jpeg(data[a:b]) for a, b in zip([0, *ends], ends)]
    return Stored(np.stack(pictures), answer["decode_errors"], answer["source_size"], answer["fps"])


def write(
    path: Path,
    frames: np.ndarray = FRAMES,
    codec_name: str = "libx264",
    options: dict[str, str] = X264,
    muxer: dict[str, str] | None = None,
    gop: int = 12,
    times: Callable[[int], int] = lambda t: t,
    sound: int = 0,
    before: Sequence[np.ndarray] = (),
) -> Path:
    """Encode at any times, with so many seconds of sound beside it, and other video streams of one frame before it."""
    with av.open(str(path), "w", options=muxer or {}) as container:
        previews = [container.add_stream("mjpeg", rate=SECOND) for _ in before]
        for preview, picture in zip(previews, before):
            preview.height, preview.width, preview.pix_fmt = *picture.shape[:2], "yuvj420p"
        stream = container.add_stream(codec_name, rate=SECOND, options=options)
        stream.height, stream.width, stream.pix_fmt = *frames.shape[1:3], "yuv420p"
        stream.codec_context.gop_size = gop
        audio = container.add_stream("aac", rate=8000, layout="mono") if sound else None
        for preview, picture in zip(previews, before):
            frame = av.VideoFrame.from_ndarray(picture, "rgb24")
            frame.pts, frame.time_base = 0, Fraction(1, SECOND)
            container.mux([*preview.encode(frame), *preview.encode()])
        for t, picture in enumerate(frames):
            frame = av.VideoFrame.from_ndarray(picture, "rgb24")
            frame.pts, frame.time_base = times(t), Fraction(1, SECOND)
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
        for start in range(0, sound * 8000 if audio else 0, 1024):
            silence = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), "fltp", "mono")
            silence.rate, silence.pts, silence.time_base = 8000, start, Fraction(1, 8000)
            container.mux(audio.encode(silence))
        container.mux(audio.encode() if audio else [])
    return path


def remux(source: Path, target: Path, **muxer: str) -> Path:
    """The same packets in another container."""
    with (
        av.open(str(source), metadata_errors="ignore") as a,
        av.open(str(target), "w", options=muxer) as b,
    ):
        stream = a.streams.video[0]
        copy = b.add_stream_from_template(stream)
        for number, packet in enumerate(a.demux(stream)):
            if packet.size:
                if packet.pts is None:  # an old AVI numbers its frames, and does not time them
                    packet.pts = packet.dts if packet.dts is not None else number
                packet.stream = copy
                b.mux(packet)
    return target


# ---- truncation and damage

CONTAINERS: dict[str, tuple[str, dict[str, str], dict[str, str]]] = {
    "a.mkv": ("libx264", X264, {}),
    "a.webm": ("libvpx", {"b": "300k", "deadline": "realtime"}, {}),
    "a.flv": ("flv1", {"b": "300k"}, {}),
    "a.avi": ("mpeg4", {"b": "300k"}, {}),
    "a.mp4": ("libx264", X264, {"movflags": "faststart"}),
    "fragmented.mp4": ("libx264", X264, {"movflags": "frag_keyframe+empty_moov"}),
    "dash.mp4": ("libx264", X264, {"movflags": "dash+frag_every_frame"}),
    "a.ts": ("libx264", X264, {}),
    "a.mpg": ("mpeg2video", {"b": "300k"}, {}),
}
NOTHING_DECLARED = ("dash.mp4", "a.ts", "a.mpg")  # what is cut there shows only in the packet that the cut hits


@pytest.mark.parametrize("name", CONTAINERS)
def test_a_cut_file_is_refused_or_counted(name: str, tmp_path: Path) -> None:
    codec_name, options, muxer = CONTAINERS[name]
    whole = write(tmp_path / name, codec_name=codec_name, options=options, muxer=muxer)
    stored = convert(whole)
    assert (len(stored.frames), stored.errors) == (100, 0)
    data = whole.read_bytes()
    cut = tmp_path / f"cut {name}"
    cut.write_bytes(data[: len(data) * 30 // 100])
    if name in NOTHING_DECLARED:
        stored = convert(cut)
        assert 20 < len(stored.frames) < 40 and stored.errors == 1
    else:
        with pytest.raises(ValueError, match="declared frames decode"):
            convert(cut)


def test_a_fragment_that_promises_more_than_the_file_holds_is_counted(tmp_path: Path) -> None:
    whole = write(tmp_path / "a.mp4", gop=100, muxer={"movflags": "frag_keyframe+empty_moov"})
    with av.open(str(whole)) as container:
        ends = [p.pos + p.size for p in container.demux(video=0) if p.size]
    cut = tmp_path / "cut.mp4"
    cut.write_bytes(whole.read_bytes()[: ends[94]])  # between two frames: the 95 that are left decode without any error
    stored = convert(cut)
    assert (len(stored.frames), stored.errors) == (95, 5)


def screen(t: int) -> int:
    """A recorded screen: bursts of ten frames, each followed by two seconds in which nothing moves."""
    return t + t // 10 * 2 * SECOND


@pytest.mark.parametrize("end", ["mkv", "flv", "webm", "ts", "mp4"])
@pytest.mark.parametrize("times", [screen, lambda t: t * t // 20], ids=["bursts", "slowing down"])
def test_a_variable_rate_is_no_loss(times: Callable[[int], int], end: str, tmp_path: Path) -> None:
    codec_name, options, _ = CONTAINERS[f"a.{end}"]
    whole = write(tmp_path / f"a.{end}", codec_name=codec_name, options=options, times=lambda t: t + times(t))
    stored = convert(whole)
    assert (len(stored.frames), stored.errors) == (100, 0)
    if end in ("mkv", "flv", "webm"):
        data = whole.read_bytes()
        (tmp_path / f"cut.{end}").write_bytes(data[: len(data) * 30 // 100])
        with pytest.raises(ValueError, match="declared frames decode"):
            convert(tmp_path / f"cut.{end}")


@pytest.mark.parametrize("end", ["mkv", "flv", "mp4", "ts"])
def test_sound_that_goes_on_after_the_picture_is_no_loss(end: str, tmp_path: Path) -> None:
    codec_name, options, _ = CONTAINERS[f"a.{end}"]
    stored = convert(write(tmp_path / f"a.{end}", codec_name=codec_name, options=options, sound=8))
    assert (len(stored.frames), stored.errors) == (100, 0)


def test_a_hole_in_the_middle_is_refused(tmp_path: Path) -> None:
    mark = b"\x1f\x43\xb6\x75"  # that a cluster begins with, here of five frames
    clusters = write(tmp_path / "a.mkv", gop=5, muxer={"cluster_time_limit": "200"}).read_bytes().split(mark)
    assert len(clusters) == 1 + 20
    for name, lost in ("one", clusters[4:5]), ("four", clusters[4:8]):
        (tmp_path / f"{name}.mkv").write_bytes(mark.join(c for c in clusters if c not in lost))
    assert len(convert(tmp_path / "one.mkv").frames) == 95
    with pytest.raises(ValueError, match="only 80 of 100 declared frames decode"):
        convert(tmp_path / "four.mkv")


def test_frames_that_the_decoder_patched_up_are_counted(tmp_path: Path) -> None:
    whole = write(tmp_path / "a.mp4", gop=12)
    data = bytearray(whole.read_bytes())
    with av.open(str(whole)) as container:
        packets = [(p.pos, p.size) for p in container.demux(video=0) if p.size]
    rng = np.random.default_rng(0)
    for start, size in packets[::3]:
        middle = start + size // 2
        data[middle : middle + 20] = rng.bytes(20)
    (tmp_path / "corrupted.mp4").write_bytes(data)
    marked = raised = 0
    with av.open(str(tmp_path / "corrupted.mp4")) as container:
        for packet in container.demux(video=0):
            try:
                marked += sum(frame.is_corrupt for frame in packet.decode())
            except av.FFmpegError:
                raised += 1
    stored = convert(tmp_path / "corrupted.mp4")
    assert marked > 10 and stored.errors == marked + raised and len(stored.frames) == 100 - raised
    assert convert(whole).errors == 0


@pytest.mark.parametrize("end", ["mkv", "ts", "mp4", "flv"])
def test_real_clips_and_their_remuxes_are_whole(end: str, real_clips: list[Path], tmp_path: Path) -> None:
    made = 0
    for number, clip in enumerate(real_clips):
        with av.open(str(clip), metadata_errors="ignore") as container:
            kind, declared = container.streams.video[0].codec.name, container.streams.video[0].frames
        if kind != "h264" and end in ("flv", "ts"):  # which take no XviD or DivX, or lose its headers
            continue
        source, fragmented = encode.Source(), {"movflags": "frag_keyframe+empty_moov"} if end == "mp4" else {}
        copy = remux(clip, tmp_path / f"{number}.{end}", **fragmented)
        for _ in encode.packets(str(copy), TINY, source):
            pass
        assert abs(source.frames - declared) <= 3 and source.damage == 0, clip.name
        made += 1
    assert made >= 3
