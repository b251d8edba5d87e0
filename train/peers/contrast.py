"""Clip against clip: which of the batch's clips is of the same video? (As Qian et al., *Spatiotemporal Contrastive
Video Representation Learning*, CVPR 2021, with both clips drawn uniformly.)"""

from __future__ import annotations

import numpy as np
from torch import Tensor, nn

from train.config import Comparison
from train.networks.heads import MLPHead
from train.objectives import Loss, context_matching


class ClipContrast:
    """Equation (1) between two clips of a video, each of which finds the other."""

    clips, one_flip = 2, False

    def __init__(self, config: Comparison) -> None:
        self.sampling, self.temperature = config.sampling, config.peer.temperature
        self.hidden, self.out = config.networks.head_hidden, config.networks.head_out
        self.needed = self.sampling.span(1)

    def draw(self, rng: np.random.Generator, frames: int) -> tuple[np.ndarray, int, int]:
        s = self.sampling
        stride = next(n for n in range(s.stride, 0, -1) if s.span(n) <= frames)
        return rng.integers(frames - s.span(stride) + 1, size=2), stride, 0

    def head(self, channels: int) -> nn.Module:
        return ContrastHead(channels, self.hidden, self.out)

    def loss(self, found: Tensor, target: Tensor) -> Loss:
        ways = [context_matching(found[:, i], found[:, 1 - i], self.temperature) for i in (0, 1)]
        value, accuracy = (sum(x) / 2 for x in zip(*ways))
        return Loss(value, accuracy)


class ContrastHead(nn.Module):
    """One MLP head for both clips."""

    def __init__(self, channels: int, hidden: int, out: int) -> None:
        super().__init__()
        self.mlp = MLPHead(channels, hidden, out)

    def forward(self, features: Tensor) -> Tensor:
        """(B, 2, C) -> (B, 2, out), of unit length."""
        return self.mlp(features.flatten(0, 1)).unflatten(0, features.shape[:2])
