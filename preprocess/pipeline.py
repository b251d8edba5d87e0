"""A manifest's videos -> shards, in parallel, restartable. A task is one shard; what exists is complete and skipped."""

from __future__ import annotations

import csv
import fcntl
import json
import os
import platform
import re
import shutil
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Literal, NamedTuple

import joblib
from tqdm import tqdm

from preprocess.codec import Codec, CodecError, CodecLost, end_with_parent, plain
from preprocess.files import replacing
from preprocess.manifest import Manifest
from preprocess.shards import Failure, Origin, Settings, Shard, shard_name
from preprocess.writer import Spool, Video, write_shard

Backend = Literal["processes", "dask"]

# Every library whose version can change a shard's bytes.
LIBRARIES = ("av", "simplejpeg", "h5py", "numpy")
FLOW_LIBRARIES = ("scikit-image", "scipy")
POLL_SECONDS = 0.5
LOG_SECONDS = 60.0  # between lines of progress where there is no terminal for a bar


@dataclass(frozen=True)
class Task:
    """One shard to make."""

    number: int
    first_row: int
    paths: tuple[str, ...]
    labels: tuple[int, ...]
    videos: Path
    out: Path
    origin: Origin
    time_limit: float

    @property
    def shard(self) -> Path:
        return self.out / shard_name(self.number)

    @property
    def work(self) -> Path:
        """Folder of what is unfinished; hidden, and one a shard, so that parts of a job array share nothing."""
        return self.out / f".{shard_name(self.number)}.work"


class Made(NamedTuple):
    """What one finished task stored."""

    number: int
    videos: int
    frames: int
    failures: int


@dataclass(frozen=True)
class Summary:
    """What a run ends with."""

    videos: int
    frames: int
    failures: list[Failure]
    shards_made: int
    shards_skipped: int
    seconds: float


def run(
    manifest_path: Path,
    videos: Path,
    out: Path,
    settings: Settings,
    *,
    workers: int = 1,
    backend: Backend = "processes",
    scheduler: str | None = None,
    videos_per_shard: int = 128,
    part: tuple[int, int] = (1, 1),
    retry_failed: bool = False,
    time_limit: float = 600.0,
) -> Summary:
    """Make every shard of the manifest that is not there yet (or every `part`-th of them).

    `backend` "dask" sends the shards to the cluster whose `scheduler` address is given; its workers must see the same
    folders. Raises ValueError, before any work, where the folder holds shards of other settings, library versions or
    another manifest, and RuntimeError where a worker is lost.
    """
    started = time.monotonic()
    if (backend == "dask") != (scheduler is not None):
        raise ValueError("--backend dask needs --scheduler ADDRESS (such as tcp://node1:8786), and only it takes one")
    if time_limit <= 0:
        raise ValueError(f"--time-limit is {time_limit:g}; it must be more than 0 seconds")
    manifest = Manifest.read(manifest_path)
    # A relative name could start like an address (news: today.avi), which FFmpeg would try to reach.
    videos = videos.absolute()
    if not videos.is_dir():
        raise ValueError(f"--videos {videos} is not a folder; it is what the manifest's paths are relative to")
    tasks = plan(manifest, videos, out, settings, videos_per_shard, time_limit)
    out.mkdir(parents=True, exist_ok=True)
    refuse_foreign(out, tasks)
    index, parts = part
    if not 1 <= index <= parts:
        raise ValueError(f"--part {index}/{parts}: the first number runs from 1 to the second")
    mine = [t for t in tasks if t.number % parts == index - 1]
    todo = [t for t in mine if _needed(t, retry_failed)]
    skipped = len(mine) - len(todo)
    for task in todo:
        (task.work / "progress").unlink(missing_ok=True)  # of an earlier run
    with _progress(todo):
        made = _make_on_dask(todo, scheduler) if backend == "dask" else _make(todo, workers)
    failures = write_failures(out)
    return Summary(
        videos=sum(m.videos for m in made),
        frames=sum(m.frames for m in made),
        failures=failures,
        shards_made=len(made),
        shards_skipped=skipped,
        seconds=time.monotonic() - started,
    )


def _make(todo: list[Task], workers: int) -> list[Made]:
    """Every task, in `workers` processes. One killed process breaks the whole pool; its shards are tried once more."""
    made: dict[int, Made] = {}
    tried_again: set[int] = set()
    while len(made) < len(todo):
        left = [t for t in todo if t.number not in made]
        # More memory than one process has is the usual reason for being killed, so the message names it.
        parallel = joblib.Parallel(
            n_jobs=workers,
            return_as="generator_unordered",
            batch_size=1,
            initializer=end_with_parent,
            initargs=(os.getpid(),),
        )
        try:
            for result in parallel(joblib.delayed(make_shard)(t) for t in left):
                made[result.number] = result
        except joblib.externals.loky.process_executor.TerminatedWorkerError as error:
            hit = {t.number for t in left if t.number not in made and (t.work / "progress").exists()}
            names = ", ".join(shard_name(n) for n in sorted(hit))
            if hit & tried_again or not hit:
                raise RuntimeError(
                    f"a worker process was killed again, probably for lack of memory, while making {names}: lower "
                    "--workers and run the same command again; finished shards are kept"
                ) from error
            tried_again |= hit
            print(
                f"a worker process was killed, probably for lack of memory; making {names} once more", file=sys.stderr
            )
    return list(made.values())


def _make_on_dask(todo: list[Task], scheduler: str | None) -> list[Made]:
    """Every task, on the workers of a running Dask cluster, which tries those of a killed worker again elsewhere."""
    try:
        from distributed import Client
        from distributed.scheduler import KilledWorker
    except ImportError as error:
        raise ValueError("--backend dask needs Dask: pip install '.[preprocess,cluster]'") from error
    with Client(scheduler, set_as_default=False) as client:
        try:
            with joblib.parallel_config(backend="dask", client=client, retries=1):
                parallel = joblib.Parallel(return_as="generator_unordered", batch_size=1)
                return list(parallel(joblib.delayed(make_shard)(t) for t in todo))
        except KilledWorker as error:
            raise RuntimeError(
                f"a shard's worker was killed again and again, probably for lack of memory ({error}): start fewer "
                "workers a machine and run the same command again; finished shards are kept"
            ) from error


def plan(
    manifest: Manifest, videos: Path, out: Path, settings: Settings, videos_per_shard: int, time_limit: float
) -> list[Task]:
    """Cut a manifest into one task a shard."""
    if videos_per_shard < 1:
        raise ValueError(f"--videos-per-shard is {videos_per_shard}; it must be at least 1")
    starts = range(0, len(manifest.paths), videos_per_shard)
    origin = Origin(settings, manifest.sha256, manifest.classes, _versions(settings), len(starts))
    numbers = manifest.label_numbers
    return [
        Task(
            number=k,
            first_row=start,
            paths=manifest.paths[start : start + videos_per_shard],
            labels=tuple(int(n) for n in numbers[start : start + videos_per_shard]),
            videos=videos,
            out=out,
            origin=origin,
            time_limit=time_limit,
        )
        for k, start in enumerate(starts)
    ]


def _versions(settings: Settings) -> dict[str, str]:
    """Versions of what shapes a shard's bytes. Raises ValueError where flow is asked for and its extra absent."""
    versions = {name: version(name) for name in LIBRARIES} | {"machine": platform.machine()}
    if settings.flow:
        try:
            versions |= {name: version(name) for name in FLOW_LIBRARIES}
        except PackageNotFoundError as error:
            raise ValueError("--flow needs scikit-image: pip install '.[preprocess,flow]'") from error
    return versions


def refuse_foreign(out: Path, tasks: list[Task]) -> None:
    """Raise ValueError where the folder holds shards that this run would not make; nothing is deleted."""
    expected = {shard_name(t.number): t for t in tasks}
    for path in sorted(out.glob("shard-*.h5")):
        shard = Shard(path)
        differences = tasks[0].origin.differences(shard.origin)
        task = expected.get(path.name)
        if not differences and task and (shard.first_row, shard.rows) != (task.first_row, len(task.paths)):
            differences = [f"videos per shard: {shard.rows} there, {len(task.paths)} here"]
        if differences:
            raise ValueError(
                f"{path} was made by another run ({'; '.join(differences)}). Nothing was deleted: choose another "
                "--out, or run with what it was made with"
            )


def _needed(task: Task, retry_failed: bool) -> bool:
    return not task.shard.exists() or (retry_failed and bool(Shard(task.shard).failed))


def make_shard(task: Task) -> Made:
    """Make one shard. Runs in a worker. Raises OSError, saying what to do, where the disk does not take it."""
    try:
        return _make_shard(task)
    except OSError as error:
        # HDF5 hides the system's reason in the middle of its own.
        number = error.errno or next(iter(map(int, re.findall(r"errno = (\d+)", str(error)))), 0)
        raise OSError(
            f"{task.shard} cannot be made: {os.strerror(number) if number else error} (in {task.out} or the folder for "
            f"temporary files, {tempfile.gettempdir()}). Make room, or mend what this names, and run the same command "
            "again: finished shards are kept"
        ) from error


def _make_shard(task: Task) -> Made:
    work = task.work
    work.mkdir(exist_ok=True)
    with open(work / "lock", "w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise RuntimeError(f"{work} is being worked on by another process: wait for it, or stop it") from error
        spool = Spool(work)
        spool.truncate((0,) * len(spool.names))  # what an earlier, killed attempt left
        videos: list[Video] = []
        failures: list[Failure] = []
        frames = 0
        _tell(work, 0, 0, 0)
        with Codec() as codec:
            for row, (path, label) in enumerate(zip(task.paths, task.labels), start=task.first_row):
                stored = _store(codec, task, spool, row, path, label)
                if isinstance(stored, Video):
                    videos.append(stored)
                    frames += len(stored.frame_bytes)
                else:
                    failures.append(stored)
                _tell(work, len(videos), frames, len(failures))
        write_shard(task.out, task.number, task.origin, task.first_row, len(task.paths), videos, failures, spool)
        shutil.rmtree(work)
    return Made(task.number, len(videos), frames, len(failures))


def _store(codec: Codec, task: Task, spool: Spool, row: int, path: str, label: int) -> Video | Failure:
    """One video into the spool, or why not. A decoder that dies or hangs is replaced and the video tried once more."""
    before = spool.sizes()
    source = task.videos / path
    reason = ""
    for _ in range(2):
        try:
            answer = codec.convert(source, spool, task.origin.settings, task.time_limit)
            return Video(row, path, label, **answer)
        except CodecError as error:
            reason = str(error)
            break
        except CodecLost as error:
            reason = str(error)
            spool.truncate(before)
    spool.truncate(before)
    return Failure(row, path, plain(reason, source, path))


def _tell(work: Path, videos: int, frames: int, failures: int) -> None:
    """Leave this shard's progress where whoever watches the folder finds it, on any machine."""
    (work / "progress.new").write_text(json.dumps([videos, frames, failures]))
    os.replace(work / "progress.new", work / "progress")


@contextmanager
def _progress(todo: list[Task]) -> Iterator[None]:
    """A bar over all workers, or in a job's log a line a minute: videos done, frames a second, failures."""
    done = threading.Event()
    total = sum(len(t.paths) for t in todo)
    bar = tqdm(total=total, unit="video", disable=None, smoothing=0.05)
    started = time.monotonic()

    def watch() -> None:
        seen: dict[int, list[int]] = {}
        finished: set[int] = set()
        said = started
        while True:
            last = done.wait(POLL_SECONDS)
            for task in todo:
                if task.number in finished:
                    continue
                try:
                    seen[task.number] = json.loads((task.work / "progress").read_text())
                except FileNotFoundError:
                    if (task.number in seen or last) and task.shard.exists() and not task.work.exists():
                        finished.add(task.number)
                        counts = seen.setdefault(task.number, [0, 0, 0])
                        counts[0] = len(task.paths) - counts[2]
            videos, frames, failures = (sum(s[i] for s in seen.values()) for i in range(3))
            now = time.monotonic()
            how = f"{frames / (now - started):.0f} frames/s, {failures} failed"
            if not bar.disable:
                bar.n = videos + failures
                bar.set_postfix_str(how)
            elif now - said >= LOG_SECONDS:
                print(f"{videos + failures} of {total} videos, {how}", file=sys.stderr, flush=True)
                said = now
            if last:
                return

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    try:
        yield
    finally:
        done.set()
        watcher.join()
        bar.close()


def write_failures(out: Path) -> list[Failure]:
    """Collect the failure rows of every finished shard into failures.csv; returns them."""
    folder = os.open(out, os.O_RDONLY)
    try:
        fcntl.flock(folder, fcntl.LOCK_EX)  # of several parts, the last to come sees every shard
        failures = [f for p in sorted(out.glob("shard-*.h5")) for f in Shard(p).failed]
        with (
            replacing(out / "failures.csv") as partial,
            open(partial, "w", newline="", encoding="utf-8", errors="surrogateescape") as file,
        ):
            writer = csv.writer(file, lineterminator="\n")
            writer.writerow(Failure._fields)
            writer.writerows(failures)
    finally:
        os.close(folder)
    return failures


def report(summary: Summary, out: Path) -> None:
    """Say what a run did, failures first."""
    for failure in summary.failures[:20]:
        print(f"failed  {failure.path}: {failure.reason}", file=sys.stderr)
    if len(summary.failures) > 20:
        print(f"failed  … {len(summary.failures) - 20} more in {out / 'failures.csv'}", file=sys.stderr)
    rate = summary.frames / max(summary.seconds, 1e-9)
    print(
        f"{summary.shards_made} shards made, {summary.shards_skipped} already there: {summary.videos} videos, "
        f"{summary.frames} frames in {summary.seconds:.1f} s ({rate:.0f} frames/s), {len(summary.failures)} failed"
    )
