"""Bad input and interrupted runs (the table of bad input in the design): each fault is really made."""

from __future__ import annotations

import csv
import fcntl
import os
import resource
import shutil
import signal
import struct
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
import simplejpeg
from conftest import make_shards, panned, write_video

from preprocess import check, pipeline
from preprocess.codec import Codec, plain
from preprocess.manifest import Manifest
from preprocess.shards import Settings, Shard, ShardSet

ROOT = Path(__file__).resolve().parent.parent
TINY = Settings(width=64, height=48, frame_width=48, frame_height=32)
TINY_FLAGS = ["--width", "64", "--height", "48", "--frame-width", "48", "--frame-height", "32"]


def files(folder: Path) -> dict[str, bytes]:
    """Every file under a folder, hidden ones too."""
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


# Files made to be odd or bad


def write(
    path: Path,
    frames: np.ndarray,
    codec: str,
    pix_fmt: str = "yuv420p",
    times: Callable[[int], int] = lambda t: t,
    bitrate_options: dict[str, str] | None = None,
    **stream_options: object,
) -> Path:
    """Encode with any time stamps and any property of the encoder."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=25, options=bitrate_options or {})
        stream.height, stream.width, stream.pix_fmt = *frames.shape[1:3], pix_fmt
        stream.codec_context.max_b_frames = 0
        for name, value in stream_options.items():
            setattr(stream.codec_context, name, value)
        for t, picture in enumerate(frames):
            frame = av.VideoFrame.from_ndarray(picture, "rgb24")
            frame.pts, frame.time_base = times(t), Fraction(1, 25)
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return path


def write_audio(path: Path, cover: bool = False) -> Path:
    with av.open(str(path), "w") as container:
        stream = container.add_stream("pcm_s16le" if path.suffix == ".wav" else "flac", rate=8000)
        picture = None
        if cover:
            picture = container.add_stream("png", rate=1)
            picture.width, picture.height, picture.pix_fmt = 16, 16, "rgb24"
            picture.disposition = av.stream.Disposition.attached_pic
        sound = av.AudioFrame.from_ndarray(np.zeros((1, 8000), np.int16), "s16", "mono")
        sound.rate, sound.pts = 8000, 0
        if picture:
            image = av.VideoFrame.from_ndarray(np.zeros((16, 16, 3), np.uint8), "rgb24")
            container.mux(picture.encode(image))
            container.mux(picture.encode())
        container.mux(stream.encode(sound))
        container.mux(stream.encode())
    return path


def turn(path: Path, matrix: tuple[int, int, int, int]) -> None:
    """Write a, b, c, d of the ISO base media file format's display matrix: x' = a x + c y, y' = b x + d y."""
    data = bytearray(path.read_bytes())
    start = data.index(b"tkhd") + 44
    a, b, c, d = (n << 16 for n in matrix)
    data[start : start + 36] = struct.pack(">9i", a, b, 0, c, d, 0, 0, 0, 1 << 30)
    path.write_bytes(data)


def cut_by_edit_list(source: Path, target: Path, first: int) -> None:
    """Copy a stream so that an edit list hides its first frames, as `ffmpeg -ss ... -c copy` does."""
    options = {"use_editlist": "1", "avoid_negative_ts": "disabled"}
    with av.open(str(source)) as a, av.open(str(target), "w", options=options) as b:
        stream = a.streams.video[0]
        copy = b.add_stream_from_template(stream)
        for packet in a.demux(stream):
            if packet.dts is not None:
                shift = int(Fraction(first, 25) / stream.time_base)
                packet.pts, packet.dts, packet.stream = packet.pts - shift, packet.dts - shift, copy
                b.mux(packet)


def spoil_packet(path: Path, number: int) -> None:
    """Overwrite one packet's data, so that it cannot decode."""
    with av.open(str(path)) as container:
        packets = [(p.pos, p.size) for p in container.demux(video=0) if p.size]
    data = bytearray(path.read_bytes())
    start, size = packets[number]
    data[start : start + size] = b"\xff" * size
    path.write_bytes(data)


FRAMES = panned(20, height=48, width=64)
QUADRANTS = np.zeros((48, 64, 3), np.uint8)
QUADRANTS[:24, :32], QUADRANTS[:24, 32:], QUADRANTS[24:, :32] = (220, 30, 30), (30, 220, 30), (30, 30, 220)
TURNS = {0: (1, 0, 0, 1), 90: (0, 1, -1, 0), 180: (-1, 0, 0, -1), 270: (0, -1, 1, 0)}  # clockwise

# name -> frames it must be stored with, height and width as displayed
WORKS: dict[str, tuple[int, int, int]] = {
    "ten bit.mkv": (20, 48, 64),
    "sixteen bit.mkv": (20, 48, 64),
    "grey.mkv": (20, 48, 64),
    "alpha.mkv": (20, 48, 64),
    "alpha.mov": (20, 48, 64),
    "palette.gif": (20, 48, 64),
    "odd sizes.mkv": (20, 47, 63),
    "speck.mkv": (20, 2, 2),
    "tower.mkv": (20, 400, 16),
    "non-square pixels.mp4": (20, 48, 64),
    "variable rate.mp4": (20, 48, 64),
    "variable rate.mkv": (20, 48, 64),
    "dropped frames.avi": (20, 48, 64),
    "edit list.mp4": (8, 48, 64),
    "grows midway.h264": (40, 48, 64),
    "shrinks midway.h264": (40, 96, 128),
    "one frame.mp4": (1, 48, 64),
    "one frame.avi": (1, 48, 64),
    "Latin-1 title.avi": (20, 48, 64),
    "turned 0.mp4": (13, 48, 64),
    "turned 90.mp4": (13, 64, 48),
    "turned 180.mp4": (13, 48, 64),
    "turned 270.mp4": (13, 64, 48),
    "a spoilt packet.mp4": (19, 48, 64),
    "cut at 95 %.avi": (20, 48, 64),
    "http: (naïve) name+%d!?.mp4": (20, 48, 64),
}
# name -> words of the reason
FAILS: dict[str, str] = {
    "missing.mp4": "No such file",
    "empty.mp4": "Invalid data",
    "text.avi": "Invalid data",
    "text.txt": "text file",
    "zeros.mp4": "Invalid data",
    "directory.avi": "Is a directory",
    "sound.wav": "no video stream",
    "sound with a cover.flac": "no video stream",
    "only the header.avi": "no decodable frame",
    "cut at 5 %.avi": "declared frames decode",
    "cut at 30 %.avi": "declared frames decode",
    "cut at 60 %.avi": "declared frames decode",
    "cut at 85 %.avi": "declared frames decode",
    "cut at 50 %.mp4": "declared frames decode",
    "index cut off.mp4": "Invalid data",
    "three packets spoilt.mp4": "declared frames decode",
}


def make_odd_files(folder: Path) -> None:
    big = panned(20, height=96, width=128)
    crf = {"crf": "12", "preset": "ultrafast"}
    write(folder / "ten bit.mkv", FRAMES, "ffv1", "yuv420p10le")
    write(folder / "sixteen bit.mkv", FRAMES, "ffv1", "yuv444p16le")
    write(folder / "grey.mkv", FRAMES, "ffv1", "gray")
    write(folder / "alpha.mkv", FRAMES, "ffv1", "yuva420p")
    write(folder / "alpha.mov", FRAMES, "qtrle", "argb")
    write(folder / "palette.gif", FRAMES, "gif", "rgb8")
    write(folder / "odd sizes.mkv", FRAMES[:, :47, :63], "ffv1", "yuv420p")
    write(folder / "speck.mkv", FRAMES[:, :2, :2], "ffv1", "yuv420p")
    write(folder / "tower.mkv", panned(20, height=400, width=16), "ffv1", "yuv420p")
    write(folder / "non-square pixels.mp4", FRAMES, "libx264", sample_aspect_ratio=Fraction(16, 11))
    for end in "mp4", "mkv":
        write(folder / f"variable rate.{end}", FRAMES, "libx264", times=lambda t: t * t)
    write(folder / "dropped frames.avi", FRAMES, "mpeg4", times=lambda t: 2 * t)
    plain_mp4 = write(folder / "http: (naïve) name+%d!?.mp4", FRAMES, "libx264", bitrate_options=crf)
    cut_by_edit_list(plain_mp4, folder / "edit list.mp4", 12)
    parts = [write(folder / f"part{k}.h264", f, "libx264") for k, f in enumerate((FRAMES, big))]
    (folder / "grows midway.h264").write_bytes(b"".join(p.read_bytes() for p in parts))
    (folder / "shrinks midway.h264").write_bytes(b"".join(p.read_bytes() for p in parts[::-1]))
    write(folder / "one frame.mp4", FRAMES[:1], "libx264")
    write(folder / "one frame.avi", FRAMES[:1], "mpeg4")
    whole = write(folder / "whole.avi", FRAMES, "mpeg4", bitrate_options={"b": "2000000"})
    with av.open(str(whole)) as a, av.open(str(folder / "titled.avi"), "w") as b:
        b.metadata["title"] = "Cafe au lait"
        copy = b.add_stream_from_template(a.streams.video[0])
        for packet in a.demux(video=0):
            if packet.dts is not None:
                packet.stream = copy
                b.mux(packet)
    titled = (folder / "titled.avi").read_bytes()
    assert titled.count(b"Cafe") == 1
    (folder / "Latin-1 title.avi").write_bytes(titled.replace(b"Cafe", b"Caf\xe9"))
    for degrees, matrix in TURNS.items():
        path = folder / f"turned {degrees}.mp4"
        turn(write(path, np.repeat(QUADRANTS[None], 13, axis=0), "libx264", bitrate_options=crf), matrix)
    for name, numbers in ("a spoilt packet", [19]), ("three packets spoilt", [17, 18, 19]):
        shutil.copy(plain_mp4, folder / f"{name}.mp4")
        for number in numbers:
            spoil_packet(folder / f"{name}.mp4", number)
    data = whole.read_bytes()
    body = data.index(b"movi")
    for percent in 5, 30, 60, 85, 95:
        # The index after the frames is cut off with them.
        end = body + (data.rindex(b"idx1") - body) * percent // 100
        (folder / f"cut at {percent} %.avi").write_bytes(data[:end] if percent != 95 else data[: data.rindex(b"idx1")])
    (folder / "only the header.avi").write_bytes(data[: body + 4])
    data = plain_mp4.read_bytes()
    (folder / "index cut off.mp4").write_bytes(data[: data.index(b"moov")])
    with av.open(str(plain_mp4)) as a, av.open(str(folder / "fast.mp4"), "w", options={"movflags": "faststart"}) as b:
        copy = b.add_stream_from_template(a.streams.video[0])
        for packet in a.demux(video=0):
            if packet.dts is not None:
                packet.stream = copy
                b.mux(packet)
    data = (folder / "fast.mp4").read_bytes()
    start = data.index(b"mdat")
    assert data.index(b"moov") < start
    (folder / "cut at 50 %.mp4").write_bytes(data[: (start + len(data)) // 2])
    (folder / "empty.mp4").touch()
    (folder / "zeros.mp4").write_bytes(bytes(5000))
    for name in "text.avi", "text.txt":
        (folder / name).write_text("This is a text. " * 100)
    (folder / "directory.avi").mkdir()
    write_audio(folder / "sound.wav")
    write_audio(folder / "sound with a cover.flac", cover=True)


@pytest.fixture(scope="module")
def odd(tmp_path_factory: pytest.TempPathFactory) -> ShardSet:
    """Every odd and bad file through one run."""
    folder = tmp_path_factory.mktemp("odd")
    (folder / "videos").mkdir()
    make_odd_files(folder / "videos")
    return make_shards(folder, folder / "videos", [*WORKS, *FAILS], settings=TINY, videos_per_shard=12, workers=2)


@pytest.mark.parametrize("name", WORKS)
def test_odd_files_are_stored(name: str, odd: ShardSet) -> None:
    reasons = {f.path: f.reason for f in odd.failed}
    assert name not in reasons, reasons[name]
    shard, k = odd.locate(odd.paths.index(name))
    frames, height, width = WORKS[name]
    assert (int(np.diff(shard.frame_offset)[k]), *shard.source_size[k].tolist()) == (frames, height, width)
    for frame in shard.frame_offset[k], shard.frame_offset[k + 1] - 1:
        picture = simplejpeg.decode_jpeg(bytes(shard.frame_jpeg(frame)))
        assert picture.shape == (32, 48, 3) and (picture.std() > 8 or name == "speck.mkv")
        if name == "grey.mkv":
            assert np.ptp(picture.astype(int), axis=-1).max() <= 6


@pytest.mark.parametrize("name", FAILS)
def test_bad_files_are_failure_rows(name: str, odd: ShardSet) -> None:
    assert name not in odd.paths
    (failure,) = (f for f in odd.failed if f.path == name)
    assert FAILS[name] in failure.reason and failure.row == [*WORKS, *FAILS].index(name)
    assert str(odd.folder.parent) not in failure.reason


def test_failures_come_together_in_one_table(odd: ShardSet) -> None:
    with open(odd.folder / "failures.csv", newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert [r["path"] for r in rows] == list(FAILS)
    assert [(int(r["row"]), r["path"], r["reason"]) for r in rows] == odd.failed
    assert check.problems(odd.folder) == []


@pytest.mark.parametrize("degrees", TURNS)
def test_turned_videos_come_out_upright(degrees: int, odd: ShardSet) -> None:
    shard, k = odd.locate(odd.paths.index(f"turned {degrees}.mp4"))
    expected = np.rot90(QUADRANTS, -degrees // 90)  # numpy counts anticlockwise
    picture = simplejpeg.decode_jpeg(bytes(shard.frame_jpeg(shard.frame_offset[k] + 5))).astype(int)
    for y in 0.25, 0.75:
        for x in 0.25, 0.75:
            ours = picture[int(y * 32), int(x * 48)]
            theirs = expected[int(y * expected.shape[0]), int(x * expected.shape[1])].astype(int)
            assert abs(ours - theirs).max() < 25, (y, x)


def test_undecodable_packets_are_counted(odd: ShardSet) -> None:
    errors = {path: int(odd.locate(v)[0].decode_errors[odd.locate(v)[1]]) for v, path in enumerate(odd.paths)}
    assert errors["a spoilt packet.mp4"] == 1 and errors["one frame.mp4"] == 0 and sum(errors.values()) <= 3


def test_a_size_change_midway_shows_the_whole_picture_before_and_after(odd: ShardSet) -> None:
    for name in "grows midway.h264", "shrinks midway.h264":
        shard, k = odd.locate(odd.paths.index(name))
        start = shard.frame_offset[k]
        sources = [panned(20, height=48, width=64), panned(20, height=96, width=128)]
        for half, source in enumerate(sources if "grows" in name else sources[::-1]):
            picture = simplejpeg.decode_jpeg(bytes(shard.frame_jpeg(start + 20 * half + 3))).astype(float)
            h, w = source.shape[1:3]
            small = source[3][(np.arange(32) * h) // 32][:, (np.arange(48) * w) // 48].astype(float)
            assert np.corrcoef(picture.ravel(), small.ravel())[0, 1] > 0.7, (name, half)


# Damaged real clips


def mutate(data: bytes, rng: np.random.Generator) -> bytes:
    """Cut, flip, overwrite, remove or repeat at random places; every third time near the start, where headers are."""
    changed = bytearray(data)
    size = len(data) if rng.integers(3) else 4096
    kind = rng.integers(5)
    if kind == 0:
        return data[: int(rng.integers(size))]
    if kind == 1:
        for place in rng.integers(0, size, int(rng.integers(1, 200))):
            changed[place] ^= 1 << int(rng.integers(8))
        return bytes(changed)
    start, length = int(rng.integers(size)), int(rng.integers(1, 5000))
    if kind == 2:
        changed[start : start + length] = rng.bytes(len(changed[start : start + length]))
    elif kind == 3:
        del changed[start : start + length]
    else:
        changed[start:start] = data[start : start + length]
    return bytes(changed)


def damage_and_run(clips: list[Path], folder: Path, count: int) -> None:
    rng = np.random.default_rng(count)
    (folder / "videos").mkdir()
    names = []
    for k in range(count):
        clip = clips[k % len(clips)]
        names.append(f"{k:03d}{clip.suffix}")
        (folder / "videos" / names[-1]).write_bytes(mutate(clip.read_bytes(), rng))
    shards = make_shards(folder, folder / "videos", names, settings=TINY, videos_per_shard=25, time_limit=120)
    failed = [f.path for f in shards.failed]
    assert sorted([*shards.paths, *failed]) == names
    assert check.problems(folder / "shards") == []
    assert not [f for f in shards.failed if "decoder process" in f.reason or "no result within" in f.reason]
    assert all(f.reason for f in shards.failed)
    parts = -(-count // 25)
    assert len(list((folder / "shards").iterdir())) == 2 * parts + 1  # shards, checksums, failures.csv: no leftover
    assert len(shards) > count // 5 and len(failed) > count // 20  # the mutations neither spare nor ruin all
    print(f"{count} damaged clips: {len(shards)} stored, {len(failed)} failed, 0 crashed, 0 hung")


def test_damaged_clips_are_stored_or_failure_rows(real_clips: list[Path], tmp_path: Path) -> None:
    damage_and_run([c for c in real_clips if c.stat().st_size < 900_000], tmp_path, 50)


@pytest.mark.soak
def test_many_damaged_clips_are_stored_or_failure_rows(real_clips: list[Path], tmp_path: Path) -> None:
    damage_and_run(real_clips, tmp_path, 500)


# Decoders that die or hang

BAD_CODEC = """
import os, signal, sys, time
from pathlib import Path
from preprocess import codec

real = codec.convert

def convert(source, spool, settings):
    name = Path(source).name
    flag = Path(source + ".flag")
    first, _ = not flag.exists(), flag.touch()
    if not name.startswith("good") and (first or not name.startswith("stumble")):
        with open(spool.path("frames"), "ab") as half:
            half.write(b"half a picture")
    if name.startswith("crash"):
        os.abort()
    if name.startswith("hang"):
        time.sleep(10_000)
    if name.startswith("die"):
        raise IndexError("out of my depth")
    if name.startswith("kill") or (name.startswith("stumble") and first):
        os.kill(os.getpid(), signal.SIGKILL)
    return real(source, spool, settings)

codec.convert = convert
codec.serve(int(sys.argv[-1]))
"""


def test_decoders_that_die_or_hang_end_as_one_row_each(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    names = [f"{n}.mp4" for n in ("good0", "crash", "good1", "hang", "good2", "die", "kill", "stumble", "good3")]
    for seed, name in enumerate(names):
        write_video(tmp_path / "videos" / name, FRAMES[: 5 + seed])
    (tmp_path / "bad_codec.py").write_text(BAD_CODEC)
    monkeypatch.setattr(Codec, "command", (sys.executable, str(tmp_path / "bad_codec.py")))
    shards = make_shards(tmp_path, tmp_path / "videos", names, settings=TINY, videos_per_shard=9, time_limit=4)
    reasons = {f.path.removesuffix(".mp4"): f.reason for f in shards.failed}
    assert reasons == {
        "crash": "the decoder process was killed by SIGABRT",
        "hang": "no result within 4 s (time limit a video)",
        "die": "the decoder process ended with status 1: IndexError: out of my depth",
        "kill": "the decoder process was killed by SIGKILL; probably out of memory: lower --workers",
    }
    monkeypatch.undo()
    good = [n for n in names if n.removesuffix(".mp4") not in reasons]
    undisturbed = make_shards(tmp_path / "good", tmp_path / "videos", good, settings=TINY, videos_per_shard=9)
    ours, theirs = shards.shards[0], undisturbed.shards[0]
    assert ours.paths == theirs.paths == good
    for column in "frames/jpeg", "frames/jpeg_offset", "iframes/jpeg", "motion", "videos/frame_offset", "videos/fps":
        np.testing.assert_array_equal(ours[column], theirs[column])


def test_a_decoder_that_does_not_start_stops_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_video(tmp_path / "a.mp4", FRAMES[:2])
    monkeypatch.setattr(Codec, "command", (sys.executable, "-c", "raise SystemExit('library not found')"))
    with pytest.raises(RuntimeError, match=r"does not start: .* status 1: library not found"):
        make_shards(tmp_path, tmp_path, ["a.mp4"], settings=TINY)


def test_reasons_name_no_place_and_no_address() -> None:
    message = "[Errno 2] No such file: '/data/set/a b/x.avi' at 0x7f12ab"
    assert plain(message, Path("/data/set/a b/x.avi"), "a b/x.avi") == "[Errno 2] No such file: 'a b/x.avi' at 0x…"


# Runs in processes of their own: full disks, kills, job arrays, exit statuses


class Job:
    """Nine videos (one missing) in five shards, and the command that makes them."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.videos, self.manifest = folder, folder / "videos", folder / "manifest.csv"
        names = [f"{n}.mp4" for n in range(9)]
        for seed, name in enumerate(names):
            if seed != 4:
                write_video(self.videos / name, panned(40 + seed, height=48, width=64, seed=seed))
        Manifest(tuple(names), tuple("ababababa"), ("",) * 9).write(self.manifest)
        done = self.run("expected")
        assert done.returncode == 3, done.stderr
        self.expected = files(folder / "expected")
        assert len(self.expected) == 5 * 2 + 1

    def start(self, out: str, *flags: str, **options: object) -> subprocess.Popen[str]:
        command = [sys.executable, "-m", "preprocess", "run", str(self.manifest), "--videos", str(self.videos)]
        command += ["--out", str(self.folder / out), "--videos-per-shard", "2"]
        return subprocess.Popen(
            [*command, *TINY_FLAGS, *flags],
            cwd=ROOT,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            **({"start_new_session": True} | options),
        )

    def run(self, out: str, *flags: str, **options: object) -> subprocess.CompletedProcess[str]:
        process = self.start(out, *flags, **options)
        output, errors = process.communicate(timeout=300)
        return subprocess.CompletedProcess(process.args, process.returncode, output, errors)

    def assert_complete(self, out: str) -> None:
        assert files(self.folder / out) == self.expected


@pytest.fixture(scope="module")
def job(tmp_path_factory: pytest.TempPathFactory) -> Job:
    return Job(tmp_path_factory.mktemp("job"))


@pytest.mark.parametrize("share", [0.01, 0.3, 0.9])
def test_a_full_disk_is_said_and_the_next_run_completes(share: float, job: Job) -> None:
    """A limit on file sizes hits the encoded stream, the spooled pictures, the finished file in turn."""
    out, size = f"limit{share}", int(len(job.expected["shard-00000.h5"]) * share)
    stopped = job.run(out, preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (size, size)))
    assert stopped.returncode == 1 and "Traceback" not in stopped.stderr
    assert "cannot be made: File too large" in stopped.stderr and "run the same command again" in stopped.stderr
    assert not list((job.folder / out).glob("shard-00000.h5*"))
    assert job.run(out).returncode == 3
    job.assert_complete(out)


@contextmanager
def small_disk(folder: Path, size: str) -> Iterator[Callable[[str], None]]:
    folder.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(folder)], capture_output=True)
    if mounted.returncode:
        pytest.skip("mounting is not allowed here")
    try:
        yield lambda n: subprocess.run(["mount", "-o", f"remount,size={n}", str(folder)], check=True) and None
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)


@pytest.mark.parametrize("size", ["60k", "250k", "330k", "400k"])
def test_a_full_file_system_is_said_and_the_next_run_completes(size: str, job: Job) -> None:
    with small_disk(job.folder / f"disk{size}", size) as resize:
        out = f"disk{size}/out"
        stopped = job.run(out)
        assert stopped.returncode == 1 and "Traceback" not in stopped.stderr
        assert "cannot be made: No space left on device" in stopped.stderr
        kept = {p.name: p.read_bytes() for p in (job.folder / out).glob("shard-*")}
        assert all(job.expected[name] == data for name, data in kept.items())
        resize("20m")
        assert job.run(out).returncode == 3
        job.assert_complete(out)


def test_a_full_folder_for_temporary_files_is_named(job: Job) -> None:
    with small_disk(job.folder / "temporary", "8k"):
        where = str(job.folder / "temporary")
        stopped = job.run("out_temporary", env=os.environ | {"TMPDIR": where})
        assert stopped.returncode == 1 and "No space left on device" in stopped.stderr and where in stopped.stderr


def children(parent: int) -> list[int]:
    """Processes whose parent this is, by asking the kernel."""
    found = []
    for entry in Path("/proc").glob("[0-9]*/stat"):
        try:
            after_name = entry.read_text().rpartition(")")[2].split()
        except (FileNotFoundError, ProcessLookupError):
            continue
        if int(after_name[1]) == parent and after_name[0] != "Z":
            found.append(int(entry.parent.name))
    return found


def wait_for(condition: Callable[[], object], what: str) -> object:
    """The first true value of the condition."""
    end = time.monotonic() + 120
    while not (value := condition()):
        assert time.monotonic() < end, f"waited in vain for {what}"
        time.sleep(0.005)
    return value


def session(leader: int) -> list[int]:
    """Living processes of a session."""
    found = []
    for entry in Path("/proc").glob("[0-9]*/stat"):
        try:
            after_name = entry.read_text().rpartition(")")[2].split()
        except (FileNotFoundError, ProcessLookupError):
            continue
        if int(after_name[3]) == leader and after_name[0] != "Z":
            found.append(int(entry.parent.name))
    return found


def kill_at_random(job: Job, count: int, workers: int) -> None:
    """SIGKILL the run again and again, main process or all of it or a decoder, then let it finish."""
    rng = np.random.default_rng(count)
    out = f"killed{count}{workers}"
    for k in range(count):
        kill_once(job, out, workers, ("all of it", "main process", "decoders")[k % 3], float(rng.uniform(0, 2.5)))
        for path in (job.folder / out).glob("shard-*"):
            assert path.suffix == ".sha256" or path.read_bytes() == job.expected[path.name]
    finished = job.run(out, "--workers", str(workers))
    assert finished.returncode == 3, finished.stderr
    job.assert_complete(out)


def kill_once(job: Job, out: str, workers: int, what: str, after: float) -> None:
    run = job.start(out, "--workers", str(workers))
    wait_for(lambda: run.poll() is not None or (job.folder / out).exists(), "the run to begin")
    time.sleep(after)
    if what == "decoders":
        for process in session(run.pid):
            with suppress(FileNotFoundError, ProcessLookupError):
                if b"preprocess.codec" in Path(f"/proc/{process}/cmdline").read_bytes():
                    os.kill(process, signal.SIGKILL)  # the run goes on with a new decoder
    elif run.poll() is None:
        (os.kill if what == "main process" else os.killpg)(run.pid, signal.SIGKILL)
    run.communicate()
    wait_for(lambda: not session(run.pid), "workers and decoders to end with their parent")


@pytest.mark.parametrize("workers", [1, 2])
def test_a_killed_run_ends_as_an_undisturbed_one(workers: int, job: Job) -> None:
    kill_at_random(job, 2, workers)


@pytest.mark.soak
@pytest.mark.parametrize("workers", [1, 2])
def test_a_run_killed_ten_times_ends_as_an_undisturbed_one(workers: int, job: Job) -> None:
    kill_at_random(job, 10, workers)


def busy_worker(run: subprocess.Popen[str]) -> int | None:
    """A worker process that has a decoder, so that it is in the middle of a shard."""
    return next((worker for worker in children(run.pid) if children(worker)), None)


def test_a_killed_worker_is_noticed_and_its_shard_made_once_more(job: Job) -> None:
    run = job.start("worker", "--workers", "2")
    os.kill(wait_for(lambda: busy_worker(run), "a busy worker"), signal.SIGKILL)
    _, errors = run.communicate()
    assert "a worker process was killed, probably for lack of memory; making shard-0" in errors
    assert run.returncode == 3
    job.assert_complete("worker")


def test_a_worker_killed_again_and_again_stops_the_run(job: Job) -> None:
    run = job.start("workers", "--workers", "2")
    killed: set[int] = set()
    while run.poll() is None:
        for worker in children(run.pid):
            if worker not in killed and children(worker):
                killed.add(worker)
                os.kill(worker, signal.SIGKILL)
        time.sleep(0.005)
    _, errors = run.communicate()
    assert run.returncode == 1 and "Traceback" not in errors
    assert "a worker process was killed again" in errors and "lower --workers" in errors
    assert job.run("workers", "--workers", "2").returncode == 3
    job.assert_complete("workers")


def test_two_parts_of_a_job_array_at_once(job: Job) -> None:
    parts = [job.start("array", "--part", f"{k}/2") for k in (1, 2)]
    for part in parts:
        part.communicate()
    assert {p.returncode for p in parts} <= {0, 3}
    job.assert_complete("array")


def test_a_finished_run_is_left_alone(job: Job) -> None:
    before = {p: p.stat().st_mtime_ns for p in (job.folder / "expected").glob("shard-*")}
    again = job.run("expected")
    assert again.returncode == 3 and "0 shards made, 5 already there" in again.stdout
    assert "4.mp4: [Errno 2] No such file" in again.stderr
    assert before == {p: p.stat().st_mtime_ns for p in (job.folder / "expected").glob("shard-*")}
    assert again.stderr.count("\n") == 1  # no progress bar where nobody looks


@pytest.mark.parametrize(
    "number, status, words", [(signal.SIGINT, 130, "interrupted"), (signal.SIGTERM, 143, "termin")]
)
@pytest.mark.parametrize("workers", ["1", "2"])
def test_an_interrupted_run_says_so_and_leaves_no_process(
    number: int, status: int, words: str, workers: str, job: Job
) -> None:
    out = f"signal{number}{workers}"
    run = job.start(out, "--workers", workers)
    wait_for(lambda: list((job.folder / out).glob(".*/progress")), "the first shard")
    os.kill(run.pid, number)
    _, errors = run.communicate()
    assert run.returncode == status and words in errors and "Traceback" not in errors
    wait_for(lambda: not session(run.pid), "workers to end")


def test_exit_statuses(job: Job, tmp_path: Path) -> None:
    def verb(*arguments: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "preprocess", *arguments]
        return subprocess.run(command, cwd=ROOT, capture_output=True, text=True)

    shards = tmp_path / "shards"
    shutil.copytree(job.folder / "expected", shards)
    assert verb("check", str(shards)).returncode == 0
    with open(shards / "shard-00001.h5", "r+b") as f:
        f.seek(5000)
        f.write(b"!")
    damaged = verb("check", str(shards), "--workers", "2")
    assert damaged.returncode == 1 and "shard-00001.h5: the checksum differs" in damaged.stderr
    unknown = verb("run", str(job.manifest), "--videos", "a", "--out", "b", "--no-such-flag")
    assert unknown.returncode == 2 and "no-such-flag" in unknown.stderr
    for flags, words in {
        ("run", "none.csv", "--videos", str(tmp_path), "--out", "x"): "none.csv",
        ("run", str(job.manifest), "--videos", str(tmp_path / "none"), "--out", str(tmp_path / "x")): "not a folder",
        ("run", str(job.manifest), "--videos", str(job.videos), "--out", str(job.manifest)): "manifest.csv",
        ("run", str(job.manifest), "--videos", str(job.videos), "--out", "/proc/none"): "/proc/none",
        ("info", str(tmp_path / "nothing")): "holds no shards",
    }.items():
        wrong = verb(*flags)
        assert wrong.returncode == 1 and wrong.stderr.startswith("error: ") and words in wrong.stderr
        assert wrong.stderr.count("\n") == 1


def test_a_reader_that_stops_listening_is_no_error(job: Job) -> None:
    script = f"{sys.executable} -m preprocess info {job.folder / 'expected'} | true; sleep 0.1"
    done = subprocess.run(["bash", "-c", script], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0 and done.stderr == ""


# In this process


@pytest.fixture
def pair(tmp_path: Path) -> Path:
    """A finished run over two videos, one a shard; b.mp4 is missing."""
    write_video(tmp_path / "videos/a.mp4", FRAMES[:14])
    make_shards(tmp_path, tmp_path / "videos", ["a.mp4", "b.mp4"], ["x", "y"], settings=TINY, videos_per_shard=1)
    return tmp_path


def test_everything_done_with_status_0(pair: Path) -> None:
    write_video(pair / "videos/b.mp4", FRAMES[:3])
    command = [sys.executable, "-m", "preprocess", "run", "manifest.csv", "--videos", "videos", "--out", "shards"]
    command += ["--retry-failed", "--videos-per-shard", "1", *TINY_FLAGS]
    done = subprocess.run(command, cwd=pair, capture_output=True, text=True, env=os.environ | {"PYTHONPATH": str(ROOT)})
    assert done.returncode == 0 and done.stderr == ""
    assert done.stdout.startswith("1 shards made, 1 already there: 1 videos, 3 frames")


def test_retry_failed_makes_only_shards_with_failures_anew(pair: Path) -> None:
    write_video(pair / "videos/b.mp4", FRAMES[:3])
    options = {"settings": TINY, "videos_per_shard": 1}
    arguments = (pair, pair / "videos", ["a.mp4", "b.mp4"], ["x", "y"])
    untouched = (pair / "shards/shard-00000.h5").stat().st_mtime_ns
    assert len(make_shards(*arguments, **options).failed) == 1  # without the flag nothing is tried again
    again = make_shards(*arguments, **options, retry_failed=True)
    assert again.failed == [] and again.paths == ["a.mp4", "b.mp4"]
    assert (pair / "shards/shard-00000.h5").stat().st_mtime_ns == untouched
    assert (pair / "shards/failures.csv").read_text() == "row,path,reason\n"
    make_shards(pair / "fresh", *arguments[1:], **options)
    assert files(pair / "fresh/shards") == files(pair / "shards")


@pytest.mark.parametrize(
    "change, words",
    [
        ({"settings": Settings(width=64, height=48, frame_width=48, frame_height=32, quantiser=9)}, ["quantiser: 2"]),
        ({"settings": Settings(width=64, height=48)}, ["frame_width: 48", "frame_height: 32"]),
        ({"paths": ["a.mp4", "c.mp4"]}, ["manifest sha256"]),
        ({"labels": ["x", "z"]}, ["manifest sha256", "classes"]),
        ({"videos_per_shard": 2}, ["shards: 2 there, 1 here"]),
        ({"version": "0.0"}, ["version of av", "0.0 here"]),
    ],
)
def test_other_runs_are_refused_naming_what_differs(
    change: dict, words: list[str], pair: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = files(pair / "shards")
    options = {"settings": TINY, "videos_per_shard": 1, "paths": ["a.mp4", "b.mp4"], "labels": ["x", "y"]} | change
    if version := options.pop("version", None):
        monkeypatch.setattr(pipeline, "version", lambda _: version)
    Manifest(tuple(options.pop("paths")), tuple(options.pop("labels")), ("", "")).write(pair / "other.csv")
    with pytest.raises(ValueError, match="was made by another run") as caught:
        pipeline.run(pair / "other.csv", pair / "videos", pair / "shards", options.pop("settings"), **options)
    assert all(w in str(caught.value) for w in words) and "Nothing was deleted" in str(caught.value)
    assert files(pair / "shards") == before


def test_the_same_number_of_shards_cut_elsewhere_is_refused(tmp_path: Path) -> None:
    names = [f"{n}.mp4" for n in range(5)]
    make_shards(tmp_path, tmp_path, names, settings=TINY, videos_per_shard=3)
    with pytest.raises(ValueError, match="videos per shard: 3 there, 4 here"):
        make_shards(tmp_path, tmp_path, names, settings=TINY, videos_per_shard=4)


def test_a_damaged_shard_in_the_folder_is_refused(pair: Path) -> None:
    shard = pair / "shards/shard-00000.h5"
    shard.write_bytes(shard.read_bytes()[:3000])
    with pytest.raises(ValueError, match=r"shard-00000\.h5"):
        make_shards(pair, pair / "videos", ["a.mp4", "b.mp4"], ["x", "y"], settings=TINY, videos_per_shard=1)


def test_a_shard_in_the_making_elsewhere_is_not_made_twice(pair: Path) -> None:
    for path in (pair / "shards").glob("shard-00000*"):
        path.unlink()
    work = pair / "shards/.shard-00000.h5.work"
    work.mkdir()
    with open(work / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(RuntimeError, match="worked on by another process"):
            make_shards(pair, pair / "videos", ["a.mp4", "b.mp4"], ["x", "y"], settings=TINY, videos_per_shard=1)
    make_shards(pair, pair / "videos", ["a.mp4", "b.mp4"], ["x", "y"], settings=TINY, videos_per_shard=1)
    assert len(Shard(pair / "shards/shard-00000.h5")) == 1


@pytest.mark.parametrize(
    "options, words",
    [
        ({"part": (0, 2)}, "--part 0/2"),
        ({"part": (3, 2)}, "--part 3/2"),
        ({"videos_per_shard": 0}, "--videos-per-shard is 0"),
        ({"time_limit": 0}, "--time-limit is 0"),
    ],
)
def test_wrong_options_are_refused_before_any_work(options: dict, words: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=words):
        make_shards(tmp_path, tmp_path, ["a.mp4"], settings=TINY, **options)
    assert not list((tmp_path / "shards").glob("*"))
