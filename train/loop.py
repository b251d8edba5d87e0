"""The training loop: one readable function, and the step it takes."""

from __future__ import annotations

import signal
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from tqdm import tqdm

from preprocess.manifest import Manifest
from preprocess.shards import ShardSet
from train import checkpoint, cost, distributed, metrics, runs
from train.config import Config, Runtime
from train.data import EpochSampler
from train.device import (
    ToDevice,
    channels_last,
    check_compiler,
    choose_device,
    choose_precision,
    make_fast,
)
from train.heldout import hold_out
from train.loader import explaining_workers, make_loader
from train.model import build_model
from train.optimiser import learning_rate, make_optimiser
from train.origin import UNNAMED, Origin, claim
from train.tasks import Batch, Inputs, Task, make_task
from train.trained import begin_from


class Terminated(Exception):
    """SIGTERM came; everything is saved."""


@contextmanager
def leaving_cleanly() -> Iterator[None]:
    """However a run ends, leave the process group and give SIGTERM back; errors of a loader's worker in one line."""
    before = signal.getsignal(signal.SIGTERM)
    failure: BaseException | None = None
    try:
        with explaining_workers():
            yield
    except BaseException as error:
        failure = None if isinstance(error, Terminated) else error
        # Else the traceback keeps the network, which holds on to the process group: gloo's is then taken apart later,
        # while this thread holds the interpreter's lock for which gloo's own thread, which it waits for, is waiting.
        traceback.clear_frames(error.__traceback__)
        raise
    finally:
        signal.signal(signal.SIGTERM, before)
        distributed.stop(failure)


@leaving_cleanly()
def train(
    config: Config,
    runtime: Runtime,
    shards: Path,
    manifest: Manifest,
    out: Path,
    origin: Origin = UNNAMED,
    held_out: Manifest | None = None,
) -> dict[str, Any]:
    """Train what `config` says, or go on from out/checkpoint.pt; returns the last line of metrics.

    `held_out` names videos that are looked at now and then (train.heldout), which changes nothing of what is learned.
    `origin` names where things came from; the pretrained run in it gives the first weights of the V-Network. Everything
    random is a function of (seed, epoch, video) or (seed, step), so a run that was killed ends as one that was not.
    Raises ValueError where `out` holds another run, FloatingPointError naming the step where the loss is not
    finite (the last good checkpoint stays), OSError where saving fails (likewise), Terminated after SIGTERM.
    """
    device = distributed.start(choose_device(runtime.device))
    runtime = replace(runtime, precision=choose_precision(runtime.precision, device))
    rank, ranks = distributed.rank(), distributed.world_size()
    main = rank == 0
    make_fast(device)
    if runtime.compile:
        check_compiler(device)
    shard_set = ShardSet(shards)
    task = make_task(config, shard_set, manifest)
    sampler = EpochSampler(len(task.data), config.batch_size, rank, ranks, config.seed)
    total = config.epochs * sampler.steps
    torch.manual_seed(config.seed)
    model = build_model(config, len(shard_set.classes), runtime.recompute).to(device)
    begin_from(origin.pretrained, config, model)
    held = runs.hold(out) if main else None  # closed, and so let go, when this function ends
    claim(out, config, manifest, shard_set, origin, write=main)
    channels_last(model)
    distributed.synchronise_batch_norm(model)
    optimiser = make_optimiser(config.optimiser, model)
    step, pending = resume(out / "checkpoint.pt", config, model, optimiser, total)  # pending: steps without a line
    if step == 0:
        task.begin(model)
    batches = iter(make_loader(task.data, runtime.loader_workers, device, batch_sampler=sampler.between(step, total)))
    compiled: nn.Module = torch.compile(model) if runtime.compile else model  # type: ignore[assignment]
    network = distributed.data_parallel(compiled, device)
    network.train()
    prepare = torch.compile(task.inputs) if runtime.compile else task.inputs
    to_device = ToDevice(device)
    line: dict[str, Any] = {}
    seen: dict[str, float] = {}  # of held-out videos, the last time
    apart = hold_out(config, runtime, shard_set, manifest, held_out, sampler.steps * config.batch_size)
    watch = None
    at_peak = cost.seconds_at_peak(config, device, runtime.precision)
    if main:
        announce(task, sampler, model, device, step, total)
        if apart and step < total:
            print(apart)
        log = metrics.Metrics(out / "metrics.jsonl", step)
        line = log.last
        if runtime.watch:
            from train.watch import Watch  # an extra

            watch = Watch(runtime.watch, out, step)
    stop = distributed.Flag(signal.SIGTERM)
    waited, since, first = 0.0, time.monotonic(), step
    saved = since
    with tqdm(total=total, initial=step, unit="step", disable=None if main else True) as bar:
        while step < total:
            asked = time.monotonic()
            batch = next(batches)
            waited += time.monotonic() - asked
            batch = to_device(batch)
            inputs = prepare(batch)
            if watch and step % sampler.steps == 0:
                watch.clips(step + 1, inputs)
            torch.manual_seed(step_seed(config.seed, step, rank))  # dropout
            rate = learning_rate(config, step, sampler.steps)
            pending.append(update(network, task, optimiser, rate, inputs, batch, runtime.precision))
            step += 1
            bar.update()
            end_of_epoch = step % sampler.steps == 0
            kept = end_of_epoch and step // sampler.steps in runtime.keep_epochs
            writing = end_of_epoch or step % runtime.log_steps == 0
            # One process looks for SIGTERM after every step. Several leave and save together: they ask at every line.
            terminated, due = stop.raised, main and time.monotonic() - saved >= 60 * runtime.checkpoint_minutes
            if ranks > 1:
                terminated, due = distributed.anywhere(device, terminated, due) if writing else (False, False)
            if not (writing or terminated):
                continue
            # This waits for the device, and always before a checkpoint replaces a good one.
            values = metrics.fetch(pending)
            metrics.check_finite(values, step)
            if writing:
                elapsed = time.monotonic() - since
                line = {"step": step, "epoch": round(step / sampler.steps, 4), "lr": rate}
                line |= {name: float(each.mean()) for name, each in values.items()}
                line["clips_per_second"] = (step - first) * config.batch_size / elapsed
                line["waiting"] = waited / elapsed
                if at_peak:
                    line["mfu"] = line["clips_per_second"] * at_peak / ranks
                pending = []
                if apart and end_of_epoch and apart.due(step // sampler.steps):
                    seen = apart.measure(model, runtime, device)
                    line |= seen
                    network.train()
                if main:
                    log.write(line)
                    if watch:
                        watch.metrics(line)
                    bar.set_postfix_str(metrics.dense(seen | line))
                    if bar.disable and end_of_epoch:  # not a terminal: a line an epoch for the log
                        print(metrics.dense(line), flush=True)
            if due or kept or terminated or step == total:
                checkpoint.check_finite(model, step)
                if main:
                    state = {"config": config.to_json(), "step": step, "epoch": step / sampler.steps}
                    state |= {"pending": pending, "model": model.state_dict()}
                    if kept:  # first: once checkpoint.pt is there, this epoch is not done again
                        checkpoint.save(out / f"epoch-{step // sampler.steps:04d}.pt", state)
                    checkpoint.save(out / "checkpoint.pt", state | {"optimiser": optimiser.state_dict()})
                saved = time.monotonic()
            if terminated and step < total:
                raise Terminated(f"saved at step {step} of {total}; the same command goes on from there")
            if writing:
                waited, since, first = 0.0, time.monotonic(), step  # the time to look and to save counts for no line
    if watch:
        watch.close()
    if held:
        held.close()
    return line


def update(
    network: nn.Module,
    task: Task,
    optimiser: torch.optim.Optimizer,
    rate: float,
    inputs: Inputs,
    batch: Batch,
    precision: str,
) -> dict[str, Tensor]:
    """One step of the optimiser on one batch: its numbers by name, scalars on the device, which is not waited for."""
    with torch.autocast(inputs[0].device.type, torch.bfloat16, enabled=precision == "bfloat16"):
        loss, parts = task.loss(network, inputs, batch)
    optimiser.zero_grad(set_to_none=True)
    loss.backward()
    norm = nn.utils.clip_grad_norm_(network.parameters(), task.config.optimiser.clip_norm)
    for group in optimiser.param_groups:
        group["lr"] = rate
    optimiser.step()
    found = {"loss": loss, **parts, "gradient_norm": norm}
    return {name: value.detach().float() for name, value in found.items()}


def resume(
    saved: Path, config: Config, model: nn.Module, optimiser: torch.optim.Optimizer, total: int
) -> tuple[int, list[dict[str, Tensor]]]:
    """Put a checkpoint, where there is one, into the model and the optimiser: (steps done, numbers not yet in a line).

    The first process says whether there is one. ValueError, in all processes, where it is another run's or damaged, or
    where they do not see the same one.
    """
    if not distributed.together(saved.exists)[0]:
        return 0, []
    pending = []

    def restore() -> int:
        if not saved.exists():
            raise ValueError(f"{saved} is not here, but where process 0 is: --out must be a folder that all share")
        state = checkpoint.load(saved, next(model.parameters()).device)
        runs.refuse_another(saved.parent, Config.from_json(state["config"]), config)
        checkpoint.load_weights(model, state["model"], saved)
        checkpoint.load_optimiser(optimiser, state, saved)
        if not 0 <= state["step"] <= total:
            raise ValueError(f"{saved} is of step {state['step']}, and the run has {total}: it is damaged")
        pending.extend(state["pending"])
        return state["step"]

    steps = distributed.together(restore)
    if len(set(steps)) > 1:
        raise ValueError(f"{saved} is of the steps {steps} as processes see it: --out must be a folder that all share")
    return steps[0], pending


def step_seed(seed: int, step: int, rank: int) -> int:
    return int(np.random.SeedSequence([seed, step, rank]).generate_state(1, np.uint64)[0] >> 1)


def announce(task: Task, sampler: EpochSampler, model: nn.Module, device: torch.device, step: int, total: int) -> None:
    """What is about to be trained on what, in three lines."""
    parameters = sum(p.numel() for p in model.parameters())
    print(
        f"{len(task.data)} videos ({task.left_out}, {task.data.failed} failed in stage 1), {sampler.steps} steps "
        f"an epoch, {sampler.dropped} videos wait for another epoch each time\n"
        f"{parameters / 1e6:.2f} M parameters on {device}, {distributed.world_size()} processes\n"
        + (f"{total} steps" if not step else f"going on at step {step} of {total}" if step < total else "has ended")
    )
    c = task.config
    if c.optimiser.warmup_epochs >= c.epochs:
        print(
            f"note: the learning rate rises for {c.optimiser.warmup_epochs:g} epochs, and this run has {c.epochs}: it "
            "never falls; lower --optimiser.warmup-epochs too"
        )
