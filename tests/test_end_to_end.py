"""The whole way on tiny video, through the three command lines: scenes, shards, weights, a retrieval number."""

from __future__ import annotations

import csv
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from conftest import ROOT, one_thread, tiny_config, train_command

from preprocess.shards import ShardSet


def python(*arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, *map(str, arguments)]
    return subprocess.run(command, cwd=ROOT, env=one_thread(), text=True, capture_output=True)


def test_from_scenes_to_a_retrieval_number(tmp_path: Path) -> None:
    scenes, shards, run = tmp_path / "scenes", tmp_path / "shards", tmp_path / "run"
    manifest = scenes / "manifest.csv"

    made = python("-m", "preprocess", "synthetic", "--out", scenes, "--train", 36, "--test", 36, "--workers", 2)
    assert made.returncode == 0, made.stderr
    with open(manifest, newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["subset"] for row in rows] == ["train"] * 36 + ["test"] * 36
    assert all((scenes / row["path"]).stat().st_size for row in rows)

    size = ["--width", 176, "--height", 144, "--frame-width", 112, "--frame-height", 92]
    options = ["--videos", scenes, "--out", shards, "--workers", 2, "--videos-per-shard", 24, *size]
    stored = python("-m", "preprocess", "run", manifest, *options)
    assert stored.returncode == 0, stored.stderr
    found = ShardSet(shards)
    assert (len(found.shards), len(found), found.failed) == (3, 72, [])
    assert found.paths == [row["path"] for row in rows] and (found.frames == 72).all()
    assert [found.classes[n] for n in found.label] == [row["label"] for row in rows]

    split = tmp_path / "split.csv"  # one scene in three, so that training and retrieval take seconds
    with open(split, "w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows[::3])

    config = tiny_config(batch_size=4, epochs=2)
    trained = python(*train_command((shards, split), run, config, "--log-steps", "1")[1:])
    assert trained.returncode == 0, trained.stderr
    assert "12 videos (0 too short, 0 failed in stage 1), 3 steps an epoch" in trained.stdout
    assert trained.stdout.count("clips/s") == 2  # not a terminal: a line an epoch
    left = [".training", "checkpoint.json", "checkpoint.pt", "metrics.jsonl", "run.json"]
    assert sorted(p.name for p in run.iterdir()) == left
    metrics = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [m["step"] for m in metrics] == [1, 2, 3, 4, 5, 6]
    for name in ("loss", "context_loss", "context_accuracy", "motion_loss", "motion_accuracy", "clips_per_second"):
        assert all(np.isfinite(m[name]) for m in metrics), name

    question = ["-m", "eval", "retrieve", run, "--shards", shards, "--manifest", split, "--device", "cpu"]
    answer = python(*question)
    assert answer.returncode == 0, answer.stderr
    assert answer.stdout.startswith("12 queries, 12 in the gallery; V-Network, the map that both tasks share")
    (path,) = (run / "results").iterdir()
    result = json.loads(path.read_text())
    assert set(result["metrics"]) == {f"{p} R@{k}" for p in ("context", "motion", "both") for k in (1, 5, 10)}  # of 12
    assert result["recipe"] == "small" and result["epoch"] == 2
    assert result["shards_sha256"] == json.loads((run / "run.json").read_text())["shards_sha256"] == found.sha256()


@pytest.mark.parametrize("command", [["-m", "train", "--list"], ["-m", "preprocess", "--help"], ["-m", "eval", "-h"]])
def test_a_reader_that_leaves_is_no_error(command: list[str]) -> None:
    read, write = os.pipe()
    os.close(read)
    done = subprocess.run(
        [sys.executable, *command], cwd=ROOT, env=one_thread(), text=True, stdout=write, stderr=subprocess.PIPE
    )
    os.close(write)
    assert "Broken" not in done.stderr and "Traceback" not in done.stderr
