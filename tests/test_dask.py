"""Stage 1 on a real Dask scheduler with two worker processes, against one process."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from conftest import make_shards, panned, write_video

from preprocess import pipeline
from preprocess.manifest import Manifest

pytest.importorskip("distributed", reason="Dask is not installed: pip install '.[cluster]'")

ROOT = Path(__file__).resolve().parent.parent
TINY_FLAGS = ["--width", "64", "--height", "48", "--frame-width", "48", "--frame-height", "32"]
PATIENCE = 120  # seconds for a cluster to come up on a busy machine; a bound, not a measurement


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Address of a scheduler with two workers of one thread each."""
    folder = tmp_path_factory.mktemp("dask")
    about = folder / "scheduler.json"
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "distributed.cli.dask_scheduler", "--port", "0", "--host", "127.0.0.1"]
    command += ["--no-dashboard", "--scheduler-file", str(about)]
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL, "env": environment, "cwd": folder}
    processes = [subprocess.Popen(command, **quiet)]
    deadline = time.monotonic() + PATIENCE
    while not about.exists():
        assert processes[0].poll() is None and time.monotonic() < deadline, "the scheduler did not start"
        time.sleep(0.1)
    worker = [sys.executable, "-m", "distributed.cli.dask_worker", "--scheduler-file", str(about), "--nthreads", "1"]
    worker += ["--no-dashboard", "--local-directory", str(folder)]
    processes += [subprocess.Popen(worker, **quiet) for _ in range(2)]
    address = json.loads(about.read_text())["address"]
    from distributed import Client

    with Client(address, set_as_default=False) as client:
        client.wait_for_workers(2, timeout=PATIENCE)
    yield address
    for process in reversed(processes):
        process.send_signal(signal.SIGTERM)
    for process in processes:
        process.wait()


def run(manifest: Path, videos: Path, out: Path, *flags: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "preprocess", "run", str(manifest), "--videos", str(videos), "--out", str(out)]
    return subprocess.run(
        [*command, "--videos-per-shard", "2", *TINY_FLAGS, *flags], cwd=ROOT, capture_output=True, text=True
    )


def test_a_cluster_makes_the_same_bytes_and_collects_failures(cluster: str, tmp_path: Path) -> None:
    names = [f"{n}.mp4" for n in range(7)]
    for seed, name in enumerate(names):
        if seed != 3:  # one video is missing
            write_video(tmp_path / "videos" / name, panned(20 + seed, height=48, width=64, seed=seed))
    manifest = tmp_path / "manifest.csv"
    Manifest(tuple(names), tuple("abababa"), ("",) * 7).write(manifest)
    alone = run(manifest, tmp_path / "videos", tmp_path / "alone")
    spread = run(manifest, tmp_path / "videos", tmp_path / "spread", "--backend", "dask", "--scheduler", cluster)
    assert (alone.returncode, spread.returncode) == (3, 3), spread.stderr
    expected = {p.name: p.read_bytes() for p in (tmp_path / "alone").iterdir()}
    assert {p.name: p.read_bytes() for p in (tmp_path / "spread").iterdir()} == expected
    assert len(expected) == 4 * 2 + 1
    assert "3.mp4" in spread.stderr
    again = run(manifest, tmp_path / "videos", tmp_path / "spread", "--backend", "dask", "--scheduler", cluster)
    assert "0 shards made, 4 already there" in again.stdout


def test_progress_counts_the_shards_that_a_cluster_finishes(
    cluster: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(pipeline, "LOG_SECONDS", 0.0)
    names = [f"{n}.mp4" for n in range(3)]
    make_shards(tmp_path, tmp_path, names, videos_per_shard=2, backend="dask", scheduler=cluster)  # all are missing
    said = capsys.readouterr().err.splitlines()
    assert len(said) == 2 and re.fullmatch(r"3 of 3 videos, 0 frames/s, 3 failed", said[-1])


def test_backend_and_scheduler_go_together(tmp_path: Path) -> None:
    (tmp_path / "m.csv").write_text("path,label,subset\na.mp4,,\n")
    for flags in (["--backend", "dask"], ["--scheduler", "tcp://127.0.0.1:1"]):
        done = run(tmp_path / "m.csv", tmp_path, tmp_path / "out", *flags)
        assert done.returncode == 1 and "--scheduler ADDRESS" in done.stderr
