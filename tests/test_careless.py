"""The careless hand: folders that are gone or wrong, manifests that change, jobs that are killed; each really made."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
from collections import deque
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from conftest import ROOT, one_thread, panned, write_video
from test_restart import TINY, TINY_FLAGS, files, session, wait_for

from preprocess import check, outlook, pipeline, writer
from preprocess.codec import Codec
from preprocess.manifest import Manifest
from preprocess.shards import ShardSet

NAMES = tuple(f"{n}.mp4" for n in range(5))
LABELS = tuple("babab")


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Five videos."""
    folder = tmp_path_factory.mktemp("sources")
    for seed, name in enumerate(NAMES):
        write_video(folder / name, panned(26 + seed, height=48, width=64, seed=seed))
    return folder


@pytest.fixture(scope="module")
def undisturbed(sources: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The shards of the five videos, made in one go."""
    folder = tmp_path_factory.mktemp("undisturbed")
    make(folder, sources, videos_per_shard=8)
    return folder / "shards"


@pytest.fixture
def videos(sources: Path, tmp_path: Path) -> Path:
    """The five videos, to be broken."""
    return Path(shutil.copytree(sources, tmp_path / "videos"))


@pytest.fixture
def encoded(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """Names of the videos that are encoded from here on."""
    names: list[str] = []
    run = Codec.run

    def noting(codec: Codec, verb: str, source: Path, *arguments: Any, **options: Any) -> dict[str, Any]:
        names.append(source.name)
        return run(codec, verb, source, *arguments, **options)

    monkeypatch.setattr(Codec, "run", noting)
    yield names


def make(folder: Path, videos: Path, names: tuple[str, ...] = NAMES, labels: tuple[str, ...] = LABELS, **options: Any):
    subsets = options.pop("subsets", ("",) * len(names))
    Manifest(names, labels[: len(names)], subsets).write(folder / "manifest.csv")
    return pipeline.run(folder / "manifest.csv", videos, folder / "shards", TINY, **options)


def command(folder: Path, videos: Path, *flags: str) -> list[str]:
    line = ["run", str(folder / "manifest.csv"), "--videos", str(videos), "--out", str(folder / "shards")]
    return [*line, *TINY_FLAGS, *flags]


def preprocess(*arguments: str) -> subprocess.CompletedProcess[str]:
    line = [sys.executable, "-m", "preprocess", *arguments]
    return subprocess.run(line, cwd=ROOT, env=one_thread(), capture_output=True, text=True)


# ---- trying again what failed


def test_a_retry_encodes_what_failed_and_ends_in_the_bytes_of_a_run_without_failures(
    videos: Path, tmp_path: Path, undisturbed: Path, encoded: list[str]
) -> None:
    (videos / "2.mp4").rename(tmp_path / "away.mp4")
    make(tmp_path, videos, videos_per_shard=8)
    assert [f.path for f in ShardSet(tmp_path / "shards").failed] == ["2.mp4"]
    (tmp_path / "away.mp4").rename(videos / "2.mp4")
    (videos / "4.mp4").unlink()  # what was stored is not needed any more
    encoded.clear()
    summary = make(tmp_path, videos, videos_per_shard=8, retry_failed=True)
    assert encoded == ["2.mp4"] and (summary.shards_made, summary.videos, summary.failures) == (1, 1, [])
    assert files(tmp_path / "shards") == files(undisturbed)


def test_a_retry_tries_what_an_interrupted_run_noted_as_failed(
    videos: Path, tmp_path: Path, undisturbed: Path, encoded: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (videos / "2.mp4").rename(tmp_path / "away.mp4")
    with monkeypatch.context() as interrupted:
        interrupted.setattr(pipeline, "write_shard", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        for _ in range(2):  # in the first run it is noted, the second takes the note
            with pytest.raises(KeyboardInterrupt):
                make(tmp_path, videos, videos_per_shard=8)
    assert encoded == list(NAMES)
    (tmp_path / "away.mp4").rename(videos / "2.mp4")
    encoded.clear()
    make(tmp_path, videos, videos_per_shard=8, retry_failed=True)
    assert encoded == ["2.mp4", "3.mp4", "4.mp4"] and files(tmp_path / "shards") == files(undisturbed)


def test_a_retry_never_loses_a_video(videos: Path, tmp_path: Path) -> None:
    (videos / "2.mp4").write_bytes(b"no video")
    make(tmp_path, videos, videos_per_shard=8)
    before = files(tmp_path / "shards")
    shutil.rmtree(videos)
    videos.mkdir()  # a mount point without its disk
    assert make(tmp_path, videos, videos_per_shard=8, retry_failed=True).shards_made == 0
    assert files(tmp_path / "shards") == before


def test_a_retry_in_vain_leaves_the_shard_as_it_is(videos: Path, tmp_path: Path, encoded: list[str]) -> None:
    (videos / "2.mp4").write_bytes(b"no video")
    make(tmp_path, videos, videos_per_shard=8)
    before, written = files(tmp_path / "shards"), (tmp_path / "shards/shard-00000.h5").stat().st_mtime_ns
    encoded.clear()
    summary = make(tmp_path, videos, videos_per_shard=8, retry_failed=True)
    assert encoded == ["2.mp4"] and (summary.shards_made, len(summary.failures)) == (0, 1)
    assert files(tmp_path / "shards") == before
    assert (tmp_path / "shards/shard-00000.h5").stat().st_mtime_ns == written


def test_a_retry_does_not_copy_from_a_damaged_shard(videos: Path, tmp_path: Path) -> None:
    (videos / "2.mp4").rename(tmp_path / "away.mp4")
    make(tmp_path, videos, videos_per_shard=8)
    (tmp_path / "away.mp4").rename(videos / "2.mp4")
    path = tmp_path / "shards/shard-00000.h5"
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    with pytest.raises(ValueError, match="the checksum differs"):
        make(tmp_path, videos, videos_per_shard=8, retry_failed=True)
    assert path.read_bytes() == data


# ---- folders that are wrong, or go


def test_a_wrong_folder_of_videos_is_refused_before_any_work(videos: Path, tmp_path: Path, undisturbed: Path) -> None:
    (tmp_path / "manifest.csv").touch()
    with pytest.raises(ValueError, match=r"5 of 5 videos .*Give as --videos the folder"):
        make(tmp_path, videos.parent, videos_per_shard=8)
    assert not list((tmp_path / "shards").iterdir())
    make(tmp_path, videos, videos_per_shard=8)
    assert files(tmp_path / "shards") == files(undisturbed)


def test_a_few_missing_videos_are_said_and_the_others_stored(
    videos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (videos / "1.mp4").unlink()
    assert [f.path for f in make(tmp_path, videos).failures] == ["1.mp4"]
    assert f"1 of 5 videos of the manifest are not in {videos}, such as {videos}/1.mp4" in capsys.readouterr().err


def test_a_folder_that_goes_during_the_run_stops_it(
    videos: Path, tmp_path: Path, undisturbed: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = Codec.run

    def unmounting(codec: Codec, verb: str, source: Path, *arguments: Any, **options: Any) -> dict[str, Any]:
        if source.name == "2.mp4":
            videos.rename(tmp_path / "elsewhere")
            videos.mkdir()
        return run(codec, verb, source, *arguments, **options)

    with monkeypatch.context() as patch:
        patch.setattr(Codec, "run", unmounting)
        with pytest.raises(RuntimeError, match=r"2\.mp4 is not there, nor is any of 5 videos .* is mounted"):
            make(tmp_path, videos, videos_per_shard=8)
    assert not list((tmp_path / "shards").glob("shard-*"))
    make(tmp_path, tmp_path / "elsewhere", videos_per_shard=8)
    assert files(tmp_path / "shards") == files(undisturbed)


def test_an_interrupted_run_counts_what_it_did_itself(
    videos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (videos / "0.mp4").write_bytes(b"no video")
    run = Codec.run

    def interrupted(codec: Codec, verb: str, source: Path, *arguments: Any, **options: Any) -> dict[str, Any]:
        if source.name == "3.mp4":
            raise KeyboardInterrupt
        return run(codec, verb, source, *arguments, **options)

    monkeypatch.setattr(writer, "SAVE_SECONDS", 0)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Codec, "run", interrupted)
        make(tmp_path, videos)
    summary = make(tmp_path, videos)
    assert (summary.videos, summary.frames) == (2, 29 + 30) and [f.path for f in summary.failures] == ["0.mp4"]


# ---- manifests that change


def test_appended_rows_fill_the_last_shard_and_make_further_ones(
    videos: Path, tmp_path: Path, encoded: list[str]
) -> None:
    """Also where one has a class that comes between the others, and a subset was filled in."""
    make(tmp_path, videos, NAMES[:3], videos_per_shard=2)
    first = (tmp_path / "shards/shard-00000.h5").stat()
    for name in NAMES[:3]:  # what is stored is not needed any more
        (videos / name).rename(tmp_path / name)
    encoded.clear()
    labels = (*LABELS[:3], "ab", "c")
    subsets = ("train", "test", "", "", "val")
    summary = make(tmp_path, videos, labels=labels, subsets=subsets, videos_per_shard=2)
    assert encoded == ["3.mp4", "4.mp4"] and (summary.shards_made, summary.shards_skipped) == (2, 1)
    assert (tmp_path / "shards/shard-00000.h5").stat() == first
    (tmp_path / "at once").mkdir()
    for name in NAMES[:3]:
        (tmp_path / name).rename(videos / name)
    make(tmp_path / "at once", videos, labels=labels, videos_per_shard=2)
    ours, other = ShardSet(tmp_path / "shards"), ShardSet(tmp_path / "at once/shards")
    assert check.problems(ours.folder) == [] and ours.classes == other.classes == ["a", "ab", "b", "c"]
    assert ours.paths == other.paths == list(NAMES) and ours.label.tolist() == other.label.tolist() == [2, 0, 2, 1, 3]
    for name in "shard-00001.h5", "shard-00002.h5":  # what is made with the longer manifest is what it makes
        assert (ours.folder / name).read_bytes() == (other.folder / name).read_bytes()
    encoded.clear()
    assert make(tmp_path, videos, labels=labels, videos_per_shard=2).shards_made == 0 and encoded == []


# ---- killed


STUCK = """
import sys, time
from preprocess import __main__, codec, writer
run, writer.SAVE_SECONDS = codec.Codec.run, 0
codec.Codec.run = lambda self, *what, **how: time.sleep(600) if what[1].name == "3.mp4" else run(self, *what, **how)
sys.exit(__main__.main())
"""


@pytest.mark.parametrize("scratch", [False, True])
def test_a_killed_shard_goes_on_after_its_last_finished_video(
    scratch: bool, sources: Path, tmp_path: Path, undisturbed: Path, encoded: list[str]
) -> None:
    local = tmp_path / "local"
    Manifest(NAMES, LABELS, ("",) * 5).write(tmp_path / "manifest.csv")
    flags = ["--videos-per-shard", "8", *(["--spool", str(local)] if scratch else [])]
    process = subprocess.Popen(
        [sys.executable, "-c", STUCK, *command(tmp_path, sources, *flags)], cwd=ROOT, start_new_session=True
    )
    folder = local if scratch else tmp_path / "shards"
    wait_for(lambda: any(j.read_bytes().count(b"\n") == 4 for j in folder.glob(".*.work/journal")), "three videos")
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    wait_for(lambda: not session(process.pid), "the decoder to end")
    assert not list((tmp_path / "shards").glob("shard-*"))
    (journal,) = folder.glob(".*.work/journal")
    told = preprocess("info", str(tmp_path / "shards"))
    finished = "" if scratch else ", with 3 videos finished"
    assert told.stdout == f"shards    none finished\nbegun     1 more{finished}\n"
    journal.write_bytes(journal.read_bytes() + b"[[")  # a line cut short
    with open(journal.parent / "frames", "ab") as spool:
        spool.write(b"half a video")
    make(tmp_path, sources, videos_per_shard=8, spool=local if scratch else None)
    assert encoded == ["3.mp4", "4.mp4"]
    assert files(tmp_path / "shards") == files(undisturbed)
    assert not list(local.glob("*"))


def test_a_journal_survives_any_cut(tmp_path: Path) -> None:
    """It keeps the whole lines whose bytes the spool has, and goes on after them."""
    spool = writer.Spool(tmp_path, ("frames",))

    def entries(*new: int) -> list[int]:
        journal = writer.Journal(spool, "the same")
        kept = [journal.next(dict)["n"] for _ in range(len(journal.kept))]
        for n in new:
            with open(spool.path("frames"), "ab") as file:
                file.write(bytes(10))
            journal.next(lambda n=n: {"n": n})
        journal.save()
        return kept

    assert entries(0, 1, 2) == []
    whole = (tmp_path / "journal").read_bytes()
    first, second = whole.index(b"\n") + 1, whole.index(b'{"n": 1}')
    for length, expected in (
        (len(whole), [0, 1, 2]),
        (len(whole) - 1, [0, 1]),
        (second, [0]),
        (first, []),
        (first - 1, []),
    ):
        (tmp_path / "journal").write_bytes(whole[:length])
        (tmp_path / "frames").write_bytes(bytes(35))
        assert entries(7) == expected and (tmp_path / "frames").stat().st_size == 10 * len(expected) + 10
        assert entries() == [*expected, 7]
    (tmp_path / "journal").write_bytes(whole[:second] + bytes(len(whole) - second - 1) + b"\n")  # the power went
    (tmp_path / "frames").write_bytes(bytes(35))
    assert entries(7) == [0] and entries() == [0, 7]
    (tmp_path / "journal").write_bytes(whole)
    (tmp_path / "frames").write_bytes(bytes(25))
    assert entries() == [0, 1] and writer.Journal(spool, "another").kept == deque()


def test_what_another_run_began_is_not_gone_on_with(videos: Path, tmp_path: Path, encoded: list[str]) -> None:
    work = tmp_path / "shards/.shard-00000.h5.work"
    work.mkdir(parents=True)
    (work / "journal").write_text("of another run\n[[0, 0, 0], {}]\n")
    (work / "frames").write_bytes(b"of another run")
    make(tmp_path, videos)
    assert encoded == list(NAMES) and check.problems(tmp_path / "shards") == []


# ---- what is said


def test_what_there_is_to_do_is_said_before(
    videos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(outlook, "ENOUGH", 5)
    assert make(tmp_path, videos, workers=3, videos_per_shard=4, dry_run=True) is None
    said = capsys.readouterr()
    assert "2 shards, 0 already there: 5 videos to do; about " in said.out and " are free" in said.out
    assert "3 workers have 2 shards to make, so that 1 of them idle: --videos-per-shard 2 gives each one" in said.err
    assert not (tmp_path / "shards").exists()
    make(tmp_path, videos, videos_per_shard=4)
    capsys.readouterr()
    make(tmp_path, videos, videos_per_shard=4, dry_run=True)
    assert capsys.readouterr() == ("2 shards, 2 already there: 0 videos to do\n", "")


def test_the_room_that_is_needed_is_held_against_what_is_free(
    videos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (videos / "2.mp4").write_bytes(b"no video")
    declared = outlook.declared_frames([videos / name for name in NAMES])
    assert declared == [26, 27, 29, 30]
    make(tmp_path, videos, NAMES[:4], videos_per_shard=4)
    monkeypatch.setattr(outlook, "_free", lambda _: 1000)
    make(tmp_path, videos, videos_per_shard=4, dry_run=True)
    size = (tmp_path / "shards/shard-00000.h5").stat().st_size / 3
    assert f"warning: about {size / 1e6:.0f} MB are needed" in capsys.readouterr().err


def test_failures_are_told_by_reason(videos: Path, tmp_path: Path) -> None:
    for name in NAMES[:2]:
        (videos / name).unlink()
    Manifest(NAMES, LABELS, ("",) * 5).write(tmp_path / "manifest.csv")
    done = preprocess(*command(tmp_path, videos))
    assert done.returncode == 3
    assert "failed  2 videos, such as 0.mp4: [Errno 2] No such file" in done.stderr and "1.mp4" not in done.stderr
    assert preprocess(*command(tmp_path, videos, "--max-failures", "1")).returncode == 3
    assert preprocess(*command(tmp_path, videos, "--max-failures", "2")).returncode == 0


def test_info_tells_how_far_an_unfinished_set_is(videos: Path, tmp_path: Path) -> None:
    make(tmp_path, videos, videos_per_shard=2, part=(1, 2))
    (tmp_path / "shards/.shard-00001.h5.work").mkdir()
    (tmp_path / "shards/.shard-00001.h5.work/journal").write_text("head\nfirst\n")
    told = preprocess("info", str(tmp_path / "shards"))
    assert told.returncode == 0, told.stderr
    assert "shards    2 of 3 files" in told.stdout and "videos    3," in told.stdout
    assert "begun     1 more, with 1 videos finished" in told.stdout


def test_a_folder_for_a_manifest_is_told_what_to_do(videos: Path, tmp_path: Path) -> None:
    done = preprocess("run", str(videos), "--videos", str(videos), "--out", str(tmp_path / "shards"))
    assert done.returncode == 1 and f"python -m preprocess manifest {videos} --out" in done.stderr
    for number, name in enumerate(NAMES):
        (videos / str(number % 2)).mkdir(exist_ok=True)
        (videos / name).rename(videos / str(number % 2) / name)
    out = tmp_path / "manifest.csv"
    assert preprocess("manifest", str(videos), "--out", str(out)).returncode == 0
    assert Manifest.read(out).classes == ("class_0", "class_1")
    assert preprocess("manifest", str(videos), "--out", str(out), "--no-labels").returncode == 0
    assert Manifest.read(out).classes == ()
