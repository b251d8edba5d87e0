"""Line charts as SVG: tables 3 and 7 over epochs, how alpha moves what is learned, and how runs went."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from eval import figures
from eval.publish.cells import EPOCHS, NINE
from eval.publish.tables import Table
from eval.results import Row
from train import runs
from train.config import Config, Pretraining
from train.recipes import PEERS, RECIPES, departures

COLOURS = ("#3b82f6", "#ea580c", "#10a36e", "#a855f7", "#b45309", "#64748b")  # seen on white and on black
POINTS = 150  # of a training's curve
CURVES = {
    "context_accuracy": ("context", 0, "-"),
    "heldout_context_accuracy": ("context, held out", 0, ".--"),
    "motion_accuracy": ("motion", 1, "-"),
    "heldout_motion_accuracy": ("motion, held out", 1, ".--"),
    "class_accuracy": ("class", 2, "-"),
    **{f"{peer}_accuracy": (peer, 4, "-") for peer in PEERS},
    **{f"heldout_{peer}_accuracy": (f"{peer}, held out", 4, ".--") for peer in PEERS},
    "heldout_recall": ("R@1, held out", 3, ".--"),
}
"""Of metrics.jsonl: what the legend calls them, their colour and style."""


@dataclass(frozen=True)
class Series:
    name: str
    """Empty of a line that is of the same thing as another."""
    points: Sequence[tuple[float, float, float]]
    """(x, y, half the length of the error bar), by rising x."""
    colour: int
    style: str = "o-"
    """As matplotlib writes it: what ran here has dots, what the paper reports is dashed."""


def chart(title: str, series: Sequence[Series], x_label: str, y_label: str, ticks: Sequence[float] = ()) -> str:
    """An SVG document. `ticks` are the places on the x axis, which is logarithmic where there are any."""
    with figures.drawing() as Figure:
        figure = Figure(figsize=(6.4, 3.4), layout="constrained")
        axes = figure.subplots()
        for s in series:
            x, y, error = zip(*s.points) if s.points else ((), (), ())
            style: dict[str, Any] = {"color": COLOURS[s.colour % len(COLOURS)], "label": s.name or "_", "markersize": 4}
            spread = error if any(error) else None
            axes.errorbar(x, y, spread, fmt=s.style, linewidth=1.2 if "-" in s.style[-2:-1] else 1.8, **style)
        if ticks:
            axes.set_xscale("log")
            axes.set_xticks(ticks, [f"{x:g}" for x in ticks])
            axes.minorticks_off()
        axes.set_ylim(bottom=0)
        axes.set_xlabel(x_label, loc="right")
        axes.set_ylabel(y_label)
        axes.grid(axis="y", color="#8884", linewidth=0.7)
        axes.spines[["top", "right", "left"]].set_visible(False)
        axes.tick_params(length=0, labelsize=9)
        if any(s.name for s in series):
            figure.legend(loc="outside upper left", ncols=3, fontsize=8.5, frameon=False)
        return figures.svg(figure, title)


def table_plots(tables: Sequence[Table]) -> dict[str, str]:
    """Name -> SVG: tables 3 and 7 over epochs, and for each family how alpha moves what is learned."""
    found = {}
    for table in tables:
        if table.name in ("3", "7"):
            what = {"3": ("epoch of fine-tuning", "top-1, %"), "7": ("epoch of pretraining", "%")}[table.name]
            found[plot_name(table)] = chart(table.heading, _by_epoch(table), *what, EPOCHS)
        elif table.name not in NINE and (series := _by_alpha(table)):
            title = f"How alpha moves what is learned ({table.name})"
            found[plot_name(table)] = chart(title, series, "alpha: weight of motion against context", "retrieval, %")
    return found


def plot_name(table: Table) -> str:
    """Of its file."""
    return f"table{table.name}" if table.name in NINE else f"alpha-{table.name.replace(' ', '-')}"


def _by_epoch(table: Table) -> list[Series]:
    series = []
    for colour, row in enumerate(table.rows):
        entries = [(float(e), table.at(row, f"epoch {e}")) for e in EPOCHS]
        paper = [(x, e.number, 0.0) for x, e in entries if e.number is not None]
        ours = [(x, e.value.mean, e.value.deviation) for x, e in entries if e.value]
        series.append(Series(f"{row}, paper", paper, colour, ".--"))
        if ours:
            series.append(Series(f"{row}, ours", ours, colour))
    return series


def _by_alpha(table: Table) -> list[Series]:
    """A line a labelling, through the recipes that differ from the family's own in alpha alone."""
    alphas: list[tuple[float, str]] = []
    for row in table.rows:
        recipe = RECIPES.get(row)
        if recipe and isinstance(recipe.config, Pretraining) and recipe.changes().keys() <= {"objective.alpha"}:
            alphas.append((recipe.config.objective.alpha, row))
    series = []
    for colour, column in enumerate(table.columns):
        values = [(alpha, table.at(row, column).value) for alpha, row in sorted(alphas)]
        points = [(alpha, v.mean, v.deviation) for alpha, v in values if v]
        if len(points) > 1:
            series.append(Series(column, points, colour))
    return series


def training_curves(folder: Path, rows: Sequence[Row] = ()) -> Iterator[tuple[str, list[str], str]]:
    """(name, folders of its runs, SVG) for each recipe, and for each as it was changed: accuracies while training, on
    training and on held-out videos, seeds over one another; and what sound `rows` of its kept epochs retrieve, as
    table 7 sets the accuracies of the tasks beside it."""
    logs: dict[str, dict[Path, list[dict[str, Any]]]] = defaultdict(dict)
    for path in sorted(folder.glob("*/run.json")):
        try:
            about = runs.read(path.parent)
            log = path.with_name("metrics.jsonl").read_text().splitlines()
            began = about["pretrained"].get("recipe")
            changed = departures(about["recipe"], Config.from_json(json.dumps(about["config"])))
            said = [f"{about['recipe']} on {about['trained_on']}", *changed, *([f"from {began}"] if began else [])]
            logs[", ".join(said)][path.parent] = [json.loads(line) for line in log if line.endswith("}")]
        except (ValueError, OSError, KeyError):  # no run, or one that has only begun
            continue
    for name, each in logs.items():
        series: list[Series] = []
        for run, lines in each.items():
            found = []
            for column, (label, colour, style) in CURVES.items():
                points = [(x["epoch"], 100 * x[column], 0.0) for x in lines if x.get(column) is not None]
                if len(points) > 1:
                    found.append(Series(label, _thinned(points), colour, style))
            for s in (*found, *_retrieved(run, rows)):
                series.append(replace(s, name="" if s.name in {seen.name for seen in series} else s.name))
        if series:
            drawn = chart(f"Training of {name}", series, "epoch", "accuracy in a batch, R@1, %")
            yield name, [run.name for run in each], drawn


def _retrieved(run: Path, rows: Sequence[Row]) -> list[Series]:
    """R@1 of the V-Network by epoch: a line a labelling and data set, where more than its first and last are known."""
    found: dict[str, dict[float, float]] = defaultdict(dict)
    for row in sorted(rows, key=lambda r: r["when"]):  # of an epoch measured twice, the later
        if row["kind"] == "retrieval" and row["network"] == "video" and Path(row["file"]).parent.parent == run:
            for metric in row["metrics"]:
                if metric.endswith("R@1"):
                    found[f"{metric} on {row['dataset']}"][row["epoch"]] = row["metrics"][metric]
    lines = [(name, [(x, y, 0.0) for x, y in sorted(points.items())]) for name, points in found.items()]
    return [Series(name, points, 5 + i) for i, (name, points) in enumerate(lines) if len(points) > 2]


def _thinned(points: list[tuple[float, float, float]]) -> list[tuple[float, float, float]]:
    """At most POINTS points, each the mean of its neighbours."""
    groups = np.array_split(np.array(points), min(POINTS, len(points)))
    return [tuple(group.mean(0).tolist()) for group in groups]
