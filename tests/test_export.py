"""Weights and features that others use: what leaves a run is what was in it, and what is damaged is refused."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT, one_thread, tiny_config
from running import RUNTIME, Tiny, start
from safetensors.torch import load_file, save_file

from eval import __main__ as eval_command
from eval import features
from eval.features import Machine
from eval.results import Data
from train import __main__ as command
from train.export import export, load_backbone
from train.networks import build_video_network
from train.trained import load_run


@pytest.fixture(scope="module")
def runs(tiny: Tiny, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("export")
    kept = replace(RUNTIME, keep_epochs=(1,))
    start(tiny, folder / "pretraining", tiny_config(epochs=2), kept)
    start(tiny, folder / "finetuning", tiny_config("small-scratch", epochs=1), kept)
    return {name: folder / name for name in ("pretraining", "finetuning")}


@pytest.mark.parametrize(
    ("kind", "weights"),
    [("pretraining", "last"), ("pretraining", "initial"), ("pretraining", "epoch-0001"), ("finetuning", "last")],
)
def test_features_are_those_of_the_run_bit_for_bit(
    runs: dict[str, Path], tiny: Tiny, tmp_path: Path, kind: str, weights: str
) -> None:
    out = tmp_path / "new" / "backbone.safetensors"
    assert command.main(["export", str(runs[kind]), "--out", str(out), "--weights", weights]) == 0
    assert [p.name for p in out.parent.iterdir()] == [out.name]
    run = load_run(runs[kind], weights)
    network, about = load_backbone(out)
    by_hand = build_video_network(about["backbone"], about["width"])
    by_hand.load_state_dict(load_file(out))
    data = Data.open(*tiny).subset("test")

    def look() -> np.ndarray:
        return features.video_features(run, data, machine=Machine("cpu", 0)).vectors

    own = look()
    for other in (network.video, by_hand):
        run.model.video = other
        np.testing.assert_array_equal(look(), own)
    clip, (plain, _) = torch.rand(1, 3, 8, 32, 32), load_backbone(out, layer="layer4")
    with torch.inference_mode():
        assert torch.equal(network(clip), by_hand.eval().forward_pretrain(clip))
        assert torch.equal(plain(clip), by_hand(clip)) and plain(clip).shape != network(clip).shape
    assert not network.training
    assert about["epoch"] == run.epoch and about["config_sha256"] == run.config.sha256()
    assert (about["frames"], about["stride"], about["size"]) == (8, 2, 32)
    assert about["mean"] == [0.485, 0.456, 0.406] and about["weights"] == weights and about["task"] == kind


def test_two_lines_and_a_clip(runs: dict[str, Path], tmp_path: Path) -> None:
    """As the documentation says it, in a process of its own."""
    path = export(load_run(runs["pretraining"]), tmp_path / "b.safetensors")
    code = f"""
import torch
from train.export import load_backbone
network, about = load_backbone({str(path)!r})
clip = torch.rand(2, 3, about["frames"], about["size"], about["size"])
mean, std = (torch.tensor(about[k]).view(1, 3, 1, 1, 1) for k in ("mean", "std"))
print(network((clip - mean) / std).mean((2, 3, 4)).shape[0])
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=one_thread(), capture_output=True, text=True)
    assert done.stdout == "2\n", done.stderr


def test_what_cannot_be_trusted_is_refused(runs: dict[str, Path], tmp_path: Path) -> None:
    path = export(load_run(runs["pretraining"]), tmp_path / "b.safetensors")
    whole = path.read_bytes()
    with pytest.raises(ValueError, match=r"is no file; write one with python -m train export"):
        load_backbone(tmp_path / "none.safetensors")
    for keep in (0, 7, 100, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:keep])
        with pytest.raises(ValueError, match="cannot be read as safetensors: it is damaged"):
            load_backbone(path)
    path.write_bytes(whole[:-3] + bytes([whole[-3] ^ 1]) + whole[-2:])
    with pytest.raises(ValueError, match="is damaged: its weights are not those"):
        load_backbone(path)
    torch.save({"a": torch.ones(2)}, path)
    with pytest.raises(ValueError, match="cannot be read as safetensors"):
        load_backbone(path)
    save_file({"a": torch.ones(2)}, path)
    with pytest.raises(ValueError, match="not of this program: its format is None"):
        load_backbone(path)
    size = int.from_bytes(whole[:8], "little")
    header = json.loads(whole[8 : 8 + size])
    header["__metadata__"]["version"] = "9"
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + whole[8 + size :])
    with pytest.raises(ValueError, match="has version 9; this program reads 1"):
        load_backbone(path)


def test_a_failed_export_leaves_what_was_there(
    runs: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "b.safetensors"
    out.write_text("before")
    assert command.main(["export", str(runs["pretraining"]), "--out", str(out), "--weights", "epoch-0007"]) == 1
    assert "epoch-0007.pt does not exist" in capsys.readouterr().err
    (tmp_path / "file").write_text("")
    assert command.main(["export", str(runs["pretraining"]), "--out", str(tmp_path / "file" / "b")]) == 1
    assert out.read_text() == "before" and sorted(p.name for p in tmp_path.iterdir()) == ["b.safetensors", "file"]


@pytest.mark.parametrize("network", ["video", "iframe", "motion"])
def test_stored_features(runs: dict[str, Path], tiny: Tiny, tmp_path: Path, network: features.Network) -> None:
    out, folder = tmp_path / "new" / "features.npz", runs["pretraining"]
    given = ["--shards", str(tiny[0]), "--manifest", str(tiny[1])]
    arguments = ["features", str(folder), *given, "--out", str(out), "--network", network]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["eval", *arguments, "--device", "cpu", "--workers", "0"])
        assert eval_command.main() == 0
    assert [p.name for p in out.parent.iterdir()] == ["features.npz"]
    data, run = Data.open(*tiny), load_run(folder)
    rows, shards = data.manifest, data.shards
    expected = features.video_features(run, data, network, Machine("cpu", 0)).vectors
    with np.load(out, allow_pickle=False) as stored:
        np.testing.assert_array_equal(stored["features"], expected)
        assert stored["features"].dtype == np.float32 and stored["label"].dtype == np.int32
        assert tuple(stored["path"].tolist()) == rows.paths and tuple(stored["subset"].tolist()) == rows.subsets
        assert [stored["classes"][k] for k in stored["label"]] == list(rows.labels)
        assert str(stored["protocol"]) == features.protocol(run.config, network)
        assert str(stored["weights_sha256"]) == run.weights_sha256() and str(stored["network"]) == network
        assert str(stored["manifest_sha256"]) == rows.sha256 and str(stored["shards_sha256"]) == shards.sha256()
