"""A manifest's videos -> shards, in parallel, restartable. A task is one shard; what exists is complete and skipped."""

from __future__ import annotations

import csv
import fcntl
import os
import platform
import sys
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
from tqdm import tqdm

from preprocess.codec import Codec, CodecError, Reader, plain, spread
from preprocess.files import replacing
from preprocess.manifest import Manifest
from preprocess.shards import Failure, Origin, Settings, Shard, shard_name, shard_paths
from preprocess.writer import Spool, Video, working, write_shard

Backend = Literal["processes", "dask"]

# Every library whose version can change a shard's bytes.
LIBRARIES = ("av", "simplejpeg", "h5py", "numpy")
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
    reader: Reader = "pyav"

    @property
    def shard(self) -> Path:
        return self.out / shard_name(self.number)


class Made(NamedTuple):
    """What one finished task stored."""

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


class Progress:
    """A bar over the videos of all workers, or in a job's log a line a minute: how many, frames a second, failures."""

    def __init__(self, videos: int) -> None:
        self._bar = tqdm(total=videos, unit="video", disable=None, smoothing=0.05)
        self._started = self._said = time.monotonic()
        self._videos = self._frames = self._failures = 0
        self._lock = threading.Lock()

    def add(self, videos: int, frames: int, failures: int = 0) -> None:
        """Count what any thread has finished; `videos` are those that are stored."""
        with self._lock:
            self._videos += videos + failures
            self._frames += frames
            self._failures += failures
            now = time.monotonic()
            how = f"{self._frames / (now - self._started):.0f} frames/s, {self._failures} failed"
            if not self._bar.disable:
                self._bar.set_postfix_str(how, refresh=False)
                self._bar.update(videos + failures)
            elif now - self._said >= LOG_SECONDS:
                print(f"{self._videos} of {self._bar.total} videos, {how}", file=sys.stderr, flush=True)
                self._said = now

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.close()


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
    reader: Reader = "pyav",
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
    if reader == "mvextractor" and not find_spec("mvextractor"):
        raise ValueError(
            "--reader mvextractor needs the package motion-vector-extractor, which there is for Linux on x86-64: "
            "pip install '.[preprocess]', or leave the flag away (the bytes are the same)"
        )
    manifest = Manifest.read(manifest_path)
    # A relative name could start like an address (news: today.avi), which FFmpeg would try to reach.
    videos = videos.absolute()
    if not videos.is_dir():
        raise ValueError(f"--videos {videos} is not a folder; it is what the manifest's paths are relative to")
    tasks = plan(manifest, videos, out, settings, videos_per_shard, time_limit, reader)
    out.mkdir(parents=True, exist_ok=True)
    refuse_foreign(out, tasks)
    index, parts = part
    if not 1 <= index <= parts:
        raise ValueError(f"--part {index}/{parts}: the first number runs from 1 to the second")
    mine = [t for t in tasks if t.number % parts == index - 1]
    todo = [t for t in mine if _needed(t, retry_failed)]
    with Progress(sum(len(t.paths) for t in todo)) as progress:
        if backend == "dask":
            made = _make_on_dask(todo, scheduler, progress)
        else:
            made = spread(lambda task, codec: make_shard(task, codec, progress), todo, workers)
    failures = write_failures(out)
    return Summary(
        videos=sum(m.videos for m in made),
        frames=sum(m.frames for m in made),
        failures=failures,
        shards_made=len(made),
        shards_skipped=len(mine) - len(todo),
        seconds=time.monotonic() - started,
    )


def _make_on_dask(todo: list[Task], scheduler: str | None, progress: Progress) -> list[Made]:
    """Every task, on the workers of a running Dask cluster, which tries those of a killed worker again elsewhere."""
    try:
        from distributed import Client, as_completed
        from distributed.scheduler import KilledWorker
    except ImportError as error:
        raise ValueError("--backend dask needs Dask: pip install '.[preprocess,cluster]'") from error
    made: list[Made] = []
    with Client(scheduler, set_as_default=False) as client, client.as_current():
        try:
            for _, result in as_completed(client.map(_make_alone, todo, retries=1, pure=False), with_results=True):
                made.append(result)
                progress.add(*result)
        except KilledWorker as error:
            raise RuntimeError(
                f"a shard's worker was killed again and again, probably for lack of memory ({error}): start fewer "
                "workers a machine and run the same command again; finished shards are kept"
            ) from error
    return made


def _make_alone(task: Task) -> Made:
    with Codec() as codec:
        return make_shard(task, codec)


def plan(
    manifest: Manifest,
    videos: Path,
    out: Path,
    settings: Settings,
    videos_per_shard: int,
    time_limit: float,
    reader: Reader = "pyav",
) -> list[Task]:
    """Cut a manifest into one task a shard."""
    if videos_per_shard < 1:
        raise ValueError(f"--videos-per-shard is {videos_per_shard}; it must be at least 1")
    starts = range(0, len(manifest.paths), videos_per_shard)
    origin = Origin(settings, manifest.sha256, manifest.classes, library_versions(LIBRARIES), len(starts))
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
            reader=reader,
        )
        for k, start in enumerate(starts)
    ]


def library_versions(names: Sequence[str]) -> dict[str, str]:
    """Versions of what shapes a file's bytes, the kind of CPU among it."""
    return {name: version(name) for name in names} | {"machine": platform.machine()}


def refuse_foreign(out: Path, tasks: list[Task]) -> None:
    """Raise ValueError where the folder holds shards that this run would not make; nothing is deleted."""
    expected = {shard_name(t.number): t for t in tasks}
    for path in shard_paths(out):
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


def make_shard(task: Task, codec: Codec, progress: Progress | None = None) -> Made:
    """Make one shard, telling `progress` of every video. Raises as `working` and `write_shard`."""
    videos: list[Video] = []
    failures: list[Failure] = []
    frames = 0
    with working(task.shard) as spool:
        for row, (path, label) in enumerate(zip(task.paths, task.labels), start=task.first_row):
            stored = _store(codec, task, spool, row, path, label)
            if isinstance(stored, Video):
                videos.append(stored)
                frames += len(stored.frame_bytes)
                done = Made(1, len(stored.frame_bytes), 0)
            else:
                failures.append(stored)
                done = Made(0, 0, 1)
            if progress:
                progress.add(*done)
        write_shard(task.out, task.number, task.origin, task.first_row, len(task.paths), videos, failures, spool)
    return Made(len(videos), frames, len(failures))


def _store(codec: Codec, task: Task, spool: Spool, row: int, path: str, label: int) -> Video | Failure:
    """One video into the spool, or why not."""
    source = task.videos / path
    try:
        answer = codec.run("convert", source, spool, task.origin.settings, task.time_limit, reader=task.reader)
    except CodecError as error:
        return Failure(row, path, plain(str(error), source, path))
    for key in ("frame_bytes", "iframe_bytes", "iframe_frame"):
        answer[key] = np.array(answer[key], np.int64)
    answer["times"] = np.array(answer["times"], np.float64)
    return Video(row, path, label, **answer)


def write_failures(out: Path) -> list[Failure]:
    """Collect the failure rows of every finished shard into failures.csv; returns them."""
    folder = os.open(out, os.O_RDONLY)
    try:
        fcntl.flock(folder, fcntl.LOCK_EX)  # of several parts, the last to come sees every shard
        failures = [f for p in shard_paths(out) for f in Shard(p).failed]
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
