"""Which result fills which cell: tables 1 to 9 of the paper as data, and two tables of our own of the same form."""

from __future__ import annotations

import csv
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from eval.results import Row
from train.config import Finetuning
from train.recipes import BACKBONES, RECIPES

PAPER = Path(__file__).with_name("paper.csv")
NINE = tuple("123456789")
FAMILIES = ("scenes", "small")
"""Recipes beside the paper, by their first word; each is a table."""
STEMS = {"ucf101": "ucf101_split1", "hmdb51": "hmdb51_split1"}
"""Manifest of a data set; of the others any will do. The paper has split 1 everywhere."""
SOURCES = {"ucf101": "UCF101", "k400": "Kinetics-400"}
"""Data sets to pretrain on."""
EPOCHS = (1, 5, 10, 20, 50, 120)
C3D = "pretrain-ucf101-c3d"
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
    """Recipe that the run began from."""

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
    table: str
    row: str
    column: str
    value: str
    """A number, a text (year, pretrained, resolution, architecture), or empty where the paper has a dash."""
    note: str


def trained_on(recipe: str) -> str:
    """The data set that a recipe trains on, as --data calls it."""
    words = recipe.split("-")
    return words[0] if words[0] in FAMILIES else words[1]


def published(path: Path = PAPER) -> list[Published]:
    with open(path, newline="", encoding="utf-8") as f:
        return [Published(**line) for line in csv.DictReader(f)]


def cells(tables: Iterable[str] = (*NINE, *FAMILIES)) -> list[Cell]:
    """Every cell of some tables that one of our runs fills, in the paper's order."""
    found: list[Cell] = []
    for table in tables:
        if table not in MAKERS:
            raise ValueError(f"there is no table {table}; there are {', '.join(MAKERS)}")
        found += MAKERS[table]()
    return found


def _retrieval(table: str, row: str, recipe: str, ks: Sequence[int], network: str = "video") -> list[Cell]:
    return [
        Cell(table, row, f"{data.upper()} R@{k}", "retrieval", recipe, data, f"class R@{k}", 120, network)
        for data in STEMS
        for k in ks
    ]


def _accuracy(
    table: str, row: str, column: str, recipe: str, pretraining: str = "", k: int = 1, epoch: int = 120
) -> Cell:
    data = trained_on(recipe)
    return Cell(table, row, column, "classification", recipe, data, f"top-{k}", epoch, pretraining=pretraining)


def _one() -> Iterator[Cell]:
    for row, ending in {
        "current, InfoNCE, Transformer": "-current",
        "future, cross-entropy, Transformer": "-crossent",
        "future, MSE, Transformer": "-mse",
        "future, InfoNCE, ConvGRU": "-convgru",
        "future, InfoNCE, Transformer": "",
    }.items():
        yield from _retrieval("1", row, C3D + ending, (1,))


def _two() -> Iterator[Cell]:
    for backbone, row in BACKBONES.items():
        for data in STEMS:
            column = data.upper()
            yield _accuracy("2", row, f"{column} scratch", f"scratch-{data}-{backbone}")
            for source, name in SOURCES.items():
                recipe, pretraining = f"finetune-{data}-{backbone}", f"pretrain-{source}-{backbone}"
                yield _accuracy("2", row, f"{column} from {name}", recipe, pretraining)


def _three() -> Iterator[Cell]:
    for row, start, pretraining in (
        ("scratch", "scratch", ""),
        ("UCF101", "finetune", "pretrain-ucf101-r2plus1d26"),
        ("Kinetics-400", "finetune", "pretrain-k400-r2plus1d26"),
    ):
        for epoch in EPOCHS:
            yield _accuracy("3", row, f"epoch {epoch}", f"{start}-ucf101-r2plus1d26", pretraining, epoch=epoch)


def _four() -> Iterator[Cell]:
    for row, ending in {
        "I-frames": "-context",
        "motion vectors": "-motion",
        "I-frames + optical flow": "-flow",
        "I-frames + motion vectors": "",
    }.items():
        yield from _retrieval("4", row, C3D + ending, (1, 5))


def _five() -> Iterator[Cell]:
    for row, network in {"I-Network": "iframe", "M-Network": "motion", "V-Network": "video"}.items():
        yield from _retrieval("5", row, C3D, (1, 5), network)


def _six() -> Iterator[Cell]:
    for backbone, name in BACKBONES.items():
        for start, ending in (("scratch", ""), ("regularised", " with regularisation")):
            for data in STEMS:
                for k in (1, 5):
                    yield _accuracy("6", name + ending, f"{data.upper()} top-{k}", f"{start}-{data}-{backbone}", k=k)


def _seven() -> Iterator[Cell]:
    for row, kind, metric in (
        ("context matching", "pretext", "context accuracy"),
        ("motion prediction", "pretext", "motion accuracy"),
        ("video retrieval", "retrieval", "class R@1"),
    ):
        for epoch in EPOCHS:
            yield Cell("7", row, f"epoch {epoch}", kind, C3D, "hmdb51", metric, epoch)


def _eight() -> Iterator[Cell]:
    for source, title in SOURCES.items():
        for backbone, name in BACKBONES.items():
            for data in STEMS:
                recipe, pretraining = f"finetune-{data}-{backbone}", f"pretrain-{source}-{backbone}"
                yield _accuracy("8", f"Ours, {name} from {title}", f"{data.upper()} top-1", recipe, pretraining)


def _nine() -> Iterator[Cell]:
    for backbone, name in BACKBONES.items():
        yield from _retrieval("9", f"Ours ({name})", f"pretrain-ucf101-{backbone}", (1, 5, 10, 20))


def _scenes() -> Iterator[Cell]:
    return _family("scenes", {f"{part} R@1": f"{part} R@1" for part in ("context", "motion", "both")})


def _small() -> Iterator[Cell]:
    return _family("small", {"R@1": "class R@1", "R@5": "class R@5"})


def _family(family: str, metrics: dict[str, str]) -> Iterator[Cell]:
    """The untrained network, every recipe of a family (retrieval of a pretrained one, by column and metric; accuracy of
    the others), and, as in table 5, the two networks that are trained beside the V-Network."""

    def retrieval(row: str, recipe: str, epoch: int, network: str = "video") -> Iterator[Cell]:
        for column, metric in metrics.items():
            yield Cell(family, row, column, "retrieval", recipe, family, metric, epoch, network)

    yield from retrieval("untrained", family, 0)
    for recipe, made in RECIPES.items():
        if trained_on(recipe) != family:
            continue
        if isinstance(made.config, Finetuning):
            began = family if made.config.supervision.start == "pretrained" else ""
            yield _accuracy(family, recipe, "top-1", recipe, began, epoch=made.config.epochs)
        else:
            yield from retrieval(recipe, recipe, made.config.epochs)
    for name, network in (("I-Network", "iframe"), ("M-Network", "motion")) if family in RECIPES else ():
        yield from retrieval(f"{name}, untrained", family, 0, network)
        yield from retrieval(f"{name}, {family}", family, RECIPES[family].config.epochs, network)


MAKERS: dict[str, Callable[[], Iterable[Cell]]] = {
    "1": _one, "2": _two, "3": _three, "4": _four, "5": _five, "6": _six, "7": _seven, "8": _eight, "9": _nine,
    "scenes": _scenes, "small": _small,
}  # fmt: skip
