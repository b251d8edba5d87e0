"""Several processes, one optimisation step: plain functions over torch.distributed that do nothing in one process.

A loss over all ranks is the mean of the ranks' losses, and DistributedDataParallel averages the ranks' gradients. Both
agree with one process that sees the whole batch as long as whatever couples samples (the keys of a contrastive loss,
the statistics of batch norm) crosses ranks with its gradient: `gather_with_gradient` and `synchronise_batch_norm`.
"""

from __future__ import annotations

import os
import signal
import threading
import time
import warnings
from collections.abc import Callable
from inspect import signature
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel

from preprocess.command import ERROR, say

T = TypeVar("T")

BEAT, MISSED = 5.0, 8  # seconds between signs of life; so many without one, and a process counts as dead
# Since torch 2.13 they are called so.
_gather_into = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
_scatter_into = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor


def start(device: torch.device, init_method: str = "env://") -> torch.device:
    """Join the processes that torchrun started and return the device of this one.

    Reads torchrun's environment variables; without them, or with WORLD_SIZE=1, only the device is chosen. "cuda"
    without a number becomes cuda:LOCAL_RANK. The backend is nccl on CUDA, else gloo. `init_method` is that of
    torch.distributed: `file:///shared/folder/name` works where no port is reachable. Raises ValueError on an incomplete
    environment, more processes than GPUs, or one GPU for several processes.
    """
    processes = int(os.environ.get("WORLD_SIZE", "1"))
    if device.type == "cuda":
        if processes > 1 and device.index is not None:
            raise ValueError(
                f"--device {device} would put all {processes} processes on one GPU: give --device cuda, and each takes "
                "its own"
            )
        local = int(os.environ.get("LOCAL_RANK", "0")) if device.index is None else device.index
        if local >= torch.cuda.device_count():
            raise ValueError(
                f"process {local} of this machine needs GPU {local}, but {torch.cuda.device_count()} are visible; "
                "start as many processes as there are GPUs (torchrun --nproc-per-node) or train on the CPU"
            )
        device = torch.device("cuda", local)
        torch.cuda.set_device(device)
    if processes == 1:
        return device
    needed = ("RANK", "MASTER_ADDR", "MASTER_PORT") if init_method == "env://" else ("RANK",)
    missing = [name for name in needed if name not in os.environ]
    if missing:
        raise ValueError(
            f"WORLD_SIZE is {processes} but {', '.join(missing)} is not set; start with torchrun, which sets them all, "
            "or unset WORLD_SIZE to train in one process"
        )
    store, number, _ = next(dist.rendezvous(init_method, int(os.environ["RANK"]), processes))
    dist.init_process_group(
        "nccl" if device.type == "cuda" else "gloo",
        store=store,
        rank=number,
        world_size=processes,
        device_id=device if device.type == "cuda" else None,
    )
    global _pulse
    _pulse = Pulse(store)
    _pulse.start()
    return device


def stop(error: BaseException | None = None) -> None:
    """Leave the process group, if there is one: in order, when all have come to their end, or because of an error."""
    global _pulse
    if not _initialised() or _pulse is None:
        return
    if isinstance(error, RuntimeError) and "gloo" in str(error):  # the connection of one that died, perhaps: wait for
        last = _pulse.beats + MISSED + 3
        while _pulse.is_alive() and _pulse.beats < last:
            time.sleep(BEAT)
    if error is None:
        dist.barrier()
    _pulse.stopped.set()
    _pulse = None
    dist.destroy_process_group()


class Pulse(threading.Thread):
    """Ends this process, and says why, where another one of the run has died.

    A collective would wait for the dead one: with nccl, the main thread inside it out of reach, until torch ends the
    process after ten minutes without saying which was missing (the default of TORCH_NCCL_ASYNC_ERROR_HANDLING). A
    shorter timeout of the collectives would also end runs whose first process takes its time to save. So every process
    counts up a number of its own, in the store by which they met, while it lives.
    """

    def __init__(self, store: dist.Store) -> None:
        super().__init__(daemon=True)
        self.store, self.stopped, self.beats = dist.PrefixStore("pulse", store), threading.Event(), 0

    def run(self) -> None:
        own, others = str(rank()), [str(r) for r in range(world_size()) if r != rank()]
        heard, missed = dict.fromkeys(others, 0), dict.fromkeys(others, 0)
        while not self.stopped.wait(BEAT):
            try:
                self.beats = self.store.add(own, 1)
                now = {other: self.store.add(other, 0) for other in others}
            except RuntimeError as error:
                # The process that holds the store may have left in order, just before this one.
                if not self.stopped.wait(BEAT):
                    self.end(f"the processes' common store is out of reach ({str(error).splitlines()[0]})")
                return
            missed = {other: missed[other] + 1 if now[other] == heard[other] else 0 for other in others}
            heard = now
            if dead := [other for other in others if missed[other] >= MISSED]:
                self.end(f"no sign of life from process {', '.join(dead)} for {BEAT * MISSED:g} s")

    def end(self, why: str) -> None:
        """Of this process, from this thread: the main one may hang in a collective."""
        say(f"error: {why}: it has died, or ended and said why. The same command goes on from the last checkpoint")
        os._exit(ERROR)


_pulse: Pulse | None = None


def together(work: Callable[[], T]) -> list[T]:
    """What `work`, which must not wait for other processes, gives in each of them, in their order.

    Where it fails with a ValueError or an OSError in one, it fails in all, with a ValueError that says in which.
    """
    if world_size() == 1:
        return [work()]
    mine: tuple[T | None, str]
    try:
        mine = work(), ""
    except (ValueError, OSError) as error:
        mine = None, str(error)
    found: list[Any] = [None] * world_size()
    dist.all_gather_object(found, mine)
    if failed := [f"process {number}: {error}" for number, (_, error) in enumerate(found) if error]:
        raise ValueError("; ".join(failed))
    return [each for each, _ in found]


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


def anywhere(device: torch.device, *flags: bool) -> list[bool]:
    """Which flags are raised in any of the processes: the same answer in all of them, which must all ask."""
    return (mean_over_ranks(torch.tensor(flags, dtype=torch.float32, device=device)) > 0).tolist()


class Flag:
    """Remembers that a signal came, so that the step in progress can end."""

    def __init__(self, number: int) -> None:
        self.raised = False
        signal.signal(number, self._raise)

    def _raise(self, *_: object) -> None:
        self.raised = True


def data_parallel(network: nn.Module, device: torch.device) -> nn.Module:
    """The network with gradients that are means over ranks; itself in one process. A compiled one stays one graph."""
    if world_size() == 1:
        return network
    # Running statistics are the same on every rank; since torch 2.13 the flag that leaves them alone is called so.
    known = signature(DistributedDataParallel).parameters
    buffers = "forward_sync_buffers" if "forward_sync_buffers" in known else "broadcast_buffers"
    options: dict[str, Any] = {"device_ids": [device] if device.type == "cuda" else None, buffers: False}
    # Said of kernels of one pixel, whose strides mean nothing: a gradient of a few kilobytes is copied.
    warnings.filterwarnings("ignore", "Grad strides do not match bucket view strides")
    return DistributedDataParallel(network, gradient_as_bucket_view=True, **options)


def synchronise_batch_norm(module: nn.Module) -> nn.Module:
    """Make every nn.BatchNorm1d, 2d and 3d of a module normalise over all ranks; does nothing in one process.

    Parameters, buffers and state-dict keys stay the same. Returns the module, or its replacement where it is a batch
    norm itself.
    """
    if world_size() == 1:
        return module
    if isinstance(module, (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)):
        return SynchronisedBatchNorm.replacing(module)
    for name, child in module.named_children():
        setattr(module, name, synchronise_batch_norm(child))
    return module


class SynchronisedBatchNorm(nn.modules.batchnorm._BatchNorm):
    """Batch norm over (B, C, ...) whose training statistics are those of all ranks together, on any device.

    Ranks hold as many samples each; torch's nn.SyncBatchNorm looks for ranks without any, for which the host waits
    once a layer and step, and it knows no CPU. Statistics are taken in float32 at least. In evaluation, and in one
    process, it is plain batch norm.
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
        assert self.running_mean is not None and self.running_var is not None and self.momentum is not None
        assert self.num_batches_tracked is not None
        y, mean, variance = _Normalise.apply(input, self.weight, self.bias, self.eps)
        count = world_size() * input.numel() // input.shape[1]
        self.num_batches_tracked.add_(1)
        self.running_mean.lerp_(mean, self.momentum)
        self.running_var.lerp_(variance * (count / (count - 1)), self.momentum)  # unbiased, as nn.BatchNorm's
        return y


class _Normalise(torch.autograd.Function):
    """Batch norm of x (B, C, ...) by the statistics of all ranks, which come with it: y, mean (C), variance (C).

    Between the statistics, which cross ranks once forward and once backward, torch's own kernels for given statistics
    do the work; they keep x and nothing else.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
        over = [axis for axis in range(x.dim()) if axis != 1]
        own = torch.var_mean(x.float() if x.dtype in (torch.float16, torch.bfloat16) else x, over, correction=0)
        variances, means = _all_gather(torch.stack(own)[None]).unbind(1)  # (ranks, C) each
        mean = means.mean(0)
        # Not from a mean of squares, which cancels where the mean is large.
        variance = variances.mean(0) + means.var(0, correction=0)
        ctx.save_for_backward(x, weight, mean, variance)
        ctx.eps = eps
        ctx.mark_non_differentiable(mean, variance)
        return F.batch_norm(x, mean, variance, weight, bias, eps=eps), mean, variance

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor, *_: None) -> tuple[Tensor | None, ...]:
        x, weight, mean, variance = ctx.saved_tensors
        grad_x, grad_weight, grad_bias = torch.ops.aten.native_batch_norm_backward(
            gradient, x, weight, mean, variance, None, None, False, ctx.eps, [True, True, True]
        )
        # The statistics were held fixed so far. Through them the gradient loses its mean over all samples, and its
        # part along the normalised x, which together are linear in x.
        along, level = _sum_over_ranks(torch.stack((grad_weight, grad_bias))) / (world_size() * x.numel() // x.shape[1])
        deviation = (variance + ctx.eps).sqrt()
        slope = along * weight / deviation**2  # (C)
        offset = level * weight / deviation - slope * mean
        shape = [1, -1] + [1] * (x.dim() - 2)
        grad_x = torch.addcmul(grad_x - offset.view(shape), x, slope.view(shape), value=-1).to(x.dtype)
        return grad_x, grad_weight, grad_bias, None


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return _all_gather(x)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        own = gradient.new_empty((len(gradient) // world_size(), *gradient.shape[1:]))
        _scatter_into(own, gradient.contiguous())
        return own


def _all_gather(x: Tensor) -> Tensor:
    gathered = x.new_empty((world_size() * len(x), *x.shape[1:]))
    _gather_into(gathered, x.contiguous())
    return gathered


def _sum_over_ranks(x: Tensor) -> Tensor:
    total = x.clone(memory_format=torch.contiguous_format)
    dist.all_reduce(total)
    return total


def _initialised() -> bool:
    return dist.is_available() and dist.is_initialized()
