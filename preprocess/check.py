"""Whether a set of shards is what it was when it was written, and what it holds.

Opening a shard checks what protects a reader from leaving the file. Everything else is here, once: the writer asks it
of every shard before that gets its name, and the verb `check` of what lies on the disk.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path

import joblib
import numpy as np
import simplejpeg
from tqdm import tqdm

from preprocess.schema import (
    BESIDE,
    INTRA,
    JOURNAL,
    NO_RESIDUAL,
    NO_SHARDS,
    SCHEMA,
    beside_path,
    checksum_path,
    file_sha256,
    shard_paths,
    work_path,
)
from preprocess.shards import Shard, ShardSet, open_shard

ITEMS = 32  # pictures or grids that are looked at before their part of the file is let go
END_OF_IMAGE = (0xFF, 0xD9)  # the marker that a whole JPEG ends with


def problems(folder: Path, workers: int = 1) -> list[str]:
    """Everything wrong with the shards of a folder, one sentence each; empty if all is sound."""
    paths = shard_paths(folder)
    if not paths:
        raise ValueError(NO_SHARDS.format(folder))
    work = joblib.Parallel(n_jobs=workers, return_as="generator")(joblib.delayed(file_problems)(p) for p in paths)
    found = [p for shard in tqdm(work, total=len(paths), unit="shard", disable=None) for p in shard]
    if not found:
        try:
            ShardSet(folder)
        except ValueError as error:
            found.append(str(error))
    return found


def file_problems(path: Path) -> list[str]:
    """Everything wrong with one shard and what lies beside it: checksums, then, if it can be read, contents."""
    found: list[str] = []
    try:
        found += checksum_problems(path)
        shard = Shard(path)
        found += content_problems(shard)
        of_beside = {"flow": flow_problems, "residual": residual_problems}
        for name in BESIDE if not found else ():
            if (beside := beside_path(path, name)).exists():
                found += checksum_problems(beside) + [f"{beside}: {p}" for p in of_beside[name](shard)]
    except ValueError as error:
        found.append(str(error))
    return found


def content_problems(shard: Shard) -> list[str]:
    """What is wrong with a shard's contents: rows, groups of pictures, motion on I-frames, JPEGs. Empty if sound.

    Raises ValueError where a column cannot be read.
    """
    for name in SCHEMA:
        shard[name]  # a column is looked at when it is first read; ValueError where it points to what is not there
    settings, iframes, problems = shard.settings, shard.iframe_frame, []
    rows = np.sort(np.concatenate([shard.row, shard["failed/row"]]))
    if not np.array_equal(rows, np.arange(shard.first_row, shard.first_row + shard.rows)):
        problems.append(f"rows stored and failed do not make up {shard.first_row}..{shard.first_row + shard.rows - 1}")
    lengths = np.diff(shard.frame_offset)
    if (lengths < 1).any():
        problems.append("a stored video has no frame")
    expected = [np.arange(start, end, settings.gop) for start, end in pairwise(shard.frame_offset.tolist())]
    if not np.array_equal(np.concatenate([*expected, np.empty(0, np.int64)]), iframes):
        problems.append(f"I-frames are not exactly every {settings.gop} frames")
    elif not all((shard.motion[iframes[some]] == INTRA).all() for some in _some(shard, 0, len(iframes))):
        problems.append("an I-frame carries motion vectors")
    problems += _picture_problems(shard, "frame", (settings.frame_height, settings.frame_width))
    problems += _picture_problems(shard, "iframe", (settings.height, settings.width))
    return [f"{shard.path}: {p}" for p in problems]


def flow_problems(shard: Shard) -> list[str]:
    """What is wrong with the optical flow of a shard. Raises ValueError where it cannot be read."""
    problems = []
    if not (shard.flow[shard.frame_offset[:-1]] == INTRA).all():
        problems.append("a video's first frame carries optical flow")
    spans = pairwise(shard.frame_offset.tolist())
    if any((shard.flow[some] == INTRA).any() for start, end in spans for some in _some(shard, start + 1, end)):
        problems.append("a later frame of a video lacks optical flow")
    return problems


def residual_problems(shard: Shard) -> list[str]:
    """What is wrong with the residuals of a shard. Raises ValueError where they cannot be read."""
    parts = _some(shard, 0, len(shard.motion))
    if all(np.array_equal(shard.residual[p] == NO_RESIDUAL, shard.motion[p, ..., 0] == INTRA) for p in parts):
        return []
    return ["residuals are not where the motion vectors are"]


def checksum_problems(path: Path) -> list[str]:
    """Whether a shard, or what lies beside one, is still what was written."""
    sidecar = checksum_path(path)
    if not sidecar.exists():
        return [f"{path}: {sidecar.name} is missing"]
    if sidecar.read_bytes() != f"{file_sha256(path)}  {path.name}\n".encode():
        return [f"{path}: the checksum differs: the file changed after it was written; delete it and run again"]
    return []


def _picture_problems(shard: Shard, kind: str, size: tuple[int, int]) -> list[str]:
    """The first picture of a kind, "frame" or "iframe", that is not a whole JPEG of this size (height, width)."""
    jpeg = shard.frame_jpeg if kind == "frame" else shard.iframe_jpeg
    for some in _some(shard, 0, len(shard[f"{kind}s/jpeg_offset"]) - 1):
        for number in range(some.start, some.stop):
            data = jpeg(number)
            try:
                height, width, _, sampling = simplejpeg.decode_jpeg_header(data)
            except ValueError as error:
                return [f"the JPEG header of {kind} {number} is damaged: {error}"]
            if (height, width) != size or sampling != "420":
                return [f"{kind} {number} is {height}x{width} {sampling}, not {size[0]}x{size[1]} 420"]
            if tuple(data[-2:]) != END_OF_IMAGE:
                return [f"{kind} {number} does not end as a JPEG"]
    return []


def _some(shard: Shard, start: int, end: int) -> Iterator[slice]:
    """ITEMS at a time from start to end; what was read of the file leaves memory after each."""
    for first in range(start, end, ITEMS):
        yield slice(first, min(first + ITEMS, end))
        shard.release()


def describe(folder: Path) -> str:
    """What a set of shards holds, as lines of text; of one that is not finished, what there is of it."""
    shards = [shard for path in shard_paths(folder) if (shard := open_shard(path)) is not None]
    begun = list(folder.glob(work_path(Path("shard-*[0-9].h5")).name))
    if not shards and not begun:
        raise ValueError(NO_SHARDS.format(folder))
    journals = [path.read_bytes() for work in begun for path in work.glob(JOURNAL)]
    finished = sum(max(0, text.count(b"\n") - 1) for text in journals)
    of_these = f", with {finished} videos finished" if journals else ""  # else they lie in the --spool
    lines = [f"begun     {len(begun)} more{of_these}"] if begun else []
    if not shards:
        return "\n".join(["shards    none finished", *lines])
    seconds = 0.0
    for shard in shards:
        known = shard.fps > 0
        seconds += float(np.diff(shard.frame_offset)[known] @ (1 / shard.fps[known]))
    size, frames = sum(s.path.stat().st_size for s in shards), sum(len(s.motion) for s in shards)
    errors = sum(int(s.decode_errors.sum()) for s in shards)
    flows, residuals = (sum(beside_path(s.path, name).exists() for s in shards) for name in BESIDE)
    failed = sum(len(s["failed/row"]) for s in shards)
    newest = max((s.origin for s in shards), key=lambda origin: origin.shards)
    of = "" if newest.shards == len(shards) else f" of {newest.shards}"
    s = shards[0].settings
    return "\n".join(
        [
            f"shards    {len(shards)}{of} files, {size / 1e9:.2f} GB",
            *lines,
            f"videos    {sum(map(len, shards))}, {seconds / 3600:.2f} hours; {failed} failed",
            f"frames    {frames}, {s.frame_width}x{s.frame_height}, JPEG quality {s.jpeg_quality}",
            f"I-frames  every {s.gop} frames, {s.width}x{s.height}, quantiser {s.quantiser}",
            f"motion    {s.grid[0]} x {s.grid[1]} macroblocks a frame; optical flow of {flows} shards, "
            f"residuals of {residuals}",
            f"damaged   {errors} packets of the sources did not decode, or not wholly",
            f"classes   {len(newest.classes)}: {', '.join([*newest.classes[:8], *['…'][: len(newest.classes) - 8]])}",
            f"manifest  sha256 {newest.manifest_sha256}",
            f"versions  {', '.join(f'{k} {v}' for k, v in newest.versions.items())}",
        ]
    )
