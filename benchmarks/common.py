"""What the benchmarks of stages 2 and 3 share: a shard set to run on, batches without end, a clock."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from preprocess.schema import Settings
from preprocess.shards import ShardSet

ROOT = Path(__file__).resolve().parent.parent
CLIPS = Path("../shared/data/clips")  # seen from the repository's root


def open_shards(shards: Path | None, videos: Path | None, scratch: Path) -> tuple[ShardSet, Path | None]:
    """The named shard set and the folder of its source videos; without a name, a small one made in `scratch`, of the
    real clips where they are at hand, else of nine embedded scenes of the stored frames' size."""
    if shards is not None:
        return ShardSet(shards), videos
    videos = (videos or ROOT / CLIPS).resolve()
    if not videos.is_dir():
        made, manifest = rendered(scratch, Settings())
        return ShardSet(made), manifest.parent
    from preprocess import pipeline  # imported here: a named set needs no video library
    from preprocess.manifest import Manifest

    names = tuple(sorted(v.name for v in videos.iterdir()))
    Manifest(names, ("",) * len(names), ("",) * len(names)).write(scratch / "manifest.csv")
    pipeline.run(scratch / "manifest.csv", videos, scratch / "shards", Settings())
    return ShardSet(scratch / "shards"), videos


def rendered(folder: Path, settings: Settings, train: int = 9, test: int = 0) -> tuple[Path, Path]:
    """Shards of embedded scenes of 96 frames, which are as large as the settings' frames, and their manifest."""
    from preprocess import pipeline, synthetic

    scenes = synthetic.Scenes(3, 3, train=train, test=test, frames=96, width=settings.width, height=settings.height)
    synthetic.write(folder / "scenes", scenes)
    manifest = folder / "scenes" / synthetic.MANIFEST_NAME
    pipeline.run(manifest, manifest.parent, folder / "shards", settings)
    return folder / "shards", manifest


def endless(videos: int, batch: int, seed: int = 0) -> Iterator[list[tuple[int, int]]]:
    """Batches of keys of a training set of so many videos, however few."""
    rng = np.random.default_rng(seed)
    while True:
        yield [(seed, i) for i in rng.integers(videos, size=batch).tolist()]


def clock(device: str, cpu_time: bool = True) -> float:
    """Seconds: on a GPU once it has done all it was given; else this process's CPU time, or the wall's."""
    if device != "cpu":
        import torch

        torch.cuda.synchronize(device)
    return time.process_time() if device == "cpu" and cpu_time else time.perf_counter()
