"""The README's commands, typed: all that need no network, cluster or GPU, on small stand-ins for what they name."""

from __future__ import annotations

import re
import shlex
import shutil
import sys
from importlib import import_module
from pathlib import Path

import pytest
from conftest import ROOT, panned, write_video
from running import Tiny

from preprocess.manifest import Manifest

# What another test carries out, or a stand-in cannot: many hours, a cluster, the Hub.
LEFT = ("--slurm jobs", "--run ", "preprocess flow", "$SLURM", "--backend dask", "--push", "-m train --list", "nnodes")
SMALL = shlex.split("""
    --networks.backbone r3d10 --networks.width 4 --networks.iframe-width 4 --networks.motion-width 4
    --networks.predictor-width 16 --networks.head-hidden 16 --networks.head-out 8 --size 32 --motion-size 32
    --sampling.frames 8 --sampling.stride 2 --sampling.negatives 1 --batch-size 2 --epochs 1
    --device cpu --loader-workers 0
""")
UCF = "--shards shards/ucf101 --manifest data_manifests/ucf101_split1.csv"
STAND_INS = {
    "s3://bucket": "bucket",
    "/local/": "local/",
    "--workers 64": "--workers 1",  # joblib's processes are kept from test to test, in the folder of the first
    "--workers 8": "--workers 1",
    "--frames 16 --size 112": "--frames 8 --size 32",
}
NETWORK = """
import torch

def build():
    return torch.nn.Conv3d(3, 8, 3, stride=8)
"""


def commands() -> list[str]:
    """`PROGRAM ARGUMENTS` of every `python -m PROGRAM ARGUMENTS`, in order, with the README's own variables put in."""
    text = (ROOT / "README.md").read_text(encoding="utf-8").replace("\\\n", " ")
    variables = dict(re.findall(r'^ {4}([A-Z]+)="(.*)"$', text, re.MULTILINE))
    found = re.findall(r"^ {4}python -m ((?:preprocess|train|eval) .*)$", text, re.MULTILINE)
    found = [re.sub(r"\s+#.*", "", line).strip() for line in found if not any(left in line for left in LEFT)]
    for name, value in variables.items():
        found = [line.replace(f"${name}", value) for line in found]
    for real, stand_in in STAND_INS.items():
        found = [line.replace(real, stand_in) for line in found]
    return found


@pytest.fixture
def folder(tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """What the README's user has: videos of two classes, the manifests, the scenes' shards, a network of their own."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    names = [f"{c}/v_{c}_g{g:02d}_c01.avi" for c in ("YoYo", "Punch") for g in range(1, 5)]
    for seed, name in enumerate(names):
        write_video(
            tmp_path / "UCF-101" / name, panned(40, (2 - seed, 1), 96, 112, seed=seed), codec="mpeg4", options={}
        )
    for where in ("VIDEOS", "K400"):
        shutil.copytree("UCF-101", where)
    whole = Manifest(tuple(names), tuple(n.split("/")[0] for n in names), ("train", "train", "train", "test") * 2)
    (tmp_path / "data_manifests").mkdir()
    for name in ("ucf101", "ucf101_split1", "ucf20", "hmdb51_split1"):
        whole.write(tmp_path / "data_manifests" / f"{name}.csv")
    whole.write(tmp_path / "k400.csv")
    shutil.copytree(tiny[0], "demo_out/shards")
    (tmp_path / "demo_out" / "scenes").mkdir()
    shutil.copy(tiny[1], "demo_out/scenes/manifest.csv")
    (tmp_path / "my_package").mkdir()
    (tmp_path / "my_package" / "networks.py").write_text(NETWORK)
    return tmp_path


def test_every_command_of_the_readme_works(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    lines = commands()
    assert {line.split()[0] for line in lines} == {"preprocess", "train", "eval"} and len(lines) > 20
    for line in lines:
        program, *arguments = shlex.split(line)
        if program == "train" and arguments[0] != "export":
            if "…" in arguments:
                arguments.remove("…")
                arguments += [flag for flag in UCF.split() if "--shards" not in arguments or "shards" not in flag]
            if "--out" not in arguments:
                arguments += ["--out", f"runs/{arguments[0]}"]
            arguments += SMALL
        if "copy" in arguments:
            for place in ("bucket/ucf101", "shards/hmdb51"):
                shutil.copytree("shards/ucf101", place)
        if "runs/other" in arguments:
            shutil.copytree("runs/c3d", "runs/other")
        monkeypatch.setattr(sys, "argv", [program, *arguments])
        main = import_module(f"{program}.__main__").main
        status = main(arguments) if program == "train" else main()
        assert status == 0, f"{line}\n{capfd.readouterr().err}"
    for name in ("yoyo.png", "neighbours.png", "confusion.png", "diagnosis.png", "features.npz", "c3d/config.json"):
        assert (folder / name).stat().st_size
