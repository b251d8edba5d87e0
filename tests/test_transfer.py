"""Sets of shards that travel: whole or not at all, the missing part after a kill, once a machine."""

from __future__ import annotations

import hashlib
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import ClassVar

import fsspec
import pytest
from conftest import ROOT, one_thread
from serving import serving
from test_shards import write

from preprocess import transfer

SHARDS = [f"shard-0000{number}.h5" for number in range(3)]
FLOW = "shard-00001.flow.h5"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A set of three shards, one with flow, in the folder `set`."""
    folder = tmp_path_factory.mktemp("sets") / "set"
    for number in range(3):
        write(folder, [4], number=number, shards=3, first_row=number)
    (folder / FLOW).write_bytes(b"flow")
    (folder / f"{FLOW}.sha256").write_text(f"{hashlib.sha256(b'flow').hexdigest()}  {FLOW}\n")
    (folder / "failures.csv").write_text("row,path,reason\n")
    (folder / "notes.txt").write_text("not of the set")
    return folder


def held(folder: Path) -> dict[str, bytes]:
    """Everything under its final name."""
    return {p.name: p.read_bytes() for p in folder.iterdir() if p.name != ".copying"}


def whole(folder: Path) -> dict[str, bytes]:
    return {name: content for name, content in held(folder).items() if name != "notes.txt"}


def start(source: str, target: Path) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "preprocess", "copy", source, str(target), "--workers", "1"]
    pipe = subprocess.PIPE
    return subprocess.Popen(command, cwd=ROOT, env=one_thread(), stdout=pipe, stderr=pipe, text=True)


def ended(process: subprocess.Popen[str]) -> str:
    out, errors = process.communicate(timeout=300)
    assert process.returncode == 0, errors
    return out


class Bar:
    """In place of tqdm's, which counts on a terminal only."""

    ends: ClassVar[list[tuple[int, int]]] = []

    def __init__(self, total: int, **_) -> None:
        self.n, self.total = 0, total

    def __enter__(self) -> Bar:
        return self

    def __exit__(self, *_) -> None:
        self.ends.append((self.n, self.total))

    def update(self, n: int) -> None:
        self.n += n


def test_from_a_folder_over_stores_into_a_folder(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With every byte on the bar; and what was damaged on the way gets no name."""
    monkeypatch.setattr(transfer, "tqdm", Bar)
    new = [str(tmp_path / "new" / name) for name in ("set", "again")]
    places = [str(folder), "memory://a/set", "memory://b/set/", *new]
    size = sum(p.stat().st_size for p in folder.glob("*.h5"))
    for source, target in pairwise(places):
        assert transfer.copy(source, target, workers=1) == (4, 0)
        assert transfer.copy(source, target, workers=1) == (0, 4)
        assert Bar.ends[-2:] == [(size, size), (0, 0)]
    assert held(Path(new[0])) == held(Path(new[1])) == whole(folder)
    memory = fsspec.filesystem("memory")
    data = bytearray(memory.cat_file("/b/set/shard-00001.h5"))
    data[-1] ^= 1
    memory.pipe_file("/b/set/shard-00001.h5", bytes(data))
    for target in "memory://c/set", str(tmp_path / "other"):
        with pytest.raises(ValueError, match=r"memory://b/set/shard-00001.h5 is damaged"):
            transfer.copy("memory://b/set/", target, workers=1)
    assert {*held(tmp_path / "other")} == {SHARDS[0], f"{SHARDS[0]}.sha256"}
    assert {Path(p).name for p in memory.find("/c/set")} == {SHARDS[0], f"{SHARDS[0]}.sha256"}


def test_what_is_not_whole_in_the_target_is_copied_again(folder: Path, tmp_path: Path) -> None:
    shutil.copytree(folder, tmp_path / "set")
    (tmp_path / "set" / SHARDS[0]).unlink()
    (tmp_path / "set" / f"{SHARDS[2]}.sha256").unlink()
    (tmp_path / "set" / SHARDS[2]).write_bytes(b"half")
    assert transfer.copy(str(folder), str(tmp_path / "set")) == (2, 2)
    assert held(tmp_path / "set") == held(folder)


def test_a_killed_copy_goes_on_with_what_is_missing(folder: Path, tmp_path: Path) -> None:
    target = tmp_path / "local"
    with serving(folder.parent, stuck=SHARDS[2]) as served:
        process = start(served.address, target)
        assert served.halfway.wait(300)
        done = {name for name in whole(folder) if name.startswith(("shard-00000", "shard-00001"))}
        while not [p for p in target.rglob("shard*") if p.name not in done]:
            time.sleep(0.01)  # until it writes what it has of the third
        process.send_signal(signal.SIGKILL)
        process.communicate()
        assert {p.name for p in target.glob("shard*")} == done
        assert len(list(target.glob(".copying-*/shard*"))) == 1
        served.go.set()
        served.asked.clear()
        assert ended(start(served.address, target)) == "1 files copied, each with its checksum; 3 were there\n"
    assert held(target) == whole(folder)
    assert [name for name in served.asked if name.endswith(".h5")] == [SHARDS[2]]


def test_of_two_processes_one_copies_and_the_other_waits(folder: Path, tmp_path: Path) -> None:
    with serving(folder.parent, stuck=SHARDS[1]) as served:
        first = start(served.address, tmp_path / "local")
        assert served.halfway.wait(300)
        second = start(served.address, tmp_path / "local")
        assert second.stderr
        assert "waiting for another process, which copies into" in second.stderr.readline()
        served.go.set()
        assert ended(first).startswith("4 files copied") and ended(second).endswith("; 4 were there\n")
    assert sorted(name for name in served.asked if name.endswith(".h5")) == sorted([*SHARDS, FLOW])
    assert held(tmp_path / "local") == whole(folder)


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda set_: shutil.rmtree(set_), "holds no whole set: shard-00000.h5.sha256"),
        (lambda set_: (set_ / f"{SHARDS[0]}.sha256").unlink(), "holds no whole set: shard-00000.h5.sha256"),
        (lambda set_: (set_ / f"{SHARDS[1]}.sha256").unlink(), "no whole set: the checksum of one of 3 shards"),
        (
            lambda set_: (set_ / f"{SHARDS[1]}.sha256").write_text("<html>"),
            "shard-00001.h5.sha256 holds no checksum",
        ),
        (lambda set_: (set_ / SHARDS[1]).unlink(), "shard-00001.h5"),
        (lambda set_: (set_ / SHARDS[1]).write_bytes(b""), "/set/shard-00001.h5 is damaged"),
    ],
)
def test_a_source_that_is_no_whole_set(
    folder: Path, tmp_path: Path, spoil: Callable[[Path], object], message: str
) -> None:
    shutil.copytree(folder, tmp_path / "set")
    spoil(tmp_path / "set")
    with serving(tmp_path) as served, pytest.raises((ValueError, OSError), match=message):
        transfer.copy(served.address, str(tmp_path / "local"), workers=1)
    assert not {SHARDS[1], f"{SHARDS[1]}.sha256"} & {*held(tmp_path / "local")}


def test_a_bucket_that_may_not_be_listed(folder: Path, tmp_path: Path) -> None:
    """It answers 403 for what it does not hold."""
    with serving(folder.parent, missing=403) as served:
        assert transfer.copy(served.address, str(tmp_path / "local")) == (4, 0)


def test_what_is_refused(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    other = write(tmp_path / "other", [5])
    with pytest.raises(ValueError, match=r"other holds another set: shard-00000.h5 of .* differ. Nothing was deleted"):
        transfer.copy(str(folder), str(tmp_path / "other"))
    assert {*held(tmp_path / "other")} == {other.path.name, f"{other.path.name}.sha256"}
    with pytest.raises(ValueError, match="a place to copy from, not to"):
        transfer.copy(str(folder), "http://127.0.0.1:9/set")
    monkeypatch.setitem(sys.modules, "s3fs", None)
    with pytest.raises(ValueError, match="s3://x needs a package: Install s3fs to access S3"):
        transfer.copy("s3://x", str(tmp_path / "x"))
    with pytest.raises(OSError, match=r"shard-.*.h5.sha256 cannot be read: .* The same command again"):
        transfer.copy("http://127.0.0.1:9/set", str(tmp_path / "x"))
    shutil.copytree(folder, tmp_path / "lacking")
    (tmp_path / "lacking" / f"{SHARDS[1]}.sha256").unlink()
    with pytest.raises(ValueError, match=r"lacking holds no whole set: shard-00001.h5.sha256 is not there"):
        transfer.copy(str(tmp_path / "lacking"), "memory://d")
    transfer.copy(str(folder), "memory://e")
    fsspec.filesystem("memory").rm(f"/e/{SHARDS[1]}.sha256")
    with pytest.raises(ValueError, match="memory://e holds no whole set: the checksum of one of 3 shards is not there"):
        transfer.copy("memory://e", "memory://d", workers=1)
    (tmp_path / "unfinished").mkdir()
    for name in SHARDS[0], f"{SHARDS[0]}.sha256":
        shutil.copy(folder / name, tmp_path / "unfinished")
    with pytest.raises(ValueError, match="lacks 2 of 3 shards"):
        transfer.copy(str(tmp_path / "unfinished"), "memory://d")
    assert not fsspec.filesystem("memory").find("/d")
