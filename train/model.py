"""The networks of one pretraining run, joined as in figure 2.

Shapes: B videos, K negative windows, W maps a window, S and M pixels, N = T3 H3 W3 motion points, C embedding width.
"""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor, nn

from train.config import Config
from train.networks import build_predictor, build_video_network
from train.networks.heads import MLPHead, flatten_points
from train.networks.resnet import r2d10, r3d10


class Embeddings(NamedTuple):
    """Unit-length rows for equations (1) and (2); None where a task has no weight."""

    clips: Tensor | None
    """(B, C)"""
    iframes: Tensor | None
    """(B, C)"""
    predicted: Tensor | None
    """(B N, C), points of each video together."""
    positives: Tensor | None
    """(B N, C), row for row with `predicted`."""
    negatives: Tensor | None
    """(B K N, C)"""


class PretrainingModel(nn.Module):
    """V-, I- and M-Network, predictor and heads; only the parts that the objective's alpha gives a weight."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        n, clip = config.networks, (config.sampling.frames, config.size, config.size)
        self.video = build_video_network(n.backbone, n.width)
        if config.objective.alpha < 1:
            self.iframe = r2d10(width=n.iframe_width)
            self.clip_head = MLPHead(self.video.channels, n.head_hidden, n.head_out)
            self.iframe_head = MLPHead(self.iframe.channels, n.head_hidden, n.head_out)
        if config.objective.alpha > 0:
            self.motion = r3d10(in_channels=2, width=n.motion_width, stem_stride=1)
            grid = self.motion.grid(config.sampling.motion_frames, config.motion_size, config.motion_size)
            self.predictor = build_predictor(
                n.predictor,
                self.video.channels,
                self.motion.channels,
                self.video.pretrain_grid(*clip),
                grid,
                n.predictor_width,
            )
            self.motion_head = MLPHead(self.motion.channels, n.head_hidden, n.head_out)
            self.predicted_head = MLPHead(self.motion.channels, n.head_hidden, n.head_out)

    def forward(self, clip: Tensor, iframe: Tensor | None, motion: Tensor | None) -> Embeddings:
        """clip (B, 3, T, S, S), iframe (B, 3, 1, S, S), motion (B, 1+K, 2, W, M, M) with the positive window first."""
        features = self.video.forward_pretrain(clip)  # (B, C1, T1, H1, W1)
        clips = iframes = predicted = positives = negatives = None
        if iframe is not None:
            clips = self.clip_head(features.mean((2, 3, 4)))  # (B, C)
            iframes = self.iframe_head(self.iframe(iframe).mean((2, 3, 4)))  # (B, C)
        if motion is not None:
            predicted = self.predicted_head(flatten_points(self.predictor(features)))  # (B N, C)
            points = flatten_points(self.motion(motion.flatten(0, 1)))  # (B (1+K) N, C3)
            embedded = self.motion_head(points).unflatten(0, (*motion.shape[:2], -1))  # (B, 1+K, N, C)
            positives = embedded[:, 0].flatten(0, 1)  # (B N, C)
            negatives = embedded[:, 1:].flatten(0, 2)  # (B K N, C)
        return Embeddings(clips, iframes, predicted, positives, negatives)
