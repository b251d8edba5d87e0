"""Video retrieval: test videos query the training videos; a hit has the query's class among its k nearest (table 9)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from eval.features import AUTO, Machine, Network, Run, protocol, sides
from eval.results import Data, Row, number_table

KS = (1, 5, 10, 20)


@dataclass(frozen=True)
class Retrieval:
    """Neighbours of every query, and the recalls they give."""

    data: Data
    network: Network
    query: np.ndarray
    """Positions of the queries in the shard set, int64 (Q,)."""
    gallery: np.ndarray
    """Positions of the gallery, int64 (G,)."""
    order: np.ndarray
    """Gallery rows by falling similarity, int64 (Q, k)."""
    recalls: dict[str, dict[int, float]]
    """For each of `labellings` its R@k in percent."""
    chance: dict[str, dict[int, float]]
    """The same of neighbours drawn at random."""
    protocol: str

    def records(self) -> list[Row]:
        sizes = {"queries": len(self.query), "gallery": len(self.gallery)}
        about = {"kind": "retrieval", "network": self.network, "protocol": self.protocol}
        return [about | sizes | {"metrics": named(self.recalls), "chance": named(self.chance)}]

    def markdown(self, title: str) -> str:
        return compared({title: self}, KS)

    def draw(self, title: str, out: Path) -> Path:
        from eval import neighbours

        return neighbours.draw({title: self}, out)


def measure(
    run: Run, data: Data, network: Network = "video", machine: Machine = AUTO, ks: Sequence[int] = KS
) -> Retrieval:
    """Test videos query the training videos, by the protocol of `eval.features.protocol`.

    A k that reaches the size of the gallery is left out: everything is found there.
    """
    test, train = sides(run, data, network, machine)
    ks = [k for k in ks if k == 1 or k < len(train.label)]
    order = nearest(test.vectors, train.vectors, max(ks))
    labelled = {name: (of[test.label], of[train.label]) for name, of in labellings(data.shards.classes).items()}
    recalls = {name: {k: recall(order, *labels, k) for k in ks} for name, labels in labelled.items()}
    by_chance = {name: {k: chance(*labels, k) for k in ks} for name, labels in labelled.items()}
    how = protocol(run.config, network, test.failed + train.failed)
    return Retrieval(data, network, test.video, train.video, order, recalls, by_chance, how)


def compared(found: Mapping[str, Retrieval], ks: Sequence[int] = (1,)) -> str:
    """Markdown: the recalls of some networks, a line each, with the protocol of the first, and chance."""
    first = next(iter(found.values()))
    how = f"{len(first.query)} queries, {len(first.gallery)} in the gallery; {first.protocol}"
    lines = {title: named(retrieval.recalls, ks) for title, retrieval in found.items()}
    return f"{how}\n{number_table(lines | {'by chance': named(first.chance, ks)})}"


def named(recalls: Mapping[str, Mapping[int, float]], ks: Sequence[int] = KS) -> dict[str, float]:
    """What rows and tables call recalls."""
    return {f"{name} R@{k}": of[k] for name, of in recalls.items() for k in ks if k in of}


def folder_names(folders: Sequence[Path]) -> list[str]:
    """What tables and pictures call some runs: their folders' names where these differ, else their paths."""
    short = [folder.resolve().name for folder in folders]
    return [str(folder) for folder in folders] if len({*short, "untrained"}) <= len(folders) else short


def nearest(queries: np.ndarray, gallery: np.ndarray, k: int) -> np.ndarray:
    """Rows of gallery (G, C) by falling cosine with each of queries (Q, C): int64 (Q, min(k, G)); ties by row."""
    q = queries / np.maximum(np.linalg.norm(queries, axis=1, keepdims=True), 1e-12)
    g = gallery / np.maximum(np.linalg.norm(gallery, axis=1, keepdims=True), 1e-12)
    return np.argsort(-(q @ g.T), axis=1, kind="stable")[:, :k]


def recall(order: np.ndarray, query_labels: np.ndarray, gallery_labels: np.ndarray, k: int) -> float:
    """R@k in percent: the share of queries with one of their own label among the first k of `order` (Q, >= k)."""
    hits = gallery_labels[order[:, :k]] == query_labels[:, None]
    return 100 * float(hits.any(1).mean())


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
