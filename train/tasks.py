"""What a run optimises: its data, its model and the loss of a batch; the loop knows no more of it than this.

Shapes: B videos, K negative windows, W maps a window, T frames, S and M pixels of clips and of motion maps.
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from preprocess.manifest import Manifest
from preprocess.shards import Settings, ShardSet
from train import augment
from train.config import Config, Finetuning, Pretraining
from train.data import FinetuneSet, PretrainSet
from train.model import FinetuningModel, PretrainingModel
from train.objectives import context_matching, joint

Batch = dict[str, Tensor]
Inputs = tuple[Tensor, Tensor | None, Tensor | None]


class Task(Protocol):
    @property
    def data(self) -> PretrainSet | FinetuneSet: ...

    @property
    def model(self) -> nn.Module: ...

    columns: tuple[str, ...]
    """Names of the numbers that `loss` returns beside the loss, each a mean over the batch."""

    def loss(self, network: nn.Module, inputs: Inputs, batch: Batch) -> tuple[Tensor, list[Tensor]]:
        """(the loss to be minimised, its parts) of a batch and its `inputs`; `network` is the model, wrapped."""

    def inputs(self, batch: Batch) -> Inputs:
        """What the model takes of a batch, cropped, flipped and coloured on its device."""

    def about_data(self) -> str:
        """What the data set leaves out, for the screen."""


class PretrainingTask:
    """Context matching and motion prediction: equation (3)."""

    def __init__(self, config: Pretraining, shards: ShardSet, manifest: Manifest | None) -> None:
        c, alpha = config, config.objective.alpha
        self.config, self.settings = config, shards.settings
        self.data = PretrainSet(shards, manifest, c.sampling, c.cropping, c.photometric, c.seed)
        self.model = PretrainingModel(config)
        context = ("context_loss", "context_accuracy") if alpha < 1 else ()
        self.ranks_motion = c.objective.motion_loss != "mse"  # a regression has no accuracy
        motion = ("motion_loss", "motion_accuracy")[: 2 if self.ranks_motion else 1] if alpha > 0 else ()
        self.columns = (*context, *motion)

    def loss(self, network: nn.Module, inputs: Inputs, batch: Batch) -> tuple[Tensor, list[Tensor]]:
        o = self.config.objective
        clips, iframes, points = network(*inputs)
        found: list[Tensor] = []
        nothing = torch.zeros((), device=inputs[0].device)
        context_loss = motion_loss = nothing
        if o.alpha < 1:
            context = context_matching(clips, iframes, o.context_temperature)
            context_loss = context.value
            found += context
        if o.alpha > 0:
            future = self.model.motion.compare(points, o.motion_temperature)
            motion_loss = future.value
            found += future[: 2 if self.ranks_motion else 1]
        return joint(context_loss, motion_loss, o.alpha, o.loss_scale), found

    def inputs(self, batch: Batch) -> Inputs:
        alpha = self.config.objective.alpha
        return prepare(batch, self.config, self.settings, alpha < 1, alpha > 0)

    def about_data(self) -> str:
        return f"{self.data.dropped} too short"


class FinetuningTask:
    """Classification, and motion prediction beside it where that has a weight (table 6)."""

    def __init__(self, config: Finetuning, shards: ShardSet, manifest: Manifest | None) -> None:
        c, self.weight = config, config.supervision.motion_weight
        self.config, self.settings = config, shards.settings
        self.data = FinetuneSet(shards, manifest, c.sampling, c.cropping, c.photometric, c.seed, self.weight > 0)
        self.model = FinetuningModel(config, len(shards.classes))
        motion = ("motion_loss", "motion_accuracy") if self.weight > 0 else ()
        self.columns = ("class_loss", "class_accuracy", *motion)

    def loss(self, network: nn.Module, inputs: Inputs, batch: Batch) -> tuple[Tensor, list[Tensor]]:
        clip, _, motion = inputs
        scores, points = network(clip, motion)  # (B, classes)
        loss = F.cross_entropy(scores, batch["label"])
        found = [loss, (scores.argmax(1) == batch["label"]).float().mean()]
        if self.weight > 0:
            temperature = self.config.supervision.motion_temperature
            motion_loss = self.model.motion.compare(points, temperature, batch["serves"])
            loss = loss + self.weight * motion_loss.value
            found += motion_loss
        return loss, found

    def inputs(self, batch: Batch) -> Inputs:
        return prepare(batch, self.config, self.settings, False, self.weight > 0)

    def about_data(self) -> str:
        return f"{self.data.unserved} too short for motion prediction" if self.weight > 0 else "none dropped"


def make_task(config: Config, shards: ShardSet, manifest: Manifest | None) -> PretrainingTask | FinetuningTask:
    """The task of a configuration, its model fresh from torch's generator."""
    if isinstance(config, Pretraining):
        return PretrainingTask(config, shards, manifest)
    assert isinstance(config, Finetuning)
    return FinetuningTask(config, shards, manifest)


@torch.no_grad()
def prepare(batch: Batch, config: Config, settings: Settings, with_iframe: bool, with_motion: bool) -> Inputs:
    """Clip (B, 3, T, S, S), I-frame (B, 3, 1, S, S), motion (B, 1+K, 2, W, M, M); None where not wanted."""
    size, taps = config.size, config.photometric.blur_taps
    clip = augment.crop(batch["clip"], batch["clip_box"], batch["clip_flip"], size)
    clip = augment.normalise(augment.photometric(clip, batch["clip_photo"], taps))
    iframe = motion = None
    if with_iframe:
        iframe = augment.crop(batch["iframe"][:, None], batch["iframe_box"], batch["iframe_flip"], size)
        iframe = augment.normalise(augment.photometric(iframe, batch["iframe_photo"], taps))
    if with_motion:
        windows, boxes, flips = (batch[k].flatten(0, 1) for k in ("motion", "motion_box", "motion_flip"))
        motion = augment.crop_motion(windows, boxes, flips, config.motion_size, settings.width, settings.height)
        motion = motion.unflatten(0, batch["motion"].shape[:2])
    return clip, iframe, motion
