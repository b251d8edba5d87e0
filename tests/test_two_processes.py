"""Two processes compute what one does, whatever happens to them on the way.

As a program, under torchrun, one of two processes of which the second dies: SHARDS MANIFEST RUN
"""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import ROOT, one_thread, tiny_config
from running import RUNTIME, Tiny, lines, run_again, start

from train import checkpoint, distributed, heldout, tasks
from train.config import Config, Optimiser
from train.loop import Terminated


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def no_dropout_config() -> Config:
    """Dropout draws a rank at a time, so a comparison of one process with several needs a predictor without."""
    base = tiny_config(batch_size=4, epochs=2, optimiser=Optimiser(lr_per_sample=0.005, warmup_epochs=0))
    return replace(base, networks=replace(base.networks, predictor="convgru"))


@contextmanager
def in_float64() -> Iterator[None]:
    """Networks, objectives and optimiser in double precision: in single, three steps of so small a batch already turn
    the rounding of a sum over two processes into 1 % of a weight."""

    def doubled(original):
        def in_float32(*arguments, **options):
            torch.set_default_dtype(torch.float32)
            found = original(*arguments, **options)
            torch.set_default_dtype(torch.float64)
            return found.double() if isinstance(found, torch.Tensor) else [x.double() for x in found]

        return in_float32

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tasks, "prepare", doubled(tasks.prepare))
        patch.setattr(heldout, "prepare", doubled(heldout.prepare))
        torch.set_default_dtype(torch.float64)
        try:
            yield
        finally:
            torch.set_default_dtype(torch.float32)


def work(rank: int, tiny: Tiny, folder: Path, ports: list[int]) -> None:
    """One of two processes: the second is terminated in its first step, both go on to the end, and then disagree."""
    torch.set_num_threads(1)
    sys.stdout = sys.stderr = open(folder / f"said-{rank}", "w", buffering=1)
    os.environ.update(RANK=str(rank), WORLD_SIZE="2", LOCAL_RANK=str(rank), MASTER_ADDR="127.0.0.1")
    with in_float64():
        with pytest.MonkeyPatch.context() as patch:
            if rank == 1:
                run_again(patch, 1, lambda loss: os.kill(os.getpid(), signal.SIGTERM) or loss)
            terminated(tiny, folder, ports[0])
        assert not torch.distributed.is_initialized()
        os.environ["MASTER_PORT"] = str(ports[1])
        start(tiny, folder / "run", no_dropout_config(), replace(RUNTIME, recompute=True), watched=True)
        out = folder / ("elsewhere" if rank else "run")
        for port, seen in zip(ports[2:], (r"process 1: \S+ is not here, but .*", r"of the steps \[6, 3\] .*")):
            os.environ["MASTER_PORT"] = str(port)
            with pytest.raises(ValueError, match=f"{seen}--out must be a folder that all share"):
                start(tiny, out, no_dropout_config())
            if rank:  # a view from before
                shutil.copytree(folder / "run", out, dirs_exist_ok=True)
                checkpoint.save(out / "checkpoint.pt", checkpoint.load(out / "checkpoint.pt") | {"step": 3})


def terminated(tiny: Tiny, folder: Path, port: int) -> None:
    os.environ["MASTER_PORT"] = str(port)
    with pytest.raises(Terminated, match="saved at step 3 of 6"):  # both agree at the next line
        start(tiny, folder / "run", no_dropout_config(), watched=True)


def die(shards: str, manifest: str, run: str) -> None:
    """One of two processes, of which the second kills itself in its third step; a checkpoint is of the second."""
    torch.set_num_threads(1)
    distributed.BEAT, distributed.MISSED = 0.5, 10
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # torchrun's, which does not reach a thread that hangs in nccl
    with in_float64(), pytest.MonkeyPatch.context() as patch:
        if os.environ["RANK"] == "1":
            run_again(patch, 3, lambda _: os.kill(os.getpid(), signal.SIGKILL))
        try:
            start((Path(shards), Path(manifest)), Path(run), no_dropout_config(), watched=True)
        finally:
            print("the survivor was not ended")


def test_two_processes_killed_and_terminated_compute_what_one_does(tiny: Tiny, tmp_path: Path) -> None:
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    died = subprocess.run(
        [*torchrun, __file__, *map(str, tiny), tmp_path / "run"],
        env=one_thread() | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    assert died.returncode == 1 and "error: no sign of life from process 1 for 5 s" in died.stderr, died.stderr
    assert "the survivor was not ended" not in died.stdout
    assert checkpoint.load(tmp_path / "run" / "checkpoint.pt")["step"] == 2

    ports = [free_port() for _ in range(4)]
    torch.multiprocessing.start_processes(work, (tiny, tmp_path, ports), nprocs=2, start_method="spawn")
    with in_float64():
        start(tiny, tmp_path / "one", no_dropout_config(), watched=True)
    one, two = (checkpoint.load(tmp_path / name / "checkpoint.pt") for name in ("one", "run"))
    torch.testing.assert_close(dict(two["model"]), dict(one["model"]), rtol=1e-6, atol=1e-9)
    assert one["model"]["motion.network.stem.0.weight"].dtype == torch.float64
    assert [line["step"] for line in lines(tmp_path / "run")] == [2, 3, 4, 6]
    for a, b in zip(lines(tmp_path / "one"), lines(tmp_path / "run"), strict=True):
        assert a == pytest.approx(b, rel=1e-5)
    assert {"heldout_context_accuracy", "heldout_motion_accuracy", "heldout_recall"} < set(a)
    assert "12 videos" in (tmp_path / "said-0").read_text() and (tmp_path / "said-1").read_text() == ""


if __name__ == "__main__":
    die(*sys.argv[1:])
