"""Where a run comes from, and the claim that it lays on its folder: run.json."""

from __future__ import annotations

import json
import platform
import sys
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from preprocess.files import write_text
from preprocess.manifest import Manifest
from preprocess.shards import ShardSet
from train import runs
from train.config import Config, differences, here_and_there
from train.trained import Run

LIBRARIES = ("torch", "numpy", "h5py", "simplejpeg", "kornia")


@dataclass(frozen=True)
class Origin:
    """Where a run's things came from, by name: written into run.json, and into every result."""

    recipe: str = ""
    trained_on: str = ""
    """Name of the manifest."""
    subset: str = ""
    """Which of its rows."""
    pretrained: Run | None = None
    """The run whose V-Network it begins from."""


UNNAMED = Origin()


def claim(out: Path, config: Config, manifest: Manifest, shards: ShardSet, origin: Origin, write: bool = True) -> None:
    """Make `out` this run's folder: write its run.json, or check the one that is there.

    A run goes on only with the configuration, manifest, shards and pretrained weights it began with; ValueError names
    what differs. With write=False (all processes but one) it only checks.
    """
    path = out / "run.json"
    made_from = {
        "manifest_sha256": manifest.sha256,
        "shards_sha256": shards.sha256(),
        "shards_settings": asdict(shards.settings),
        "pretrained_sha256": origin.pretrained.video_sha256() if origin.pretrained else "",
    }
    if path.exists():
        there = runs.read(out)
        runs.refuse_another(out, Config.from_json(json.dumps(there["config"])), config)
        if differing := differences(made_from, there):
            raise ValueError(
                f"{out} holds a run that began with other data ({here_and_there(differing)}): give it the manifest, "
                "the subset, the shards and the pretrained run it began with, or choose another --out"
            )
    elif (out / "checkpoint.pt").exists():
        raise ValueError(f"{out} holds checkpoint.pt without the run.json that says what made it: choose another --out")
    elif write:
        values: dict[str, Any] = {
            "recipe": origin.recipe,
            "trained_on": origin.trained_on,
            "subset": origin.subset,
            "pretrained": origin.pretrained.about() if origin.pretrained else {},
            "classes": list(shards.classes),
            "seed": config.seed,
            "config": json.loads(config.to_json()),
            "config_sha256": config.sha256(),
            **made_from,
            "commit": runs.git_commit(),
            "command": " ".join(sys.argv),
            "versions": {name: version(name) for name in LIBRARIES} | {"cudnn": torch.backends.cudnn.version()},
            "python": platform.python_version(),
        }
        write_text(path, json.dumps(values, indent=1) + "\n")
