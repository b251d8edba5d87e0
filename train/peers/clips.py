"""The data of a peer: some clips of a video, drawn as its task wants them."""

from __future__ import annotations

import numpy as np
from torch.utils.data import Dataset

from preprocess.manifest import Manifest
from preprocess.shards import ShardSet
from train.config import Comparison
from train.data import Sample, decode_frames, extent, generator, select
from train.draws import draw_box, draw_photometric
from train.peers import make_peer


class ClipTuples(Dataset[Sample]):
    """N random clips a video and epoch, each with a crop and colours of its own: `data[epoch, index]`.

    | key | type, shape | meaning |
    |---|---|---|
    | clip | uint8 (N, T, h, w, 3) | RGB frames |
    | clip_box, clip_flip, clip_photo, clip_still_removed | (N, …) | as in `train.data.TrainingSet` |
    | target | int | what the task asks for |

    `dropped` counts videos that are too short; ValueError where all are.
    """

    def __init__(self, shards: ShardSet, manifest: Manifest | None, config: Comparison) -> None:
        self.shards, self.config, self.peer = shards, config, make_peer(config)
        video, self.failed = select(shards, manifest)
        self.video = video[shards.frames[video] >= self.peer.needed]
        self.dropped = len(video) - len(self.video)
        if not len(self.video):
            raise ValueError(
                f"none of {len(video)} videos has the {self.peer.needed} frames that {config.peer.name} needs; choose "
                "fewer frames, or fewer of its clips or paces"
            )

    def __len__(self) -> int:
        return len(self.video)

    def __getitem__(self, key: tuple[int, int]) -> Sample:
        epoch, index = key
        c, rng = self.config, generator(self.config.seed, epoch, index)
        shard, first, frames, *_ = extent(self.shards, int(self.video[index]))
        starts, stride, target = self.peer.draw(rng, frames)
        numbers = first + starts[:, None] + stride * np.arange(c.sampling.frames)  # (N, T)
        s, each = self.shards.settings, range(len(starts))
        boxes = np.stack([draw_box(rng, c.cropping, s.width, s.height) for _ in each])
        flips = rng.random(len(starts)) < c.cropping.flip
        sample: Sample = {
            "target": target,
            "clip_box": boxes,
            "clip_flip": np.repeat(flips[:1], len(flips)) if self.peer.one_flip else flips,
            "clip_photo": np.stack([draw_photometric(rng, c.photometric) for _ in each]),
            "clip_still_removed": rng.random(len(starts)) < c.photometric.still_removed_p,
        }
        shard.expect("frames", numbers.ravel())
        decoded = decode_frames(shard, numbers.ravel())
        return sample | {"clip": decoded.reshape(*numbers.shape, *decoded.shape[1:])}
