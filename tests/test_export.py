"""Weights and features that others use: what leaves a run is what was in it, and what is damaged is refused."""

from __future__ import annotations

import json
import re
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT
from running import Tiny
from safetensors.torch import load_file, save
from serving_hub import hub
from test_restart import files

from eval import __main__ as eval_command
from eval import features
from eval.features import Machine
from eval.results import Data
from train import __main__ as command
from train import augment
from train.export import export, load_backbone
from train.networks import build_video_network
from train.trained import load_run

FILES = ["README.md", "config.json", "model.safetensors"]


@pytest.mark.parametrize(
    ("name", "weights"), [("joint_run", "last"), ("joint_run", "initial"), ("labelled_run", "epoch-0001")]
)
def test_others_get_the_network_of_the_run_bit_for_bit(
    request: pytest.FixtureRequest, tmp_path: Path, name: str, weights: str
) -> None:
    out, folder = tmp_path / "new" / "backbone", request.getfixturevalue(name)
    assert command.main(["export", str(folder), "--out", str(out), "--weights", weights]) == 0
    assert sorted(p.name for p in out.iterdir()) == FILES
    run = load_run(folder, weights)
    network, about = load_backbone(out)
    by_hand = build_video_network(about["backbone"], about["width"])
    by_hand.load_state_dict(load_file(out / "model.safetensors"))
    clip = torch.rand(2, 3, about["frames"], about["size"], about["size"])
    mean, std = (torch.tensor(about[k]).view(1, 3, 1, 1, 1) for k in ("mean", "std"))
    plain, _ = load_backbone(out, layer="layer4")
    with pytest.raises(ValueError, match="layer is 'Shared'; choose one of shared, layer4"):
        load_backbone(out, layer="Shared")  # type: ignore[arg-type]
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


def flipped(path: Path) -> None:
    whole = path.read_bytes()
    path.write_bytes(whole[:-3] + bytes([whole[-3] ^ 1]) + whole[-2:])


def cut(path: Path, keep: int) -> None:
    path.write_bytes(path.read_bytes()[:keep])


@pytest.mark.parametrize(
    ("name", "spoil", "message"),
    [
        *((FILES[2], lambda path, keep=keep: cut(path, keep), "cannot be read as safeten") for keep in (0, 7, 100, -1)),
        (FILES[2], lambda path: path.write_bytes(b"PK" + path.read_bytes()), "cannot be read as safetensors"),
        (FILES[2], flipped, "is damaged: its weights are not those"),
        (FILES[2], lambda path: path.write_bytes(save({"a": torch.ones(2)})), "is damaged: its weights are not those"),
        (FILES[2], Path.unlink, "model.safetensors cannot be read as safetensors: it is missing or damaged"),
        (FILES[1], Path.unlink, "config.json cannot be read: it is missing or damaged"),
        (FILES[1], lambda path: cut(path, 100), "config.json cannot be read: it is missing or damaged"),
        (FILES[1], lambda path: path.write_text("[]"), "config.json is not of this program"),
        (FILES[1], lambda path: path.write_text('{"model_type": "bert"}'), "config.json is not of this program"),
        (
            FILES[1],
            lambda path: path.write_text(path.read_text().replace('"version": 2', '"version": 9')),
            "has version 9; this program reads 2",
        ),
    ],
)
def test_what_cannot_be_trusted_is_refused(
    joint_run: Path, tmp_path: Path, name: str, spoil: Callable[[Path], object], message: str
) -> None:
    folder = export(load_run(joint_run), tmp_path / "backbone")
    spoil(folder / name)
    with pytest.raises(ValueError, match=message):
        load_backbone(folder)


def test_a_failed_export_leaves_what_was_there(
    joint_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    export(load_run(joint_run), tmp_path / "out")
    before = files(tmp_path)
    assert command.main(["export", str(joint_run), "--out", str(tmp_path / "out"), "--weights", "epoch-0007"]) == 1
    assert "has no weights 'epoch-0007', but initial" in capsys.readouterr().err
    (tmp_path / "file").write_text("")
    assert command.main(["export", str(joint_run), "--out", str(tmp_path / "file")]) == 1
    assert files(tmp_path) == before | {"file": b""}


def test_from_a_run_to_the_hub_and_back(
    joint_run: Path, tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Pushed and loaded by the client itself, from a server of a few endpoints, then from the cache alone."""
    run, out = tmp_path / "run", tmp_path / "out"
    shutil.copytree(joint_run, run)
    shutil.rmtree(run / "results", ignore_errors=True)  # of other tests
    given = ["--shards", str(tiny[0]), "--manifest", str(tiny[1]), "--device", "cpu", "--workers", "0"]
    made = (run / "run.json").read_text()
    (run / "run.json").write_text(made.replace('"trained_on": "split"', '"trained_on": "ucf101_split1"'))
    for flags in ([], ["--network", "iframe"], ["--network", "layer4", "--weights", "initial"]):
        monkeypatch.setattr(sys, "argv", ["eval", "retrieve", str(run), *given, *flags])
        assert eval_command.main() == 0
    committed: dict[str, bytes] = {}
    for name in [name for name in sys.modules if name.startswith("huggingface_hub")]:
        monkeypatch.delitem(sys.modules, name)  # which reads the environment when it is imported
    with hub(committed) as address:
        for name, value in {"HF_ENDPOINT": address, "HF_HOME": str(tmp_path), "HF_TOKEN": "hf_secret"}.items():
            monkeypatch.setenv(name, value)
        (tmp_path / "out").mkdir()
        (tmp_path / "out" / "notes.txt").write_text("not for the Hub")
        assert command.main(["export", str(run), "--out", str(out), "--push", "owner/name"]) == 0
        assert capsys.readouterr().out.endswith(f"{address}/owner/name\n")
        assert committed.pop(".gitattributes") == b""
        assert committed == {name: (out / name).read_bytes() for name in FILES}
        text, clips = committed["README.md"].decode(), torch.rand(2, 3, 8, 32, 32)
        (lines,) = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
        assert len(lines.splitlines()) == 3
        found = {"clips": clips}
        exec(lines, found)
        with pytest.raises(ValueError, match=r"owner/other is no folder here, and the Hub does not give it: .*404"):
            load_backbone("owner/other")
    # The server is gone.
    assert command.main(["export", str(run), "--out", str(out), "--push", "owner/name"]) == 1
    assert re.fullmatch(r"error: .*out is written, but not pushed to owner/name: .+\n", capsys.readouterr().err)
    network, about = load_backbone("owner/name")
    assert about == json.loads((out / "config.json").read_text())
    torch.testing.assert_close(network(clips).mean((2, 3, 4)), found["features"], rtol=0, atol=0)
    torch.testing.assert_close(network.video.state_dict(), load_file(out / "model.safetensors"), rtol=0, atol=0)
    with pytest.raises(ValueError, match="backbone is no folder, nor a name of the Hub"):
        load_backbone("backbone")

    import huggingface_hub

    about = huggingface_hub.ModelCard(text).data.to_dict()
    package = re.search(r"^name = (.+)$", (ROOT / "setup.cfg").read_text(), re.MULTILINE)
    assert package and (about["license"], about["library_name"]) == ("mit", package[1])
    assert about["datasets"] == ["ucf101"] and "self-supervised-learning" in about["tags"]
    rows = [json.loads(path.read_text()) for path in (run / "results").glob("*.json")]
    (own,) = [row for row in rows if row["network"] == "video"]
    shown = re.findall(r"^\| (retrieval.*?) \| split \| (.+) \| ([\d.]+) \| ([\d.]+) \|$", text, re.MULTILINE)
    expected = [("retrieval", k, f"{v:.1f}", f"{own['chance'][k]:.1f}") for k, v in own["metrics"].items()]
    assert len(rows) == 3 and shown == expected
    assert own["protocol"] in text and "| weights | last, epoch 1 of 1 |" in text


def test_the_missing_package_of_the_hub_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(ValueError, match=r"\(huggingface_hub\): pip install '\.\[hub\]'"):
        load_backbone("owner/name")


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
