"""The regression and classification variants of motion prediction (table 1) against plain Python."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from train.objectives import motion_bins, motion_classification, motion_regression, motion_targets


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


@settings(deadline=None)
@given(value=st.floats(-1, 1, width=32), bins=st.integers(2, 64))
def test_bins_are_of_equal_width(value: float, bins: int) -> None:
    number = int(motion_bins(torch.tensor([[value, -1.0]]), bins)[0, 0])
    assert 0 <= number < bins
    assert -1 + 2 * number / bins - 1e-5 <= value <= -1 + 2 * (number + 1) / bins + 1e-5


def test_bins_at_the_borders() -> None:
    values = torch.tensor([-3.0, -1.0, -0.34, -0.3, 0.0, 0.3, 0.34, 1.0, 3.0])
    assert motion_bins(values, 3).tolist() == [0, 0, 0, 1, 1, 1, 2, 2, 2]
    assert motion_bins(values, 3).dtype == torch.int64


def test_motion_regression_is_the_mean_square() -> None:
    predicted, target = random(5, 2, seed=0).requires_grad_(), random(5, 2, seed=1)
    loss = motion_regression(predicted, target)
    pairs = list(zip(predicted.flatten().tolist(), target.flatten().tolist(), strict=True))
    assert loss.value.item() == pytest.approx(sum((a - b) ** 2 for a, b in pairs) / 10)
    torch.testing.assert_close(torch.autograd.grad(loss.value, predicted)[0], (predicted - target) / 5)
    assert loss.accuracy is None


def test_motion_classification_takes_dx_before_dy() -> None:
    logits, target = random(4, 6, seed=0), torch.tensor([[-1.0, 0.0], [0.0, 1.0], [1.0, -1.0], [0.2, -0.2]])
    classes = [[0, 1], [1, 2], [2, 0], [1, 1]]
    expected, hits = 0.0, 0
    for row, own in zip(logits.tolist(), classes, strict=True):
        for scores, number in ((row[:3], own[0]), (row[3:], own[1])):
            expected += math.log(sum(math.exp(score) for score in scores)) - scores[number]
            hits += max(scores) == scores[number]
    loss = motion_classification(logits, target)
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
