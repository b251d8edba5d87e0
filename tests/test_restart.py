"""Interrupted runs: full disks, kills, job arrays, refusals, exit statuses; each fault is really made."""

from __future__ import annotations

import fcntl
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import numpy as np
import pytest
from conftest import make_shards, panned, write_video

from preprocess import __main__, check, outlook, pipeline, summary
from preprocess.codec import Codec
from preprocess.manifest import Manifest
from preprocess.schema import Settings, shard_paths
from preprocess.shards import Shard

ROOT = Path(__file__).resolve().parent.parent
TINY = Settings(width=64, height=48, frame_width=48, frame_height=32)
TINY_FLAGS = ["--width", "64", "--height", "48", "--frame-width", "48", "--frame-height", "32"]
FRAMES = panned(20, height=48, width=64)


def files(folder: Path) -> dict[str, bytes]:
    """Every file under a folder, hidden ones too."""
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


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


@pytest.mark.parametrize("share", [0.01, 0.9])
def test_a_full_disk_is_said_and_the_next_run_completes(share: float, job: Job) -> None:
    """A limit on file sizes hits the spooled pictures, or the finished file."""
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
        pytest.skip("mounting is not allowed here: run the tests as root")
    try:
        yield lambda n: subprocess.run(["mount", "-o", f"remount,size={n}", str(folder)], check=True) and None
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)


@pytest.mark.parametrize("size", ["60k", "330k"])
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


def test_a_full_folder_for_temporary_files_does_not_matter(job: Job) -> None:
    with small_disk(job.folder / "temporary", "8k"):
        done = job.run("out_temporary", env=os.environ | {"TMPDIR": str(job.folder / "temporary")})
    assert done.returncode == 3, done.stderr
    job.assert_complete("out_temporary")


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
        kill_once(job, out, workers, ("all of it", "main process", "decoders")[k % 3], float(rng.uniform(0, 1.5)))
        done = list((job.folder / out).glob("shard-*.h5"))
        assert all(path.read_bytes() == job.expected[path.name] for path in done)
        if len(done) == 5 and k < count - 1:
            shutil.rmtree(job.folder / out)  # nothing is left to be killed
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
                if b"preprocess.child" in Path(f"/proc/{process}/cmdline").read_bytes():
                    os.kill(process, signal.SIGKILL)  # the run goes on with a new decoder
    elif run.poll() is None:
        (os.kill if what == "main process" else os.killpg)(run.pid, signal.SIGKILL)
    run.communicate()
    wait_for(lambda: not session(run.pid), "workers and decoders to end with their parent")


def test_a_killed_run_ends_as_an_undisturbed_one(job: Job) -> None:
    kill_at_random(job, 3, 2)


@pytest.mark.soak
@pytest.mark.parametrize("workers", [1, 2])
def test_a_run_killed_ten_times_ends_as_an_undisturbed_one(workers: int, job: Job) -> None:
    kill_at_random(job, 10, workers)


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
    "number, status, words, workers", [(signal.SIGINT, 130, "interrupted", "2"), (signal.SIGTERM, 143, "termin", "1")]
)
def test_an_interrupted_run_says_so_and_leaves_no_process(
    number: int, status: int, words: str, workers: str, job: Job
) -> None:
    out = f"signal{number}{workers}"
    run = job.start(out, "--workers", workers)
    wait_for(lambda: list((job.folder / out).glob(".*/frames")), "the first shard")
    os.kill(run.pid, number)
    _, errors = run.communicate()
    assert run.returncode == status and words in errors and "Traceback" not in errors
    wait_for(lambda: not session(run.pid), "workers to end")


# The signal falls into the callback of a weak reference, from which Python lets no exception out.
DROPPED = """
import os, signal, sys, time, weakref
from preprocess.__main__ import terminate
from preprocess.command import ended

class Thing:
    pass

def work():
    thing = Thing()
    seen = weakref.ref(thing, lambda _: os.kill(os.getpid(), int(sys.argv[1])))
    del thing
    time.sleep(60)
    return 0

signal.signal(signal.SIGTERM, terminate)
sys.exit(ended(work, "interrupted"))
"""


@pytest.mark.parametrize("number, status", [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_that_falls_into_a_destructor_still_ends_the_run(number: int, status: int) -> None:
    command = [sys.executable, "-c", DROPPED, str(int(number))]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == status and done.stderr.count("\n") == 1, done.stderr


def test_a_reader_that_stops_listening_is_no_error(job: Job) -> None:
    script = f"{sys.executable} -m preprocess info {job.folder / 'expected'} | true; sleep 0.1"
    done = subprocess.run(["bash", "-c", script], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0 and done.stderr == ""


# In this process


Verb = Callable[..., tuple[int, str, str]]


@pytest.fixture
def verb(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Verb:
    """python -m preprocess with these arguments -> status, what it prints, what it complains of."""
    monkeypatch.setattr(signal, "signal", lambda *_: None)

    def run(*arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["preprocess", *map(str, arguments)])
        capsys.readouterr()
        try:
            status = __main__.main()
        except SystemExit as ended:
            status = ended.code
        return status, *capsys.readouterr()

    return run


def test_check_ends_with_status_1_where_a_shard_is_damaged(job: Job, tmp_path: Path, verb: Verb) -> None:
    shutil.copytree(job.folder / "expected", tmp_path / "shards")
    assert verb("check", tmp_path / "shards")[0] == 0
    with open(tmp_path / "shards/shard-00001.h5", "r+b") as f:
        f.seek(5000)
        f.write(b"!")
    status, _, errors = verb("check", tmp_path / "shards", "--workers", 2)
    assert status == 1 and "shard-00001.h5: the checksum differs" in errors


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run over two videos, one a shard; b.mp4 is missing."""
    folder = tmp_path_factory.mktemp("finished")
    write_video(folder / "videos/a.mp4", FRAMES[:14])
    make_shards(folder, folder / "videos", ["a.mp4", "b.mp4"], ["x", "y"], settings=TINY, videos_per_shard=1)
    return folder


@pytest.fixture
def pair(finished: Path, tmp_path: Path) -> Path:
    """A copy of it to work on."""
    return Path(shutil.copytree(finished, tmp_path, dirs_exist_ok=True))


def test_everything_done_with_status_0(pair: Path, verb: Verb, monkeypatch: pytest.MonkeyPatch) -> None:
    write_video(pair / "videos/b.mp4", FRAMES[:3])
    monkeypatch.chdir(pair)
    flags = ["--retry-failed", "--videos-per-shard", "1", *TINY_FLAGS]
    status, said, errors = verb("run", "manifest.csv", "--videos", "videos", "--out", "shards", *flags)
    assert status == 0 and errors == ""
    assert said.splitlines()[-1].startswith("1 shards made, 1 already there: 1 videos, 3 frames")


def test_a_log_has_lines_of_progress(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    write_video(tmp_path / "videos/a.mp4", FRAMES[:14])
    monkeypatch.setattr(pipeline, "LOG_SECONDS", 0.0)
    make_shards(tmp_path, tmp_path / "videos", ["a.mp4", "b.mp4"], settings=TINY, videos_per_shard=1)
    said = capsys.readouterr().err.splitlines()
    assert re.fullmatch(r"1 of 2 videos, \d+ frames/s, 0 failed, \d+ s left", said[-2])
    assert re.fullmatch(r"2 of 2 videos, \d+ frames/s, 1 failed, 0 s left", said[-1])


def test_a_decoder_serves_a_worker_for_shard_after_shard(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    started: list[Codec] = []
    start = Codec._start
    monkeypatch.setattr(Codec, "_start", lambda codec: (started.append(codec), start(codec))[1])
    names = [write_video(tmp_path / f"{n}.mp4", FRAMES[:3]).name for n in range(6)]
    make_shards(tmp_path, tmp_path, names, settings=TINY, videos_per_shard=1, workers=2)
    assert 1 <= len(started) == len(set(started)) <= 2
    assert all(codec._child is None for codec in started)


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
        ({"paths": ["a.mp4", "c.mp4"]}, ["row 1: 'b.mp4' there, 'c.mp4' here"]),
        ({"labels": ["z", "y"]}, ["row 0: 'a.mp4', label 'x' there, 'a.mp4', label 'z' here"]),
        ({"videos_per_shard": 2}, ["1 videos from row 1 there, 2 from row 0 here", "--videos-per-shard"]),
        ({"paths": ["a.mp4"], "labels": ["x"]}, ["1 videos from row 1 there", "rows that the manifest lacks"]),
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
    paths, labels = (tuple(options.pop(name)) for name in ("paths", "labels"))
    Manifest(paths, labels, ("",) * len(paths)).write(pair / "other.csv")
    with pytest.raises(ValueError, match="was made by another run") as caught:
        pipeline.run(pair / "other.csv", pair / "videos", pair / "shards", options.pop("settings"), **options)
    assert all(w in str(caught.value) for w in words) and "Nothing was deleted" in str(caught.value)
    assert files(pair / "shards") == before


def test_a_shard_that_another_job_replaces_at_this_moment_is_no_error(
    pair: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is listed, and gone when it is looked at."""
    for module in pipeline, summary, outlook, check:
        monkeypatch.setattr(module, "shard_paths", lambda out: [*shard_paths(out), out / "shard-00009.h5"])
    arguments = (pair / "manifest.csv", pair / "videos", pair / "shards", TINY)
    assert pipeline.run(*arguments, videos_per_shard=1, retry_failed=True, dry_run=True) is None
    assert "videos    1," in check.describe(pair / "shards")
    done = pipeline.run(*arguments, videos_per_shard=1)
    assert done and [f.path for f in done.failures] == ["b.mp4"]


def test_the_same_number_of_shards_cut_elsewhere_is_refused(tmp_path: Path) -> None:
    names = [f"{n}.mp4" for n in range(5)]
    for name in names:
        (tmp_path / name).touch()
    make_shards(tmp_path, tmp_path, names, settings=TINY, videos_per_shard=3)
    with pytest.raises(ValueError, match="2 videos from row 3 there, 1 from row 4 here"):
        make_shards(tmp_path, tmp_path, names, settings=TINY, videos_per_shard=4)


def test_a_damaged_shard_in_the_folder_is_refused(pair: Path) -> None:
    shard = pair / "shards/shard-00000.h5"
    shard.write_bytes(shard.read_bytes()[:3000])
    with pytest.raises(ValueError, match=r"shard-00000\.h5"):
        make_shards(pair, pair / "videos", ["a.mp4", "b.mp4"], ["x", "y"], settings=TINY, videos_per_shard=1)


def test_a_shard_in_the_making_elsewhere_is_left_to_that(pair: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for path in (pair / "shards").glob("shard-*"):
        path.unlink()
    work = pair / "shards/.shard-00000.h5.work"
    work.mkdir()
    arguments = (pair / "manifest.csv", pair / "videos", pair / "shards", TINY)
    with open(work / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        summary = pipeline.run(*arguments, videos_per_shard=1)
        assert summary and (summary.shards_made, summary.shards_left) == (1, 1)
    assert "shard-00000.h5.work is worked on by another process: it is left to that" in capsys.readouterr().err
    assert not (pair / "shards/shard-00000.h5").exists()
    pipeline.run(*arguments, videos_per_shard=1)
    assert len(Shard(pair / "shards/shard-00000.h5")) == 1 and not work.exists()
