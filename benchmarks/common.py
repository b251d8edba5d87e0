"""What the benchmarks of stage 2 share: a shard set to run on."""

from __future__ import annotations

import statistics
from collections.abc import Iterable
from pathlib import Path

from preprocess.schema import Settings
from preprocess.shards import ShardSet

ROOT = Path(__file__).resolve().parent.parent
CLIPS = Path("../shared/data/clips")  # seen from the repository's root


def open_shards(shards: Path | None, videos: Path | None, scratch: Path) -> tuple[ShardSet, Path | None]:
    """The named shard set and the folder of its source videos; without a name, a small one made in `scratch`, of the
    real clips where they are at hand, else of nine embedded scenes of the stored frames' size."""
    if shards is not None:
        return ShardSet(shards), videos
    from preprocess import pipeline, synthetic  # imported here: a named set needs no video library
    from preprocess.manifest import Manifest

    settings = Settings()
    manifest, videos = scratch / "manifest.csv", (videos or ROOT / CLIPS).resolve()
    if videos.is_dir():
        names = tuple(sorted(v.name for v in videos.iterdir()))
        Manifest(names, ("",) * len(names), ("",) * len(names)).write(manifest)
    else:
        videos, manifest = scratch / "scenes", scratch / "scenes" / synthetic.MANIFEST_NAME
        scenes = synthetic.Scenes(3, 3, train=9, test=0, frames=96, width=settings.width, height=settings.height)
        synthetic.write(videos, scenes)
    pipeline.run(manifest, videos, scratch / "shards", settings)
    return ShardSet(scratch / "shards"), videos


def median(values: Iterable[float]) -> float:
    return statistics.median(list(values))
