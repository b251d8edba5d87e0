"""One HTML page of everything: tables, curves, confusions, what retrieval finds, motion, and where each number is from.

    python -m eval report --runs runs --out report.html --gallery runs/c3d \\
        --shards shards/ucf101 --manifest data_manifests/ucf101_split1.csv

The page needs nothing but itself: no script, no font, no picture from elsewhere.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterable, Sequence
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any

from eval import svg
from eval.cells import NINE
from eval.gallery import FOUND, HALF, MARKS, MISSED
from eval.rows import KEYS, Row
from eval.tables import NOT_RUN, Entry, Table, plots
from train import runs

if TYPE_CHECKING:
    from eval.moving import Found, Preview

STYLE = Path(__file__).with_name("page.css")
POINTS = 150  # of a curve
COUNTS = 24  # classes up to which a confusion has its names and counts written into it
ACCURACIES = {"context_accuracy": 0, "motion_accuracy": 1, "class_accuracy": 2}
TEXTS = ("year", "pretrained", "resolution", "architecture")
PAPER = (
    "Published numbers are those of tables 1 to 9 of L. Huang, Y. Liu, B. Wang, P. Pan, Y. Xu, R. Jin, "
    "<i>Self-supervised Video Representation Learning by Context and Motion Decoupling</i>, CVPR 2021; they lie in "
    "<code>eval/paper.csv</code>, with notes where the text and the tables disagree."
)


def page(
    tables: Sequence[Table],
    found: Sequence[Row],
    refused: Sequence[tuple[Row, str]],
    folder: Path,
    gallery: Sequence[Found] = (),
    previews: Sequence[Preview] = (),
    about_gallery: str = "",
) -> str:
    """The whole page. `found` are sound rows, `folder` holds the runs whose curves are drawn."""
    curves, confusions = list(_curves(folder)), list(_confusions(found))
    pictures = plots(tables)
    sections = {
        "tables": ("Tables", "".join(_table(t, pictures) for t in tables)),
        "curves": ("Training", _pair(curves)),
        "confusion": ("Confusion", _pair(confusions)),
        "retrieval": ("Retrieval", _gallery(gallery, about_gallery)),
        "motion": ("Motion", _previews(previews)),
        "provenance": ("Provenance", _provenance(found, refused)),
    }
    sections = {name: s for name, s in sections.items() if s[1]}
    links = "".join(f'<a href="#{name}">{title}</a>' for name, (title, _) in sections.items())
    body = "".join(f'<section id="{n}"><h2>{title}</h2>{content}</section>' for n, (title, content) in sections.items())
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        '<link rel="icon" href="data:,">\n<title>Context and motion decoupling: results</title>\n'
        f"<style>\n{STYLE.read_text(encoding='utf-8')}{svg.STYLE}</style>\n</head>\n<body>\n"
        f"<nav><div><b>Context and motion</b>{links}</div></nav>\n<main>\n{_head(tables, found, refused)}\n{body}\n"
        f"<footer>Made by <code>python -m eval report</code>, {escape(runs.git_commit()[:12] or 'outside a checkout')}."
        "</footer>\n</main>\n</body>\n</html>\n"
    )


def _head(tables: Sequence[Table], found: Sequence[Row], refused: Sequence[object]) -> str:
    entries = [e for t in tables for e in t.entries.values() if e.cell]
    facts = {
        f"{sum(e.value is not None for e in entries)} of {len(entries)}": "numbers run here",
        str(len(found)): "result rows",
        str(len({(r["recipe"], r["pretraining"], r["seed"], r["trained_on"]) for r in found})): "runs",
        str(len(refused)): "rows left out",
    }
    boxes = "".join(f"<div><b>{number}</b><span>{what}</span></div>" for number, what in facts.items())
    return (
        "<h1>Context and motion decoupling</h1><p>What ran here beside what the paper reports, in percent: mean and "
        "sample deviation over seeds, then the difference. Every number of ours leads to the rows it is made of, every "
        f'published one to its source.</p><div class="facts">{boxes}</div>'
    )


# ---- tables


def _table(table: Table, pictures: dict[str, str]) -> str:
    heads = "".join(f"<th{' class=text' * (c in TEXTS)}>{escape(c)}</th>" for c in table.columns)
    lines, mixed = [], not all(map(table.ours, table.rows))
    for row in table.rows:
        cells = "".join(_cell(table.at(row, c), c) for c in table.columns)
        kind = ' class="ours"' if mixed and table.ours(row) else ""
        lines.append(f"<tr{kind}><th>{escape(row)}</th>{cells}</tr>")
    notes = dict.fromkeys(f"{e.note}." for e in table.entries.values() if e.note and e.paper)
    listed = "".join(f"<li>{escape(n)}</li>" for n in notes)
    name, _, title = table.heading.partition(". ") if table.name in NINE else (table.name, "", table.title)
    plot = {"3": "table3", "7": "table7"}.get(table.name) or ("alpha" + table.name.removeprefix("scenes"))
    drawn = f'<div class="plot">{pictures[plot]}</div>' if plot in pictures else ""
    return (
        f'<div class="card" id="table-{escape(table.name.replace(" ", "-"))}"><h3>{escape(name)}'
        f'<small>{escape(title)}</small></h3><div class="side"><div class="wide"><table class="numbers"><thead><tr><th>'
        f"</th>{heads}</tr></thead><tbody>{''.join(lines)}</tbody></table></div>{drawn}</div>"
        f"{f'<ul class=notes>{listed}</ul>' if listed else ''}</div>"
    )


def _cell(entry: Entry, column: str) -> str:
    if column in TEXTS:
        return f'<td class="text">{escape(entry.paper or ("–" if entry.note else ""))}</td>'
    note = f' title="{escape(entry.note)}"' if entry.note else ""
    paper = f'<a class="paper" href="#paper"{note}>{escape(entry.paper)}</a>' if entry.paper else ""
    if entry.cell is None:
        return f"<td>{paper or '–' if entry.note or entry.paper else ''}</td>"
    if entry.value is None:
        return f"<td>{paper}<small>{NOT_RUN}</small></td>"
    v = entry.value
    seeds = " ".join(f'<a href="#row-{r["id"]}" title="{n:.1f}">{r["seed"]}</a>' for r, n in zip(v.rows, v.numbers))
    spread = f' <span class="spread">± {v.deviation:.1f}</span>' if len(v.rows) > 1 else ""
    beside = f"<small>paper {paper}, {entry.difference}</small>" if entry.paper else ""
    which = f"<small>{'seed' if len(v.rows) == 1 else 'seeds'} {seeds}</small>"
    return f'<td><b><a href="#row-{v.rows[0]["id"]}">{v.mean:.1f}</a></b>{spread}{beside}{which}</td>'


def _pair(cards: Iterable[str]) -> str:
    cards = list(cards)
    return f'<div class="pair">{"".join(cards)}</div>' if cards else ""


# ---- curves


def _curves(folder: Path) -> Iterable[str]:
    """A card a recipe: the accuracies of its runs while training, seeds over one another."""
    logs: dict[str, dict[str, list[dict[str, Any]]]] = defaultdict(dict)
    for path in sorted(folder.glob("*/run.json")):
        log = path.with_name("metrics.jsonl")
        try:
            about = runs.read(path.parent)
            lines = [json.loads(text) for text in log.read_text().splitlines() if text.endswith("}")]
            began = about["pretrained"].get("recipe")
            name = f"{about['recipe']} on {about['trained_on']}" + (f", from {began}" if began else "")
        except (ValueError, OSError, KeyError):  # no run, or one that has only begun
            continue
        logs[name][path.parent.name] = lines
    for name, each in logs.items():
        series, seen = [], set()
        for lines in each.values():
            for column, colour in ACCURACIES.items():
                points = [(x["epoch"], 100 * x[column], 0.0) for x in lines if x.get(column) is not None]
                if len(points) > 1:
                    label = "" if column in seen else column.replace("_", " ")
                    seen.add(column)
                    series.append(svg.Series(label, _thinned(points), colour, dots=False))
        if series:
            chart = svg.chart(f"Training of {name}", series, "epoch", "batch accuracy, %")
            folders = ", ".join(f"<code>{escape(f)}</code>" for f in each)
            yield f'<div class="card"><h3>{escape(name)}<small>{folders}</small></h3>{chart}</div>'


def _thinned(points: list[tuple[float, float, float]]) -> list[tuple[float, float, float]]:
    """At most POINTS points, each the mean of its neighbours."""
    size = -(-len(points) // POINTS)
    groups = [points[n : n + size] for n in range(0, len(points), size)]
    return [(sum(x for x, _, _ in g) / len(g), sum(y for _, y, _ in g) / len(g), 0.0) for g in groups]


# ---- confusions


def _confusions(found: Sequence[Row]) -> Iterable[str]:
    """A card for the latest classification of each recipe, pretraining and data set at its last epoch."""
    latest: dict[tuple[str, ...], Row] = {}
    for row in sorted(found, key=lambda r: (r["epoch"], r["when"])):
        if row["kind"] == "classification" and row.get("confusion"):
            latest[row["recipe"], row["pretraining"], row["dataset"]] = row
    for (recipe, pretraining, dataset), row in latest.items():
        began = f", from {pretraining}" if pretraining else ""
        numbers = ", ".join(f"{k} {v:.1f}" for k, v in row["metrics"].items())
        linked = f'seed {row["seed"]}, <a href="#row-{row["id"]}">{numbers}</a>'
        yield (
            f'<div class="card"><h3>{escape(recipe + began)} on {escape(dataset)}<small>{linked}; a row is a true '
            "class, a column what it is taken for</small></h3>"
            f"{confusion(row['classes'], row['confusion'])}</div>"
        )


def confusion(classes: Sequence[str], counts: Sequence[Sequence[int]]) -> str:
    """An <svg> of a confusion matrix, shades by share of the row; names and counts where they fit."""
    named = len(classes) <= COUNTS
    size = 24 if named else max(4, 560 // len(classes))
    left = 14 + 6 * max(map(len, classes)) if named else 8
    side = size * len(classes)
    wide, high = left + side + 8, side + 16
    out = [f'<svg class="confusion" viewBox="0 0 {wide} {high}" style="max-width:{1.5 * wide:.0f}px" role="img">']
    for i, (name, line) in enumerate(zip(classes, counts)):
        y, total = 8 + i * size, sum(line)
        if named:
            out.append(f'<text x="{left - 8}" y="{y + size / 2 + 4}" text-anchor="end">{escape(name)}</text>')
        for j, count in enumerate(line):
            if not count:
                continue
            x, share = left + j * size, count / total
            text = f"{name} taken for {classes[j]}: {count} of {total}"
            box = f'x="{x}" y="{y}" width="{size}" height="{size}"'
            out.append(f'<rect class="cell" {box} fill-opacity="{0.08 + 0.82 * share:.2f}">')
            out.append(f"<title>{escape(text)}</title></rect>")
            if named:
                out.append(f'<text class="count" x="{x + size / 2}" y="{y + size / 2 + 4}">{count}</text>')
    out.append(f'<rect class="grid" x="{left}" y="8" width="{side}" height="{side}"/></svg>')
    return "".join(out)


# ---- pictures


def _figure(source: str, caption: str, colour: str = "") -> str:
    style = f' style="border-color:{colour}"' if colour else ""
    text = escape(caption)
    return f'<figure><img src="{source}" alt="{text}"{style}><figcaption>{text}</figcaption></figure>'


def _gallery(gallery: Sequence[Found], about: str) -> str:
    if not gallery:
        return ""
    verdicts = {FOUND: "as the query", HALF: "its context or its motion", MISSED: "another class"}
    if not all("/" in found.query.label for found in gallery):
        del verdicts[HALF]
    key = "".join(f'<span><i style="background:{c}"></i>{MARKS[c]} {what}</span>' for c, what in verdicts.items())
    finds = []
    for found in gallery:
        groups = f'<div class="group"><span>query</span>{_figure(found.query.source, found.query.label)}</div>'
        for name, clips in found.neighbours.items():
            strip = "".join(_figure(c.source, c.label, c.verdict) for c in clips)
            groups += f'<div class="group"><span>nearest, {escape(name)}</span><div class="strip">{strip}</div></div>'
        finds.append(f'<div class="find">{groups}</div>')
    return (
        f'<p>{escape(about)}</p><div class="key">{key}</div><div class="card scroll"><div class="finds">'
        f"{''.join(finds)}</div></div>"
    )


def _previews(previews: Sequence[Preview]) -> str:
    if not previews:
        return ""
    cards = []
    for p in previews:
        strip = "".join(_figure(source, what) for what, source in p.pictures.items())
        head = f"<h3>{escape(p.label)}<small><code>{escape(p.path)}</code></small></h3>"
        cards.append(f'<div class="preview">{head}<div class="strip">{strip}</div></div>')
    text = (
        "What the shards hold: the hue of the motion says its direction (right red, down yellow, left azure, up "
        "violet), its saturation how far a block moved; hatched grey has no vector."
    )
    return f'<p>{text}</p><div class="card">{"".join(cards)}</div>'


# ---- provenance


def _provenance(found: Sequence[Row], refused: Sequence[tuple[Row, str]]) -> str:
    left_out = "".join(f"<li><code>{escape(row['file'])}</code>: {escape(why)}.</li>" for row, why in refused)
    parts = [f'<div class="card" id="paper"><h3>Published numbers</h3><p>{PAPER}</p></div>']
    if left_out:
        parts.append(f'<div class="card" id="left-out"><h3>Rows left out</h3><ul class="notes">{left_out}</ul></div>')
    if found:
        ordered = sorted(found, key=lambda r: (r["kind"], r["recipe"], r["dataset"], r["epoch"], r["seed"], r["when"]))
        parts.append(f'<div class="card"><h3>Result rows</h3>{"".join(map(_row, ordered))}</div>')
    return "".join(parts)


def _row(row: Row) -> str:
    numbers = ", ".join(f"{name} {value:.1f}" for name, value in row["metrics"].items())
    place = f"seed {row['seed']}, epoch {row['epoch']:g}, {row['network']} network, on {row['dataset']}"
    pairs = {k: str(row[k]) for k in KEYS if k not in ("metrics", "kind", "recipe") and row[k] != ""}
    pairs = {"metrics": numbers, **pairs, "file": row["file"]}
    listed = "".join(f"<dt>{escape(k)}</dt><dd>{_value(k, v)}</dd>" for k, v in pairs.items())
    return (
        f'<details id="row-{row["id"]}"><summary><code>{row["id"][:8]}</code><b>{escape(row["recipe"])}</b>'
        f"<span>{escape(row['kind'])}, {escape(place)}</span></summary><dl>{listed}</dl></details>"
    )


def _value(key: str, value: str) -> str:
    return f"<code>{escape(value)}</code>" if key.endswith(("sha256", "commit", "file")) else escape(value)
