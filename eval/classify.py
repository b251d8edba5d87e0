"""Action recognition: top-1 and top-5 by the 10-clip test (paper section 4.1, 'finetuning settings'; tables 2, 3, 6).

Legend: V test videos, K classes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from eval import figures
from eval.features import AUTO, CLIPS, Machine, Run, dropped, over_clips
from eval.results import Data, Row
from train import runs
from train.config import Config
from train.data import ClipSet
from train.model import FinetuningModel

KS = (1, 5)
NAMED = 5  # differences named in an error


@dataclass(frozen=True)
class Classification:
    """What a network takes the test videos for."""

    dataset: str
    classes: tuple[str, ...]
    scores: np.ndarray
    """Softmax scores averaged over a video's clips, float32 (V, K)."""
    label: np.ndarray
    """True class numbers, int (V,)."""
    protocol: str

    @property
    def metrics(self) -> dict[str, float]:
        """Percent; top-5 only where there are more than five classes."""
        ks = [k for k in KS if k == 1 or k < len(self.classes)]
        return {f"top-{k}": top(self.scores, self.label, k) for k in ks}

    @property
    def confusion(self) -> np.ndarray:
        """Videos by true class (row) and the class they are taken for (column), int64 (K, K)."""
        k = len(self.classes)
        return np.bincount(self.label * k + order(self.scores)[:, 0], minlength=k * k).reshape(k, k)

    @property
    def per_class(self) -> list[float | None]:
        """Percent of each class's videos that are recognised; None for a class without test videos."""
        counts = self.confusion
        return [100 * int(row[k]) / int(row.sum()) if row.sum() else None for k, row in enumerate(counts)]

    def records(self) -> list[Row]:
        about = {"kind": "classification", "network": "video", "videos": len(self.label), "protocol": self.protocol}
        kept = {"classes": list(self.classes), "confusion": self.confusion.tolist(), "per_class": self.per_class}
        return [about | {"metrics": self.metrics} | kept]

    def markdown(self, title: str) -> str:
        """A line a class with its videos, its accuracy and what it is most often taken for."""
        lines = [f"{len(self.label)} videos; {self.protocol}"]
        lines += ["| class | videos | top-1 | most often taken for |", "|---|---:|---:|---|"]
        for k, (name, counts, accuracy) in enumerate(zip(self.classes, self.confusion, self.per_class)):
            wrong = np.where(np.arange(len(counts)) == k, 0, counts)
            other = f"{self.classes[int(wrong.argmax())]} ({wrong.max()})" if wrong.any() else ""
            lines.append(f"| {name} | {counts.sum()} | {'' if accuracy is None else f'{accuracy:.1f}'} | {other} |")
        return "\n".join([*lines, self._heading(title)])

    def draw(self, title: str, out: Path) -> Path:
        return figures.save_png(figures.confusion(self.classes, self.confusion, self._heading(title)), out)

    def _heading(self, title: str) -> str:
        numbers = ", ".join(f"{name} {value:.1f}" for name, value in self.metrics.items())
        return f"{title}, on {self.dataset}: {numbers}"


def measure(run: Run, data: Data, machine: Machine = AUTO) -> Classification:
    """The test videos, by a run trained with labels. ValueError where it was not, or had other classes."""
    check(run, data.shards.classes)
    clip_set = ClipSet(data.shards, data.manifest.subset("test"), run.config.sampling, CLIPS)
    if unlabelled := int((clip_set.label < 0).sum()):
        raise ValueError(f"{unlabelled} of {len(clip_set)} test videos have no label: leave them out of the manifest")
    (scores,) = over_clips(run.model, clip_set, run.config, softmax, machine=machine)
    return Classification(
        data.name, tuple(data.shards.classes), scores, clip_set.label, protocol(run.config, clip_set.failed)
    )


def softmax(outputs: tuple[Tensor, Any]) -> Tensor:
    """What a FinetuningModel returns -> softmax scores (N, K)."""
    return outputs[0].softmax(1)


def order(scores: np.ndarray) -> np.ndarray:
    """Classes by falling score, int64 (V, K); of equal ones the first."""
    return np.argsort(-scores, axis=1, kind="stable")


def top(scores: np.ndarray, label: np.ndarray, k: int) -> float:
    """Percent of videos whose class is among the k highest scores."""
    return 100 * float((order(scores)[:, :k] == label[:, None]).any(1).mean())


def check(run: Run, classes: Sequence[str]) -> None:
    """ValueError where a run has no classifier, or one for other classes or in another order than these."""
    if not isinstance(run.model, FinetuningModel):
        raise ValueError(
            f"{run.folder} was pretrained and has no classifier. Train one on it: python -m train finetune-… "
            f"--pretrained {run.folder} (python -m train --list names the recipes); or evaluate its features: "
            "python -m eval retrieve, python -m eval probe"
        )
    mine = runs.read(run.folder)["classes"]
    if list(classes) == mine:
        return
    differing = [f"only the run has {c!r}" for c in mine if c not in classes]
    differing += [f"only the shards have {c!r}" for c in classes if c not in mine]
    differing = differing or [
        f"number {n} is {a!r} in the run, {b!r} in the shards" for n, (a, b) in enumerate(zip(mine, classes)) if a != b
    ]
    more = f" and {len(differing) - NAMED} more" if len(differing) > NAMED else ""
    raise ValueError(
        f"{run.folder} was trained on other classes than these shards hold: {'; '.join(differing[:NAMED])}{more}. "
        "Give the shards it was trained on, or shards made from a manifest of the same classes"
    )


def protocol(config: Config, failed: int = 0) -> str:
    """How the scores are made, in one sentence; it is printed and stored with every number."""
    s, size = config.sampling, config.size
    return (
        f"{CLIPS} evenly spread clips a video ({s.frames} frames at stride {s.stride}), short side "
        f"{round(size * 128 / 112)}, centre {size}, softmax scores averaged over the clips, no augmentation, "
        f"{dropped(failed)}"
    )
