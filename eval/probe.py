"""Two questions to frozen features beside retrieval: the vote of nearest neighbours, and a linear classifier.

Both learn from the manifest's training videos and are asked about its test videos; nothing is chosen by the latter.
Legend: Q test videos, G training videos, C channels, K neighbours.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from eval import rows
from eval.features import Network, Run, protocol, sides
from eval.retrieve import labellings, neighbours
from preprocess.manifest import Manifest
from preprocess.shards import ShardSet
from train.config import Config

KS = tuple(range(1, 21))
SHOWN = (1, 5, 10, 20)
C = 1.0  # scikit-learn's; among 0.0001 ... 10 it did best on folds of training videos, or as well as the best
STEPS = 5000
VOTE = "k nearest training videos by cosine, a vote each; of classes with equal votes, that of the nearest video"
LINEAR = f"logistic regression on features standardised by the training videos, C = {C:g}"


@dataclass(frozen=True)
class Probe:
    """Percent of test videos recognised, for each labelling ('class', or 'context', 'motion' and 'both')."""

    queries: int
    gallery: int
    knn: dict[str, dict[int, float]]
    """By the number of neighbours that vote."""
    linear: dict[str, float]


def probe(
    run: Run,
    shards: ShardSet,
    manifest: Manifest,
    network: Network = "video",
    *,
    device: str = "auto",
    workers: int = 2,
) -> Probe:
    """k-NN and a linear probe of a run's features. ValueError where a video has no label, or one class is all."""
    test, train = sides(run, shards, manifest, network, device=device, workers=workers)
    (queries, query_labels, _), (gallery, gallery_labels, _) = test, train
    order = neighbours(queries, gallery, max(KS))
    knn: dict[str, dict[int, float]] = {}
    linear: dict[str, float] = {}
    for name, number in labellings(shards.classes).items():
        known, true = number[gallery_labels], number[query_labels]
        voted = vote(known[order])
        knn[name] = {k: _percent(guess == true) for k, guess in zip(KS, voted.T)}
        linear[name] = _percent(classify(gallery, known, queries) == true)
    return Probe(len(queries), len(gallery), knn, linear)


def vote(labels: np.ndarray) -> np.ndarray:
    """Labels of the neighbours, nearest first (Q, K) -> the class that the first k elect, for each k: (Q, K)."""
    queries, most = labels.shape
    every = np.arange(queries)
    votes = np.zeros((queries, labels.max() + 1), np.int64)
    first = np.full(votes.shape, most)  # place of a class's nearest video
    elected = np.empty_like(labels)
    for k in range(most):
        mine = labels[:, k]
        votes[every, mine] += 1
        first[every, mine] = np.minimum(first[every, mine], k)
        elected[:, k] = (votes * (most + 1) - first).argmax(1)
    return elected


def classify(features: np.ndarray, labels: np.ndarray, queries: np.ndarray) -> np.ndarray:
    """Classes of queries (Q, C) by a linear classifier of features (G, C) with labels (G,): (Q,)."""
    try:
        from sklearn.linear_model import LogisticRegression
        from sklearn.preprocessing import StandardScaler
    except ImportError as error:
        raise ValueError("the linear probe needs scikit-learn: pip install '.[eval]'") from error
    scale = StandardScaler().fit(features.astype(np.float64))
    model = LogisticRegression(C=C, max_iter=STEPS).fit(scale.transform(features.astype(np.float64)), labels)
    if model.n_iter_.max() >= STEPS:
        raise ValueError(f"the linear probe did not settle in {STEPS} steps: are the features sound?")
    return model.predict(scale.transform(queries.astype(np.float64)))


def found_rows(found: Probe, config: Config, network: Network) -> list[rows.Row]:
    """What the two result rows say beside where they come from (`rows.about`)."""
    common = {"network": network, "queries": found.queries, "gallery": found.gallery}
    how = protocol(config, network)
    votes = {f"{name} top-1 k={k}": v for name, values in found.knn.items() for k, v in values.items()}
    linear = {f"{name} top-1": value for name, value in found.linear.items()}
    return [
        common | {"kind": "knn", "metrics": votes, "protocol": f"{how}; {VOTE}"},
        common | {"kind": "linear", "metrics": linear, "protocol": f"{how}; {LINEAR}"},
    ]


def table(found: dict[str, Probe]) -> str:
    """Markdown: a row a run, for each labelling some votes and the linear probe, in percent."""
    first = next(iter(found.values()))
    shown = [k for k in SHOWN if k in next(iter(first.knn.values()))]
    heads = [f"{name} {how}" for name in first.knn for how in (*(f"k={k}" for k in shown), "linear")]
    lines = ["| | " + " | ".join(heads) + " |", "|---|" + "---:|" * len(heads)]
    for run, probes in found.items():
        values = [v for name in first.knn for v in (*(probes.knn[name][k] for k in shown), probes.linear[name])]
        lines.append(f"| {run} | " + " | ".join(f"{v:.1f}" for v in values) + " |")
    return "\n".join(lines)


def _percent(hits: np.ndarray) -> float:
    return 100 * float(hits.mean())
