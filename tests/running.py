"""What the tests of training share: starting a run, reading its metrics, comparing two runs."""

from __future__ import annotations

import json
import multiprocessing
from collections.abc import Callable
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import tiny_config

from preprocess.manifest import Manifest
from train import checkpoint, tasks
from train.config import Config, Runtime
from train.loop import train

Tiny = tuple[Path, Path]
# A line and a checkpoint every second step; epochs end at 6, 12 and 18.
RUNTIME = Runtime(device="cpu", loader_workers=0, log_steps=2, checkpoint_minutes=0)
TIMINGS = ("clips_per_second", "waiting")


def ready_process(target: Callable[..., None], *arguments: Any) -> BaseProcess:
    """Start a process that has torch loaded, forked from one that has no other thread, as pytest's own have."""
    server = multiprocessing.get_context("forkserver")
    server.set_forkserver_preload(["torch", "train.__main__", "train.loop"])
    process = server.Process(target=target, args=arguments)
    process.start()
    return process


def start(
    tiny: Tiny, out: Path, config: Config | None = None, runtime: Runtime = RUNTIME, watched: bool = False
) -> dict[str, Any]:
    """Train on the training rows; `watched`: the test rows are held out, as from the command line."""
    rows = Manifest.read(tiny[1])
    held_out = rows.subset("test") if watched else None
    return train(config or tiny_config(), runtime, tiny[0], rows.subset("train"), out, held_out=held_out)


def lines(out: Path) -> list[dict[str, Any]]:
    """The metrics without the timings; every step once, in order."""
    found = [json.loads(text) for text in (out / "metrics.jsonl").read_text().splitlines()]
    assert [f["step"] for f in found] == sorted({f["step"] for f in found})
    return [{k: v for k, v in f.items() if k not in TIMINGS} for f in found]


def assert_same_run(a: Path, b: Path) -> None:
    """Bit for bit: weights, optimiser, metrics."""
    first, second = (checkpoint.load(out / "checkpoint.pt") for out in (a, b))
    assert [first.pop(key) for key in ("format", "config")] == [second.pop(key) for key in ("format", "config")]
    torch.testing.assert_close(first, second, rtol=0, atol=0)
    assert lines(a) == lines(b)


def run_again(monkeypatch: pytest.MonkeyPatch, at: int, what, task: type = tasks.PretrainingTask) -> None:
    """Let what(loss) take the place of the loss at the at-th step (from 1) that this process makes."""
    made = 0

    def wrapped(*arguments):
        nonlocal made
        made += 1
        loss, found = original(*arguments)
        return (what(loss) if made == at else loss), found

    original = task.loss
    monkeypatch.setattr(task, "loss", wrapped)
