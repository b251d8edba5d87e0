"""Nothing that interrupts a run changes what it computes."""

from __future__ import annotations

import json
import math
import multiprocessing
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import ROOT, one_thread, tiny_config, train_command
from running import RUNTIME, Tiny, assert_same_run, lines, run_again, start

from train import __main__ as command
from train import checkpoint, loader, loop
from train.config import Config, Optimiser
from train.loop import Terminated


@pytest.mark.parametrize(("at", "workers"), [(1, 0), (6, 1), (9, 2)])
def test_an_interrupted_run_ends_as_an_undisturbed_one(
    tiny: Tiny, undisturbed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, at: int, workers: int
) -> None:
    def interrupt(_: torch.Tensor) -> None:
        raise KeyboardInterrupt

    run_again(monkeypatch, at, interrupt)
    with pytest.raises(KeyboardInterrupt):
        start(tiny, tmp_path)
    last = start(tiny, tmp_path, runtime=replace(RUNTIME, loader_workers=workers))
    assert_same_run(tmp_path, undisturbed)
    assert last["step"] == 18
    # A finished run is left as it is.
    before = (tmp_path / "checkpoint.pt").stat().st_mtime_ns
    assert start(tiny, tmp_path) == last
    assert (tmp_path / "checkpoint.pt").stat().st_mtime_ns == before


def stop_at(arguments: list[str], out: Path, step: int, number: int) -> tuple[int, str]:
    """Start a command, signal it and its workers once it has written a step; exit status and standard error."""
    metrics, errors = out / "metrics.jsonl", out.with_name("errors")
    before = metrics.stat().st_ino if metrics.exists() else 0  # a start puts a new file in place of the old one
    child = os.fork()  # rather than a program of its own, which would import torch for seconds
    if not child:
        os.setsid()
        sys.stdout, sys.stderr = open(os.devnull, "w"), open(errors, "w", buffering=1)
        try:
            os._exit(command.main(arguments[3:]))
        finally:
            os._exit(99)
    while not (ended := os.waitpid(child, os.WNOHANG))[0]:
        if metrics.exists() and metrics.stat().st_ino != before:
            written = [json.loads(t)["step"] for t in metrics.read_text().splitlines() if t.endswith("}")]
            if written and written[-1] >= step:
                os.killpg(child, number)
                ended = os.waitpid(child, 0)
                break
        time.sleep(0.005)
    return os.waitstatus_to_exitcode(ended[1]), errors.read_text()


def survive(tiny: Tiny, tmp_path: Path, signals: list[int], config: Config, seed: int) -> None:
    """Run a command, stopping it by each of `signals` at a random step; then let it end, and compare."""
    rng, out = random.Random(seed), tmp_path / "disturbed"
    options = ["--log-steps", "2", "--checkpoint-steps", "5", "--watch-epochs", "2", "--loader-workers"]
    statuses = {signal.SIGKILL: -signal.SIGKILL, signal.SIGTERM: 143, signal.SIGINT: 130}
    total = config.epochs * 6
    for position, number in enumerate(signals):
        done = json.loads((out / "checkpoint.json").read_text())["step"] if (out / "checkpoint.json").exists() else 0
        # An equal share of what is left for each signal to come, so that each comes before the end.
        step = done + rng.randint(1, max(1, (total - 8 - done) // (len(signals) - position)))
        arguments = train_command(tiny, out, config, *options, str(rng.randint(0, 2)))
        status, errors = stop_at(arguments, out, step, number)
        assert status == statuses[signal.Signals(number)], errors
        assert "Traceback" not in errors
        if number == signal.SIGTERM:
            saved = json.loads((out / "checkpoint.json").read_text())["step"]
            assert f"terminated: saved at step {saved} of {total}" in errors and saved >= step
        if number == signal.SIGINT:
            assert "interrupted: the same command goes on" in errors
    finished = subprocess.run(
        train_command(tiny, out, config, *options, "1"), cwd=ROOT, env=one_thread(), text=True, capture_output=True
    )
    assert finished.returncode == 0, finished.stderr
    start(tiny, tmp_path / "undisturbed", config, replace(RUNTIME, watch_epochs=2), watched=True)
    assert_same_run(out, tmp_path / "undisturbed")
    assert sum("heldout_recall" in line for line in lines(out)) == -(-config.epochs // 2)


def test_killed_and_terminated_it_ends_the_same(tiny: Tiny, tmp_path: Path) -> None:
    signals = [signal.SIGKILL, signal.SIGTERM]
    survive(tiny, tmp_path, [int(s) for s in signals], tiny_config(epochs=4), seed=random.randrange(1 << 30))


@pytest.mark.soak
def test_twenty_kills(tiny: Tiny, tmp_path: Path) -> None:
    signals = [signal.SIGKILL] * 20 + [signal.SIGTERM] * 3 + [signal.SIGINT] * 3
    random.shuffle(signals)
    survive(tiny, tmp_path, [int(s) for s in signals], tiny_config(epochs=30), seed=random.randrange(1 << 30))


def test_ctrl_c_is_no_traceback(
    tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run_again(monkeypatch, 1, lambda _: os.kill(os.getpid(), signal.SIGINT))
    assert command.main(train_command(tiny, tmp_path / "run", tiny_config(), "--loader-workers", "0")[3:]) == 130
    assert capsys.readouterr().err == "interrupted: the same command goes on from the last checkpoint\n"


def test_sigterm_between_lines_changes_no_line(
    tiny: Tiny, undisturbed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def terminate(loss: torch.Tensor) -> torch.Tensor:
        os.kill(os.getpid(), signal.SIGTERM)
        return loss

    run_again(monkeypatch, 3, terminate)
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(Terminated, match="saved at step 3 of 18"):
        start(tiny, tmp_path)
    assert signal.getsignal(signal.SIGTERM) is before
    assert [line["step"] for line in lines(tmp_path)] == [2]
    start(tiny, tmp_path)
    assert_same_run(tmp_path, undisturbed)


def test_a_line_that_a_kill_cut_short_is_dropped(tiny: Tiny, undisturbed: Path, tmp_path: Path) -> None:
    shutil.copytree(undisturbed, tmp_path / "run")
    metrics = tmp_path / "run" / "metrics.jsonl"
    whole = metrics.read_text()
    metrics.write_text(whole + '{"step": 20, "ep')
    start(tiny, tmp_path / "run")
    assert metrics.read_text() == whole


@pytest.mark.parametrize(
    ("what", "spoil"),
    [
        ("loss", lambda loss: loss * math.inf),
        # Value zero, gradient infinite: the loss of this step is finite, the weights after it are not.
        ("norm of the gradient", lambda loss: loss + (loss - loss.detach()).sqrt()),
    ],
)
def test_a_loss_that_is_not_finite_stops_and_keeps_the_last_good_checkpoint(
    tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, what: str, spoil
) -> None:
    run_again(monkeypatch, 9, spoil)
    with pytest.raises(FloatingPointError, match=rf"the {what} is (inf|nan) at step 9;.*lr-per-sample"):
        start(tiny, tmp_path, runtime=replace(RUNTIME, log_steps=100))
    state = checkpoint.load(tmp_path / "checkpoint.pt")
    assert state["step"] == 6
    assert all(w.isfinite().all() for w in state["model"].values())


def test_a_learning_rate_that_explodes_is_an_error_of_one_line(
    tiny: Tiny, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = tiny_config(optimiser=Optimiser(lr_per_sample=1e30, warmup_epochs=0))
    assert command.main(train_command(tiny, tmp_path / "run", config, "--loader-workers", "0")[3:]) == 1
    errors = capsys.readouterr().err
    assert "error: the " in errors and "at step" in errors and "Traceback" not in errors


def test_weights_that_the_last_step_ruined_are_not_saved(tiny: Tiny, tmp_path: Path) -> None:
    config = tiny_config(batch_size=12, epochs=1, optimiser=Optimiser(lr_per_sample=1e37, warmup_epochs=0))
    with pytest.raises(FloatingPointError, match="weights are not finite after step 1; the last checkpoint is kept"):
        start(tiny, tmp_path, config)
    assert not (tmp_path / "checkpoint.pt").exists()


def _train_for_long(tiny: Tiny, out: Path) -> None:
    start(tiny, out, tiny_config(epochs=10_000))


def test_one_process_at_a_time_trains_in_a_folder(tiny: Tiny, tmp_path: Path) -> None:
    first = multiprocessing.get_context("fork").Process(target=_train_for_long, args=(tiny, tmp_path))
    first.start()
    try:
        while not (tmp_path / "checkpoint.pt").exists():
            assert first.is_alive()
            time.sleep(0.05)
        with pytest.raises(ValueError, match="another process trains in"):
            start(tiny, tmp_path, tiny_config(epochs=10_000))
    finally:
        first.kill()
        first.join()
    (tmp_path / ".checkpoint.pt.0.partial").write_text("what one that is killed while it saves leaves")
    with loop.runs.hold(tmp_path):  # a killed one holds nothing
        assert not list(tmp_path.glob("*.partial"))


def test_a_folder_that_does_not_fit_together_is_refused(tiny: Tiny, tmp_path: Path) -> None:
    start(tiny, tmp_path)
    about = (tmp_path / "run.json").read_bytes()
    (tmp_path / "run.json").unlink()
    with pytest.raises(ValueError, match=r"holds checkpoint\.pt without the run\.json"):
        start(tiny, tmp_path)
    assert not (tmp_path / "run.json").exists()
    (tmp_path / "run.json").write_bytes(about)
    state = checkpoint.load(tmp_path / "checkpoint.pt")
    checkpoint.save(tmp_path / "checkpoint.pt", state | {"step": 1_000_000})
    with pytest.raises(ValueError, match="is of step 1000000, and the run has 18"):
        start(tiny, tmp_path)
    for damaged in ("[]", "null", "{", "\xff", "{}", '{"recipe": 3}'):
        (tmp_path / "run.json").write_text(damaged, encoding="latin-1")
        with pytest.raises(ValueError, match=r"run\.json is damaged"):
            start(tiny, tmp_path)


def test_a_checkpoint_that_cannot_be_written_leaves_the_one_before(
    tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)

    def fill_disk(loss: torch.Tensor) -> torch.Tensor:
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, hard))
        return loss

    run_again(monkeypatch, 8, fill_disk)
    try:
        with pytest.raises(OSError, match=r"checkpoint\.pt could not be written .* what lay there before is kept"):
            start(tiny, tmp_path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert checkpoint.load(tmp_path / "checkpoint.pt")["step"] == 6
    assert list(tmp_path.glob("*.partial")) == []


def _worker(ready: Any) -> None:
    loader.heed_only_parent(0)
    ready.set()
    time.sleep(600)


def test_a_worker_ends_with_its_parents_signal_alone() -> None:
    context = multiprocessing.get_context("fork")
    ready = context.Event()
    worker = context.Process(target=_worker, args=(ready,), daemon=True)
    worker.start()
    assert ready.wait(60)
    for number in ("INT", "TERM"):  # from a process that is not the parent
        subprocess.run(["/bin/sh", "-c", f"kill -{number} {worker.pid}"], check=True)
    worker.join(0.5)
    assert worker.is_alive()
    worker.terminate()
    worker.join(60)
    assert worker.exitcode == 0
