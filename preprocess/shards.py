"""Shards, the reading side: one file mapped into memory, a folder of them as one table. numpy and h5py only."""

from __future__ import annotations

import ctypes
import hashlib
import json
import math
import mmap
import os
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import h5py
import numpy as np

from preprocess.manifest import in_order
from preprocess.schema import (
    BESIDE,
    BESIDE_VERSION,
    FORMAT,
    NO_SHARDS,
    OFFSETS,
    OPTIONAL,
    SCHEMA,
    VERSION,
    Failure,
    Origin,
    Settings,
    beside_path,
    checksum_path,
    even_times,
    shard_paths,
)


def _unpack(data: np.ndarray, offset: np.ndarray) -> list[str]:
    raw = data.tobytes()
    return [raw[a:b].decode("utf-8", "surrogateescape") for a, b in zip(offset[:-1].tolist(), offset[1:].tolist())]


class Shard:
    """One finished shard, mapped read-only. Safe in forked and spawned workers: HDF5 is open only in the constructor.

    Columns of the table in `preprocess.schema`, mapped, are `row`, `label`, `fps`, `source_size`, `frame_offset`,
    `decode_errors`, `iframe_frame` and `motion`.

    Raises ValueError naming file and dataset where the file is not a shard of this version, or, when a column is first
    read, where that is damaged so that reading would leave the file; FileNotFoundError where another was put in its
    place by then. A flipped bit inside the data is found by its checksum (`preprocess.check`), not here.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self._columns: dict[str, np.ndarray] = {}
        self._mapped: np.ndarray | None = None
        self._beside: dict[str, np.ndarray] = {}
        with _blaming(self.path, "a shard"), _opened(self.path) as f:
            self._read_attributes(f)
            self._layout = self._read_layout(f)

    def _read_attributes(self, f: h5py.File) -> None:
        values = _attributes(f, FORMAT, VERSION)
        self.settings = Settings.from_json(values["settings"])
        if values["settings_sha256"] != self.settings.sha256():
            raise ValueError("the settings do not match their own hash")
        self.origin = Origin(
            self.settings,
            values["manifest_sha256"],
            tuple(json.loads(values["classes"])),
            json.loads(values["versions"]),
            int(values["shards"]),
        )
        self.number, self.first_row, self.rows = (int(values[k]) for k in ("shard", "first_row", "rows"))

    def _read_layout(self, f: h5py.File) -> dict[str, tuple[str, tuple[int, ...], int]]:
        """Type, shape and byte offset of every dataset, each checked before a byte is mapped."""
        size = self._size = os.fstat(f.id.get_vfd_handle()).st_size
        rows, cols = self.settings.grid
        known: dict[str | int, int] = {"rows": rows, "cols": cols, 2: 2}
        layout = {}
        for name, (dtype, dims) in (SCHEMA | {k: v for k, v in OPTIONAL.items() if k in f}).items():
            shape, offset = _place(f, name, dtype, len(dims), size)
            for dim, length in zip(dims, shape):
                base = known.setdefault(dim, length)
                if isinstance(dim, str) and dim.endswith("+1"):
                    base = known.setdefault(dim[:-2], length - 1) + 1
                if length != base:
                    raise ValueError(f"{name} has shape {shape}; {dim} should be {base}")
            layout[name] = (dtype, shape, offset)
        return layout

    def __getitem__(self, name: str) -> np.ndarray:
        """A column of the schema, mapped."""
        if name not in self._columns:
            if self._mapped is None:
                mapped = _map(self.path)
                if len(mapped) != self._size:
                    raise FileNotFoundError(f"{self.path} was replaced since it was opened: start again what reads it")
                self._mapped = mapped
            column = _column(self._mapped, *self._layout[name])
            self._check_column(name, column)
            self._columns[name] = column
        return self._columns[name]

    def _check_column(self, name: str, column: np.ndarray) -> None:
        """Raise ValueError where what a column points to is not there.

        Not when the shard is opened: thousands are, by every process of a training, and what they would read of each
        is what takes long on a file system far away.
        """
        frames = self._layout["motion"][1][0]
        if name in OFFSETS:
            end = frames if name == "videos/frame_offset" else self._layout[OFFSETS[name]][1][0]
            if len(column) == 0 or column[0] != 0 or column[-1] != end or (np.diff(column) < 0).any():
                raise ValueError(f"{self.path}: {name} does not run from 0 to {end} without stepping back")
        if name == "iframes/frame" and len(column) and not 0 <= column.min() <= column.max() < frames:
            raise ValueError(f"{self.path}: iframes/frame points outside the {frames} frames")

    def __getstate__(self) -> dict[str, Any]:
        # The maps are made anew where the shard is unpickled.
        return self.__dict__ | {"_columns": {}, "_mapped": None, "_beside": {}}

    def release(self) -> None:
        """Let go of the memory that was read through the map; what is read again comes from the file again."""
        if self._mapped is not None:
            _libc.madvise(self._mapped.ctypes.data, self._mapped.size, mmap.MADV_DONTNEED)

    def __len__(self) -> int:
        return len(self["videos/row"])

    row = property(lambda self: self["videos/row"])
    label = property(lambda self: self["videos/label"])
    fps = property(lambda self: self["videos/fps"])
    source_size = property(lambda self: self["videos/source_size"])
    frame_offset = property(lambda self: self["videos/frame_offset"])
    decode_errors = property(lambda self: self["videos/decode_errors"])
    iframe_frame = property(lambda self: self["iframes/frame"])
    motion = property(lambda self: self["motion"])

    @property
    def sha256(self) -> str:
        """The checksum of the file as it was written."""
        return checksum_path(self.path).read_text().split()[0]

    @property
    def flow(self) -> np.ndarray:
        """Optical flow, int16 (F, rows, cols, 2), mapped from the file beside the shard.

        Raises ValueError, saying how to get it, where there is none, or one that belongs to another shard.
        """
        return self._open_beside("flow", f"make it with python -m preprocess flow {self.path.parent} --videos FOLDER")

    @property
    def residual(self) -> np.ndarray:
        """Energy of the residuals, uint16 (F, rows, cols), mapped from the file beside the shard; raises as `flow`."""
        return self._open_beside(
            "residual", "make the shards, in another folder, with python -m preprocess run --residuals"
        )

    def _open_beside(self, name: str, way_out: str) -> np.ndarray:
        if name not in self._beside:
            path = beside_path(self.path, name)
            if not path.exists():
                raise ValueError(f"{path.name} is missing from {path.parent}: {way_out}")
            dtype, dimensions = BESIDE[name]
            with _blaming(path, f"the {name} of a shard"), _opened(path) as f:
                if _attributes(f, f"context-motion-{name}", BESIDE_VERSION)["shard_sha256"] != self.sha256:
                    raise ValueError(f"the {name} of another shard, or of what this one was: delete it, then {way_out}")
                shape, offset = _place(f, name, dtype, dimensions, path.stat().st_size)
                if shape != self.motion.shape[:dimensions]:
                    raise ValueError(f"{name} has shape {shape}, but the shard's motion {self.motion.shape}")
            self._beside[name] = _column(_map(path), dtype, shape, offset)
        return self._beside[name]

    @property
    def paths(self) -> list[str]:
        return _unpack(self["videos/path"], self["videos/path_offset"])

    @property
    def failed(self) -> list[Failure]:
        paths = _unpack(self["failed/path"], self["failed/path_offset"])
        reasons = _unpack(self["failed/reason"], self["failed/reason_offset"])
        return [Failure(*f) for f in zip(self["failed/row"].tolist(), paths, reasons)]

    def times(self, video: int) -> np.ndarray:
        """When each frame of a video is shown, float64 (T,), seconds from the first; nan where no rate was declared."""
        start, end = self.frame_offset[video : video + 2].tolist()
        times = self.variable_times(video)
        return times if len(times) else even_times(end - start, float(self.fps[video]))

    def variable_times(self, video: int) -> np.ndarray:
        """The same where the rate is variable, else nothing."""
        start, end = self.frame_offset[video : video + 2].tolist()
        times = self["frames/time"][start:end] if "frames/time" in self._layout else np.empty(0)
        constant = np.array_equal(times, even_times(end - start, float(self.fps[video])), equal_nan=True)
        return np.empty(0) if constant else times

    def frame_jpeg(self, frame: int) -> np.ndarray:
        """JPEG of one frame, uint8 view; `frame` counts over the shard (frame_offset[v] + t)."""
        offset = self["frames/jpeg_offset"]
        return self["frames/jpeg"][offset[frame] : offset[frame + 1]]

    def iframe_jpeg(self, iframe: int) -> np.ndarray:
        """JPEG of one I-frame, uint8 view; `iframe` counts over the shard, as `iframe_frame` does."""
        offset = self["iframes/jpeg_offset"]
        return self["iframes/jpeg"][offset[iframe] : offset[iframe + 1]]

    def expect(self, kind: Literal["frames", "iframes"], numbers: np.ndarray) -> None:
        """Have the JPEGs fetched that `frame_jpeg` or `iframe_jpeg` are about to be asked for."""
        offset = self[f"{kind}/jpeg_offset"]
        expect(self[f"{kind}/jpeg"], offset[numbers], offset[numbers + 1])


def open_shard(path: Path) -> Shard | None:
    """The shard at a path; None where there is none, as while another process puts a new one there. Raises as Shard."""
    try:
        shard = Shard(path)
        shard["videos/row"]  # maps the file, which then stays what it is
        return shard
    except (FileNotFoundError, ValueError) as error:
        if isinstance(error, FileNotFoundError) or isinstance(error.__cause__, FileNotFoundError):
            return None
        raise


@contextmanager
def _blaming(path: Path, what: str) -> Iterator[None]:
    """Name the file in errors of reading it, whatever HDF5 makes of damaged metadata: all become ValueError."""
    try:
        yield
    except OSError as error:
        raise ValueError(f"{path} cannot be read as {what}: {error}") from error
    except KeyError as error:
        raise ValueError(f"{path}: attribute {error} is missing") from error
    except (AttributeError, OverflowError, RuntimeError, TypeError, ValueError) as error:
        raise ValueError(f"{path}: {error}") from error


def _attributes(f: h5py.File, expected: str, version: int) -> dict[str, Any]:
    """The attributes of a file of this format and version."""
    values = {k: v.decode() if isinstance(v, bytes) else v for k, v in f.attrs.items()}
    if values.get("format") != expected:
        raise ValueError(f"an HDF5 file but not a {expected} (attribute format: {values.get('format')!r})")
    if values.get("version") != version:
        raise ValueError(
            f"format version {values.get('version')}, this program reads {version}: "
            "run stage 1 again, or use the program version that wrote it"
        )
    return values


def _opened(path: Path) -> h5py.File:
    return h5py.File(path, "r", locking=False)  # what is there is complete; some file systems have no locks


def _place(f: h5py.File, name: str, dtype: str, dimensions: int, size: int) -> tuple[tuple[int, ...], int]:
    """Shape and byte offset of a plain dataset that lies in the file's `size` bytes.

    By HDF5's own calls: what h5py puts around them takes most of the time that opening a shard takes.
    """
    for end in [i for i, letter in enumerate(name) if letter == "/"] + [len(name)]:
        if not _is_plain(f, name[:end]):
            raise ValueError(f"{name[:end]} is missing or a link; shards hold plain datasets only")
    try:
        data = h5py.h5o.open(f.id, name.encode())
    except (KeyError, OSError, RuntimeError) as error:
        raise ValueError(f"{name} cannot be opened: {error.args[0]}") from error
    if not isinstance(data, h5py.h5d.DatasetID) or data.dtype != np.dtype(dtype) or data.rank != dimensions:
        raise ValueError(f"{name} is not a dataset of type {dtype} with {dimensions} dimensions")
    shape, stored = data.shape, data.get_create_plist()
    if stored.get_layout() != h5py.h5d.CONTIGUOUS or stored.get_external_count():
        raise ValueError(f"{name} is not stored contiguously inside the file")
    count = math.prod(shape)
    offset = data.get_offset() if count else 0
    if offset is None or offset + count * np.dtype(dtype).itemsize > size:
        raise ValueError(f"{name} lies outside the file's {size} bytes: the file is truncated")
    return shape, offset


def _is_plain(f: h5py.File, name: str) -> bool:
    try:
        return f.id.links.get_info(name.encode()).type == h5py.h5l.TYPE_HARD
    except (KeyError, RuntimeError):
        return False


_libc = ctypes.CDLL(None, use_errno=True)
_libc.mmap.restype = ctypes.c_void_p
_libc.mmap.argtypes = (ctypes.c_void_p, ctypes.c_size_t, *(ctypes.c_int,) * 3, ctypes.c_long)
_libc.munmap.argtypes = (ctypes.c_void_p, ctypes.c_size_t)
_libc.madvise.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
_FAILED = ctypes.c_void_p(-1).value


def _map(path: Path) -> np.ndarray:
    """The bytes of a file, mapped read-only, uint8. Raises OSError.

    The system's own call: Python's keeps a descriptor beside every map, and a process may have 1024 of them.
    """
    with open(path, "rb") as f:
        size = os.fstat(f.fileno()).st_size
        address = _libc.mmap(None, size, mmap.PROT_READ, mmap.MAP_SHARED, f.fileno(), 0)
    if address == _FAILED:
        raise OSError(ctypes.get_errno(), f"{os.strerror(ctypes.get_errno())}, to map {size} bytes", str(path))
    memory = (ctypes.c_ubyte * size).from_address(address)
    # The arrays over it keep it; at exit, when some may still be in use, the system unmaps by itself.
    weakref.finalize(memory, _libc.munmap, address, size).atexit = False
    mapped = np.frombuffer(memoryview(memory), np.uint8)
    mapped.flags.writeable = False
    return mapped


def _column(mapped: np.ndarray, dtype: str, shape: tuple[int, ...], offset: int) -> np.ndarray:
    """A view of a dataset; of one without bytes an array of its own, since it lies nowhere."""
    size = math.prod(shape) * np.dtype(dtype).itemsize
    flat = mapped[offset : offset + size].view(dtype) if size else np.empty(0, dtype)
    return flat.reshape(shape)


def expect(column: np.ndarray, first: np.ndarray, end: np.ndarray) -> None:
    """Tell the system that rows first[i] to end[i] of a mapped column are about to be read: it fetches them all at
    once, and nobody waits. Unannounced, every page that is not in memory is waited for when its turn comes."""
    row = column.strides[0]
    begin = column.ctypes.data + first * row
    page = begin - begin % mmap.PAGESIZE  # where a range has to begin
    for address, size in zip(page.tolist(), (begin - page + (end - first) * row).tolist()):
        _libc.madvise(address, size, mmap.MADV_WILLNEED)


class ShardSet:
    """Every shard of a folder as one table of videos: numpy arrays, picklable, nothing held open.

    `classes` are those of all shards, and `label` numbers them. Raises ValueError where shards are missing, or were
    made with different settings or versions, or from manifests of which one does not go on where another ended.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        names = shard_paths(self.folder)
        if not names:
            raise ValueError(NO_SHARDS.format(self.folder))
        self.shards = [Shard(p) for p in names]
        self.origin = self.shards[0].origin
        for shard in self.shards:
            if shard.origin == self.origin:
                shard.origin = self.origin  # one object: the names of its classes are not there a thousand times
            elif differences := self.origin.differences(shard.origin):
                raise ValueError(f"{shard.path} does not belong with {names[0].name}: {'; '.join(differences)}")
        count = max(s.origin.shards for s in self.shards)
        missing = sorted(set(range(count)) - {s.number for s in self.shards})
        if missing:
            raise ValueError(
                f"{self.folder} lacks {len(missing)} of {count} shards ({missing[:10]}...): "
                "run the same python -m preprocess run command again to finish them"
            )
        if len({s.origin.manifest_sha256 for s in self.shards}) > 1:
            self._check_manifests()
        self._classes = list(in_order({name for s in self.shards for name in s.origin.classes}))
        self.settings = self.origin.settings
        counts = [len(s) for s in self.shards]
        self._first = np.concatenate([[0], np.cumsum(counts)]).astype(np.int64)
        self.label = np.concatenate([self._numbers(s) for s in self.shards]).astype(np.int32)
        self.frames = np.concatenate([np.diff(s.frame_offset) for s in self.shards]).astype(np.int64)

    def __len__(self) -> int:
        return int(self._first[-1])

    def _check_manifests(self) -> None:
        """Rows that were appended to a manifest make shards that follow; anything else is another data set."""
        ends = np.cumsum([s.rows for s in self.shards])
        paths = [*self.paths, *(f.path for f in self.failed)]
        if [s.first_row + s.rows for s in self.shards] != ends.tolist() or len({*paths}) < len(paths):
            raise ValueError(
                f"the shards of {self.folder} were made from manifests that do not follow each other: rows or videos "
                "are there twice, or missing. Where rows were appended, run every --part to its end; else make them "
                "anew, in another folder, from one manifest"
            )

    def _numbers(self, shard: Shard) -> np.ndarray:
        """Labels of a shard's videos as numbers in the classes of the set."""
        if list(shard.origin.classes) == self._classes:
            return shard.label
        number = {name: i for i, name in enumerate(self._classes)}
        return np.array([*(number[name] for name in shard.origin.classes), -1])[shard.label]

    @property
    def classes(self) -> list[str]:
        return list(self._classes)

    @property
    def paths(self) -> list[str]:
        """Path of every video, built on request: a list of strings kept here would be copied into every worker."""
        return [p for s in self.shards for p in s.paths]

    @property
    def failed(self) -> list[Failure]:
        return [f for s in self.shards for f in s.failed]

    def locate(self, video: int) -> tuple[Shard, int]:
        """The shard that holds a video, and the video's index in it."""
        number = int(np.searchsorted(self._first, video, side="right")) - 1
        return self.shards[number], int(video - self._first[number])

    def sha256(self) -> str:
        """Hash over the checksums of all shards: names the set in results."""
        lines = [checksum_path(s.path).read_text() for s in self.shards]
        return hashlib.sha256("".join(lines).encode()).hexdigest()
