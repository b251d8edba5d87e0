"""Video retrieval: test videos query the training videos; a hit has the query's class among its k nearest (table 9)."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TypeVar

import numpy as np

from eval import neighbours
from eval.features import AUTO, Machine, Network, Run, protocol, sides
from eval.results import Data, Row, number_table, protocols, text_table

T = TypeVar("T")
KS = (1, 5, 10, 20)
RESAMPLES = 2000
SEED = 0  # of the resamples
# What names of clips of one recording differ in: UCF101's _c02 after _g03, HMDB51's _f_cm_np1_ba_goo_3.
CLIP = re.compile(r"(?:(?<=_g\d\d)_c\d+|_[fhlu]_[cn]m_np\d+_(?:ba|fr|le|ri)_(?:bad|med|goo)_\d+)\.\w+$")


@dataclass(frozen=True)
class Retrieval(neighbours.Nearest):
    """Neighbours of every query, and the recalls they give."""

    network: Network
    hit: dict[str, dict[int, np.ndarray]]
    """For each of `labellings` and k, whether one of a query's own is among its k nearest, bool (Q,)."""
    chance: dict[str, dict[int, float]]
    """The recalls of neighbours drawn at random, in percent."""
    group: np.ndarray
    """The recording, numbered from 0, that each query was cut from, int64 (Q,)."""
    protocol: str

    @property
    def groups(self) -> int:
        return int(self.group.max()) + 1

    @cached_property
    def recalls(self) -> dict[str, dict[int, float]]:
        """R@k in percent."""
        return {name: {k: 100 * float(hit.mean()) for k, hit in of.items()} for name, of in self.hit.items()}

    @cached_property
    def errors(self) -> dict[str, dict[int, float]]:
        """Their standard errors."""
        return {name: {k: standard_error(hit, self.group) for k, hit in of.items()} for name, of in self.hit.items()}

    def records(self) -> list[Row]:
        sizes = {"queries": len(self.query), "groups": self.groups, "gallery": len(self.gallery)}
        about = {"kind": "retrieval", "network": self.network, "protocol": self.protocol}
        percent = {"metrics": self.recalls, "errors": self.errors, "chance": self.chance}
        return [about | sizes | {key: named(of) for key, of in percent.items()}]

    def markdown(self, title: str) -> str:
        return compared({title: self}, KS)

    def draw(self, title: str, out: Path) -> Path:
        return neighbours.draw({title: self}, out)


def measure(run: Run, data: Data, network: Network = "video", machine: Machine = AUTO) -> Retrieval:
    """Test videos query the training videos, by the protocol of `eval.features.protocol`.

    A k that reaches the size of the gallery is left out: everything is found there.
    """
    test, train = sides(run, data, network, machine)
    ks = [k for k in KS if k == 1 or k < len(train.label)]
    order = nearest(test.vectors, train.vectors, max(ks))
    labelled = {name: (of[test.label], of[train.label]) for name, of in labellings(data.shards.classes).items()}
    found = {name: hits(order, *labels) for name, labels in labelled.items()}
    hit = {name: {k: of[:, k - 1] for k in ks} for name, of in found.items()}
    by_chance = {name: {k: chance(*labels, k) for k in ks} for name, labels in labelled.items()}
    group = groups([data.shards.paths[v] for v in test.video])
    how = protocol(run.config, network, test.failed + train.failed)
    return Retrieval(data, test.video, train.video, order, network, hit, by_chance, group, how)


def compared(found: Mapping[str, Retrieval], ks: Sequence[int] = (1,), against: str = "") -> str:
    """Markdown: the recalls of some networks, a line each, with their protocols, chance, and the largest standard
    errors; then what the others differ in from the one called `against`, with the standard error of that.

    Clips that are hard for one network are hard for another, so that a difference is known better than its two recalls.
    """
    first = next(iter(found.values()))
    how = f"{len(first.query)} queries, {len(first.gallery)} in the gallery; {protocols(found)}"
    lines = {title: named(retrieval.recalls, ks) for title, retrieval in found.items()}
    lines["by chance"] = named(first.chance, ks)
    errors = [named(retrieval.errors, ks) for retrieval in found.values()]
    what = f"{'largest ' * (len(found) > 1)}standard error, {first.groups} groups resampled"
    lines[what] = {head: max(of[head] for of in errors) for head in errors[0]}
    text = f"{how}\n{number_table(lines)}"
    if not against:
        return text
    base = found[against]
    more = {title: named(beyond(other, base), ks) for title, other in found.items() if title != against}
    signed = {
        title: {head: f"{by:+.1f} ± {error:.1f}" for head, (by, error) in line.items()} for title, line in more.items()
    }
    return f"{text}\n\n{text_table(signed, f'less {against}')}"


def beyond(one: Retrieval, other: Retrieval) -> dict[str, dict[int, tuple[float, float]]]:
    """For each labelling and k, R@k of `one` less that of `other`, and the standard error of this difference.

    Both are of the same queries, since the same videos of their data can be read.
    """
    assert np.array_equal(one.query, other.query)

    def difference(a: np.ndarray, b: np.ndarray) -> tuple[float, float]:
        more = a.astype(int) - b
        return 100 * float(more.mean()), standard_error(more, one.group)

    return {name: {k: difference(hit, other.hit[name][k]) for k, hit in of.items()} for name, of in one.hit.items()}


def named(recalls: Mapping[str, Mapping[int, T]], ks: Sequence[int] = KS) -> dict[str, T]:
    """What rows and tables call recalls."""
    return {f"{name} R@{k}": of[k] for name, of in recalls.items() for k in ks if k in of}


def folder_names(folders: Sequence[Path]) -> list[str]:
    """What tables and pictures call some runs: their folders' names where these differ, else their paths."""
    short = [folder.resolve().name for folder in folders]
    return [str(folder.resolve()) for folder in folders] if len({*short, "untrained"}) <= len(folders) else short


def nearest(queries: np.ndarray, gallery: np.ndarray, k: int) -> np.ndarray:
    """Rows of gallery (G, C) by falling cosine with each of queries (Q, C): int64 (Q, min(k, G)); ties by row."""
    q = queries / np.maximum(np.linalg.norm(queries, axis=1, keepdims=True), 1e-12)
    g = gallery / np.maximum(np.linalg.norm(gallery, axis=1, keepdims=True), 1e-12)
    return np.argsort(-(q @ g.T), axis=1, kind="stable")[:, :k]


def hits(order: np.ndarray, query_labels: np.ndarray, gallery_labels: np.ndarray) -> np.ndarray:
    """Whether one of a query's own label is among the first k of `order` (Q, K), for k = 1 ... K: bool (Q, K)."""
    return np.logical_or.accumulate(gallery_labels[order] == query_labels[:, None], axis=1)


def groups(paths: Sequence[str]) -> np.ndarray:
    """The number of the recording that each video was cut from, int64 (Q,), by the names of UCF101 and HMDB51.

    v_Archery_g03_c02.avi is of group 3 of Archery; HMDB51's clips of one film and action have one name before what
    describes the clip. The official splits take none of these groups apart. Any other video is a group of its own.
    """
    return np.unique([CLIP.sub("", path) for path in paths], return_inverse=True)[1]


def standard_error(hit: np.ndarray, group: np.ndarray) -> float:
    """Of the share of queries that `hit` (bool (Q,), or the difference of two), in percent: its deviation where whole
    groups (Q,), numbered from 0, are drawn anew with replacement. Clips of a group are alike, and tell less than as
    many clips apart. A single group gives 0, for nothing can be said."""
    found, clips = np.bincount(group, hit), np.bincount(group)  # (G,)
    rng = np.random.default_rng(SEED)
    draws = (rng.integers(len(clips), size=len(clips)) for _ in range(RESAMPLES))  # one at a time: G may be 20,000
    return 100 * float(np.std([found[drawn].sum() / clips[drawn].sum() for drawn in draws]))


def chance(query_labels: np.ndarray, gallery_labels: np.ndarray, k: int = 1) -> float:
    """R@k in percent of k neighbours drawn at random, each at most once."""
    others = (query_labels[:, None] != gallery_labels).sum(1, keepdims=True)  # (Q, 1)
    drawn = np.arange(k)
    missed = (np.maximum(others - drawn, 0) / (len(gallery_labels) - drawn)).prod(1)  # (Q,), all k are others
    return 100 * float(1 - missed.mean())


def labellings(classes: Sequence[str]) -> dict[str, np.ndarray]:
    """For each way of scoring, the number that stands for each class: 'class', or of labels of the form context/motion
    'context', 'motion' and 'both'."""
    every = np.arange(len(classes))
    if not classes or any(c.count("/") != 1 for c in classes):
        return {"class": every}
    parts = zip(("context", "motion"), zip(*(c.split("/") for c in classes)))
    return {name: np.unique(of, return_inverse=True)[1] for name, of in parts} | {"both": every}
