"""Shards, the writing side: videos of one manifest run, spooled file by file, become one verified HDF5 file."""

from __future__ import annotations

import json
import math
import os
import shutil
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO

import h5py
import numpy as np

from preprocess.shards import (
    COPY_BYTES,
    FORMAT,
    SCHEMA,
    VERSION,
    Failure,
    Origin,
    Shard,
    file_sha256,
    shard_name,
    verify,
)

HEADER_BYTES = 1 << 16  # more than HDF5 needs for the names and places of the datasets


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


@dataclass(frozen=True)
class Spool:
    """Bytes of the videos of one unfinished shard, appended file by file, so that memory does not grow with length."""

    folder: Path
    names: tuple[str, ...] = field(default=("frames", "iframes", "motion", "flow"), repr=False)

    def path(self, name: str) -> Path:
        return self.folder / name

    def sizes(self) -> tuple[int, ...]:
        """Current length of each file, to come back to with `truncate` when a video fails half way."""
        return tuple(self.path(n).stat().st_size if self.path(n).exists() else 0 for n in self.names)

    def truncate(self, sizes: tuple[int, ...]) -> None:
        for name, size in zip(self.names, sizes, strict=True):
            with open(self.path(name), "ab") as f:
                f.truncate(size)


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

    Raises OSError (disk full and the like) and leaves no partial shard behind.
    """
    path, partial = folder / shard_name(number), spool.folder / shard_name(number)
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
    spooled = {"frames/jpeg": "frames", "iframes/jpeg": "iframes", "motion": "motion", "flow": "flow"}
    shapes = {name: column.shape for name, column in columns.items()} | {
        "frames/jpeg": (int(columns["frames/jpeg_offset"][-1]),),
        "iframes/jpeg": (int(columns["iframes/jpeg_offset"][-1]),),
    }
    maps = ("motion", "flow") if origin.settings.flow else ("motion",)
    shapes |= {name: (int(columns["videos/frame_offset"][-1]), *origin.settings.grid, 2) for name in maps}
    offsets = _lay_out(partial, attributes, shapes)
    with open(partial, "rb+") as f:
        for name, offset in offsets.items():
            f.seek(offset)
            if name in spooled:
                _copy(spool.path(spooled[name]), f, math.prod(shapes[name]) * np.dtype(SCHEMA[name][0]).itemsize)
            else:
                f.write(columns[name].astype(SCHEMA[name][0]).tobytes())
        f.flush()
        os.fsync(f.fileno())
    problems = verify(Shard(partial))
    if problems:
        raise OSError(f"{partial} was written but does not read back: {problems[0]}")
    sidecar = spool.folder / (path.name + ".sha256")
    with open(sidecar, "w") as note:
        note.write(f"{file_sha256(partial)}  {path.name}\n")
        note.flush()
        os.fsync(note.fileno())
    # The checksum goes first, so that a shard under its final name always has its own; a shard made anew leaves
    # before its checksum does.
    path.unlink(missing_ok=True)
    os.replace(sidecar, folder / sidecar.name)
    os.replace(partial, path)
    directory = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(directory)
    finally:
        os.close(directory)
    return path


def _columns(videos: list[Video], failures: list[Failure]) -> dict[str, np.ndarray]:
    frames = [len(v.frame_bytes) for v in videos]
    starts = np.concatenate([[0], np.cumsum(frames)]).astype(np.int64)
    path, path_offset = _pack(v.path for v in videos)
    failed_path, failed_path_offset = _pack(f.path for f in failures)
    reason, reason_offset = _pack(f.reason for f in failures)
    iframe = [v.iframe_frame + start for v, start in zip(videos, starts)]
    return {
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


def _lay_out(partial: Path, attributes: dict[str, str | int], shapes: dict[str, tuple[int, ...]]) -> dict[str, int]:
    """Write everything but the datasets' contents; returns where each that has any begins, in bytes.

    HDF5 takes the whole process down when a disk fills while it closes a file. So it writes a few kilobytes only, for
    which room was found just before; the contents follow by ordinary means.
    """
    size = sum(math.prod(shape) * np.dtype(SCHEMA[name][0]).itemsize for name, shape in shapes.items())
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
    with h5py.File(partial, "w", libver=("v108", "v108"), alignment_threshold=1, alignment_interval=64) as f:
        for name, value in attributes.items():
            # Fixed-length bytes: variable-length strings would put the value in a heap of its own.
            f.attrs[name] = np.int64(value) if isinstance(value, int) else np.bytes_(value.encode())
        names = [n for n in SCHEMA if n in shapes]
        for name in names:
            f.create_dataset(name, shapes[name], SCHEMA[name][0], track_times=False, dcpl=contents)
        return {name: f[name].id.get_offset() for name in names if math.prod(shapes[name])}


def _copy(source: Path, target: BinaryIO, size: int) -> None:
    """Stream a spool file, which must be of this size, to where the target stands."""
    if source.stat().st_size != size:
        raise OSError(f"{source} has {source.stat().st_size} bytes where its index counts {size}")
    with open(source, "rb") as f:
        shutil.copyfileobj(f, target, COPY_BYTES)
