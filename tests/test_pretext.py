"""Pretext accuracies on test videos: those of the run's own networks, by a matching that is written out here."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import tiny_config
from evaluating import CPU, Tiny, evaluate, options
from torch import Tensor, nn

from eval import features, pretext
from eval.results import Data
from preprocess.manifest import Manifest
from train import data
from train.config import Objective
from train.model import PretrainingModel
from train.tasks import PretrainingTask


def untrained(folder: Path, recipe: str = "small", **changes: object) -> features.Run:
    config = tiny_config(recipe, batch_size=4, **changes)
    torch.manual_seed(0)
    return features.Run(folder, config, recipe, "initial", 0.0, PretrainingModel(config))


def test_accuracies_are_those_of_a_matching_by_hand(
    tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = untrained(tmp_path)
    kept: list[tuple[Tensor, Tensor, tuple[Tensor, ...]]] = []
    forward = PretrainingModel.forward

    def recording(self: nn.Module, *inputs: Tensor):
        assert not self.training and not any(m.training for m in self.modules())
        found = forward(self, *inputs)  # type: ignore[arg-type]
        kept.append(found)  # type: ignore[arg-type]
        return found

    monkeypatch.setattr(PretrainingModel, "forward", recording)
    found = pretext.measure(run, Data.open(*tiny), CPU)
    assert len(kept) == 2 and (found.videos, found.left) == (8, 0)
    right: dict[str, list[bool]] = {"context accuracy": [], "motion accuracy": []}
    for clips, iframes, (predicted, targets, negatives) in kept:
        for name, rows, keys in (
            ("context accuracy", clips, iframes),
            ("motion accuracy", predicted, torch.cat((targets, negatives))),
        ):
            for number, row in enumerate(rows):
                right[name].append(int(np.argmax([float(row @ key) for key in keys])) == number)
    assert found.metrics == pytest.approx({name: 100 * np.mean(hits) for name, hits in right.items()})


def test_samples_are_drawn_as_in_training_with_the_seed_of_the_run(
    tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, opened = untrained(tmp_path, seed=5), Data.open(*tiny)
    seen: list[dict[str, Tensor]] = []
    inputs = PretrainingTask.inputs
    monkeypatch.setattr(PretrainingTask, "inputs", lambda task, batch: seen.append(batch) or inputs(task, batch))
    assert pretext.measure(run, opened, CPU) == pretext.measure(run, opened, CPU)
    order = np.random.default_rng([5, 0]).permutation(8)
    assert [batch["index"].tolist() for batch in seen] == [order[:4].tolist(), order[4:].tolist()] * 2
    c = run.config
    samples = data.PretrainSet(opened.shards, opened.manifest.subset("test"), replace(c, seed=5))
    for batch in seen[:2]:
        for place, index in enumerate(batch["index"].tolist()):
            sample = samples[0, index]
            for key in ("clip", "clip_box", "clip_photo", "iframe", "iframe_box", "motion", "motion_box"):
                np.testing.assert_array_equal(batch[key][place], sample[key])


def test_only_what_the_objective_ranks_has_an_accuracy(tiny: Tiny, tmp_path: Path) -> None:
    opened = Data.open(*tiny)
    for alpha, name in ((0.0, "context accuracy"), (1.0, "motion accuracy")):
        alone = untrained(tmp_path, objective=Objective(alpha=alpha))
        found = pretext.measure(alone, opened, CPU)
        assert list(found.metrics) == [name] and ("I-frame" in found.protocol) == (alpha == 0)
    regressing = untrained(tmp_path, objective=Objective(alpha=1.0, motion_loss="mse"))
    with pytest.raises(ValueError, match="regresses motion vectors"):
        pretext.measure(regressing, opened, CPU)
    labelled = replace(regressing, config=tiny_config("small-scratch"))
    with pytest.raises(ValueError, match="was trained with labels"):
        pretext.measure(labelled, opened, CPU)


def test_videos_that_do_not_fill_a_batch_are_a_smaller_one(tiny: Tiny, tmp_path: Path) -> None:
    opened, run = Data.open(*tiny), untrained(tmp_path)
    small, whole = (
        pretext.measure(replace(run, config=run.config.changed({"batch_size": size})), opened, CPU) for size in (9, 8)
    )
    assert small == whole and (small.videos, small.left, small.batch) == (8, 0, 8)
    rows = opened.manifest
    one = rows.subsets.index("test")
    alone = Data(opened.shards, Manifest((rows.paths[one],), (rows.labels[one],), ("test",)), "one")
    with pytest.raises(ValueError, match="one test video has nothing to be told from"):
        pretext.measure(run, alone, CPU)


def test_the_command_stores_a_row(
    tiny: Tiny, joint_run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert evaluate(monkeypatch, "pretext", joint_run, *options(tiny)) == 0
    said = capsys.readouterr().out
    row = json.loads(Path(said.split("stored in ")[1].strip()).read_text())
    assert (row["kind"], row["epoch"], row["weights"], row["videos"]) == ("pretext", 1, "last", 8)
    assert set(row["metrics"]) == {"context accuracy", "motion accuracy"} and "batches of 4" in row["protocol"]
    assert "test videos (0 too short, 0 failed in stage 1)" in row["protocol"] and "own I-frame" in row["protocol"]
    assert f"context accuracy {row['metrics']['context accuracy']:.1f} %" in said and row["protocol"] in said
