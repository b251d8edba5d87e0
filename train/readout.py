"""From a stored clip to its feature: centre crop, nothing drawn, the mean over a network's map (section 4.1).

The paper retrieves by the global features of section 3.2, x' = GAP(x), where x is the map that both tasks share. Plain
layer 4, which fine-tuning trains, is half of x where the backbone is a residual one.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from preprocess.schema import Settings
from train import augment
from train.config import Config
from train.data import Modality
from train.networks import VideoNetwork


class SharedMap(nn.Module):
    """A V-Network read where both pretraining tasks read it: clips (B, 3, T, H, W) -> x (B, C1, T1, H1, W1)."""

    def __init__(self, video: VideoNetwork) -> None:
        super().__init__()
        self.video = video

    def forward(self, clips: Tensor) -> Tensor:
        return self.video.forward_pretrain(clips)


def prepare(raw: Tensor, network: Modality, config: Config, settings: Settings) -> Tensor:
    """Stored pixels or vectors of n clips -> what the network takes, centre crop, nothing drawn."""
    width, height = settings.width, settings.height
    box = augment.fixed_box(width, height).to(raw.device).expand(len(raw), 4)
    flip = torch.zeros(len(raw), dtype=torch.bool, device=raw.device)
    if network == "motion":
        return augment.crop_motion(raw, box, flip, config.motion_size, width, height)  # (n, D, W, M, M)
    frames = raw[:, None] if network == "iframe" else raw
    return augment.normalise(augment.crop(frames, box, flip, config.size))  # (n, 3, T, S, S)


def pooled(maps: Tensor) -> Tensor:
    """Maps (N, C, t, h, w) -> global average, float32 (N, C), or of higher precision as the maps."""
    return maps.to(torch.promote_types(maps.dtype, torch.float32)).mean((2, 3, 4))
