"""What a cluster's file systems do to stage 1: too few descriptors, NFS, no locks, disks of one's own."""

from __future__ import annotations

import errno
import fcntl
import re
import shutil
import subprocess
import sys
from pathlib import Path

import h5py
import numpy as np
import pytest
from conftest import ROOT, one_thread, panned, write_video
from test_restart import TINY_FLAGS, files
from test_shards import write

from preprocess.manifest import Manifest

SHARDS, DESCRIPTORS = 2079, 1024  # of Kinetics-400; what a process may have open unless told otherwise

READ = """
import os, resource, sys
from pathlib import Path
resource.setrlimit(resource.RLIMIT_NOFILE, (int(sys.argv[1]),) * 2)
from preprocess.shards import ShardSet
shards = ShardSet(sys.argv[2])
before = len(os.listdir("/proc/self/fd"))
for shard in shards.shards:
    assert bytes(shard.frame_jpeg(30)[:2]) == b"\\xff\\xd8" and shard.motion[30].any()
assert len(os.listdir("/proc/self/fd")) == before < 64
print(len(shards))
"""

TRAIN = """
sys.path.insert(0, "tests")
from conftest import tiny_config
from preprocess.manifest import Manifest
from train.config import Runtime
from train.loop import train
rows = Manifest.read(sys.argv[3])
line = train(tiny_config(batch_size=130, epochs=1), Runtime("cpu", 0), Path(sys.argv[2]), rows, Path(sys.argv[4]))
print(line["step"])
"""


def test_a_set_of_more_shards_than_open_files_is_read_and_trained_from(tmp_path: Path) -> None:
    template = write(tmp_path / "template", [40], shards=SHARDS).path
    (tmp_path / "shards").mkdir()
    with h5py.File(template) as f:
        start, length = f["videos/path"].id.get_offset(), f["videos/path"].size
    data, names = bytearray(template.read_bytes()), [f"{number:0{length}d}" for number in range(SHARDS)]
    for number, name in enumerate(names):
        path = tmp_path / "shards" / f"shard-{number:05d}.h5"
        data[start : start + length] = name.encode()
        path.write_bytes(data)
        with h5py.File(path, "r+") as f:
            for attribute in b"shard", b"first_row":
                h5py.h5a.open(f.id, attribute).write(np.array(number))
        path.with_name(path.name + ".sha256").write_text(f"{number:064d}  {path.name}\n")
    served = tuple(names[-1040:])
    Manifest(served, ("",) * len(served), ("",) * len(served)).write(tmp_path / "rows.csv")
    arguments = [str(DESCRIPTORS), str(tmp_path / "shards"), str(tmp_path / "rows.csv"), str(tmp_path / "run")]
    command = [sys.executable, "-c", READ + TRAIN, *arguments]
    done = subprocess.run(command, cwd=ROOT, env=one_thread(), capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    assert (done.stdout.split()[0], done.stdout.split()[-1]) == (str(SHARDS), "8")


# ---- NFS, and no locks


@pytest.fixture(scope="module")
def stand_in(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """tests/stand_in.c, to be preloaded."""
    if not shutil.which("gcc"):
        pytest.skip("no gcc to compile the stand-in for NFS and for missing locks with: apt-get install gcc")
    library = tmp_path_factory.mktemp("stand_in") / "stand_in.so"
    source = Path(__file__).with_name("stand_in.c")
    subprocess.run(["gcc", "-shared", "-fPIC", "-O1", "-o", str(library), str(source), "-ldl"], check=True)
    return library


class Set:
    """Three videos in three shards, one of them missing."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        for seed in range(2):
            write_video(folder / f"videos/{seed}.mp4", panned(14, height=48, width=64, seed=seed))
        Manifest(("0.mp4", "1.mp4", "2.mp4"), ("",) * 3, ("",) * 3).write(folder / "manifest.csv")
        done = self.run("plain")
        assert done.returncode == 3, done.stderr
        self.expected = files(folder / "plain")

    def command(self, out: str, *flags: str) -> list[str]:
        line = [sys.executable, "-m", "preprocess", "run", str(self.folder / "manifest.csv")]
        line += ["--videos", str(self.folder / "videos"), "--out", str(self.folder / out)]
        return [*line, "--videos-per-shard", "1", *TINY_FLAGS, *flags]

    def run(self, out: str, *flags: str, **environment: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            self.command(out, *flags), cwd=ROOT, env=one_thread() | environment, capture_output=True, text=True
        )


@pytest.fixture(scope="module")
def three(tmp_path_factory: pytest.TempPathFactory) -> Set:
    return Set(tmp_path_factory.mktemp("three"))


def test_the_stand_in_keeps_what_is_open(stand_in: Path, tmp_path: Path) -> None:
    script = "import os; f = open('a', 'w'); os.unlink('a'); print(os.listdir()); f.close(); print(os.listdir())"
    environment = one_thread() | {"LD_PRELOAD": str(stand_in), "SILLY_RENAME": "1"}
    command = [sys.executable, "-c", script]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=True)
    assert re.fullmatch(r"\['\.nfs[0-9a-f]{16}'\]\n\[\]\n", done.stdout)


def test_on_nfs_the_work_folders_go(stand_in: Path, three: Set) -> None:
    done = three.run("nfs", LD_PRELOAD=str(stand_in), SILLY_RENAME="1")
    assert done.returncode == 3 and files(three.folder / "nfs") == three.expected, done.stderr
    assert not [p for p in (three.folder / "nfs").iterdir() if p.name.startswith(".")]


@pytest.mark.parametrize("number", [errno.ENOSYS, errno.EOPNOTSUPP])
def test_without_locks_it_warns_once_and_goes_on(number: int, stand_in: Path, three: Set) -> None:
    out, environment = f"lustre{number}", {"LD_PRELOAD": str(stand_in), "NO_LOCKS": str(number)}
    done = three.run(out, **environment)
    assert done.returncode == 3 and files(three.folder / out) == three.expected, done.stderr
    assert done.stderr.count(f"warning: the file system of {three.folder / out} has no locks") == 1
    finished = three.run(out, "--max-failures", "1", **environment)
    assert finished.returncode == 0 and "0 shards made, 3 already there" in finished.stdout


def test_two_that_meet_on_a_shard_share_the_work(three: Set) -> None:
    """Of two that make the same shards, each goes on with another where the other is at work."""
    out = three.folder / "shared"
    out.mkdir()
    work = out / ".shard-00000.h5.work"
    work.mkdir()
    with open(work / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        later = three.run("shared")
    assert later.returncode == 3 and "it is left to that" in later.stderr
    assert "2 shards made, 0 already there, 1 left to another process: 1 videos" in later.stdout
    assert three.run("shared").returncode == 3 and files(out) == three.expected


def test_a_local_spool_leaves_nothing_but_the_shards(three: Set, tmp_path: Path) -> None:
    """What is appended to while the shards are made lies in the other folder."""
    done = three.run("local", "--spool", str(tmp_path / "spool"))
    assert done.returncode == 3 and files(three.folder / "local") == three.expected
    assert list((tmp_path / "spool").iterdir()) == []
