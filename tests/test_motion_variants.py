"""The regression and classification variants of motion prediction (table 1) against plain Python."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import tiny_config
from running import Tiny, start
from torch import Tensor

from preprocess.manifest import Manifest
from preprocess.shards import ShardSet
from train import tasks
from train.config import Objective
from train.data import EpochSampler
from train.model import MotionScale
from train.objectives import motion_classification, motion_regression, motion_targets
from train.trained import load_run


def random(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_motion_targets_are_block_means_in_the_order_of_the_points() -> None:
    maps = random(2, 2, 4, 6, 9, seed=0)
    targets = motion_targets(maps, (2, 3, 3))
    assert targets.shape == (2 * 2 * 3 * 3, 2)
    row = 0
    for video in range(2):
        for t in range(2):
            for y in range(3):
                for x in range(3):
                    for component in range(2):
                        block = maps[video, component, 2 * t : 2 * t + 2, 2 * y : 2 * y + 2, 3 * x : 3 * x + 3]
                        expected = sum(block.flatten().tolist()) / block.numel()
                        assert targets[row, component].item() == pytest.approx(expected, abs=1e-12)
                    row += 1


def skewed(points: int, seed: int = 0) -> Tensor:
    """(points, 2): dx lognormal with a third at exactly zero, dy exponential; no two other values are the same."""
    rng = np.random.default_rng(seed)
    dx = np.where(rng.random(points) < 1 / 3, 0.0, rng.choice([-1, 1], points) * rng.lognormal(-4, 1, points))
    return torch.from_numpy(np.stack((dx, 0.01 * rng.exponential(size=points)), 1)).float()


def fitted(points: Tensor, bins: int) -> MotionScale:
    scale = MotionScale(bins)
    scale.fit(points)
    return scale


def test_standardised_targets_have_mean_0_and_deviation_1() -> None:
    points = skewed(4000)
    found = fitted(points, 5).standardised(points).double().numpy()
    np.testing.assert_allclose(found.mean(0), 0, atol=1e-5)
    np.testing.assert_allclose(found.std(0), 1, atol=1e-5)
    np.testing.assert_allclose(np.corrcoef(found.T, points.T.numpy())[[0, 1], [2, 3]], 1)


@pytest.mark.parametrize("bins", [2, 7, 21])
def test_classes_are_equally_filled_and_rise_with_the_value(bins: int) -> None:
    points = skewed(4200)
    found = fitted(points, bins).classes(points)
    assert found.dtype == torch.int64
    assert torch.bincount(found[:, 1], minlength=bins).tolist() == [4200 // bins] * bins  # no two are the same
    order = points[:, 1].argsort()
    assert (found[order, 1].diff() >= 0).all()
    beyond = fitted(points, bins).classes(torch.tensor([[-9.0, -9.0], [9.0, 9.0]]))
    assert beyond.tolist() == [[0, 0], [bins - 1, bins - 1]]


def test_points_that_stand_still_are_a_class_of_their_own() -> None:
    points = skewed(4200)
    scale = fitted(points, 21)
    found = scale.classes(points)[:, 0]
    still = points[:, 0] == 0
    (own,) = found[still].unique().tolist()
    assert 1200 < still.sum() < 1600 and 8 <= own <= 12
    assert (found[points[:, 0] < 0] < own).all() and (found[points[:, 0] > 0] > own).all()
    assert scale.classes(torch.tensor([[-0.0, 0.0]]))[0, 0] == own
    moving = torch.bincount(found[~still], minlength=21)
    assert (moving > 0).sum() >= 13 and moving.max() <= 2 * 4200 / 21


def test_a_component_that_is_constant_divides_nothing_by_zero() -> None:
    points = torch.stack((torch.full((3000,), 0.3), torch.linspace(-1, 1, 3000)), 1)
    scale = fitted(points, 4)
    found = scale.standardised(points)
    np.testing.assert_allclose(found[:, 0], 0, atol=1e-6)
    assert found.isfinite().all() and (scale.classes(points)[:, 0] == scale.classes(points)[0, 0]).all()


def test_the_scale_is_that_of_the_first_windows_that_training_draws(
    tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From the batches of a run's loader; and the run keeps it, also where it goes on."""
    monkeypatch.setattr(tasks, "WINDOWS", 16)
    config = tiny_config(objective=Objective(1.0, motion_loss="mse"), seed=3)
    start(tiny, tmp_path, config)
    model = load_run(tmp_path).model
    task: Any = tasks.make_task(config, ShardSet(tiny[0]), Manifest.read(tiny[1]).subset("train"))
    points = []
    for keys in EpochSampler(12, 2, seed=3).between(0, 8):  # 8 batches of two, in the second epoch
        _, _, motion = task.inputs(torch.utils.data.default_collate([task.data[key] for key in keys]))
        points.append(motion_targets(motion[:, 0], model.motion.grid).numpy())
    seen = np.concatenate(points).astype(float)
    scale = model.motion.scale
    np.testing.assert_allclose(scale.mean, seen.mean(0), atol=1e-6)
    np.testing.assert_allclose(scale.deviation, seen.std(0), rtol=1e-4)
    np.testing.assert_allclose(scale.edges, np.quantile(seen, np.arange(1, 21) / 21, axis=0).T, atol=1e-6)
    monkeypatch.setattr(tasks.PretrainingTask, "begin", lambda *_: pytest.fail("a run that goes on has a scale"))
    start(tiny, tmp_path, config)


def test_motion_regression_is_the_mean_square() -> None:
    predicted, target = random(5, 2, seed=0).requires_grad_(), random(5, 2, seed=1)
    loss = motion_regression(predicted, target)
    pairs = list(zip(predicted.flatten().tolist(), target.flatten().tolist(), strict=True))
    assert loss.value.item() == pytest.approx(sum((a - b) ** 2 for a, b in pairs) / 10)
    torch.testing.assert_close(torch.autograd.grad(loss.value, predicted)[0], (predicted - target) / 5)
    assert loss.accuracy is None


def test_motion_classification_takes_dx_before_dy() -> None:
    logits, classes = random(4, 6, seed=0), [[0, 1], [1, 2], [2, 0], [1, 1]]
    expected, hits = 0.0, 0
    for row, own in zip(logits.tolist(), classes, strict=True):
        for scores, number in ((row[:3], own[0]), (row[3:], own[1])):
            expected += math.log(sum(math.exp(score) for score in scores)) - scores[number]
            hits += max(scores) == scores[number]
    loss = motion_classification(logits, torch.tensor(classes))
    assert loss.value.item() == pytest.approx(expected / 8)
    assert loss.accuracy.item() == pytest.approx(hits / 8)
    assert 0 < hits < 8


def test_targets_that_cannot_be_used() -> None:
    with pytest.raises(ValueError, match="coarser"):
        motion_targets(torch.zeros(1, 2, 4, 8, 8), (1, 9, 8))
    with pytest.raises(ValueError, match=r"\(1, 3, 4, 8, 8\)"):
        motion_targets(torch.zeros(1, 3, 4, 8, 8), (1, 4, 4))
    with pytest.raises(ValueError, match="targets"):
        motion_regression(torch.zeros(4, 2), torch.zeros(4, 1))
    for shape in ((4, 7), (4, 2), (5, 6)):
        with pytest.raises(ValueError, match="bins"):
            motion_classification(torch.zeros(shape), torch.zeros(4, 2))
