"""python -m benchmarks.train_step --shards SHARDS --batch 64 --workers 14 --device cuda

Takes about three minutes with the sizes that are the default on a CPU (--quick: ten seconds), as long on a GPU with the
paper's, and ends with a Markdown table: for the three backbones, ours beside a plain loop, clips a second, share of the
time spent waiting for the loader, and model FLOP utilisation.

ours    what `train.loop` does in a step: bfloat16 autocast where --precision says so, weights channels last, fused
        optimiser, tiled motion loss; with --compile the networks compiled
plain   the same model, augmentation and optimiser in an eager float32 loop: contiguous weights, one kernel a parameter
        (foreach=False), losses from whole matrices of logits, no choice among convolution kernels

Both take batches from loaders of the same kind, in turns (ours plain ours plain ...). A turn begins with untimed steps
that use up what the loader had ready. Utilisation is the model's FLOPs, forward and backward, counted once by torch,
over what a large matrix product of the same type reaches on the same device in the same run (float32: with TF32 where
convolutions use it). Without --shards a small set is made.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable
from contextlib import redirect_stdout
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.common import median, open_shards
from preprocess.shards import ShardSet
from train import loop
from train.config import Pretraining
from train.data import EpochSampler, PretrainSet
from train.device import channels_last
from train.model import PretrainingModel
from train.optimiser import make_optimiser
from train.recipes import RECIPES
from train.tasks import PretrainingTask

BACKBONES = ("c3d", "r2plus1d26", "r3d26")
Batch = dict[str, Tensor]


class Turn(NamedTuple):
    clips_per_second: float
    waiting: float


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[1])
    parser.add_argument("--shards", type=Path, help="folder of shards; default a small set of its own")
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--precision", choices=("float32", "bfloat16"), help="of ours; default bfloat16 on CUDA")
    parser.add_argument("--batch", type=int, help="clips a step; default 2, on CUDA 64")
    parser.add_argument("--size", type=int, help="pixels across; default 64, on CUDA 112")
    parser.add_argument("--frames", type=int, help="frames a clip; default 8, on CUDA 16")
    parser.add_argument("--width", type=int, help="channels of the first layers; default 16, on CUDA 64")
    parser.add_argument("--workers", type=int, default=1, help="processes that decode")
    parser.add_argument("--steps", type=int, help="timed steps a turn; default 4, on CUDA 20")
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1, help="CPU threads of torch")
    parser.add_argument("--compile", action="store_true", help="compile the networks of ours")
    parser.add_argument("--quick", action="store_true", help="one turn of one step: whether it runs, not how fast")
    options = parser.parse_args()
    on_cpu = options.device == "cpu"
    sizes = {"batch": (2, 64), "size": (64, 112), "frames": (8, 16), "width": (16, 64), "steps": (4, 20)}
    if options.quick:
        sizes |= {"size": (32, 32), "width": (4, 4), "steps": (1, 1)}
        options.turns = 1
    for name, (small, usual) in sizes.items():
        if getattr(options, name) is None:
            setattr(options, name, small if on_cpu else usual)
    options.precision = options.precision or ("float32" if on_cpu else "bfloat16")
    torch.set_num_threads(options.threads)
    with tempfile.TemporaryDirectory(prefix="context-motion-") as folder:
        with redirect_stdout(sys.stderr):
            shards, _ = open_shards(options.shards, None, Path(folder))
        compare(shards, options)


def compare(shards: ShardSet, options: argparse.Namespace) -> None:
    device = torch.device(options.device)
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else f"CPU, {options.threads} thread(s)"
    peaks = {p: peak(device, getattr(torch, p)) for p in {"float32", options.precision}}
    print(f"{name}; batch {options.batch}, {options.frames} frames of {options.size} x {options.size}, ", end="")
    print(f"width {options.width}, {options.workers} loader processes; {options.turns} turns of {options.steps} steps")
    print(f"Matrix products reach {', '.join(f'{v / 1e12:.3g} TFLOP/s in {k}' for k, v in peaks.items())}\n")
    print(
        "| backbone | GFLOP a clip | loop | clips / s | waiting | utilisation | times plain |\n|---|---:|---|"
        + "---:|" * 4
    )
    for backbone in BACKBONES:
        config = configuration(backbone, options)
        data = PretrainSet(shards, None, config.sampling, config.cropping, config.photometric)
        flops = count_flops(config, data, device) / options.batch
        loops = {"ours": ours(config, shards, device, options.precision, options.compile)}
        loops["plain"] = plain(config, shards, device)
        turns: dict[str, list[Turn]] = defaultdict(list)
        for number in range(options.turns):
            for which, step in loops.items():
                turns[which].append(run_turn(step, data, number, device, options))
        for which, precision in (("ours", options.precision), ("plain", "float32")):
            rate = median(t.clips_per_second for t in turns[which])
            gain = median(t.clips_per_second / p.clips_per_second for t, p in zip(turns[which], turns["plain"]))
            print(
                f"| {backbone} | {flops / 1e9:.1f} | {which}, {precision} | {rate:.2f} | "
                f"{median(t.waiting for t in turns[which]):.1%} | {rate * flops / peaks[precision]:.0%} | {gain:.2f} |",
                flush=True,
            )


def configuration(backbone: str, options: argparse.Namespace) -> Pretraining:
    base = RECIPES["pretrain-ucf101-c3d"].config
    assert isinstance(base, Pretraining)
    w = options.width
    return replace(
        base,
        networks=replace(base.networks, backbone=backbone, width=w, iframe_width=w, motion_width=w),
        sampling=replace(base.sampling, frames=options.frames),
        size=options.size,
        motion_size=options.size,
        batch_size=options.batch,
    )


def run_turn(
    step: Callable[[Batch], None], data: PretrainSet, number: int, device: torch.device, options: argparse.Namespace
) -> Turn:
    """Time some steps with a loader of their own, after so many that nothing it had prepared is left."""
    untimed = 1 + 2 * options.workers
    keys = EpochSampler(len(data), options.batch, seed=number).between(0, untimed + options.steps)
    loader = DataLoader(data, batch_sampler=keys, num_workers=options.workers, pin_memory=device.type == "cuda")
    batches = iter(loader)
    for _ in range(untimed):
        step(next(batches))
    synchronise(device)
    waited, begin = 0.0, time.perf_counter()
    for _ in range(options.steps):
        asked = time.perf_counter()
        batch = next(batches)
        waited += time.perf_counter() - asked
        step(batch)
    synchronise(device)
    elapsed = time.perf_counter() - begin
    return Turn(options.steps * options.batch / elapsed, waited / elapsed)


# The two loops


def ours(config: Pretraining, shards: ShardSet, device: torch.device, precision: str, compiled: bool) -> Any:
    """A step as `train.loop` takes it."""
    task = PretrainingTask(config, shards, None)
    model = PretrainingModel(config).to(device).train()
    channels_last(model)
    optimiser = make_optimiser(config.optimiser, model)
    network: Any = torch.compile(model) if compiled else model

    def step(batch: Batch) -> None:
        torch.backends.cudnn.benchmark = True
        batch = {k: v.to(device, non_blocking=True) for k, v in batch.items()}
        loop.update(network, task, optimiser, 1e-3, task.inputs(batch), batch, precision)

    return step


def plain(config: Pretraining, shards: ShardSet, device: torch.device) -> Any:
    """A step as one first writes it."""
    task = PretrainingTask(config, shards, None)
    model = PretrainingModel(config).to(device).train()
    o = config.optimiser
    optimiser = torch.optim.SGD(
        model.parameters(), 1e-3, momentum=o.momentum, weight_decay=o.weight_decay, nesterov=True, foreach=False
    )

    def step(batch: Batch) -> None:
        torch.backends.cudnn.benchmark = False
        batch = {k: v.to(device) for k, v in batch.items()}
        loss = usual_losses(model, task.inputs(batch), config)
        optimiser.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), o.clip_norm, foreach=False)
        optimiser.step()

    return step


def usual_losses(model: nn.Module, inputs: tuple[Tensor | None, ...], config: Pretraining) -> Tensor:
    """Equations (1) to (3) from whole matrices of logits."""
    (clips, iframes, points), o = model(*inputs), config.objective
    context = clips @ iframes.T / o.context_temperature  # (B, B)
    motion = (
        points.predicted @ torch.cat((points.targets, points.negatives)).T / o.motion_temperature
    )  # (B N, B (1+K) N)
    j_context, j_motion = (F.cross_entropy(m, torch.arange(len(m), device=m.device)) for m in (context, motion))
    return o.loss_scale * ((1 - o.alpha) * j_context + o.alpha * j_motion)


# What they are measured by


def count_flops(config: Pretraining, data: PretrainSet, device: torch.device) -> float:
    """FLOPs of one batch through the networks and losses, forward and backward, augmentation not counted."""
    sampler = EpochSampler(len(data), config.batch_size)
    batch = next(iter(DataLoader(data, batch_sampler=sampler)))
    task = PretrainingTask(config, data.shards, None)
    inputs = task.inputs({k: v.to(device) for k, v in batch.items()})
    model = PretrainingModel(config).to(device).train()
    with FlopCounterMode(display=False) as counter:
        usual_losses(model, inputs, config).backward()
    return counter.get_total_flops()


def peak(device: torch.device, dtype: torch.dtype) -> float:
    """FLOP/s of a large matrix product, the fastest of a few."""
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32
    n, runs = (2048, 3) if device.type == "cpu" else (8192, 30)
    a, b = (torch.randn(n, n, device=device, dtype=dtype) for _ in range(2))
    seconds = []
    for _ in range(runs):
        synchronise(device)
        begin = time.perf_counter()
        a @ b
        synchronise(device)
        seconds.append(time.perf_counter() - begin)
    torch.backends.cuda.matmul.allow_tf32 = False
    return 2 * n**3 / min(seconds)


def synchronise(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


if __name__ == "__main__":
    main()
