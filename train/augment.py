"""Augmentation of whole batches on the device: crop, flip and resample, then colours. Nothing is drawn here.

Every number comes with the batch (`train.draws` draws it a sample), so results do not depend on the device's generator,
and a sample's result does not depend on its neighbours. No operation waits for the device.

Legend: B batch, T frames, W motion maps, h x w a stored frame, S the crop's side, rows x cols the motion grid, D
channels of a motion map.
Boxes are (x0, y0, x1, y1) in fractions of the frame, float32 (B, 4); flips bool (B,), mirroring left and right inside
the box. A clip and a motion window with the same box and flip stay aligned: the content of crop pixel (x, y) came from
(x - dx, y - dy) of the previous frame's crop.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from kornia.color import rgb_to_grayscale
from kornia.enhance import (
    adjust_brightness_accumulative,
    adjust_contrast_with_mean_subtraction,
    adjust_hue,
    adjust_saturation_with_gray_subtraction,
)
from kornia.filters import filter2d_separable, get_gaussian_kernel1d
from torch import Tensor
from torch.nn import functional as F

from preprocess.schema import INTRA, MACROBLOCK, NO_RESIDUAL, QUARTERS

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
# A grey level of residual weighs as much as this many pixels of motion. At one, the root mean square of energies in the
# embedded scenes is 14 times that of vectors, and a network did not learn to see those.
ENERGY = 0.1


def crop(frames: Tensor, box: Tensor, flip: Tensor, size: int) -> Tensor:
    """Cut one box out of all frames of a clip and resample it to a square, antialiased where that shrinks it.

    frames uint8 (B, T, h, w, 3) -> float32 (B, 3, T, size, size), RGB in [0, 1]; see `resample`.
    """
    return resample(frames, box, flip, size) / 255


def crop_motion(
    motion: Tensor, box: Tensor, flip: Tensor, size: int, width: int, height: int, limit: float = 10.0
) -> Tensor:
    """Cut one box out of all maps of a motion window and resample it to a square; see `resample`.

    motion int (B, W, rows, cols, D) as stored, of 16x16 macroblocks: with D = 2 or 3, vectors in quarter pixels of the
    encoded frame of `width` x `height`, `INTRA` where there is none (read as zero); with D = 1 or 3, last, the energy
    of the residual, see `_known_energy`. Returns float32 (B, D, W, size, size), clamped to +-limit, over limit: (dx,
    dy) in pixels of the crop, dx negated where flipped; the energy a pixel in grey levels, times `ENERGY`.
    """
    rows, cols, depth = motion.shape[2:]
    vectors = motion[..., : depth - depth % 2]
    maps = vectors.masked_fill(vectors == INTRA, 0)
    if depth % 2:
        maps = torch.cat([maps, _known_energy(motion[..., -1:], limit)], -1)
    covered = width / (MACROBLOCK * cols), height / (MACROBLOCK * rows)  # whole macroblocks overhang the frame
    out = resample(maps, box, flip, size, covered)  # (B, D, W, S, S)
    zoom_x = size / ((box[:, 2] - box[:, 0]) * width)
    zoom_y = size / ((box[:, 3] - box[:, 1]) * height)
    scale = torch.stack([torch.where(flip, -zoom_x, zoom_x), zoom_y], 1) / QUARTERS  # (B, 2)
    if depth % 2:
        scale = F.pad(scale, (0, 1), value=1 / MACROBLOCK**2)[:, -depth:]  # (B, D)
    values = out * scale[..., None, None, None]
    values = values.clamp(-limit, limit) / limit
    return torch.cat([values[:, :-1], ENERGY * values[:, -1:]], 1) if depth % 2 else values


def _known_energy(energy: Tensor, limit: float) -> Tensor:
    """Energies (B, W, rows, cols, 1) with numbers in place of `NO_RESIDUAL`.

    What appears or vanishes is coded without a prediction: such a block counts as one of the highest energy that shows.
    An I-frame has no other blocks, whatever it shows, and says nothing: zero, as its vectors are.
    """
    none = energy == NO_RESIDUAL
    iframe = none.all((2, 3), keepdim=True)
    return energy.masked_fill(none, round(limit * MACROBLOCK**2)).masked_fill(iframe, 0)


def resample(maps: Tensor, box: Tensor, flip: Tensor, size: int, covered: tuple[float, float] = (1.0, 1.0)) -> Tensor:
    """A box of each sample's maps as squares: (B, T, h, w, C) -> float32 (B, C, T, size, size).

    The filter of PIL's `resize(box=..., resample=BILINEAR)`, which the authors' release crops with: a triangle as wide
    as two pixels of the output where the box shrinks, so that nothing aliases, and as two of the input, plain bilinear
    interpolation, where it grows; beyond the maps' edges weights are shared among what lies inside. Boxes are in
    fractions of the frame, which covers the upper left `covered` of the maps, across and down.
    """
    b, t, h, w, c = maps.shape
    x0, y0, x1, y1 = box.unbind(1)
    across = _weights(x0 * (covered[0] * w), x1 * (covered[0] * w), size, w)  # (B, S, w)
    across = torch.where(flip[:, None, None], across.flip(1), across)
    down = _weights(y0 * (covered[1] * h), y1 * (covered[1] * h), size, h)  # (B, S, h)
    # Two batched products; each axis is brought into place by the copy that is there anyway.
    rows = maps.permute(0, 2, 1, 3, 4).to(torch.float32, memory_format=torch.contiguous_format)  # (B, h, T, w, C)
    with torch.autocast(maps.device.type, enabled=False):  # where a network is watched under bfloat16, say
        rows = torch.bmm(down, rows.flatten(2)).view(b, size, t, w, c)
        columns = rows.permute(0, 4, 2, 1, 3).reshape(b, c * t * size, w)
        return torch.bmm(columns, across.mT).view(b, c, t, size, size)


def _weights(low: Tensor, high: Tensor, size: int, length: int) -> Tensor:
    """What each of `length` pixels weighs in each of `size` outputs from `low` to `high` (B,), which are in pixels.

    (B, size, length), rows that add up to 1.
    """
    step = ((high - low) / size)[:, None, None]  # pixels an output
    outputs, pixels = (torch.arange(n, device=low.device, dtype=low.dtype) + 0.5 for n in (size, length))
    centre = low[:, None, None] + outputs[:, None] * step  # (B, S, 1)
    weights = (1 - (pixels - centre).abs() / step.clamp(min=1)).clamp(min=0)  # (B, S, length)
    return weights / weights.sum(2, keepdim=True)


def fixed_box(frame_w: int, frame_h: int, ratio: float = 112 / 128) -> Tensor:
    """The centre crop of evaluation, float32 (4,): a square of `ratio` of the short side, in pixels of the frame.

    Resizing the short side to 128 and cutting 112 from the centre (section 4.1's input size) is this box at ratio 7/8.
    """
    side = ratio * min(frame_w, frame_h)
    x, y = side / frame_w / 2, side / frame_h / 2
    return torch.tensor([0.5 - x, 0.5 - y, 0.5 + x, 0.5 + y])


def photometric(clip: Tensor, params: Tensor, taps: int = 13) -> Tensor:
    """Blur, jitter the colours and take colour away, the same on all frames of a clip.

    clip float32 (B, 3, T, S, S) in [0, 1], and so is what returns; params float32 (B, 6), the columns of
    `train.draws.draw_photometric`; taps, the odd length of the blurring kernel, `Photometric.blur_taps`. The order is
    fixed: blur, brightness, contrast (about the clip's mean luma), saturation, hue, grey. A sample for which an
    operation was not drawn keeps its pixels through it, bit for bit.

    On a CPU only the drawn samples are computed, which halves the work; other devices, and compiled code, compute all
    samples and select, since asking which were drawn would wait for the device.
    """
    sigma, brightness, contrast, saturation, hue, grey = params.unbind(1)
    jittered = (brightness != 1) | (contrast != 1) | (saturation != 1) | (hue != 0)
    asking = clip.device.type == "cpu" and not torch.compiler.is_compiling()
    where = _only_drawn if asking else _all_then_select
    clip = where(sigma > 0, clip, lambda x, s: _blur(x, s, taps), sigma)
    clip = where(jittered, clip, _jitter, brightness, contrast, saturation, hue)
    return where(grey > 0, clip, _grey)


def normalise(clip: Tensor) -> Tensor:
    """RGB in [0, 1], (B, 3, ...), to zero mean and unit deviation a channel, by ImageNet's statistics."""
    shape = (1, 3, *[1] * (clip.ndim - 2))
    # Filled on the device, since a copy from the host waits for it.
    channels = ([torch.full((), x, device=clip.device) for x in values] for values in (IMAGENET_MEAN, IMAGENET_STD))
    mean, std = (torch.stack(each).view(shape) for each in channels)
    return (clip - mean) / std


def without_still(clip: Tensor, drawn: Tensor) -> Tensor:
    """Clips (B, 3, T, S, S), those that are drawn (B,) less their mean over time: what stands still becomes zero."""
    return torch.where(drawn.view(-1, 1, 1, 1, 1), clip - clip.mean(2, keepdim=True), clip)


def _all_then_select(drawn: Tensor, clip: Tensor, operation: Callable[..., Tensor], *arguments: Tensor) -> Tensor:
    """operation(clip, *arguments) where drawn (B,), computed for all samples."""
    return torch.where(drawn.view(-1, 1, 1, 1, 1), operation(clip, *arguments), clip)


def _only_drawn(drawn: Tensor, clip: Tensor, operation: Callable[..., Tensor], *arguments: Tensor) -> Tensor:
    """operation(clip, *arguments) where drawn (B,), computed for those samples."""
    rows = drawn.nonzero().flatten()
    if not len(rows):
        return clip
    return clip.index_copy(0, rows, operation(clip[rows], *(a[rows] for a in arguments)))


def _blur(clip: Tensor, sigma: Tensor, taps: int) -> Tensor:
    # kornia's gaussian_blur2d asks the device whether every sigma is positive; its parts do not.
    kernel = get_gaussian_kernel1d(taps, sigma[:, None])  # (B, taps)
    with torch.autocast(clip.device.type, enabled=False):
        return filter2d_separable(clip.flatten(1, 2), kernel, kernel).view_as(clip)


def _jitter(clip: Tensor, brightness: Tensor, contrast: Tensor, saturation: Tensor, hue: Tensor) -> Tensor:
    image = clip.flatten(2, 3)  # (B, 3, T*S, S): colours know no position
    image = adjust_brightness_accumulative(image, brightness)
    image = adjust_contrast_with_mean_subtraction(image, contrast)
    image = adjust_saturation_with_gray_subtraction(image, saturation)
    return adjust_hue(image, 2 * math.pi * hue).view_as(clip)


def _grey(clip: Tensor) -> Tensor:
    return rgb_to_grayscale(clip.flatten(2, 3)).expand(-1, 3, -1, -1).reshape(clip.shape)
