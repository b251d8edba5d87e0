"""Video retrieval: test videos query the training videos; a hit has the query's class among its k nearest (table 9)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from eval import rows
from eval.features import CLIPS, Network, Run, protocol, sides
from preprocess.manifest import Manifest
from preprocess.shards import ShardSet
from train.config import Config

KS = (1, 5, 10, 20)


@dataclass(frozen=True)
class Retrieval:
    """Neighbours of every query, and the recalls they give."""

    query: np.ndarray
    """Shard-set positions of the queries, int64 (Q,)."""
    gallery: np.ndarray
    """Shard-set positions of the gallery, int64 (G,)."""
    order: np.ndarray
    """Gallery rows by falling similarity, int64 (Q, k)."""
    recalls: dict[str, dict[int, float]]
    """For each labelling its R@k in percent; 'class', and for labels of the form context/motion each part too."""


def names(folders: Sequence[Path]) -> list[str]:
    """What tables and pictures call some runs: their folders' names where these differ, else their paths."""
    short = [folder.resolve().name for folder in folders]
    return [str(folder) for folder in folders] if len({*short, "untrained"}) <= len(folders) else short


def neighbours(queries: np.ndarray, gallery: np.ndarray, k: int) -> np.ndarray:
    """Rows of gallery (G, C) by falling cosine with each of queries (Q, C): int64 (Q, min(k, G)); ties by row."""
    q = queries / np.maximum(np.linalg.norm(queries, axis=1, keepdims=True), 1e-12)
    g = gallery / np.maximum(np.linalg.norm(gallery, axis=1, keepdims=True), 1e-12)
    return np.argsort(-(q @ g.T), axis=1, kind="stable")[:, :k]


def recall(order: np.ndarray, query_labels: np.ndarray, gallery_labels: np.ndarray, k: int) -> float:
    """R@k in percent: the share of queries with one of their own label among the first k of `order` (Q, >= k)."""
    hits = gallery_labels[order[:, :k]] == query_labels[:, None]
    return 100 * float(hits.any(1).mean())


def labellings(classes: Sequence[str]) -> dict[str, np.ndarray]:
    """For each way of scoring, the number that stands for each class; context/motion labels are scored three times."""
    names = {"class": np.arange(len(classes))}
    if classes and all(c.count("/") == 1 for c in classes):
        contexts, motions = zip(*(c.split("/") for c in classes))
        parts = {"context": contexts, "motion": motions}
        names = {k: np.unique(v, return_inverse=True)[1] for k, v in parts.items()} | {"both": names["class"]}
    return names


def retrieve(
    run: Run,
    shards: ShardSet,
    manifest: Manifest,
    network: Network = "video",
    *,
    device: str = "auto",
    workers: int = 2,
    ks: Sequence[int] = KS,
) -> Retrieval:
    """Test rows of the manifest query its train rows, by the protocol of `eval.features.protocol`."""
    test, train = sides(run, shards, manifest, network, device=device, workers=workers)
    (queries, query_labels, query), (gallery, gallery_labels, places) = test, train
    order = neighbours(queries, gallery, max(ks))
    recalls = {
        name: {k: recall(order, number[query_labels], number[gallery_labels], k) for k in ks}
        for name, number in labellings(shards.classes).items()
    }
    return Retrieval(query, places, order, recalls)


def row(found: Retrieval, config: Config, network: Network) -> rows.Row:
    """What a result row says beside where it comes from (`rows.about`)."""
    return {
        "kind": "retrieval",
        "network": network,
        "queries": len(found.query),
        "gallery": len(found.gallery),
        "metrics": {f"{name} R@{k}": v for name, values in found.recalls.items() for k, v in values.items()},
        "protocol": protocol(config, network, CLIPS),
    }


def table(found: dict[str, dict[str, dict[int, float]]], ks: Sequence[int]) -> str:
    """Markdown: a row a run, a column a labelling and k; recalls in percent."""
    first = next(iter(found.values()))
    heads = [f"{name} R@{k}" for name in first for k in ks]
    lines = ["| | " + " | ".join(heads) + " |", "|---|" + "---|" * len(heads)]
    for run, recalls in found.items():
        lines.append(f"| {run} | " + " | ".join(f"{recalls[n][k]:.1f}" for n in first for k in ks) + " |")
    return "\n".join(lines)


def chance(shards: ShardSet, manifest: Manifest) -> dict[str, float]:
    """R@1 in percent of a neighbour drawn at random from the gallery, for each labelling."""
    known = {path: v for v, path in enumerate(shards.paths)}
    labels = {
        subset: shards.label[[known[p] for p in manifest.subset(subset).paths if p in known]]
        for subset in ("test", "train")
    }
    return {
        name: 100 * float((number[labels["test"]][:, None] == number[labels["train"]]).mean())
        for name, number in labellings(shards.classes).items()
    }
