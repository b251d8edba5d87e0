"""Several processes, one optimisation step: plain functions over torch.distributed that do nothing in one process.

A loss over all ranks is the mean of the ranks' losses, and DistributedDataParallel averages the ranks' gradients. Both
agree with one process that sees the whole batch as long as whatever couples samples (the keys of a contrastive loss,
the statistics of batch norm) crosses ranks with its gradient: `gather_with_gradient` and `synchronise_batch_norm`.
"""

from __future__ import annotations

import os
import signal
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.autograd.function import once_differentiable


def start(device: torch.device, init_method: str = "env://") -> torch.device:
    """Join the processes that torchrun started and return the device of this one.

    Reads torchrun's environment variables; without them, or with WORLD_SIZE=1, only the device is chosen. "cuda"
    without a number becomes cuda:LOCAL_RANK. The backend is nccl on CUDA, else gloo. `init_method` is that of
    torch.distributed: `file:///shared/folder/name` works where no port is reachable. Raises ValueError on an incomplete
    environment or more processes than GPUs.
    """
    if device.type == "cuda":
        local = int(os.environ.get("LOCAL_RANK", "0")) if device.index is None else device.index
        if local >= torch.cuda.device_count():
            raise ValueError(
                f"process {local} of this machine needs GPU {local}, but {torch.cuda.device_count()} are visible; "
                "start as many processes as there are GPUs (torchrun --nproc-per-node) or train on the CPU"
            )
        device = torch.device("cuda", local)
        torch.cuda.set_device(device)
    processes = int(os.environ.get("WORLD_SIZE", "1"))
    if processes == 1:
        return device
    needed = ("RANK", "MASTER_ADDR", "MASTER_PORT") if init_method == "env://" else ("RANK",)
    missing = [name for name in needed if name not in os.environ]
    if missing:
        raise ValueError(
            f"WORLD_SIZE is {processes} but {', '.join(missing)} is not set; start with torchrun, which sets them all, "
            "or unset WORLD_SIZE to train in one process"
        )
    dist.init_process_group(
        "nccl" if device.type == "cuda" else "gloo",
        init_method=init_method,
        rank=int(os.environ["RANK"]),
        world_size=processes,
        device_id=device if device.type == "cuda" else None,
    )
    return device


def stop() -> None:
    """Leave the process group, if there is one."""
    if _initialised():
        dist.destroy_process_group()


def rank() -> int:
    """The number of this process, 0 in one process."""
    return dist.get_rank() if _initialised() else 0


def world_size() -> int:
    """How many processes train together."""
    return dist.get_world_size() if _initialised() else 1


def gather_with_gradient(x: Tensor) -> Tensor:
    """The rows of all ranks, (n, ...) → (world_size · n, ...), in the order of the ranks; itself in one process.

    Every rank must hold the same shape and dtype. The gradient of a row is the sum of what the ranks' losses ask of it.
    """
    return x if world_size() == 1 else _Gather.apply(x)


def mean_over_ranks(x: Tensor) -> Tensor:
    """The mean of a tensor over ranks, detached, the same on every rank: for logging, not for losses."""
    x = x.detach()
    return x if world_size() == 1 else _sum_over_ranks(x) / world_size()


class Flag:
    """Remembers that a signal came, so that the step in progress can end."""

    def __init__(self, number: int) -> None:
        self.raised = False
        signal.signal(number, self._raise)

    def _raise(self, *_: object) -> None:
        self.raised = True

    def raised_anywhere(self, device: torch.device) -> bool:
        """Whether it came to any of the processes: the same answer in all of them, which must all ask."""
        return bool(mean_over_ranks(torch.tensor(float(self.raised), device=device)) > 0)


def synchronise_batch_norm(module: nn.Module) -> nn.Module:
    """Make every nn.BatchNorm1d, 2d and 3d of a module normalise over all ranks; does nothing in one process.

    Parameters, buffers and state-dict keys stay the same. Layers on CUDA become torch's nn.SyncBatchNorm, layers
    elsewhere `SynchronisedBatchNorm`, so move the module to its device first. Returns the module, or its replacement
    where it is a batch norm itself. torch's layer lets the host wait for the device once a layer and step, to look for
    ranks without samples; it is kept for its fused kernels.
    """
    if world_size() == 1:
        return module
    if isinstance(module, (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)):
        on_cuda = any(x.is_cuda for x in (*module.parameters(), *module.buffers()))
        return nn.SyncBatchNorm.convert_sync_batchnorm(module) if on_cuda else SynchronisedBatchNorm.replacing(module)
    for name, child in module.named_children():
        setattr(module, name, synchronise_batch_norm(child))
    return module


class SynchronisedBatchNorm(nn.modules.batchnorm._BatchNorm):
    """Batch norm over (B, C, ...) whose training statistics are those of all ranks together, on any device.

    torch's nn.SyncBatchNorm accepts CUDA tensors only; this one lets a run on several CPU processes compute what one
    process computes. Ranks hold as many samples each. Statistics are taken in float32 at least. In evaluation, and in
    one process, it is plain batch norm.
    """

    @classmethod
    def replacing(cls, norm: nn.modules.batchnorm._BatchNorm) -> SynchronisedBatchNorm:
        """A layer that shares the parameters and buffers of `norm`, so that optimisers made before stay valid."""
        new = cls(norm.num_features, norm.eps, norm.momentum)
        new._parameters.update(norm._parameters)
        new._buffers.update(norm._buffers)
        return new.train(norm.training)

    def _check_input_dim(self, input: Tensor) -> None:
        assert input.dim() >= 2

    def forward(self, input: Tensor) -> Tensor:
        if not self.training or world_size() == 1:
            return super().forward(input)
        x = input.float() if input.dtype in (torch.float16, torch.bfloat16) else input
        over = [axis for axis in range(x.dim()) if axis != 1]
        broadcast = [1, -1] + [1] * (x.dim() - 2)
        count = world_size() * x.numel() // x.shape[1]
        # Two reductions, means first: one reduction of sums and sums of squares cancels where the mean is large.
        mean = _SumOverRanks.apply(x.sum(over)) / count  # (C)
        centred = x - mean.view(broadcast)
        variance = _SumOverRanks.apply(centred.square().sum(over)) / count  # (C)
        assert self.running_mean is not None and self.running_var is not None and self.momentum is not None
        assert self.num_batches_tracked is not None
        self.num_batches_tracked.add_(1)
        self.running_mean.lerp_(mean.detach(), self.momentum)
        self.running_var.lerp_(variance.detach() * count / (count - 1), self.momentum)  # unbiased, as nn.BatchNorm's
        scale = (variance + self.eps).rsqrt() * self.weight
        return torch.addcmul(self.bias.view(broadcast), centred, scale.view(broadcast)).to(input)


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        gathered = x.new_empty((world_size() * x.shape[0], *x.shape[1:]))
        dist.all_gather(list(gathered.chunk(world_size())), x.contiguous())
        return gathered

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        # A reduce-scatter would send half as much, but gloo has none; against the networks' own gradients it is little.
        return _sum_over_ranks(gradient).chunk(world_size())[rank()]


class _SumOverRanks(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return _sum_over_ranks(x)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return _sum_over_ranks(gradient)


def _sum_over_ranks(x: Tensor) -> Tensor:
    total = x.clone(memory_format=torch.contiguous_format)
    dist.all_reduce(total)
    return total


def _initialised() -> bool:
    return dist.is_available() and dist.is_initialized()
