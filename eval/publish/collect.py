"""Result rows of many runs: read, checked against each other and against what is at hand, and exported."""

from __future__ import annotations

import csv
import json
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from operator import itemgetter
from pathlib import Path
from typing import Any

from eval.publish.cells import FAMILIES, STEMS, trained_on
from eval.results import KEYS, LATER, PERCENT, TEXTS, Row, digest, fault, identity
from preprocess.command import say
from preprocess.files import replacing
from preprocess.manifest import Manifest, dataset_name
from preprocess.shards import ShardSet
from train import runs
from train.config import Config, here_and_there
from train.recipes import RECIPES

MANIFESTS = Path(__file__).resolve().parents[2] / "data_manifests"
COLUMNS = tuple(k for k in KEYS if k != "metrics")
"""Of a CSV, before 'metric'."""
OF_METRIC = dict(zip(("value", "error", "chance"), PERCENT))
"""Its columns after 'metric', with what they are of a row; those after 'value' are empty, or not there, where a row has
none."""
HEADS = (*COLUMNS, "metric", *OF_METRIC, "row")
COMPARED = {
    "manifest_sha256": "it was measured with another manifest",
    "shard_settings_sha256": "its shards were made with other settings of stage 1",
    "training_settings_sha256": "it was trained with another manifest, or on shards of other settings of stage 1",
    "pretraining_settings_sha256": "the run it began from saw another manifest, or shards of other settings of stage 1",
}
"""Hashes that rows of one table share, and what it means where one has another."""
Refused = list[tuple[Row, str]]
"""Rows that are left out, each with the reason."""


@dataclass(frozen=True)
class AtHand:
    """A data set at hand: NAME=SHARDS:MANIFEST on the command line."""

    name: str
    shards: Path
    manifest: Path

    @property
    def dataset(self) -> str:
        """What rows call it."""
        return dataset_name(self.manifest)


def gather(
    folder: Path, sources: Sequence[Path] = (), at_hand: Sequence[AtHand] = (), needed: bool = True
) -> tuple[list[Row], Refused]:
    """`check` of every row in a folder of runs and in further sources (`read`), beside the committed manifests and the
    data at hand; ValueError where nothing is named that exists, and that is `needed`."""
    if needed and not sources and not folder.exists():
        raise ValueError(f"there is no folder {folder}: name the folder of runs with --runs, or rows with --results")
    rows = read([*([folder] if folder.exists() else []), *sources])
    if needed and not rows:
        say(f"note: there are no results in {', '.join(map(str, (folder, *sources)))}; python -m eval writes them")
    datasets = {row["dataset"] for row in rows if "fault" not in row}
    manifests = {p.stem: p for p in MANIFESTS.glob("*.csv") if p.stem in datasets} | {
        d.dataset: d.manifest for d in at_hand
    }
    settings = {d.dataset: ShardSet(d.shards).settings.sha256() for d in at_hand if d.shards.exists()}
    return check(rows, {name: Manifest.read(path).sha256 for name, path in manifests.items()}, settings)


def read(sources: Iterable[Path]) -> list[Row]:
    """Every row of some folders of runs, at any depth, and of CSV files that `export` wrote.

    A row has the keys 'file', 'id' (`results.identity`) and, from a CSV, 'name' (of its lines); and 'fault' where it
    cannot be believed: a damaged file, a name that is not the hash of what it holds, a missing key. `check` names
    those. Raises ValueError where a source is neither, or is not there.
    """
    rows: list[Row] = []
    for source in sources:
        if source.is_dir():
            rows += map(_read_json, sorted(source.glob("**/results/*-*.json")))
        elif source.is_file():
            rows += _read_csv(source)
        elif source.exists():
            raise ValueError(f"{source} is neither a folder of runs nor a CSV of results")
        else:
            raise ValueError(f"{source} does not exist: name a folder of runs, or a CSV that tables --export wrote")
    return rows


def check(
    rows: Sequence[Row], manifests: Mapping[str, str] | None = None, settings: Mapping[str, str] | None = None
) -> tuple[list[Row], Refused]:
    """(rows that may stand in one table, the others).

    A row is left out where it is damaged; where its settings are not its recipe's or not its run's; where its weights
    have been replaced since; where its data are not those of `manifests` and `settings` (name of the data set -> hash)
    or, with data sets that are not there, not those of most rows. The bytes of shards may differ (see `eval.results`).
    The same row read twice counts once.
    """
    sound: dict[str, Row] = {}
    refused: Refused = []
    for row in sorted(rows, key=lambda r: "name" in r):  # where a row was also exported, its file has more
        if reason := row.get("fault") or _settings(row):
            refused.append((row, reason))
        else:
            sound.setdefault(row["id"], row)
    kept = list(sound.values())
    for reasons in (
        _replaced,
        partial(_unlike, key="manifest_sha256", known=manifests or {}),
        partial(_unlike, key="shard_settings_sha256", known=settings or {}),
        partial(_unlike, key="manifest_sha256"),
        partial(_unlike, key="shard_settings_sha256"),
        partial(_unlike, key="training_settings_sha256", among=lambda row: f"{row['trained_on']} ({row['subset']})"),
        partial(_unlike, key="pretraining_settings_sha256", among=_began),
    ):
        why = reasons(kept)
        refused += [(row, why[row["id"]]) for row in kept if row["id"] in why]
        kept = [row for row in kept if row["id"] not in why]
    return kept, refused


def export(rows: Sequence[Row], path: Path) -> None:
    """Rows as CSV, a line a metric, without what is not a number or a text (confusions stay in the runs' folders)."""
    with replacing(path) as partial_path, open(partial_path, "w", newline="", encoding="utf-8") as f:
        writer = csv.writer(f, lineterminator="\n")
        writer.writerow(HEADS)
        for row in sorted(rows, key=lambda r: (r["kind"], r["recipe"], r["seed"], r["dataset"], r["epoch"], r["id"])):
            for name in row["metrics"]:
                numbers = [row.get(key, {}).get(name, "") for key in PERCENT]
                writer.writerow([*(row[c] for c in COLUMNS), name, *numbers, row["id"]])


def _read_json(path: Path) -> Row:
    try:
        text = path.read_text()
        row = json.loads(text)
        if not isinstance(row, dict):
            raise ValueError("not an object")
    except (ValueError, OSError) as error:
        return {"file": str(path), "fault": f"it cannot be read ({error})"}
    row = dict.fromkeys(LATER, "") | row | {"file": str(path)}
    if path.stem.rpartition("-")[2] != digest(text):
        wrong = "its name is not the hash of what it holds: it was changed after it was written"
    else:
        wrong = fault(row)
    return row | ({"fault": wrong} if wrong else {"id": identity(row)})


def _read_csv(path: Path) -> list[Row]:
    try:
        with open(path, newline="", encoding="utf-8") as f:
            reader = csv.DictReader(f)
            lines = list(reader)
    except (csv.Error, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is no CSV of results: {error}") from error
    if odd := sorted({*HEADS} ^ {*(reader.fieldnames or ()), *LATER, "error", "chance"}):
        raise ValueError(f"{path} is no CSV of results: {', '.join(odd)} unknown or missing")
    groups: dict[str, list[dict[str, str]]] = defaultdict(list)
    for line in lines:
        groups[line["row"]].append(line)
    return [_of_lines(name, group) | {"file": str(path), "name": name} for name, group in groups.items()]


def _of_lines(name: str, lines: Sequence[Mapping[str, str]]) -> Row:
    """The row that some lines of a CSV are of, with its 'id' or its 'fault'."""
    row: Row = dict.fromkeys(LATER, "") | {k: lines[0][k] for k in TEXTS if k in lines[0]}
    try:
        row |= {"seed": int(lines[0]["seed"]), "epoch": float(lines[0]["epoch"])}
        for column, key in OF_METRIC.items():
            row[key] = {line["metric"]: float(line[column]) for line in lines if line.get(column)}
        row["id"] = identity(row)
    except (ValueError, TypeError) as error:  # TypeError: a line that was cut short
        return row | {"fault": f"row {name} cannot be read ({error})"}
    if wrong := fault(row):
        return row | {"fault": f"row {name}: {wrong}"}
    if row["id"] != name:
        return row | {"fault": f"row {name} was changed after it was written: its hash is {row['id']}"}
    return row


def _settings(row: Row) -> str:
    """In what a row's settings are not those of its recipe, or not those of its run."""
    if row["weights"] == "given":  # of another program's network, which has no recipe and fills no table
        return ""
    recipe = RECIPES.get(row["recipe"])
    if recipe is None:
        return f"no recipe is called {row['recipe']!r}"
    try:
        wanted = recipe.config.changed({"seed": row["seed"]})
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


def _replaced(rows: Sequence[Row]) -> dict[str, str]:
    """Of one state of one run, or network of another program, the weights that were evaluated last are the run's."""
    states: dict[tuple[Any, ...], list[Row]] = defaultdict(list)
    for row in rows:
        if "name" not in row:
            states[str(Path(row["file"]).parent), row["recipe"], row["weights"], row["epoch"]].append(row)
    return {
        row["id"]: "its weights (weights_sha256) have been replaced since by others of the same run and epoch"
        for of_one in states.values()
        for row in of_one
        if row["weights_sha256"] != max(of_one, key=lambda r: r["when"])["weights_sha256"]
    }


def _began(row: Row) -> str:
    """The pretraining whose data rows share: where tables take any manifest, as of Kinetics-400, that of the recipe."""
    recipe = row["pretraining"]
    free = recipe in RECIPES and trained_on(recipe) not in (*STEMS, *FAMILIES)
    return recipe if free else f"{recipe} on {row['pretrained_on']}"


def _unlike(
    rows: Sequence[Row],
    key: str,
    among: Callable[[Row], str] = itemgetter("dataset"),
    known: Mapping[str, str] | None = None,
) -> dict[str, str]:
    """Rows whose `key` is not the `known` one of their `among`; where none are given, not that of most rows with the
    same `among` (of equal camps the later one stays). A row of an earlier program without the key passes."""
    if known is None:
        camps: dict[str, dict[str, list[str]]] = defaultdict(lambda: defaultdict(list))
        for row in rows:
            if row[key]:
                camps[among(row)][row[key]].append(row["when"])
        known = {name: max(of, key=lambda k, of=of: (len(of[k]), max(of[k]))) for name, of in camps.items()}  # type: ignore[misc]
        whose = "that of most rows on {}"
    else:
        whose = "that of {} at hand"
    return {
        row["id"]: f"{COMPARED[key]} ({key} {row[key][:8]}, {whose.format(among(row))} {known[among(row)][:8]})"
        for row in rows
        if row[key] and row[key] != known.get(among(row), row[key])
    }
