"""What networks run on, and how their weights lie there."""

from __future__ import annotations

import torch
from torch import nn


def choose_device(name: str) -> str:
    """A device that is there, of a --device; ValueError for any other."""
    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        kind = torch.device(name).type
    except RuntimeError as error:
        raise ValueError(f"there is no device {name!r}: choose auto, cpu, cuda or cuda:1") from error
    if kind == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"torch sees no GPU here, and the device is {name!r}: choose cpu or auto")
    return name


def channels_last(network: nn.Module) -> None:
    """Lay the weights out as three-dimensional convolutions compute, on CPUs and on tensor cores alike."""
    for weights in network.parameters():
        if weights.dim() == 5:  # not those of the ConvGRU, whose convolutions have two dimensions
            weights.data = weights.data.contiguous(memory_format=torch.channels_last_3d)
