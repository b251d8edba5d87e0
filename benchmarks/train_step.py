"""python -m benchmarks.train_step --shards SHARDS --batch 64 --device cuda

Takes about three minutes with the sizes that are the default on a CPU (--quick: ten seconds), and ends with a Markdown
table: for the three backbones, ours beside a plain loop. `make gpu` has the same rows in all precisions.

ours    what `train.loop` does in a step: weights channels last, fused optimiser, tiled motion loss; in bfloat16 where
        --precision says so, networks and augmentation compiled with --compile
plain   the same model, augmentation and optimiser in an eager float32 loop: contiguous weights, one kernel a parameter
        (foreach=False), losses from whole matrices of logits, no choice among convolution kernels, memory as malloc
        hands it out by itself

Both take batches from loaders of the same kind, in turns (ours plain ours plain ...). Columns: clips a second; how many
times as many as the plain loop; the share that is of the peak, model FLOPs, forward and backward, over what a large
matrix product of the same type reaches on the same device in the same run; the GPU's memory at most, in brackets what
`python -m train --list` says; the share of the time spent waiting for the loader; and the headspace, the share of the
speed on one batch, over and over, that is lost with the loader. Without --shards a small set is made.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import redirect_stdout
from functools import cache
from itertools import repeat
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.common import clock, endless, open_shards
from preprocess.shards import ShardSet
from train import cost, loop
from train.config import Pretraining
from train.data import PretrainSet
from train.device import ToDevice, channels_last, keep_freed_memory
from train.loader import make_loader, usual_workers
from train.model import build_model
from train.optimiser import make_optimiser
from train.recipes import RECIPES
from train.tasks import PretrainingTask

BACKBONES = ("c3d", "r2plus1d26", "r3d26")
BATCH = 64  # of table 9
LEAST, MOST = 3, 50  # steps that are timed
TINY: dict[str, Any] = {  # whether it runs, not how fast
    **dict.fromkeys(("networks.width", "networks.iframe_width", "networks.motion_width"), 4),
    **{"networks.predictor_width": 16, "networks.head_hidden": 16, "networks.head_out": 8},
    **{"sampling.frames": 8, "sampling.stride": 2, "sampling.negatives": 1, "size": 32, "motion_size": 32},
}
Batch = dict[str, Tensor]
Step = Callable[[Batch], None]
Row = Mapping[str, Any]
"""The fields of a case, and what `turn` measured of it, or an error."""


class Case(NamedTuple):
    """What is measured: a backbone in one of the two loops."""

    backbone: str
    loop: str = "ours"
    precision: str = "float32"
    """float32, TF32 or bfloat16; of the plain loop torch's own, TF32 in convolutions alone."""
    compiled: bool = False
    recompute: bool = False
    batch: int = BATCH


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[1])
    parser.add_argument("--shards", type=Path, help="folder of shards; default a small set of its own")
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--precision", choices=("float32", "TF32", "bfloat16"), help="of ours; on CUDA bfloat16")
    parser.add_argument("--batch", type=int, help="clips a step; default 2, on CUDA 64")
    parser.add_argument("--size", type=int, help="pixels across; default 64, on CUDA 112")
    parser.add_argument("--frames", type=int, help="frames a clip; default 8, on CUDA 16")
    parser.add_argument("--width", type=int, help="channels of the first layers; default 16, on CUDA 64")
    parser.add_argument("--workers", type=int, default=usual_workers(), help="processes that decode")
    parser.add_argument("--seconds", type=float, default=3.0, help="of a measurement, about")
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1, help="CPU threads of torch")
    parser.add_argument("--compile", action="store_true", help="compile ours")
    parser.add_argument("--quick", action="store_true", help="one turn of one step: whether it runs, not how fast")
    options = parser.parse_args()
    on_cpu = options.device == "cpu"
    sizes = {"batch": (2, BATCH), "size": (64, 112), "frames": (8, 16), "width": (16, 64)}
    if options.quick:
        sizes |= {"size": (32, 32), "width": (4, 4), "frames": (8, 8)}
        options.turns, options.seconds = 1, 0.0
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
    device, w, rows = torch.device(options.device), options.width, []
    changes = dict(TINY) if options.quick else {}
    changes |= dict.fromkeys(("networks.width", "networks.iframe_width", "networks.motion_width"), w)
    changes |= {"sampling.frames": options.frames, "size": options.size, "motion_size": options.size}
    for backbone in BACKBONES:
        cases = [
            Case(backbone, "plain", "float32" if options.device == "cpu" else "TF32", batch=options.batch),
            Case(backbone, "ours", options.precision, options.compile, batch=options.batch),
        ]
        configs = [configuration(case, changes) for case in cases]
        steps = [make_step(case, config, shards, device) for case, config in zip(cases, configs)]
        turns: dict[str, list[Row]] = defaultdict(list)
        for number in range(options.turns):
            for case, config, step in zip(cases, configs, steps):
                found = turn(case, config, step, shards, device, options.workers, options.seconds, number)
                turns[case.loop].append(found)
        for case in cases:
            each = turns[case.loop]
            middle = {k: median(t[k] for t in each) if v is not None else None for k, v in each[0].items()}
            rows.append(case._asdict() | middle)
    print(f"{options.frames} frames of {options.size} x {options.size}, width {w}, batch {options.batch}, ", end="")
    print(f"{options.workers} loader processes; {options.turns} turns\n\n{table(rows)}")


def configuration(case: Case, changes: Mapping[str, Any]) -> Pretraining:
    """Table 9's recipe of a case's backbone and batch, with some fields changed."""
    recipe = RECIPES[f"pretrain-ucf101-{case.backbone}"].config
    config = recipe.changed(dict(changes) | {"batch_size": case.batch})
    assert isinstance(config, Pretraining)
    return config


def measure(
    case: Case, changes: Mapping[str, Any], shards: ShardSet, device: torch.device, workers: int, seconds: float
) -> Row:
    """One turn of one case; where the GPU's memory does not suffice, that is what is found."""
    config = configuration(case, changes)
    try:
        step = make_step(case, config, shards, device)
        return case._asdict() | turn(case, config, step, shards, device, workers, seconds)
    except torch.OutOfMemoryError:
        return case._asdict() | {"error": "does not fit"}


def turn(
    case: Case,
    config: Pretraining,
    step: Step,
    shards: ShardSet,
    device: torch.device,
    workers: int,
    seconds: float,
    number: int = 0,
) -> dict[str, float | None]:
    """Time some steps on one batch over and over, then with a loader of their own, after as many as it had ready."""
    on_gpu = device.type == "cuda"
    choose_kernels(case)
    data = PretrainSet(shards, None, config)
    batches = iter(make_loader(data, workers, device, batch_sampler=endless(len(data), case.batch, number)))
    same = repeat(next(batches))
    timed(step, same, 2, device)  # networks are compiled, and kernels chosen
    if on_gpu:
        torch.cuda.reset_peak_memory_stats(device)
    once, _ = timed(step, same, 1, device)
    steps = max(LEAST, min(MOST, round(seconds / once))) if seconds else 1
    cached, _ = timed(step, same, steps, device)
    timed(step, batches, 1 + 2 * workers if seconds else steps, device)
    elapsed, waited = timed(step, batches, steps, device)
    memory = torch.cuda.max_memory_allocated(device) if on_gpu else None
    rate, most = steps * case.batch / elapsed, peak(str(device), case.precision)
    return {
        "clips_per_second": rate,
        "peak": most,
        "utilisation": rate * cost.flops_per_clip(config) / most,
        "memory": memory,
        "estimate": cost.gpu_bytes(config, case.recompute) if case.precision == "bfloat16" else None,
        "waiting": waited / elapsed,
        "headspace": 1 - cached / elapsed,
    }


def timed(step: Step, batches: Iterator[Batch], steps: int, device: torch.device) -> tuple[float, float]:
    """Seconds that some steps take until the device is done, and those of them spent waiting for batches."""
    waited, begin = 0.0, clock(str(device), cpu_time=False)
    for _ in range(steps):
        asked = time.perf_counter()
        batch = next(batches)
        waited += time.perf_counter() - asked
        step(batch)
    return clock(str(device), cpu_time=False) - begin, waited


def table(rows: Sequence[Row]) -> str:
    """Markdown: a line a case, and what their share of the peak is a share of."""
    plain = {row["backbone"]: row.get("clips_per_second") for row in rows if row["loop"] == "plain"}
    heads = ("clips / s", "times plain", "of the peak", "memory, GB", "waiting", "headspace")
    lines = [f"| backbone | loop | {' | '.join(heads)} |", "|---|---|" + "---:|" * len(heads)]
    for row in rows:
        cells = [row.get("error", ""), "", "", "", "", ""]
        if "error" not in row:
            slower, memory, estimate = plain.get(row["backbone"]), row["memory"], row["estimate"]
            cells = [
                f"{row['clips_per_second']:.{0 if row['clips_per_second'] >= 100 else 1}f}",
                f"{row['clips_per_second'] / slower:.2f}" if slower else "",
                f"{row['utilisation']:.0%}",
                (f"{memory / 1e9:.1f}" if memory else "") + (f" ({estimate / 1e9:.1f})" if estimate else ""),
                f"{row['waiting']:.1%}",
                f"{row['headspace']:.1%}",
            ]
        lines.append(f"| {row['backbone']} | {label(row)} | {' | '.join(cells)} |")
    each = {row["precision"]: row["peak"] for row in rows if "peak" in row}
    peaks = ", ".join(f"{most / 1e12:.3g} TFLOP/s in {name}" for name, most in each.items())
    return "\n".join([*lines, "", f"Of the peak: a matrix product reaches {peaks}."])


def label(case: Row) -> str:
    """What tells a case from others of its backbone."""
    what = ["plain"] if case["loop"] == "plain" else ["ours", case["precision"]]
    what += [name for name in ("compiled", "recompute") if case[name]]
    return ", ".join(what + ([f"batch {case['batch']}"] if case["batch"] > BATCH else []))


# The two loops


def make_step(case: Case, config: Pretraining, shards: ShardSet, device: torch.device) -> Step:
    """A step as the case's loop takes it, of a model that was drawn just now."""
    task = PretrainingTask(config, shards, None)
    model = build_model(config, 1, case.recompute).to(device).train()
    return ours(case, config, task, model, device) if case.loop == "ours" else plain(config, task, model, device)


def ours(case: Case, config: Pretraining, task: PretrainingTask, model: nn.Module, device: torch.device) -> Step:
    """As `train.loop` takes it."""
    channels_last(model)
    optimiser = make_optimiser(config.optimiser, model)
    network: Any = torch.compile(model) if case.compiled else model
    prepare = torch.compile(task.inputs) if case.compiled else task.inputs
    to_device = ToDevice(device)

    def step(batch: Batch) -> None:
        batch = to_device(batch)
        loop.update(network, task, optimiser, 1e-3, prepare(batch), batch, case.precision)

    return step


def plain(config: Pretraining, task: PretrainingTask, model: nn.Module, device: torch.device) -> Step:
    """As one first writes it."""
    o = config.optimiser
    optimiser = torch.optim.SGD(
        model.parameters(), 1e-3, momentum=o.momentum, weight_decay=o.weight_decay, nesterov=True, foreach=False
    )

    def step(batch: Batch) -> None:
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


def choose_kernels(case: Case) -> None:
    """What the case's loop asks of torch, and of malloc."""
    keep_freed_memory(2**31 - 1 if case.loop == "ours" else 32 << 20)
    exact = case.loop == "plain" or case.precision == "float32"
    torch.backends.cudnn.benchmark = case.loop == "ours"
    torch.backends.cudnn.allow_tf32 = case.precision != "float32"
    torch.set_float32_matmul_precision("highest" if exact else "high")


@cache
def peak(device: str, precision: str) -> float:
    """FLOP/s of a large matrix product, the fastest of a few."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest" if precision == "float32" else "high")
    n, runs = (2048, 3) if device == "cpu" else (8192, 30)
    dtype = torch.bfloat16 if precision == "bfloat16" else torch.float32
    a, b = (torch.randn(n, n, device=device, dtype=dtype) for _ in range(2))
    seconds = []
    for _ in range(runs):
        begin = clock(device, cpu_time=False)
        a @ b
        seconds.append(clock(device, cpu_time=False) - begin)
    torch.set_float32_matmul_precision(before)
    return 2 * n**3 / min(seconds)


if __name__ == "__main__":
    main()
