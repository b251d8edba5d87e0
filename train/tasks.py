"""What a run optimises: its data, what the network takes of a batch, and the loss; the loop knows no more of it.

Shapes: B videos, K negative windows, W maps a window, T frames, S and M pixels of clips and of motion maps, D
channels of the latter.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from preprocess.command import at_least
from preprocess.manifest import Manifest
from preprocess.schema import Settings
from preprocess.shards import ShardSet
from train import augment
from train.config import Comparison, Config, Finetuning, Pretraining
from train.data import EpochSampler, FinetuneSet, Modality, PretrainSet
from train.draws import largest_stride
from train.objectives import Loss, classification, context_matching, joint, motion_loss, motion_targets
from train.peers import make_peer
from train.peers.clips import ClipTuples

Batch = dict[str, Tensor]
Inputs = tuple[Tensor, Tensor | None, Tensor | None]
Found = dict[str, Tensor]
"""The parts of a loss by name, each a mean over the batch: motion_loss, motion_accuracy, ..."""


UNREAD: dict[float, Modality] = {0.0: "motion", 1.0: "iframe"}  # by alpha, where one task is all there is
WINDOWS, CHUNK = 2048, 64  # motion windows that the scale of their vectors is taken of, and so many at a time


class PretrainingTask:
    """Context matching and motion prediction: equation (3)."""

    def __init__(self, config: Pretraining, shards: ShardSet, manifest: Manifest | None) -> None:
        c = config
        at_least("batch_size", c.batch_size, 2)  # a clip is told from others of the batch
        self.config, self.settings = config, shards.settings
        unread = UNREAD.get(c.objective.alpha)
        self.data = PretrainSet(shards, manifest, c, unread)
        self.left_out = f"{self.data.dropped} too short"

    def inputs(self, batch: Batch) -> Inputs:
        """What the model takes of a batch, cropped, flipped and coloured on its device."""
        alpha = self.config.objective.alpha
        return prepare(batch, self.config, self.settings, with_iframe=alpha < 1, with_motion=alpha > 0)

    def begin(self, model: nn.Module) -> None:
        """What a run does once, before its first step: table 1's other losses take the scale of their targets from the
        first windows that training draws, whatever the number of processes."""
        c, s = self.config, self.settings
        if c.objective.alpha == 0 or c.objective.motion_loss == "infonce":
            return
        batches = EpochSampler(len(self.data), c.batch_size, seed=c.seed).between(0, -(-WINDOWS // c.batch_size))
        keys = [key for batch in batches for key in batch][:WINDOWS]
        prediction: Any = model.motion
        points = []
        for first in range(0, len(keys), CHUNK):
            windows, boxes, flips = self.data.windows(keys[first : first + CHUNK])
            maps = augment.crop_motion(windows, boxes, flips, c.motion_size, s.width, s.height)
            points.append(motion_targets(maps, prediction.grid))
        prediction.scale.fit(torch.cat(points))

    def loss(self, network: nn.Module, inputs: Inputs, _: Batch) -> tuple[Tensor, Found]:
        """The loss to be minimised, and its parts."""
        o, found = self.config.objective, Found()
        clips, iframes, points = network(*inputs)
        context = motion = torch.zeros((), device=inputs[0].device)
        if clips is not None:
            matching = context_matching(clips, iframes, o.context_temperature)
            context = matching.value
            found |= named("context", matching)
        if points is not None:
            future = motion_loss(o.motion_loss, points, o.motion_temperature)
            motion = future.value
            found |= named("motion", future)
        return joint(context, motion, o.alpha, o.loss_scale), found


class FinetuningTask:
    """Classification, and motion prediction beside it where that has a weight (table 6)."""

    def __init__(self, config: Finetuning, shards: ShardSet, manifest: Manifest | None) -> None:
        c, self.with_motion = config, config.supervision.motion_weight > 0
        self.config, self.settings = config, shards.settings
        self.data = FinetuneSet(shards, manifest, c, self.with_motion)
        unserved = f"{self.data.unserved} too short for motion prediction"
        self.left_out = unserved if self.with_motion else "none dropped"

    def begin(self, _: nn.Module) -> None:
        """Nothing: its targets are labels, and features."""

    def inputs(self, batch: Batch) -> Inputs:
        return prepare(batch, self.config, self.settings, with_iframe=False, with_motion=self.with_motion)

    def loss(self, network: nn.Module, inputs: Inputs, batch: Batch) -> tuple[Tensor, Found]:
        s, (clip, _, motion) = self.config.supervision, inputs
        scores, points = network(clip, motion)  # (B, classes)
        labelled = classification(scores, batch["label"])
        loss, found = labelled.value, named("class", labelled)
        if points is not None:
            future = motion_loss("infonce", points, s.motion_temperature, batch["serves"])
            loss = loss + s.motion_weight * future.value
            found |= named("motion", future)
        return loss, found


class ComparisonTask:
    """Another task on clips of a video (train.peers)."""

    def __init__(self, config: Comparison, shards: ShardSet, manifest: Manifest | None) -> None:
        at_least("batch_size", config.batch_size, 2)
        self.config, self.settings = config, shards.settings
        self.data = ClipTuples(shards, manifest, config)
        self.left_out = f"{self.data.dropped} too short"

    def begin(self, _: nn.Module) -> None:
        """Nothing."""

    def inputs(self, batch: Batch) -> Inputs:
        """Clips (B N, 3, T, S, S), and nothing beside them."""
        clips = {name: x.flatten(0, 1) for name, x in batch.items() if name.startswith("clip")}
        return prepare(clips, self.config, self.settings, with_iframe=False, with_motion=False)

    def loss(self, network: nn.Module, inputs: Inputs, batch: Batch) -> tuple[Tensor, Found]:
        found = self.data.peer.loss(network(inputs[0]), batch["target"])
        return found.value, named(self.config.peer.name, found)


Task = PretrainingTask | ComparisonTask | FinetuningTask


def make_task(config: Config, shards: ShardSet, manifest: Manifest | None) -> Task:
    """The task of a configuration."""
    if isinstance(config, Pretraining):
        return PretrainingTask(config, shards, manifest)
    if isinstance(config, Comparison):
        return ComparisonTask(config, shards, manifest)
    assert isinstance(config, Finetuning)
    return FinetuningTask(config, shards, manifest)


def serves(config: Config, frames: int) -> bool:
    """Whether a video of so many frames can pretrain."""
    if isinstance(config, Comparison):
        return frames >= make_peer(config).needed
    return largest_stride(frames, config.sampling) > 0


def named(task: str, loss: Loss) -> Found:
    """A loss and its accuracy, where it has one, as metrics."""
    found = {f"{task}_loss": loss.value}
    return found if loss.accuracy is None else found | {f"{task}_accuracy": loss.accuracy}


@torch.no_grad()
def prepare(batch: Batch, config: Config, settings: Settings, with_iframe: bool, with_motion: bool) -> Inputs:
    """Clip (B, 3, T, S, S), I-frame (B, 3, 1, S, S), motion (B, 1+K, D, W, M, M); None where not wanted."""

    def coloured(frames: Tensor, of: str) -> Tensor:
        pixels = augment.crop(frames, batch[f"{of}_box"], batch[f"{of}_flip"], config.size)
        return augment.normalise(augment.photometric(pixels, batch[f"{of}_photo"], config.photometric.blur_taps))

    clip = coloured(batch["clip"], "clip")
    if config.photometric.still_removed_p > 0:
        clip = augment.without_still(clip, batch["clip_still_removed"])
    iframe = coloured(batch["iframe"][:, None], "iframe") if with_iframe else None
    motion = None
    if with_motion:
        windows, boxes, flips = (batch[k].flatten(0, 1) for k in ("motion", "motion_box", "motion_flip"))
        motion = augment.crop_motion(windows, boxes, flips, config.motion_size, settings.width, settings.height)
        motion = motion.unflatten(0, batch["motion"].shape[:2])
    return clip, iframe, motion
