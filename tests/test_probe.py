"""Probes of frozen features: votes of neighbours and a linear classifier, against scikit-learn and plain loops."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from evaluating import CPU, Tiny, evaluate, options
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.neighbors import KNeighborsClassifier

from eval import features, probe
from eval.results import Data
from eval.retrieve import nearest
from train.trained import load_run


def elect(labels: list[int]) -> int:
    """The class with the most votes; of equal ones, that which comes first."""
    return max(labels, key=lambda c: (labels.count(c), -labels.index(c)))


@given(st.lists(st.lists(st.integers(0, 4), min_size=7, max_size=7), min_size=1, max_size=9))
def test_votes_are_those_of_a_loop(labels: list[list[int]]) -> None:
    expected = [[elect(line[: k + 1]) for k in range(7)] for line in labels]
    assert probe.vote(np.array(labels)).tolist() == expected


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 1 << 30))
def test_clear_votes_are_those_of_scikit_learn(seed: int) -> None:
    rng = np.random.default_rng(seed)
    gallery, labels, queries = rng.standard_normal((60, 5)), rng.integers(0, 2, 60), rng.standard_normal((9, 5))
    order = nearest(queries, gallery, 9)
    voted = probe.vote(labels[order])
    for k in (1, 3, 5, 7, 9):  # two classes, odd numbers: never a tie
        other = KNeighborsClassifier(k, metric="cosine", algorithm="brute").fit(gallery, labels)
        np.testing.assert_array_equal(voted[:, k - 1], other.predict(queries))


def logistic(x: np.ndarray, y: np.ndarray, queries: np.ndarray, c: float) -> np.ndarray:
    """Multinomial logistic regression by plain gradient descent, L2 on the weights, none on the bias."""
    mean, std = x.mean(0), x.std(0)
    x, queries = (x - mean) / std, (queries - mean) / std
    truth = np.eye(y.max() + 1)[y]
    w, b = np.zeros((x.shape[1], truth.shape[1])), np.zeros(truth.shape[1])
    for _ in range(20000):
        scores = np.exp(x @ w + b)
        wrong = scores / scores.sum(1, keepdims=True) - truth
        w, b = w - 2e-3 * (c * x.T @ wrong + w), b - 2e-3 * c * wrong.sum(0)
    return (queries @ w + b).argmax(1)


def test_the_linear_probe_is_logistic_regression_on_standardised_features() -> None:
    rng = np.random.default_rng(0)
    labels = np.tile([0, 1, 2], 30)
    centres = np.array([[0, 0, 0, 0], [1.5, 0, 0, 0], [0, 150, 0, 0]])
    x = centres[labels] + rng.standard_normal((90, 4)) * [1, 100, 1, 1]  # scales that only standardising makes equal
    queries = rng.standard_normal((400, 4)) * [2, 200, 2, 2]
    found = probe.linear_classifier(x.astype(np.float32), labels, queries.astype(np.float32))
    expected = logistic(x, labels, queries, c=1.0)
    assert (found == expected).mean() > 0.99
    assert (logistic(x, labels, queries, c=0.001) == expected).mean() < 0.97  # the strength is part of it
    assert len(np.unique(found)) == 3


def test_features_that_cannot_be_told_apart_score_the_commonest_class() -> None:
    x = np.ones((10, 3), np.float32)
    assert set(probe.linear_classifier(x, np.array([0] * 3 + [1] * 7), x)) == {1}
    with pytest.raises(ValueError, match="class"):
        probe.linear_classifier(x, np.zeros(10, int), x)


def test_a_run_is_probed_in_every_labelling(tiny: Tiny, joint_run: Path) -> None:
    loaded, data = load_run(joint_run), Data.open(*tiny)
    found = probe.measure(loaded, data, machine=CPU)
    x = {s: features.video_features(loaded, data.subset(s), machine=CPU).vectors for s in ("train", "test")}
    unit = {s: f / np.linalg.norm(f, axis=1, keepdims=True) for s, f in x.items()}
    order = np.argsort(-unit["test"] @ unit["train"].T, axis=1, kind="stable")
    for name, part in {"context": slice(0, 1), "motion": slice(1, 2), "both": slice(0, 2)}.items():
        labels = {s: ["/".join(t.split("/")[part]) for t in data.subset(s).manifest.labels] for s in ("train", "test")}
        names = sorted(set(labels["train"]))
        train, test = ([names.index(t) for t in labels[s]] for s in ("train", "test"))
        for k in (1, 4, 12):
            hits = [elect([train[g] for g in line[:k]]) == true for line, true in zip(order, test)]
            assert found.knn[name][k] == pytest.approx(100 * np.mean(hits))
        assert list(found.knn[name]) == list(range(1, 13))  # twelve training videos
        guess = probe.linear_classifier(x["train"], np.array(train), x["test"])
        assert found.linear[name] == pytest.approx(100 * np.mean(guess == test))


def test_the_command_stores_two_rows_a_run(
    tiny: Tiny, joint_run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert evaluate(monkeypatch, "probe", joint_run, *options(tiny), "--weights", "initial") == 0
    said = capsys.readouterr().out
    rows = [json.loads(Path(line.split()[-1]).read_text()) for line in said.splitlines() if "stored in" in line]
    assert [(r["kind"], r["network"], r["weights"]) for r in rows] == [
        (k, "video", "initial") for k in ("knn", "linear")
    ]
    assert len(rows[0]["metrics"]) == 3 * 12
    assert set(rows[1]["metrics"]) == {"context top-1", "motion top-1", "both top-1"}
    shown = [rows[0]["metrics"][f"both top-1 k={k}"] for k in (1, 5, 10)] + [rows[1]["metrics"]["both top-1"]]
    assert f"| {joint_run} | " in said and "| " + " | ".join(f"{v:.1f}" for v in shown) + " |\n" in said
    assert "of classes with equal votes" in rows[0]["protocol"] and "C = 1" in rows[1]["protocol"]
    assert said.startswith(
        "8 queries, 12 in the gallery; V-Network, the map that both tasks share, 10 evenly spread clips"
    )
    assert "| by chance | 50.0 | 50.0 | 50.0 | 50.0 |" in said
    assert evaluate(monkeypatch, "probe", *options(tiny)) == 1
    assert "give the folders of one or more runs" in capsys.readouterr().err
