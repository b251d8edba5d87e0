"""Shards, the writing side: videos of one manifest run, spooled file by file, become one verified HDF5 file."""

from __future__ import annotations

import errno
import fcntl
import hashlib
import json
import math
import os
import re
import shutil
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any, BinaryIO

import h5py
import numpy as np

from preprocess.check import content_problems
from preprocess.command import say
from preprocess.schema import (
    BESIDE,
    BESIDE_VERSION,
    COPY_BYTES,
    FORMAT,
    JOURNAL,
    OPTIONAL,
    SCHEMA,
    VERSION,
    Failure,
    Origin,
    beside_path,
    checksum_path,
    even_times,
    file_sha256,
    shard_name,
    work_path,
)
from preprocess.shards import Shard

HEADER_BYTES = 1 << 16  # more than HDF5 needs for the names and places of the datasets
SAVE_SECONDS = 5.0  # what a kill may cost; a disk that is made to take every short video at once slows everything
NO_LOCKS = (errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOLCK)
SPOOLED = {"frames/jpeg": "frames", "iframes/jpeg": "iframes", "motion": "motion"} | {name: name for name in BESIDE}

Datasets = dict[str, tuple[str, tuple[int, ...]]]
"""Type and shape by name, in the order of the file."""


@dataclass(frozen=True)
class Video:
    """One stored video, as the writer takes it; its bytes are already at the end of the spool."""

    row: int
    path: str
    label: int
    fps: float
    source_size: tuple[int, int]
    frame_bytes: np.ndarray
    """Length of each frame's JPEG, int64 (T,)."""
    iframe_bytes: np.ndarray
    """Length of each I-frame's JPEG, int64 (K,)."""
    iframe_frame: np.ndarray
    """Frame number of each I-frame within the video, int64 (K,)."""
    decode_errors: int = 0
    times: np.ndarray = field(default_factory=lambda: np.empty(0))
    """When each frame is shown, seconds from the first, float64 (T,); nothing where the rate is constant."""


@dataclass(frozen=True)
class Spool:
    """Bytes of the videos of one unfinished shard, appended file by file, so that memory does not grow with length."""

    folder: Path
    names: tuple[str, ...] = field(default=("frames", "iframes", "motion"), repr=False)

    def path(self, name: str) -> Path:
        return self.folder / name

    def sizes(self) -> tuple[int, ...]:
        """Current length of each file, to come back to with `truncate` when a video fails half way."""
        return tuple(self.path(n).stat().st_size if self.path(n).exists() else 0 for n in self.names)

    def truncate(self, sizes: tuple[int, ...]) -> None:
        for name, size in zip(self.names, sizes, strict=True):
            with open(self.path(name), "ab") as f:
                f.truncate(size)


class Busy(RuntimeError):
    """Another process makes the same target."""


class Journal:
    """What is finished of a target in the making, a line each, so that one that was killed goes on after its last.

    What an earlier attempt finished is kept where it was made from the same, which the text `made_from` says, and the
    spool is cut to it; else both begin empty. With `retry_failed` that ends before the first failure.
    """

    def __init__(self, spool: Spool, made_from: str, retry_failed: bool = False) -> None:
        self.spool, self.path = spool, spool.path(JOURNAL)
        self.kept: deque[dict[str, Any]] = deque()
        self._lines: list[bytes] = []
        self._saved = time.monotonic()
        head = hashlib.sha256(made_from.encode()).hexdigest().encode() + b"\n"
        text = self.path.read_bytes() if self.path.exists() else b""
        first, *lines = text.splitlines(keepends=True) or [b""]
        length, sizes, there = len(head), [0] * len(spool.names), spool.sizes()
        for line in lines if first == head else []:
            if not line.endswith(b"\n"):  # the kill came while it was written
                break
            try:
                after, entry = json.loads(line)
            except ValueError:  # the power went before the disk had taken it
                break
            if any(size > has for size, has in zip(after, there)):  # someone cut the spool
                break
            if retry_failed and "reason" in entry:
                break
            self.kept.append(entry)
            length, sizes = length + len(line), after
        spool.truncate(tuple(sizes))
        with open(self.path, "ab") as file:
            file.truncate(length if first == head else 0)
            file.write(b"" if first == head else head)

    def next(self, make: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """The next entry: an earlier attempt's, or what `make` returns once its bytes are in the spool."""
        if self.kept:
            return self.kept.popleft()
        entry = make()
        self._lines.append(json.dumps([self.spool.sizes(), entry]).encode() + b"\n")
        if time.monotonic() - self._saved >= SAVE_SECONDS:
            self.save()
        return entry

    def save(self) -> None:
        """Have the disk take the spool, then the lines that tell of it."""
        for name in self.spool.names:
            with open(self.spool.path(name), "rb") as file:
                os.fsync(file.fileno())
        with open(self.path, "ab") as file:
            file.write(b"".join(self._lines))
            file.flush()
            os.fsync(file.fileno())
        self._lines, self._saved = [], time.monotonic()


@contextmanager
def working(
    target: Path,
    made_from: str,
    names: tuple[str, ...] = Spool.names,
    scratch: Path | None = None,
    retry_failed: bool = False,
) -> Iterator[Journal]:
    """The making of `target`, by one process at a time: its journal and spool, which go once it is made.

    They lie in a hidden folder beside the target, or in `scratch`, a folder on a disk that takes more. Raises Busy
    where another process makes the same target, and OSError, saying what to do, where the disk does not take it.
    """
    place = beside = work_path(target)
    if scratch:  # which may serve several sets at once
        place = scratch / f".{target.name}.{hashlib.sha256(str(target.absolute()).encode()).hexdigest()[:16]}.work"
    try:
        with _alone(beside):
            place.mkdir(parents=True, exist_ok=True)
            yield Journal(Spool(place, names), made_from, retry_failed)
            if scratch:
                shutil.rmtree(place)
    except OSError as error:
        # HDF5 hides the system's reason in the middle of its own.
        number = error.errno or next(iter(map(int, re.findall(r"errno = (\d+)", str(error)))), 0)
        room = f"{target.parent} and {scratch}" if scratch else target.parent
        reason = f"{os.strerror(number)}{f' ({error.filename})' if error.filename else ''}" if number else error
        raise OSError(
            f"{target} cannot be made: {reason}. Make room in {room}, or "
            "mend what this names, and run the same command again: finished shards are kept"
        ) from error


@contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """A folder that no other process works in, made for it; it goes in the end, unless an error is raised."""
    busy = Busy(f"{folder} is worked on by another process")
    folder.mkdir(exist_ok=True)
    try:
        lock = open(folder / "lock", "w")
    except FileNotFoundError:  # the other has just finished, and removed the folder
        raise busy from None
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            held = os.path.samestat(os.fstat(lock.fileno()), os.stat(lock.name))
        except (BlockingIOError, FileNotFoundError):  # it is at work, or has just finished
            held = False
        except OSError as error:
            if error.errno not in NO_LOCKS:
                raise
            held = _without_locks(folder.parent)
        if not held:
            raise busy
        yield
        for file in sorted(folder.iterdir(), key=lambda file: file.name == "lock"):  # after which another may come
            file.unlink()
    # Closed first: of a file that is open, NFS keeps another name in the folder, which then cannot be removed.
    with suppress(OSError):  # another process has come
        folder.rmdir()


@cache
def _without_locks(folder: Path) -> bool:
    say(
        f"warning: the file system of {folder} has no locks. This goes on, but could not notice another process that "
        "makes the same shard: start no two commands that do"
    )
    return True


def copy_video(shard: Shard, index: int, spool: Spool) -> dict[str, Any]:
    """Append the bytes of a finished shard's video to a spool; returns what `child.convert` returned for it."""
    first, end = shard.frame_offset[index : index + 2].tolist()
    low, high = shard.iframe_frame.searchsorted([first, end]).tolist()
    of_frames = shard["frames/jpeg_offset"][first : end + 1]
    of_iframes = shard["iframes/jpeg_offset"][low : high + 1]
    pieces = [
        shard["frames/jpeg"][of_frames[0] : of_frames[-1]],
        shard["iframes/jpeg"][of_iframes[0] : of_iframes[-1]],
        shard.motion[first:end],
        *([shard.residual[first:end]] if "residual" in spool.names else []),
    ]
    for name, piece in zip(spool.names, pieces, strict=True):
        with open(spool.path(name), "ab") as file:
            file.write(piece.data)
    shard.release()
    return {
        "fps": float(shard.fps[index]),
        "source_size": shard.source_size[index].tolist(),
        "decode_errors": int(shard.decode_errors[index]),
        "times": shard.variable_times(index).tolist(),
        "frame_bytes": np.diff(of_frames).tolist(),
        "iframe_bytes": np.diff(of_iframes).tolist(),
        "iframe_frame": (shard.iframe_frame[low:high] - first).tolist(),
    }


def write_shard(
    folder: Path,
    number: int,
    origin: Origin,
    first_row: int,
    rows: int,
    videos: list[Video],
    failures: list[Failure],
    spool: Spool,
) -> Path:
    """Assemble, flush, verify and rename one shard; what exists under the final name is complete.

    Where residuals were spooled, they get their file beside it first. Raises OSError (disk full and the like) and
    leaves no partial shard behind.
    """
    path = folder / shard_name(number)
    attributes: dict[str, str | int] = {
        "format": FORMAT,
        "version": VERSION,
        "settings": origin.settings.to_json(),
        "settings_sha256": origin.settings.sha256(),
        "manifest_sha256": origin.manifest_sha256,
        "classes": json.dumps(origin.classes),
        "versions": json.dumps(origin.versions, sort_keys=True),
        "shard": number,
        "shards": origin.shards,
        "first_row": first_row,
        "rows": rows,
    }
    columns = _columns(videos, failures)
    shapes = {name: column.shape for name, column in columns.items()} | {
        "frames/jpeg": (int(columns["frames/jpeg_offset"][-1]),),
        "iframes/jpeg": (int(columns["iframes/jpeg_offset"][-1]),),
        "motion": (int(columns["videos/frame_offset"][-1]), *origin.settings.grid, 2),
    }
    datasets = {name: (dtype, shapes[name]) for name, (dtype, _) in (SCHEMA | OPTIONAL).items() if name in shapes}
    with _publishing(path) as partial:
        _assemble(partial, attributes, datasets, columns, spool)
        written = Shard(partial)
        if problems := content_problems(written):
            spool.path(JOURNAL).unlink(missing_ok=True)  # what it tells of is not to be gone on with
            raise OSError(f"{partial} was written but does not read back: {problems[0]}")
        if "residual" in spool.names:
            write_beside(path, "residual", written, file_sha256(partial), origin.versions, spool)
    return path


def write_beside(
    path: Path, name: str, shard: Shard, shard_sha256: str, versions: dict[str, str], spool: Spool
) -> Path:
    """Assemble, flush and rename one of `BESIDE` of a shard, which is or will be at `path`. Raises as `write_shard`."""
    attributes: dict[str, str | int] = {
        "format": f"context-motion-{name}",
        "version": BESIDE_VERSION,
        "shard_sha256": shard_sha256,
        "settings_sha256": shard.settings.sha256(),
        "versions": json.dumps(versions, sort_keys=True),
    }
    dtype, dimensions = BESIDE[name]
    with _publishing(beside_path(path, name)) as partial:
        _assemble(partial, attributes, {name: (dtype, shard.motion.shape[:dimensions])}, {}, spool)
        if shard.path != path:  # the shard before leaves first: what comes does not belong to it
            path.unlink(missing_ok=True)
    return beside_path(path, name)


def _assemble(
    partial: Path, attributes: dict[str, str | int], datasets: Datasets, columns: dict[str, np.ndarray], spool: Spool
) -> None:
    """Write a file of these datasets, those of SPOOLED from the spool, and have the disk take it."""
    offsets = _lay_out(partial, attributes, datasets)
    with open(partial, "rb+") as f:
        for name, offset in offsets.items():
            dtype, shape = datasets[name]
            f.seek(offset)
            if name in SPOOLED:
                _copy(spool.path(SPOOLED[name]), f, _bytes(dtype, shape))
            else:
                f.write(columns[name].astype(dtype).tobytes())
        f.flush()
        os.fsync(f.fileno())


@contextmanager
def _publishing(path: Path) -> Iterator[Path]:
    """A path beside `path` to write to; once that is done, the file gets its final name and its checksum."""
    partial = path.with_name(f".{path.name}.partial")
    sidecar = checksum_path(partial)
    try:
        yield partial
        with open(sidecar, "w") as note:
            note.write(f"{file_sha256(partial)}  {path.name}\n")
            note.flush()
            os.fsync(note.fileno())
        # The checksum goes first, so that a shard under its final name always has its own; a shard made anew leaves
        # before its checksum does.
        path.unlink(missing_ok=True)
        os.replace(sidecar, checksum_path(path))
        os.replace(partial, path)
    finally:
        for file in partial, sidecar:
            file.unlink(missing_ok=True)
    directory = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(directory)
    finally:
        os.close(directory)


def _columns(videos: list[Video], failures: list[Failure]) -> dict[str, np.ndarray]:
    frames = [len(v.frame_bytes) for v in videos]
    starts = np.concatenate([[0], np.cumsum(frames)]).astype(np.int64)
    path, path_offset = _pack(v.path for v in videos)
    failed_path, failed_path_offset = _pack(f.path for f in failures)
    reason, reason_offset = _pack(f.reason for f in failures)
    iframe = [v.iframe_frame + start for v, start in zip(videos, starts)]
    times = [v.times if len(v.times) else even_times(len(v.frame_bytes), v.fps) for v in videos]
    varies = any(len(v.times) for v in videos)
    return ({"frames/time": np.concatenate(times)} if varies else {}) | {
        "videos/row": np.array([v.row for v in videos], np.int64),
        "videos/path": path,
        "videos/path_offset": path_offset,
        "videos/label": np.array([v.label for v in videos], np.int32),
        "videos/fps": np.array([v.fps for v in videos], np.float64),
        "videos/source_size": np.array([v.source_size for v in videos], np.int32).reshape(-1, 2),
        "videos/frame_offset": starts,
        "videos/decode_errors": np.array([v.decode_errors for v in videos], np.int32),
        "frames/jpeg_offset": _offsets(v.frame_bytes for v in videos),
        "iframes/jpeg_offset": _offsets(v.iframe_bytes for v in videos),
        "iframes/frame": np.concatenate([*iframe, np.empty(0)]).astype(np.int64),
        "failed/row": np.array([f.row for f in failures], np.int64),
        "failed/path": failed_path,
        "failed/path_offset": failed_path_offset,
        "failed/reason": reason,
        "failed/reason_offset": reason_offset,
    }


def _offsets(lengths: Iterable[np.ndarray]) -> np.ndarray:
    return np.concatenate([[0], np.cumsum(np.concatenate([*lengths, np.empty(0)]))]).astype(np.int64)


def _pack(texts: Iterable[str]) -> tuple[np.ndarray, np.ndarray]:
    encoded = [t.encode("utf-8", "surrogateescape") for t in texts]
    return np.frombuffer(b"".join(encoded), np.uint8), _offsets([np.array([len(t) for t in encoded], np.int64)])


def _bytes(dtype: str, shape: tuple[int, ...]) -> int:
    return math.prod(shape) * np.dtype(dtype).itemsize


def _lay_out(partial: Path, attributes: dict[str, str | int], datasets: Datasets) -> dict[str, int]:
    """Write everything but the datasets' contents; returns where each that has any begins, in bytes.

    HDF5 takes the whole process down when a disk fills while it closes a file. So it writes a few kilobytes only, for
    which room was found just before; the contents follow by ordinary means.
    """
    size = sum(_bytes(dtype, shape) for dtype, shape in datasets.values())
    header = HEADER_BYTES + sum(len(str(v)) for v in attributes.values())
    try:
        with open(partial, "wb") as probe:
            probe.write(bytes(header))
            probe.truncate(size + header)
            probe.flush()
            os.fsync(probe.fileno())
    finally:
        partial.unlink(missing_ok=True)
    contents = h5py.h5p.create(h5py.h5p.DATASET_CREATE)
    contents.set_alloc_time(h5py.h5d.ALLOC_TIME_EARLY)
    contents.set_fill_time(h5py.h5d.FILL_TIME_NEVER)
    way = {"libver": ("v108", "v108"), "alignment_threshold": 1, "alignment_interval": 64, "locking": False}
    with h5py.File(partial, "w", **way) as f:
        for name, value in attributes.items():
            # Fixed-length bytes: variable-length strings would put the value in a heap of its own.
            f.attrs[name] = np.int64(value) if isinstance(value, int) else np.bytes_(value.encode())
        for name, (dtype, shape) in datasets.items():
            f.create_dataset(name, shape, dtype, track_times=False, dcpl=contents)
        return {name: f[name].id.get_offset() for name, (_, shape) in datasets.items() if math.prod(shape)}


def _copy(source: Path, target: BinaryIO, size: int) -> None:
    """Stream a spool file, which must be of this size, to where the target stands."""
    if source.stat().st_size != size:
        raise OSError(f"{source} has {source.stat().st_size} bytes where its index counts {size}")
    with open(source, "rb") as f:
        shutil.copyfileobj(f, target, COPY_BYTES)
