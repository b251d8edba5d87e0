"""The shard format: what `preprocess.writer` writes and `preprocess.shards` reads. numpy only.

A shard is one HDF5 file that holds a run of consecutive manifest rows as flat columns. Every dataset is contiguous and
uncompressed, so a reader asks HDF5 once where the bytes lie and then maps the file: no lock, no chunk cache, no copy,
and no descriptor that stays open, so that a set may have more shards than a process may have files.

A shard depends on the paths and labels of its manifest, in their order, and on nothing else of it. Where rows were
appended later, later shards name another manifest and more classes; the classes of a set are those of all its shards.

| dataset | type, shape | meaning |
|---|---|---|
| videos/row | int64 (n,) | row of the manifest |
| videos/path, videos/path_offset | uint8 (bytes), int64 (n+1,) | UTF-8 paths, end to end |
| videos/label | int32 (n,) | number in the attribute `classes`, -1 unknown |
| videos/fps | float64 (n,) | average frame rate of the source |
| videos/source_size | int32 (n, 2) | height, width of the source as displayed |
| videos/frame_offset | int64 (n+1,) | first frame of each video in frames/ and motion |
| videos/decode_errors | int32 (n,) | packets of the source that did not decode, or not wholly |
| frames/jpeg, frames/jpeg_offset | uint8 (bytes), int64 (F+1,) | every frame, frame_height x frame_width |
| iframes/jpeg, iframes/jpeg_offset | uint8 (bytes), int64 (K+1,) | every I-frame, height x width |
| iframes/frame | int64 (K,) | which frame of frames/ each I-frame is |
| motion | int16 (F, rows, cols, 2) | see below |
| frames/time | float64 (F,) | seconds from a video's first frame; only where a video of the shard has a variable rate |
| failed/row | int64 (m,) | manifest rows that could not be stored |
| failed/path, failed/reason (each with _offset) | uint8 (bytes), int64 (m+1,) | their paths, and why |

Motion vectors, stated once for the whole project:

| | |
|---|---|
| cell (r, c) | macroblock over pixels [16r, 16r+16) x [16c, 16c+16) of the encoded frame; the grid may overhang it |
| last axis | (dx, dy), +x right, +y down |
| meaning | displacement of the content from the previous frame to this one |
| unit | quarter pixels of the encoded frame |
| no vector | `INTRA` (-32768): intra block, or an I-frame; a skipped block is a true zero |

Optical flow and residuals are not part of a shard, which is the same with them and without. Each lies in a file of its
own beside it, shard-00000.flow.h5 and shard-00000.residual.h5, of one dataset that is called as the file is.

`flow` (`preprocess.flow`): of the same shape, cells, axes, meaning and unit as `motion`, the mean over a cell's pixels
inside the frame, rounded. I-frames have it too; a video's first frame, which nothing precedes, is all `INTRA`.

`residual` (`preprocess.residual`): uint16 (F, rows, cols), the energy of what the stream transmits beside the vectors:
the sum over a cell's 256 pixels of how far luma is from what the vector predicts; `NO_RESIDUAL` (65535) where `motion`
has no vector.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

FORMAT = "context-motion-shard"
VERSION = BESIDE_VERSION = 1
MACROBLOCK = 16
QUARTERS = 4  # motion is stored in quarter pixels
INTRA = -32768
NO_RESIDUAL = 65535  # 256 pixels differ by at most 65280
JOURNAL = "journal"
NO_SHARDS = "{} holds no shards (shard-*.h5): name a folder that does, or make them with python -m preprocess run"
COPY_BYTES = 1 << 20  # what fits into a core's cache is copied and hashed faster than what does not

SCHEMA: dict[str, tuple[str, tuple[str | int, ...]]] = {
    "videos/row": ("int64", ("n",)),
    "videos/path": ("uint8", ("path_bytes",)),
    "videos/path_offset": ("int64", ("n+1",)),
    "videos/label": ("int32", ("n",)),
    "videos/fps": ("float64", ("n",)),
    "videos/source_size": ("int32", ("n", 2)),
    "videos/frame_offset": ("int64", ("n+1",)),
    "videos/decode_errors": ("int32", ("n",)),
    "frames/jpeg": ("uint8", ("frame_bytes",)),
    "frames/jpeg_offset": ("int64", ("F+1",)),
    "iframes/jpeg": ("uint8", ("iframe_bytes",)),
    "iframes/jpeg_offset": ("int64", ("K+1",)),
    "iframes/frame": ("int64", ("K",)),
    "motion": ("int16", ("F", "rows", "cols", 2)),
    "failed/row": ("int64", ("m",)),
    "failed/path": ("uint8", ("failed_path_bytes",)),
    "failed/path_offset": ("int64", ("m+1",)),
    "failed/reason": ("uint8", ("reason_bytes",)),
    "failed/reason_offset": ("int64", ("m+1",)),
}
OPTIONAL: dict[str, tuple[str, tuple[str | int, ...]]] = {"frames/time": ("float64", ("F",))}
BESIDE = {"flow": ("int16", 4), "residual": ("uint16", 3)}
"""Datasets in a file beside the shard: type, and how many of the dimensions of `motion` they have."""
OFFSETS = {name: name.removesuffix("_offset") for name in SCHEMA if name.endswith("_offset")}


@dataclass(frozen=True)
class Settings:
    """How stage 1 encodes and stores. Its hash is in every shard; shards of different settings never mix."""

    width: int = 340
    """Width of the encoded frame and of the stored I-frames, pixels (even)."""
    height: int = 256
    """Height of the encoded frame and of the stored I-frames, pixels (even)."""
    gop: int = 12
    """Frames a group of pictures: one I-frame, then gop - 1 P-frames (paper section 2.2: 12)."""
    quantiser: int = 2
    """Constant quantiser of the MPEG-4 encoder, 2 (best) to 31; 2 is what ffmpeg's -q:v 1 yields."""
    frame_width: int = 228
    """Width of the stored training frames, pixels (even)."""
    frame_height: int = 172
    """Height of the stored training frames, pixels (even)."""
    jpeg_quality: int = 90
    """Quality of frames and I-frames, 1 to 100 (4:2:0)."""

    def __post_init__(self) -> None:
        limits = {"width": (16, 8190), "height": (16, 8190), "frame_width": (16, 8190), "frame_height": (16, 8190)}
        limits |= {"gop": (1, 600), "quantiser": (2, 31), "jpeg_quality": (1, 100)}
        for name, (low, high) in limits.items():
            value = getattr(self, name)
            if not low <= value <= high:
                raise ValueError(f"{name} is {value}; choose a value from {low} to {high}")
            if name.endswith(("width", "height")) and value % 2:
                raise ValueError(f"{name} is {value}; 4:2:0 needs an even number, for example {value + 1}")

    @property
    def grid(self) -> tuple[int, int]:
        """Rows and columns of the motion grid."""
        return -(-self.height // MACROBLOCK), -(-self.width // MACROBLOCK)

    def to_json(self) -> str:
        return json.dumps(asdict(self), sort_keys=True)

    @classmethod
    def from_json(cls, text: str) -> Settings:
        values = json.loads(text)
        known = {f.name for f in fields(cls)}
        if set(values) != known:
            raise ValueError(f"settings name {sorted(set(values) ^ known)}, which this version does not share")
        return cls(**values)

    def sha256(self) -> str:
        return hashlib.sha256(self.to_json().encode()).hexdigest()


@dataclass(frozen=True)
class Origin:
    """What a shard was made from; equal origins and equal videos give equal bytes."""

    settings: Settings
    manifest_sha256: str
    """`Manifest.videos_sha256` when the shard was made."""
    classes: tuple[str, ...]
    versions: dict[str, str]
    """Version of every library that shapes the bytes."""
    shards: int
    """How many shards the manifest is cut into."""

    def differences(self, other: Origin) -> list[str]:
        """Sentences naming each setting and version in which the two differ: such shards never mix.

        Manifests may differ, by rows that were appended.
        """
        mine, theirs = self._flat(), other._flat()
        names = [name for name in sorted({*mine, *theirs}) if mine.get(name) != theirs.get(name)]
        return [f"{n}: {theirs.get(n, 'not named')} there, {mine.get(n, 'not named')} here" for n in names]

    def _flat(self) -> dict[str, Any]:
        flat: dict[str, Any] = {f"settings.{k}": v for k, v in asdict(self.settings).items()}
        return flat | {f"version of {k}": v for k, v in self.versions.items()}


class Failure(NamedTuple):
    """A manifest row that could not be stored."""

    row: int
    path: str
    reason: str


def shard_name(number: int) -> str:
    return f"shard-{number:05d}.h5"


def shard_paths(folder: Path) -> list[Path]:
    """The shards of a folder, in order, without the files beside them."""
    return sorted(folder.glob("shard-*[0-9].h5"))


def beside_path(shard: Path, name: str) -> Path:
    """Where one of `BESIDE` lies."""
    return shard.with_suffix(f".{name}.h5")


def checksum_path(file: Path) -> Path:
    """Where the SHA-256 of a file lies, in the form of the tool sha256sum."""
    return file.with_name(file.name + ".sha256")


def even_times(frames: int, fps: float) -> np.ndarray:
    """Seconds from the first frame at a constant rate, float64 (frames,); nan where it is 0, unknown."""
    return np.arange(frames) / fps if fps else np.full(frames, np.nan)


def work_path(target: Path) -> Path:
    """Where a shard, or the optical flow of one, is in the making, with a JOURNAL of the videos that are finished."""
    return target.with_name(f".{target.name}.work")


def file_sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with open(path, "rb") as f:
        while piece := f.read(COPY_BYTES):
            digest.update(piece)
    return digest.hexdigest()
