"""Shards, the writing side: videos of one manifest run, spooled file by file, become one verified HDF5 file."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

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
    columns = _columns(videos, failures)
    frames = int(columns["videos/frame_offset"][-1])
    spooled = {"frames/jpeg": "frames", "iframes/jpeg": "iframes", "motion": "motion"}
    shapes = {
        "frames/jpeg": (int(columns["frames/jpeg_offset"][-1]),),
        "iframes/jpeg": (int(columns["iframes/jpeg_offset"][-1]),),
        "motion": (frames, *origin.settings.grid, 2),
    }
    with h5py.File(partial, "w", libver=("v108", "v108"), alignment_threshold=1, alignment_interval=64) as f:
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
        for name, value in attributes.items():
            # Fixed-length bytes: variable-length strings would put the value in a heap of its own.
            f.attrs[name] = np.int64(value) if isinstance(value, int) else np.bytes_(value.encode())
        for name, (dtype, _) in SCHEMA.items():
            shape = shapes[name] if name in spooled else columns[name].shape
            dataset = f.create_dataset(name, shape, dtype, track_times=False)
            if name in spooled:
                _copy(spool.path(spooled[name]), dataset)
            elif len(columns[name]):
                dataset[...] = columns[name]
    with open(partial, "rb+") as f:
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


def _copy(source: Path, dataset: h5py.Dataset) -> None:
    """Stream a spool file into a contiguous dataset of the same size, a piece at a time."""
    size = dataset.size * dataset.dtype.itemsize
    if not size:
        return
    if source.stat().st_size != size:
        raise OSError(f"{source} has {source.stat().st_size} bytes where its index counts {size}")
    rows = max(1, COPY_BYTES // (size // len(dataset)))
    with open(source, "rb") as f:
        for start in range(0, len(dataset), rows):
            part = (min(rows, len(dataset) - start), *dataset.shape[1:])
            dataset[start : start + rows] = np.fromfile(f, dataset.dtype, int(np.prod(part))).reshape(part)
