"""A set of shards from one place to another: folders, object storage, the Hugging Face Hub, web servers.

    python -m preprocess copy s3://bucket/ucf101 /local/ucf101

Nothing lists the source, so that any web server will do: shards are called shard-00000.h5 and on, up to the first whose
checksum is not there. In the target a file gets its checksum once it is whole.
"""

from __future__ import annotations

import fcntl
import os
import re
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import fsspec
import joblib
from fsspec.implementations.local import LocalFileSystem
from tqdm import tqdm

from preprocess.command import say
from preprocess.files import replacing
from preprocess.schema import BESIDE, beside_path, checksum_path, file_sha256, shard_name
from preprocess.shards import Shard, ShardSet

BATCH = 16  # shards that are looked for at once
WEB = ("http://", "https://")
PATIENCE = 60  # seconds without a byte from a web server


@dataclass(frozen=True)
class Place:
    """A folder of some file system of fsspec."""

    address: str
    fs: fsspec.AbstractFileSystem
    root: str

    @classmethod
    def at(cls, address: str) -> Place:
        options = {}
        try:
            if address.startswith(WEB):
                from aiohttp import ClientTimeout

                # Its own limit is five minutes a file, whatever comes.
                limit = ClientTimeout(total=None, sock_connect=PATIENCE, sock_read=PATIENCE)
                options = {"client_kwargs": {"timeout": limit}}
            fs, root = fsspec.url_to_fs(address, **options)
        except ImportError as error:
            raise ValueError(f"{address} needs a package: {error}; for http, pip install '.[remote]'") from error
        return cls(address.rstrip("/"), fs, root.rstrip("/"))

    @property
    def local(self) -> bool:
        return isinstance(self.fs, LocalFileSystem)

    def path(self, name: str) -> str:
        return f"{self.root}/{name}"

    def read(self, name: str) -> bytes | None:
        """A small file; None where it is not there."""
        with _explaining(f"{self.address}/{name} cannot be read"):
            try:
                return self.fs.cat_file(self.path(name))
            except Exception as error:
                # Buckets that may not be listed forbid what they do not hold.
                if not isinstance(error, (FileNotFoundError, PermissionError)) and getattr(error, "status", 0) != 403:
                    raise
        return None

    def write(self, name: str, content: bytes) -> None:
        """A small file, whole or not at all."""
        if self.local:
            with replacing(Path(self.path(name))) as partial:
                partial.write_bytes(content)
        else:
            self.fs.pipe_file(self.path(name), content)

    def checksum(self, name: str) -> bytes | None:
        """What lies beside a file of the set; None where either is not there."""
        content = self.read(checksum_path(Path(name)).name)
        if content is not None and not re.fullmatch(rb"[0-9a-f]{64}  %b\n" % re.escape(name.encode()), content):
            raise ValueError(f"{self.address}/{checksum_path(Path(name)).name} holds no checksum of {name}")
        return content


class Told(fsspec.Callback):
    """Adds what is transferred of one file to a bar of all."""

    def __init__(self, bar: tqdm) -> None:
        super().__init__()
        self.bar, self.told = bar, 0

    def call(self, *_: Any, **__: Any) -> None:
        self.bar.update(self.value - self.told)
        self.told = self.value


def copy(source_address: str, target_address: str, workers: int = 8) -> tuple[int, int]:
    """Make the target hold the set of the source: (files copied, files that were there).

    Files are shards and what lies beside them (flow, residuals), each checked against its SHA-256 before it gets its
    name. Of several processes that copy into one folder one does, and the others wait. Raises ValueError where the
    source holds no whole set, where bytes are not those of their checksum, and where the target holds another set;
    OSError where a transfer fails.
    """
    source, target = Place.at(source_address), Place.at(target_address)
    if target_address.startswith(WEB):
        raise ValueError(f"{target_address}: a web server is a place to copy from, not to")
    expected = [s.path.name for s in ShardSet(source.root).shards] if source.local else [shard_name(0)]
    with _alone(Path(target.root)) if target.local else tempfile.TemporaryDirectory() as scratch:
        sums = _sums(source, workers)
        if lacking := [checksum_path(Path(name)).name for name in expected if name not in sums]:
            raise ValueError(f"{source.address} holds no whole set: {lacking[0]} is not there")
        there = dict(zip(sums, _each(workers, target.checksum, sums)))
        if other := [name for name, line in sums.items() if there[name] not in (None, line)]:
            raise ValueError(
                f"{target.address} holds another set: {', '.join(other[:3])} of {source.address} differ. Nothing was "
                "deleted: choose another folder, or remove that one"
            )
        todo = [name for name in sums if not (there[name] and target.fs.exists(target.path(name)))]
        with _explaining(f"{source.address} cannot be read"):
            total = sum(size or 0 for size in source.fs.sizes([source.path(name) for name in todo]))
        if todo:
            say(f"copying {len(todo)} files, {total / 1e9:.2f} GB, from {source.address} to {target.address}")
        with tqdm(total=total, unit="B", unit_scale=True, disable=None) as bar:
            _each(workers, lambda name: _copy(source, target, name, sums, Path(scratch), bar), todo)
        failures = source.read("failures.csv")
        if failures is not None and failures != target.read("failures.csv"):
            target.write("failures.csv", failures)
    if target.local:
        ShardSet(target.root)
    return len(todo), len(sums) - len(todo)


def _each(workers: int, function: Callable[[str], Any], names: Iterable[str]) -> list[Any]:
    return joblib.Parallel(workers, prefer="threads")(joblib.delayed(function)(name) for name in names)


def _sums(source: Place, workers: int) -> dict[str, bytes]:
    """The line of its checksum for every shard and what lies beside it."""
    found: dict[str, bytes] = {}
    first = 0
    while True:
        shards = [shard_name(number) for number in range(first, first + BATCH)]
        names = [name for shard in shards for name in _with_beside(shard)]
        lines = dict(zip(names, _each(workers, source.checksum, names)))
        for shard in shards:
            if not lines[shard]:
                return found
            found |= {name: line for name in _with_beside(shard) if (line := lines[name])}
        first += BATCH


def _with_beside(shard: str) -> list[str]:
    return [shard, *(beside_path(Path(shard), name).name for name in BESIDE)]


def _copy(source: Place, target: Place, name: str, sums: dict[str, bytes], scratch: Path, bar: tqdm) -> None:
    """One file, then its checksum; what was not checked gets its name nowhere, nor does a shard of no whole set."""
    told, file, line = Told(bar), scratch / name, sums[name]
    if source.local and not target.local:
        file = Path(source.path(name))
    else:
        with _explaining(f"{source.address}/{name} could not be copied"):
            callback = told if target.local else fsspec.callbacks.DEFAULT_CALLBACK
            source.fs.get_file(source.path(name), str(file), callback=callback)
    if file_sha256(file) != line.split()[0].decode():
        raise ValueError(f"{source.address}/{name} is damaged: its bytes are not those of its checksum")
    if Path(name).suffixes == [".h5"]:
        count = Shard(file).origin.shards
        if shard_name(count - 1) not in sums:
            raise ValueError(f"{source.address} holds no whole set: the checksum of one of {count} shards is not there")
    with _explaining(f"{target.address}/{name} could not be written"):
        if target.local:
            with open(file, "rb") as f:
                bar.update(os.fstat(f.fileno()).st_size - told.told)  # from folder to folder nothing was told
                os.fsync(f.fileno())
            os.replace(file, target.path(name))
        else:
            target.fs.put_file(str(file), target.path(name), callback=told)
            (scratch / name).unlink(missing_ok=True)
    target.write(checksum_path(Path(name)).name, line)


@contextmanager
def _alone(folder: Path) -> Iterator[str]:
    """A folder within, for what is not whole; other processes that copy into the folder wait until this is left."""
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / ".copying", "w") as lock:
        with suppress(OSError):  # a file system without locks, where each copies for itself
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                say(f"waiting for another process, which copies into {folder}")
                fcntl.flock(lock, fcntl.LOCK_EX)
            for left in folder.glob(".copying-*"):  # by one that was killed
                shutil.rmtree(left)
        with tempfile.TemporaryDirectory(dir=folder, prefix=".copying-") as scratch:
            yield scratch


@contextmanager
def _explaining(what: str) -> Iterator[None]:
    """Whatever another library's file system raises becomes an OSError that says what to do."""
    try:
        yield
    except Exception as error:
        reason = str(error) or type(error).__name__
        raise OSError(f"{what}: {reason}. The same command again copies what is missing") from error
