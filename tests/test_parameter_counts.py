"""Parameter counts of the networks, worked out by hand from the tables of their papers."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import pytest
import torch
from torch import nn

from train.networks import build_predictor
from train.networks.c3d import C3D
from train.networks.heads import MLPHead
from train.networks.resnet import r2d10, r2plus1d26, r3d10, r3d26

Network = TypeVar("Network", bound=nn.Module)


def on_meta(build: Callable[[], Network]) -> Network:
    """The network without memory for its weights: enough for shapes and counts."""
    with torch.device("meta"):
        return build()


def count(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def unit(channels: int, out: int, kernel: int) -> int:
    """A convolution without bias, of so many positions, and its norm's scale and shift."""
    return channels * out * kernel + 2 * out


def factored(channels: int) -> int:
    """3x3x3 from and to so many channels as 3x3, then 3: 27 c c / (9 c + 3 c) = 2.25 c channels between."""
    return unit(channels, channels * 9 // 4, 9) + unit(channels * 9 // 4, channels, 3)


def full(channels: int) -> int:
    return unit(channels, channels, 27)


def bottlenecks(middle: Callable[[int], int]) -> int:
    """Four layers of two blocks, down to c, in the middle, up to 4 c; the first block of each has a shortcut."""
    total = 0
    for before, c in ((64, 64), (256, 128), (512, 256), (1024, 512)):
        total += unit(before, c, 1) + middle(c) + unit(c, 4 * c, 1) + unit(before, 4 * c, 1)
        total += unit(4 * c, c, 1) + middle(c) + unit(c, 4 * c, 1)
    return total


def basic(kernel: int) -> int:
    """Four layers of one block of two convolutions; the shortcut of the first is the identity."""
    total = 2 * unit(64, 64, kernel)
    for before, c in ((64, 128), (128, 256), (256, 512)):
        total += unit(before, c, kernel) + unit(c, c, kernel) + unit(before, c, 1)
    return total


def test_parameter_counts_of_the_backbones() -> None:
    convolutions = [(3, 64), (64, 128), (128, 256), (256, 256), (256, 512), (512, 512), (512, 512), (512, 512)]
    assert count(on_meta(C3D)) == sum(unit(a, b, 27) for a, b in convolutions)
    assert count(on_meta(r3d26)) == unit(3, 64, 3 * 7 * 7) + bottlenecks(full)
    # The stem's channels between: 3*49*3*64 / (49*3 + 3*64) = 28224 / 339 = 83.3.
    assert count(on_meta(r2plus1d26)) == unit(3, 83, 7 * 7) + unit(83, 64, 3) + bottlenecks(factored)
    assert count(on_meta(lambda: r3d10(2, stem_stride=1))) == unit(2, 64, 3 * 7 * 7) + basic(27)
    assert count(on_meta(r2d10)) == unit(3, 64, 7 * 7) + basic(9)


@pytest.mark.parametrize(("channels", "out_channels"), [(512, 512), (2048, 512), (512, 128)])
def test_parameter_count_of_the_transformer(channels: int, out_channels: int) -> None:
    attention = 4 * 512 * 512 + 3 * 512  # queries, keys, values, output; keys without bias
    feed_forward = 512 * 512 + 512 + 512 * 512 + 512
    norm = 512 + 512
    last = 0 if out_channels == 512 else 512 * 128 + 128
    transformer = on_meta(lambda: build_predictor("transformer", channels, out_channels, (2, 7, 7), (1, 7, 7)))
    assert count(transformer) == (
        channels * 512 + 512  # linear map in
        + 98 * 512 + 49 * 512 + 49 * 512  # positions of the 98 tokens, of the 49 queries; queries
        + 2 * (attention + feed_forward + 2 * norm)  # encoder
        + 4 * (attention + attention + feed_forward + 3 * norm)  # decoder
        + last
    )  # fmt: skip


def test_parameter_count_of_the_conv_gru() -> None:
    assert count(on_meta(lambda: build_predictor("convgru", 2048, 512, (2, 7, 7), (1, 7, 7)))) == (
        2048 * 512 + 512  # linear map in
        + (512 + 512) * 512 * 9 + 512  # update gate, from input and state
        + (512 + 512) * 512 * 9 + 512  # reset gate
        + (512 + 512) * 512 * 9 + 512  # candidate
        + 512 * 512 + 512 + 512 * 512 + 512  # prediction
    )  # fmt: skip


@pytest.mark.parametrize("channels", [512, 2048])
def test_parameter_count_of_a_head(channels: int) -> None:
    expected = channels * 2048 + 2 * 2048 + 2048 * 512 + 2 * 512  # no biases: the norms have them
    assert count(on_meta(lambda: MLPHead(channels))) == expected
