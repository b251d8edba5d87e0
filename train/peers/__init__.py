"""Other tasks that learn from video without labels, to compare with: one file each.

A recipe `…-order`, `…-pace` or `…-contrast` has the shards, sampler, backbone, augmentation, videos seen, optimiser and
read-out of the recipe before the dash; only the task differs. Each follows the paper that it is named after in what it
asks, not in that paper's networks or settings. A task of longer clips drops videos that ours takes: at the paper's size
three of a hundred of UCF101, with `scenes` and `ucf20` none.

Shapes: B videos, N clips a video, T frames, C channels.
"""

from __future__ import annotations

from typing import Protocol

import numpy as np
from torch import Tensor, nn

from train.config import Comparison
from train.objectives import Loss
from train.peers.contrast import ClipContrast
from train.peers.order import ClipOrder
from train.peers.pace import Pace


class Peer(Protocol):
    """What a task is made of."""

    clips: int
    """N."""
    needed: int
    """Least frames of a video."""
    one_flip: bool
    """Whether the clips of a video are mirrored together; else each by itself."""

    def draw(self, rng: np.random.Generator, frames: int) -> tuple[np.ndarray, int, int]:
        """Of a video of so many frames: starts of its clips, int (N,), their stride, and the class that is to be found
        out, 0 where none is."""

    def head(self, channels: int) -> nn.Module:
        """What takes the pooled features (B, N, C) of the clips and gives what `loss` compares."""

    def loss(self, found: Tensor, target: Tensor) -> Loss:
        """`target` int64 (B,), as drawn."""


PEERS: dict[str, type[ClipOrder] | type[Pace] | type[ClipContrast]] = {
    "order": ClipOrder,
    "pace": Pace,
    "contrast": ClipContrast,
}


def make_peer(config: Comparison) -> Peer:
    return PEERS[config.peer.name](config)
