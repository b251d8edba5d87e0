"""Pretext accuracies on test videos: those of the run's own networks, by a matching that is written out here."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import tiny_config
from torch import Tensor, nn

from eval import __main__ as command
from eval import features, pretext
from preprocess.manifest import Manifest
from preprocess.shards import ShardSet
from train import loop
from train.config import Objective, Runtime
from train.model import PretrainingModel
from train.runs import Origin

Tiny = tuple[Path, Path]


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
    found = pretext.pretext(run, ShardSet(tiny[0]), Manifest.read(tiny[1]), device="cpu", workers=0)
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


def test_the_same_run_gives_the_same_accuracies_and_only_those_it_has(tiny: Tiny, tmp_path: Path) -> None:
    shards, table = ShardSet(tiny[0]), Manifest.read(tiny[1])
    run = untrained(tmp_path)
    a, b = (pretext.pretext(run, shards, table, device="cpu", workers=0) for _ in range(2))
    assert a == b
    for alpha, name in ((0.0, "context accuracy"), (1.0, "motion accuracy")):
        alone = untrained(tmp_path, objective=Objective(alpha=alpha))
        assert list(pretext.pretext(alone, shards, table, device="cpu", workers=0).metrics) == [name]


def test_what_has_no_accuracy_is_refused(tiny: Tiny, tmp_path: Path) -> None:
    shards, table = ShardSet(tiny[0]), Manifest.read(tiny[1])
    regressing = untrained(tmp_path, objective=Objective(alpha=1.0, motion_loss="mse"))
    with pytest.raises(ValueError, match="regresses motion vectors"):
        pretext.pretext(regressing, shards, table)
    labelled = replace(regressing, config=tiny_config("small-scratch"))
    with pytest.raises(ValueError, match="was trained with labels"):
        pretext.pretext(labelled, shards, table)


def test_videos_that_do_not_fill_a_batch_are_a_smaller_one(tiny: Tiny, tmp_path: Path) -> None:
    shards, table = ShardSet(tiny[0]), Manifest.read(tiny[1])
    run = untrained(tmp_path)
    small = pretext.pretext(replace(run, config=run.config.changed({"batch_size": 9})), shards, table, workers=0)
    assert (small.videos, small.left, small.batch) == (8, 0, 8)
    whole = pretext.pretext(replace(run, config=run.config.changed({"batch_size": 8})), shards, table, workers=0)
    assert small == whole
    one = next(n for n, subset in enumerate(table.subsets) if subset == "test")
    alone = Manifest((table.paths[one],), (table.labels[one],), ("test",))
    with pytest.raises(ValueError, match="one test video has nothing to be told from"):
        pretext.pretext(run, shards, alone, workers=0)


def test_the_command_stores_a_row(
    tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    rows, origin = Manifest.read(tiny[1]).subset("train"), Origin("small", "split", "train")
    runtime = Runtime(device="cpu", loader_workers=0)
    loop.train(tiny_config(batch_size=4, epochs=1), runtime, tiny[0], rows, tmp_path / "run", origin)
    arguments = ["pretext", "--run", str(tmp_path / "run"), "--shards", str(tiny[0]), "--manifest", str(tiny[1])]
    monkeypatch.setattr(sys, "argv", ["python -m eval", *arguments, "--device", "cpu", "--workers", "0"])
    assert command.main() == 0
    said = capsys.readouterr().out
    row = json.loads(Path(said.split("stored in ")[1].strip()).read_text())
    assert (row["kind"], row["epoch"], row["weights"], row["videos"]) == ("pretext", 1, "last", 8)
    assert set(row["metrics"]) == {"context accuracy", "motion accuracy"} and "batches of 4" in row["protocol"]
    assert f"context accuracy {row['metrics']['context accuracy']:.1f} %" in said
