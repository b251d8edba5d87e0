"""The codec process among faults that are not the video's, or are: disks, memory, time; and its second reader."""

from __future__ import annotations

import errno
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from conftest import make_shards, panned, write_video

from preprocess import check, child, codec, pipeline
from preprocess.codec import Codec
from preprocess.schema import Settings
from preprocess.writer import Spool

TINY = Settings(width=64, height=48, frame_width=48, frame_height=32)
FRAMES = panned(100, height=48, width=64)


def files(folder: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in sorted(folder.iterdir())}


# ---- the disk

# Stands in for a network file system that fails in the middle of a file: after so many bytes, read() of it fails.
FAULTY_READ = r"""
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

ssize_t read(int fd, void *buffer, size_t count) {
    static ssize_t (*real)(int, void *, size_t);
    char link[64], path[4096] = "";
    if (!real) real = dlsym(RTLD_NEXT, "read");
    snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
    ssize_t length = readlink(link, path, sizeof path - 1);
    int ours = length > 9 && !strcmp(path + length - 9, "fails.mkv");
    if (ours && lseek(fd, 0, SEEK_CUR) >= atol(getenv("FAULT_AFTER"))) {
        errno = atoi(getenv("FAULT_NUMBER"));
        return -1;
    }
    return real(fd, buffer, count);
}
"""


@pytest.mark.skipif(not shutil.which("cc"), reason="no C compiler to make the fault with: apt-get install gcc")
@pytest.mark.parametrize("number", [errno.EIO, errno.ESTALE, errno.ETIMEDOUT])
def test_a_disk_that_fails_in_mid_file_stops_the_shard(
    number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "fault.c").write_text(FAULTY_READ)
    command = ["cc", "-shared", "-fPIC", "-o", tmp_path / "fault.so", tmp_path / "fault.c", "-ldl"]
    subprocess.run(command, check=True)
    names = ["good.mkv", "fails.mkv"]
    for name in names:
        write_video(tmp_path / "videos" / name, FRAMES, "ffv1", {})
    size = (tmp_path / "videos" / "fails.mkv").stat().st_size
    assert size > 200_000  # many reads
    with monkeypatch.context() as fault:
        fault.setenv("LD_PRELOAD", str(tmp_path / "fault.so"))
        fault.setenv("FAULT_NUMBER", str(number))
        fault.setenv("FAULT_AFTER", str(size // 2))
        with pytest.raises(OSError, match=rf"{os.strerror(number)} \(.*videos/fails\.mkv\)"):
            make_shards(tmp_path, tmp_path / "videos", names, settings=TINY)
    assert not list((tmp_path / "shards").glob("*.h5"))
    shards = make_shards(tmp_path, tmp_path / "videos", names, settings=TINY)  # the disk is back
    assert shards.frames.tolist() == [100, 100] and not shards.failed


# The real codec with less of something than a video needs.
SHORT_OF = """
import resource, sys
from preprocess import child, encode
{limit}
child.serve(int(sys.argv[-1]))
"""
FILE_SIZE = "resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, 50_000))"  # as a full disk does, writing fails
MEMORY = """
used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (used + 100_000_000,) * 2)
"""


def short_of(limit: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (folder / "short.py").write_text(SHORT_OF.format(limit=limit))
    monkeypatch.setattr(Codec, "command", (sys.executable, str(folder / "short.py")))


def test_a_video_larger_than_the_disk_is_a_failure_row(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    names = ["small.mp4", "huge.mp4", "small too.mp4"]
    for name in names:
        write_video(tmp_path / "videos" / name, FRAMES if "huge" in name else FRAMES[:6])
    short_of(FILE_SIZE, tmp_path, monkeypatch)
    # A disk that had little room before the video is full, and no video is to blame.
    with pytest.raises(OSError, match=r"cannot be made: File too large.*Make room"):
        make_shards(tmp_path, tmp_path / "videos", names, settings=TINY)
    monkeypatch.setattr(codec, "LARGE", 20_000)
    shards = make_shards(tmp_path, tmp_path / "videos", names, settings=TINY)
    assert shards.paths == ["small.mp4", "small too.mp4"] and check.problems(shards.folder) == []
    assert [f.path for f in shards.failed] == ["huge.mp4"]
    assert shards.failed[0].reason == "it takes more room than the disk has (File too large)"


def test_a_video_larger_than_the_memory_is_a_failure_row(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    names = ["small.mp4", "huge.png", "small too.mp4"]
    for name in (names[0], names[2]):
        write_video(tmp_path / name, FRAMES[:6])
    write_video(tmp_path / "huge.png", np.zeros((1, 9_000, 9_000, 3), np.uint8), "png", {}, pix_fmt="rgb24")
    short_of(MEMORY, tmp_path, monkeypatch)
    shards = make_shards(tmp_path, tmp_path, names, settings=TINY)
    assert shards.paths == ["small.mp4", "small too.mp4"]
    assert [f.path for f in shards.failed] == ["huge.png"] and "memory" in shards.failed[0].reason


def test_no_memory_for_a_picture_is_a_failure_row(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_video(tmp_path / "a.mp4", FRAMES[:6])
    short_of("import numpy\nencode._stretch = lambda *_: numpy.empty(1 << 60, numpy.uint8)", tmp_path, monkeypatch)
    shards = make_shards(tmp_path, tmp_path, ["a.mp4"], settings=TINY)
    assert "it takes more memory than there is (Unable to allocate" in shards.failed[0].reason


FFMPEG_SAYS = """
import av
def broken(*_): raise av.error.OSError(5, "Input/output error")  # as its readers of some formats do of a short file
encode._best = broken
"""


def test_ffmpegs_own_errors_of_reading_are_failure_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_video(tmp_path / "a.mp4", FRAMES[:6])
    short_of(FFMPEG_SAYS, tmp_path, monkeypatch)
    shards = make_shards(tmp_path, tmp_path, ["a.mp4"], settings=TINY)
    assert [f.reason for f in shards.failed] == ["[Errno 5] Input/output error"]


# ---- time


SLOW = """
import sys, time
from pathlib import Path
from preprocess import child

def convert(source, spool, settings, alive, **options):
    with open(source + ".asked", "a") as asked:
        asked.write("once ")
    for _ in range(8):
        time.sleep(0.5)
        if "steady" in source:
            alive()
    return real(source, spool, settings, alive, **options)

real, child.convert = child.convert, convert
child.serve(int(sys.argv[-1]))
"""


def test_the_time_limit_is_one_of_progress_and_no_second_try(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in "steady.mp4", "hangs.mp4":
        write_video(tmp_path / name, FRAMES[:6])
    (tmp_path / "slow.py").write_text(SLOW)
    monkeypatch.setattr(Codec, "command", (sys.executable, str(tmp_path / "slow.py")))
    shards = make_shards(tmp_path, tmp_path, ["steady.mp4", "hangs.mp4"], settings=TINY, time_limit=3)
    assert shards.paths == ["steady.mp4"]
    assert [f.reason for f in shards.failed] == ["no progress within 3 s (--time-limit)"]
    assert (tmp_path / "hangs.mp4.asked").read_text() == "once "


# ---- the second reader


def test_mvextractor_gives_the_same_bytes(tmp_path: Path) -> None:
    names = ["a.mp4", "b.mkv", "words.mp4"]
    for seed, name in enumerate(names[:2]):
        write_video(tmp_path / "videos" / name, panned(30 - seed, height=96, width=128, seed=seed))
    (tmp_path / "videos" / "words.mp4").write_text("no video")
    for reader in "pyav", "mvextractor":
        made = make_shards(tmp_path / reader, tmp_path / "videos", names, settings=TINY, reader=reader)
        assert len(made) == 2 and len(made.failed) == 1
    assert files(tmp_path / "pyav" / "shards") == files(tmp_path / "mvextractor" / "shards")


def test_mvextractor_gives_the_same_bytes_of_a_real_clip(real_clips: list[Path], tmp_path: Path) -> None:
    clip = min(real_clips, key=lambda c: c.stat().st_size)
    for reader in "pyav", "mvextractor":
        (tmp_path / reader).mkdir()
        child.convert(str(clip), Spool(tmp_path / reader), Settings(), lambda: None, reader)
    assert files(tmp_path / "pyav") == files(tmp_path / "mvextractor")


@pytest.mark.parametrize(
    ("answer", "words"),
    [((False, None, None, "P"), "no frame 20"), ((True, None, np.empty((0, 10), int), "I"), "I frame 20")],
)
def test_mvextractor_must_agree_about_every_frame(
    answer: tuple, words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from mvextractor import videocap

    class Wrong:
        def __init__(self) -> None:
            self.real, self.asked = real(), 0

        def read(self):
            self.asked += 1
            return self.real.read() if self.asked <= 20 else answer

        def __getattr__(self, name: str):
            return getattr(self.real, name)

    real = videocap.VideoCap
    monkeypatch.setattr(videocap, "VideoCap", Wrong)
    source = write_video(tmp_path / "a.mp4", FRAMES[:30])
    with pytest.raises(ValueError, match=f"mvextractor finds {words}"):
        child.convert(str(source), Spool(tmp_path), TINY, lambda: None, "mvextractor")


def test_where_mvextractor_is_missing_work_does_not_begin(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_video(tmp_path / "a.mp4", FRAMES[:2])
    monkeypatch.setattr(pipeline, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"Linux on x86-64.*the bytes are the same"):
        make_shards(tmp_path, tmp_path, ["a.mp4"], settings=TINY, reader="mvextractor")
    assert not (tmp_path / "shards").exists()
