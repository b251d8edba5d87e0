"""What a recipe costs: operations and memory, counted by torch on tensors without memory, and an estimate in hours.

A multiplication and an addition count as two. Convolutions, matrix products and attention count, forward and backward;
normalisation, augmentation and the optimiser, a few per cent, do not.
"""

from __future__ import annotations

import re
import weakref
from collections.abc import Iterable
from dataclasses import replace
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from train.config import Config, Finetuning, Optimiser, Pretraining, Supervision
from train.draws import Cropping, Photometric, Sampling
from train.model import ComparisonModel, FinetuningModel, Model, build_model

PEAKS = {  # in a GPU's name: dense operations a second in bfloat16 and in TF32, by its data sheet
    "B200": (2250e12, 1125e12),
    "H200": (989e12, 494e12),
    "H100 PCIe": (756e12, 378e12),
    "H100 NVL": (835e12, 417e12),
    "H100": (989e12, 494e12),
    "A100": (312e12, 156e12),
    "L40S": (362e12, 183e12),
    "RTX 4090": (165e12, 83e12),
}
GPU = "A100"
GPU_FLOPS = PEAKS[GPU][0]
UTILISATION = 0.3  # share of them that a step reaches: assumed, not measured
DATASETS = {
    "ucf101": ("UCF101, split 1", 9537),
    "hmdb51": ("HMDB51, split 1", 3570),
    "k400": ("Kinetics-400", 246_000),  # training videos; fewer of them can be had every year
    "scenes": ("the embedded scenes", 288),
    "ucf20": ("twenty classes of UCF101", 1947),
}


def dataset(recipe: str) -> tuple[str, int] | None:
    """(name, training videos) of the data set in a recipe's name; None where it names none."""
    return next((about for name, about in DATASETS.items() if name in recipe.split("-")), None)


def total_flops(config: Config, videos: int) -> float:
    """Of a whole run on so many videos; those that do not fill a batch wait."""
    return flops_per_clip(config) * config.epochs * (videos - videos % config.batch_size)


def gpu_hours(config: Config, videos: int) -> float:
    """Hours of one GPU for the whole run: an estimate, at `UTILISATION` of the peak of the `GPU`."""
    return total_flops(config, videos) / (GPU_FLOPS * UTILISATION) / 3600


def seconds_at_peak(config: Config, device: torch.device, precision: str) -> float | None:
    """Seconds a clip that a GPU takes at its peak in a precision, where float32 is TF32 (train.device); None for a CPU
    and for GPUs that `PEAKS` does not have. Times clips a second it is the model FLOP utilisation."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else ""
    peak = next((both for part, both in PEAKS.items() if re.search(rf"{part}(?!\d)", name)), None)  # not an A1000
    return flops_per_clip(config) / peak[precision == "float32"] if peak else None


def describe(recipe: str, config: Config) -> str:
    """The cost in one line; without a data set in the recipe's name, that of one clip alone."""
    each = f"{flops_per_clip(config) / 1e9:.3g} GFLOP a clip"
    memory, less = (f"{float(f'{gpu_bytes(config, again) / 1e9:.2g}'):g}" for again in (False, True))
    needs = f"{memory} GB of GPU memory" + (f", {less} with --recompute" if less != memory else "")
    about = dataset(recipe)
    if about is None:
        return f"{each}; {needs}"
    total, hours = total_flops(config, about[1]) / 1e15, gpu_hours(config, about[1])
    takes = f"about {hours:.2g} GPU hours" if hours >= 0.1 else "minutes of a GPU"
    return f"{each}, {total:,.{0 if total >= 10 else 2}f} PFLOP on {about[0]} ({about[1]:,} videos): {takes}; {needs}"


def flops_per_clip(config: Config) -> float:
    """Of the networks, whose cost a clip does not depend on the batch, and of the objectives, whose cost does: a row
    of equations (1) and (2) meets as many keys as the batch has."""
    networks, products = _count(_simplest(config, 1))
    return networks + products * config.batch_size


def gpu_bytes(config: Config, recompute: bool = False) -> float:
    """Memory of a step in bfloat16 at its peak, the whole batch on one GPU: an estimate, not a measurement. Counted are
    the maps that networks compute, keep for the backward pass and give up in it, then weights, gradients and the
    optimiser's state in float32; not the kernels' workspaces, nor what the allocator cannot use."""
    activations, parameters = _peak(_simplest(config, config.batch_size), recompute)
    return activations + parameters * 4 * (3 if config.optimiser.name == "sgd" else 4)


def _simplest(config: Config, batch: int) -> Config:
    """What changes no operation gets its default, so that recipes that differ in nothing else are counted once."""
    s = config.sampling
    same = replace(
        config,
        networks=replace(config.networks, queries="normal", upsampling="trilinear"),
        optimiser=Optimiser(),
        sampling=Sampling(s.frames, motion_frames=s.motion_frames, motion=s.motion, negatives=s.negatives),
        cropping=Cropping(),
        photometric=Photometric(),
        batch_size=batch,
        epochs=1,
        seed=0,
    )
    if isinstance(same, Pretraining):
        alpha = same.objective.alpha
        same = replace(same, objective=replace(same.objective, alpha=alpha if alpha in (0, 1) else 0.5))
    elif isinstance(same, Finetuning):
        weight = same.supervision.motion_weight
        same = replace(same, supervision=Supervision("scratch", motion_weight=float(weight > 0)))
    return same


@cache
def _count(config: Config) -> tuple[float, float]:
    """FLOPs of one clip: of the networks, and of the objectives in a batch of its own."""
    with torch.device("meta"):
        model = build_model(config, 1)
    for module in list(model.modules()):
        for name, child in module.named_children():
            if isinstance(child, nn.modules.batchnorm._BatchNorm):  # not counted, and slow without memory
                setattr(module, name, nn.Identity())
    with FlopCounterMode(display=False) as counter:
        pairs = _step(model, config)
    products = sum(3 * 2 * len(rows) * len(keys) * rows.shape[1] for rows, keys in pairs)  # forward, two backward
    return counter.get_total_flops(), products


@cache
def _peak(config: Config, recompute: bool, dtype: torch.dtype = torch.bfloat16) -> tuple[int, int]:
    """Bytes at the peak of a step of networks of one type, and how many parameters they have."""
    with torch.device("meta"):
        model = build_model(config, 1, recompute).to(dtype)
    with _Alive(model.parameters()) as alive:
        _step(model, config)
    return alive.peak, sum(p.numel() for p in model.parameters())


class _Alive(TorchDispatchMode):
    """Counts the bytes of what is computed until nothing refers to it any more; `peak` is the most there was. What was
    there before does not count, nor do views."""

    def __init__(self, before: Iterable[Tensor]) -> None:
        super().__init__()
        self.peak = self.bytes = 0
        self.known = weakref.WeakSet(x.untyped_storage() for x in before)

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = function(*args, **(kwargs or {}))
        for x in tree_leaves(found):
            if isinstance(x, Tensor) and (storage := x.untyped_storage()) not in self.known:
                self.known.add(storage)
                self._add(storage.nbytes())
                weakref.finalize(storage, self._add, -storage.nbytes())
        return found

    def _add(self, size: int) -> None:
        self.bytes += size
        self.peak = max(self.peak, self.bytes)


def _step(model: Model, config: Config) -> list[tuple[Tensor, Tensor]]:
    """Forward and backward on a batch without memory; returns what the objectives compare, as (rows, keys)."""
    s, size = config.sampling, config.size
    like: dict[str, Any] = {"device": "meta", "dtype": next(model.parameters()).dtype}
    clips = config.batch_size * (model.clips if isinstance(model, ComparisonModel) else 1)
    clip = torch.empty(clips, 3, s.frames, size, size, **like)
    windows = (config.batch_size, 1 + s.negatives, s.motion_channels, s.motion_frames)
    motion = torch.empty(*windows, config.motion_size, config.motion_size, **like)
    pairs, rest = _outputs(model, config, clip, motion)
    sum((x.sum() for pair in pairs for x in pair), rest).backward()
    return pairs


def _outputs(model: Model, config: Config, clip: Tensor, motion: Tensor) -> tuple[list[tuple[Tensor, Tensor]], Tensor]:
    """Embeddings that the objectives compare, as (rows, keys), and the sum of what else the loss is made of."""
    if isinstance(model, FinetuningModel):
        assert isinstance(config, Finetuning)
        if config.supervision.motion_weight == 0:
            return [], model.video(clip).sum()  # the classifier is a millionth of it, and wants a real device
        targets, negatives = model.motion.targets(motion)
        assert negatives is not None
        plain, shared = model.video.forward_both(clip)
        return [(model.motion(shared), torch.cat((targets, negatives)))], plain.sum()
    if isinstance(model, ComparisonModel):
        return [], model.video.forward_pretrain(clip).sum()  # of its head, as above
    assert isinstance(config, Pretraining)
    alpha, rest = config.objective.alpha, torch.zeros((), device="meta")
    clips, iframes, found = model(clip, clip[:, :, :1] if alpha < 1 else None, motion if alpha > 0 else None)
    pairs = [] if clips is None else [(clips, iframes)]
    if found is not None and found.negatives is not None:
        pairs.append((found.predicted, torch.cat((found.targets, found.negatives))))
    elif found is not None:
        rest = rest + found.predicted.sum()
    return pairs, rest
