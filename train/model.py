"""The networks of one run: joined as in figure 2 to pretrain, or with a classifier to train with labels.

Shapes: B videos, K negative windows, W maps a window, S and M pixels, D channels of a motion map, N = T3 H3 W3
motion points, C embedding width.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from train.config import Comparison, Config, Finetuning, MotionLoss, Pretraining
from train.networks import VideoNetwork, build_predictor, build_video_network
from train.networks.heads import MLPHead, flatten_points
from train.networks.resnet import r2d10, r3d10
from train.objectives import Points, motion_targets
from train.peers import make_peer


class MotionScale(nn.Module):
    """The scale of the targets of table 1's other losses, which most points would make nearly constant: mean and
    deviation of dx and of dy, and the edges that cut them into equally filled classes.

    Buffers, which `fit` sets once a run: so they are saved and restored with its weights.
    """

    mean: Tensor
    deviation: Tensor
    edges: Tensor

    def __init__(self, bins: int) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(2))
        self.register_buffer("deviation", torch.ones(2))
        self.register_buffer("edges", torch.linspace(-1, 1, bins + 1)[1:-1].repeat(2, 1))  # (2, bins - 1), rising

    def fit(self, points: Tensor) -> None:
        """Take the scale of motion vectors (P, 2) in tens of pixels. What is constant keeps its size."""
        points = points.double()
        deviation = points.std(0, correction=0)
        self.mean.copy_(points.mean(0))
        self.deviation.copy_(torch.where(deviation > 1e-6, deviation, 1.0))
        shares = torch.linspace(0, 1, self.edges.shape[1] + 2, dtype=points.dtype, device=points.device)[1:-1]
        self.edges.copy_(points.quantile(shares, 0).T)

    def standardised(self, points: Tensor) -> Tensor:
        """(P, 2), of mean 0 and deviation 1 where `fit` saw it."""
        return (points - self.mean) / self.deviation

    def classes(self, points: Tensor) -> Tensor:
        """int64 (P, 2), below the number of bins.

        Where many points are the same, as those without motion are, several edges coincide there: such points are a
        class of their own, in the middle of those that the edges leave empty.
        """
        each = points[..., None]  # (P, 2, 1)
        return ((each > self.edges).sum(-1) + (each >= self.edges).sum(-1)) // 2


def video_network(config: Config) -> VideoNetwork:
    """The V-Network of a configuration; ValueError where it cannot take the clips."""
    n = config.networks
    network = build_video_network(n.backbone, n.width, n.upsampling)
    grid = network.grid if isinstance(config, Finetuning) else network.pretrain_grid
    grid(config.sampling.frames, config.size, config.size)
    return network


class MotionPrediction(nn.Module):
    """The lower half of figure 2: M-Network, predictor and heads; for table 1's other losses the predictor alone."""

    def __init__(self, config: Config, video: VideoNetwork, loss: MotionLoss = "infonce", bins: int = 0) -> None:
        super().__init__()
        n, s = config.networks, config.sampling
        network = r3d10(in_channels=s.motion_channels, width=n.motion_width, stem_stride=1)
        self.loss_name, self.grid = loss, network.grid(s.motion_frames, config.motion_size, config.motion_size)
        self.predictor = build_predictor(
            n.predictor,
            video.channels,
            network.channels,
            video.pretrain_grid(s.frames, config.size, config.size),
            self.grid,
            n.predictor_width,
            n.queries,
        )
        if loss == "infonce":
            self.network = network
            self.target_head = MLPHead(network.channels, n.head_hidden, n.head_out)
            self.predicted_head: nn.Module = MLPHead(network.channels, n.head_hidden, n.head_out)
        else:
            self.scale = MotionScale(bins)
            outputs = 2 if loss == "mse" else 2 * bins
            self.predicted_head = nn.Sequential(
                nn.Linear(network.channels, n.head_hidden, bias=False),
                nn.BatchNorm1d(n.head_hidden),
                nn.ReLU(inplace=True),
                nn.Linear(n.head_hidden, outputs),
            )

    def targets(self, motion: Tensor) -> tuple[Tensor, Tensor | None]:
        """motion (B, 1+K, D, W, M, M) with the positive window first -> targets and negatives as `Points` has them.

        To be called before anything else of a model: what is computed first has its backward pass last. The M-Network's
        takes the most memory, which is free once all else has had its own.
        """
        if self.loss_name != "infonce":
            targets = motion_targets(motion[:, 0], self.grid)  # (B N, 2)
            return (self.scale.standardised if self.loss_name == "mse" else self.scale.classes)(targets), None
        points = flatten_points(self.network(motion.flatten(0, 1)))  # (B (1+K) N, C3)
        embedded = self.target_head(points).unflatten(0, (*motion.shape[:2], -1))  # (B, 1+K, N, C)
        return embedded[:, 0].flatten(0, 1), embedded[:, 1:].flatten(0, 2)

    def forward(self, features: Tensor) -> Tensor:
        """Maps (B, C1, T1, H1, W1) of the V-Network -> predicted points (B N, C)."""
        return self.predicted_head(flatten_points(self.predictor(features)))


class PretrainingModel(nn.Module):
    """V-, I- and M-Network, predictor and heads; only the parts that the objective's alpha gives a weight."""

    def __init__(self, config: Pretraining) -> None:
        super().__init__()
        n, o = config.networks, config.objective
        self.video = video_network(config)
        if o.alpha < 1:
            self.iframe = r2d10(width=n.iframe_width)
            self.clip_head = MLPHead(self.video.channels, n.head_hidden, n.head_out)
            self.iframe_head = MLPHead(self.iframe.channels, n.head_hidden, n.head_out)
        if o.alpha > 0:
            self.motion = MotionPrediction(config, self.video, o.motion_loss, o.motion_bins)

    def forward(
        self, clip: Tensor, iframe: Tensor | None, motion: Tensor | None
    ) -> tuple[Tensor | None, Tensor | None, Points | None]:
        """Embeddings (B, C) of clips and I-frames, of unit length, and the motion points; None where not asked for.

        clip (B, 3, T, S, S), iframe (B, 3, 1, S, S), motion (B, 1+K, D, W, M, M) with the positive window first.
        """
        targets = None if motion is None else self.motion.targets(motion)
        features = self.video.forward_pretrain(clip)  # (B, C1, T1, H1, W1)
        clips = iframes = None
        if iframe is not None:
            clips = self.clip_head(features.mean((2, 3, 4)))  # (B, C)
            iframes = self.iframe_head(self.iframe(iframe).mean((2, 3, 4)))  # (B, C)
        return clips, iframes, None if targets is None else Points(self.motion(features), *targets)


class ComparisonModel(nn.Module):
    """V-Network and the head of another task."""

    def __init__(self, config: Comparison) -> None:
        super().__init__()
        peer = make_peer(config)
        self.video = video_network(config)
        self.head, self.clips = peer.head(self.video.channels), peer.clips

    def forward(self, clips: Tensor) -> Tensor:
        """Clips (B N, 3, T, S, S), those of a video one after another -> what the task compares, (B, ...)."""
        features = self.video.forward_pretrain(clips).mean((2, 3, 4))  # (B N, C1)
        return self.head(features.unflatten(0, (-1, self.clips)))


class FinetuningModel(nn.Module):
    """V-Network, dropout and a linear classifier; with motion prediction beside it where that has a weight."""

    def __init__(self, config: Finetuning, classes: int) -> None:
        super().__init__()
        s = config.supervision
        self.video = video_network(config)
        self.dropout = nn.Dropout(s.dropout)
        self.classifier = nn.Linear(self.video.channels, classes)
        if s.motion_weight > 0:
            self.motion = MotionPrediction(config, self.video)

    def forward(self, clip: Tensor, motion: Tensor | None = None) -> tuple[Tensor, Points | None]:
        """clip (B, 3, T, S, S) -> class scores (B, classes), and the motion points where motion is given."""
        if motion is None:
            return self.classify(self.video(clip)), None
        targets = self.motion.targets(motion)
        plain, shared = self.video.forward_both(clip)
        return self.classify(plain), Points(self.motion(shared), *targets)

    def classify(self, maps: Tensor) -> Tensor:
        """Maps (B, C1, T1, H1, W1) of the V-Network -> scores before the softmax, float32 (B, classes)."""
        pooled = self.dropout(maps.float().mean((2, 3, 4)))  # (B, C1)
        with torch.autocast(pooled.device.type, enabled=False):
            return self.classifier(pooled)


Model = PretrainingModel | ComparisonModel | FinetuningModel


def build_model(config: Config, classes: int, recompute: bool = False) -> Model:
    """The model that a configuration trains; `classes` counts those of the shards. `recompute`: what the M-Network's
    stem computes is not kept for the backward pass, but computed again."""
    if isinstance(config, Pretraining):
        model: Model = PretrainingModel(config)
    elif isinstance(config, Comparison):
        model = ComparisonModel(config)
    else:
        assert isinstance(config, Finetuning)
        model = FinetuningModel(config, classes)
    for part in model.modules():
        if isinstance(part, MotionPrediction) and part.loss_name == "infonce":
            part.network.recompute_stem = recompute
    return model
