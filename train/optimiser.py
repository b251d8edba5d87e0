"""The optimiser and the learning rate of each step (section 4.1)."""

from __future__ import annotations

import math

import torch
from torch import nn

from train.config import Config, Optimiser

TABLES = ("in_positions", "out_positions", "queries")
"""Of the predictor: a row a point, which is no map from one space to another."""


def make_optimiser(o: Optimiser, model: nn.Module) -> torch.optim.Optimizer:
    """SGD decays every parameter, as the paper has it; AdamW no norm, bias, position or query, as is usual with it."""
    fused = next(model.parameters()).is_cuda
    if o.name == "sgd":
        return torch.optim.SGD(
            model.parameters(), momentum=o.momentum, weight_decay=o.weight_decay, nesterov=o.momentum > 0, fused=fused
        )
    decayed: list[nn.Parameter] = []
    kept: list[nn.Parameter] = []
    for name, parameter in model.named_parameters():
        table = name.rpartition(".")[2] in TABLES
        (kept if parameter.dim() < 2 or table else decayed).append(parameter)
    groups = [{"params": decayed, "weight_decay": o.weight_decay}, {"params": kept, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, fused=fused)


def learning_rate(config: Config, step: int, steps_per_epoch: int) -> float:
    """Linear in the global batch (section 4.1); linear warm-up, then a cosine to the floor over what is left."""
    o = config.optimiser
    peak = o.lr_per_sample * config.batch_size
    warmup, total = o.warmup_epochs * steps_per_epoch, config.epochs * steps_per_epoch
    if step < warmup:
        return peak * (o.warmup_start + (1 - o.warmup_start) * step / warmup)
    falling = 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(total - warmup, 1)))  # from 1 to 0
    return peak * (o.floor + (1 - o.floor) * falling)
