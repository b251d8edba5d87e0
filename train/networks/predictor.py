"""Predictors of future motion features from a clip's (the paper's section 3.3): Transformer and ConvGRU.

Both map (B, C1, T1, H1, W1) to (B, C3, T3, H3, W3); the two grids are fixed at construction.

Shapes: B clips; N1 = T1 H1 W1 tokens in, N3 = T3 H3 W3 out, in the order t, h, w; D width; A heads; Q queries and
K keys of one attention (each N1 or N3).
"""

from __future__ import annotations

from math import prod
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from train.networks.heads import flatten_points

Grid = tuple[int, int, int]

# The paper's sections 3.3 and 4.1; heads and dropout are those of Vaswani et al.
ENCODER_LAYERS, DECODER_LAYERS, FEED_FORWARD = 2, 4, 512
HEADS, DROPOUT = 8, 0.1


class TransformerPredictor(nn.Module):
    """Encoder over the clip's tokens, decoder over learned queries, one a point of the motion map.

    Post-norm (Vaswani et al. 2017). Learned positions are added to queries and keys in every attention, never to
    values, as DETR does (Carion et al. 2020). The decoder has learned queries, which it starts from, and positions of
    its own. `queries` "zeros" begins as released, with queries at zero and positions from U(0, 1): the values of its
    first self-attention are all the same then, and a thousandth of the variance of what comes out is that of position,
    where with "normal" it is a sixth. A last linear map follows only where `width` is not C3.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        in_grid: Grid,
        out_grid: Grid,
        *,
        width: int = 512,
        queries: Literal["normal", "zeros"] = "normal",
    ) -> None:
        super().__init__()
        self.in_grid = in_grid
        self.out_grid = out_grid
        self.linear_in = nn.Linear(in_channels, width)
        drawn, first = (torch.randn, torch.randn) if queries == "normal" else (torch.rand, torch.zeros)
        self.in_positions = nn.Parameter(drawn(prod(in_grid), width))
        self.out_positions = nn.Parameter(drawn(prod(out_grid), width))
        self.queries = nn.Parameter(first(prod(out_grid), width))
        self.encoder = nn.ModuleList(EncoderLayer(width) for _ in range(ENCODER_LAYERS))
        self.decoder = nn.ModuleList(DecoderLayer(width) for _ in range(DECODER_LAYERS))
        self.linear_out = nn.Identity() if width == out_channels else nn.Linear(width, out_channels)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C1, T1, H1, W1) -> (B, C3, T3, H3, W3); ValueError if the map has another grid."""
        _check_grid(x, self.in_grid)
        memory = self.linear_in(flatten_points(x).unflatten(0, (len(x), -1)))  # (B, N1, D)
        for layer in self.encoder:
            memory = layer(memory, self.in_positions)  # (B, N1, D)
        out = self.queries.expand(len(x), -1, -1)  # (B, N3, D)
        for layer in self.decoder:
            out = layer(out, self.out_positions, memory, self.in_positions)  # (B, N3, D)
        return self.linear_out(out).transpose(1, 2).unflatten(2, self.out_grid)  # (B, C3, T3, H3, W3)


class EncoderLayer(nn.Module):
    """Self-attention, then the feed-forward part, each added to its input and normalised."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.attention = Attention(width)
        self.norm1 = nn.LayerNorm(width)
        self.feed_forward = _feed_forward(width)
        self.norm2 = nn.LayerNorm(width)
        self.dropout = nn.Dropout(DROPOUT)

    def forward(self, x: Tensor, positions: Tensor) -> Tensor:
        """(B, N1, D), positions (N1, D) -> (B, N1, D)"""
        placed = x + positions
        x = self.norm1(x + self.dropout(self.attention(placed, placed, x)))  # (B, N1, D)
        return self.norm2(x + self.dropout(self.feed_forward(x)))  # (B, N1, D)


class DecoderLayer(nn.Module):
    """Self-attention, attention to the encoder's memory, then the feed-forward part, each added and normalised."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.self_attention = Attention(width)
        self.norm1 = nn.LayerNorm(width)
        self.cross_attention = Attention(width)
        self.norm2 = nn.LayerNorm(width)
        self.feed_forward = _feed_forward(width)
        self.norm3 = nn.LayerNorm(width)
        self.dropout = nn.Dropout(DROPOUT)

    def forward(self, x: Tensor, positions: Tensor, memory: Tensor, memory_positions: Tensor) -> Tensor:
        """(B, N3, D), positions (N3, D), memory (B, N1, D), its positions (N1, D) -> (B, N3, D)"""
        placed = x + positions
        x = self.norm1(x + self.dropout(self.self_attention(placed, placed, x)))  # (B, N3, D)
        attended = self.cross_attention(x + positions, memory + memory_positions, memory)  # (B, N3, D)
        x = self.norm2(x + self.dropout(attended))  # (B, N3, D)
        return self.norm3(x + self.dropout(self.feed_forward(x)))  # (B, N3, D)


class Attention(nn.Module):
    """Multi-head attention. Keys carry no bias: it would add the same to all logits of a query, so softmax drops it."""

    def __init__(self, width: int) -> None:
        super().__init__()
        if width % HEADS:
            raise ValueError(f"predictor_width is {width}; choose a multiple of {HEADS}, one part a head")
        self.dropout = nn.Dropout(DROPOUT)
        self.query = nn.Linear(width, width)
        self.key = nn.Linear(width, width, bias=False)
        self.value = nn.Linear(width, width)
        self.out = nn.Linear(width, width)

    def forward(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """(B, Q, D), (B, K, D), (B, K, D) -> (B, Q, D)"""
        q = self.query(query).unflatten(2, (HEADS, -1)).transpose(1, 2)  # (B, A, Q, D/A)
        k = self.key(key).unflatten(2, (HEADS, -1)).transpose(1, 2)  # (B, A, K, D/A)
        v = self.value(value).unflatten(2, (HEADS, -1)).transpose(1, 2)  # (B, A, K, D/A)
        dropout = self.dropout.p if self.training else 0.0
        mixed = F.scaled_dot_product_attention(q, k, v, dropout_p=dropout)  # (B, A, Q, D/A)
        return self.out(mixed.transpose(1, 2).flatten(2))  # (B, Q, D)


class ConvGRUPredictor(nn.Module):
    """A convolutional GRU over the clip's T1 steps, then rolled forward on its own predictions (paper, table 1).

    The paper gives no detail; this is GRU-RCN's cell (Ballas et al. 2016, section 3.1) used as dense predictive coding
    does (Han et al. 2019, section 3.1). A linear map takes C1 to `width`; the state starts at zero and keeps the clip's
    H1 x W1 and `width` channels; after the last step two 1x1 convolutions with a ReLU between turn the state into the
    first prediction, which is the cell's next input where T3 > 1, and so on. With T3 = 1 it is one predicted step.
    Predictions are resampled to H3 x W3 (bilinear) if that differs, and mapped to C3 if that is not `width`.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        in_grid: Grid,
        out_grid: Grid,
        *,
        width: int = 512,
    ) -> None:
        super().__init__()
        self.in_grid = in_grid
        self.out_grid = out_grid
        self.conv_in = nn.Conv2d(in_channels, width, 1)
        self.cell = ConvGRUCell(width)
        self.predict = nn.Sequential(nn.Conv2d(width, width, 1), nn.ReLU(inplace=True), nn.Conv2d(width, width, 1))
        self.conv_out = nn.Identity() if width == out_channels else nn.Conv2d(width, out_channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C1, T1, H1, W1) -> (B, C3, T3, H3, W3); ValueError if the map has another grid."""
        _check_grid(x, self.in_grid)
        steps = [self.conv_in(step) for step in x.unbind(2)]  # T1 of (B, D, H1, W1)
        state = torch.zeros_like(steps[0])  # (B, D, H1, W1)
        for step in steps:
            state = self.cell(step, state)  # (B, D, H1, W1)
        predicted = [self.predict(state)]  # (B, D, H1, W1)
        while len(predicted) < self.out_grid[0]:
            state = self.cell(predicted[-1], state)  # (B, D, H1, W1)
            predicted.append(self.predict(state))  # (B, D, H1, W1)
        size = self.out_grid[1:]
        if size != self.in_grid[1:]:
            predicted = [F.interpolate(p, size, mode="bilinear", align_corners=False) for p in predicted]
        return torch.stack([self.conv_out(p) for p in predicted], dim=2)  # (B, C3, T3, H3, W3)


class ConvGRUCell(nn.Module):
    """One step of a GRU whose products are 3x3 convolutions (Ballas et al. 2016, section 3.1)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.gates = nn.Conv2d(2 * width, 2 * width, 3, padding=1)
        self.candidate = nn.Conv2d(2 * width, width, 3, padding=1)
        for convolution in (self.gates, self.candidate):
            nn.init.xavier_uniform_(convolution.weight)
            assert convolution.bias is not None
            nn.init.zeros_(convolution.bias)

    def forward(self, x: Tensor, state: Tensor) -> Tensor:
        """Input and state (B, D, H1, W1) -> the new state (B, D, H1, W1)"""
        update, reset = self.gates(torch.cat((x, state), dim=1)).sigmoid().chunk(2, dim=1)  # (B, D, H1, W1) each
        candidate = self.candidate(torch.cat((x, reset * state), dim=1)).tanh()  # (B, D, H1, W1)
        return (1 - update) * state + update * candidate  # (B, D, H1, W1)


def _feed_forward(width: int) -> nn.Sequential:
    first, last = nn.Linear(width, FEED_FORWARD), nn.Linear(FEED_FORWARD, width)
    return nn.Sequential(first, nn.ReLU(inplace=True), nn.Dropout(DROPOUT), last)


def _check_grid(x: Tensor, grid: Grid) -> None:
    if tuple(x.shape[2:]) != tuple(grid):
        raise ValueError(f"the predictor was built for a map of {grid}, this one is {tuple(x.shape[2:])}")
