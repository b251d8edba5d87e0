"""Accuracy of the pretext tasks on test videos: context matching and motion prediction (table 7)."""

from __future__ import annotations

from dataclasses import dataclass

from tqdm import tqdm

from eval.features import AUTO, Machine, Run
from eval.results import Data, Row
from train.config import Finetuning, Pretraining
from train.data import EpochSampler
from train.device import channels_last, choose_device
from train.heldout import accuracies
from train.loader import explaining_workers, make_loader
from train.tasks import make_task

ASKED = {
    "context accuracy": "a clip's own I-frame among those of the batch",
    "motion accuracy": "a motion point's own among those of the batch and of the further windows, or where vectors are "
    "classified its class",
    "contrast accuracy": "the other clip of a video among those of the batch",
}
"""What ranks candidates."""


@dataclass(frozen=True)
class Pretext:
    metrics: dict[str, float]
    """'context accuracy' and 'motion accuracy' in percent; only those that the run's objective ranks."""
    videos: int
    """Videos seen."""
    left: int
    """Videos that did not fill a batch."""
    batch: int
    """Videos a batch, which are the candidates: the run's number, or as many as there are."""
    left_out: str
    """How many videos the task does not take, and why."""

    @property
    def protocol(self) -> str:
        asked = "; ".join(f"{name}: {ASKED[name]}" for name in self.metrics if name in ASKED)
        return (
            f"one epoch over the test videos ({self.left_out}) in batches of {self.batch}, clips, crops and colours "
            f"drawn as in training, dropout off, running statistics of batch norm{asked and '; ' + asked}"
        )

    def records(self) -> list[Row]:
        about = {"kind": "pretext", "network": "video", "videos": self.videos, "protocol": self.protocol}
        return [about | {"metrics": self.metrics}]

    def markdown(self, title: str) -> str:
        lines = [f"{self.videos} test videos, {self.left} left over; {self.protocol}", title]
        return "\n".join([*lines, *(f"{name} {value:.1f} %" for name, value in self.metrics.items())])


@explaining_workers()
def measure(run: Run, data: Data, machine: Machine = AUTO) -> Pretext:
    """One epoch of the run's own task over the test videos, without learning.

    Clips, crops and colours are drawn as in training, and batches are as large, since the accuracy depends on how many
    candidates there are; dropout is off, and batch norm uses its running statistics. ValueError where the run has no
    such task, or there is one test video.
    """
    if isinstance(run.config, Finetuning):
        raise ValueError(f"{run.folder} was trained with labels: pretext tasks are those of a pretraining run")
    where = choose_device(machine.device)
    task = make_task(run.config, data.shards, data.manifest.subset("test"))
    o = run.config.objective if isinstance(run.config, Pretraining) else None
    if o and (o.alpha, o.motion_loss) == (1, "mse"):
        raise ValueError(f"{run.folder} ({run.recipe}) regresses motion vectors, which has no accuracy")
    model = run.model.to(where).eval()
    channels_last(model)
    size = min(run.config.batch_size, len(task.data))
    if size < 2:
        raise ValueError("one test video has nothing to be told from: name a manifest with more test rows")
    sampler = EpochSampler(len(task.data), size, seed=run.config.seed)
    loader = make_loader(task.data, machine.workers, where, batch_sampler=sampler)
    batches = tqdm(loader, unit="batch", desc="pretext tasks", disable=None, leave=False)
    metrics = {name.replace("_", " "): 100 * share for name, share in accuracies(model, task, batches).items()}
    left_out = f"{task.left_out}, {task.data.failed} failed in stage 1"
    return Pretext(metrics, sampler.steps * size, sampler.dropped, size, left_out)
