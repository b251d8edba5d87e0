"""The command line of training: what it takes, what it refuses, and how it says so."""

from __future__ import annotations

import json
import os
import shutil
import signal
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pytest
from conftest import tiny_config, train_command
from hypothesis import given
from hypothesis import strategies as st
from running import RUNTIME, Tiny, start

from preprocess.manifest import Manifest
from preprocess.shards import Shard
from train import __main__ as command
from train import config
from train.config import BEFORE, Config, Objective, Pretraining, here_and_there
from train.data import PretrainSet
from train.draws import Cropping
from train.loop import train
from train.recipes import RECIPES


def test_a_run_goes_on_only_with_what_it_began_with(tiny: Tiny, undisturbed: Path, tmp_path: Path) -> None:
    shutil.copytree(undisturbed, tmp_path / "run")
    run = tmp_path / "run"
    with pytest.raises(ValueError, match=r"another run \(objective\.alpha: 0\.5 there, 0\.75 here\).*another --out"):
        start(tiny, run, tiny_config(objective=Objective(alpha=0.75)))
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
    for rank, opening in (("0", "error: "), ("3", "process 3: error: ")):
        monkeypatch.setenv("RANK", rank)
        assert command.main(arguments) == 1
        assert capsys.readouterr().err.startswith(opening)


def test_help_teaches_and_unknown_recipes_are_named(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("train.cost.describe", lambda *_: "")  # test_cost.py reads it
    assert command.main(["--list"]) == 0
    listed = capsys.readouterr().out
    assert all(name in listed for name in RECIPES) and "Table" in listed
    assert "    differs from small: objective.motion_loss mse (infonce)\n" in listed
    assert command.main(["--help"]) == 0
    assert "python -m train" in capsys.readouterr().out
    assert command.main([]) == 2
    assert "recipes: " in capsys.readouterr().err
    assert command.main(["bogus"]) == 2
    errors = capsys.readouterr().err
    assert "'bogus'" in errors and "pretrain-ucf101-c3d" in errors and "did you mean" not in errors
    assert command.main(["smal"]) == 2 and "'smal'; did you mean small" in capsys.readouterr().err
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
    wrong = {"--objective.alpha": "2", "--epochs": "0", "--log-steps": "0", "--seed": "-1", "--size": "2"}
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


@given(
    st.builds(
        tiny_config,
        objective=st.builds(Objective, st.floats(0, 1)),
        cropping=st.builds(Cropping, area=st.tuples(st.floats(0.1, 0.5), st.floats(0.5, 1))),
        seed=st.integers(0, 1 << 40),
        epochs=st.integers(1, 500),
    )
)
def test_a_config_survives_json(one: Config) -> None:
    back = Config.from_json(one.to_json())
    assert back == one and back.sha256() == one.sha256() and one.differences(back) == {}


def test_recipes_survive_json() -> None:
    for recipe in RECIPES.values():
        assert Config.from_json(recipe.config.to_json()) == recipe.config


def test_unknown_and_missing_keys_list_the_valid_ones() -> None:
    values = json.loads(tiny_config().to_json())
    values["objective"]["beta"] = values["objective"].pop("alpha")
    with pytest.raises(ValueError, match=r"config\.objective: \['alpha', 'beta'\] .*keys are alpha, motion_loss"):
        Config.from_json(json.dumps(values))


def test_differences_are_named_as_on_the_command_line() -> None:
    found = tiny_config().differences(tiny_config(objective=Objective(alpha=0.25), epochs=4))
    assert found == {"objective.alpha": (0.5, 0.25), "epochs": (3, 4)}
    assert here_and_there(found) == "epochs: 4 there, 3 here; objective.alpha: 0.25 there, 0.5 here"


@dataclass(frozen=True)
class GrownObjective(Objective):
    """`Objective` after a year: runs without the field smoothed nothing, new ones do by default."""

    smoothing: float = field(default=0.1, metadata={BEFORE: 0.0})


@dataclass(frozen=True)
class GrownPretraining(Pretraining):
    objective: GrownObjective = field(default_factory=GrownObjective)
    second: Cropping = field(default_factory=Cropping, metadata={BEFORE: Cropping(flip=0.0)})


def test_what_is_added_later_changes_no_hash_of_old_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    old = tiny_config(objective=Objective(alpha=0.25))
    monkeypatch.setitem(config.TASKS, "pretraining", GrownPretraining)
    read = Config.from_json(old.to_json())
    assert isinstance(read, GrownPretraining)
    assert (read.objective.alpha, read.objective.smoothing, read.second.flip) == (0.25, 0.0, 0.0)
    assert read.to_json() == old.to_json() and read.sha256() == old.sha256()
    new = read.changed({"objective.smoothing": 0.1, "second.flip": 0.5})
    assert Config.from_json(new.to_json()) == new and new.sha256() != old.sha256()
    assert new.differences(read) == {"objective.smoothing": (0.1, 0.0), "second.flip": (0.5, 0.0)}
