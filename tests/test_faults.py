"""Bad input (the table in the design, as far as stage 1 goes): each fault is really made."""

from __future__ import annotations

import csv
import os
import resource
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from contextlib import ExitStack
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
import simplejpeg
from conftest import ROOT, make_shards, panned, write_video
from test_restart import session, wait_for

from preprocess import check
from preprocess.codec import Codec, plain
from preprocess.manifest import Manifest
from preprocess.schema import Settings
from preprocess.shards import ShardSet

TINY = Settings(width=64, height=48, frame_width=48, frame_height=32)


# Files made to be odd or bad


def write(
    path: Path,
    frames: np.ndarray,
    codec: str,
    pix_fmt: str = "yuv420p",
    times: Callable[[int], int] = lambda t: t,
    options: dict[str, str] | None = None,
    **stream_options: object,
) -> Path:
    """Encode with any time stamps and any property of the encoder."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=25, options=options or {})
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


def remux(source: Path, target: Path, shift: int = 0, title: str = "", **options: str) -> None:
    """Copy a video's packets, `shift` frames earlier, into another file."""
    with av.open(str(source)) as a, av.open(str(target), "w", options=options) as b:
        if title:
            b.metadata["title"] = title
        stream = a.streams.video[0]
        copy = b.add_stream_from_template(stream)
        ticks = int(Fraction(shift, 25) / stream.time_base)
        for packet in a.demux(stream):
            if packet.dts is not None:
                packet.pts, packet.dts, packet.stream = packet.pts - ticks, packet.dts - ticks, copy
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
    "a spoilt packet.mp4": (19, 48, 64),
    "cut at 95 %.avi": (20, 48, 64),
    "http: (naïve) name+%d!?.mp4": (20, 48, 64),
}
# name -> words of the reason
FAILS: dict[str, str] = {
    "missing.mp4": "No such file",
    f"{300 * 'long'}.mp4": "File name too long",
    "empty.mp4": "an empty file",
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
    plain_mp4 = write(folder / "http: (naïve) name+%d!?.mp4", FRAMES, "libx264", options=crf)
    # An edit list hides the first frames, as `ffmpeg -ss ... -c copy` makes it.
    remux(plain_mp4, folder / "edit list.mp4", 12, use_editlist="1", avoid_negative_ts="disabled")
    parts = [write(folder / f"part{k}.h264", f, "libx264") for k, f in enumerate((FRAMES, big))]
    (folder / "grows midway.h264").write_bytes(b"".join(p.read_bytes() for p in parts))
    (folder / "shrinks midway.h264").write_bytes(b"".join(p.read_bytes() for p in parts[::-1]))
    write(folder / "one frame.mp4", FRAMES[:1], "libx264")
    write(folder / "one frame.avi", FRAMES[:1], "mpeg4")
    whole = write(folder / "whole.avi", FRAMES, "mpeg4", options={"b": "2000000"})
    remux(whole, folder / "titled.avi", title="Cafe au lait")
    titled = (folder / "titled.avi").read_bytes()
    assert titled.count(b"Cafe") == 1
    (folder / "Latin-1 title.avi").write_bytes(titled.replace(b"Cafe", b"Caf\xe9"))
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
    remux(plain_mp4, folder / "fast.mp4", movflags="faststart")
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


def test_odd_files_are_stored(odd: ShardSet) -> None:
    assert odd.paths == list(WORKS)
    for video, (name, expected) in enumerate(WORKS.items()):
        shard, k = odd.locate(video)
        assert (int(np.diff(shard.frame_offset)[k]), *shard.source_size[k].tolist()) == expected, name
        for frame in shard.frame_offset[k], shard.frame_offset[k + 1] - 1:
            picture = simplejpeg.decode_jpeg(bytes(shard.frame_jpeg(frame)))
            assert picture.shape == (32, 48, 3) and (picture.std() > 8 or name == "speck.mkv"), name
            if name == "grey.mkv":
                assert np.ptp(picture.astype(int), axis=-1).max() <= 6


def test_bad_files_are_failure_rows_in_one_table(odd: ShardSet) -> None:
    with open(odd.folder / "failures.csv", newline="", encoding="utf-8") as file:
        rows = [(int(r["row"]), r["path"], r["reason"]) for r in csv.DictReader(file)]
    assert rows == odd.failed and [path for _, path, _ in rows] == list(FAILS)
    for number, (row, path, reason) in enumerate(rows, start=len(WORKS)):
        assert row == number and FAILS[path] in reason and str(odd.folder.parent) not in reason
    assert check.problems(odd.folder) == []


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


# Decoders that die or hang

BAD_CODEC = """
import os, signal, sys, time
from pathlib import Path
from preprocess import child

real = child.convert

def convert(source, spool, settings, alive, **options):
    name = Path(source).name
    flag = Path(source + ".flag")
    first, _ = not flag.exists(), flag.touch()
    if not name.startswith("good") and (first or not name.startswith("stumble")):
        with open(spool.path("frames"), "ab") as half:
            half.write(b"half a picture")
    if name.startswith("crash"):
        os.abort()
    if name.startswith("again") and not first:
        flag.with_suffix(".second").touch()
    if name.startswith("hang") or (name.startswith("again") and not first):
        time.sleep(10_000)
    if name.startswith("full"):
        while not Path(source).with_name("hang.mp4.flag").exists():
            time.sleep(0.01)
        raise OSError(28, "No space left on device")
    if name.startswith("die"):
        raise IndexError("out of my depth")
    if name.startswith("kill") or (name.startswith(("stumble", "again")) and first):
        os.kill(os.getpid(), signal.SIGKILL)
    return real(source, spool, settings, alive, **options)

child.convert = convert
child.serve(int(sys.argv[-1]))
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
        "hang": "no progress within 4 s (--time-limit)",
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


BAD_RUN = """
import sys
from pathlib import Path
from preprocess import codec, pipeline
from preprocess.schema import Settings

folder = Path(sys.argv[1])
codec.Codec.command = (sys.executable, str(folder / "bad_codec.py"))
options = {"workers": 2, "videos_per_shard": 1, "time_limit": 100_000}
pipeline.run(folder / "manifest.csv", folder, folder / "shards", Settings(), **options)
"""


def bad_run(folder: Path, *names: str) -> subprocess.Popen[str]:
    """A run in a process of its own over videos that do to the decoder what their names say."""
    (folder / "bad_codec.py").write_text(BAD_CODEC)
    for name in names:
        (folder / name).touch()
    Manifest(names, ("",) * len(names), ("",) * len(names)).write(folder / "manifest.csv")
    command = [sys.executable, "-c", BAD_RUN, str(folder)]
    return subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, text=True, start_new_session=True)


def test_an_error_in_one_worker_stops_those_that_are_busy(tmp_path: Path) -> None:
    errors = bad_run(tmp_path, "full.mp4", "hang.mp4").communicate(timeout=120)[1]
    assert errors.splitlines()[-1].startswith("OSError") and "No space left on device" in errors


def test_a_killed_run_takes_busy_decoders_with_it(tmp_path: Path) -> None:
    run = bad_run(tmp_path, "hang0.mp4", "hang1.mp4")
    wait_for(lambda: len(list(tmp_path.glob("*.flag"))) == 2, "both decoders to hang")
    run.kill()
    run.communicate()
    wait_for(lambda: not session(run.pid), "the decoders to end")


def test_a_stop_makes_no_failure_of_the_video_that_is_tried_again(tmp_path: Path) -> None:
    run = bad_run(tmp_path, "again.mp4")
    wait_for(lambda: list(tmp_path.glob("*.second")), "the second attempt")
    run.send_signal(signal.SIGINT)
    assert run.communicate()[1].splitlines()[-1] == "KeyboardInterrupt"
    assert not list(tmp_path.glob("shards/shard-*"))


def test_a_decoder_that_does_not_start_stops_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_video(tmp_path / "a.mp4", FRAMES[:2])
    monkeypatch.setattr(Codec, "command", (sys.executable, "-c", "raise SystemExit('library not found')"))
    with pytest.raises(RuntimeError, match=r"does not start: .* status 1: library not found"):
        make_shards(tmp_path, tmp_path, ["a.mp4"], settings=TINY)


def test_a_process_with_a_thousand_open_files_has_decoders_too(tmp_path: Path) -> None:
    write_video(tmp_path / "a.mp4", FRAMES[:2])
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(2048, hard), hard))
    try:
        with ExitStack() as held:
            for _ in range(1024):
                held.enter_context(open(os.devnull))
            assert make_shards(tmp_path, tmp_path, ["a.mp4"], settings=TINY).failed == []
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def test_reasons_name_no_place_and_no_address() -> None:
    message = "[Errno 2] No such file: '/data/set/a b/x.avi' at 0x7f12ab"
    assert plain(message, Path("/data/set/a b/x.avi"), "a b/x.avi") == "[Errno 2] No such file: 'a b/x.avi' at 0x…"
    error = FileNotFoundError(2, "No such file", "/data/set/fu\u3000ji.avi")
    assert plain(str(error), Path(error.filename), "fu\u3000ji.avi") == "[Errno 2] No such file: 'fu ji.avi'"
