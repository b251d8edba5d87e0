"""Networks: sizes, references that share no code with what they check, how they start."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any, TypeVar

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import tiny_config
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from train.config import Networks
from train.draws import Sampling
from train.model import build_model
from train.networks import build_predictor, build_video_network
from train.networks.c3d import C3D
from train.networks.heads import MLPHead
from train.networks.predictor import Attention, ConvGRUPredictor, TransformerPredictor
from train.networks.resnet import BasicBlock, Bottleneck, ResNet, r2d10, r2plus1d26, r3d10, r3d26, recomputed

Network = TypeVar("Network", bound=nn.Module)


def on_meta(build: Callable[[], Network]) -> Network:
    """The network without memory for its weights: enough for shapes and counts."""
    with torch.device("meta"):
        return build()


def meta_shape(forward: Callable[[Tensor], Tensor], *shape: int) -> tuple[int, ...]:
    return tuple(forward(torch.empty(shape, device="meta")).shape)


def wake(network: Network) -> Network:
    """Gives every batch norm a scale and a shift of its own, so that residual branches are not zero."""
    generator = torch.Generator().manual_seed(1)
    for module in network.modules():
        if isinstance(module, nn.BatchNorm1d | nn.BatchNorm3d):
            module.weight.data.uniform_(0.5, 1.5, generator=generator)
            module.bias.data.uniform_(-0.5, 0.5, generator=generator)
    return network


def small_transformer() -> TransformerPredictor:
    torch.manual_seed(0)
    network = TransformerPredictor(5, 3, (2, 2, 3), (2, 1, 2), width=16).double()
    for parameter in network.parameters():  # biases and norms away from zeros and ones
        parameter.data += 0.3 * torch.randn_like(parameter)
    return network


# ------------------------------------------------------- sizes, worked out by hand from the tables of the papers


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


C3D_PLANES = [(3, 64), (64, 128), (128, 256), (256, 256), (256, 512), (512, 512), (512, 512), (512, 512)]
# The channels between of the factored stem: 3*49*3*64 / (49*3 + 3*64) = 28224 / 339 = 83.3.
FACTORED_STEM = unit(3, 83, 7 * 7) + unit(83, 64, 3)


@pytest.mark.parametrize(
    ("name", "parameters", "channels"),
    [
        ("c3d", sum(unit(a, b, 27) for a, b in C3D_PLANES), 512),
        ("r3d26", unit(3, 64, 3 * 7 * 7) + bottlenecks(full), 2048),
        ("r2plus1d26", FACTORED_STEM + bottlenecks(factored), 2048),
        ("r3d10", unit(3, 64, 3 * 7 * 7) + basic(27), 512),
    ],
)
def test_video_networks_by_name_at_full_size(name: str, parameters: int, channels: int) -> None:
    network = on_meta(lambda: build_video_network(name))
    assert count(network) == parameters and network.channels == channels
    assert meta_shape(network.forward_pretrain, 1, 3, 16, 112, 112) == (1, channels, 2, 7, 7)


def test_motion_and_iframe_networks_at_full_size() -> None:
    motion, iframe = on_meta(lambda: r3d10(2, stem_stride=1)), on_meta(r2d10)
    assert count(motion) == unit(2, 64, 3 * 7 * 7) + basic(27) and count(iframe) == unit(3, 64, 7 * 7) + basic(9)
    assert meta_shape(motion, 1, 2, 8, 112, 112) == (1, 512, 1, 7, 7)  # the video networks' points
    assert meta_shape(iframe, 1, 3, 1, 112, 112) == (1, 512, 1, 4, 4)


@pytest.mark.parametrize(("channels", "out_channels"), [(2048, 512), (512, 128)])
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


def test_parameter_counts_of_the_conv_gru_and_of_a_head() -> None:
    assert count(on_meta(lambda: build_predictor("convgru", 2048, 512, (2, 7, 7), (1, 7, 7)))) == (
        2048 * 512 + 512  # linear map in
        + 3 * ((512 + 512) * 512 * 9 + 512)  # update gate, reset gate and candidate, from input and state
        + 512 * 512 + 512 + 512 * 512 + 512  # prediction
    )  # fmt: skip
    # No biases: the norms have them.
    assert count(on_meta(lambda: MLPHead(2048))) == 2048 * 2048 + 2 * 2048 + 2048 * 512 + 2 * 512


# ------------------------------------------------------------------------------------------------- backbones' maps


@settings(max_examples=6, deadline=None)
@given(st.integers(1, 33), st.integers(16, 130), st.integers(16, 130), st.sampled_from([1, 2]))
def test_grids_are_those_of_the_maps(frames: int, height: int, width: int, stride: int) -> None:
    resnet = on_meta(lambda: r3d10(width=2, stem_stride=stride))
    shape = (2, 3, frames, height, width)
    assert meta_shape(resnet, *shape) == (2, 16, *resnet.grid(frames, height, width))
    frame_network = on_meta(lambda: r2d10(width=2))
    assert meta_shape(frame_network, *shape) == (2, 16, *frame_network.grid(frames, height, width))
    if (frames + 3) // 4 % 2:
        with pytest.raises(ValueError, match=rf"{frames} frames leave \d+ in layer 3.*multiple of 8"):
            resnet.forward_pretrain(torch.empty(shape, device="meta"))
    else:
        assert meta_shape(resnet.forward_pretrain, *shape) == (2, 16, *resnet.pretrain_grid(frames, height, width))
    c3d = on_meta(lambda: C3D(width=2))
    if frames < 8:
        with pytest.raises(ValueError, match=f"{frames}x{height}x{width} is below 8x16x16"):
            c3d(torch.empty(shape, device="meta"))
    else:
        assert meta_shape(c3d, *shape) == (2, 16, *c3d.grid(frames, height, width))


def bilinear(image: np.ndarray, height: int, width: int) -> np.ndarray:
    """(H, W) -> (height, width), by hand: pixel centres at one half, edges repeated."""
    out = np.empty((height, width))
    for row in range(height):
        for column in range(width):
            y = max((row + 0.5) * image.shape[0] / height - 0.5, 0)
            x = max((column + 0.5) * image.shape[1] / width - 0.5, 0)
            top, left = int(y), int(x)
            bottom, right = min(top + 1, image.shape[0] - 1), min(left + 1, image.shape[1] - 1)
            upper = image[top, left] * (1 - (x - left)) + image[top, right] * (x - left)
            lower = image[bottom, left] * (1 - (x - left)) + image[bottom, right] * (x - left)
            out[row, column] = upper * (1 - (y - top)) + lower * (y - top)
    return out


def nearest(image: np.ndarray, height: int, width: int) -> np.ndarray:
    """(H, W) -> (height, width): of each pixel's upper left corner, the pixel that it lies in."""
    rows, columns = (np.arange(n) * of // n for n, of in zip((height, width), image.shape))
    return image[rows[:, None], columns]


@pytest.mark.parametrize(("upsampling", "enlarged"), [("trilinear", bilinear), ("nearest", nearest)])
def test_pretraining_map_is_layer_4_upsampled_plus_layer_3_stacked(upsampling: Any, enlarged: Any) -> None:
    torch.manual_seed(0)
    network: Any = wake(build_video_network("r3d10", width=2, upsampling=upsampling)).double().eval()
    maps: list[Tensor] = []
    network.layer3.register_forward_hook(lambda _module, _inputs, out: maps.append(out.clone()))
    network.layer4.register_forward_hook(lambda _module, _inputs, out: maps.append(out.clone()))
    with torch.no_grad():
        x = torch.randn(2, 3, 16, 80, 112, dtype=torch.float64)
        combined = network.forward_pretrain(x)
        torch.testing.assert_close(network(x), maps[1])
    layer3, layer4 = (m.numpy() for m in maps[:2])
    assert layer3.shape == (2, 8, 4, 5, 7) and layer4.shape == (2, 16, 2, 3, 4)
    expected = np.empty((2, 16, 2, 5, 7))
    for b in range(2):
        for c in range(16):
            for t in range(2):
                frame = 2 * t if c < 8 else 2 * t + 1  # even frames in the first half of the channels
                expected[b, c, t] = enlarged(layer4[b, c, t], 5, 7) + layer3[b, c % 8, frame]
    np.testing.assert_allclose(combined.numpy(), expected, atol=1e-12)
    assert combined.shape[1:] == (network.channels, *network.pretrain_grid(16, 80, 112))


@pytest.mark.parametrize("compiled", [False, True])
def test_a_recomputed_module_updates_its_statistics_once(compiled: bool) -> None:
    torch.manual_seed(0)
    stem = wake(nn.Sequential(nn.Conv3d(2, 4, 3, padding=1), nn.BatchNorm3d(4), nn.ReLU(inplace=True)))
    twin, x = copy.deepcopy(stem), torch.randn(3, 2, 2, 4, 4)
    again = torch.compile(recomputed, backend="aot_eager", fullgraph=True) if compiled else recomputed
    for _ in range(2):
        stem(x).square().sum().backward()
        again(twin, x).square().sum().backward()
    torch.testing.assert_close(twin.state_dict(), stem.state_dict(), rtol=0, atol=0)
    for mine, plain in zip(twin.parameters(), stem.parameters()):
        torch.testing.assert_close(mine.grad, plain.grad, rtol=0, atol=0)


def convolved(w: dict[str, Tensor], name: str, x: Tensor, time: int = 1, space: int = 1) -> Tensor:
    """The convolution called `name`, of any kind, with these strides; its padding follows from its weight."""
    if f"{name}.3.weight" in w:  # factored: space, norm, ReLU, time
        x = convolved(w, f"{name}.0", x, space=space)
        return convolved(w, f"{name}.3", normed(w, f"{name}.1", x).clamp(min=0), time=time)
    weight = w[f"{name}.weight"]
    return F.conv3d(x, weight, stride=(time, space, space), padding=tuple(size // 2 for size in weight.shape[2:]))


def normed(w: dict[str, Tensor], name: str, x: Tensor) -> Tensor:
    """Batch norm at evaluation of a fresh network, whose running mean is 0 and running variance 1."""
    scale, shift = (w[f"{name}.{part}"][:, None, None, None] for part in ("weight", "bias"))
    return x / (1 + 1e-5) ** 0.5 * scale + shift


@pytest.mark.parametrize(
    ("build", "time", "space"),
    [(r3d26, 2, 2), (r2plus1d26, 2, 2), (r2d10, 1, 2), (lambda width: r3d10(width=width, stem_stride=1), 2, 1)],
)
def test_residual_networks_equal_their_layers_one_by_one(build: Callable[..., ResNet], time: int, space: int) -> None:
    torch.manual_seed(0)
    network = wake(build(width=2)).double().eval()
    w = network.state_dict()
    x = torch.randn(1, 3, 8, 40, 52, dtype=torch.float64)
    expected = normed(w, "stem.1", convolved(w, "stem.0", x, space=space)).clamp(min=0)
    expected = F.pad(expected, (1, 1, 1, 1)).unfold(3, 3, 2).unfold(4, 3, 2).amax((-2, -1))  # zeros: after a ReLU
    for layer in ("layer1", "layer2", "layer3", "layer4"):
        strides = (1, 1) if layer == "layer1" else (time, 2)
        for block in range(len(getattr(network, layer))):
            name, shortcut, step = f"{layer}.{block}", expected, strides if block == 0 else (1, 1)
            if f"{name}.shortcut.0.weight" in w:
                shortcut = normed(w, f"{name}.shortcut.1", convolved(w, f"{name}.shortcut.0", expected, *step))
            if f"{name}.conv3.weight" in w:  # Bottleneck: the second convolution carries the stride
                inner = normed(w, f"{name}.norm1", convolved(w, f"{name}.conv1", expected)).clamp(min=0)
                inner = normed(w, f"{name}.norm2", convolved(w, f"{name}.conv2", inner, *step)).clamp(min=0)
                branch = convolved(w, f"{name}.conv3", inner)
            else:  # BasicBlock: the first
                inner = normed(w, f"{name}.norm1", convolved(w, f"{name}.conv1", expected, *step)).clamp(min=0)
                branch = convolved(w, f"{name}.conv2", inner)
            expected = (normed(w, f"{name}.last_norm", branch) + shortcut).clamp(min=0)
    with torch.no_grad():
        torch.testing.assert_close(network(x), expected)


def test_c3d_equals_its_layers_one_by_one() -> None:
    torch.manual_seed(0)
    network = wake(C3D(width=2)).double().eval()
    w = network.state_dict()
    x = torch.randn(1, 3, 16, 32, 48, dtype=torch.float64)
    expected = x
    pools = {"conv1": (1, 2, 2), "conv2": (2, 2, 2), "conv3b": (2, 2, 2), "conv4b": (2, 2, 2)}
    for name in ("conv1", "conv2", "conv3a", "conv3b", "conv4a", "conv4b", "conv5a", "conv5b"):
        expected = normed(w, f"{name}.1", convolved(w, f"{name}.0", expected)).clamp(min=0)
        if name in pools:
            t, h, v = pools[name]
            expected = expected.unfold(2, t, t).unfold(3, h, h).unfold(4, v, v).amax((-3, -2, -1))
    with torch.no_grad():
        torch.testing.assert_close(network(x), expected)


# ------------------------------------------------------------------------------------------------ how networks start


@pytest.mark.parametrize("build", [r3d26, r2plus1d26, r3d10, r2d10, C3D])
def test_convolutions_start_at_he_fan_out_and_residual_branches_at_zero(build: Callable[..., ResNet | C3D]) -> None:
    torch.manual_seed(0)
    network = build(width=16)
    for module in network.modules():
        if isinstance(module, Bottleneck | BasicBlock):
            assert not module.last_norm.weight.any() and not module.last_norm.bias.any()
        if isinstance(module, nn.Conv3d) and module.weight.numel() > 20_000:
            out_channels, _, time, height, width = module.weight.shape
            expected = (2 / (out_channels * time * height * width)) ** 0.5
            assert module.weight.std().item() == pytest.approx(expected, rel=0.03)
            assert abs(module.weight.mean().item()) < 0.03 * expected


# ----------------------------------------------------------------------------------------------- what is refused


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: build_video_network("r3d18"), r"'r3d18'; there are c3d, r3d26, r2plus1d26, r3d10"),
        (lambda: build_predictor("lstm", 4, 4, (1, 2, 2), (1, 2, 2)), r"'lstm'; there are transformer, convgru"),
        (lambda: r3d10(width=2).pretrain_grid(4, 64, 64), r"4 frames leave 1 in layer 3.*multiple of 8"),
        (lambda: r3d10(width=2).forward_pretrain(torch.empty(1, 3, 12, 64, 64)), r"12 frames leave 3 in layer 3"),
        (lambda: r2d10(width=2).forward_pretrain(torch.empty(1, 3, 16, 64, 64)), r"2d network.*use forward"),
        (lambda: C3D(width=2)(torch.empty(1, 3, 16, 15, 64)), r"16x15x64 is below 8x16x16"),
        (lambda: Attention(12), r"predictor_width is 12; choose a multiple of 8"),
        (lambda: build_model(tiny_config("small-context", sampling=Sampling(frames=12)), 1), r"12 frames leave 3"),
        (
            lambda: build_model(tiny_config("small-scratch", networks=Networks("c3d"), sampling=Sampling(frames=4)), 1),
            r"4x32x32 is below 8x16x16",
        ),
        (lambda: small_transformer()(torch.zeros(1, 5, 2, 3, 2)), r"built for a map of \(2, 2, 3\).*\(2, 3, 2\)"),
        (
            lambda: ConvGRUPredictor(5, 4, (2, 2, 3), (1, 2, 3), width=4)(torch.zeros(1, 5, 1, 2, 3)),
            r"built for a map of \(2, 2, 3\).*\(1, 2, 3\)",
        ),
    ],
)
def test_what_cannot_work_is_refused(call: Callable[[], object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()
