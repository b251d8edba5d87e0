"""The training loop: what it computes, and that nothing which interrupts it changes what it computes."""

from __future__ import annotations

import json
import math
import multiprocessing
import os
import random
import resource
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import DATA, ROOT, make_shards, one_thread, tiny_config, train_command
from hypothesis import given
from hypothesis import strategies as st

from preprocess.manifest import Manifest
from preprocess.shards import Settings, Shard, ShardSet
from train import __main__ as command
from train import checkpoint, loop
from train.config import Config, Objective, Optimiser, Runtime
from train.data import PretrainSet
from train.draws import Cropping
from train.loop import Terminated, inputs, learning_rate, losses, make_optimiser, train
from train.model import PretrainingModel
from train.recipes import RECIPES

Tiny = tuple[Path, Path]
# Lines and checkpoints at steps that meet neither each other nor the epochs' ends (6, 12, 18).
RUNTIME = Runtime(device="cpu", loader_workers=0, log_steps=2, checkpoint_steps=5)
TIMINGS = ("clips_per_second", "waiting")


@pytest.fixture(autouse=True, scope="module")
def _one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def start(tiny: Tiny, out: Path, config: Config | None = None, runtime: Runtime = RUNTIME) -> dict[str, Any]:
    return train(config or tiny_config(), runtime, tiny[0], Manifest.read(tiny[1]).subset("train"), out)


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


def run_again(monkeypatch: pytest.MonkeyPatch, at: int, what) -> None:
    """Let what(loss) take the place of the loss at the at-th step (from 1) that this process makes."""
    made = 0

    def wrapped(*arguments):
        nonlocal made
        made += 1
        loss, context, motion = losses(*arguments)
        return (what(loss) if made == at else loss), context, motion

    monkeypatch.setattr(loop, "losses", wrapped)


@pytest.fixture(scope="module")
def undisturbed(tiny: Tiny, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run that nothing interrupted, its samples decoded in the training process."""
    out = tmp_path_factory.mktemp("undisturbed") / "run"
    start(tiny, out)
    return out


# ---- what it computes


class Fixed:
    """Stands for PretrainSet: samples that no codec and no draw had a part in."""

    dropped = failed = 0

    def __init__(self, *_: object) -> None:
        pass

    def __len__(self) -> int:
        return 12

    def __getitem__(self, key: tuple[int, int]) -> dict[str, Any]:
        rng = np.random.default_rng(key[1])
        boxes = np.array([[0.1, 0.2, 0.7, 0.9], [0.0, 0.0, 0.5, 0.5], [0.2, 0.2, 1, 1]], np.float32)
        photo = np.array([0.5 * (key[1] % 2), 1.1, 0.9, 1, 0.05, key[1] % 3 == 0], np.float32)
        return {
            "clip": rng.integers(0, 256, (8, 2, 2, 3), np.uint8).repeat(20, 1).repeat(24, 2),
            "clip_box": boxes[0],
            "clip_flip": key[1] % 2 == 0,
            "clip_photo": photo,
            "iframe": rng.integers(0, 256, (2, 2, 3), np.uint8).repeat(20, 0).repeat(24, 1),
            "iframe_box": boxes[1],
            "iframe_flip": False,
            "iframe_photo": photo,
            "motion": rng.integers(-40, 40, (2, 8, 3, 4, 2)).astype(np.int16).repeat(3, 2).repeat(3, 3),
            "motion_box": boxes[[0, 2]],
            "motion_flip": np.array([key[1] % 2 == 0, True]),
        }


GOLDEN = [7.66502, 7.49632, 7.27565, 7.15063, 6.75817, 6.73693, 6.52083, 6.49366, 6.40586, 6.34432]


def test_ten_steps_give_the_losses_they_always_gave(
    tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A refactoring changes no number here. Rounding does: 1e-6 on every weight at the beginning makes less than 2e-6
    of the first four losses, and up to 5e-3 of the last ones, whose gradients have passed other maxima by then."""
    monkeypatch.setattr(loop, "PretrainSet", Fixed)
    optimiser = Optimiser("sgd", lr_per_sample=1e-4, warmup_epochs=2)
    config = tiny_config(batch_size=12, epochs=10, objective=Objective(0.5, 0.5, 0.5), optimiser=optimiser)
    start(tiny, tmp_path, config, replace(RUNTIME, log_steps=1))
    found = [line["loss"] for line in lines(tmp_path)]
    assert found[:4] == pytest.approx(GOLDEN[:4], rel=2e-4)
    assert found == pytest.approx(GOLDEN, rel=2e-2)


def test_both_losses_fall(tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loop, "PretrainSet", Fixed)
    optimiser = Optimiser("sgd", lr_per_sample=1e-3, warmup_epochs=0)
    start(tiny, tmp_path, tiny_config(batch_size=12, epochs=16, optimiser=optimiser), replace(RUNTIME, log_steps=1))
    found = lines(tmp_path)
    for task in ("context", "motion"):
        early, late = ([line[f"{task}_loss"] for line in part] for part in (found[:4], found[-4:]))
        assert np.mean(late) < 0.95 * np.mean(early), task


@pytest.mark.parametrize("alpha", [0.0, 0.5, 1.0])
def test_only_parts_with_a_weight_exist_and_all_of_them_learn(tiny: Tiny, alpha: float) -> None:
    config = tiny_config(objective=Objective(alpha=alpha))
    shards = ShardSet(tiny[0])
    data = PretrainSet(shards, None, config.sampling, config.cropping, config.photometric)
    batch = torch.utils.data.default_collate([data[0, i] for i in range(4)])
    model = PretrainingModel(config)
    context, motion = {"iframe", "clip_head", "iframe_head"}, {"motion", "predictor", "motion_head", "predicted_head"}
    assert {name for name, _ in model.named_children()} == (
        {"video"} | (context if alpha < 1 else set()) | (motion if alpha > 0 else set())
    )
    clip, iframe, windows = inputs(batch, config, shards.settings)
    assert clip.shape == (4, 3, 8, 32, 32)
    assert iframe is None if alpha == 1 else iframe.shape == (4, 3, 1, 32, 32)
    assert windows is None if alpha == 0 else windows.shape == (4, 2, 2, 8, 32, 32)
    loss, of_context, of_motion = losses(model, batch, config, shards.settings)
    loss.backward()
    context_loss, motion_loss = float(of_context.value.detach()), float(of_motion.value.detach())
    assert float(loss.detach()) == pytest.approx(2 * ((1 - alpha) * context_loss + alpha * motion_loss))
    assert [name for name, p in model.named_parameters() if p.grad is None] == []


def test_learning_rate_by_hand() -> None:
    config = tiny_config(batch_size=8, epochs=6, optimiser=Optimiser(lr_per_sample=0.01, warmup_epochs=2))
    # Peak 0.01 x 8. Five steps an epoch: ten of warm-up, then twenty of cosine.
    expected = {0: 0.0008, 5: 0.0404, 10: 0.08, 15: 0.06828427, 20: 0.04, 25: 0.01171573, 30: 0.0}
    assert {step: learning_rate(config, step, 5) for step in expected} == pytest.approx(expected, abs=1e-8)
    twice = replace(config, batch_size=16)
    assert all(learning_rate(twice, s, 5) == pytest.approx(2 * learning_rate(config, s, 5)) for s in range(31))
    flat = replace(config, optimiser=Optimiser(lr_per_sample=0.01, warmup_epochs=0))
    assert learning_rate(flat, 0, 5) == pytest.approx(0.08)


def test_the_optimiser_gets_the_rate_of_the_step(undisturbed: Path) -> None:
    assert [line["lr"] for line in lines(undisturbed)] == [
        learning_rate(tiny_config(), line["step"] - 1, 6) for line in lines(undisturbed)
    ]
    state = checkpoint.load(undisturbed / "checkpoint.pt")
    assert state["optimiser"]["param_groups"][0]["lr"] == learning_rate(tiny_config(), 17, 6)


def test_optimisers_take_their_settings() -> None:
    module, cpu = torch.nn.Linear(2, 2), torch.device("cpu")
    sgd = make_optimiser(Optimiser(weight_decay=0.25, momentum=0.5), module, cpu)
    assert isinstance(sgd, torch.optim.SGD)
    assert {k: sgd.defaults[k] for k in ("weight_decay", "momentum", "nesterov")} == {
        "weight_decay": 0.25, "momentum": 0.5, "nesterov": True,
    }  # fmt: skip
    adamw = make_optimiser(Optimiser("adamw", weight_decay=0.125), module, cpu)
    assert isinstance(adamw, torch.optim.AdamW) and adamw.defaults["weight_decay"] == 0.125


def test_a_run_says_what_made_it(tiny: Tiny, undisturbed: Path) -> None:
    about = json.loads((undisturbed / "run.json").read_text())
    config, rows = tiny_config(), Manifest.read(tiny[1]).subset("train")
    assert about["seed"] == 0 and about["config_sha256"] == config.sha256()
    assert Config.from_json(json.dumps(about["config"])) == config
    assert about["manifest_sha256"] == rows.sha256 and about["shards_sha256"] == ShardSet(tiny[0]).sha256()
    assert about["versions"]["torch"] == torch.__version__
    readable = json.loads((undisturbed / "checkpoint.json").read_text())
    assert readable["step"] == 18 and readable["epoch"] == 3
    assert [line["step"] for line in lines(undisturbed)] == [2, 4, 5, 6, 8, 10, 12, 14, 15, 16, 18]


def test_kept_epochs_hold_the_weights_of_their_epoch(tiny: Tiny, tmp_path: Path) -> None:
    start(tiny, tmp_path, runtime=replace(RUNTIME, keep_epochs=(1, 3)))
    assert sorted(p.name for p in tmp_path.glob("*.pt")) == ["checkpoint.pt", "epoch-0001.pt", "epoch-0003.pt"]
    kept = checkpoint.load(tmp_path / "epoch-0001.pt")
    assert kept["epoch"] == 1 and "optimiser" not in kept
    last = checkpoint.load(tmp_path / "checkpoint.pt")
    torch.testing.assert_close(
        checkpoint.load(tmp_path / "epoch-0003.pt")["model"], last["model"], rtol=0, atol=0
    )  # fmt: skip
    assert not torch.equal(kept["model"]["clip_head.linear1.weight"], last["model"]["clip_head.linear1.weight"])


# ---- a run survives


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


def stop_at(command: list[str], out: Path, step: int, number: int) -> tuple[int, str]:
    """Start a command, signal it and its workers once it has written a step; exit status and standard error."""
    metrics = out / "metrics.jsonl"
    before = metrics.stat().st_ino if metrics.exists() else 0  # a start puts a new file in place of the old one
    process = subprocess.Popen(
        command, cwd=ROOT, env=one_thread(), start_new_session=True, text=True,
        stdout=subprocess.DEVNULL, stderr=subprocess.PIPE,
    )  # fmt: skip
    while process.poll() is None:
        if metrics.exists() and metrics.stat().st_ino != before:
            written = [json.loads(t)["step"] for t in metrics.read_text().splitlines() if t.endswith("}")]
            if written and written[-1] >= step:
                os.killpg(process.pid, number)
                break
        time.sleep(0.005)
    errors = process.communicate(timeout=120)[1]
    return process.returncode, errors


def survive(tiny: Tiny, tmp_path: Path, signals: list[int], config: Config, seed: int) -> None:
    """Run a command, stopping it by each of `signals` at a random step; then let it end, and compare."""
    rng, out = random.Random(seed), tmp_path / "disturbed"
    options = ["--log-steps", "2", "--checkpoint-steps", "5", "--loader-workers"]
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
    start(tiny, tmp_path / "undisturbed", config)
    assert_same_run(out, tmp_path / "undisturbed")


def test_killed_and_terminated_it_ends_the_same(tiny: Tiny, tmp_path: Path) -> None:
    signals = [signal.SIGKILL, signal.SIGTERM, signal.SIGKILL]
    survive(tiny, tmp_path, [int(s) for s in signals], tiny_config(epochs=6), seed=random.randrange(1 << 30))


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


def test_a_checkpoint_that_cannot_be_written_leaves_the_one_before(
    tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)

    def fill_disk(loss: torch.Tensor) -> torch.Tensor:
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, hard))
        return loss

    run_again(monkeypatch, 8, fill_disk)
    try:
        with pytest.raises(OSError, match=r"checkpoint\.pt could not be written .* the checkpoint before it is kept"):
            start(tiny, tmp_path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert checkpoint.load(tmp_path / "checkpoint.pt")["step"] == 6
    assert list(tmp_path.glob("*.partial")) == []


def _worker(ready: Any) -> None:
    loop.heed_only_parent(0)
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


# ---- what is refused, and how it is said


def test_a_run_goes_on_only_with_what_it_began_with(tiny: Tiny, undisturbed: Path, tmp_path: Path) -> None:
    shutil.copytree(undisturbed, tmp_path / "run")
    run = tmp_path / "run"
    with pytest.raises(ValueError, match=r"another run \(objective\.alpha: 0\.5 there, 0\.75 here\).*another --out"):
        start(tiny, run, tiny_config(objective=Objective(alpha=0.75)))
    (run / "run.json").unlink()  # the checkpoint knows, too
    with pytest.raises(ValueError, match=r"another run \(size: 32 there, 48 here\)"):
        start(tiny, run, tiny_config(size=48))
    shutil.copy(undisturbed / "run.json", run)
    rows = Manifest.read(tiny[1])
    with pytest.raises(ValueError, match=r"other data \(manifest_sha256: .* there, .* here\).*subset"):
        train(tiny_config(), RUNTIME, tiny[0], rows, run)
    other = tmp_path / "shards"
    shutil.copytree(tiny[0], other)
    next(other.glob("*.sha256")).write_text("another checksum\n")
    with pytest.raises(ValueError, match=r"other data \(shards_sha256: "):
        start((other, tiny[1]), run)
    (run / "run.json").write_text("{")
    with pytest.raises(ValueError, match=r"run\.json is damaged"):
        start(tiny, run)


def test_another_config_is_refused_before_the_first_checkpoint_too(
    tiny: Tiny, undisturbed: Path, tmp_path: Path
) -> None:
    shutil.copy(undisturbed / "run.json", tmp_path)
    with pytest.raises(ValueError, match=r"seed: 0 there, 1 here"):
        start(tiny, tmp_path, tiny_config(seed=1))


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda shards, manifest: shutil.rmtree(shards), "holds no shards"),
        (lambda shards, manifest: (shards / "shard-00001.h5").unlink(), "lacks 1 of 2 shards"),
        (lambda shards, manifest: manifest.unlink(), "split.csv"),
        (
            lambda shards, manifest: manifest.write_text(
                manifest.read_text().replace("03.mp4", "three.mp4").replace("05.mp4", "five.mp4")
            ),
            "2 of 12 paths of the manifest are in no shard of .*three.mp4, five.mp4",
        ),
    ],
)
def test_what_is_missing_is_said_at_the_start(
    tiny: Tiny, tmp_path: Path, capsys: pytest.CaptureFixture[str], spoil, message: str
) -> None:
    shards, manifest = tmp_path / "shards", tmp_path / "split.csv"
    shutil.copytree(tiny[0], shards)
    shutil.copy(tiny[1], manifest)
    spoil(shards, manifest)
    assert command.main(train_command((shards, manifest), tmp_path / "run", tiny_config())[3:]) == 1
    out, errors = capsys.readouterr()
    assert out == "" and len(errors.splitlines()) == 1
    assert pytest.importorskip("re").search(f"error: .*{message}", errors)
    assert not (tmp_path / "run").exists()


def damaged(tiny: Tiny, folder: Path) -> Path:
    """A copy of the shards in which no frame is a JPEG any more, though the first and last two bytes of each are."""
    shutil.copytree(tiny[0], folder)
    for path in folder.glob("*.h5"):
        shard = Shard(path)
        _, (size,), offset = shard._layout["frames/jpeg"]
        jpegs = np.memmap(path, np.uint8, "r+", offset, (size,))
        for a, b in zip(shard["frames/jpeg_offset"][:-1].tolist(), shard["frames/jpeg_offset"][1:].tolist()):
            jpegs[a + 2 : b - 2] = 0
        jpegs.flush()
    return folder


@pytest.mark.parametrize("workers", ["0", "1"])
def test_a_damaged_frame_is_an_error_of_one_line(
    tiny: Tiny, tmp_path: Path, capsys: pytest.CaptureFixture[str], workers: str
) -> None:
    shards = damaged(tiny, tmp_path / "shards")
    arguments = train_command((shards, tiny[1]), tmp_path / "run", tiny_config(), "--loader-workers", workers)
    assert command.main(arguments[3:]) == 1
    errors = capsys.readouterr().err
    assert len(errors.splitlines()) == 1
    assert errors.startswith(f"error: {shards}") and "is damaged" in errors


def test_a_worker_that_dies_is_explained(
    tiny: Tiny, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(PretrainSet, "__getitems__", lambda *_: os.kill(os.getpid(), signal.SIGKILL))
    arguments = train_command(tiny, tmp_path / "run", tiny_config(), "--loader-workers", "1")
    assert command.main(arguments[3:]) == 1
    errors = capsys.readouterr().err
    assert len(errors.splitlines()) == 1
    assert "error: DataLoader worker" in errors and "--loader-workers" in errors


def test_only_the_first_process_speaks_without_its_number(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments = train_command((tmp_path, tmp_path / "no.csv"), tmp_path / "run", tiny_config())[3:]
    for rank, start in (("0", "error: "), ("3", "process 3: error: ")):
        monkeypatch.setenv("RANK", rank)
        assert command.main(arguments) == 1
        assert capsys.readouterr().err.startswith(start)


# ---- the command line and the settings


def test_help_teaches_and_unknown_recipes_are_named(capsys: pytest.CaptureFixture[str]) -> None:
    assert command.main(["--list"]) == 0
    listed = capsys.readouterr().out
    assert all(name in listed for name in RECIPES) and "Table" in listed
    assert command.main(["--help"]) == 0
    assert "python -m train" in capsys.readouterr().out
    assert command.main([]) == 2
    assert "recipes: " in capsys.readouterr().err
    assert command.main(["bogus"]) == 2
    errors = capsys.readouterr().err
    assert "'bogus'" in errors and "pretrain-ucf101-c3d" in errors
    with pytest.raises(SystemExit) as stop:
        command.main(["small", "--help"])
    assert stop.value.code == 0
    assert "--objective.alpha" in capsys.readouterr().out
    with pytest.raises(SystemExit) as stop:
        command.main(["small", "--objective.beta", "1"])
    assert stop.value.code == 2


def test_a_setting_out_of_its_limits_is_an_error(
    tiny: Tiny, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = train_command(tiny, tmp_path / "run", tiny_config())[3:]
    for option, value in (("--objective.alpha", "2"), ("--epochs", "0"), ("--log-steps", "0"), ("--seed", "-1")):
        try:
            status = command.main([*arguments, option, value])
        except SystemExit as stop:
            status = stop.code  # type: ignore[assignment]
        assert status in (1, 2)
        assert value in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


@given(
    st.builds(
        tiny_config,
        objective=st.builds(Objective, st.floats(0, 1)),
        cropping=st.builds(Cropping, area=st.tuples(st.floats(0.1, 0.5), st.floats(0.5, 1))),
        seed=st.integers(0, 1 << 40),
        epochs=st.integers(1, 500),
    )
)
def test_a_config_survives_json(config: Config) -> None:
    back = Config.from_json(config.to_json())
    assert back == config and back.sha256() == config.sha256() and config.differences(back) == []


@pytest.mark.parametrize("name", RECIPES)
def test_recipes_survive_json(name: str) -> None:
    assert Config.from_json(RECIPES[name].config.to_json()) == RECIPES[name].config


def test_unknown_and_missing_keys_list_the_valid_ones() -> None:
    values = asdict(tiny_config())
    values["objective"]["beta"] = values["objective"].pop("alpha")
    with pytest.raises(
        ValueError, match=r"config\.objective: \['alpha', 'beta'\] .*keys are alpha, context_temperature"
    ):
        Config.from_json(json.dumps(values))
    assert tiny_config().differences(tiny_config(objective=Objective(alpha=0.25))) == [
        "objective.alpha: 0.25 there, 0.5 here"
    ]


# ---- several processes


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def no_dropout_config() -> Config:
    """Dropout draws a rank at a time, so a comparison of one process with several needs a predictor without."""
    base = tiny_config(batch_size=4, epochs=1, optimiser=Optimiser(lr_per_sample=0.005, warmup_epochs=0))
    return replace(base, networks=replace(base.networks, predictor="convgru"))


@contextmanager
def in_float64() -> Iterator[None]:
    """Networks, objectives and optimiser in double precision: in single, three steps of so small a batch already turn
    the rounding of a sum over two processes into 1 % of a weight."""

    def doubled(*arguments):
        torch.set_default_dtype(torch.float32)
        found = inputs(*arguments)
        torch.set_default_dtype(torch.float64)
        return [x.double() for x in found]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop, "inputs", doubled)
        torch.set_default_dtype(torch.float64)
        try:
            yield
        finally:
            torch.set_default_dtype(torch.float32)


def work(rank: int, tiny: Tiny, folder: Path, ports: list[int]) -> None:
    """One of two processes: the second is terminated in its first step, then both go on to the end."""
    torch.set_num_threads(1)
    sink = os.open(folder / f"said-{rank}", os.O_WRONLY | os.O_CREAT)
    os.dup2(sink, 1)
    os.dup2(sink, 2)
    os.environ.update(RANK=str(rank), WORLD_SIZE="2", LOCAL_RANK=str(rank), MASTER_ADDR="127.0.0.1")
    with in_float64():
        with pytest.MonkeyPatch.context() as patch:
            if rank == 1:
                run_again(patch, 1, lambda loss: os.kill(os.getpid(), signal.SIGTERM) or loss)
            terminated(tiny, folder, ports[0])
        assert not torch.distributed.is_initialized()
        os.environ["MASTER_PORT"] = str(ports[1])
        start(tiny, folder / "run", no_dropout_config())


def terminated(tiny: Tiny, folder: Path, port: int) -> None:
    os.environ["MASTER_PORT"] = str(port)
    with pytest.raises(Terminated, match="saved at step 2 of 3"):  # both agree at the next line
        start(tiny, folder / "run", no_dropout_config())


def test_two_processes_compute_what_one_does_and_leave_together(tiny: Tiny, tmp_path: Path) -> None:
    torch.multiprocessing.spawn(work, (tiny, tmp_path, [free_port(), free_port()]), nprocs=2)
    with in_float64():
        start(tiny, tmp_path / "one", no_dropout_config())
    one, two = (checkpoint.load(tmp_path / name / "checkpoint.pt") for name in ("one", "run"))
    torch.testing.assert_close(dict(two["model"]), dict(one["model"]), rtol=1e-6, atol=1e-9)
    assert one["model"]["motion.stem.0.weight"].dtype == torch.float64
    assert [line["step"] for line in lines(tmp_path / "run")] == [2, 3]
    for a, b in zip(lines(tmp_path / "one"), lines(tmp_path / "run"), strict=True):
        assert a == pytest.approx(b, rel=1e-5)
    assert "12 videos" in (tmp_path / "said-0").read_text() and (tmp_path / "said-1").read_text() == ""


# ---- real video


def test_real_videos_train(tmp_path: Path) -> None:
    videos = DATA / "ucf5"
    paths = [str(p.relative_to(videos)) for p in sorted(videos.glob("*/*.avi"))[::60]]
    if not paths:
        pytest.skip(f"no real videos in {videos}")
    settings = Settings(width=176, height=144, frame_width=112, frame_height=92)
    shards = make_shards(tmp_path, videos, paths, [Path(p).parts[0] for p in paths], settings=settings)
    assert len(shards) == len(paths)
    last = train(
        tiny_config(batch_size=2, epochs=1),
        RUNTIME,
        shards.folder,
        Manifest.read(tmp_path / "manifest.csv"),
        tmp_path / "run",
    )
    assert last["step"] == len(paths) // 2 and math.isfinite(last["loss"])
