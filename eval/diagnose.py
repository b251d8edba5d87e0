"""How much context and how much motion a network knows, on the embedded scenes, where neither tells the other.

Test clips query the training clips, and a nearest neighbour is right by context, by motion, or by both. Then the same
queries altered in time, against the gallery as it is:

| queries | what a network that sees motion does | what one that sees only scenes does |
|---|---|---|
| reversed | finds the opposite motion | finds what it found |
| frozen to the middle frame | loses the motion | finds what it found |
| frames shuffled | loses the motion | finds what it found |

Legend: V videos, N clips, T frames, S pixels.
"""

from __future__ import annotations

import importlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from eval import figures
from eval.features import AUTO, CLIPS, Machine, Run, View, over_clips, part, pooled, unchanged
from eval.features import protocol as features_protocol
from eval.results import Data, Foreign, Row, number_table
from eval.retrieve import chance, labellings, nearest
from train.config import Pretraining
from train.data import ClipSet
from train.draws import Sampling

# What a clip played backwards shows.
OPPOSITES = {
    "rightward": "leftward",
    "leftward": "rightward",
    "upward": "downward",
    "downward": "upward",
    "clockwise": "anticlockwise",
    "anticlockwise": "clockwise",
    "appearing": "vanishing",
    "vanishing": "appearing",
}
SIGMAS = 3.0  # standard errors by which two shares must differ to count as different
SEED = 0  # of the shuffled frames
COLOURS = ("#2166ac", "#e08214", "#b2abd2", "#7fbf7b")
TICKS = {"context": "same context", "motion": "same motion", "both": "both", "opposite": "opposite motion"}


def backwards(clips: Tensor, _: Tensor) -> Tensor:
    return clips.flip(2)


def frozen(clips: Tensor, _: Tensor) -> Tensor:
    """The middle frame T // 2 throughout."""
    t = clips.shape[2] // 2
    return clips[:, :, t : t + 1].expand_as(clips)


def shuffled(clips: Tensor, index: Tensor) -> Tensor:
    """Frames in an order of each clip's own, a function of its video's row."""
    videos = []
    for video, i in zip(clips, index.tolist()):
        n, t = video.shape[:2]
        order = np.random.default_rng([SEED, i]).permuted(np.tile(np.arange(t), (n, 1)), axis=1)  # (N, T)
        videos.append(video[torch.arange(n)[:, None], torch.from_numpy(order)])
    return torch.stack(videos)


VIEWS: dict[str, View] = {"as it is": unchanged, "reversed": backwards, "frozen": frozen, "shuffled": shuffled}


@dataclass(frozen=True)
class Diagnosis:
    """Shares of the queries, in percent."""

    queries: int
    gallery: int
    shares: dict[str, dict[str, float]]
    """For each of VIEWS, how many nearest neighbours have the query's 'context', 'motion', 'both', and, where the
    motions come in pairs, the 'opposite' motion."""
    chance: dict[str, float]
    """The same for a neighbour drawn at random."""
    protocol: str = ""

    @property
    def metrics(self) -> dict[str, float]:
        return {
            f"{name} R@1" + ("" if view == "as it is" else f" {view}"): value
            for view, shares in self.shares.items()
            for name, value in shares.items()
        }

    def records(self) -> list[Row]:
        about = {"kind": "diagnosis", "network": "video", "queries": self.queries, "gallery": self.gallery}
        by_chance = {metric: self.chance[metric.split()[0]] for metric in self.metrics}
        return [about | {"metrics": self.metrics, "chance": by_chance, "protocol": self.protocol}]

    def markdown(self, title: str) -> str:
        """A line a view, a column a share; the last line is chance; then what the numbers say."""
        lines = [f"{self.queries} queries, {self.gallery} in the gallery; {self.protocol}"]
        lines += [f"nearest neighbours of {title}, in percent:"]
        lines += [number_table({**self.shares, "chance": self.chance}, "queries"), verdict(self)]
        return "\n".join(lines)

    def draw(self, title: str, out: Path) -> Path:
        """The shares as bars, a group a question and a bar a view, with dashes at chance."""
        with figures.drawing() as Figure:
            figure = Figure(figsize=(6.4, 3.4), dpi=150, layout="constrained")
            axes = figure.subplots()
            wide, questions = 0.2, list(self.chance)  # of a bar, where a group is 1
            for place, ((view, shares), colour) in enumerate(zip(self.shares.items(), COLOURS)):
                middle = [group + (place - 1.5) * wide for group in range(len(questions))]
                bars = axes.bar(middle, [shares[q] for q in questions], wide * 0.92, color=colour, label=view)
                axes.bar_label(bars, fmt="%.0f", size=6.5, padding=1)
            for group, question in enumerate(questions):
                label = "chance" if group == 0 else "_"  # one entry in the legend
                ends = (group - 0.45, group + 0.45)
                axes.hlines(self.chance[question], *ends, figures.INK, "dashed", linewidth=1, label=label)
            axes.set_xticks(range(len(questions)), [TICKS[q] for q in questions], size=8)
            axes.set_ylim(0, 130)  # the legend lies above the highest bar
            axes.set_yticks(range(0, 101, 20))
            axes.set_ylabel("nearest neighbours, %", size=8)
            axes.tick_params(axis="y", labelsize=7)
            axes.spines[["top", "right"]].set_visible(False)
            axes.legend(title="queries", fontsize=7, title_fontsize=7, frameon=False, ncols=5, loc="upper right")
            axes.set_title(f"{title}: {summary(self)}", size=8, loc="left", wrap=True)
            return figures.save_png(figure, out)

    def above_chance(self, name: str, view: str = "as it is") -> bool:
        return self.shares[view][name] > self.limit(name)

    def limit(self, name: str) -> float:
        """How far luck may carry a share, in percent: `SIGMAS` standard errors above chance."""
        return self.chance[name] + SIGMAS * _error(self.chance[name], self.queries)

    def knows(self, name: str) -> bool:
        """Whether a share lies above chance; that of motion, also above what is found in frozen clips, which have none.
        What single frames tell of it, by accident or by a leak, is not motion."""
        share, still = self.shares["as it is"][name], self.shares["frozen"][name]
        moves = share - still > SIGMAS * math.hypot(_error(share, self.queries), _error(still, self.queries))
        return self.above_chance(name) and (name == "context" or moves)

    def loses(self, name: str, view: str) -> str:
        """What becomes of knowledge under an altered view: 'yes', it is at chance; 'in part', less than half of what
        lay above chance is left; else 'no'."""
        if not self.above_chance(name, view):
            return "yes"
        left, had = (self.shares[v][name] - self.chance[name] for v in (view, "as it is"))
        return "in part" if left < had / 2 else "no"

    def turns(self) -> bool:
        """Whether reversed queries find the opposite motion more often than their own, beyond chance: of the queries
        that find one of the two, each would find either as often if the network did not know which way time runs."""
        own, opposite = (self.queries * self.shares["reversed"][name] / 100 for name in ("motion", "opposite"))
        return opposite - own > SIGMAS * math.sqrt(opposite + own)


def measure(run: Run | Foreign, data: Data, machine: Machine = AUTO) -> Diagnosis:
    """Retrieval of altered test clips by features of a network, pooled and averaged over a video's clips.

    A foreign network takes normalised clips float32 (N, 3, T, S, S) and gives (N, C) or maps (N, C, t, h, w).
    ValueError where the labels are not context/motion, or a clip has too few frames to be altered.
    """
    shards, config = data.shards, run.config
    if "motion" not in labellings(shards.classes):
        raise ValueError(
            f"{shards.folder} is not labelled context/motion (but {', '.join(shards.classes[:3])}, …): a diagnosis "
            "needs the embedded scenes. `make scenes` makes them, as demo_out/shards and demo_out/scenes/manifest.csv"
        )
    if config.sampling.frames < 3:
        raise ValueError(f"clips of {config.sampling.frames} frames have no order to alter; choose 3 or more")
    sides = {name: ClipSet(shards, data.manifest.subset(name), config.sampling, CLIPS) for name in ("test", "train")}
    for name, side in sides.items():
        if (side.label < 0).any():
            raise ValueError(f"some {name} videos have no label: leave them out of the manifest")
    network, failed = part(run, "video"), sum(side.failed for side in sides.values())
    (gallery,) = over_clips(network, sides["train"], config, vectors, machine=machine)
    altered = over_clips(network, sides["test"], config, vectors, tuple(VIEWS.values()), machine)
    found = {view: nearest(queries, gallery, 1)[:, 0] for view, queries in zip(VIEWS, altered)}
    return count(found, sides["test"].label, sides["train"].label, shards.classes, protocol(run, failed))


def count(
    found: Mapping[str, np.ndarray], query: np.ndarray, gallery: np.ndarray, classes: Sequence[str], how: str = ""
) -> Diagnosis:
    """From each query's nearest gallery row (V,) under each view, and the class numbers of both, to shares."""
    numbers = labellings(classes)
    motions = [c.split("/")[1] for c in classes]
    wanted = {name: number[query] for name, number in numbers.items()}  # (Q,), what a neighbour must have to be right
    there = {name: number[gallery] for name, number in numbers.items()}  # (G,), what it has
    if all(OPPOSITES.get(motion) in motions for motion in motions):
        against = np.array([motions.index(OPPOSITES[motion]) for motion in motions])
        wanted["opposite"], there["opposite"] = numbers["motion"][against[query]], there["motion"]
    shares = {
        view: {name: 100 * float((wanted[name] == there[name][rows]).mean()) for name in wanted}
        for view, rows in found.items()
    }
    by_chance = {name: chance(wanted[name], there[name]) for name in wanted}
    return Diagnosis(len(query), len(gallery), shares, by_chance, how)


def vectors(outputs: object) -> Tensor:
    """What a network gives, (N, C) or maps (N, C, t, h, w) -> float32 (N, C)."""
    if not isinstance(outputs, Tensor) or outputs.ndim not in (2, 5):
        what = f"a tensor of shape {tuple(outputs.shape)}" if isinstance(outputs, Tensor) else type(outputs).__name__
        raise ValueError(f"the network gives {what}; it must give features (N, C) or maps (N, C, t, h, w)")
    if outputs.shape[1] == 0:
        raise ValueError("the network gives features of no numbers")
    return outputs.float() if outputs.ndim == 2 else pooled(outputs)


def load_module(
    name: str, out: Path | None = None, frames: int | None = None, stride: int | None = None, size: int | None = None
) -> Foreign:
    """The network of 'package.module:factory', built by factory(), and tried on two black clips: of 16 frames, stride 1
    and 112 pixels, unless told otherwise.

    ValueError saying what to mend where it cannot be imported, is no nn.Module, or does not take or give what it must.
    """
    t, step, side = (usual if given is None else given for usual, given in ((16, frames), (1, stride), (112, size)))
    config = Pretraining(sampling=Sampling(frames=t, stride=step), size=side)
    path, _, factory = name.partition(":")
    if not path or not factory:
        raise ValueError(f"--module is {name!r}; give package.module:factory, a callable that returns an nn.Module")
    try:
        found = importlib.import_module(path)
    except (Exception, SystemExit) as error:  # a user's code may raise anything
        raise ValueError(
            f"{path} cannot be imported ({type(error).__name__}: {error}): run from the folder that holds it, or put "
            "that folder into PYTHONPATH"
        ) from error
    make = getattr(found, factory, None)
    if not callable(make):
        raise ValueError(f"{path} has no callable {factory!r}; give a function or class that returns an nn.Module")
    try:
        module = make()
    except (Exception, SystemExit) as error:
        raise ValueError(f"{name}() raised {type(error).__name__}: {error}; it is called without arguments") from error
    if not isinstance(module, nn.Module):
        raise ValueError(f"{name}() returned {type(module).__name__}; it must return an nn.Module")
    shape = (2, 3, t, side, side)
    try:
        with torch.inference_mode():
            outputs = module.eval()(torch.zeros(shape))
    except (Exception, SystemExit) as error:
        raise ValueError(
            f"{name} raised {type(error).__name__} for clips {shape}: {error}; --frames and --size change the shape"
        ) from error
    if len(features := vectors(outputs)) != shape[0]:
        raise ValueError(f"{name} gives features {tuple(features.shape)} for {shape[0]} clips; each clip needs its own")
    return Foreign(out, config, name, module)


def protocol(run: Run | Foreign, failed: int = 0) -> str:
    """How the shares are made, in one sentence; it is printed and stored with them."""
    name = "a network given" if isinstance(run, Foreign) else ""
    middle = run.config.sampling.frames // 2
    return (
        f"{features_protocol(run.config, 'video', failed, name)}; R@1 of test queries among the training videos; "
        f"queries as they are, reversed, frozen to frame {middle} of the clip, and with each clip's frames shuffled "
        f"(seed {SEED}), against the gallery as it is"
    )


def verdict(found: Diagnosis) -> str:
    """What the numbers say, a line a finding and a last one in plain words."""
    shares, chance = found.shares, found.chance
    as_it_is = shares["as it is"]

    def change(name: str, view: str) -> str:
        return f"{found.loses(name, view)} ({as_it_is[name]:.1f} -> {shares[view][name]:.1f})"

    lines = []
    for name in ("context", "motion"):
        against = f"chance {chance[name]:.1f}, which luck may raise to {found.limit(name):.1f}"
        still = f"; frozen clips, which have none: {shares['frozen'][name]:.1f}" if name == "motion" else ""
        lines.append(f"knows {name}: {_yes(found.knows(name))} ({as_it_is[name]:.1f}; {against}{still})")
    if found.knows("context"):
        lines.append(f"loses context when frozen: {change('context', 'frozen')}")
    if found.knows("motion"):
        lines += [f"loses motion when {view}: {change('motion', view)}" for view in ("frozen", "shuffled")]
        if "opposite" in chance:
            own, opposite = (shares["reversed"][n] for n in ("motion", "opposite"))
            lines.append(
                f"knows which way time runs: {_yes(found.turns())} (reversed, {opposite:.1f} find the opposite motion "
                f"and {own:.1f} their own)"
            )
    alone = as_it_is["context"] * chance["motion"] / 100, as_it_is["motion"] * chance["context"] / 100
    lines.append(
        f"both at once: {as_it_is['both']:.1f}, where its context alone would give {alone[0]:.1f} and its motion alone "
        f"{alone[1]:.1f}"
    )
    return "\n".join([*lines, f"In short: {summary(found)}"])


def summary(found: Diagnosis) -> str:
    if found.above_chance("motion") and found.loses("motion", "frozen") == "no" and not found.knows("motion"):
        return "it tells motions by single frames: frozen clips have no motion, and it finds theirs as well"
    return {
        (False, False): "it knows neither scenes nor motion",
        (True, False): "it sees scenes, and no motion",
        (False, True): "it sees motion, and no scenes",
        (True, True): "it knows scenes and motion",
    }[found.knows("context"), found.knows("motion")]


def _error(share: float, count: int) -> float:
    """Standard error of a share, both in percent, counted on `count` queries."""
    return math.sqrt(share * (100 - share) / count)


def _yes(value: bool) -> str:
    return "yes" if value else "no"
