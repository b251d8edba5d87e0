"""Result rows: one JSON file a result, in the results/ of its run; merged on reading, so that no writer meets another.

| key | meaning |
|---|---|
| kind | retrieval, classification, pretext, knn, linear or diagnosis |
| recipe, backbone, network | what was evaluated; network is video, iframe or motion |
| pretraining, pretrained_on | recipe and manifest of the run it began from; empty where it began from none |
| trained_on, subset | manifest and rows that it was trained on |
| training_sha256 | of that manifest and its shards |
| dataset, split | manifest evaluated on, by its name, and the number in ..._split1 |
| seed, epoch, weights | weights is initial, last, or a kept epoch such as epoch-0005 |
| metrics | name -> percent: 'class R@1', 'top-1', 'context accuracy', ... |
| protocol | how the number was made, in a sentence |
| commit, machine, when | of this program; where; UTC |
| config_sha256, manifest_sha256, shards_sha256, weights_sha256 | of what went in |

Other keys may follow: queries and gallery of retrieval; classes, confusion and per_class of classification.
"""

from __future__ import annotations

import csv
import datetime
import hashlib
import json
import math
import os
import platform
import re
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from preprocess.files import replacing, write_text
from train import runs
from train.config import Config, here_and_there

if TYPE_CHECKING:
    from eval.features import Run
    from preprocess.manifest import Manifest
    from preprocess.shards import ShardSet

Row = dict[str, Any]
KINDS = ("retrieval", "classification", "pretext", "knn", "linear", "diagnosis")
TEXTS = (
    "kind", "recipe", "backbone", "network", "pretraining", "pretrained_on", "trained_on", "subset", "training_sha256",
    "dataset", "split", "weights", "protocol", "commit", "config_sha256", "manifest_sha256", "shards_sha256",
    "weights_sha256", "machine", "when",
)  # fmt: skip
KEYS = (*TEXTS, "seed", "epoch", "metrics")


def about(run: Run, shards: ShardSet, manifest: Manifest, dataset: str) -> Row:
    """Where a result comes from: every key but kind, network, metrics and protocol, which its evaluation adds.

    `manifest` is the whole table evaluated on and `dataset` the name of its file.
    """
    made = runs.read(run.folder)
    began = made["pretrained"]
    return evaluated_on(shards, manifest, dataset) | {
        "recipe": run.recipe,
        "backbone": run.config.networks.backbone,
        "pretraining": began.get("recipe", ""),
        "pretrained_on": began.get("trained_on", ""),
        "trained_on": made["trained_on"],
        "subset": made["subset"],
        "training_sha256": hashlib.sha256(f"{made['manifest_sha256']} {made['shards_sha256']}".encode()).hexdigest(),
        "seed": run.config.seed,
        "epoch": run.epoch,
        "weights": run.weights,
        "config_sha256": run.config.sha256(),
        "weights_sha256": run.weights_sha256(),
    }


def evaluated_on(shards: ShardSet, manifest: Manifest, dataset: str) -> Row:
    """What `about` says of the data, the program, the machine and the time."""
    split = re.search(r"_split(\d+)$", dataset)
    return {
        "dataset": dataset,
        "split": split[1] if split else "",
        "commit": runs.git_commit(),
        "manifest_sha256": manifest.sha256,
        "shards_sha256": shards.sha256(),
        "machine": f"{platform.machine()}, {os.cpu_count()} cores",
        "when": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
    }


def write(folder: Path, row: Row) -> Path:
    """Store a result in the results/ of a run's folder, whole or not at all; ValueError where a key is missing."""
    fault = _fault(row)
    if fault:
        raise ValueError(f"this result cannot be stored: {fault}")
    text = json.dumps(row, indent=1) + "\n"
    # The name is a hash of the content: concurrent writers never meet, and a file that was changed shows.
    path = folder / "results" / f"{row['kind']}-{_digest(text)}.json"
    write_text(path, text)
    return path


def read(sources: Iterable[Path]) -> list[Row]:
    """Every row of some folders of runs, at any depth, and of CSV files that `export` wrote.

    A row has the keys 'file', 'id' (`identity`) and, from a CSV, 'name' (of its lines); and 'fault' where it cannot be
    believed: a damaged file, a name that is not the hash of what it holds, a missing key. `check` names those. Raises
    ValueError where a source is neither.
    """
    found: list[Row] = []
    for source in sources:
        if source.is_dir():
            for path in sorted(source.glob("**/results/*-*.json")):
                found.append(_read_json(path))
        elif source.is_file():
            found += _read_csv(source)
        else:
            raise ValueError(f"{source} is neither a folder of runs nor a CSV of results")
    return found


def check(
    found: Sequence[Row], manifests: Mapping[str, str] | None = None, shards: Mapping[str, str] | None = None
) -> tuple[list[Row], list[tuple[Row, str]]]:
    """(rows that may stand in one table, the others each with the reason).

    A row is left out where it is damaged; where its settings are not its recipe's or not its run's; where its weights
    have been replaced since; where its data are not those of `manifests` and `shards` (name of the data set -> hash)
    or, with data sets that are not there, not those of most rows. The same row read twice counts once.
    """
    from train.recipes import RECIPES

    sound: dict[str, Row] = {}
    refused: list[tuple[Row, str]] = []
    for row in sorted(found, key=lambda r: "name" in r):  # where a row was also exported, its file has more
        reason = row.get("fault") or _settings(row, RECIPES)
        if reason:
            refused.append((row, reason))
        else:
            sound.setdefault(row["id"], row)
    kept = list(sound.values())
    for reasons in (
        _replaced,
        lambda rows: _other(rows, manifests or {}, "manifest_sha256"),
        lambda rows: _other(rows, shards or {}, "shards_sha256"),
        lambda rows: _minority(rows, "manifest_sha256", "dataset"),
        lambda rows: _minority(rows, "shards_sha256", "dataset"),
        lambda rows: _minority(rows, "training_sha256", "trained_on"),
    ):
        why = reasons(kept)
        refused += [(row, why[row["id"]]) for row in kept if row["id"] in why]
        kept = [row for row in kept if row["id"] not in why]
    return kept, refused


def export(found: Sequence[Row], path: Path) -> None:
    """Rows as CSV, a line a metric, without what is not a number or a text (confusions stay in the runs' folders)."""
    columns = [k for k in KEYS if k != "metrics"]
    with replacing(path) as partial, open(partial, "w", newline="") as f:
        writer = csv.writer(f, lineterminator="\n")
        writer.writerow([*columns, "metric", "value", "row"])
        for row in sorted(found, key=lambda r: (r["kind"], r["recipe"], r["seed"], r["dataset"], r["epoch"], r["id"])):
            for name, value in row["metrics"].items():
                writer.writerow([*(row[c] for c in columns), name, value, row["id"]])


def identity(row: Row) -> str:
    """Names a row by all its keys that `export` keeps: 16 hex digits."""
    numbers = {"epoch": float(row["epoch"]), "metrics": {k: float(v) for k, v in row["metrics"].items()}}
    return _digest(json.dumps({k: row[k] for k in KEYS} | numbers, sort_keys=True))


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _fault(row: Row) -> str:
    """Why a row is not one; empty where it is."""
    missing = [k for k in KEYS if k not in row]
    if missing:
        return f"{', '.join(missing)} missing"
    if row["kind"] not in KINDS:
        return f"its kind is {row['kind']!r}; there are {', '.join(KINDS)}"
    if not isinstance(row["metrics"], dict):
        return "its metrics are no object"
    numbers = {"seed": row["seed"], "epoch": row["epoch"], **row["metrics"]}
    wrong = [k for k in TEXTS if not isinstance(row[k], str)]
    wrong += [k for k, v in numbers.items() if not isinstance(v, int | float) or not math.isfinite(v)]
    if wrong:
        return f"{', '.join(wrong)} of a wrong type, or not a number"
    wrong = [f"{k} {v}" for k, v in row["metrics"].items() if not -1e-3 <= v <= 100 + 1e-3]
    return f"{', '.join(wrong)}, which is no percentage" if wrong else ""


def _read_json(path: Path) -> Row:
    try:
        text = path.read_text()
        row = json.loads(text)
        if not isinstance(row, dict):
            raise ValueError("not an object")
    except (ValueError, OSError) as error:
        return {"file": str(path), "fault": f"it cannot be read ({error})"}
    if path.stem.rpartition("-")[2] != _digest(text):
        fault = "its name is not the hash of what it holds: it was changed after it was written"
    else:
        fault = _fault(row)
    row = row | {"file": str(path)}
    return row | ({"fault": fault} if fault else {"id": identity(row)})


def _read_csv(path: Path) -> list[Row]:
    try:
        with open(path, newline="") as f:
            lines = list(csv.DictReader(f))
    except (csv.Error, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is no CSV of results: {error}") from error
    wanted = {*KEYS, "metric", "value", "row"} - {"metrics"}
    if lines and set(lines[0]) != wanted:
        odd = sorted(wanted ^ {str(k) for k in lines[0]})
        raise ValueError(f"{path} is no CSV of results: {', '.join(odd)} unknown or missing")
    groups: dict[str, list[dict[str, str]]] = defaultdict(list)
    for line in lines:
        groups[line["row"]].append(line)
    found = []
    for name, group in groups.items():
        row: Row = {k: group[0][k] for k in TEXTS} | {"file": str(path), "name": name}
        try:
            row |= {"seed": int(group[0]["seed"]), "epoch": float(group[0]["epoch"])}
            row["metrics"] = {line["metric"]: float(line["value"]) for line in group}
            row["id"] = identity(row)
        except (ValueError, TypeError) as error:  # TypeError: a line that was cut short
            row["fault"] = f"row {name} cannot be read ({error})"
        else:
            if fault := _fault(row):
                row["fault"] = f"row {name}: {fault}"
            elif row["id"] != name:
                row["fault"] = f"row {name} was changed after it was written: its hash is {row['id']}"
        found.append(row)
    return found


def _settings(row: Row, recipes: Mapping[str, Any]) -> str:
    if row["weights"] == "given":  # of another program's network, which has no recipe and fills no table
        return ""
    recipe = recipes.get(row["recipe"])
    if recipe is None:
        return f"no recipe is called {row['recipe']!r}"
    try:
        wanted: Config = recipe.config.changed({"seed": row["seed"]})
    except ValueError as error:
        return str(error)
    folder, which = Path(row["file"]).parent.parent, ""
    if (folder / "run.json").exists():
        try:
            made = runs.read(folder)
            if made["config_sha256"] != row["config_sha256"]:
                return f"its settings (config_sha256) are not those of the run in {folder}"
            which = here_and_there(wanted.differences(Config.from_json(json.dumps(made["config"]))))
        except (ValueError, KeyError) as error:
            return f"the run in {folder} cannot be read: {error}"
    if wanted.sha256() != row["config_sha256"]:
        return f"its settings (config_sha256) are not those of the recipe {row['recipe']}{which and f' ({which})'}"
    return ""


def _replaced(found: Sequence[Row]) -> dict[str, str]:
    """Of one state of one run, the weights that were evaluated last are the run's."""
    newest: dict[tuple[Any, ...], Row] = {}
    places = {r["id"]: (str(Path(r["file"]).parent), r["weights"], r["epoch"]) for r in found if "name" not in r}
    for row in found:
        if row["id"] in places:
            place = places[row["id"]]
            newest[place] = max(newest.get(place, row), row, key=lambda r: r["when"])
    return {
        row["id"]: "its weights (weights_sha256) have been replaced since by others of the same run and epoch"
        for row in found
        if row["id"] in places and newest[places[row["id"]]]["weights_sha256"] != row["weights_sha256"]
    }


def _other(found: Sequence[Row], known: Mapping[str, str], key: str) -> dict[str, str]:
    """Rows whose `key` is not that of their data set at hand."""
    return {
        row["id"]: f"its {key} is {row[key][:8]}, that of {row['dataset']} at hand {known[row['dataset']][:8]}"
        for row in found
        if row[key] != known.get(row["dataset"], row[key])
    }


def _minority(found: Sequence[Row], key: str, among: str) -> dict[str, str]:
    """Rows whose `key` is not that of most rows with the same value of `among`; of equal camps the later one stays."""
    camps: dict[str, dict[str, list[str]]] = defaultdict(lambda: defaultdict(list))
    for row in found:
        camps[row[among]][row[key]].append(row["when"])
    winners = {
        name: max(each, key=lambda k, each=each: (len(each[k]), max(each[k])))  # type: ignore[misc]
        for name, each in camps.items()
    }
    return {
        row["id"]: f"its {key} is {row[key][:8]}, that of most rows on {row[among]} {winners[row[among]][:8]}"
        for row in found
        if row[key] != winners[row[among]]
    }
