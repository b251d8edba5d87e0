"""The training loop: one readable function."""

from __future__ import annotations

import json
import math
import os
import platform
import signal
import subprocess
import sys
import time
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader
from tqdm import tqdm

from preprocess.manifest import Manifest
from preprocess.shards import Settings, ShardSet
from train import augment, checkpoint, distributed
from train.config import Config, Optimiser, Runtime
from train.data import EpochSampler, PretrainSet
from train.model import PretrainingModel
from train.objectives import Loss, context_matching, joint, motion_prediction

WARMUP_START = 0.01


class Terminated(Exception):
    """SIGTERM came; everything is saved."""


def train(
    config: Config, runtime: Runtime, shards: Path, manifest: Manifest, out: Path, recipe: str = ""
) -> dict[str, float]:
    """Pretrain, or go on from out/checkpoint.pt; returns the last line of metrics.

    Everything random is a function of (seed, epoch, video) or (seed, step), so a run that was killed ends as one that
    was not. Raises ValueError where `out` holds another run, FloatingPointError naming the step where the loss is not
    finite (the last good checkpoint stays), Terminated after SIGTERM.
    """
    device = distributed.start(torch.device(choose_device(runtime.device)))
    main = distributed.rank() == 0
    torch.backends.cudnn.benchmark = True
    shard_set = ShardSet(shards)
    data = PretrainSet(shard_set, manifest, config.sampling, config.cropping, config.photometric, config.seed)
    sampler = EpochSampler(len(data), config.batch_size, distributed.rank(), distributed.world_size(), config.seed)
    loader = DataLoader(
        data,
        batch_sampler=sampler,
        num_workers=runtime.loader_workers,
        pin_memory=device.type == "cuda",
        worker_init_fn=_one_thread,
    )
    torch.manual_seed(config.seed)
    # Channels last is what the convolutions compute in, on CPUs and on tensor cores alike.
    model = PretrainingModel(config).to(device).to(memory_format=torch.channels_last_3d)  # type: ignore[call-overload]
    distributed.synchronise_batch_norm(model)
    optimiser = make_optimiser(config.optimiser, model, device)
    step = 0
    if main:
        begin(out, config, manifest, shard_set, recipe)
    saved = out / "checkpoint.pt"
    if saved.exists():
        state = checkpoint.load(saved, device)
        if state["config"] != config.to_json():
            differences = config.differences(Config.from_json(state["config"]))
            raise ValueError(f"{out} holds another run ({'; '.join(differences)}): choose another --out")
        checkpoint.load_weights(model, state["model"], saved)
        optimiser.load_state_dict(state["optimiser"])
        step = int(state["step"])
    total = config.epochs * sampler.steps
    if main:
        say(data, sampler, model, device, step, total)
        metrics = Metrics(out / "metrics.jsonl", step)
    network: nn.Module = torch.compile(model) if runtime.compile else model  # type: ignore[assignment]
    if distributed.world_size() > 1:
        network = DistributedDataParallel(network, [device] if device.type == "cuda" else None)
    stop = Flag(signal.SIGTERM)
    bar = tqdm(total=total, initial=step, unit="step", disable=None if main else True)
    pending: list[Tensor] = []  # one row of numbers a step, fetched from the device once a line
    line: dict[str, float] = {}
    waited, since = 0.0, time.monotonic()
    model.train()
    while step < total:
        sampler.start_at(step // sampler.steps, step % sampler.steps)
        batches = iter(loader)
        while True:
            asked = time.monotonic()
            batch = next(batches, None)
            waited += time.monotonic() - asked
            if batch is None:
                break
            torch.manual_seed(step_seed(config.seed, step, distributed.rank()))  # dropout
            rate = learning_rate(config, step, sampler.steps)
            for group in optimiser.param_groups:
                group["lr"] = rate
            batch = {k: v.to(device, non_blocking=True) for k, v in batch.items()}
            with torch.autocast(device.type, torch.bfloat16, enabled=runtime.precision == "bfloat16"):
                loss, context, motion = losses(network, batch, config, shard_set.settings)
            optimiser.zero_grad(set_to_none=True)
            loss.backward()
            norm = nn.utils.clip_grad_norm_(model.parameters(), config.optimiser.clip_norm)
            optimiser.step()
            step += 1
            bar.update()
            pending.append(torch.stack([loss.detach(), *context, *motion, norm]).detach().float())
            end_of_epoch = step % sampler.steps == 0
            saving = end_of_epoch or step % runtime.checkpoint_steps == 0 or stop.raised
            if saving or step % runtime.log_steps == 0 or step == total:
                # The only place that waits for the device, and always before a checkpoint replaces a good one.
                rows = distributed.mean_over_ranks(torch.stack(pending)).cpu().numpy()
                check_finite(rows[:, 0], step)
                elapsed = time.monotonic() - since
                line = {"step": step, "epoch": round(step / sampler.steps, 4), "lr": rate}
                line |= summarise(rows, config.objective.alpha)
                line |= {
                    "clips_per_second": len(rows) * config.batch_size / elapsed,
                    "waiting": waited / elapsed,
                }
                pending, waited, since = [], 0.0, time.monotonic()
                if main:
                    metrics.write(line)
                    bar.set_postfix_str(dense(line))
            if saving and main:
                state = {"model": model.state_dict(), "optimiser": optimiser.state_dict()}
                state |= {"config": config.to_json(), "step": step, "epoch": step / sampler.steps}
                checkpoint.save(saved, state)
                epoch = step // sampler.steps
                if end_of_epoch and epoch in runtime.keep_epochs:
                    del state["optimiser"]
                    checkpoint.save(out / f"epoch-{epoch:04d}.pt", state)
                since = time.monotonic()
            if stop.raised:
                raise Terminated(f"saved at step {step} of {total}; the same command goes on from there")
    bar.close()
    distributed.stop()
    return line


def losses(
    network: nn.Module, batch: dict[str, Tensor], config: Config, settings: Settings
) -> tuple[Tensor, Loss, Loss]:
    """(J times its scale, context loss and accuracy, motion loss and accuracy) of a batch as `PretrainSet` makes it."""
    alpha, o = config.objective.alpha, config.objective
    with torch.no_grad(), torch.autocast(batch["clip"].device.type, enabled=False):
        clip, iframe, motion = inputs(batch, config, settings)
    embeddings = network(clip, iframe, motion)
    nothing = Loss(torch.zeros((), device=clip.device), torch.zeros((), device=clip.device))
    context = context_matching(embeddings.clips, embeddings.iframes, o.context_temperature) if alpha < 1 else nothing
    future = (
        motion_prediction(embeddings.predicted, embeddings.positives, embeddings.negatives, o.motion_temperature)
        if alpha > 0
        else nothing
    )
    return joint(context.value, future.value, alpha, o.loss_scale), context, future


def inputs(batch: dict[str, Tensor], config: Config, settings: Settings) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """A batch, cropped, flipped and coloured on its device: clip (B, 3, T, S, S), I-frame (B, 3, 1, S, S), motion
    (B, 1+K, 2, W, M, M); None where a task has no weight."""
    size, taps = config.size, config.photometric.blur_taps
    clip = augment.crop(batch["clip"], batch["clip_box"], batch["clip_flip"], size)
    clip = augment.normalise(augment.photometric(clip, batch["clip_photo"], taps))
    iframe = motion = None
    if config.objective.alpha < 1:
        iframe = augment.crop(batch["iframe"][:, None], batch["iframe_box"], batch["iframe_flip"], size)
        iframe = augment.normalise(augment.photometric(iframe, batch["iframe_photo"], taps))
    if config.objective.alpha > 0:
        windows, boxes, flips = (batch[k].flatten(0, 1) for k in ("motion", "motion_box", "motion_flip"))
        motion = augment.crop_motion(windows, boxes, flips, config.motion_size, settings.width, settings.height)
        motion = motion.unflatten(0, batch["motion"].shape[:2])
    return clip, iframe, motion


def choose_device(name: str) -> str:
    return ("cuda" if torch.cuda.is_available() else "cpu") if name == "auto" else name


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


def check_finite(values: np.ndarray, step: int) -> None:
    """Raise FloatingPointError naming the first step whose loss is not finite; `values` end with that of `step`."""
    bad = np.flatnonzero(~np.isfinite(values))
    if len(bad):
        raise FloatingPointError(
            f"the loss is {values[bad[0]]} at step {step - len(values) + int(bad[0]) + 1}; the last checkpoint is "
            "kept. Lower --optimiser.lr-per-sample, or try --precision float32"
        )


def summarise(rows: np.ndarray, alpha: float) -> dict[str, float]:
    """Means over the steps of a line; losses unscaled, accuracies as table 7 reports them."""
    loss, context, context_accuracy, motion, motion_accuracy, norm = (float(x) for x in rows.mean(0))
    line = {"loss": loss}
    if alpha < 1:
        line |= {"context_loss": context, "context_accuracy": context_accuracy}
    if alpha > 0:
        line |= {"motion_loss": motion, "motion_accuracy": motion_accuracy}
    return line | {"gradient_norm": norm}


def dense(line: dict[str, float]) -> str:
    tasks = [
        f"{task} {line[f'{task}_loss']:.2f} ({100 * line[f'{task}_accuracy']:.0f} %)"
        for task in ("context", "motion")
        if f"{task}_loss" in line
    ]
    return (
        f"epoch {line['epoch']:.1f}, {', '.join(tasks)}, lr {line['lr']:.2g}, {line['clips_per_second']:.1f} clips/s, "
        f"waiting {100 * line['waiting']:.0f} %"
    )


class Metrics:
    """JSON lines; on a restart the lines after the checkpoint are dropped, since those steps run again."""

    def __init__(self, path: Path, step: int) -> None:
        kept = []
        if path.exists():
            for text in path.read_text().splitlines():
                try:
                    line = json.loads(text)
                except json.JSONDecodeError:  # the line that a kill cut short
                    break
                if line["step"] <= step:
                    kept.append(text)
        new = path.with_name(path.name + ".new")
        new.write_text("".join(f"{t}\n" for t in kept))
        os.replace(new, path)
        self._file = open(path, "a", buffering=1)

    def write(self, line: dict[str, float]) -> None:
        self._file.write(json.dumps(line) + "\n")


class Flag:
    """Remembers that a signal came, so that the step in progress can end."""

    def __init__(self, number: int) -> None:
        self.raised = False
        signal.signal(number, self._raise)

    def _raise(self, *_: object) -> None:
        self.raised = True


def begin(out: Path, config: Config, manifest: Manifest, shards: ShardSet, recipe: str) -> None:
    """Write run.json, what made this run: config, seed, versions, hashes."""
    out.mkdir(parents=True, exist_ok=True)
    path = out / "run.json"
    if path.exists():
        return
    values: dict[str, Any] = {
        "recipe": recipe,
        "config": json.loads(config.to_json()),
        "config_sha256": config.sha256(),
        "manifest_sha256": manifest.sha256,
        "shards_sha256": shards.sha256(),
        "shards_settings": asdict(shards.settings),
        "commit": git_commit(),
        "command": " ".join(sys.argv),
        "versions": {name: version(name) for name in ("torch", "numpy", "h5py", "simplejpeg", "kornia")},
        "python": platform.python_version(),
    }
    new = path.with_name("run.json.new")
    new.write_text(json.dumps(values, indent=1) + "\n")
    os.replace(new, path)


def git_commit() -> str:
    """Commit of this program's checkout, with + where it was changed; empty where it is not a checkout."""
    try:
        here = Path(__file__).resolve().parent
        run = {"cwd": here, "capture_output": True, "text": True, "check": True}
        commit = subprocess.run(["git", "rev-parse", "HEAD"], **run).stdout.strip()  # type: ignore[call-overload]
        changed = subprocess.run(["git", "status", "--porcelain", "-uno"], **run).stdout.strip()  # type: ignore[call-overload]
        return commit + ("+" if changed else "")
    except (OSError, subprocess.CalledProcessError):
        return ""


def say(
    data: PretrainSet, sampler: EpochSampler, model: nn.Module, device: torch.device, step: int, total: int
) -> None:
    """What is about to be trained on what, in three lines."""
    parameters = sum(p.numel() for p in model.parameters())
    print(
        f"{len(data)} videos ({data.dropped} too short, {data.failed} failed in stage 1), {sampler.steps} steps an "
        f"epoch, {sampler.dropped} videos wait for another epoch each time\n"
        f"{parameters / 1e6:.2f} M parameters on {device}, {distributed.world_size()} processes\n"
        + (f"going on at step {step} of {total}" if step else f"{total} steps")
    )


def _one_thread(_: int) -> None:
    torch.set_num_threads(1)
