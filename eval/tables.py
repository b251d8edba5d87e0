"""Tables from result rows: the paper's number, ours as mean and deviation over seeds, and the difference.

    python -m eval tables --runs runs --results eval/results.csv --out tables

No network is touched, and no GPU is needed. A cell that nothing fills says 'not run'.
"""

from __future__ import annotations

import csv
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from eval import svg
from eval.cells import EPOCHS, FAMILIES, NINE, TITLES, Cell, cells, published
from eval.rows import Row
from preprocess.files import replacing, write_text
from preprocess.manifest import Manifest
from train.config import Pretraining
from train.recipes import RECIPES

NOT_RUN = "not run"
HEADS = ("table", "row", "column", "paper", "ours", "deviation", "seeds", "difference", "recipe", "rows", "note")
MANIFESTS = Path(__file__).resolve().parent.parent / "data_manifests"


@dataclass(frozen=True)
class Value:
    """What ran here for one cell."""

    rows: tuple[Row, ...]
    """One a seed: the one evaluated last."""
    metric: str

    @property
    def numbers(self) -> list[float]:
        return [row["metrics"][self.metric] for row in self.rows]

    @property
    def mean(self) -> float:
        return statistics.fmean(self.numbers)

    @property
    def deviation(self) -> float:
        """Sample deviation over seeds; zero of one."""
        return statistics.stdev(self.numbers) if len(self.rows) > 1 else 0.0

    def __str__(self) -> str:
        if len(self.rows) == 1:
            return f"{self.mean:.1f} (1 seed)"
        return f"{self.mean:.1f} ± {self.deviation:.1f} ({len(self.rows)} seeds)"


@dataclass(frozen=True)
class Entry:
    """One cell of a table, ours, the paper's or both."""

    paper: str = ""
    note: str = ""
    cell: Cell | None = None
    value: Value | None = None

    @property
    def number(self) -> float | None:
        try:
            return float(self.paper)
        except ValueError:
            return None

    @property
    def difference(self) -> str:
        # Of the numbers as they are printed, so that a reader who subtracts finds the same.
        if self.value is None or self.number is None:
            return ""
        return f"{round(self.value.mean, 1) - self.number:+.1f}".replace("-", "−")


@dataclass(frozen=True)
class Table:
    name: str
    title: str
    rows: tuple[str, ...]
    columns: tuple[str, ...]
    entries: dict[tuple[str, str], Entry]

    @property
    def heading(self) -> str:
        return f"Table {self.name}. {self.title}" if self.name in NINE else f"{self.title} ({self.name})"

    def at(self, row: str, column: str) -> Entry:
        return self.entries.get((row, column), Entry())

    def ours(self, row: str) -> bool:
        """Whether one of our runs fills something of a row."""
        return any(self.at(row, c).cell for c in self.columns)


def build(found: Sequence[Row], names: Iterable[str] = (*NINE, *FAMILIES)) -> list[Table]:
    """The tables of sound rows (`rows.check`); a family of small recipes has one for each data set it ran on."""
    paper = published()
    tables = []
    for name in names:
        mine = cells([name])
        if name in NINE:
            entries = {(p.row, p.column): Entry(p.value, p.note) for p in paper if p.table == name}
            tables.append(_table(name, TITLES[name], entries, mine, found, ""))
            continue
        where = sorted({r["dataset"] for r in found if r["recipe"].split("-")[0] == name}) or [""]
        for dataset in where:
            label = name if dataset in ("", name) else f"{name} on {dataset}"
            tables.append(_table(label, TITLES[name], {}, mine, found, dataset))
    return tables


def _table(
    name: str, title: str, entries: dict[tuple[str, str], Entry], mine: list[Cell], found: Sequence[Row], dataset: str
) -> Table:
    for cell in mine:
        there = entries.get((cell.row, cell.column), Entry())
        newest: dict[int, Row] = {}
        for row in sorted(found, key=lambda r: (r["when"], r["id"])):
            if cell.fits(row, dataset):
                newest[row["seed"]] = row
        value = Value(tuple(newest[s] for s in sorted(newest)), cell.metric) if newest else None
        entries[cell.row, cell.column] = Entry(there.paper, there.note, cell, value)
    rows, columns = zip(*entries)
    return Table(name, title, tuple(dict.fromkeys(rows)), tuple(dict.fromkeys(columns)), entries)


def markdown(table: Table) -> str:
    """Three lines a row of ours (paper, ours, difference), one a row of others."""
    nine = table.name in NINE
    lines = [f"### {table.heading}", "", "| " * (1 + nine) + "| " + " | ".join(table.columns) + " |"]
    lines.append("|---|" + "---|" * nine + "---:|" * len(table.columns))
    for row in table.rows:
        entries = [table.at(row, c) for c in table.columns]
        parts = []
        if nine:
            parts.append(("paper", [e.paper or ("–" if e.note else "") for e in entries]))
        if table.ours(row):
            parts.append(("ours", [str(e.value) if e.value else NOT_RUN if e.cell else "" for e in entries]))
        if any(e.difference for e in entries):
            parts.append(("difference", [e.difference for e in entries]))
        for number, (what, texts) in enumerate(parts):
            kind = f"{what} | " if nine else ""
            lines.append(f"| {row if number == 0 else ''} | {kind}" + " | ".join(texts) + " |")
    notes: dict[str, list[str]] = {}
    for (row, column), e in table.entries.items():
        if e.note and e.paper:
            notes.setdefault(e.note, []).append(f"{row}, {column}")
    lines += ["", *(f"- {of[0]}{' to ' + of[-1] if len(of) > 1 else ''}: {note}." for note, of in notes.items())]
    return "\n".join(lines).rstrip() + "\n"


def document(tables: Sequence[Table], refused: Sequence[tuple[Row, str]]) -> str:
    """All tables as one Markdown page, ending with the rows that were left out."""
    filled = sum(1 for t in tables for e in t.entries.values() if e.value)
    total = sum(1 for t in tables for e in t.entries.values() if e.cell)
    head = [
        "# Tables",
        "",
        f"{filled} of {total} numbers were run here. Ours: mean ± sample deviation over seeds, in percent; a dash is a "
        "dash in the paper.",
        "",
    ]
    tail = ["## Rows left out", "", *(f"- `{row['file']}`: {reason}." for row, reason in refused)] if refused else []
    return "\n".join([*head, *(markdown(t) for t in tables), *tail]).rstrip() + "\n"


def write_csv(tables: Sequence[Table], path: Path) -> None:
    """A line a cell, with the rows (`rows.identity`) that it is made of."""
    with replacing(path) as partial, open(partial, "w", newline="", encoding="utf-8") as f:
        writer = csv.writer(f, lineterminator="\n")
        heads = (
            "table",
            "row",
            "column",
            "paper",
            "ours",
            "deviation",
            "seeds",
            "difference",
            "recipe",
            "rows",
            "note",
        )
        writer.writerow(heads)
        for table in tables:
            for (row, column), e in table.entries.items():
                v = e.value
                ours = ["", "", ""] if e.cell is None else [NOT_RUN, "", ""]
                if v is not None:
                    ours = [f"{v.mean:.2f}", f"{v.deviation:.2f}" if len(v.rows) > 1 else "", str(len(v.rows))]
                recipe, ids = e.cell.recipe if e.cell else "", " ".join(r["id"] for r in v.rows) if v else ""
                difference = e.difference.replace("−", "-")
                writer.writerow([table.name, row, column, e.paper, *ours, difference, recipe, ids, e.note])


def plots(tables: Sequence[Table]) -> dict[str, str]:
    """Name -> <svg>: tables 3 and 7 over epochs, and for scenes how alpha moves what is learned."""
    found = {}
    for table in tables:
        if table.name in ("3", "7"):
            what = {"3": ("epoch of fine-tuning", "top-1, %"), "7": ("epoch of pretraining", "%")}[table.name]
            found[f"table{table.name}"] = svg.chart(table.heading, _by_epoch(table), *what, EPOCHS, log=True)
        elif table.name.split(" ")[0] == "scenes":
            series = _by_alpha(table)
            if series:
                name = "alpha" if table.name == "scenes" else f"alpha on {table.name.split(' ')[-1]}"
                title = f"How alpha moves what is learned ({table.name})"
                found[name] = svg.chart(title, series, "alpha: weight of motion against context", "R@1, %")
    return found


def _by_epoch(table: Table) -> list[svg.Series]:
    series = []
    for colour, row in enumerate(table.rows):
        entries = [(float(e), table.at(row, f"epoch {e}")) for e in EPOCHS]
        paper = [(x, e.number, 0.0) for x, e in entries if e.number is not None]
        ours = [(x, e.value.mean, e.value.deviation) for x, e in entries if e.value]
        series.append(svg.Series(f"{row}, paper", paper, colour, dashed=True))
        if ours:
            series.append(svg.Series(f"{row}, ours", ours, colour))
    return series


def _by_alpha(table: Table) -> list[svg.Series]:
    """A line a labelling, through the recipes that differ from the family's own in alpha alone."""
    alphas: list[tuple[float, str]] = []
    for row in table.rows:
        recipe = RECIPES.get(row)
        if recipe and isinstance(recipe.config, Pretraining):
            base = RECIPES[recipe.base].config if recipe.base else recipe.config
            alpha = recipe.config.objective.alpha
            if recipe.config.changed({"objective.alpha": 0.5}) == base.changed({"objective.alpha": 0.5}):
                alphas.append((alpha, row))
    series = []
    for colour, column in enumerate(table.columns):
        values = [(alpha, table.at(row, column).value) for alpha, row in sorted(alphas)]
        points = [(alpha, v.mean, v.deviation) for alpha, v in values if v]
        if len(points) > 1:
            series.append(svg.Series(column, points, colour))
    return series


def write(tables: Sequence[Table], refused: Sequence[tuple[Row, str]], out: Path) -> list[Path]:
    """tables.md, tables.csv and a picture a plot; their paths."""
    write_text(out / "tables.md", document(tables, refused))
    write_csv(tables, out / "tables.csv")
    paths = [out / "tables.md", out / "tables.csv"]
    for name, picture in plots(tables).items():
        paths.append(out / f"{name.replace(' ', '-')}.svg")
        write_text(paths[-1], svg.standalone(picture))
    return paths


def known_manifests(found: Iterable[Row]) -> dict[str, str]:
    """Name -> hash of the committed manifests that rows are of."""
    names = {row["dataset"] for row in found if "fault" not in row}
    return {p.stem: Manifest.read(p).sha256 for p in sorted(MANIFESTS.glob("*.csv")) if p.stem in names}
