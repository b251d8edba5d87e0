"""C3D (Tran et al. 2015; the paper's section 4.1), with batch norm, up to conv5b.

Shapes: B clips; w width (64); T frames, H and W pixels. 16x112x112 in gives 8w x 2 x 7 x 7 out.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn


class C3D(nn.Module):
    """Eight 3x3x3 convolutions, each followed by batch norm and ReLU, with four max-pools between them.

    `width` is the number of channels of conv1 (64 in the original); the others keep their ratios to it. `channels` is
    what `forward` and `forward_pretrain` return. The convolutions carry no bias, which batch norm would remove.
    """

    def __init__(self, width: int = 64) -> None:
        super().__init__()
        self.channels = 8 * width
        self.conv1 = _unit(3, width)
        self.conv2 = _unit(width, 2 * width)
        self.conv3a = _unit(2 * width, 4 * width)
        self.conv3b = _unit(4 * width, 4 * width)
        self.conv4a = _unit(4 * width, 8 * width)
        self.conv4b = _unit(8 * width, 8 * width)
        self.conv5a = _unit(8 * width, 8 * width)
        self.conv5b = _unit(8 * width, 8 * width)

    def forward(self, x: Tensor) -> Tensor:
        """(B, 3, T, H, W) -> the conv5b map (B, 8w, T//8, H//16, W//16), not pooled.

        Raises ValueError under 8 frames or 16 pixels, of which the pools would leave nothing.
        """
        self.grid(*x.shape[-3:])
        x = F.max_pool3d(self.conv1(x), (1, 2, 2))  # (B, w, T, H/2, W/2)
        x = F.max_pool3d(self.conv2(x), 2)  # (B, 2w, T/2, H/4, W/4)
        x = F.max_pool3d(self.conv3b(self.conv3a(x)), 2)  # (B, 4w, T/4, H/8, W/8)
        x = F.max_pool3d(self.conv4b(self.conv4a(x)), 2)  # (B, 8w, T/8, H/16, W/16)
        return self.conv5b(self.conv5a(x))  # (B, 8w, T/8, H/16, W/16)

    def forward_both(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """What `forward` and `forward_pretrain` return, in one pass."""
        maps = self(x)
        return maps, maps

    def grid(self, frames: int, height: int, width: int) -> tuple[int, int, int]:
        """(T1, H1, W1) of the map that `forward` returns for such a clip; ValueError if the clip is too small."""
        if frames < 8 or height < 16 or width < 16:
            raise ValueError(f"C3D halves time 3 times and space 4 times: {frames}x{height}x{width} is below 8x16x16")
        return frames // 8, height // 16, width // 16

    forward_pretrain, pretrain_grid = forward, grid
    """Of the map that both pretraining tasks share: here the plain one."""


def _unit(in_channels: int, out_channels: int) -> nn.Sequential:
    convolution = nn.Conv3d(in_channels, out_channels, 3, padding=1, bias=False)
    nn.init.kaiming_normal_(convolution.weight, mode="fan_out", nonlinearity="relu")
    return nn.Sequential(convolution, nn.BatchNorm3d(out_channels), nn.ReLU(inplace=True))
