"""Weights and features that others use: what leaves a run is what was in it, and what is damaged is refused."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from running import Tiny
from safetensors.torch import load_file, save

from eval import __main__ as eval_command
from eval import features
from eval.features import Machine
from eval.results import Data
from train import __main__ as command
from train import augment
from train.export import export, load_backbone
from train.networks import build_video_network
from train.trained import load_run


@pytest.mark.parametrize(
    ("name", "weights"), [("joint_run", "last"), ("joint_run", "initial"), ("labelled_run", "epoch-0001")]
)
def test_others_get_the_network_of_the_run_bit_for_bit(
    request: pytest.FixtureRequest, tmp_path: Path, name: str, weights: str
) -> None:
    out, folder = tmp_path / "new" / "backbone.safetensors", request.getfixturevalue(name)
    assert command.main(["export", str(folder), "--out", str(out), "--weights", weights]) == 0
    assert [p.name for p in out.parent.iterdir()] == [out.name]
    run = load_run(folder, weights)
    network, about = load_backbone(out)
    by_hand = build_video_network(about["backbone"], about["width"])
    by_hand.load_state_dict(load_file(out))
    clip = torch.rand(2, 3, about["frames"], about["size"], about["size"])
    mean, std = (torch.tensor(about[k]).view(1, 3, 1, 1, 1) for k in ("mean", "std"))
    plain, _ = load_backbone(out, layer="layer4")
    with torch.no_grad():
        layer4, shared = run.model.video.eval().forward_both(augment.normalise(clip))
        assert layer4.shape != shared.shape
        for other, own in ((network, shared), (plain, layer4), (by_hand.eval(), layer4)):
            torch.testing.assert_close(other((clip - mean) / std), own, rtol=1e-4, atol=1e-5)
    for other in (network.video, plain, by_hand):
        torch.testing.assert_close(other.state_dict(), run.model.video.state_dict(), rtol=0, atol=0)
    assert not network.training
    assert about["epoch"] == run.epoch and about["config_sha256"] == run.config.sha256()
    assert (about["frames"], about["stride"], about["size"]) == (8, 2, 32)
    assert about["weights"] == weights and about["task"] == run.config.task


def with_version(whole: bytes) -> bytes:
    """The same file, of version 9."""
    size = int.from_bytes(whole[:8], "little")
    header = json.loads(whole[8 : 8 + size])
    header["__metadata__"]["version"] = "9"
    text = json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + whole[8 + size :]


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        *((lambda whole, keep=keep: whole[:keep], "cannot be read as safetensors") for keep in (0, 7, 100)),
        (lambda whole: whole[: len(whole) // 2], "cannot be read as safetensors: it is damaged"),
        (lambda whole: whole[:-1], "cannot be read as safetensors: it is damaged"),
        (lambda whole: b"PK" + whole, "cannot be read as safetensors"),
        (lambda whole: whole[:-3] + bytes([whole[-3] ^ 1]) + whole[-2:], "is damaged: its weights are not those"),
        (lambda _: save({"a": torch.ones(2)}), "not of this program: its format is None"),
        (with_version, "has version 9; this program reads 1"),
    ],
)
def test_what_cannot_be_trusted_is_refused(
    joint_run: Path, tmp_path: Path, spoil: Callable[[bytes], bytes], message: str
) -> None:
    with pytest.raises(ValueError, match=r"is no file; write one with python -m train export"):
        load_backbone(tmp_path / "b.safetensors")
    path = export(load_run(joint_run), tmp_path / "b.safetensors")
    path.write_bytes(spoil(path.read_bytes()))
    with pytest.raises(ValueError, match=message):
        load_backbone(path)


def test_a_failed_export_leaves_what_was_there(
    joint_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "b.safetensors"
    out.write_text("before")
    assert command.main(["export", str(joint_run), "--out", str(out), "--weights", "epoch-0007"]) == 1
    assert "has no weights 'epoch-0007', but initial" in capsys.readouterr().err
    (tmp_path / "file").write_text("")
    assert command.main(["export", str(joint_run), "--out", str(tmp_path / "file" / "b")]) == 1
    assert out.read_text() == "before" and sorted(p.name for p in tmp_path.iterdir()) == ["b.safetensors", "file"]


def test_stored_features(joint_run: Path, tiny: Tiny, tmp_path: Path) -> None:
    out, network = tmp_path / "new" / "features.npz", "iframe"
    given = ["--shards", str(tiny[0]), "--manifest", str(tiny[1])]
    arguments = ["features", str(joint_run), *given, "--out", str(out), "--network", network]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["eval", *arguments, "--device", "cpu", "--workers", "0"])
        assert eval_command.main() == 0
    assert [p.name for p in out.parent.iterdir()] == ["features.npz"]
    data, run = Data.open(*tiny), load_run(joint_run)
    rows, shards = data.manifest, data.shards
    expected = features.video_features(run, data, "iframe", Machine("cpu", 0)).vectors
    with np.load(out, allow_pickle=False) as stored:
        np.testing.assert_array_equal(stored["features"], expected)
        assert stored["features"].dtype == np.float32 and stored["label"].dtype == np.int32
        assert tuple(stored["path"].tolist()) == rows.paths and tuple(stored["subset"].tolist()) == rows.subsets
        assert [stored["classes"][k] for k in stored["label"]] == list(rows.labels)
        assert str(stored["protocol"]) == features.protocol(run.config, "iframe")
        assert str(stored["weights_sha256"]) == run.weights_sha256() and str(stored["network"]) == network
        assert str(stored["manifest_sha256"]) == rows.sha256 and str(stored["shards_sha256"]) == shards.sha256()
