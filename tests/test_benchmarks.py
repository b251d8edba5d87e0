"""The benchmarks run to their last table, of stage 1 what it is made of; how fast is not asked."""

from __future__ import annotations

import json
import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import ROOT, one_thread, panned, write_video

from benchmarks import busy, gpu, motion_loss, train_step
from benchmarks.stage1_cases import LIMIT_PHASES, OUR_PHASES, limit_packets, run_limit
from preprocess import encode
from preprocess.schema import Settings
from preprocess.shards import ShardSet


def run(name: str, *options: str) -> str:
    """What `python -m benchmarks.NAME` prints."""
    command = [sys.executable, "-m", f"benchmarks.{name}", *options]
    done = subprocess.run(command, cwd=ROOT, env=one_thread(), capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return done.stdout


def table(printed: str) -> list[list[str]]:
    """The rows of all tables, as cells."""
    return [line.strip("|").split("|") for line in printed.splitlines() if line.startswith("| ")]


def test_loader(tiny: tuple[Path, Path]) -> None:
    rows = table(run("loader", "--quick", "--shards", str(tiny[0]), "--videos", str(tiny[0].parent / "videos")))
    first = [row[0].strip() for row in rows]
    ways = ["bound", "ours", "h5py, file kept open", "h5py, opened for each clip", "PyAV", "PyAV, the whole sample"]
    assert [name for name in first if name in ways] == ways
    assert any(name.startswith("torchcodec") for name in first), "neither measured nor said to be missing"
    assert all(float(row[1]) > 0 and float(row[3]) > 0 for row in rows if row[0].strip() in ways)
    grown = [(int(row[0]), int(row[1])) for row in rows if len(row) == 7 and row[0].strip().isdigit()]
    assert grown == [(4, 1), (80, 20)]
    workers = [row for row in rows if row[0].strip().endswith("%")]
    assert [row[0].strip() for row in workers] == ["25%", "50%", "75%", "100%"]
    assert all(len([float(mb) for mb in cell.split(",")]) == 4 for row in workers for cell in row[1:])
    assert {"faster decoder", "augmentation", "step of C3D"} <= set(first)


def test_busy() -> None:
    rates = busy.run(None, programs=2, seconds=0.1)
    assert len(rates) == 2 and min(rates) > 0


def test_motion_loss() -> None:
    (row,) = table(run("motion_loss", "--batches", "2", "--repeats", "1"))[1:]
    assert row[1].strip() == "98 × 392" and all(float(cell) > 0 for cell in row[2:8])


def test_the_line_of_peak_memory() -> None:
    assert "91 MB + 0.50 MB a clip; no point is further from the line than 0.0%" in motion_loss.fit(
        {4: 7000.0, 64: 123.0, 128: 155.0, 512: 347.0}
    )
    # 4 MB off a line, of which least squares leaves two thirds at the middle of three even steps.
    assert "no point is further from the line than 1.3%" in motion_loss.fit({64: 100.0, 128: 154.0, 192: 200.0})
    assert "three batches" in motion_loss.fit({4: 1.0, 8: 2.0, 64: 3.0})


def test_train_step(
    tiny: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(train_step, "BACKBONES", ("r3d26",))
    monkeypatch.setattr(sys, "argv", ["train_step", "--quick", "--shards", str(tiny[0]), "--workers", "0"])
    train_step.main()
    rows = [[cell.strip().rstrip("%") for cell in row] for row in table(capsys.readouterr().out)[1:]]
    assert [(row[0], row[1]) for row in rows] == [("r3d26", "plain"), ("r3d26", "ours, float32")]
    for row in rows:
        rate, gain, waiting, headspace = (float(row[k]) for k in (2, 3, 6, 7))
        assert rate > 0 and gain > 0 and 0 < waiting < 100 and headspace < 100 and row[5] == ""


def test_steps_are_timed_after_all_batches_that_were_ready(
    tiny: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    taken: list[int] = []

    def timed(_: Any, batches: Any, steps: int, __: Any) -> tuple[float, float]:
        taken.append(steps)
        return 1.0 * steps, 0.0

    monkeypatch.setattr(train_step, "timed", timed)
    case, cpu = train_step.Case("c3d", batch=2), torch.device("cpu")
    config = train_step.configuration(case, train_step.TINY)
    train_step.turn(case, config, lambda batch: None, ShardSet(tiny[0]), cpu, 2, 3.0)
    assert taken == [2, 1, 3, 1 + 2 * 2, 3]  # two workers hold two batches each, and make one


def test_gpu_without_one(tiny: tuple[Path, Path], tmp_path: Path) -> None:
    """The whole path, but for a part that an earlier call has stored."""
    (tmp_path / "measurements.json").write_text(
        json.dumps({"machine": gpu.machine(torch.device("cpu")), "parts": {"loader": {"cores": 77, "commit": "other"}}})
    )
    printed = run("gpu", "--shards", str(tiny[0]), "--manifest", str(tiny[1]), "--out", str(tmp_path))
    assert "dry run" in printed and printed == (tmp_path / "table.md").read_text() + "\n"
    parts = json.loads((tmp_path / "measurements.json").read_text())["parts"]
    steps = [part for name, part in parts.items() if name.startswith("step of")]
    assert [(s["backbone"], s["loop"], s["recompute"]) for s in steps] == [
        *((backbone, loop, False) for backbone in train_step.BACKBONES for loop in ("plain", "ours")),
        ("c3d", "ours", True),
    ]
    assert all(s["clips_per_second"] > 0 and s["utilisation"] > 0 and s["memory"] is None for s in steps)
    assert parts["loader"]["cores"] == 77
    assert parts["agreement"]["inputs"] == 0 < parts["agreement"]["gradient, device"] < 1e-4
    assert "skipped" in parts["tests"]["summary"]
    assert [row["batch"] for row in parts["equation 2"]["rows"]] == [2, 4]
    assert parts["training"]["epoch"] == 1 and 0 <= parts["training"]["both R@1"] <= 100


def test_a_part_that_fails_costs_no_other(
    tiny: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    done: list[str] = []

    def part(name: str, value: float) -> dict[str, float]:
        done.append(name)
        return {"seen": 1 / value}

    def parts(value: float) -> Any:
        return lambda *_: ((name, partial(part, name, v)) for name, v in (("agreement", value), ("loader", 1.0)))

    options = ["gpu", "--shards", str(tiny[0]), "--manifest", str(tiny[1]), "--out", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", options)
    monkeypatch.setattr(gpu, "train", lambda *_: {"epoch": 0.5, "unfinished": True})
    monkeypatch.setattr(gpu, "parts", parts(0.0))
    assert gpu.main() == 1
    errors = capsys.readouterr().err
    assert "failed: agreement: ZeroDivisionError" in errors and "goes on: agreement, training" in errors
    monkeypatch.setattr(gpu, "parts", parts(2.0))
    monkeypatch.setattr(gpu, "train", lambda *_: {"epoch": 1.0})
    assert gpu.main() == 0 and done == ["agreement", "loader", "agreement"]
    assert "- agreement: seen 0.5" in (tmp_path / "table.md").read_text()
    monkeypatch.setattr(gpu, "git_commit", lambda: "ab" * 20 + "+")  # changed since
    (tmp_path / "measurements.json").unlink()
    assert gpu.main() == 0 and f"cores ({'ab' * 20}+)" in (tmp_path / "table.md").read_text()
    with pytest.raises(ValueError, match="remove it, or choose another --out"):
        gpu.resumed(tmp_path / "measurements.json", {"device": "another"})


def test_flow(tiny: tuple[Path, Path]) -> None:
    (row,) = table(run("flow", "--quick", "--videos", str(tiny[0].parent / "videos" / "00.mp4")))[1:]
    fast, slow, ratio = (float(row[k]) for k in (1, 2, 3))
    assert fast > 0 and slow > 0 and ratio > 0
    # A pan of (3, -1) pixels, stretched from 176x144 to 340x256: every block moves but those of frame 0.
    assert 0 < int(row[4]) <= 2 * 16 * 22
    assert all(0 <= float(v) < 1 for v in row[5].split(",")) and all(0 <= float(v) < 15 for v in row[6].split(","))


def test_residuals(tiny: tuple[Path, Path]) -> None:
    (row,) = table(run("residuals", "--quick", "--videos", str(tiny[0].parent / "videos" / "00.mp4")))[1:]
    assert int(row[1]) == 40 and float(row[3]) > 0
    assert all(float(v) > 0 for cell in (row[2], row[4]) for v in cell.split(","))
    exact, whole = (float(v) for v in row[5].split(","))
    # A pan of (3, -1) pixels of 176x144 is one of (5.8, -1.8) of 340x256.
    assert 0 < exact < whole and float(row[6]) > 1 and float(row[7].strip().rstrip("%")) > 20


@pytest.fixture
def clip(tmp_path: Path) -> Path:
    return write_video(tmp_path / "videos" / "clip.avi", panned(14, height=120, width=160), "mpeg4", {})


def test_the_limit_of_stage_1_encodes_as_stage_1_does(clip: Path, tmp_path: Path) -> None:
    ours = [bytes(p) for p in encode.packets(str(clip), Settings(), encode.Source())]
    assert [bytes(p) for p in limit_packets(str(clip))] == ours and run_limit(str(clip), tmp_path) == len(ours) == 14


@pytest.mark.parametrize("way", ["limit", "ours"])
def test_the_ways_through_stage_1_answer(clip: Path, tmp_path: Path, way: str) -> None:
    assert json.loads(run("stage1", "--case", way, str(tmp_path), "1"))["frames"] == 14


def test_the_phases_of_stage_1_make_up_the_whole(clip: Path, tmp_path: Path) -> None:
    found = json.loads(run("stage1", "--case", "phases", str(tmp_path), "1"))
    assert found["frames"] == 14 and set(found["phases"]) == {*LIMIT_PHASES, *OUR_PHASES, "rest"}
    assert all(found["phases"][name] > 0 for name in (*LIMIT_PHASES, *OUR_PHASES))
    assert (tmp_path / "shard-00000.h5").exists()
