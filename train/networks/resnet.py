"""One family of residual networks: R3D-26, R(2+1)D-26, R3D-10 and R2D-10 (the paper's section 4.1).

Shapes: B clips; Cin channels in (3 colours, 2 for motion); w width (64); e the block's expansion (Bottleneck 4,
BasicBlock 1); T frames, H and W pixels; s the stem's spatial stride (2, for motion 1).

    part       channels   stride (t, space)   16x112x112, s=2   8x112x112, s=1   8x64x64, s=2
    stem       w          1, s                16x56x56          8x112x112        8x32x32
    max-pool   w          1, 2                16x28x28          8x56x56          8x16x16
    layer1     w e        1, 1                16x28x28          8x56x56          8x16x16
    layer2     2 w e      2, 2                8x14x14           4x28x28          4x8x8
    layer3     4 w e      2, 2                4x7x7             2x14x14          2x4x4
    layer4     8 w e      2, 2                2x4x4             1x7x7            1x2x2

A "2d" network has temporal kernel and stride 1 throughout: it sees every frame by itself.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from functools import partial
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

Convolution = Literal["3d", "2plus1d", "2d"]
Upsampling = Literal["trilinear", "nearest"]


class ResNet(nn.Module):
    """Stem, max-pool and four layers of residual blocks; returns maps, never pooled ones.

    `blocks` counts the blocks of each layer. `channels` is what `forward` and `forward_pretrain` return. Residual
    branches start at zero (the last batch norm's scale), convolutions at He's initialisation, fan out.
    `recompute_stem`: keep nothing of the stem for the backward pass, whose maps are the largest, and compute it again.
    """

    def __init__(
        self,
        block: type[Bottleneck] | type[BasicBlock],
        blocks: Sequence[int],
        *,
        convolution: Convolution = "3d",
        in_channels: int = 3,
        width: int = 64,
        stem_stride: int = 2,
    ) -> None:
        super().__init__()
        self.convolution = convolution
        self.stem_stride = stem_stride
        self.upsampling: Upsampling = "trilinear"
        self.recompute_stem = False
        self.channels = 8 * width * block.expansion
        self.stem = nn.Sequential(
            _conv(convolution, in_channels, width, time=3, space=7, stride=(1, stem_stride)),
            nn.BatchNorm3d(width),
            nn.ReLU(inplace=True),
            nn.MaxPool3d((1, 3, 3), stride=(1, 2, 2), padding=(0, 1, 1)),
        )
        stride = (1, 2) if convolution == "2d" else (2, 2)
        self.layer1 = _layer(block, blocks[0], convolution, width, width, (1, 1))
        self.layer2 = _layer(block, blocks[1], convolution, width * block.expansion, 2 * width, stride)
        self.layer3 = _layer(block, blocks[2], convolution, 2 * width * block.expansion, 4 * width, stride)
        self.layer4 = _layer(block, blocks[3], convolution, 4 * width * block.expansion, 8 * width, stride)

        for module in self.modules():
            if isinstance(module, nn.Conv3d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
            elif isinstance(module, Bottleneck | BasicBlock):
                nn.init.zeros_(module.last_norm.weight)

    def forward(self, x: Tensor) -> Tensor:
        """(B, Cin, T, H, W) -> the plain layer-4 map (B, 8we, T/8, H/(16s), W/(16s)), sizes rounded up, not pooled."""
        return self.layer4(self._layer3(x))

    def forward_pretrain(self, x: Tensor) -> Tensor:
        """(B, Cin, T, H, W) -> the map that both pretraining tasks share, (B, 8we, T/8, H/(8s), W/(8s)).

        Layer 4, upsampled to the height and width of layer 3, plus layer 3 with its even and odd frames stacked on
        channels. Finer than layer 4, so that its points match those of the M-Network. Raises as `pretrain_grid`.
        """
        return self.forward_both(x)[1]

    def forward_both(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """What `forward` and `forward_pretrain` return, in one pass."""
        self.pretrain_grid(*x.shape[-3:])
        layer3 = self._layer3(x)  # (B, 4we, T/4, H/(8s), W/(8s))
        layer4 = self.layer4(layer3)  # (B, 8we, T/8, H/(16s), W/(16s))
        size = (layer4.shape[2], layer3.shape[3], layer3.shape[4])
        corners = False if self.upsampling == "trilinear" else None
        upsampled = F.interpolate(layer4, size, mode=self.upsampling, align_corners=corners)  # as layer3, T/8 frames
        stacked = torch.cat((layer3[:, :, 0::2], layer3[:, :, 1::2]), dim=1)  # (B, 8we, T/8, H/(8s), W/(8s))
        return layer4, upsampled + stacked

    def grid(self, frames: int, height: int, width: int) -> tuple[int, int, int]:
        """(T1, H1, W1) of the map that `forward` returns for such a clip."""
        time, space = 1 if self.convolution == "2d" else 8, 16 * self.stem_stride
        return -(-frames // time), -(-height // space), -(-width // space)

    def pretrain_grid(self, frames: int, height: int, width: int) -> tuple[int, int, int]:
        """(T1, H1, W1) of the map that `forward_pretrain` returns for such a clip.

        Raises ValueError where layer 3 has no pairs of frames to stack: a 2d network, or an odd number of frames.
        """
        if self.convolution == "2d":
            raise ValueError("a 2d network keeps every frame, so its layer 3 cannot be stacked on layer 4: use forward")
        layer3_frames = -(-frames // 4)
        if layer3_frames % 2:
            raise ValueError(
                f"{frames} frames leave {layer3_frames} in layer 3, but even and odd frames are stacked in pairs: "
                "choose a multiple of 8 frames"
            )
        space = 8 * self.stem_stride
        return layer3_frames // 2, -(-height // space), -(-width // space)

    def _layer3(self, x: Tensor) -> Tensor:
        maps = recomputed(self.stem, x) if self.recompute_stem else self.stem(x)
        return self.layer3(self.layer2(self.layer1(maps)))


class Bottleneck(nn.Module):
    """1x1x1 down to `planes`, 3x3x3 (which carries the stride), 1x1x1 up to 4 `planes`; plus the shortcut."""

    expansion = 4

    def __init__(self, convolution: Convolution, in_channels: int, planes: int, stride: tuple[int, int]) -> None:
        super().__init__()
        out_channels = planes * self.expansion
        self.conv1 = _conv(convolution, in_channels, planes, time=1, space=1)
        self.norm1 = nn.BatchNorm3d(planes)
        self.conv2 = _conv(convolution, planes, planes, time=3, space=3, stride=stride)
        self.norm2 = nn.BatchNorm3d(planes)
        self.conv3 = _conv(convolution, planes, out_channels, time=1, space=1)
        self.last_norm = nn.BatchNorm3d(out_channels)
        self.shortcut = _shortcut(convolution, in_channels, out_channels, stride)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, T, H, W) -> (B, 4 planes, T/stride, H/stride, W/stride)"""
        out = F.relu(self.norm1(self.conv1(x)), inplace=True)  # (B, planes, T, H, W)
        out = F.relu(self.norm2(self.conv2(out)), inplace=True)  # (B, planes, T/stride, H/stride, W/stride)
        out = self.last_norm(self.conv3(out))  # (B, 4 planes, T/stride, H/stride, W/stride)
        return F.relu(out + self.shortcut(x), inplace=True)


class BasicBlock(nn.Module):
    """3x3x3 (which carries the stride), 3x3x3; plus the shortcut."""

    expansion = 1

    def __init__(self, convolution: Convolution, in_channels: int, planes: int, stride: tuple[int, int]) -> None:
        super().__init__()
        self.conv1 = _conv(convolution, in_channels, planes, time=3, space=3, stride=stride)
        self.norm1 = nn.BatchNorm3d(planes)
        self.conv2 = _conv(convolution, planes, planes, time=3, space=3)
        self.last_norm = nn.BatchNorm3d(planes)
        self.shortcut = _shortcut(convolution, in_channels, planes, stride)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, T, H, W) -> (B, planes, T/stride, H/stride, W/stride)"""
        out = F.relu(self.norm1(self.conv1(x)), inplace=True)  # (B, planes, T/stride, H/stride, W/stride)
        out = self.last_norm(self.conv2(out))  # (B, planes, T/stride, H/stride, W/stride)
        return F.relu(out + self.shortcut(x), inplace=True)


def r3d26(width: int = 64) -> ResNet:
    """R3D-26: (B, 3, 16, 112, 112) -> (B, 2048, 2, 4, 4), in pretraining (B, 2048, 2, 7, 7)."""
    return ResNet(Bottleneck, (2, 2, 2, 2), width=width)


def r2plus1d26(width: int = 64) -> ResNet:
    """R(2+1)D-26: as R3D-26, every 3x3x3 convolution (and the stem) factored into space, then time."""
    return ResNet(Bottleneck, (2, 2, 2, 2), convolution="2plus1d", width=width)


def r3d10(in_channels: int = 3, width: int = 64, stem_stride: int = 2) -> ResNet:
    """R3D-10. The M-Network is `r3d10(2, stem_stride=1)`: (B, 2, 8, 112, 112) -> (B, 512, 1, 7, 7)."""
    return ResNet(BasicBlock, (1, 1, 1, 1), in_channels=in_channels, width=width, stem_stride=stem_stride)


def r2d10(width: int = 64) -> ResNet:
    """R2D-10, the I-Network: (B, 3, 1, H, W) -> (B, 512, 1, H/32, W/32), to be pooled globally."""
    return ResNet(BasicBlock, (1, 1, 1, 1), convolution="2d", width=width)


def recomputed(module: nn.Module, x: Tensor) -> Tensor:
    """module(x), of which nothing but x is kept: the backward pass computes it again. Gradients and running statistics
    are those of the plain call. The module draws nothing at random."""
    again = partial(checkpoint, module, x, use_reentrant=False, preserve_rng_state=False)
    if torch.compiler.is_compiling():  # it keeps the update of buffers apart, and takes no contexts
        return again()
    return again(context_fn=lambda: (nullcontext(), _buffers_kept(module)))


@contextmanager
def _buffers_kept(module: nn.Module) -> Iterator[None]:
    """Batch norm updates its statistics whenever it computes; here those are copies."""
    own = [(part, part._buffers) for part in module.modules()]
    for part, buffers in own:
        part._buffers = {name: buffer.clone() for name, buffer in buffers.items() if buffer is not None}
    try:
        yield
    finally:
        for part, buffers in own:
            part._buffers = buffers


def _conv(
    kind: Convolution,
    in_channels: int,
    out_channels: int,
    *,
    time: int,
    space: int,
    stride: tuple[int, int] = (1, 1),
) -> nn.Module:
    """A `time` x `space` x `space` convolution of this kind that pads to keep sizes; stride is (time, space).

    "2plus1d" gives it the middle channels that keep the parameter count (Tran et al. 2018, section 3.5).
    """
    time_stride, space_stride = stride
    strides = (time_stride, space_stride, space_stride)
    if time == 1 or kind != "2plus1d":
        kernel = (1 if kind == "2d" else time, space, space)
        padding = (kernel[0] // 2, space // 2, space // 2)
        return nn.Conv3d(in_channels, out_channels, kernel, strides, padding, bias=False)

    area = space * space
    middle = time * area * in_channels * out_channels // (area * in_channels + time * out_channels)
    return nn.Sequential(
        nn.Conv3d(in_channels, middle, (1, space, space), (1, *strides[1:]), (0, space // 2, space // 2), bias=False),
        nn.BatchNorm3d(middle),
        nn.ReLU(inplace=True),
        nn.Conv3d(middle, out_channels, (time, 1, 1), (time_stride, 1, 1), (time // 2, 0, 0), bias=False),
    )


def _shortcut(kind: Convolution, in_channels: int, out_channels: int, stride: tuple[int, int]) -> nn.Module:
    if stride == (1, 1) and in_channels == out_channels:
        return nn.Identity()
    convolution = _conv(kind, in_channels, out_channels, time=1, space=1, stride=stride)
    return nn.Sequential(convolution, nn.BatchNorm3d(out_channels))


def _layer(
    block: type[Bottleneck] | type[BasicBlock],
    count: int,
    kind: Convolution,
    in_channels: int,
    planes: int,
    stride: tuple[int, int],
) -> nn.Sequential:
    first = block(kind, in_channels, planes, stride)
    rest = (block(kind, planes * block.expansion, planes, (1, 1)) for _ in range(count - 1))
    return nn.Sequential(first, *rest)
