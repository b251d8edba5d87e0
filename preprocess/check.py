"""Whether a set of shards is what it was when it was written, and what it holds."""

from __future__ import annotations

from pathlib import Path

import joblib
import numpy as np
import simplejpeg
from tqdm import tqdm

from preprocess.shards import Shard, ShardSet, file_sha256, verify


def problems(folder: Path, workers: int = 1) -> list[str]:
    """Everything wrong with the shards of a folder, one sentence each; empty if all is sound."""
    paths = sorted(folder.glob("shard-*.h5"))
    if not paths:
        raise ValueError(f"{folder} holds no shards (shard-*.h5)")
    work = joblib.Parallel(n_jobs=workers, return_as="generator")(joblib.delayed(shard_problems)(p) for p in paths)
    found = [p for shard in tqdm(work, total=len(paths), unit="shard", disable=None) for p in shard]
    if not found:
        try:
            ShardSet(folder)
        except ValueError as error:
            found.append(str(error))
    return found


def shard_problems(path: Path) -> list[str]:
    """Everything wrong with one shard: its checksum first, then, if it can be read, its contents."""
    sidecar = path.with_name(path.name + ".sha256")
    if not sidecar.exists():
        found = [f"{path}: {sidecar.name} is missing"]
    elif sidecar.read_text() != f"{file_sha256(path)}  {path.name}\n":
        found = [f"{path}: the checksum differs: the file changed after it was written; delete it and run again"]
    else:
        found = []
    try:
        shard = Shard(path)
    except ValueError as error:
        return [*found, str(error)]
    return found + verify(shard) + picture_problems(shard)


def picture_problems(shard: Shard) -> list[str]:
    """Frames and I-frames whose JPEG header is not that of a picture of the shard's size; the first of each kind."""
    s, found = shard.settings, []
    kinds = {
        "frame": (shard.frame_jpeg, len(shard.motion), (s.frame_height, s.frame_width)),
        "I-frame": (shard.iframe_jpeg, len(shard.iframe_frame), (s.height, s.width)),
    }
    for kind, (jpeg, count, size) in kinds.items():
        for number in range(count):
            try:
                shape = simplejpeg.decode_jpeg_header(jpeg(number))
            except ValueError as error:
                found.append(f"{shard.path}: the JPEG header of {kind} {number} is damaged: {error}")
                break
            if shape[:2] != size or shape[3] != "420":
                found.append(f"{shard.path}: {kind} {number} is {shape[0]}x{shape[1]} {shape[3]}, not {size} 420")
                break
    return found


def describe(folder: Path) -> str:
    """What a set of shards holds, as lines of text."""
    shards = ShardSet(folder)
    seconds = 0.0
    for shard in shards.shards:
        known = shard.fps > 0
        seconds += float(np.diff(shard.frame_offset)[known] @ (1 / shard.fps[known]))
    size = sum(s.path.stat().st_size for s in shards.shards)
    errors = sum(int(s.decode_errors.sum()) for s in shards.shards)
    s = shards.settings
    return "\n".join(
        [
            f"shards    {len(shards.shards)} files, {size / 1e9:.2f} GB",
            f"videos    {len(shards)}, {seconds / 3600:.2f} hours; {len(shards.failed)} failed",
            f"frames    {int(shards.frames.sum())}, {s.frame_width}x{s.frame_height}, JPEG quality {s.jpeg_quality}",
            f"I-frames  every {s.gop} frames, {s.width}x{s.height}, quantiser {s.quantiser}",
            f"motion    {s.grid[0]} x {s.grid[1]} macroblocks a frame{', with optical flow' if s.flow else ''}",
            f"damaged   {errors} packets of the sources did not decode and were skipped",
            f"classes   {len(shards.classes)}: {', '.join([*shards.classes[:8], *['…'][: len(shards.classes) - 8]])}",
            f"manifest  sha256 {shards.origin.manifest_sha256}",
            f"versions  {', '.join(f'{k} {v}' for k, v in shards.origin.versions.items())}",
        ]
    )
