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


def test_parameter_count_of_c3d() -> None:
    assert count(on_meta(C3D)) == (
        3 * 64 * 27 + 2 * 64  # conv1 and its norm's scale and shift
        + 64 * 128 * 27 + 2 * 128  # conv2
        + 128 * 256 * 27 + 2 * 256  # conv3a
        + 256 * 256 * 27 + 2 * 256  # conv3b
        + 256 * 512 * 27 + 2 * 512  # conv4a
        + 512 * 512 * 27 + 2 * 512  # conv4b
        + 512 * 512 * 27 + 2 * 512  # conv5a
        + 512 * 512 * 27 + 2 * 512  # conv5b
    )  # fmt: skip


def test_parameter_count_of_r3d_26() -> None:
    assert count(on_meta(r3d26)) == (
        3 * 64 * 3 * 7 * 7 + 2 * 64  # stem
        + 64 * 64 + 2 * 64 + 64 * 64 * 27 + 2 * 64 + 64 * 256 + 2 * 256  # layer 1, block 1
        + 64 * 256 + 2 * 256  # its shortcut
        + 256 * 64 + 2 * 64 + 64 * 64 * 27 + 2 * 64 + 64 * 256 + 2 * 256  # layer 1, block 2
        + 256 * 128 + 2 * 128 + 128 * 128 * 27 + 2 * 128 + 128 * 512 + 2 * 512  # layer 2, block 1
        + 256 * 512 + 2 * 512  # its shortcut
        + 512 * 128 + 2 * 128 + 128 * 128 * 27 + 2 * 128 + 128 * 512 + 2 * 512  # layer 2, block 2
        + 512 * 256 + 2 * 256 + 256 * 256 * 27 + 2 * 256 + 256 * 1024 + 2 * 1024  # layer 3, block 1
        + 512 * 1024 + 2 * 1024  # its shortcut
        + 1024 * 256 + 2 * 256 + 256 * 256 * 27 + 2 * 256 + 256 * 1024 + 2 * 1024  # layer 3, block 2
        + 1024 * 512 + 2 * 512 + 512 * 512 * 27 + 2 * 512 + 512 * 2048 + 2 * 2048  # layer 4, block 1
        + 1024 * 2048 + 2 * 2048  # its shortcut
        + 2048 * 512 + 2 * 512 + 512 * 512 * 27 + 2 * 512 + 512 * 2048 + 2 * 2048  # layer 4, block 2
    )  # fmt: skip


def test_parameter_count_of_r2plus1d_26() -> None:
    # Middle channels: stem 3*49*3*64 / (49*3 + 3*64) = 28224 / 339 = 83.3; else 27*c*c / (9*c + 3*c) = 2.25 c.
    factored_64 = 64 * 144 * 9 + 2 * 144 + 144 * 64 * 3 + 2 * 64
    factored_128 = 128 * 288 * 9 + 2 * 288 + 288 * 128 * 3 + 2 * 128
    factored_256 = 256 * 576 * 9 + 2 * 576 + 576 * 256 * 3 + 2 * 256
    factored_512 = 512 * 1152 * 9 + 2 * 1152 + 1152 * 512 * 3 + 2 * 512
    assert count(on_meta(r2plus1d26)) == (
        3 * 83 * 7 * 7 + 2 * 83 + 83 * 64 * 3 + 2 * 64  # stem
        + 64 * 64 + 2 * 64 + factored_64 + 64 * 256 + 2 * 256  # layer 1, block 1
        + 64 * 256 + 2 * 256  # its shortcut
        + 256 * 64 + 2 * 64 + factored_64 + 64 * 256 + 2 * 256  # layer 1, block 2
        + 256 * 128 + 2 * 128 + factored_128 + 128 * 512 + 2 * 512  # layer 2, block 1
        + 256 * 512 + 2 * 512  # its shortcut
        + 512 * 128 + 2 * 128 + factored_128 + 128 * 512 + 2 * 512  # layer 2, block 2
        + 512 * 256 + 2 * 256 + factored_256 + 256 * 1024 + 2 * 1024  # layer 3, block 1
        + 512 * 1024 + 2 * 1024  # its shortcut
        + 1024 * 256 + 2 * 256 + factored_256 + 256 * 1024 + 2 * 1024  # layer 3, block 2
        + 1024 * 512 + 2 * 512 + factored_512 + 512 * 2048 + 2 * 2048  # layer 4, block 1
        + 1024 * 2048 + 2 * 2048  # its shortcut
        + 2048 * 512 + 2 * 512 + factored_512 + 512 * 2048 + 2 * 2048  # layer 4, block 2
    )  # fmt: skip


def test_parameter_count_of_the_motion_network() -> None:
    assert count(on_meta(lambda: r3d10(2, stem_stride=1))) == (
        2 * 64 * 3 * 7 * 7 + 2 * 64  # stem
        + 64 * 64 * 27 + 2 * 64 + 64 * 64 * 27 + 2 * 64  # layer 1, whose shortcut is the identity
        + 64 * 128 * 27 + 2 * 128 + 128 * 128 * 27 + 2 * 128 + 64 * 128 + 2 * 128  # layer 2 and its shortcut
        + 128 * 256 * 27 + 2 * 256 + 256 * 256 * 27 + 2 * 256 + 128 * 256 + 2 * 256  # layer 3
        + 256 * 512 * 27 + 2 * 512 + 512 * 512 * 27 + 2 * 512 + 256 * 512 + 2 * 512  # layer 4
    )  # fmt: skip


def test_parameter_count_of_the_iframe_network() -> None:
    assert count(on_meta(r2d10)) == (
        3 * 64 * 7 * 7 + 2 * 64  # stem
        + 64 * 64 * 9 + 2 * 64 + 64 * 64 * 9 + 2 * 64  # layer 1, whose shortcut is the identity
        + 64 * 128 * 9 + 2 * 128 + 128 * 128 * 9 + 2 * 128 + 64 * 128 + 2 * 128  # layer 2 and its shortcut
        + 128 * 256 * 9 + 2 * 256 + 256 * 256 * 9 + 2 * 256 + 128 * 256 + 2 * 256  # layer 3
        + 256 * 512 * 9 + 2 * 512 + 512 * 512 * 9 + 2 * 512 + 256 * 512 + 2 * 512  # layer 4
    )  # fmt: skip


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
