"""Nothing that interrupts a run changes what it computes; a run goes on only with what it began with."""

from __future__ import annotations

import json
import math
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
from conftest import ROOT, tiny_config, train_command
from running import RUNTIME, Tiny, assert_same_run, lines, ready_process, run_again, start
from torch.utils.data._utils import signal_handling

from preprocess.manifest import Manifest
from train import __main__ as command
from train import checkpoint, loader, loop
from train.config import Config, Objective, Optimiser
from train.loop import Terminated, train


@pytest.mark.parametrize(("at", "workers"), [(1, 0), (11, 2)])  # before the first checkpoint; in the second epoch
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
    child = ready_process(_command, arguments[3:], errors)
    while child.is_alive():
        if metrics.exists() and metrics.stat().st_ino != before:
            written = [json.loads(t)["step"] for t in metrics.read_text().splitlines() if t.endswith("}")]
            if written and written[-1] >= step:
                os.killpg(child.pid, number)
                break
        time.sleep(0.005)
    child.join()
    return child.exitcode, errors.read_text()


def _command(arguments: list[str], errors: Path) -> None:
    torch.set_num_threads(1)  # as the process that it is compared with (conftest)
    os.setsid()
    sys.stdout, sys.stderr = open(os.devnull, "w"), open(errors, "w", buffering=1)
    sys.exit(command.main(arguments))


def survive(tiny: Tiny, out: Path, signals: list[signal.Signals], config: Config, seed: int, watch: int = 0) -> None:
    """Run a command, stopping it by each of `signals` at a random step; then let it end."""
    rng = random.Random(seed)
    options = ["--log-steps", "2", "--checkpoint-minutes", "0", "--watch-epochs", str(watch), "--loader-workers"]
    statuses = {signal.SIGKILL: -9, signal.SIGTERM: 143, signal.SIGINT: 130}
    total = config.epochs * 6
    for position, number in enumerate(signals):
        done = json.loads((out / "checkpoint.json").read_text())["step"] if (out / "checkpoint.json").exists() else 0
        # An equal share of what is left for each signal to come, so that each comes before the end.
        step = done + rng.randint(1, max(1, (total - 8 - done) // (len(signals) - position)))
        arguments = train_command(tiny, out, config, *options, str(rng.randint(0, 2)))
        status, errors = stop_at(arguments, out, step, number)
        assert status == statuses[number], errors
        assert "Traceback" not in errors
        if number == signal.SIGTERM:
            saved = json.loads((out / "checkpoint.json").read_text())["step"]
            assert f"terminated: saved at step {saved} of {total}" in errors and saved >= step
        if number == signal.SIGINT:
            assert "interrupted: the same command goes on" in errors
    assert command.main(train_command(tiny, out, config, *options, "1")[3:]) == 0


def test_killed_and_terminated_it_ends_the_same(tiny: Tiny, undisturbed: Path, tmp_path: Path) -> None:
    survive(tiny, tmp_path / "run", [signal.SIGKILL, signal.SIGTERM], tiny_config(), seed=random.randrange(1 << 30))
    assert_same_run(tmp_path / "run", undisturbed)


@pytest.mark.soak
def test_twenty_kills(tiny: Tiny, tmp_path: Path) -> None:
    signals = [signal.SIGKILL] * 20 + [signal.SIGTERM] * 3 + [signal.SIGINT] * 3
    random.shuffle(signals)
    config = tiny_config(epochs=30)
    survive(tiny, tmp_path / "run", signals, config, seed=random.randrange(1 << 30), watch=2)
    start(tiny, tmp_path / "undisturbed", config, replace(RUNTIME, watch_epochs=2), watched=True)
    assert_same_run(tmp_path / "run", tmp_path / "undisturbed")


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
    tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], what: str, spoil
) -> None:
    run_again(monkeypatch, 3, spoil)
    options = ("--loader-workers", "0", "--log-steps", "2", "--checkpoint-minutes", "0")
    assert command.main(train_command(tiny, tmp_path, tiny_config(), *options)[3:]) == 1
    errors = capsys.readouterr().err
    assert re.search(rf"error: the {what} is (inf|nan) at step 3;.*lr-per-sample", errors) and "Traceback" not in errors
    state = checkpoint.load(tmp_path / "checkpoint.pt")
    assert state["step"] == 2
    assert all(w.isfinite().all() for w in state["model"].values())


def test_weights_that_the_last_step_ruined_are_not_saved(tiny: Tiny, tmp_path: Path) -> None:
    config = tiny_config(batch_size=12, epochs=1, optimiser=Optimiser(lr_per_sample=1e37, warmup_epochs=0))
    with pytest.raises(FloatingPointError, match="weights are not finite after step 1; the last checkpoint is kept"):
        start(tiny, tmp_path, config)
    assert not (tmp_path / "checkpoint.pt").exists()


def _train_for_long(tiny: Tiny, out: Path) -> None:
    start(tiny, out, tiny_config(epochs=10_000))


def test_one_process_at_a_time_trains_in_a_folder(tiny: Tiny, tmp_path: Path) -> None:
    first = ready_process(_train_for_long, tiny, tmp_path)
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


def edit_run(run: Path, text: str) -> None:
    (run / "run.json").write_text(text, encoding="latin-1")


def leap(run: Path) -> None:
    checkpoint.save(run / "checkpoint.pt", checkpoint.load(run / "checkpoint.pt") | {"step": 1_000_000})


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda run: (run / "run.json").unlink(), r"holds checkpoint\.pt without the run\.json"),
        (leap, "is of step 1000000, and the run has 18"),
        *(
            (partial(edit_run, text=text), r"run\.json is damaged")
            for text in ("[]", "null", "{", "\xff", "{}", '{"recipe": 3}')
        ),
    ],
)
def test_a_folder_that_does_not_fit_together_is_refused(
    tiny: Tiny, undisturbed: Path, tmp_path: Path, spoil, message: str
) -> None:
    run = shutil.copytree(undisturbed, tmp_path / "run")
    spoil(run)
    before = {p.name: p.read_bytes() for p in run.iterdir()}
    with pytest.raises(ValueError, match=message):
        start(tiny, run)
    assert {p.name: p.read_bytes() for p in run.iterdir()} == before


def test_a_run_goes_on_only_with_what_it_began_with(tiny: Tiny, undisturbed: Path, tmp_path: Path) -> None:
    run, other = (shutil.copytree(x, tmp_path / x.name) for x in (undisturbed, tiny[0]))
    next(other.glob("*.sha256")).write_text("another checksum\n")
    with pytest.raises(ValueError, match=r"another run \(objective\.alpha: 0\.5 there, 0\.75 here\).*another --out"):
        start(tiny, run, tiny_config(objective=Objective(alpha=0.75)))
    with pytest.raises(ValueError, match=r"other data \(manifest_sha256: .* there, .* here\).*subset"):
        train(tiny_config(), RUNTIME, tiny[0], Manifest.read(tiny[1]), run)
    with pytest.raises(ValueError, match=r"other data \(shards_sha256: "):
        start((other, tiny[1]), run)
    (run / "checkpoint.pt").unlink()  # before the first checkpoint, too
    with pytest.raises(ValueError, match=r"seed: 0 there, 1 here"):
        start(tiny, run, tiny_config(seed=1))


@pytest.mark.parametrize("method", ["fork", "forkserver"])  # to the system the starter is no parent of the latter's
def test_a_worker_ends_with_its_parents_signal_alone(method: str) -> None:
    code = f"""
import subprocess, torch
from train import loader
batches = loader.make_loader(range(8), 1, torch.device("cpu"), batch_size=2, multiprocessing_context="{method}")
batches = iter(batches)
assert next(batches).tolist() == [0, 1]
worker, = batches._workers
for number in ("INT", "TERM"):  # from a process that is not the parent
    subprocess.run(["/bin/sh", "-c", f"kill -{{number}} {{worker.pid}}"], check=True)
worker.join(0.5)
assert worker.is_alive()
worker.terminate()
worker.join(60)
assert worker.exitcode == 0, worker.exitcode
"""
    many = {k: v for k, v in os.environ.items() if k not in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS")}
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=many, check=True)  # a worker with threads, and a server


def test_a_signal_to_all_that_finds_a_worker_just_begun_ends_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    theirs = signal_handling._set_worker_signal_handlers

    def struck_after() -> None:  # after this, SIGTERM from anybody ends a worker, until it heeds its parent alone
        theirs()
        for number in loader.STOPS:
            os.kill(os.getpid(), number)

    monkeypatch.setattr(signal_handling, "_set_worker_signal_handlers", struck_after)
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, [])
    fork = {"multiprocessing_context": "fork"}  # a server's children would not see what was put in its place
    batches = iter(loader.make_loader(range(8), 2, torch.device("cpu"), batch_size=2, **fork))
    assert signal.pthread_sigmask(signal.SIG_BLOCK, []) == mask
    assert [batch.tolist() for batch in batches] == [[0, 1], [2, 3], [4, 5], [6, 7]]
