"""Action recognition: the ten clips, the scores, what is counted, what is refused, what is drawn."""

from __future__ import annotations

import json
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from evaluating import CPU, Tiny, evaluate, options
from hypothesis import given
from hypothesis import strategies as st
from sklearn.metrics import confusion_matrix, top_k_accuracy_score
from torch import Tensor, nn

from eval import classify, features, figures
from eval.classify import Classification, top
from eval.results import Data
from preprocess.manifest import Manifest
from preprocess.shards import ShardSet
from train.trained import load_run


def random(classes: int, videos: int, seed: int = 0) -> Classification:
    rng = np.random.default_rng(seed)
    label = rng.integers(0, classes, videos)
    scores = rng.random((videos, classes)).astype(np.float32)
    scores[np.arange(videos), label] += rng.random(videos).astype(np.float32) > 0.5
    names = tuple(f"class {chr(97 + k % 26)}{k}" for k in range(classes))
    return Classification("videos", names, scores, label, "protocol")


# ---- counting


@given(st.integers(0, 1 << 30), st.integers(3, 12), st.integers(1, 60))
def test_counts_are_those_of_scikit_learn(seed: int, classes: int, videos: int) -> None:
    found = random(classes, videos, seed)
    every = np.arange(classes)
    for k in range(1, classes):
        expected = 100 * top_k_accuracy_score(found.label, found.scores, k=k, labels=every)
        assert top(found.scores, found.label, k) == pytest.approx(expected)
    expected = confusion_matrix(found.label, found.scores.argmax(1), labels=every)
    np.testing.assert_array_equal(found.confusion, expected)
    assert found.metrics["top-1"] == pytest.approx(100 * np.trace(expected) / videos)
    for k, accuracy in enumerate(found.per_class):
        mine = found.label == k
        assert (accuracy is None) == (not mine.any())
        if accuracy is not None:
            assert accuracy == pytest.approx(100 * (found.scores[mine].argmax(1) == k).mean())


def test_counts_by_hand() -> None:
    scores = np.array([[0.2, 0.5, 0.3], [0.1, 0.2, 0.7], [0.6, 0.3, 0.1], [0.4, 0.4, 0.2]], np.float32)
    found = Classification("three", ("a", "b", "c"), scores, np.array([2, 2, 0, 1]), "how")
    assert [top(found.scores, found.label, k) for k in (1, 2, 3)] == [50, 100, 100]  # of equal scores the first class
    assert found.confusion.tolist() == [[1, 0, 0], [1, 0, 0], [0, 1, 1]]
    assert found.per_class == [100, 0, 50]
    assert found.metrics == {"top-1": 50}  # three classes: no top-5
    assert set(random(5, 9).metrics) == {"top-1"} and set(random(6, 9).metrics) == {"top-1", "top-5"}
    assert found.markdown("mine").splitlines() == [
        "4 videos; how",
        "| class | videos | top-1 | most often taken for |", "|---|---:|---:|---|",
        "| a | 1 | 100.0 |  |", "| b | 1 | 0.0 | a (1) |", "| c | 2 | 50.0 | b (1) |",
        "mine, on three: top-1 50.0",
    ]  # fmt: skip
    alone = Classification("one", ("a", "b"), scores[:1, :2], np.array([1]), "how")
    assert alone.per_class == [None, 100] and "| a | 0 |  |  |" in alone.markdown("mine")


# ---- scores


class Brightness(nn.Module):
    """Stands for a FinetuningModel: scores 0 to 3 by four thresholds on the upper left pixel of the first frame."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[Tensor] = []

    def forward(self, x: Tensor) -> tuple[Tensor, None]:
        self.seen.append(x)
        return x[:, :1, 0, 0, 0] * torch.tensor([1.0, -2.0, 0.5, 3.0]), None


def test_softmax_scores_of_ten_clips_are_averaged(
    tiny: Tiny, labelled_run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data, stand_in = Data.open(*tiny), Brightness()
    monkeypatch.setattr(classify, "check", lambda *_: None)
    found = classify.measure(replace(load_run(labelled_run), model=stand_in), data, CPU)  # type: ignore[arg-type]
    clips = torch.cat(stand_in.seen)
    assert clips.shape == (8 * 10, 3, 8, 32, 32)
    first = clips[:, 0, 0, 0, 0].double().numpy().reshape(8, 10)
    logits = first[..., None] * np.array([1.0, -2.0, 0.5, 3.0])
    expected = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
    np.testing.assert_allclose(found.scores, expected.mean(1), atol=1e-6)
    assert not np.allclose(expected.mean(1), np.exp(logits.mean(1)) / np.exp(logits.mean(1)).sum(-1, keepdims=True))
    assert [found.classes[k] for k in found.label] == list(data.manifest.subset("test").labels)


def test_scores_do_not_depend_on_dropout_nor_on_the_batch(
    tiny: Tiny, labelled_run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def scores() -> np.ndarray:
        loaded = load_run(labelled_run, "epoch-0001")
        assert loaded.config.supervision.dropout > 0  # type: ignore[attr-defined]
        return classify.measure(loaded, Data.open(*tiny), CPU).scores

    first = scores()
    np.testing.assert_array_equal(scores(), first)
    np.testing.assert_allclose(first.sum(1), 1, atol=1e-5)
    monkeypatch.setattr(features, "VIDEOS_A_BATCH", 3)
    np.testing.assert_allclose(scores(), first, atol=1e-5)


# ---- what is refused


def test_what_cannot_be_scored_is_refused(
    tiny: Tiny, labelled_run: Path, joint_run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data, loaded = Data.open(*tiny), load_run(labelled_run)
    with pytest.raises(ValueError, match=r"no classifier.*--pretrained .*small.*python -m eval probe"):
        classify.measure(load_run(joint_run), data, CPU)
    loaded.model.classifier.weight.data.fill_(float("nan"))  # type: ignore[union-attr, operator]
    with pytest.raises(ValueError, match="not finite"):
        classify.measure(loaded, data, CPU)
    shards, rows = ShardSet(tiny[0]), data.manifest
    monkeypatch.setattr(shards, "label", np.full(20, -1, np.int32))
    with pytest.raises(ValueError, match="8 of 8 test videos have no label"):
        classify.measure(loaded, Data(shards, Manifest(rows.paths, ("",) * 20, rows.subsets), "nameless"), CPU)


def test_other_classes_are_named(labelled_run: Path) -> None:
    loaded = load_run(labelled_run)
    mine = ["a/left", "a/right", "b/left", "b/right"]
    classify.check(loaded, mine)
    for classes, message in (
        ([*mine, "c/left"], "only the shards have 'c/left'"),
        (mine[:3], "only the run has 'b/right'"),
        ([mine[1], mine[0], *mine[2:]], "number 0 is 'a/left' in the run, 'a/right' in the shards; number 1 is"),
        ([f"{k}/x" for k in range(9)], r"'a/left'; .* and 8 more\. Give the shards it was trained on"),
    ):
        with pytest.raises(ValueError, match=message):
            classify.check(loaded, classes)


# ---- the command and the picture


def test_the_command_stores_a_row_with_its_confusion(
    tiny: Tiny, labelled_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    picture = tmp_path / "new" / "confusion.png"
    kept = ["--weights", "epoch-0001", "--picture", picture]
    assert evaluate(monkeypatch, "classify", labelled_run, *options(tiny), *kept) == 0
    said = capsys.readouterr().out
    path = Path(said.split("stored in ")[1].strip())
    row = json.loads(path.read_text())
    assert path.parent == labelled_run / "results" and path.name.startswith("classification-")
    assert (row["kind"], row["network"], row["weights"], row["epoch"]) == ("classification", "video", "epoch-0001", 1)
    counts = np.array(row["confusion"])
    assert row["classes"] == ["a/left", "a/right", "b/left", "b/right"] and counts.sum(1).tolist() == [2, 2, 2, 2]
    assert row["metrics"] == {"top-1": pytest.approx(100 * np.trace(counts) / 8)}
    assert row["per_class"] == pytest.approx(50.0 * np.diag(counts)) and row["videos"] == 8
    assert said.startswith("8 videos; 10 evenly spread clips")
    assert f"small-scratch, epoch-0001, epoch 1, on split: top-1 {row['metrics']['top-1']:.1f}" in said
    assert picture.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"


@pytest.mark.parametrize("classes", [2, 5, 101])
def test_every_class_has_its_name_and_shade_in_the_picture(classes: int) -> None:
    found = random(classes, 40 * classes)
    counts = found.confusion
    counts[0] = 0  # a class without test videos
    figure = figures.confusion(found.classes, counts, "title")
    figure.canvas.draw()
    axes = figure.axes[0]
    assert [t.get_text() for t in axes.get_yticklabels()] == list(found.classes)
    shown = np.ma.filled(axes.get_images()[0].get_array(), np.nan)
    assert np.isnan(shown[0]).all()
    np.testing.assert_allclose(shown[1:], 100 * counts[1:] / counts[1:].sum(1, keepdims=True))
    # Legible: a line of its own for each name, inside the picture, and no name under another.
    boxes = [t.get_window_extent() for t in axes.get_yticklabels()]
    assert min(b.x0 for b in boxes) >= 0 and max(b.y1 for b in boxes) <= figure.bbox.height
    assert all(below.y1 <= above.y0 + 1 for above, below in pairwise(boxes))
    written = {tuple(map(round, t.get_position()[::-1])): int(t.get_text()) for t in axes.texts}
    assert written == ({place: counts[place] for place in zip(*counts.nonzero())} if classes <= 20 else {})
