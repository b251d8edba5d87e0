"""Every recipe takes a step; its parts have gradients, and no others exist."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import TINY, make_shards, tiny_config
from running import RUNTIME, Tiny, assert_same_run, run_again

from preprocess.manifest import Manifest
from preprocess.shards import ShardSet
from train import runs, tasks
from train.config import Finetuning, Optimiser
from train.loop import train, update
from train.model import build_model
from train.objectives import motion_targets
from train.origin import Origin
from train.recipes import RECIPES
from train.tasks import make_task
from train.trained import Run, load_pretrained

SUBJECTS = {  # of a task: a recipe, and the field that its recipes differ in
    "pretraining": ("small", "objective"),
    "finetuning": ("small-scratch", "supervision"),
    "comparison": ("scenes-order", "peer"),
}
GROWS = {"c3d": 4, "r3d26": 1, "r2plus1d26": 1, "r3d10": 4}


def smaller(name: str, **changes: Any) -> Any:
    """The recipe on 8 frames of 32x32 at stride 2, narrow, on batches of four: all that is not its subject is small."""
    config = RECIPES[name].config
    kind, field = SUBJECTS[config.task]
    narrow = {"iframe_width": 4, "motion_width": 4, "predictor_width": 16, "head_hidden": 16, "head_out": 8}
    networks = replace(config.networks, width=GROWS[config.networks.backbone], **narrow)
    tiny = tiny_config(kind, batch_size=4, epochs=2)
    motion = "vectors" if config.sampling.motion == "flow" else config.sampling.motion
    sampling = replace(tiny.sampling, period=config.sampling.period, motion=motion)
    optimiser = Optimiser("adamw", lr_per_sample=2e-3, warmup_epochs=0)
    subject = {field: getattr(config, field)}
    return replace(tiny, networks=networks, sampling=sampling, optimiser=optimiser, **subject | changes)


# Recipes that differ only in sizes, rates or data sets are the same when made small: each such group is trained once.
TRAINED = list({smaller(name).sha256(): name for name in reversed(RECIPES)}.values())[::-1]


def test_every_recipe_is_trained_below_under_its_own_name_or_another() -> None:
    for name in RECIPES:
        assert sum(smaller(name) == smaller(other) for other in TRAINED) == 1, name
    assert {"pretrain-ucf101-c3d-current", "pretrain-ucf101-r3d26", "regularised-ucf101-c3d", "small"} <= set(TRAINED)
    assert {"small-residual", "small-residual-only", "pretrain-ucf101-c3d-residual"} <= set(TRAINED)


@pytest.fixture(scope="module")
def pretrained(tiny: Tiny, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A run to begin from."""
    out = tmp_path_factory.mktemp("pretrained") / "run"
    rows = Manifest.read(tiny[1]).subset("train")
    train(smaller("small-context", epochs=1), RUNTIME, tiny[0], rows, out, Origin("small-context", "split", "train"))
    return load_pretrained(out)


def start(tiny: Tiny, out: Path, config: Any, pretrained: Run | None = None) -> dict[str, Any]:
    origin = Origin("x", "split", "train", pretrained)
    return train(config, RUNTIME, tiny[0], Manifest.read(tiny[1]).subset("train"), out, origin)


@pytest.fixture(scope="module")
def shards(tiny: Tiny, tmp_path_factory: pytest.TempPathFactory) -> ShardSet:
    """The first videos of `tiny`, with residuals."""
    rows, folder = Manifest.read(tiny[1]), tmp_path_factory.mktemp("residuals")
    videos = tiny[0].parent / "videos"
    return make_shards(folder, videos, list(rows.paths[:4]), list(rows.labels[:4]), settings=TINY, residuals=True)


def collate(task: Any) -> dict[str, torch.Tensor]:
    return torch.utils.data.default_collate([task.data[0, i] for i in range(4)])


PEERS = ("pretrain-ucf101-c3d-order", "pretrain-ucf101-c3d-pace", "pretrain-ucf101-c3d-contrast")
LEARNING = ("small", "small-mse", "pretrain-ucf101-c3d-crossent", "small-regularised", *PEERS)


@pytest.mark.parametrize("name", TRAINED)
def test_every_part_has_gradients_and_every_kind_of_loss_falls(shards: ShardSet, name: str) -> None:
    """A step on one batch; thirty where the recipe has a loss that the others have not."""
    torch.manual_seed(0)
    config = smaller(name)
    config = config.changed({"supervision.dropout": 0.0}) if isinstance(config, Finetuning) else config
    task = make_task(config, shards, None)
    batch = collate(task)
    inputs, model = task.inputs(batch), build_model(config, len(shards.classes))
    optimiser = torch.optim.AdamW(model.parameters())
    history = []
    for _ in range(30 if name in LEARNING else 1):
        found = update(model, task, optimiser, 3e-3, inputs, batch, "float32")
        history.append(list(found.values()))
        assert [n for n, p in model.named_parameters() if p.grad is None] == []
    # Dropout makes single steps noisy.
    for column, values in zip(found, np.array(history).T, strict=True):
        falls = values[-5:].mean() < values[:5].mean()
        assert falls or not column.endswith("loss") or len(values) == 1, (column, values)
        assert np.isfinite(values).all()


def test_a_run_with_labels_goes_on_as_one_that_nothing_stopped(
    tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """test_survival.py says so of pretraining, at more places."""
    config = smaller("small-regularised")
    start(tiny, tmp_path / "whole", config)

    def interrupt(_: torch.Tensor) -> None:
        raise KeyboardInterrupt

    run_again(monkeypatch, 5, interrupt, tasks.FinetuningTask)
    with pytest.raises(KeyboardInterrupt):
        start(tiny, tmp_path / "stopped", config)
    monkeypatch.undo()
    start(tiny, tmp_path / "stopped", config)
    assert_same_run(tmp_path / "stopped", tmp_path / "whole")


def test_finetuning_begins_from_the_pretrained_network(
    tiny: Tiny, pretrained: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    caught: dict[str, torch.Tensor] = {}

    def catch(_: object, network: torch.nn.Module, *__: object) -> None:
        caught.update({k: v.clone() for k, v in network.state_dict().items()})
        raise KeyboardInterrupt

    monkeypatch.setattr(tasks.FinetuningTask, "loss", catch)
    config = smaller("small-finetune")
    with pytest.raises(KeyboardInterrupt):
        start(tiny, tmp_path / "run", config, pretrained)
    for key, value in pretrained.model.video.state_dict().items():
        torch.testing.assert_close(caught[f"video.{key}"], value, rtol=0, atol=0)
    monkeypatch.undo()
    rows, c3d = Manifest.read(tiny[1]).subset("train"), config.changed({"networks.backbone": "c3d"})
    for origin, message in (
        (Origin(), "name its run with --pretrained"),
        (Origin(pretrained=replace(pretrained, config=c3d)), "holds a c3d of width 4, this recipe a r3d10 of width 4"),
    ):
        with pytest.raises(ValueError, match=message):
            train(config, RUNTIME, tiny[0], rows, tmp_path / "other", origin)
    with pytest.raises(ValueError, match="this recipe begins from scratch"):
        scratch, origin = smaller("small-scratch"), Origin(pretrained=pretrained)
        train(scratch, RUNTIME, tiny[0], rows, tmp_path / "other", origin)
    start(tiny, tmp_path / "run", config, pretrained)
    other = load_pretrained(pretrained.folder)
    next(other.model.video.parameters()).data += 1
    with pytest.raises(ValueError, match="pretrained_sha256"):
        start(tiny, tmp_path / "run", config, other)


def test_what_a_run_began_from_says_where_it_was_not_the_whole_recipe(pretrained: Run) -> None:
    """Tables take a recipe's name for the recipe, carried through."""
    about = pretrained.about()
    assert about["recipe"].startswith("small-context, ") and "networks.width 4" in about["recipe"]
    assert about["training_settings_sha256"] == runs.training_settings(runs.read(pretrained.folder))
    whole = replace(pretrained, config=RECIPES["small-context"].config.changed({"seed": 3}), epoch=100.0)
    assert whole.about()["recipe"] == "small-context"
    assert replace(whole, epoch=5.0).about()["recipe"] == "small-context, epoch 5"


def test_an_ablation_is_one_changed_field_and_released_is_all_that_the_script_has_otherwise() -> None:
    for name, recipe in RECIPES.items():
        released = 2 + ("c3d" not in name)
        assert len(recipe.changes()) == (released if name.endswith("-released") else 1 if recipe.base else 0), name
        assert recipe.about.startswith(("Table", "Beside the paper", "Another task"))
    assert RECIPES["small-mse"].changes() == {"objective.motion_loss": ("mse", "infonce")}
    with pytest.raises(ValueError, match=r"no field is called objective\.beta"):
        RECIPES["small"].config.changed({"objective.beta": 1})


@pytest.mark.parametrize("task", ["small", "small-regularised"])
def test_the_released_start_of_the_predictor_and_upsampling(task: str) -> None:
    released = {"networks.queries": "zeros", "networks.upsampling": "nearest"}
    torch.manual_seed(0)
    ours, theirs = (build_model(smaller(task).changed(changes), 4) for changes in ({}, released))
    assert (ours.video.upsampling, theirs.video.upsampling) == ("trilinear", "nearest")
    predictor = ours.motion.predictor
    assert all(x.min() < -1 for x in (predictor.queries, predictor.in_positions, predictor.out_positions))
    predictor = theirs.motion.predictor
    assert (predictor.queries == 0).all() and predictor.queries.requires_grad
    for positions in (predictor.in_positions, predictor.out_positions):
        assert positions.min() >= 0 and positions.max() <= 1 and positions.mean().item() == pytest.approx(0.5, abs=0.1)


def test_settings_of_the_paper() -> None:
    """Section 4.1, read from the page."""
    for name in ("pretrain-ucf101-c3d", "pretrain-k400-r3d26"):
        config = RECIPES[name].config
        assert (config.epochs, config.sampling.frames, config.sampling.stride, config.size) == (120, 16, 4, 112)
        o = config.optimiser
        assert (o.name, o.lr_per_sample, o.weight_decay, o.momentum) == ("sgd", 0.0005, 0.005, 0.9)
    assert RECIPES["pretrain-ucf101-c3d"].config.batch_size == 64
    assert RECIPES["pretrain-k400-c3d"].config.batch_size == 512
    for dataset, rate, decay in (("ucf101", 0.0001, 0.003), ("hmdb51", 0.0002, 0.002)):
        for start_, dropout in (("scratch", 0.3), ("finetune", 0.3), ("regularised", 0.3)):
            config = RECIPES[f"{start_}-{dataset}-r3d26"].config
            assert isinstance(config, Finetuning)
            assert (config.batch_size, config.epochs, config.supervision.dropout) == (8, 120, dropout)
            assert (config.optimiser.lr_per_sample, config.optimiser.weight_decay) == (rate, decay)
            assert config.supervision.motion_weight == (0.2 if start_ == "regularised" else 0)
            assert (config.photometric.grey_p, config.photometric.blur_p, config.photometric.jitter_p) == (0, 0.5, 0.5)
            o = config.optimiser
            assert (o.warmup_epochs, o.warmup_start, o.floor) == (10, 0.04, 0.01)


# ---- supervised training with motion prediction beside it, where some clips leave no room for a motion window


def test_a_batch_without_room_for_motion_trains_the_classifier(shards: ShardSet) -> None:
    """test_data.py says which clips serve. Of 40 frames, 8 at stride 5, two skipped and 8 maps are 46."""
    config = smaller("small-regularised")
    task = make_task(replace(config, sampling=replace(config.sampling, stride=5)), shards, None)
    assert task.left_out == "4 too short for motion prediction"
    batch, model = collate(task), build_model(config, 4)
    assert not batch["serves"].any() and batch["motion"].any()
    loss, parts = task.loss(model, task.inputs(batch), batch)
    assert parts["motion_loss"] == 0 and torch.equal(loss, parts["class_loss"])
    loss.backward()
    assert all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())


def test_targets_of_the_paper_s_size_are_8_maps_of_16x16_pixels_in_21_classes() -> None:
    """A clip of 16 frames of 112x112 predicts 49 points; each target is the mean of what one of them sees."""
    for name, values in (("pretrain-ucf101-c3d-mse", 2), ("pretrain-ucf101-c3d-crossent", 2 * 21)):
        with torch.device("meta"):
            motion = build_model(RECIPES[name].config, 0).motion
        last = [m for m in motion.predicted_head.modules() if isinstance(m, torch.nn.Linear)][-1]
        assert (motion.grid, last.out_features) == ((1, 7, 7), values)
    maps = torch.zeros(1, 2, 8, 112, 112)
    maps[0, 0, :, 16:32, 96:112] = 0.5  # five pixels to the right in one block, for the whole window
    targets = motion_targets(maps, (1, 7, 7))
    assert targets.nonzero().tolist() == [[1 * 7 + 6, 0]] and targets[13, 0] == 0.5
