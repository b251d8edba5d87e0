"""What a run is about to do, said before it begins: shards and videos, what is missing, room, workers without work."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from preprocess.command import say, unheard
from preprocess.schema import Settings, shard_paths
from preprocess.shards import open_shard

LOOKED_AT = 1000  # videos of a manifest; on a busy file system each takes a millisecond
WITNESSES = 16  # of those found
ENOUGH = 8  # videos, for their lengths to be looked at
PIXEL_BYTES = 0.28  # of a JPEG of quality 90, on real video
CHILD_SECONDS = 60.0


def present(paths: Sequence[str], videos: Path) -> tuple[str, ...]:
    """Some of the paths, from all over the manifest, that are in the folder; ValueError where most are not."""
    some = [paths[k] for k in np.unique(np.linspace(0, len(paths) - 1, min(len(paths), LOOKED_AT)).astype(int))]
    found = [path for path in some if os.path.exists(videos / path)]
    if missing := len(some) - len(found):
        first = next(path for path in some if path not in found)
        text = f"{missing} of {len(some)} videos of the manifest are not in {videos}, such as {videos / first}"
        if missing > len(found):
            raise ValueError(
                f"{text}. Give as --videos the folder that the manifest's paths are relative to, or make a manifest of "
                "what is there: python -m preprocess manifest"
            )
        say(text)
    return tuple(found[:: max(1, -(-len(found) // WITNESSES))])


def tell(
    out: Path, shards: int, todo: int, videos: int, sources: Sequence[Path], settings: Settings, workers: int
) -> None:
    """Print what is to be done: `todo` of `shards`, which lack so many `videos`, some of them at `sources`."""
    needed, free = videos * _video_bytes(out, sources, settings), _free(out)
    room = f"; about {_size(needed)}, and {_size(free)} are free" if needed else ""
    try:
        print(f"{shards} shards, {shards - todo} already there: {videos} videos to do{room}", flush=True)
    except BrokenPipeError:  # the work is to be done all the same
        unheard()
    if needed > free:
        say(f"warning: about {_size(needed)} are needed in {out}, and {_size(free)} are free")
    if 0 < todo < workers:
        per_shard = -(-videos // workers)
        say(
            f"{workers} workers have {todo} shards to make, so that {workers - todo} of them idle"
            + (f": --videos-per-shard {per_shard} gives each one" if todo == shards and videos > todo else "")
        )


def duration(seconds: float) -> str:
    """A time that is left, to a person: 40 s, 12 min, 3.5 h."""
    if seconds < 60:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 3600 else f"{seconds / 3600:.1f} h"


def _size(count: float) -> str:
    return f"{count / 1e6:.0f} MB" if count < 1e9 else f"{count / 1e9:.1f} GB"


def _free(folder: Path) -> int:
    return shutil.disk_usage(next(p for p in (folder, *folder.parents) if p.exists())).free


def _video_bytes(out: Path, sources: Sequence[Path], settings: Settings) -> float:
    """About how much a video takes in a shard: what those there hold, or by the lengths that sources declare."""
    if made := [shard for path in shard_paths(out) if (shard := open_shard(path)) is not None]:
        return sum(s.path.stat().st_size for s in made) / max(1, sum(map(len, made)))
    frames = declared_frames(sources) if len(sources) >= ENOUGH else []
    if not frames:
        return 0.0
    rows, cols = settings.grid
    pixels = settings.frame_width * settings.frame_height + settings.width * settings.height / settings.gop
    return sum(frames) / len(frames) * (PIXEL_BYTES * pixels + rows * cols * 4)


def declared_frames(sources: Sequence[Path]) -> list[float]:
    """How many frames videos declare, as far as they do. Asked in another process: broken videos crash decoders."""
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}
    command = [sys.executable, "-m", "preprocess.outlook", *map(str, sources)]
    try:
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=CHILD_SECONDS)
    except subprocess.TimeoutExpired:
        return []
    return [float(line) for line in done.stdout.split()]


def _main(paths: Sequence[str]) -> None:
    import av

    from preprocess.encode import ONLY_ITSELF

    for path in paths:
        try:
            with open(path, "rb") as file, av.open(file, "r", container_options=ONLY_ITSELF) as container:
                video = container.streams.video[0]
                seconds = float((container.duration or 0) / av.time_base)
                frames = video.frames or seconds * float(video.average_rate or 0)
        except (av.FFmpegError, OSError, IndexError):
            continue
        if frames:
            print(frames, flush=True)


if __name__ == "__main__":
    _main(sys.argv[1:])
