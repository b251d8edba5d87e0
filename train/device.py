"""What networks run on, how fast it may round, how batches get there and how weights lie there."""

from __future__ import annotations

import ctypes
import re
import sys
from typing import Literal

import torch
from torch import Tensor, nn


def choose_device(name: str) -> torch.device:
    """A device that is there, of a --device; ValueError for any other."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if not re.fullmatch(r"cpu|cuda(:\d+)?", name):
        raise ValueError(f"there is no device {name!r}: choose auto, cpu, cuda or cuda:1")
    device = torch.device(name)
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"torch sees no GPU here, and the device is {name!r}: choose cpu or auto")
    if device.index and device.index >= torch.cuda.device_count():
        raise ValueError(f"the device is {name!r}, and {torch.cuda.device_count()} GPUs are visible, counted from 0")
    return device


def choose_precision(name: str, device: torch.device) -> Literal["float32", "bfloat16"]:
    """float32 or bfloat16, of a --precision: auto is bfloat16 on GPUs that have it. ValueError for it on a CPU."""
    if name == "auto":
        there = device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
        return "bfloat16" if there else "float32"
    if name == "bfloat16" and device.type == "cpu":
        raise ValueError(
            "--precision bfloat16 is for GPUs: on CPUs torch 2.13 makes wrong gradients of it now and then (values of "
            "1e29, in one step of ten). Leave it out"
        )
    return "bfloat16" if name == "bfloat16" else "float32"


M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # malloc.h


def keep_freed_memory(most: int = 2**31 - 1) -> None:
    """Have glibc's malloc keep what was freed, and hand out allocations of up to `most` bytes from it.

    By itself it takes anything above 32 MB anew from the system, which fills it with zeros page by page, and gives it
    back at once: a tenth to a fifth of a step of `small` on a CPU, where the same large maps come and go in each. Where
    malloc is another's this does nothing.
    """
    if sys.platform == "linux" and hasattr(libc := ctypes.CDLL(None), "mallopt"):
        libc.mallopt(M_MMAP_THRESHOLD, most)
        libc.mallopt(M_TRIM_THRESHOLD, most)


def make_fast(device: torch.device) -> None:
    """On a GPU: the fastest convolutions, found by trying, and TF32 in products of float32, of which equation (2) is
    made even under bfloat16. On a CPU: memory that stays."""
    if device.type == "cpu":
        keep_freed_memory()
    if device.type == "cuda":
        torch.backends.cudnn.benchmark = True
        torch.backends.cudnn.allow_tf32 = True
        torch.set_float32_matmul_precision("high")


def check_compiler(device: torch.device) -> None:
    """Compile the least there is to compile; ValueError where that fails, as the first step would with a traceback."""
    try:
        torch.compile(torch.neg)(torch.ones(1, device=device))
    except (RuntimeError, OSError) as error:
        why = next(line for line in str(error).splitlines() if not line.startswith("backend="))
        raise ValueError(
            f"--compile cannot work here ({why}): it needs a C++ compiler such as g++, on GPUs Triton as well. Install "
            "it, or leave --compile out"
        ) from error


class ToDevice:
    """Puts batches on a device. On a GPU the copy runs beside the step before, in a stream of its own; two batches lie
    there at most. On a CPU a batch stays what it is."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self.before: torch.cuda.Event | None = None

    def __call__(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        if self.stream is None:
            return batch
        steps = torch.cuda.current_stream(self.device)
        if self.before:
            self.before.synchronize()  # the step before the last one has ended
        self.before = steps.record_event(torch.cuda.Event(blocking=True))  # whoever waits leaves its core to loaders
        with torch.cuda.stream(self.stream):
            batch = {name: x.to(self.device, non_blocking=True) for name, x in batch.items()}
        steps.wait_stream(self.stream)
        for x in batch.values():
            x.record_stream(steps)  # its memory is not given away before the step has ended
        return batch


def channels_last(network: nn.Module) -> None:
    """Lay the weights out as three-dimensional convolutions compute, on CPUs and on tensor cores alike."""
    for weights in network.parameters():
        if weights.dim() == 5:  # not those of the ConvGRU, whose convolutions have two dimensions
            # Not .contiguous(), which leaves kernels of one pixel the strides that their gradients do not come with.
            there = torch.empty_like(weights, memory_format=torch.channels_last_3d)
            weights.data = there.copy_(weights.data)
