"""Videos as phones, cameras and broken downloads leave them: each fault is really made, and one video converted."""

from __future__ import annotations

import struct
from collections.abc import Callable, Sequence
from fractions import Fraction
from pathlib import Path
from typing import NamedTuple

import av
import h5py
import numpy as np
import pytest
import simplejpeg
from conftest import make_shards, panned, remux

from preprocess import check, child, encode
from preprocess.schema import Settings
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
    answer = child.convert(str(path), Spool(folder), settings, lambda: None)
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
    pix_fmt: str = "yuv420p",
    before: Sequence[np.ndarray] = (),
) -> Path:
    """Encode at any times, with so many seconds of sound beside it, and other video streams of one frame before it."""
    with av.open(str(path), "w", options=muxer or {}) as container:
        previews = [container.add_stream("mjpeg", rate=SECOND) for _ in before]
        for preview, picture in zip(previews, before):
            preview.height, preview.width, preview.pix_fmt = *picture.shape[:2], "yuvj420p"
        stream = container.add_stream(codec_name, rate=SECOND, options=options)
        stream.height, stream.width, stream.pix_fmt = *frames.shape[1:3], pix_fmt
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


@pytest.mark.parametrize("first", [0, 30])
@pytest.mark.parametrize("name", ["a.mp4", "b.mov"])
def test_what_an_editor_trimmed_is_no_loss(name: str, first: int, tmp_path: Path) -> None:
    """It leaves all frames in the file and says which 70 to show; of those that are then lost, the count is told."""
    codec_name = "mpeg4" if name == "b.mov" else "libx264"
    path = write(tmp_path / name, codec_name=codec_name, options={}, muxer={"movflags": "faststart"})
    data = bytearray(path.read_bytes())
    start = data.index(b"elst") + 12  # behind its version and the number of its entries
    duration, begin = struct.unpack_from(">Ii", data, start)  # in ticks of the film and of the stream
    with av.open(str(path)) as container:
        ticks = int(1 / container.streams.video[0].time_base / SECOND)
    struct.pack_into(">Ii", data, start, duration * 70 // 100, begin + first * ticks)
    path.write_bytes(data)
    stored = convert(path)
    assert (len(stored.frames), stored.errors) == (70, 0)
    cut = tmp_path / f"cut {name}"
    cut.write_bytes(data[: (data.index(b"mdat") + len(data)) // 2])
    with pytest.raises(ValueError, match="of 70 declared frames decode"):
        convert(cut)


def test_a_packet_that_the_cut_hits_is_counted_though_its_decoder_is_silent(tmp_path: Path) -> None:
    front = {"movflags": "faststart"}
    whole = write(tmp_path / "a.mov", codec_name="mjpeg", options={}, muxer=front, pix_fmt="yuvj420p")
    with av.open(str(whole)) as container:
        last = [p for p in container.demux(video=0) if p.size][95]
    cut = tmp_path / "cut.mov"
    cut.write_bytes(whole.read_bytes()[: last.pos + last.size * 9 // 10])
    stored = convert(cut)
    assert (len(stored.frames), stored.errors) == (96, 1)


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


@pytest.mark.parametrize("end", ["mkv", "flv"])
def test_a_picture_that_begins_after_the_sound_is_no_loss(end: str, tmp_path: Path) -> None:
    codec_name, options, _ = CONTAINERS[f"a.{end}"]
    late = write(tmp_path / f"a.{end}", codec_name=codec_name, options=options, times=lambda t: t + 4 * SECOND, sound=8)
    stored = convert(late)
    assert (len(stored.frames), stored.errors) == (100, 0)
    data = late.read_bytes()
    (tmp_path / f"cut.{end}").write_bytes(data[: len(data) * 60 // 100])
    with pytest.raises(ValueError, match="declared frames decode"):
        convert(tmp_path / f"cut.{end}")


def test_a_hole_is_refused(tmp_path: Path) -> None:
    mark = b"\x1f\x43\xb6\x75"  # that a cluster begins with, here of five frames
    clusters = write(tmp_path / "a.mkv", gop=5, muxer={"cluster_time_limit": "200"}).read_bytes().split(mark)
    assert len(clusters) == 1 + 20
    for name, lost in ("one", clusters[4:5]), ("four", clusters[4:8]), ("the first four", clusters[1:5]):
        (tmp_path / f"{name}.mkv").write_bytes(mark.join(c for c in clusters if c not in lost))
    assert len(convert(tmp_path / "one.mkv").frames) == 95
    for name in "four", "the first four":
        with pytest.raises(ValueError, match="only 80 of 100 declared frames decode"):
            convert(tmp_path / f"{name}.mkv")
    # What is there reaches to nine tenths, or to the end but in a wrong place, after which times go back.
    for name, kept in ("cut", clusters[2:19]), ("moved", [*clusters[1:15], clusters[20], *clusters[15:17]]):
        (tmp_path / f"{name}.mkv").write_bytes(mark.join([clusters[0], *kept]))
        with pytest.raises(ValueError, match="only 85 of 100 declared frames decode"):
            convert(tmp_path / f"{name}.mkv")


def test_frames_lost_here_and_there_are_no_variable_rate(tmp_path: Path) -> None:
    whole = write(tmp_path / "a.mkv", gop=1)
    with av.open(str(whole)) as container:
        packets = [(p.pos, p.size) for p in container.demux(video=0) if p.size]
    data = bytearray(whole.read_bytes())
    for number in np.random.default_rng(0).permutation(np.arange(1, 99))[:40].tolist():
        start, size = packets[number]
        data[start + 8 : start + size] = b"\xff" * (size - 8)
    (tmp_path / "b.mkv").write_bytes(data)
    with pytest.raises(ValueError, match="declared frames decode"):
        convert(tmp_path / "b.mkv")


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


# ---- how a picture is displayed

QUADRANTS = np.zeros((48, 64, 3), np.uint8)
QUADRANTS[:24, :32], QUADRANTS[:24, 32:], QUADRANTS[24:, :32] = (220, 30, 30), (30, 220, 30), (30, 30, 220)
# The matrix's a, b, c, d: x' = a x + c y, y' = b x + d y; and what that does to an array of rows, as numpy has it.
LAYOUTS: dict[str, tuple[tuple[int, int, int, int], Callable[[np.ndarray], np.ndarray]]] = {
    "as stored": ((1, 0, 0, 1), lambda p: p),
    "90 degrees clockwise": ((0, 1, -1, 0), lambda p: np.rot90(p, -1)),
    "180 degrees": ((-1, 0, 0, -1), lambda p: np.rot90(p, 2)),
    "270 degrees clockwise": ((0, -1, 1, 0), lambda p: np.rot90(p, 1)),
    "mirrored left to right": ((-1, 0, 0, 1), np.fliplr),
    "mirrored top to bottom": ((1, 0, 0, -1), np.flipud),
    "transposed": ((0, 1, 1, 0), lambda p: p.swapaxes(0, 1)),
    "transposed the other way": ((0, -1, -1, 0), lambda p: np.rot90(p, 2).swapaxes(0, 1)),
}


@pytest.mark.parametrize("name", LAYOUTS)
def test_pictures_are_stored_as_displayed(name: str, tmp_path: Path) -> None:
    matrix, laid_out = LAYOUTS[name]
    path = write(tmp_path / "a.mp4", np.repeat(QUADRANTS[None], 13, axis=0))
    data = bytearray(path.read_bytes())
    start = data.index(b"tkhd") + 44
    a, b, c, d = (n << 16 for n in matrix)
    data[start : start + 36] = struct.pack(">9i", a, b, 0, c, d, 0, 0, 0, 1 << 30)
    path.write_bytes(data)
    expected, stored = laid_out(QUADRANTS).astype(int), convert(path)
    assert stored.source_size == list(expected.shape[:2])
    for y in 0.25, 0.75:
        for x in 0.25, 0.75:
            ours = stored.frames[5][int(y * 48), int(x * 64)].astype(int)
            assert abs(ours - expected[int(y * len(expected)), int(x * expected.shape[1])]).max() < 12, (y, x)


def test_the_video_is_the_stream_with_most_pixels(tmp_path: Path) -> None:
    small, large = np.full((32, 48, 3), 200, np.uint8), np.full((96, 128, 3), 30, np.uint8)
    path = write(tmp_path / "a.mkv", np.repeat(large[None], 20, axis=0), before=[small, small])
    stored = convert(path)
    assert stored.source_size == [96, 128] and len(stored.frames) == 20 and stored.frames.max() < 50


def test_one_picture_is_no_video_beside_one(tmp_path: Path) -> None:
    poster = np.full((192, 256, 3), 200, np.uint8)
    stored = convert(write(tmp_path / "a.mp4", before=[poster]))
    assert stored.source_size == [48, 64] and len(stored.frames) == 100


# ---- high dynamic range: light in nits, as the standards have it, against what is stored

NITS = np.array([0, 2, 10, 26, 58, 100, 150, 203, 400, 900])
PQ, HLG = 16, 18


def signal(nits: np.ndarray, transfer: int) -> np.ndarray:
    """0 to 1, from light of the display; ITU-R BT.2100, table 4 (PQ) and 5 (HLG, at 1,000 nits)."""
    if transfer == PQ:
        y = (nits / 10_000) ** (2610 / 16384)
        return ((3424 / 4096 + 2413 / 128 * y) / (1 + 2392 / 128 * y)) ** (2523 / 32)
    scene = (nits / 1000) ** (1 / 1.2)  # of grey; the system's gamma is 1.2
    a, b, c = 0.17883277, 0.28466892, 0.55991073
    return np.where(scene <= 1 / 12, np.sqrt(3 * scene), a * np.log(np.maximum(12 * scene - b, 1e-9)) + c)


@pytest.mark.parametrize(("transfer", "full"), [(PQ, False), (HLG, True)], ids=["pq, limited", "hlg, full"])
def test_high_dynamic_range_is_shown_as_on_a_usual_display(transfer: int, full: bool, tmp_path: Path) -> None:
    levels = signal(NITS.astype(float), transfer) * (1023 if full else 876) + (0 if full else 64)
    columns = np.arange(320) * len(NITS) // 320
    frame = av.VideoFrame(320, 48, "yuv420p10le")
    for plane, value in zip(frame.planes, (levels.round()[columns], 512, 512)):
        memory = np.ndarray((plane.height, plane.width), np.uint16, memoryview(plane), strides=(plane.line_size, 2))
        memory[:] = value
    with av.open(str(tmp_path / "a.mkv"), "w") as container:
        stream = container.add_stream("ffv1", rate=25)
        stream.width, stream.height, stream.pix_fmt = 320, 48, "yuv420p10le"
        for tagged in stream.codec_context, frame:
            tagged.colorspace, tagged.color_range = 9, 2 if full else 1
            tagged.color_trc, tagged.color_primaries = transfer, 9
        frame.pts, frame.time_base = 0, Fraction(1, 25)
        container.mux([*stream.encode(frame), *stream.encode()])
    stored = convert(tmp_path / "a.mkv", Settings(frame_width=320, frame_height=48))
    seen = stored.frames[0][24, (2 * np.arange(len(NITS)) + 1) * 320 // (2 * len(NITS))]
    expected = 255 * np.minimum(NITS / 203, 1) ** (1 / 2.4)  # BT.2408's white; BT.1886's display
    np.testing.assert_allclose(seen, np.repeat(expected[:, None], 3, axis=1), atol=8)


# ---- one file and no other


def record(number: int, value: bytes) -> bytes:
    return struct.pack(">HH", number, len(value)) + value + b"\0" * (len(value) % 2)


def point_elsewhere(path: Path, neighbour: Path) -> None:
    """Have a QuickTime file say that its samples lie in another file: an alias with a path, as an editor leaves it."""
    data = path.read_bytes()
    alias = bytes(10) + bytes([4]) + b"disk".ljust(27, b"\0") + bytes(12)
    alias += bytes([len(neighbour.name)]) + neighbour.name.encode().ljust(63, b"\0") + bytes(16)
    alias += struct.pack(">HH", 1, 1) + bytes(16) + record(2, str(neighbour).encode()) + b"\xff\xff\0\0"
    entry = struct.pack(">I4sI", 12 + len(alias), b"alis", 0) + alias
    place = data.index(b"dref") - 4
    table = struct.pack(">I4sII", 16 + len(entry), b"dref", 0, 1) + entry
    grown = len(table) - struct.unpack(">I", data[place : place + 4])[0]
    changed = bytearray(data[:place] + table + data[place + len(table) - grown :])
    for box in b"moov", b"trak", b"mdia", b"minf", b"dinf":  # each holds the next; the samples lie before all of them
        start = changed.index(box) - 4
        changed[start : start + 4] = struct.pack(">I", struct.unpack(">I", changed[start : start + 4])[0] + grown)
    path.write_bytes(changed)


def attack(kind: str, folder: Path) -> Path:
    """A dark picture, or none, under a name or with a content that would have a white neighbour shown in its place."""
    white, dark = np.full((20, 48, 64, 3), 250, np.uint8), np.full((20, 48, 64, 3), 30, np.uint8)
    if kind == "playlist":
        write(folder / "white.ts", white)
        path, head = folder / "a.m3u8", "#EXTM3U\n#EXT-X-VERSION:3\n#EXT-X-TARGETDURATION:1\n#EXTINF:0.8,\n"
        path.write_text(f"{head}white.ts\n#EXT-X-ENDLIST\n")
    elif kind == "list to join":
        write(folder / "white.mp4", white)
        path = folder / "a.mp4"
        path.write_text("ffconcat version 1.0\nfile white.mp4\n")
    elif kind == "pattern of names":
        write(folder / "i0.png", white[:1], "png", {}, pix_fmt="rgb24")
        path = write(folder / "dark.png", dark[:1], "png", {}, pix_fmt="rgb24").rename(folder / "i%d.png")
    else:
        write(folder / "white.mov", white, "rawvideo", {}, pix_fmt="yuyv422")
        path = write(folder / "a.mov", dark, "rawvideo", {}, pix_fmt="yuyv422")
        point_elsewhere(path, folder / "white.mov")
    return path


@pytest.mark.parametrize("kind", ["playlist", "list to join", "pattern of names", "reference"])
def test_no_file_shows_another(kind: str, tmp_path: Path) -> None:
    path = attack(kind, tmp_path)
    try:
        stored = convert(path)
    except (ValueError, OSError):
        return
    assert stored.frames.max() < 100


# ---- when frames are shown


def test_a_stream_that_appears_in_mid_file_ends_nothing_early(tmp_path: Path) -> None:
    first, second = write(tmp_path / "1.ts", FRAMES[:30]), write(tmp_path / "2.ts", FRAMES[:20], sound=1)
    joined = tmp_path / "joined.ts"
    joined.write_bytes(first.read_bytes() + second.read_bytes())
    with av.open(str(joined)) as real:

        class Container:
            """PyAV ends so at times: it asks for the new stream in a list made at the start."""

            format, streams = real.format, real.streams

            def demux(self, *streams):
                yield from real.demux(*streams)
                raise IndexError("list index out of range")

        assert len(list(encode._decode(Container(), real.streams.video[0], encode.Source()))) == 50
    assert len(convert(joined).frames) == 50


@pytest.mark.parametrize("end", ["mp4", "mkv", "flv"])
def test_a_variable_rate_keeps_its_times(end: str, tmp_path: Path) -> None:
    codec_name, options, _ = CONTAINERS[f"a.{end}"]
    names = [f"even.{end}", f"uneven.{end}"]
    write(tmp_path / names[0], FRAMES[:30], codec_name, options)
    write(tmp_path / names[1], FRAMES[:40], codec_name, options, times=lambda t: 3 + t + screen(t))
    mixed = make_shards(tmp_path / "mixed", tmp_path, names, settings=TINY).shards[0]
    np.testing.assert_allclose(mixed.times(0), np.arange(30) / SECOND, atol=0.002)  # FLV counts milliseconds
    np.testing.assert_allclose(mixed.times(1), [(t + screen(t)) / SECOND for t in range(40)], atol=0.002)
    even = make_shards(tmp_path / "even", tmp_path, names[:1], settings=TINY).shards[0]
    np.testing.assert_array_equal(even.times(0), np.arange(30) / SECOND)
    with h5py.File(mixed.path) as with_times, h5py.File(even.path) as without:
        assert "time" in with_times["frames"] and "time" not in without["frames"]
    assert check.problems(tmp_path / "mixed" / "shards") == []


def test_times_that_go_back_are_not_stored(real_clips: list[Path], tmp_path: Path) -> None:
    clip = next(c for c in real_clips if "RATRACE" in c.name)  # an AVI of B-frames: it says when each is decoded
    source = encode.Source()
    for _ in encode.packets(str(clip), TINY, source):
        pass
    assert source.is_variable and (np.diff(source.times) < 0).any() and source.variable_times() == []
