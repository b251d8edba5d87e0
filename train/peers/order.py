"""Clip order: in which order were a video's shuffled clips taken? (Xu et al., *Self-supervised Spatiotemporal Learning
via Video Clip Order Prediction*, CVPR 2019: three clips, eight frames between them, pairs of features, dropout 0.5.)

Shapes: B videos, N clips a video, C channels, P = N (N - 1) / 2 pairs.
"""

from __future__ import annotations

from itertools import combinations, permutations

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from train.config import Comparison
from train.objectives import Loss, classification


class ClipOrder:
    """One class an order: 6 of three clips."""

    # Mirrored each by itself, what moves to the right would no longer tell what came later; the paper mirrors none.
    one_flip = True

    def __init__(self, config: Comparison) -> None:
        self.sampling, self.gap, self.hidden = config.sampling, config.peer.gap, config.networks.head_hidden
        self.clips = config.peer.clips
        self.orders = [*permutations(range(self.clips))]
        self.needed = self._extent(1)

    def _extent(self, stride: int) -> int:
        """Frames from the first clip's first to the last one's last."""
        return self.clips * self.sampling.span(stride) + (self.clips - 1) * self.gap

    def draw(self, rng: np.random.Generator, frames: int) -> tuple[np.ndarray, int, int]:
        stride = next(s for s in range(self.sampling.stride, 0, -1) if self._extent(s) <= frames)
        first = int(rng.integers(frames - self._extent(stride) + 1))
        starts = first + (self.sampling.span(stride) + self.gap) * np.arange(self.clips)
        target = int(rng.integers(len(self.orders)))
        return starts[list(self.orders[target])], stride, target

    def head(self, channels: int) -> nn.Module:
        return OrderHead(channels, self.clips, self.hidden, len(self.orders))

    def loss(self, found: Tensor, target: Tensor) -> Loss:
        return classification(found, target)


class OrderHead(nn.Module):
    """Every pair of clips through one layer, then all pairs together."""

    def __init__(self, channels: int, clips: int, hidden: int, orders: int) -> None:
        super().__init__()
        self.pairs = [*combinations(range(clips), 2)]
        self.pair = nn.Linear(2 * channels, hidden)
        self.order = nn.Linear(len(self.pairs) * hidden, orders)

    def forward(self, features: Tensor) -> Tensor:
        """(B, N, C) -> scores (B, orders)."""
        pairs = torch.stack([features[:, pair].flatten(1) for pair in self.pairs], 1)  # (B, P, 2 C)
        return self.order(F.dropout(F.relu(self.pair(pairs)).flatten(1), 0.5, self.training))
