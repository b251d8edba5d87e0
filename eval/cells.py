"""Which result fills which cell: tables 1 to 9 of the paper as data, and two tables of our own of the same form."""

from __future__ import annotations

import csv
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from eval.rows import Row
from train.config import Finetuning
from train.recipes import BACKBONES, RECIPES

PAPER = Path(__file__).with_name("paper.csv")
NINE = tuple("123456789")
FAMILIES = ("scenes", "small")
"""Recipes beside the paper, by their first word; each is a table."""
STEMS = {"ucf101": "ucf101_split1", "hmdb51": "hmdb51_split1"}
"""Manifest of a data set; of the others any will do. The paper has split 1 everywhere."""
EPOCHS = (1, 5, 10, 20, 50, 120)
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
        here = dataset or STEMS.get(self.data, "")
        pairs = [
            (self.kind, row["kind"]),
            (self.recipe, row["recipe"]),
            (self.network, row["network"]),
            (self.pretraining, row["pretraining"]),
            (float(self.epoch), float(row["epoch"])),
            ("train", row["subset"]),
            (here, row["dataset"]),
            (dataset or STEMS.get(trained_on(self.recipe), row["trained_on"]), row["trained_on"]),
        ]
        if self.pretraining:
            there = dataset or STEMS.get(trained_on(self.pretraining), row["pretrained_on"])
            pairs.append((there, row["pretrained_on"]))
        return all(a == b for a, b in pairs)


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
    makers = {"1": _one, "2": _two, "3": _three, "4": _four, "5": _five, "6": _six, "7": _seven, "8": _eight}
    makers |= {"9": _nine, "scenes": _scenes, "small": _small}
    found = []
    for table in tables:
        if table not in makers:
            raise ValueError(f"there is no table {table}; there are {', '.join(makers)}")
        found += makers[table]()
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


def _one() -> list[Cell]:
    c3d = "pretrain-ucf101-c3d"
    return [
        cell
        for row, recipe in {
            "current, InfoNCE, Transformer": f"{c3d}-current",
            "future, cross-entropy, Transformer": f"{c3d}-crossent",
            "future, MSE, Transformer": f"{c3d}-mse",
            "future, InfoNCE, ConvGRU": f"{c3d}-convgru",
            "future, InfoNCE, Transformer": c3d,
        }.items()
        for cell in _retrieval("1", row, recipe, (1,))
    ]


def _two() -> list[Cell]:
    found = []
    for backbone, row in BACKBONES.items():
        for data in STEMS:
            column = data.upper()
            found.append(_accuracy("2", row, f"{column} scratch", f"scratch-{data}-{backbone}"))
            for source, name in (("ucf101", "UCF101"), ("k400", "Kinetics-400")):
                recipe, pretraining = f"finetune-{data}-{backbone}", f"pretrain-{source}-{backbone}"
                found.append(_accuracy("2", row, f"{column} from {name}", recipe, pretraining))
    return found


def _three() -> list[Cell]:
    return [
        _accuracy("3", row, f"epoch {epoch}", f"{start}-ucf101-r2plus1d26", pretraining, epoch=epoch)
        for row, start, pretraining in (
            ("scratch", "scratch", ""),
            ("UCF101", "finetune", "pretrain-ucf101-r2plus1d26"),
            ("Kinetics-400", "finetune", "pretrain-k400-r2plus1d26"),
        )
        for epoch in EPOCHS
    ]


def _four() -> list[Cell]:
    c3d = "pretrain-ucf101-c3d"
    return [
        cell
        for row, recipe in {
            "I-frames": f"{c3d}-context",
            "motion vectors": f"{c3d}-motion",
            "I-frames + optical flow": f"{c3d}-flow",
            "I-frames + motion vectors": c3d,
        }.items()
        for cell in _retrieval("4", row, recipe, (1, 5))
    ]


def _five() -> list[Cell]:
    networks = {"I-Network": "iframe", "M-Network": "motion", "V-Network": "video"}
    return [
        cell
        for row, network in networks.items()
        for cell in _retrieval("5", row, "pretrain-ucf101-c3d", (1, 5), network)
    ]


def _six() -> list[Cell]:
    return [
        _accuracy("6", name + ending, f"{data.upper()} top-{k}", f"{start}-{data}-{backbone}", k=k)
        for backbone, name in BACKBONES.items()
        for start, ending in (("scratch", ""), ("regularised", " with regularisation"))
        for data in STEMS
        for k in (1, 5)
    ]


def _seven() -> list[Cell]:
    return [
        Cell("7", row, f"epoch {epoch}", kind, "pretrain-ucf101-c3d", "hmdb51", metric, epoch)
        for row, kind, metric in (
            ("context matching", "pretext", "context accuracy"),
            ("motion prediction", "pretext", "motion accuracy"),
            ("video retrieval", "retrieval", "class R@1"),
        )
        for epoch in EPOCHS
    ]


def _eight() -> list[Cell]:
    return [
        _accuracy(
            "8",
            f"Ours, {name} from {title}",
            f"{data.upper()} top-1",
            f"finetune-{data}-{backbone}",
            f"pretrain-{source}-{backbone}",
        )
        for source, title in (("ucf101", "UCF101"), ("k400", "Kinetics-400"))
        for backbone, name in BACKBONES.items()
        for data in STEMS
    ]


def _nine() -> list[Cell]:
    return [
        cell
        for backbone, name in BACKBONES.items()
        for cell in _retrieval("9", f"Ours ({name})", f"pretrain-ucf101-{backbone}", (1, 5, 10, 20))
    ]


def _scenes() -> list[Cell]:
    return _family("scenes", {f"{part} R@1": f"{part} R@1" for part in ("context", "motion", "both")})


def _small() -> list[Cell]:
    return _family("small", {"class R@1": "R@1", "class R@5": "R@5"})


def _family(family: str, retrieval: dict[str, str]) -> list[Cell]:
    """The untrained network, every recipe of a family (retrieval of a pretrained one, accuracy of the others), and, as
    in table 5, the two networks that are trained beside the V-Network."""

    def of(row: str, recipe: str, epoch: int, network: str = "video") -> list[Cell]:
        return [Cell(family, row, c, "retrieval", recipe, family, m, epoch, network) for m, c in retrieval.items()]

    found, beside = of("untrained", family, 0), []
    for recipe, made in RECIPES.items():
        if recipe.split("-")[0] != family:
            continue
        if isinstance(made.config, Finetuning):
            began = family if made.config.supervision.start == "pretrained" else ""
            what = ("top-1", "classification", recipe, family, "top-1", made.config.epochs)
            found.append(Cell(family, recipe, *what, pretraining=began))
        else:
            found += of(recipe, recipe, made.config.epochs)
        for name, network in (("I-Network", "iframe"), ("M-Network", "motion")) if recipe == family else ():
            beside += of(f"{name}, untrained", family, 0, network)
            beside += of(f"{name}, {recipe}", family, made.config.epochs, network)
    return found + beside
