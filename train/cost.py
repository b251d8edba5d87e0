"""What a recipe costs: floating-point operations, counted by torch on tensors without memory, and an estimate in hours.

A multiplication and an addition count as two. Convolutions, matrix products and attention count, forward and backward;
normalisation, augmentation and the optimiser, a few per cent, do not.
"""

from __future__ import annotations

from dataclasses import replace
from functools import cache

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from train.config import Config, Finetuning, Optimiser, Pretraining, Supervision
from train.draws import Cropping, Photometric, Sampling
from train.model import FinetuningModel, PretrainingModel, build_model

GPU, GPU_FLOPS = "A100", 312e12  # dense bfloat16 operations a second, by its data sheet
UTILISATION = 0.3  # share of them that a step reaches: assumed, not measured
DATASETS = {
    "ucf101": ("UCF101, split 1", 9537),
    "hmdb51": ("HMDB51, split 1", 3570),
    "k400": ("Kinetics-400", 246_000),  # training videos; fewer of them can be had every year
    "scenes": ("the embedded scenes", 288),
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


def describe(recipe: str, config: Config) -> str:
    """The cost in one line; without a data set in the recipe's name, that of one clip alone."""
    each = f"{flops_per_clip(config) / 1e9:.3g} GFLOP a clip"
    about = dataset(recipe)
    if about is None:
        return each
    total, hours = total_flops(config, about[1]) / 1e15, gpu_hours(config, about[1])
    needs = f"about {hours:.2g} GPU hours" if hours >= 0.1 else "minutes of a GPU"
    return f"{each}, {total:,.{0 if total >= 10 else 2}f} PFLOP on {about[0]} ({about[1]:,} videos): {needs}"


def flops_per_clip(config: Config) -> float:
    """Of the networks, whose cost a clip does not depend on the batch, and of the objectives, whose cost does: a row
    of equations (1) and (2) meets as many keys as the batch has."""
    s = config.sampling
    # What changes no operation gets its default, so that recipes that differ in nothing else are counted once.
    same = replace(
        config,
        networks=replace(config.networks, queries="normal", upsampling="trilinear"),
        optimiser=Optimiser(),
        sampling=Sampling(s.frames, motion_frames=s.motion_frames, motion=s.motion, negatives=s.negatives),
        cropping=Cropping(),
        photometric=Photometric(),
        batch_size=1,
        epochs=1,
        seed=0,
    )
    if isinstance(same, Pretraining):
        alpha = same.objective.alpha
        same = replace(same, objective=replace(same.objective, alpha=alpha if alpha in (0, 1) else 0.5))
    elif isinstance(same, Finetuning):
        weight = same.supervision.motion_weight
        same = replace(same, supervision=Supervision("scratch", motion_weight=float(weight > 0)))
    networks, products = _count(same)
    return networks + products * config.batch_size


@cache
def _count(config: Config) -> tuple[float, float]:
    """FLOPs of one clip: of the networks, and of the objectives in a batch of its own."""
    s, size = config.sampling, config.size
    clip = torch.empty(1, 3, s.frames, size, size, device="meta")
    maps = s.motion_channels, s.motion_frames, config.motion_size, config.motion_size
    motion = torch.empty(1, 1 + s.negatives, *maps, device="meta")
    with torch.device("meta"):
        model = build_model(config, 1)
    for module in list(model.modules()):
        for name, child in module.named_children():
            if isinstance(child, nn.modules.batchnorm._BatchNorm):  # not counted, and slow without memory
                setattr(module, name, nn.Identity())
    with FlopCounterMode(display=False) as counter:
        pairs, rest = _outputs(model, config, clip, motion)
        sum((x.sum() for pair in pairs for x in pair), rest).backward()
    products = sum(3 * 2 * len(rows) * len(keys) * rows.shape[1] for rows, keys in pairs)  # forward, two backward
    return counter.get_total_flops(), products


def _outputs(
    model: PretrainingModel | FinetuningModel, config: Config, clip: Tensor, motion: Tensor
) -> tuple[list[tuple[Tensor, Tensor]], Tensor]:
    """Embeddings that the objectives compare, as (rows, keys), and the sum of what else the loss is made of."""
    if isinstance(model, FinetuningModel):
        assert isinstance(config, Finetuning)
        if config.supervision.motion_weight == 0:
            return [], model.video(clip).sum()  # the classifier is a millionth of it, and wants a real device
        plain, shared = model.video.forward_both(clip)
        rest, points = plain.sum(), model.motion(shared, motion)
        return [(points.predicted, torch.cat((points.targets, points.negatives)))], rest
    assert isinstance(config, Pretraining)
    alpha, rest = config.objective.alpha, torch.zeros((), device="meta")
    clips, iframes, found = model(clip, clip[:, :, :1] if alpha < 1 else None, motion if alpha > 0 else None)
    pairs = [] if clips is None else [(clips, iframes)]
    if found is not None and found.negatives is not None:
        pairs.append((found.predicted, torch.cat((found.targets, found.negatives))))
    elif found is not None:
        rest = rest + found.predicted.sum()
    return pairs, rest
