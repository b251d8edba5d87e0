"""What the tests of evaluation share: the data opened, the command line, and result rows."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
from conftest import ROOT

from eval import __main__ as command
from eval.features import Machine
from eval.results import TEXTS, Row
from train.recipes import RECIPES

Tiny = tuple[Path, Path]
CPU = Machine("cpu", 0)
HASH = "ab" * 32


def evaluate(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> int:
    """The status of python -m eval, run here."""
    monkeypatch.setattr(sys, "argv", ["python -m eval", *map(str, arguments)])
    monkeypatch.chdir(ROOT)
    return command.main()


def options(tiny: Tiny, workers: int = 0) -> list[object]:
    return ["--shards", tiny[0], "--manifest", tiny[1], "--device", "cpu", "--workers", workers]


def example(recipe: str = "scenes", seed: int = 0, **changes: Any) -> Row:
    """A row that nothing is wrong with."""
    row: Row = dict.fromkeys(TEXTS, "") | {name: HASH for name in TEXTS if name.endswith("_sha256")}
    row |= {"kind": "retrieval", "recipe": recipe, "network": "video", "weights": "last", "seed": seed, "epoch": 60.0}
    row |= {"trained_on": "manifest", "dataset": "manifest", "when": "2026-01-02T03:04:05+00:00"}
    row["config_sha256"] = RECIPES["scenes" if recipe == "gone" else recipe].config.changed({"seed": seed}).sha256()
    return row | {"metrics": {"both R@1": 25.5, "both R@5": 50.0}} | changes
