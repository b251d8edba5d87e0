"""Probes of frozen features: votes of neighbours and a linear classifier, against scikit-learn and plain loops."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import ROOT, tiny_config
from hypothesis import given, settings
from hypothesis import strategies as st
from running import RUNTIME, Tiny
from sklearn.neighbors import KNeighborsClassifier

from eval import __main__ as command
from eval import features, probe
from preprocess.manifest import Manifest
from preprocess.shards import ShardSet
from train.loop import train
from train.runs import Origin
from train.trained import load_run


@pytest.fixture(scope="module")
def run(tiny: Tiny, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("probed") / "context"
    config = tiny_config("small-context", batch_size=12, epochs=1)
    train(config, RUNTIME, tiny[0], Manifest.read(tiny[1]).subset("train"), out, Origin("small-context", "split"))
    return out


def elect(labels: list[int]) -> int:
    """The class with the most votes; of equal ones, that which comes first."""
    return max(labels, key=lambda c: (labels.count(c), -labels.index(c)))


@given(st.lists(st.lists(st.integers(0, 4), min_size=7, max_size=7), min_size=1, max_size=9))
def test_votes_are_those_of_a_loop(labels: list[list[int]]) -> None:
    expected = [[elect(line[: k + 1]) for k in range(7)] for line in labels]
    assert probe.vote(np.array(labels)).tolist() == expected


def test_votes_by_hand() -> None:
    assert probe.vote(np.array([[2, 0, 0, 2, 1, 1, 1]])).tolist() == [[2, 2, 0, 2, 2, 2, 1]]


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 1 << 30))
def test_clear_votes_are_those_of_scikit_learn(seed: int) -> None:
    rng = np.random.default_rng(seed)
    gallery, labels, queries = rng.standard_normal((60, 5)), rng.integers(0, 2, 60), rng.standard_normal((9, 5))
    order = probe.neighbours(queries, gallery, 9)
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
    found = probe.classify(x.astype(np.float32), labels, queries.astype(np.float32))
    expected = logistic(x, labels, queries, c=1.0)
    assert (found == expected).mean() > 0.99
    assert (logistic(x, labels, queries, c=0.001) == expected).mean() < 0.97  # the strength is part of it
    assert len(np.unique(found)) == 3


def test_features_that_cannot_be_told_apart_score_the_commonest_class() -> None:
    x = np.ones((10, 3), np.float32)
    assert set(probe.classify(x, np.array([0] * 3 + [1] * 7), x)) == {1}
    with pytest.raises(ValueError, match="class"):
        probe.classify(x, np.zeros(10, int), x)


def test_a_run_is_probed_in_every_labelling(tiny: Tiny, run: Path) -> None:
    table, shards = Manifest.read(tiny[1]), ShardSet(tiny[0])
    loaded = load_run(run)
    found = probe.probe(loaded, shards, table, device="cpu", workers=0)
    x = {
        s: features.video_features(loaded, shards, table.subset(s), device="cpu", workers=0)[0]
        for s in ("train", "test")
    }
    for name, part in {"context": slice(0, 1), "motion": slice(1, 2), "both": slice(0, 2)}.items():
        labels = {s: ["/".join(t.split("/")[part]) for t in table.subset(s).labels] for s in ("train", "test")}
        unit = {s: f / np.linalg.norm(f, axis=1, keepdims=True) for s, f in x.items()}
        order = np.argsort(-unit["test"] @ unit["train"].T, axis=1, kind="stable")
        for k in (1, 4, 12):
            numbers = [[labels["train"][g] for g in line[:k]] for line in order]
            hits = [elect(n) == true for n, true in zip(numbers, labels["test"])]  # type: ignore[arg-type]
            assert found.knn[name][k] == pytest.approx(100 * np.mean(hits))
        assert list(found.knn[name]) == list(range(1, 13))  # twelve training videos
        names = sorted(set(labels["train"]))
        guess = probe.classify(x["train"], np.array([names.index(t) for t in labels["train"]]), x["test"])
        assert found.linear[name] == pytest.approx(100 * np.mean([names[g] for g in guess] == np.array(labels["test"])))


def test_videos_without_labels_cannot_be_probed(tiny: Tiny, run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    nameless = np.zeros((4, 2), np.float32), np.array([0, -1, 0, 0]), np.arange(4)
    monkeypatch.setattr(features, "video_features", lambda *_, **__: nameless)
    with pytest.raises(ValueError, match="need labels"):
        probe.probe(load_run(run), ShardSet(tiny[0]), Manifest.read(tiny[1]))


def test_the_command_stores_two_rows_a_run(tiny: Tiny, run: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    options = ["--shards", tiny[0], "--manifest", tiny[1], "--device", "cpu", "--workers", "0"]
    monkeypatch.setattr(sys, "argv", ["python -m eval", "probe", str(run), *map(str, options), "--weights", "initial"])
    monkeypatch.chdir(ROOT)
    assert command.main() == 0
    said = capsys.readouterr().out
    rows = [json.loads(Path(line.split()[-1]).read_text()) for line in said.splitlines() if "stored in" in line]
    assert [(r["kind"], r["network"], r["weights"]) for r in rows] == [
        (k, "video", "initial") for k in ("knn", "linear")
    ]
    assert len(rows[0]["metrics"]) == 3 * 12
    assert set(rows[1]["metrics"]) == {"context top-1", "motion top-1", "both top-1"}
    shown = [rows[0]["metrics"][f"both top-1 k={k}"] for k in (1, 5, 10)] + [rows[1]["metrics"]["both top-1"]]
    assert "| " + " | ".join(f"{v:.1f}" for v in shown) + " |\n" in said
    assert "of classes with equal votes" in rows[0]["protocol"] and "C = 1" in rows[1]["protocol"]
    assert "chance: context 50.0, motion 50.0, both 25.0" in said
    monkeypatch.setattr(sys, "argv", ["python -m eval", "probe", *map(str, options)])
    assert command.main() == 1
    assert "give the folders of one or more runs" in capsys.readouterr().err
