"""Result rows: what a measure found and where it comes from, one JSON file each in the results/ of its run's folder.

| key | meaning |
|---|---|
| kind | retrieval, classification, pretext, knn, linear or diagnosis |
| recipe, backbone, network | what was evaluated; network is video, layer4, iframe or motion |
| pretraining, pretrained_on | recipe and manifest of the run it began from; empty where it began from none. A recipe \
that was changed, or stopped early, is not called by its name alone |
| pretraining_settings_sha256 | training_settings_sha256 of that run |
| trained_on, subset | manifest and rows that it was trained on |
| training_settings_sha256 | of those rows and of the settings of stage 1 that their shards were made with |
| training_sha256 | of those rows and of their shards' bytes |
| dataset, split | manifest evaluated on, by its name, and the number in ..._split1 |
| seed, epoch, weights | weights is initial, last, or a kept epoch such as epoch-0005 |
| metrics | name -> percent: 'class R@1', 'top-1', 'context accuracy', ... |
| protocol | how the number was made, in a sentence |
| commit, machine, when | of this program; where; UTC |
| config_sha256, manifest_sha256, weights_sha256 | of what went in |
| shard_settings_sha256, shards_sha256 | of the settings of stage 1, and of the bytes that it made |

Results are comparable where the recipe's settings, the manifests and the settings of stage 1 are the same. Hashes of
bytes are provenance: another kind of CPU, or another version of a library, rounds otherwise. Rows of earlier programs
lack the keys `LATER`. Other keys may follow: queries, groups, gallery, errors and chance of retrieval (the latter two
name -> percent, as metrics); classes, confusion and per_class of classification.
"""

from __future__ import annotations

import datetime
import hashlib
import json
import math
import os
import platform
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from preprocess.files import write_text
from preprocess.manifest import Manifest, dataset_name
from preprocess.shards import ShardSet
from train import checkpoint, runs
from train.config import Config

if TYPE_CHECKING:
    from torch import nn

    from train.trained import Run

Row = dict[str, Any]
KINDS = ("retrieval", "classification", "pretext", "knn", "linear", "diagnosis")
TEXTS = (
    "kind", "recipe", "backbone", "network", "pretraining", "pretrained_on", "trained_on", "subset", "training_sha256",
    "dataset", "split", "weights", "protocol", "commit", "config_sha256", "manifest_sha256", "shards_sha256",
    "weights_sha256", "machine", "when", "shard_settings_sha256", "training_settings_sha256",
    "pretraining_settings_sha256",
)  # fmt: skip
LATER = ("shard_settings_sha256", "training_settings_sha256", "pretraining_settings_sha256")
"""Texts that are empty in rows from before they were stored."""
KEYS = (*TEXTS, "seed", "epoch", "metrics")
PERCENT = ("metrics", "errors", "chance")
"""name -> percent: the numbers, and where there are any their standard errors and what chance gives."""


class Result(Protocol):
    """What the function `measure` of every measure's module returns, for a network and the `Data` it is measured on."""

    def records(self) -> list[Row]:
        """The rows to store, without where they come from (`about`): kind, network, metrics, protocol, and more."""

    def markdown(self, title: str) -> str:
        """What is printed: the numbers of the network called `title`, how they were made, and chance."""


@dataclass(frozen=True)
class Data:
    """What a network is measured on."""

    shards: ShardSet
    manifest: Manifest
    """Which videos of the shards, and which of them are test and training videos."""
    name: str
    """The manifest's."""

    @classmethod
    def open(cls, shards: Path, manifest: Path) -> Data:
        return cls(ShardSet(shards), Manifest.read(manifest), dataset_name(manifest))

    def subset(self, name: str) -> Data:
        return replace(self, manifest=self.manifest.subset(name))

    def about(self) -> Row:
        """What a row says of the data, the program, the machine and the time."""
        split = re.search(r"_split(\d+)$", self.name)
        return {
            "dataset": self.name,
            "split": split[1] if split else "",
            "commit": runs.git_commit(),
            "manifest_sha256": self.manifest.sha256,
            "shards_sha256": self.shards.sha256(),
            "shard_settings_sha256": self.shards.settings.sha256(),
            "machine": f"{platform.machine()}, {os.cpu_count()} cores",
            "when": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        }


@dataclass(frozen=True)
class Foreign:
    """A network of unknown training, in place of a `Run`: its import path stands for the recipe."""

    folder: Path | None
    """In whose results/ its rows are stored."""
    config: Config
    """Of which the sampling and the size count."""
    recipe: str
    network: nn.Module


def title(run: Run | Foreign) -> str:
    return run.recipe if isinstance(run, Foreign) else f"{run.recipe}, {run.weights}, epoch {run.epoch:g}"


def about(run: Run | Foreign, data: Data) -> Row:
    """Where a result comes from: every key but those of its `records`."""
    common = data.about() | {"recipe": run.recipe, "config_sha256": run.config.sha256()}
    if isinstance(run, Foreign):
        of_training = ("training_settings_sha256", "training_sha256", "pretraining_settings_sha256")
        unknown = dict.fromkeys(("pretraining", "pretrained_on", "trained_on", "subset", *of_training), "")
        given = {"backbone": run.recipe, "seed": 0, "epoch": 0.0, "weights": "given"}
        return common | unknown | given | {"weights_sha256": checkpoint.sha256(run.network.state_dict())}
    made = runs.read(run.folder)
    began = made["pretrained"]
    return common | {
        "backbone": run.config.networks.backbone,
        "pretraining": began.get("recipe", ""),
        "pretrained_on": began.get("trained_on", ""),
        "trained_on": made["trained_on"],
        "subset": made["subset"],
        "training_settings_sha256": runs.training_settings(made),
        "pretraining_settings_sha256": began.get("training_settings_sha256", ""),
        "training_sha256": _sha256(f"{made['manifest_sha256']} {made['shards_sha256']}"),
        "seed": run.config.seed,
        "epoch": run.epoch,
        "weights": run.weights,
        "weights_sha256": run.weights_sha256(),
    }


def write(folder: Path, row: Row) -> Path:
    """Store a row in the results/ of a run's folder, whole or not at all; ValueError where it is none."""
    if wrong := fault(row):
        raise ValueError(f"this result cannot be stored: {wrong}")
    text = json.dumps(row, indent=1) + "\n"
    # The name is a hash of the content: concurrent writers never meet, and a file that was changed shows.
    path = folder / "results" / f"{row['kind']}-{digest(text)}.json"
    write_text(path, text)
    return path


def fault(row: Row) -> str:
    """Why a row is not one; empty where it is."""
    missing = [k for k in KEYS if k not in row]
    if missing:
        return f"{', '.join(missing)} missing"
    if row["kind"] not in KINDS:
        return f"its kind is {row['kind']!r}; there are {', '.join(KINDS)}"
    if wrong := [k for k in PERCENT if not isinstance(row.get(k, {}), dict)]:
        return f"{', '.join(wrong)}: no object"
    percent = [pair for k in PERCENT for pair in row.get(k, {}).items()]
    numbers = [("seed", row["seed"]), ("epoch", row["epoch"]), *percent]
    wrong = [k for k in TEXTS if not isinstance(row[k], str)]
    wrong += [k for k, v in numbers if not isinstance(v, int | float) or not math.isfinite(v)]
    if wrong:
        return f"{', '.join(wrong)} of a wrong type, or not a number"
    wrong = [f"{k} {v}" for k, v in percent if not -1e-3 <= v <= 100 + 1e-3]
    return f"{', '.join(wrong)}, which is no percentage" if wrong else ""


def identity(row: Row) -> str:
    """Names a row by all of its `KEYS`, without the `LATER` ones that it lacks: 16 hex digits."""
    numbers = {"epoch": float(row["epoch"]), "metrics": {k: float(v) for k, v in row["metrics"].items()}}
    return digest(json.dumps({k: row[k] for k in KEYS if row[k] or k not in LATER} | numbers, sort_keys=True))


def digest(text: str) -> str:
    return _sha256(text)[:16]


def _sha256(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def number_table(lines: Mapping[str, Mapping[str, float]], corner: str = "") -> str:
    """Markdown: a line for each name, a column for each of its numbers, which are the same for all."""
    return text_table({name: {head: f"{x:.1f}" for head, x in line.items()} for name, line in lines.items()}, corner)


def text_table(lines: Mapping[str, Mapping[str, str]], corner: str = "") -> str:
    """Markdown, as `number_table`, of what is printed already."""
    heads = list(next(iter(lines.values())))
    text = [f"| {corner} | " + " | ".join(heads) + " |", "|---|" + "---:|" * len(heads)]
    text += [f"| {name} | " + " | ".join(line[h] for h in heads) + " |" for name, line in lines.items()]
    return "\n".join(text)


def protocols(found: Mapping[str, Any]) -> str:
    """How the results of some networks were made: once where that is the same for all."""
    each = {title: result.protocol for title, result in found.items()}
    if len({*each.values()}) == 1:
        return next(iter(each.values()))
    return "".join(f"\n{title}: {how}" for title, how in each.items())
