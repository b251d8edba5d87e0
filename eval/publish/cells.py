"""Which result fills which cell: tables 1 to 9 of the paper as data, and tables of our own of the same form.

A line of paper.csv is a cell as it was published; where one of our runs gives it too, the line goes on with that run.
"""

from __future__ import annotations

import csv
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from eval.results import Row
from train.config import Finetuning
from train.recipes import RECIPES

PAPER = Path(__file__).with_name("paper.csv")
NINE = tuple("123456789")
FAMILIES = {
    "scenes": {f"{part} R@1": f"{part} R@1" for part in ("context", "motion", "both")},
    "small": {"R@1": "class R@1", "R@5": "class R@5"},
    "ucf20": {f"R@{k}": f"class R@{k}" for k in (1, 5, 10, 20)},
}
"""Recipes beside the paper, by their first word; each is a table. Columns of retrieval, with their metrics."""
STEMS = {"ucf101": "ucf101_split1", "hmdb51": "hmdb51_split1"}
"""Manifest of a data set; of the others any will do. The paper has split 1 everywhere."""
EPOCHS = (1, 5, 10, 20, 50, 120)
"""Of the columns of tables 3 and 7."""
TITLES = {
    "1": "Motion prediction: period, loss and encoder-decoder. Video retrieval, R@1",
    "2": "Fine-tuning, from scratch and from pretrained networks. Action recognition, top-1",
    "3": "Convergence of fine-tuning, R(2+1)D-26 on UCF101. Top-1 by epoch",
    "4": "Sources of supervision, C3D pretrained on UCF101. Video retrieval",
    "5": "The I-, M- and V-Network, C3D pretrained on UCF101. Video retrieval",
    "6": "Motion prediction as regularisation, from scratch. Action recognition",
    "7": "Pretext tasks and transfer by pretraining epoch, C3D on UCF101, evaluated on HMDB51",
    "8": "Self-supervised methods. Action recognition, top-1",
    "9": "Self-supervised methods. Video retrieval",
    "scenes": "Beside the paper: the embedded scenes, which cross context with motion. Video retrieval, R@1",
    "small": "Beside the paper: the small network",
    "ucf20": "Beside the paper: twenty whole classes of UCF101",
}


@dataclass(frozen=True)
class Cell:
    """A number that a run gives. Seeds are free: the table shows their mean."""

    table: str
    row: str
    column: str
    kind: str
    recipe: str
    data: str
    """Data set evaluated on: ucf101, hmdb51, or the family of a small recipe."""
    metric: str
    epoch: int
    network: str = "video"
    pretraining: str = ""
    """Recipe that the run began from; empty where it began from none."""

    def fits(self, row: Row, dataset: str = "") -> bool:
        """Whether a row has this cell's number; `dataset` names the manifest of a small table."""
        return self.metric in row["metrics"] and self.is_of(row, dataset)

    def is_of(self, row: Row, dataset: str = "") -> bool:
        """Whether a row is of the evaluation that gives this cell, whatever metrics it has: few classes have no top-5,
        and labels of two parts no plain R@k."""
        wanted = {key: getattr(self, key) for key in ("kind", "recipe", "network", "pretraining", "epoch")}
        wanted |= {"subset": "train", "dataset": dataset or STEMS.get(self.data, "")}
        for key, recipe in (("trained_on", self.recipe), ("pretrained_on", self.pretraining)):
            if recipe and (manifest := dataset or STEMS.get(trained_on(recipe))):
                wanted[key] = manifest
        return all(row[key] == value for key, value in wanted.items())


@dataclass(frozen=True)
class Published:
    """A cell of the paper."""

    table: str
    row: str
    column: str
    value: str
    """A number, a text (year, pretrained, resolution, architecture), or empty where the paper has a dash."""
    note: str
    cell: Cell | None
    """What gives it here, where one of our runs does."""


@cache
def published() -> tuple[Published, ...]:
    """Every cell of the nine tables, in the paper's order."""
    found = []
    with open(PAPER, newline="", encoding="utf-8") as f:
        for line in csv.DictReader(f):
            value, note, epoch = line.pop("value"), line.pop("note"), line.pop("epoch")
            place = {key: line[key] for key in ("table", "row", "column")}
            cell = Cell(**line, epoch=int(epoch)) if epoch else None
            found.append(Published(**place, value=value, note=note, cell=cell))
    return tuple(found)


def cells(tables: Iterable[str] = (*NINE, *FAMILIES)) -> list[Cell]:
    """Every cell of some tables that one of our runs fills, in their order."""
    found: list[Cell] = []
    for table in tables:
        if table not in TITLES:
            raise ValueError(f"there is no table {table}; there are {', '.join(TITLES)}")
        found += _family(table) if table in FAMILIES else [p.cell for p in published() if p.table == table and p.cell]
    return found


def trained_on(recipe: str) -> str:
    """The data set that a recipe trains on, as --data calls it."""
    words = recipe.split("-")
    return words[0] if words[0] in FAMILIES else words[1]


def _family(family: str) -> list[Cell]:
    """The untrained network, every recipe of a family (retrieval of a pretrained one, accuracy of the others), and, as
    in table 5, the two networks that are trained beside the V-Network."""

    def retrieval(row: str, recipe: str, epoch: int, network: str = "video") -> list[Cell]:
        place = FAMILIES[family].items()
        return [Cell(family, row, c, "retrieval", recipe, family, metric, epoch, network) for c, metric in place]

    found, beside = retrieval("untrained", family, 0) if family in RECIPES else [], []
    for recipe, made in RECIPES.items():
        epochs = made.config.epochs
        if trained_on(recipe) != family:
            continue
        if isinstance(made.config, Finetuning):
            began = family if made.config.supervision.start == "pretrained" else ""
            what = ("top-1", "classification", recipe, family, "top-1", epochs)
            found.append(Cell(family, recipe, *what, pretraining=began))
        else:
            found += retrieval(recipe, recipe, epochs)
        for name, network in (("I-Network", "iframe"), ("M-Network", "motion")) if recipe == family else ():
            beside += retrieval(f"{name}, untrained", family, 0, network)
            beside += retrieval(f"{name}, {recipe}", family, epochs, network)
    return found + beside
