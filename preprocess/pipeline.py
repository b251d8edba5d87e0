"""A manifest's videos -> shards, in parallel, restartable. A task is one shard; what exists is complete and skipped."""

from __future__ import annotations

import json
import os
import platform
import sys
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
from av import library_versions as av_versions
from tqdm import tqdm

from preprocess import outlook
from preprocess.check import checksum_problems
from preprocess.codec import Codec, CodecError, Reader, check_time_limit, plain, spread
from preprocess.command import at_least, say
from preprocess.manifest import Manifest
from preprocess.schema import Failure, Origin, Settings, beside_path, shard_name, shard_paths
from preprocess.shards import Shard, open_shard
from preprocess.summary import Summary, write_failures
from preprocess.writer import Busy, Journal, Spool, Video, copy_video, working, write_shard

# Every library whose version can change a shard's bytes, and those of FFmpeg, which decode, scale and encode.
LIBRARIES = ("av", "simplejpeg", "h5py")
FFMPEG = ("libavcodec", "libavformat", "libswscale")
LOG_SECONDS = 60.0  # between lines of progress where there is no terminal for a bar
SEEN_SECONDS = 90.0  # until a shard that was made on another machine is seen here: what NFS may keep from before


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
    retry_failed: bool = False
    residuals: bool = False
    scratch: Path | None = None
    """Folder for the spool; None: beside the shard."""
    witnesses: tuple[str, ...] = ()
    """Paths of videos that were there when the run began."""
    lacks: int = 0
    """How many videos were to be encoded when the run began."""

    @property
    def shard(self) -> Path:
        return self.out / shard_name(self.number)

    @property
    def spooled(self) -> tuple[str, ...]:
        return (*Spool.names, "residual") if self.residuals else Spool.names

    @property
    def made_from(self) -> str:
        """What makes two tasks the same, in spite of rows that were appended for other shards."""
        settings, versions = self.origin.settings.to_json(), self.origin.versions
        return json.dumps([settings, versions, self.first_row, self.paths, self.labels, self.spooled], sort_keys=True)


class Made(NamedTuple):
    """What one finished task added; no shard where nothing came to what was there."""

    shards: int
    videos: int
    frames: int
    failures: int


class Progress:
    """A bar over the videos of all workers, or in a job's log a line a minute: how many, how fast, how long still."""

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
            seconds = now - self._started
            how = f"{self._frames / seconds:.0f} frames/s, {self._failures} failed"
            if not self._bar.disable:  # it tells the time left by itself
                self._bar.set_postfix_str(how, refresh=False)
                self._bar.update(videos + failures)
            elif now - self._said >= LOG_SECONDS:
                left = outlook.duration(seconds * (self._bar.total - self._videos) / max(self._videos, 1))
                print(f"{self._videos} of {self._bar.total} videos, {how}, {left} left", file=sys.stderr, flush=True)
                self._said = now

    def skip(self, videos: int) -> None:
        """Expect so many fewer: an earlier attempt has made them, or another process does."""
        with self._lock:
            self._bar.total -= videos

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
    backend: Literal["processes", "dask"] = "processes",
    scheduler: str | None = None,
    videos_per_shard: int = 128,
    part: tuple[int, int] = (1, 1),
    retry_failed: bool = False,
    time_limit: float = 600.0,
    reader: Reader = "pyav",
    residuals: bool = False,
    spool: Path | None = None,
    dry_run: bool = False,
) -> Summary | None:
    """Make every shard of the manifest that is not there yet (or every `part`-th of them).

    A shard whose rows were appended to, and with `retry_failed` one with failures, is made anew from what it holds and
    the videos that it lacks. `backend` "dask" sends the shards to the cluster whose `scheduler` is named, by address or
    by the file that it writes; its workers must see the same folders. A `dry_run` only says what would be done.

    Raises ValueError, before any work, where the folder holds shards of other settings, library versions, paths or
    labels, or most videos that were never tried are not there; RuntimeError where a worker is lost, or the videos'
    folder.
    """
    started = time.monotonic()
    if (backend == "dask") != (scheduler is not None):
        raise ValueError("--backend dask needs --scheduler ADDRESS (such as tcp://node1:8786), and only it takes one")
    check_time_limit(time_limit)
    if reader == "mvextractor" and not find_spec("mvextractor"):
        raise ValueError(
            "--reader mvextractor needs the package motion-vector-extractor, which there is for Linux on x86-64: "
            "pip install '.[preprocess]', or leave the flag away (the bytes are the same)"
        )
    manifest = Manifest.read(manifest_path)
    # A relative name could start like an address (news: today.avi), which FFmpeg would try to reach; and it would name
    # another folder on the workers of a cluster.
    videos, out = videos.absolute(), out.absolute()
    if not videos.is_dir():
        raise ValueError(f"--videos {videos} is not a folder; it is what the manifest's paths are relative to")
    tasks = plan(
        manifest,
        settings,
        videos_per_shard,
        videos=videos,
        out=out,
        time_limit=time_limit,
        reader=reader,
        residuals=residuals,
        retry_failed=retry_failed,
        scratch=spool and spool.absolute(),
    )
    index, parts = part
    if not 1 <= index <= parts:
        raise ValueError(f"--part {index}/{parts}: the first number runs from 1 to the second")
    if not dry_run:
        out.mkdir(parents=True, exist_ok=True)
    refuse_foreign(out, tasks)
    mine = [t for t in tasks if t.number % parts == index - 1]
    lacks = {t.number: lacking(t) for t in mine}
    todo = [t for t in mine if lacks[t.number]]
    if todo or dry_run:
        witnesses = outlook.present([path for task in todo for path in untried(task)], videos)
        todo = [replace(t, witnesses=witnesses, lacks=lacks[t.number]) for t in todo]
        count = 0 if backend == "dask" else workers
        outlook.tell(out, len(mine), len(todo), sum(lacks.values()), [videos / w for w in witnesses], settings, count)
    if dry_run:
        return None
    with Progress(sum(lacks.values())) as progress:
        if backend == "dask":
            made = _make_on_dask(todo, scheduler, progress)
        else:
            made = spread(lambda task, codec: make_shard(task, codec, progress), todo, workers)
    failures = write_failures(out)
    done = [m for m in made if m]
    shards_made, shards_left = sum(m.shards for m in done), len(made) - len(done)
    return Summary(
        videos=sum(m.videos for m in done),
        frames=sum(m.frames for m in done),
        failures=failures,
        shards_made=shards_made,
        shards_skipped=len(mine) - shards_made - shards_left,
        seconds=time.monotonic() - started,
        shards_left=shards_left,
    )


def _make_on_dask(todo: list[Task], scheduler: str | None, progress: Progress) -> list[Made | None]:
    """Every task, on the workers of a running Dask cluster, which tries those of a killed worker again elsewhere."""
    try:
        from distributed import Client, as_completed
        from distributed.scheduler import KilledWorker
    except ImportError as error:
        raise ValueError("--backend dask needs Dask: pip install '.[preprocess,cluster]'") from error
    made: list[Made | None] = []
    # A file that the scheduler has still to write is waited for.
    named = "scheduler_file" if str(scheduler).endswith(".json") else "address"
    if named == "scheduler_file" and not os.path.exists(str(scheduler)):
        say(f"waiting for {scheduler}, which a Dask scheduler is to write")
    with Client(**{named: scheduler}, set_as_default=False) as client, client.as_current():
        futures = client.map(_make_alone, todo, retries=1, pure=False)
        tasks = {future.key: task for future, task in zip(futures, todo)}
        try:
            for future, result in as_completed(futures, with_results=True):
                task = tasks[future.key]
                made.append(result)
                progress.skip(task.lacks - (result.videos + result.failures if result else 0))
                if result:
                    _await(task.shard)
                    progress.add(*result[1:])
        except KilledWorker as error:
            raise RuntimeError(
                f"a shard's worker was killed again and again, probably for lack of memory ({error}): start fewer "
                "workers a machine and run the same command again; finished shards are kept"
            ) from error
    return made


def _make_alone(task: Task) -> Made | None:
    """`make_shard` on a machine of a cluster, which must have what the command's has."""
    if differences := replace(task.origin, versions=library_versions(LIBRARIES)).differences(task.origin):
        raise ValueError(f"worker {platform.node()} differs from where the command runs ({'; '.join(differences)})")
    with Codec() as codec:
        return make_shard(task, codec)


def _await(shard: Path) -> None:
    """Wait until a shard that another machine has made is seen here; RuntimeError where it is not."""
    end = time.monotonic() + SEEN_SECONDS
    while not shard.exists():
        if time.monotonic() > end:
            raise RuntimeError(
                f"a worker has made {shard}, which is not to be seen from here: --out must be a folder of a file "
                "system that all machines share"
            )
        time.sleep(0.5)


def plan(manifest: Manifest, settings: Settings, videos_per_shard: int, **common: Any) -> list[Task]:
    """Cut a manifest into one task a shard, with what is `common` to all."""
    at_least("--videos-per-shard", videos_per_shard, 1)
    starts = range(0, len(manifest), videos_per_shard)
    origin = Origin(settings, manifest.videos_sha256, manifest.classes, library_versions(LIBRARIES), shards=len(starts))
    numbers = manifest.label_numbers
    return [
        Task(
            number=k,
            first_row=start,
            paths=manifest.paths[start : start + videos_per_shard],
            labels=tuple(int(n) for n in numbers[start : start + videos_per_shard]),
            origin=origin,
            **common,
        )
        for k, start in enumerate(starts)
    ]


def library_versions(names: Sequence[str]) -> dict[str, str]:
    """Versions of what shapes a file's bytes, FFmpeg's libraries and the kind of CPU among it."""
    ffmpeg = {name: ".".join(map(str, av_versions[name])) for name in FFMPEG}
    return {name: version(name) for name in names} | ffmpeg | {"machine": platform.machine()}


def refuse_foreign(out: Path, tasks: list[Task]) -> None:
    """Raise ValueError where the folder holds shards that this run would not make; nothing is deleted."""
    for path in shard_paths(out):
        shard = open_shard(path)
        if shard is None:  # another process, which looked at it too, puts a new one there
            continue
        differences = tasks[0].origin.differences(shard.origin)
        if beside_path(path, "residual").exists() != tasks[0].residuals:
            differences.append(f"--residuals: {not tasks[0].residuals} there, {tasks[0].residuals} here")
        if differences := differences or _other_rows(shard, tasks):
            raise ValueError(
                f"{path} was made by another run ({'; '.join(differences)}). Nothing was deleted: choose another "
                "--out, or run with what it was made with"
            )


def _other_rows(shard: Shard, tasks: list[Task]) -> list[str]:
    """The first row of a shard that the manifest has otherwise. Rows may have been appended to it, and to its end."""
    task = tasks[min(shard.number, len(tasks) - 1)]
    if shard.first_row != task.first_row or shard.rows > len(task.paths):
        text = f"{shard.rows} videos from row {shard.first_row} there, {len(task.paths)} from row {task.first_row} here"
        return [f"{text}, by another --videos-per-shard or with rows that the manifest lacks"]
    names = [*shard.origin.classes, ""]  # label -1 is the last
    stored = {row: (path, names[label]) for row, path, label in zip(shard.row.tolist(), shard.paths, shard.label)}
    names = [*task.origin.classes, ""]
    for row, (path, label) in enumerate(zip(task.paths[: shard.rows], task.labels), start=task.first_row):
        if (there := stored.get(row)) and there != (path, names[label]):
            return [f"row {row}: {there[0]!r}, label {there[1]!r} there, {path!r}, label {names[label]!r} here"]
    other = [f for f in shard.failed if f.path != task.paths[f.row - task.first_row]]
    return [f"row {f.row}: {f.path!r} there, {task.paths[f.row - task.first_row]!r} here" for f in other[:1]]


def lacking(task: Task) -> int:
    """How many videos are to be encoded until a shard is what it should be."""
    shard = open_shard(task.shard)
    if shard is None:
        return len(task.paths)
    return len(task.paths) - len(shard) - (0 if task.retry_failed else len(shard.failed))


def untried(task: Task) -> tuple[str, ...]:
    """Paths of the rows that came after a shard was made, or of all."""
    shard = open_shard(task.shard)
    return task.paths[0 if shard is None else shard.rows :]


def make_shard(task: Task, codec: Codec, progress: Progress | None = None) -> Made | None:
    """Make one shard, telling `progress` of every video; None where another process does.

    What the shard holds already is kept, and it is left as it is where nothing comes to that. Raises as `working` and
    `write_shard`, ValueError where what it holds is damaged, RuntimeError where the videos' folder went away.
    """
    try:
        with working(task.shard, task.made_from, task.spooled, task.scratch, task.retry_failed) as journal:
            if lacking(task):
                return _make(task, codec, journal, progress)
        made = Made(0, 0, 0, 0)  # another process has made it meanwhile
    except Busy as busy:
        say(f"{busy}: it is left to that")
        made = None
    if progress:
        progress.skip(task.lacks)
    return made


def _make(task: Task, codec: Codec, journal: Journal, progress: Progress | None) -> Made:
    before = open_shard(task.shard)
    if before is not None and (problems := checksum_problems(task.shard)):
        raise ValueError(problems[0])
    held = {path: k for k, path in enumerate(before.paths)} if before else {}
    tried = {f.path: f.reason for f in before.failed} if before is not None and not task.retry_failed else {}
    videos: list[Video] = []
    failures: list[Failure] = []
    counts = (0, 0, 0)

    def entry(path: str) -> dict[str, Any]:
        """A video in the spool and what the index needs, or the reason why not."""
        nonlocal counts
        if before and path in held:
            return copy_video(before, held[path], journal.spool)
        if path in tried:
            return {"reason": tried[path]}
        stored = _store(codec, task, journal.spool, path)
        added = (0, 0, 1) if "reason" in stored else (1, len(stored["frame_bytes"]), 0)
        if progress:
            progress.add(*added)
        counts = (counts[0] + added[0], counts[1] + added[1], counts[2] + added[2])
        return stored

    if progress:
        progress.skip(sum(path not in held and path not in tried for path in task.paths[: len(journal.kept)]))
    for row, (path, label) in enumerate(zip(task.paths, task.labels), start=task.first_row):
        found = journal.next(partial(entry, path))
        if "reason" in found:
            failures.append(Failure(row, path, found["reason"]))
        else:
            for key in ("frame_bytes", "iframe_bytes", "iframe_frame"):
                found[key] = np.array(found[key], np.int64)
            found["times"] = np.array(found["times"], np.float64)
            videos.append(Video(row, path, label, **found))
    rows = len(task.paths)
    gained = before is None or len(videos) > len(before) or rows > before.rows
    if gained:
        journal.save()
        write_shard(task.out, task.number, task.origin, task.first_row, rows, videos, failures, journal.spool)
    return Made(int(gained), *counts)


def _store(codec: Codec, task: Task, spool: Spool, path: str) -> dict[str, Any]:
    """One video into the spool; what the index needs, or the reason why not."""
    source = task.videos / path
    try:
        return codec.run("convert", source, spool, task.origin.settings, task.time_limit, reader=task.reader)
    except CodecError as error:
        if task.witnesses and not any(map(os.path.exists, (source, *(task.videos / w for w in task.witnesses)))):
            raise RuntimeError(
                f"{source} is not there, nor is any of {len(task.witnesses)} videos that were when the run began, such "
                f"as {task.witnesses[0]}: see that {task.videos} is mounted, and run the same command again"
            ) from error
        return {"reason": plain(str(error), source, path)}
