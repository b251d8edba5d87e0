"""Held-out videos while a run pretrains: how well its tasks are done on them, and whether they find their own class.

The gap to the accuracies on training videos is what the network remembers of those. Nothing here changes what is
learned: the network is in evaluation mode, nothing comes from torch's own generator, and what is drawn is a function of
(seed, video), the same every time.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

from preprocess.manifest import Manifest
from preprocess.shards import ShardSet
from train import metrics
from train.config import Config, Finetuning, Runtime
from train.data import ClipSet, EpochSampler
from train.distributed import gather_with_gradient, rank, world_size
from train.loader import make_loader
from train.model import Model
from train.readout import SharedMap, pooled, prepare
from train.tasks import Batch, Task, make_task, serves

VIDEOS = 256  # held-out videos at most, and as many training videos for them to find
LOOKS = 6  # wanted over a run: where they take too long, fewer videos are looked at
SHARE = 0.03  # of the time of training, at most
FORWARD = 1 / 3  # of a training step, whose backward pass takes twice as long; measured on a CPU, all told: 0.27
AT_ONCE = 16  # clips of a batch that are only pooled


@dataclass(frozen=True)
class HeldOut:
    """What is looked at, and how often."""

    task: Task
    """Of the held-out videos."""
    sampler: EpochSampler
    """Their batches, as large as those of training where there are as many videos."""
    clips: ClipSet
    """The clip in the middle of each of them, then of training videos."""
    queries: int
    """How many of `clips` are held out."""
    every: int
    """Epochs from one look to the next."""

    def due(self, epoch: int) -> bool:
        """Whether to look after so many epochs: at the last in any case."""
        return epoch % self.every == 0 or epoch == self.task.config.epochs

    def measure(self, model: Model, runtime: Runtime, device: torch.device) -> dict[str, float]:
        """heldout_context_accuracy, heldout_motion_accuracy and heldout_recall, those that there are, as shares; the
        same on every rank, and every rank takes its part. Leaves the model in evaluation mode."""
        model.eval()
        with torch.autocast(device.type, torch.bfloat16, enabled=runtime.precision == "bfloat16"):
            generator = torch.Generator()  # from which a loader draws, in place of torch's own
            loader = make_loader(
                self.task.data, runtime.loader_workers, device, batch_sampler=self.sampler, generator=generator
            )
            found = accuracies(model, self.task, loader)
            if (self.clips.label[: self.queries] >= 0).any():
                found["recall"] = self._recall(model, runtime.loader_workers, device)
        return {f"heldout_{name}": value for name, value in found.items()}

    @torch.no_grad()
    def _recall(self, model: Model, workers: int | None, device: torch.device) -> float:
        """R@1: the share of labelled held-out videos whose nearest training video, by cosine of the pooled shared map,
        has their label."""
        config, settings, total = self.task.config, self.clips.shards.settings, len(self.clips)
        share = -(-total // world_size())  # the last rank fills up from the beginning
        mine = [i % total for i in range(rank() * share, (rank() + 1) * share)]
        batches = [mine[i : i + AT_ONCE] for i in range(0, share, AT_ONCE)]
        loader = make_loader(self.clips, workers, device, batch_sampler=batches, generator=torch.Generator())
        shared, features = SharedMap(model.video), []
        for batch in loader:
            clips = batch["clips"][:, 0].to(device, non_blocking=True)  # (n, T, h, w, 3)
            features.append(pooled(shared(prepare(clips, "video", config, settings))))
        every = F.normalize(gather_with_gradient(torch.cat(features))[:total])  # (queries + gallery, C)
        with torch.autocast(device.type, enabled=False):  # in bfloat16 most cosines of neighbours are the same
            nearest = (every[: self.queries] @ every[self.queries :].T).argmax(1).cpu().numpy()
        own, theirs = self.clips.label[: self.queries], self.clips.label[self.queries :]
        return float((theirs[nearest] == own)[own >= 0].mean())

    def __str__(self) -> str:
        own, theirs = self.clips.label[: self.queries], self.clips.label[self.queries :]
        found = own[own >= 0]
        chance = f" (R@1 by chance {100 * (found[:, None] == theirs).mean():.1f} %)" if len(found) else ""
        often = "after every epoch" if self.every == 1 else f"every {self.every} epochs and at the end"
        return f"{self.queries} held-out videos are looked at {often}, beside {len(theirs)} training videos{chance}"


def hold_out(
    config: Config, runtime: Runtime, shards: ShardSet, training: Manifest, held_out: Manifest | None, videos: int
) -> HeldOut | None:
    """What a run that trains on `videos` videos an epoch looks at of the held-out ones; None where it trains with
    labels, is told not to look, or has too few of them for a batch."""
    if isinstance(config, Finetuning) or held_out is None or runtime.watch_epochs == 0:
        return None
    # A video has a clip for the tasks and one to ask with, and a training video one to be found.
    count = VIDEOS if runtime.watch_epochs else min(VIDEOS, affordable(videos, config.epochs) // (3 * LOOKS))
    count = max(count, config.batch_size)  # as many candidates as in training
    frames, trained = dict(zip(shards.paths, shards.frames.tolist())), set(training.paths)
    able = [serves(config, frames.get(path, 0)) for path in held_out.paths]
    rows = [i for i, path in enumerate(held_out.paths) if able[i] and path not in trained]
    size = min(config.batch_size, len(rows))
    size -= size % world_size()
    if size < 2:
        return None
    queries, gallery = _rows(held_out, _spread(rows, count)), _rows(training, _spread(range(len(training)), count))
    task = make_task(config, shards, queries)
    both = Manifest(queries.paths + gallery.paths, queries.labels + gallery.labels, queries.subsets + gallery.subsets)
    clips = ClipSet(shards, both, config.sampling, clips=1)
    sampler = EpochSampler(len(queries), size, rank(), world_size(), config.seed)
    every = runtime.watch_epochs or epochs_between(len(queries) + len(clips), videos, config.epochs)
    return HeldOut(task, sampler, clips, len(queries), every)


def affordable(videos: int, epochs: int) -> int:
    """Clips that can be looked at in `SHARE` of the time of so many epochs of so many videos."""
    return int(SHARE * epochs * videos / FORWARD)


def epochs_between(clips: int, videos: int, epochs: int) -> int:
    """Epochs from one look at so many clips to the next, that all looks are affordable; at most `epochs`, which is one
    look at the end, whatever it takes."""
    return math.ceil(epochs / max(affordable(videos, epochs) // clips, 1))


@torch.no_grad()
def accuracies(model: nn.Module, task: Task, batches: Iterable[Batch]) -> dict[str, float]:
    """The accuracies that a task has, such as context_accuracy, as means over the batches of all ranks.

    For a model in evaluation mode: dropout off, running statistics of batch norm.
    """
    device, found = next(model.parameters()).device, []
    for batch in batches:
        batch = {k: v.to(device, non_blocking=True) for k, v in batch.items()}
        _, parts = task.loss(model, task.inputs(batch), batch)
        found.append({name: value.float() for name, value in parts.items() if name.endswith("_accuracy")})
    return {name: float(values.mean()) for name, values in metrics.fetch(found).items()} if found[0] else {}


def _spread(rows: Iterable[int], count: int) -> list[int]:
    """At most so many of some rows, evenly spread: a manifest often goes class by class."""
    rows = list(rows)
    return [rows[i] for i in np.linspace(0, len(rows) - 1, min(count, len(rows))).round().astype(int)]


def _rows(manifest: Manifest, rows: list[int]) -> Manifest:
    paths, labels, subsets = (
        tuple(column[i] for i in rows) for column in (manifest.paths, manifest.labels, manifest.subsets)
    )
    return Manifest(paths, labels, subsets, manifest.classes)
