"""Tables from result rows: the paper's number, ours as mean and deviation over seeds, and the difference.

    python -m eval tables --runs runs --results eval/results.csv --out tables

No network is touched, and no GPU is needed. A cell that nothing fills says 'not run'.
"""

from __future__ import annotations

import csv
import statistics
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from eval.publish.cells import FAMILIES, NINE, TITLES, Cell, cells, published
from eval.publish.collect import Refused
from eval.results import Row
from preprocess.files import replacing, write_text

NOT_RUN = "not run"
BYTES = {"shards_sha256": ("dataset", "measured"), "training_sha256": ("trained_on", "trained")}
"""Hashes of shards' bytes, which comparable rows may differ in; of which data set, and what was done on them."""
HEADS = ("table", "row", "column", "paper", "ours", "deviation", "seeds", "difference", "recipe", "rows", "note")


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

    def beside(self, key: str) -> list[float]:
        """Standard errors ('errors') or 'chance' of its numbers, of the rows that have them."""
        return [row[key][self.metric] for row in self.rows if self.metric in row.get(key, {})]

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
    provenance: str = ""
    """Which of its seeds saw shards of other bytes than most of the table; empty where all saw the same."""

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

    def beside(self, column: str, key: str) -> list[float]:
        """`Value.beside` of a whole column."""
        values = (self.at(row, column).value for row in self.rows)
        return [number for value in values if value for number in value.beside(key)]

    @property
    def chance(self) -> dict[str, str]:
        """Its first row, by column: of a family of small recipes, where a row of ours knows it."""
        known = {c: self.beside(c, "chance") for c in self.columns if self.name not in NINE}
        return {c: f"{of[0]:.1f}" for c, of in known.items() if of}

    @property
    def notes(self) -> list[str]:
        """Sentences on some of its cells, and on the errors of its columns."""
        found: dict[str, dict[str, list[str]]] = {}
        for (row, column), e in self.entries.items():
            for note in (e.note if e.paper else "", e.provenance):
                if note:
                    found.setdefault(note, {}).setdefault(row, []).append(column)
        notes = [f"{'; '.join(self._cells(*of) for of in rows.items())}: {note}." for note, rows in found.items()]
        known = {c: of for c in self.columns if (of := self.beside(c, "errors"))}
        if known:
            every = sum(len(e.value.rows) for (_, c), e in self.entries.items() if e.value and c in known)
            have = sum(map(len, known.values()))
            which = "" if have == every else f" ({have} of {every} numbers were stored with theirs)"
            errors = ", ".join(f"{c} {_range(of)}" for c, of in known.items())
            notes.append(f"One standard error, groups of clips resampled{which}: {errors} points.")
        return notes

    def _cells(self, row: str, columns: Sequence[str]) -> str:
        """What a note calls some cells of a row: by the row's name where they are all of them."""
        whole = [*columns] == [c for c in self.columns if (row, c) in self.entries]
        return row if whole and len(columns) > 1 else f"{row} ({', '.join(columns)})"

    def ours(self, row: str) -> bool:
        """Whether one of our runs fills something of a row."""
        return any(self.at(row, c).cell for c in self.columns)


def build(rows: Sequence[Row], names: Iterable[str] = (*NINE, *FAMILIES)) -> list[Table]:
    """The tables of sound rows (`collect.check`); a family of small recipes has one for each data set it ran on."""
    tables = []
    for name in names:
        if name in NINE:
            entries = {(p.row, p.column): Entry(p.value, p.note, p.cell) for p in published() if p.table == name}
            tables.append(_table(name, TITLES[name], entries, rows))
            continue
        entries = {(cell.row, cell.column): Entry(cell=cell) for cell in cells([name])}
        if not entries:  # no recipe of it
            continue
        mine = {r["dataset"] for r in rows if any(e.cell and e.cell.is_of(r, r["dataset"]) for e in entries.values())}
        for dataset in sorted(mine) or [""]:
            label = name if dataset in ("", name) else f"{name} on {dataset}"
            tables.append(_table(label, TITLES[name], entries, rows, dataset))
    return tables


def _table(
    name: str, title: str, entries: Mapping[tuple[str, str], Entry], rows: Sequence[Row], dataset: str = ""
) -> Table:
    """The table of some entries, with what ran here for their cells."""
    filled = {place: replace(e, value=_value(e.cell, rows, dataset)) for place, e in entries.items()}
    values = [e.value for e in filled.values() if e.value]
    usual = {key: _usual(values, key, among) for key, (among, _) in BYTES.items()}
    filled = {place: replace(e, provenance=_provenance(e.value, usual)) for place, e in filled.items()}
    lines, columns = zip(*filled)
    return Table(name, title, tuple(dict.fromkeys(lines)), tuple(dict.fromkeys(columns)), filled)


def _value(cell: Cell | None, rows: Sequence[Row], dataset: str) -> Value | None:
    fitting = sorted((r for r in rows if cell and cell.fits(r, dataset)), key=lambda r: (r["when"], r["id"]))
    newest = {row["seed"]: row for row in fitting}
    return Value(tuple(newest[seed] for seed in sorted(newest)), cell.metric) if cell and newest else None


def _usual(values: Iterable[Value], key: str, among: str) -> dict[str, str]:
    """Name of a data set -> the hash that most rows of a table have."""
    rows = {row["id"]: row for value in values for row in value.rows}
    counted = Counter((row[among], row[key]) for row in rows.values())
    return {name: of for (name, of), _ in sorted(counted.items(), key=lambda item: (item[1], item[0]))}


def _range(numbers: Sequence[float]) -> str:
    ends = (f"{min(numbers):.1f}", f"{max(numbers):.1f}")
    return " to ".join(dict.fromkeys(ends))


def _provenance(value: Value | None, usual: Mapping[str, Mapping[str, str]]) -> str:
    said = []
    for key, (among, done) in BYTES.items():
        for row in value.rows if value else ():
            if row[key] != (most := usual[key][row[among]]):
                said.append(
                    f"seed {row['seed']} was {done} on shards of other bytes ({row[key][:8]}) than most ({most[:8]})"
                )
    return "; ".join(said)


def markdown(table: Table) -> str:
    """Three lines a row of ours (paper, ours, difference), one a row of others and of chance."""
    nine = table.name in NINE
    lines = [f"### {table.heading}", "", "| " * (1 + nine) + "| " + " | ".join(table.columns) + " |"]
    lines.append("|---|" + "---|" * nine + "---:|" * len(table.columns))
    if table.chance:
        lines.append("| chance | " + " | ".join(table.chance.get(c, "") for c in table.columns) + " |")
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
    return "\n".join([*lines, "", *(f"- {note}" for note in table.notes)]).rstrip() + "\n"


def document(tables: Sequence[Table], refused: Refused) -> str:
    """All tables as one Markdown page, ending with the rows that were left out."""
    run = " and ".join(f"{how_many} {what}" for what, how_many in counted(tables).items())
    about = f"Run here: {run}. Ours: mean ± sample deviation over seeds, in percent; a dash is"
    head = ["# Tables", "", f"{about} a dash in the paper.", ""]
    tail = ["## Rows left out", "", *(f"- `{row['file']}`: {reason}." for row, reason in refused)] if refused else []
    return "\n".join([*head, *(markdown(t) for t in tables), *tail]).rstrip() + "\n"


def idle(tables: Sequence[Table], rows: Sequence[Row]) -> list[str]:
    """What of the rows fills no cell at all: 'RECIPE on DATASET', each once."""
    shown = {row["id"] for t in tables for e in t.entries.values() if e.value for row in e.value.rows}
    every = {row["id"]: f"{row['recipe']} on {row['dataset']}" for row in rows}
    return sorted({*every.values()} - {every[each] for each in shown})


def counted(tables: Sequence[Table]) -> dict[str, str]:
    """How many of the numbers that runs of ours can fill are filled: the paper's, and those beside the paper."""
    found = {}
    for what, nine in (("of the paper's numbers", True), ("of our own", False)):
        entries = [e for t in tables if (t.name in NINE) == nine for e in t.entries.values() if e.cell]
        if entries:
            found[what] = f"{sum(e.value is not None for e in entries)} of {len(entries)}"
    return found


def write_csv(tables: Sequence[Table], path: Path) -> None:
    """A line a cell, with the rows (`results.identity`) that it is made of."""
    with replacing(path) as partial, open(partial, "w", newline="", encoding="utf-8") as f:
        writer = csv.writer(f, lineterminator="\n")
        writer.writerow(HEADS)
        for table in tables:
            for (row, column), e in table.entries.items():
                v = e.value
                ours = ["", "", ""] if e.cell is None else [NOT_RUN, "", ""]
                if v is not None:
                    ours = [f"{v.mean:.2f}", f"{v.deviation:.2f}" if len(v.rows) > 1 else "", str(len(v.rows))]
                recipe, ids = e.cell.recipe if e.cell else "", " ".join(r["id"] for r in v.rows) if v else ""
                difference = e.difference.replace("−", "-")
                note = "; ".join(filter(None, (e.note, e.provenance)))
                writer.writerow([table.name, row, column, e.paper, *ours, difference, recipe, ids, note])


def write(tables: Sequence[Table], refused: Refused, plots: Mapping[str, str], out: Path) -> list[Path]:
    """tables.md, tables.csv and a picture a plot; their paths."""
    write_text(out / "tables.md", document(tables, refused))
    write_csv(tables, out / "tables.csv")
    for name, picture in plots.items():
        write_text(out / f"{name}.svg", picture)
    return [out / "tables.md", out / "tables.csv", *(out / f"{name}.svg" for name in plots)]
