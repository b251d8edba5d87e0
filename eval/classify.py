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

from eval import rows
from eval.features import CLIPS, Run, over_clips
from preprocess.files import replacing
from preprocess.manifest import Manifest
from preprocess.shards import ShardSet
from train import runs
from train.config import Config
from train.data import ClipSet
from train.model import FinetuningModel

KS = (1, 5)
NUMBERED = 20  # classes up to which a confusion picture has its counts written into it
KEY = "row: true class; column: taken for; shade: share of the row's videos"
NAMED = 5  # differences named in an error


@dataclass(frozen=True)
class Classification:
    """What a network takes the test videos for."""

    classes: tuple[str, ...]
    scores: np.ndarray
    """Softmax scores averaged over a video's clips, float32 (V, K)."""
    label: np.ndarray
    """True class numbers, int (V,)."""

    @property
    def metrics(self) -> dict[str, float]:
        """Percent; top-5 only where there are five classes."""
        ks = [k for k in KS if k <= len(self.classes)]
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


def order(scores: np.ndarray) -> np.ndarray:
    """Classes by falling score, int64 (V, K); of equal ones the first."""
    return np.argsort(-scores, axis=1, kind="stable")


def top(scores: np.ndarray, label: np.ndarray, k: int) -> float:
    """Percent of videos whose class is among the k highest scores."""
    return 100 * float((order(scores)[:, :k] == label[:, None]).any(1).mean())


def classify(
    run: Run, shards: ShardSet, manifest: Manifest, *, device: str = "auto", workers: int = 2
) -> Classification:
    """The manifest's test videos, by a run trained with labels. ValueError where it was not, or had other classes."""
    check(run, shards.classes)
    data = ClipSet(shards, manifest.subset("test"), run.config.sampling, CLIPS)
    if unlabelled := int((data.label < 0).sum()):
        raise ValueError(f"{unlabelled} of {len(data)} test videos have no label: leave them out of the manifest")
    (scores,) = over_clips(run.model, data, run.config, softmax, device=device, workers=workers)
    return Classification(tuple(shards.classes), scores, data.label)


def softmax(outputs: tuple[Tensor, Any]) -> Tensor:
    """What a FinetuningModel returns -> softmax scores (N, K)."""
    return outputs[0].softmax(1)


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
    only = [(f"only the run has {c!r}", c in classes) for c in mine] + [
        (f"only the shards have {c!r}", c in mine) for c in classes
    ]
    differing = [text for text, common in only if not common] or [
        f"number {n} is {a!r} in the run, {b!r} in the shards" for n, (a, b) in enumerate(zip(mine, classes)) if a != b
    ]
    more = f" and {len(differing) - NAMED} more" if len(differing) > NAMED else ""
    raise ValueError(
        f"{run.folder} was trained on other classes than these shards hold: {'; '.join(differing[:NAMED])}{more}. "
        "Give the shards it was trained on, or shards made from a manifest of the same classes"
    )


def protocol(config: Config) -> str:
    """How the scores are made, in one sentence; it is printed and stored with every number."""
    s, size = config.sampling, config.size
    return (
        f"{CLIPS} evenly spread clips a video ({s.frames} frames at stride {s.stride}), short side "
        f"{round(size * 128 / 112)}, centre {size}, softmax scores averaged over the clips, no augmentation, "
        "no video dropped"
    )


def row(found: Classification, config: Config) -> rows.Row:
    """What a result row says beside where it comes from (`rows.about`)."""
    return {
        "kind": "classification",
        "network": "video",
        "videos": len(found.label),
        "metrics": found.metrics,
        "protocol": protocol(config),
        "classes": list(found.classes),
        "confusion": found.confusion.tolist(),
        "per_class": found.per_class,
    }


def table(found: Classification) -> str:
    """Markdown: a row a class with its videos, its accuracy and what it is most often taken for."""
    lines = ["| class | videos | top-1 | most often taken for |", "|---|---:|---:|---|"]
    for k, (name, counts, accuracy) in enumerate(zip(found.classes, found.confusion, found.per_class)):
        wrong = np.where(np.arange(len(counts)) == k, 0, counts)
        other = f"{found.classes[int(wrong.argmax())]} ({wrong.max()})" if wrong.any() else ""
        lines.append(f"| {name} | {counts.sum()} | {'' if accuracy is None else f'{accuracy:.1f}'} | {other} |")
    return "\n".join(lines)


def draw(found: Classification, title: str, out: Path) -> Path:
    """The confusion matrix as a PNG: a row a true class, shades the share of its videos, counts where they fit."""
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ValueError("the picture needs matplotlib: pip install '.[eval]'") from error
    counts, names = found.confusion, found.classes
    k, total = len(names), found.confusion.sum(1, keepdims=True)
    share = np.where(total, 100 * counts / np.maximum(total, 1), np.nan)
    cell, letters = (0.5, 9.0) if k <= NUMBERED else (0.115, 6.0)  # inches, points
    margin = 0.6 + max(map(len, names)) * letters * 0.6 / 72  # room for the longest name
    side = margin + cell * k
    figure = Figure(figsize=(max(side + 0.9, 4.5), side + 0.4), dpi=150)
    wide, high = figure.get_size_inches()
    axes = figure.add_axes((margin / wide, 0.1 / high, cell * k / wide, cell * k / high))
    axes.set_facecolor("#dddddd")  # shows through where a class has no test video
    image = axes.imshow(share, cmap="Blues", vmin=0, vmax=100, interpolation="nearest")
    ticks = list(range(k))
    axes.set_xticks(ticks, names, rotation=90, size=letters)
    axes.set_yticks(ticks, names, size=letters)
    axes.tick_params(length=0, top=True, labeltop=True, bottom=False, labelbottom=False)
    if k <= NUMBERED:
        for row, column in zip(*np.nonzero(counts)):
            colour = "white" if share[row, column] > 55 else "black"
            axes.text(column, row, str(counts[row, column]), ha="center", va="center", size=9, color=colour)
    bar = figure.add_axes(((margin + cell * k + 0.15) / wide, 0.1 / high, 0.12 / wide, cell * k / high))
    figure.colorbar(image, cax=bar).ax.tick_params(labelsize=7)
    bar.set_title("%", size=8)
    figure.text(0.08 / wide, 1 - 0.06 / high, f"{title}\n{KEY}", size=8, va="top")
    with replacing(out) as partial:
        figure.savefig(partial, format="png")
    return out
