"""Pace: at which stride was a clip taken? (Wang, Jiao and Liu, *Self-supervised Video Representation Learning by Pace
Prediction*, ECCV 2020: four paces. The classification alone, without the contrast that they add.)"""

from __future__ import annotations

import numpy as np
from torch import Tensor, nn

from train.config import Comparison
from train.objectives import Loss, classification


class Pace:
    """One class a stride, from 1 on; `sampling.stride` is that of evaluation alone."""

    clips, one_flip = 1, False

    def __init__(self, config: Comparison) -> None:
        self.sampling, self.paces = config.sampling, config.peer.paces
        # Every pace fits into every video: were the slow ones alone to fit, short videos would tell their pace.
        self.needed = self.sampling.span(self.paces)

    def draw(self, rng: np.random.Generator, frames: int) -> tuple[np.ndarray, int, int]:
        target = int(rng.integers(self.paces))
        return rng.integers(frames - self.sampling.span(target + 1) + 1, size=1), target + 1, target

    def head(self, channels: int) -> nn.Module:
        return nn.Sequential(nn.Flatten(), nn.Linear(channels, self.paces))

    def loss(self, found: Tensor, target: Tensor) -> Loss:
        return classification(found, target)
