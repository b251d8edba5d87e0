"""The training loop: one readable function."""

from __future__ import annotations

import math
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

from preprocess.manifest import Manifest
from preprocess.shards import ShardSet
from train import checkpoint, distributed, runs
from train.config import Config, Finetuning, Optimiser, Runtime
from train.data import EpochSampler
from train.device import channels_last, choose_device
from train.loader import explaining_workers, make_loader
from train.tasks import Task, make_task

WARMUP_START = 0.01


class Terminated(Exception):
    """SIGTERM came; everything is saved."""


@contextmanager
def leaving_cleanly() -> Iterator[None]:
    """However a run ends, leave the process group and give SIGTERM back; errors of a loader's worker in one line."""
    before = signal.getsignal(signal.SIGTERM)
    try:
        with explaining_workers():
            yield
    finally:
        signal.signal(signal.SIGTERM, before)
        distributed.stop()


@leaving_cleanly()
def train(
    config: Config, runtime: Runtime, shards: Path, manifest: Manifest, out: Path, origin: runs.Origin = runs.UNNAMED
) -> dict[str, Any]:
    """Train what `config` says, or go on from out/checkpoint.pt; returns the last line of metrics.

    `origin` names where things came from; the pretrained run in it gives the first weights of the V-Network. Everything
    random is a function of (seed, epoch, video) or (seed, step), so a run that was killed ends as one that was not.
    Raises ValueError where `out` holds another run, FloatingPointError naming the step where the loss is not
    finite (the last good checkpoint stays), OSError where saving fails (likewise), Terminated after SIGTERM.
    """
    device = distributed.start(torch.device(choose_device(runtime.device)))
    main, ranks = distributed.rank() == 0, distributed.world_size()
    torch.backends.cudnn.benchmark = True
    shard_set = ShardSet(shards)
    torch.manual_seed(config.seed)
    task = make_task(config, shard_set, manifest)
    data, model = task.data, task.model.to(device)
    sampler = EpochSampler(len(data), config.batch_size, distributed.rank(), ranks, config.seed)
    total = config.epochs * sampler.steps
    begin_from(origin.pretrained, config, model)
    held = runs.hold(out) if main else None  # closed, and so let go, when this function ends
    runs.claim(out, config, manifest, shard_set, origin, write=main)
    channels_last(model)
    distributed.synchronise_batch_norm(model)
    optimiser = make_optimiser(config.optimiser, model, device)
    step = 0
    pending: list[
        Tensor
    ] = []  # a row of numbers for each step since the last line, fetched from the device once a line
    saved = out / "checkpoint.pt"
    if saved.exists():
        state = checkpoint.load(saved, device)
        runs.refuse_another(out, Config.from_json(state["config"]), config)
        checkpoint.load_weights(model, state["model"], saved)
        checkpoint.load_optimiser(optimiser, state, saved)
        step, pending = state["step"], state["pending"]
        if not 0 <= step <= total:
            raise ValueError(f"{saved} is of step {step}, and the run has {total}: it is damaged")
    loader = make_loader(data, runtime.loader_workers, device, batch_sampler=schedule(sampler, step, total))
    network: nn.Module = torch.compile(model) if runtime.compile else model  # type: ignore[assignment]
    if ranks > 1:
        network = DistributedDataParallel(network, [device] if device.type == "cuda" else None)
    if main:
        say(task, sampler, model, device, step, total)
        metrics = runs.Metrics(out / "metrics.jsonl", step)
    line: dict[str, Any] = metrics.last if main else {}
    stop = Flag(signal.SIGTERM)
    watch = None
    if main and runtime.tensorboard:
        from train.watch import Watch  # an extra

        watch = Watch(out, step)
    batches = iter(loader)
    waited, since, first = 0.0, time.monotonic(), step
    model.train()
    with tqdm(total=total, initial=step, unit="step", disable=None if main else True) as bar:
        while step < total:
            asked = time.monotonic()
            batch = next(batches)
            waited += time.monotonic() - asked
            torch.manual_seed(step_seed(config.seed, step, distributed.rank()))  # dropout
            rate = learning_rate(config, step, sampler.steps)
            for group in optimiser.param_groups:
                group["lr"] = rate
            batch = {k: v.to(device, non_blocking=True) for k, v in batch.items()}
            inputs = task.inputs(batch)
            if watch and step % sampler.steps == 0:
                watch.clips(step + 1, inputs)
            with torch.autocast(device.type, torch.bfloat16, enabled=runtime.precision == "bfloat16"):
                loss, found = task.loss(network, inputs, batch)
            optimiser.zero_grad(set_to_none=True)
            loss.backward()
            norm = nn.utils.clip_grad_norm_(model.parameters(), config.optimiser.clip_norm)
            optimiser.step()
            step += 1
            bar.update()
            pending.append(torch.stack([loss, *found, norm]).detach().float())
            end_of_epoch = step % sampler.steps == 0
            saving = end_of_epoch or step % runtime.checkpoint_steps == 0
            writing = saving or step % runtime.log_steps == 0
            # One process looks for SIGTERM after every step. Several must leave together: they ask at every line.
            terminated = stop.raised if ranks == 1 else writing and stop.raised_anywhere(device)
            if writing or terminated:
                # The only place that waits for the device, and always before a checkpoint replaces a good one.
                rows = distributed.mean_over_ranks(torch.stack(pending)).cpu().numpy()
                check_finite(rows, step)
            if writing:
                elapsed = time.monotonic() - since
                line = {"step": step, "epoch": round(step / sampler.steps, 4), "lr": rate}
                line |= dict(zip(("loss", *task.columns, "gradient_norm"), rows.mean(0).tolist(), strict=True))
                line |= {
                    "clips_per_second": (step - first) * config.batch_size / elapsed,
                    "waiting": waited / elapsed,
                }
                pending = []
                if main:
                    metrics.write(line)
                    if watch:
                        watch.metrics(line)
                    bar.set_postfix_str(dense(line))
                    if bar.disable and end_of_epoch:  # not a terminal: a line an epoch for the log
                        print(dense(line), flush=True)
            if saving or terminated:
                check_weights(model, step)
            if (saving or terminated) and main:
                state = {"model": model.state_dict(), "optimiser": optimiser.state_dict(), "pending": pending}
                state |= {"config": config.to_json(), "step": step, "epoch": step / sampler.steps}
                epoch = step // sampler.steps
                if end_of_epoch and epoch in runtime.keep_epochs:  # first: once checkpoint.pt is there it is not redone
                    checkpoint.save(out / f"epoch-{epoch:04d}.pt", {k: v for k, v in state.items() if k != "optimiser"})
                checkpoint.save(saved, state)
            if terminated and step < total:
                raise Terminated(f"saved at step {step} of {total}; the same command goes on from there")
            if writing:
                waited, since, first = 0.0, time.monotonic(), step  # the time to save counts for no line
    if watch:
        watch.close()
    if held:
        held.close()
    return line


def begin_from(pretrained: runs.Pretrained | None, config: Config, model: nn.Module) -> None:
    """Give the V-Network the weights of a pretraining run, where the configuration wants them."""
    wanted = isinstance(config, Finetuning) and config.supervision.start == "pretrained"
    if wanted and pretrained is None:
        raise ValueError(
            "this recipe begins from a pretrained network: name its run with --pretrained RUN, or take the recipe that "
            "begins from scratch"
        )
    if pretrained is None:
        return
    if not wanted:
        raise ValueError("--pretrained was given, but this recipe begins from scratch; take a finetune recipe")
    mine, theirs = config.networks, pretrained.config.networks
    if (mine.backbone, mine.width) != (theirs.backbone, theirs.width):
        raise ValueError(
            f"{pretrained.folder} holds a {theirs.backbone} of width {theirs.width}, this recipe a {mine.backbone} of "
            f"width {mine.width}; take the recipe of that backbone"
        )
    checkpoint.load_weights(model.video, pretrained.video, pretrained.folder)  # type: ignore[arg-type]


def make_optimiser(o: Optimiser, model: nn.Module, device: torch.device) -> torch.optim.Optimizer:
    fused = device.type == "cuda"
    if o.name == "adamw":
        return torch.optim.AdamW(model.parameters(), weight_decay=o.weight_decay, fused=fused)
    return torch.optim.SGD(
        model.parameters(), momentum=o.momentum, weight_decay=o.weight_decay, nesterov=o.momentum > 0, fused=fused
    )


def learning_rate(config: Config, step: int, steps_per_epoch: int) -> float:
    """Linear in the global batch (section 4.1); linear warm-up from 1 %, then a cosine to zero over what is left."""
    o = config.optimiser
    peak = o.lr_per_sample * config.batch_size
    warmup, total = o.warmup_epochs * steps_per_epoch, config.epochs * steps_per_epoch
    if step < warmup:
        return peak * (WARMUP_START + (1 - WARMUP_START) * step / warmup)
    return peak * 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(total - warmup, 1)))


def step_seed(seed: int, step: int, rank: int) -> int:
    return int(np.random.SeedSequence([seed, step, rank]).generate_state(1, np.uint64)[0] >> 1)


def check_finite(rows: np.ndarray, step: int) -> None:
    """Raise FloatingPointError naming the first step whose loss or gradient norm (first and last column) is not finite;
    the last of `rows` is that of `step`."""
    for number, (loss, *_, norm) in enumerate(rows.tolist(), step - len(rows) + 1):
        if not (math.isfinite(loss) and math.isfinite(norm)):
            what = f"norm of the gradient is {norm}" if math.isfinite(loss) else f"loss is {loss}"
            raise FloatingPointError(
                f"the {what} at step {number}; the last checkpoint is kept. Lower --optimiser.lr-per-sample, or try "
                "--precision float32"
            )


def check_weights(model: nn.Module, step: int) -> None:
    """Raise FloatingPointError where the last update made weights that are not finite, which no loss has met yet."""
    if not nn.utils.get_total_norm(model.parameters()).isfinite():
        raise FloatingPointError(
            f"weights are not finite after step {step}; the last checkpoint is kept. Lower --optimiser.lr-per-sample"
        )


def dense(line: dict[str, float]) -> str:
    """A line of metrics for people: every task's loss, its accuracy in brackets."""
    tasks = []
    for name, value in line.items():
        if name.endswith("_loss"):
            accuracy = line.get(name.replace("_loss", "_accuracy"))
            found = f" ({100 * accuracy:.0f} %)" if accuracy is not None else ""
            tasks.append(f"{name.removesuffix('_loss')} {value:.2f}{found}")
    return (
        f"epoch {line['epoch']:.1f}, {', '.join(tasks)}, lr {line['lr']:.2g}, {line['clips_per_second']:.1f} clips/s, "
        f"waiting {100 * line['waiting']:.0f} %"
    )


class Flag:
    """Remembers that a signal came, so that the step in progress can end."""

    def __init__(self, number: int) -> None:
        self.raised = False
        signal.signal(number, self._raise)

    def _raise(self, *_: object) -> None:
        self.raised = True

    def raised_anywhere(self, device: torch.device) -> bool:
        """Whether it came to any of the processes: the same answer in all of them, which must all ask."""
        return bool(distributed.mean_over_ranks(torch.tensor(float(self.raised), device=device)) > 0)


def say(task: Task, sampler: EpochSampler, model: nn.Module, device: torch.device, step: int, total: int) -> None:
    """What is about to be trained on what, in three lines."""
    parameters = sum(p.numel() for p in model.parameters())
    print(
        f"{len(task.data)} videos ({task.about_data()}, {task.data.failed} failed in stage 1), {sampler.steps} steps "
        f"an epoch, {sampler.dropped} videos wait for another epoch each time\n"
        f"{parameters / 1e6:.2f} M parameters on {device}, {distributed.world_size()} processes\n"
        + (f"{total} steps" if not step else f"going on at step {step} of {total}" if step < total else "has ended")
    )


def schedule(sampler: EpochSampler, step: int, total: int) -> Iterator[list[tuple[int, int]]]:
    """Batches `step` to `total` of a run, through its epochs, so that the loader does not pause where one ends."""
    while step < total:
        sampler.start_at(*divmod(step, sampler.steps))
        step += len(sampler)
        yield from sampler
