"""Two questions to frozen features beside retrieval: the vote of nearest neighbours, and a linear classifier.

Both learn from the manifest's training videos and are asked about its test videos; nothing is chosen by the latter.
Legend: Q test videos, G training videos, C channels, K neighbours.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from eval.features import AUTO, Machine, Network, Run, protocol, sides
from eval.results import Data, Row, number_table, protocols
from eval.retrieve import chance, labellings, nearest

KS = tuple(range(1, 21))
SHOWN = (1, 5, 10, 20)
C = 1.0  # scikit-learn's; among 0.0001 ... 10 it did best on folds of training videos, or as well as the best
STEPS = 5000
VOTE = "k nearest training videos by cosine, a vote each; of classes with equal votes, that of the nearest video"
LINEAR = f"logistic regression on features standardised by the training videos, C = {C:g}"


@dataclass(frozen=True)
class Probe:
    """Percent of test videos recognised, for each of `retrieve.labellings`."""

    queries: int
    gallery: int
    network: Network
    knn: dict[str, dict[int, float]]
    """By the number of neighbours that vote."""
    linear: dict[str, float]
    chance: dict[str, float]
    protocol: str

    def records(self) -> list[Row]:
        """A row for the votes and one for the linear probe."""
        common = {"network": self.network, "queries": self.queries, "gallery": self.gallery}
        votes = {f"{name} top-1 k={k}": v for name, by_k in self.knn.items() for k, v in by_k.items()}
        linear = {f"{name} top-1": value for name, value in self.linear.items()}
        return [
            common | {"kind": "knn", "metrics": votes, "protocol": f"{self.protocol}; {VOTE}"},
            common | {"kind": "linear", "metrics": linear, "protocol": f"{self.protocol}; {LINEAR}"},
        ]

    def markdown(self, title: str) -> str:
        return compared({title: self})


def measure(run: Run, data: Data, network: Network = "video", machine: Machine = AUTO) -> Probe:
    """k-NN and a linear probe of a run's features. ValueError where a video has no label, or one class is all."""
    test, train = sides(run, data, network, machine)
    how = protocol(run.config, network, test.failed + train.failed)
    order = nearest(test.vectors, train.vectors, max(KS))
    knn: dict[str, dict[int, float]] = {}
    linear, by_chance = {}, {}
    for name, number in labellings(data.shards.classes).items():
        known, true = number[train.label], number[test.label]
        knn[name] = {k: 100 * float((guess == true).mean()) for k, guess in zip(KS, vote(known[order]).T)}
        linear[name] = 100 * float((linear_classifier(train.vectors, known, test.vectors) == true).mean())
        by_chance[name] = chance(true, known)
    return Probe(len(test.label), len(train.label), network, knn, linear, by_chance, how)


def compared(found: Mapping[str, Probe]) -> str:
    """Markdown: a line a network, for each labelling some votes and the linear probe, in percent."""
    first = next(iter(found.values()))
    lines = {title: _shown(probe) for title, probe in found.items()}
    by_chance = {head: first.chance[head.split()[0]] for head in next(iter(lines.values()))}
    about = f"{first.queries} queries, {first.gallery} in the gallery; {protocols(found)}"
    how = f"{about}\nk=: {VOTE}\nlinear: {LINEAR}"
    return f"{how}\n{number_table(lines | {'by chance': by_chance})}"


def _shown(probe: Probe) -> dict[str, float]:
    found: dict[str, float] = {}
    for name, by_k in probe.knn.items():
        found |= {f"{name} k={k}": by_k[k] for k in SHOWN if k in by_k} | {f"{name} linear": probe.linear[name]}
    return found


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


def linear_classifier(vectors: np.ndarray, labels: np.ndarray, queries: np.ndarray) -> np.ndarray:
    """Classes (Q,) that a linear classifier of vectors (G, C) with labels (G,) gives to queries (Q, C)."""
    try:
        from sklearn.linear_model import LogisticRegression
        from sklearn.preprocessing import StandardScaler
    except ImportError as error:
        raise ValueError("the linear probe needs scikit-learn: pip install '.[eval]'") from error
    scale = StandardScaler().fit(vectors.astype(np.float64))
    model = LogisticRegression(C=C, max_iter=STEPS).fit(scale.transform(vectors.astype(np.float64)), labels)
    if model.n_iter_.max() >= STEPS:
        raise ValueError(f"the linear probe did not settle in {STEPS} steps: are the features sound?")
    return model.predict(scale.transform(queries.astype(np.float64)))
