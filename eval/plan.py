"""The runs that tables still miss: listed, executed here one after another, or written as SLURM job arrays.

    python -m eval tables --plan --data ucf101=shards/ucf101:data_manifests/ucf101_split1.csv

A training comes before what is evaluated or continued from it, and is done once however many cells need it. What is
there already is recognised: a run by its run.json, an evaluation by its rows.
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from eval.cells import FAMILIES, NINE, STEMS, Cell, cells, trained_on
from eval.features import CLIPS
from eval.rows import Row
from preprocess.manifest import Manifest, dataset_name
from train import cost, runs
from train.config import Config
from train.recipes import RECIPES

VERBS = {"retrieval": "retrieve", "classification": "classify", "pretext": "pretext"}
FORWARD = 1 / 3  # of a training step's operations, which are one forward pass and a backward of twice as many
RECENT = 100  # lines of metrics whose clips per second count


@dataclass(frozen=True)
class Data:
    """A data set at hand: NAME=SHARDS:MANIFEST on the command line."""

    name: str
    shards: Path
    manifest: Path

    @staticmethod
    def parse(text: str) -> Data:
        name, equals, rest = text.partition("=")
        shards, colon, manifest = rest.rpartition(":")
        if not (name and equals and shards and colon and manifest):
            raise ValueError(f"--data {text}: write NAME=SHARDS:MANIFEST")
        names = (*STEMS, "k400", *FAMILIES)
        if name not in names:
            raise ValueError(f"--data {text}: no table has the data set {name}; there are {', '.join(names)}")
        found = Data(name, Path(shards), Path(manifest))
        if found.dataset != STEMS.get(name, found.dataset):
            raise ValueError(f"--data {text}: the tables are of {STEMS[name]}.csv; name that manifest")
        return found

    @property
    def dataset(self) -> str:
        return dataset_name(self.manifest)


@dataclass(frozen=True)
class Training:
    recipe: str
    pretraining: str
    seed: int

    @property
    def name(self) -> str:
        began = f"-from-{self.pretraining}" if self.pretraining else ""
        return f"{self.recipe}{began}-s{self.seed}"

    @property
    def config(self) -> Config:
        return RECIPES[self.recipe].config.changed({"seed": self.seed})

    @property
    def before(self) -> Training | None:
        """The pretraining that it begins from."""
        return Training(self.pretraining, "", self.seed) if self.pretraining else None

    @property
    def kept(self) -> list[int]:
        """Epochs whose weights some table wants, before the last."""
        mine = [c.epoch for c in cells(NINE) if (c.recipe, c.pretraining) == (self.recipe, self.pretraining)]
        return sorted({e for e in mine if 0 < e < self.config.epochs})


@dataclass(frozen=True)
class Job:
    name: str
    command: tuple[str, ...]
    """What follows python -m."""
    hours: float
    measured: bool
    """From clips per second that a run on this machine logged; else by train.cost."""
    needs: tuple[str, ...] = ()
    """Names of jobs of the same plan that come first."""
    lacks: str = ""
    """Why it cannot run; empty where it can."""


@dataclass(frozen=True)
class Known:
    """A run in the folder of runs."""

    folder: Path
    trained_on: str
    epoch: float
    """Of its last checkpoint."""
    rate: float
    """Clips a second, zero where its log has none."""


def make(
    tables: Sequence[str],
    seeds: Sequence[int],
    data: Sequence[Data],
    found: Sequence[Row],
    folder: Path,
    training: Sequence[str] = (),
    evaluation: Sequence[str] = (),
) -> list[Job]:
    """Jobs in an order in which each comes after what it needs.

    `found` are sound rows, `folder` holds the runs; `training` and `evaluation` are further flags of every such job.
    """
    named = {d.name: d for d in data}
    known = {}
    for run, there in scan(folder).items():
        wanted = named.get(trained_on(run.recipe))
        if wanted is None or wanted.dataset == there.trained_on:
            known[run] = there
    return _Planner(named, known, folder, training, evaluation).plan(tables, seeds, found)


def scan(folder: Path) -> dict[Training, Known]:
    """The runs of recipes, with their own settings, in a folder; of several alike the furthest."""
    known: dict[Training, Known] = {}
    for path in sorted(folder.glob("*/run.json")):
        try:
            about = runs.read(path.parent)
            run = Training(about["recipe"], about["pretrained"].get("recipe", ""), about["seed"])
            if run.recipe not in RECIPES or about["config_sha256"] != run.config.sha256() or about["subset"] != "train":
                continue
            state = path.with_name("checkpoint.json")
            epoch = float(json.loads(state.read_text())["epoch"]) if state.exists() else 0.0
        except (ValueError, KeyError, TypeError):  # another program's, or damaged
            continue
        if run not in known or epoch > known[run].epoch:
            known[run] = Known(path.parent, about["trained_on"], epoch, _rate(path.with_name("metrics.jsonl")))
    return known


def _rate(path: Path) -> float:
    """Median of the clips per second that a run's log ends with."""
    found = []
    for text in path.read_text().splitlines()[-RECENT:] if path.exists() else []:
        try:
            found.append(float(json.loads(text)["clips_per_second"]))
        except (ValueError, KeyError, TypeError):  # a line that a kill cut short
            continue
    return statistics.median(found) if found else 0.0


@dataclass
class _Planner:
    data: Mapping[str, Data]
    known: Mapping[Training, Known]
    folder: Path
    training: Sequence[str]
    evaluation: Sequence[str]

    def plan(self, tables: Sequence[str], seeds: Sequence[int], found: Sequence[Row]) -> list[Job]:
        jobs: dict[str, Job] = {}
        for cell in cells(tables):
            dataset = self.data[cell.data].dataset if cell.data in FAMILIES and cell.data in self.data else ""
            there = {row["seed"] for row in found if cell.is_of(row, dataset)}
            for seed in seeds:
                if seed not in there:
                    self._evaluate(cell, seed, jobs)
        return list(jobs.values())

    def _place(self, run: Training) -> Path:
        return self.known[run].folder if run in self.known else self.folder / run.name

    def _lacking(self, *names: str) -> str:
        missing = [name for name in names if name not in self.data]
        return f"--data {missing[0]}=SHARDS:MANIFEST is not given" if missing else ""

    def _paths(self, name: str) -> tuple[str, ...]:
        d = self.data.get(name)
        shards, manifest = (str(d.shards), str(d.manifest)) if d else ("SHARDS", "MANIFEST")
        return "--shards", shards, "--manifest", manifest

    def _train(self, run: Training, jobs: dict[str, Job]) -> str:
        """Add the training where it is not finished; the name of its job, or nothing."""
        there, epochs = self.known.get(run), run.config.epochs
        if there and there.epoch >= epochs:
            return ""
        if run.name in jobs:
            return run.name
        name = trained_on(run.recipe)
        needs: tuple[str, ...] = ()
        command: tuple[str, ...] = ("train", run.recipe, *self._paths(name), "--out", str(self._place(run)))
        command += ("--seed", str(run.seed))
        if run.kept:
            command += ("--keep-epochs", *map(str, run.kept))
        if run.before:
            needs = tuple(n for n in [self._train(run.before, jobs)] if n)
            command += ("--pretrained", str(self._place(run.before)))
        lacks = self._lacking(name) or self._blocked(needs, jobs)
        if not there and (self.folder / run.name / "run.json").exists():
            lacks = f"{self.folder / run.name} holds a run with other settings or data: move it away"
        hours, measured = self._training_hours(run)
        share = 1 - (there.epoch if there else 0) / epochs
        jobs[run.name] = Job(run.name, (*command, *self.training), hours * share, measured, needs, lacks)
        return run.name

    def _evaluate(self, cell: Cell, seed: int, jobs: dict[str, Job]) -> None:
        run = Training(cell.recipe, cell.pretraining, seed)
        weights = "last" if cell.epoch == run.config.epochs else f"epoch-{cell.epoch:04d}" if cell.epoch else "initial"
        name = f"{run.name} {VERBS[cell.kind]} {cell.data} {cell.network} {weights}"
        if name in jobs:
            return
        needs = tuple(n for n in [self._train(run, jobs)] if n)
        place = self._place(run)
        command: tuple[str, ...] = ("eval", VERBS[cell.kind], "--run", str(place), *self._paths(cell.data))
        command += ("--weights", weights)
        if cell.kind == "retrieval":
            command += ("--network", cell.network)
        lacks = self._lacking(cell.data) or self._blocked(needs, jobs)
        there, kept = self.known.get(run), " ".join(map(str, run.kept))
        if (
            weights.startswith("epoch")
            and there
            and there.epoch >= cell.epoch
            and not (place / f"{weights}.pt").exists()
        ):
            lacks = f"{place} was trained without --keep-epochs {kept}: move it away, to train it anew"
        hours, measured = self._training_hours(run)
        train, test = self._videos(cell.data)
        clips = {"retrieval": CLIPS * (train + test), "classification": CLIPS * test, "pretext": test}[cell.kind]
        hours *= FORWARD * clips / (run.config.epochs * self._videos(trained_on(run.recipe))[0])
        jobs[name] = Job(name, (*command, *self.evaluation), hours, measured, needs, lacks)

    def _blocked(self, needs: Iterable[str], jobs: Mapping[str, Job]) -> str:
        return next((jobs[n].lacks for n in needs if jobs[n].lacks), "")

    def _training_hours(self, run: Training) -> tuple[float, bool]:
        """(hours of the whole training, whether they were measured)."""
        videos = self._videos(trained_on(run.recipe))[0]
        rates = [k.rate for r, k in self.known.items() if k.rate and r.recipe == run.recipe]
        if not rates:  # the next best: runs of the same networks, by how much more or less a clip costs in them
            mine = cost.flops_per_clip(run.config)
            rates = [
                k.rate * cost.flops_per_clip(r.config) / mine
                for r, k in self.known.items()
                if k.rate and (r.config.networks, r.config.size) == (run.config.networks, run.config.size)
            ]
        if rates:
            return run.config.epochs * videos / statistics.median(rates) / 3600, True
        return cost.gpu_hours(run.config, videos), False

    def _videos(self, name: str) -> tuple[int, int]:
        """(training, test) videos of a data set; as published where it is not at hand."""
        if name in self.data:
            subsets = _subsets(self.data[name].manifest)
            return max(1, subsets.count("train")), subsets.count("test")
        published = {"ucf101": (9537, 3783), "hmdb51": (3570, 1530), "k400": (246_000, 0)}
        return published.get(name, (288, 360))


@cache
def _subsets(manifest: Path) -> tuple[str, ...]:
    return Manifest.read(manifest).subsets
