"""Projection heads (the paper's sections 3.2 and 3.3) and the flattening of maps into points.

Shapes: M rows, one a clip (global features) or one a point (pointwise features); C channels; B samples; T, H, W the
grid of a map; N = T H W points.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class MLPHead(nn.Module):
    """Linear - batch norm - ReLU - linear - batch norm, then unit length: the g of equations (1) and (2).

    The linear layers carry no bias, which batch norm would remove.
    """

    def __init__(self, in_channels: int, hidden: int = 2048, out_channels: int = 512) -> None:
        super().__init__()
        self.linear1 = nn.Linear(in_channels, hidden, bias=False)
        self.norm1 = nn.BatchNorm1d(hidden)
        self.linear2 = nn.Linear(hidden, out_channels, bias=False)
        self.norm2 = nn.BatchNorm1d(out_channels)

    def forward(self, x: Tensor) -> Tensor:
        """(M, in) -> (M, out) rows of unit length, in float32 even under autocast: in bfloat16 none has length 1.

        Training mode needs at least two rows (batch norm).
        """
        x = F.relu(self.norm1(self.linear1(x)), inplace=True)  # (M, hidden)
        x = self.linear2(x)  # (M, out), of lower precision under autocast
        x = x.to(torch.promote_types(x.dtype, torch.float32))  # (M, out)
        return F.normalize(self.norm2(x), dim=1)  # (M, out)


def flatten_points(x: Tensor) -> Tensor:
    """(B, C, T, H, W) -> (B T H W, C), rows in the order b, then t, h, w."""
    return x.permute(0, 2, 3, 4, 1).flatten(0, 3)  # (B T H W, C)
