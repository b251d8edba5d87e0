"""The command line of training: what it takes, what it refuses, and how it says so."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import tiny_config, train_command
from running import Tiny
from test_restart import files

from preprocess import transfer
from preprocess.schema import shard_paths
from preprocess.shards import Shard, ShardSet
from train import __main__ as command
from train.data import PretrainSet
from train.recipes import RECIPES


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
    assert re.search(f"error: .*{message}", errors)
    assert not (tmp_path / "run").exists()


def damaged(tiny: Tiny, folder: Path) -> Path:
    """A copy of the shards in which no frame is a JPEG any more, though the first and last two bytes of each are."""
    shutil.copytree(tiny[0], folder)
    for path in shard_paths(folder):
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


def test_compiling_without_a_compiler_is_an_error_of_one_line(
    tiny: Tiny, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert command.main([*train_command(tiny, tmp_path / "run", tiny_config())[3:], "--compile"]) == 1
    errors = capsys.readouterr().err
    assert len(errors.splitlines()) == 1
    assert re.match(r"error: --compile cannot work here \(.*C\+\+ compiler.*g\+\+", errors)
    assert not (tmp_path / "run").exists()


def test_a_full_gpu_is_an_error_of_one_line(
    tiny: Tiny, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 9 GiB.\nMore.")

    monkeypatch.setattr("train.loop.train", full)
    assert command.main(train_command(tiny, tmp_path / "run", tiny_config())[3:]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: CUDA out of memory. Tried to allocate 9 GiB. Keep less there with --recompute")


def test_only_the_first_process_speaks_without_its_number(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments = train_command((tmp_path, tmp_path / "no.csv"), tmp_path / "run", tiny_config())[3:]
    for rank, opening in (("0", "error: "), ("3", "process 3: error: ")):
        monkeypatch.setenv("RANK", rank)
        assert command.main(arguments) == 1
        assert capsys.readouterr().err.startswith(opening)


def test_help_teaches(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("train.cost.describe", lambda *_: "")  # test_cost.py reads it
    assert command.main(["--list"]) == 0
    listed = capsys.readouterr().out
    assert all(name in listed for name in RECIPES) and "Table" in listed
    assert "    differs from small: objective.motion_loss mse (infonce)\n" in listed
    assert command.main(["--help"]) == 0
    assert "python -m train" in capsys.readouterr().out
    with pytest.raises(SystemExit) as stop:
        command.main(["small", "--help"])
    assert stop.value.code == 0
    assert "--objective.alpha" in capsys.readouterr().out


def test_a_setting_out_of_its_limits_is_an_error(
    tiny: Tiny, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = train_command(tiny, tmp_path / "run", tiny_config())[3:]
    wrong = {"--objective.alpha": "2", "--epochs": "0", "--log-steps": "0", "--seed": "-1", "--size": "2"}
    wrong |= {"--checkpoint-minutes": "nan", "--precision": "bfloat16"}
    wrong |= {"--optimiser.lr-per-sample": "nan", "--optimiser.clip-norm": "0", "--objective.motion-temperature": "-1"}
    wrong |= {"--networks.width": "0", "--objective.loss-scale": "inf", "--device": "gpu0"}
    for option, value in wrong.items():
        try:
            status = command.main([*arguments, option, value])
        except SystemExit as stop:
            status = stop.code  # type: ignore[assignment]
        assert status in (1, 2)
        assert value in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_a_default_that_is_spelt_out_changes_nothing(
    tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nor its hash: 10 and 10.0 are the same number, and not the same JSON."""
    configs = []
    monkeypatch.setattr("train.loop.train", lambda config, *_: configs.append(config))
    paths = ["--shards", str(tiny[0]), "--manifest", str(tiny[1]), "--out", str(tmp_path / "run")]
    spelt = ["--optimiser.warmup-epochs", "3", "--optimiser.weight-decay", "0.05", "--epochs", "100"]
    assert command.main(["small", *paths, *spelt]) == 0
    assert command.main(["small", *paths, *spelt, "--objective.alpha", "1"]) == 0
    expected = RECIPES["small"].config
    assert [c.sha256() for c in configs] == [expected.sha256(), expected.changed({"objective.alpha": 1.0}).sha256()]


def test_a_run_stages_its_shards(tiny: Tiny, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = tiny_config(epochs=1)
    arguments = train_command(tiny, tmp_path / "run", config, "--loader-workers", "0")[3:]
    stored = arguments.index("--shards") + 1
    transfer.copy(str(tiny[0]), "memory://tiny")
    arguments[stored] = "memory://tiny"
    assert command.main(arguments) == 1
    assert "memory://tiny is no folder, and training maps files: add --stage-to" in capsys.readouterr().err
    assert command.main([*arguments, "--stage-to", str(tmp_path / "disk")]) == 0
    assert files(tmp_path / "disk") == files(tiny[0]) | {".copying": b""}
    made = json.loads((tmp_path / "run" / "run.json").read_text())
    assert made["shards_sha256"] == ShardSet(tiny[0]).sha256()
