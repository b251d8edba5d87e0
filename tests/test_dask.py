"""Stage 1 on a real Dask scheduler with two worker processes, against one process."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from conftest import ROOT, make_shards, panned, write_video

from preprocess import pipeline
from preprocess.manifest import Manifest
from preprocess.shards import Settings

LocalCluster = pytest.importorskip("distributed", reason="Dask is not installed: pip install '.[cluster]'").LocalCluster

TINY = Settings(width=64, height=48, frame_width=48, frame_height=32)
TINY_FLAGS = ["--width", "64", "--height", "48", "--frame-width", "48", "--frame-height", "32"]


@pytest.fixture(scope="module")
def cluster() -> Iterator[str]:
    """Address of a scheduler with two worker processes of one thread each."""
    with LocalCluster(n_workers=2, threads_per_worker=1, processes=True, dashboard_address=None) as cluster:
        yield cluster.scheduler_address


def run(manifest: Path, videos: Path, out: Path, *flags: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "preprocess", "run", str(manifest), "--videos", str(videos), "--out", str(out)]
    command += ["--videos-per-shard", "2", *TINY_FLAGS, *flags]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True)


def test_a_cluster_makes_the_same_bytes_and_tells_of_progress_and_failures(
    cluster: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
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
    # In this process, so that every line of progress is said; of three videos one is missing.
    monkeypatch.setattr(pipeline, "LOG_SECONDS", 0.0)
    videos, options = tmp_path / "videos", {"videos_per_shard": 2, "backend": "dask", "scheduler": cluster}
    make_shards(tmp_path / "three", videos, names[1:4], settings=TINY, **options)
    said = capsys.readouterr().err.splitlines()
    assert len(said) == 2 and re.fullmatch(r"3 of 3 videos, \d+ frames/s, 1 failed", said[-1])
