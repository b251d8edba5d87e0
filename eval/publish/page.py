"""One HTML page of everything: tables, curves, confusions, what retrieval finds, motion, and where each number is from.

    python -m eval report --runs runs --out report.html --gallery runs/c3d \\
        --shards shards/ucf101 --manifest data_manifests/ucf101_split1.csv

The page needs nothing but itself: no script, no font, no picture from elsewhere.
"""

from __future__ import annotations

import base64
import io
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from pathlib import Path

import numpy as np

from eval import figures, neighbours
from eval.publish import claim
from eval.publish.cells import NINE
from eval.publish.collect import Refused
from eval.publish.plots import plot_name, table_plots, training_curves
from eval.publish.tables import NOT_RUN, Entry, Table, counted
from eval.results import KEYS, Data, Row
from eval.retrieve import Retrieval
from train import runs
from train.data import select

STYLE = Path(__file__).with_name("page.css")
PREVIEWS = 4  # videos taken apart
WIDTH = 228  # of a moving picture, pixels at most
QUALITY = 55  # of its WebP
TEXTS = ("year", "pretrained", "resolution", "architecture")
READING = (
    "What ran here beside what the paper reports, in percent: mean and sample deviation over seeds, then the "
    "difference. Every number of ours leads to the rows it is made of, every published one to its source."
)
PAPER = (
    "Published numbers are those of tables 1 to 9 of L. Huang, Y. Liu, B. Wang, P. Pan, Y. Xu, R. Jin, "
    "<i>Self-supervised Video Representation Learning by Context and Motion Decoupling</i>, CVPR 2021; they lie in "
    "<code>eval/publish/paper.csv</code>, with notes where the text and the tables disagree."
)


def page(
    tables: Sequence[Table],
    rows: Sequence[Row],
    refused: Refused,
    folder: Path,
    data: Data | None = None,
    found: Mapping[str, Retrieval] | None = None,
) -> str:
    """The whole page. `rows` are sound ones, `folder` holds the runs whose curves are drawn; videos of `data` are shown
    in motion, and what networks `found` among them."""
    pictures = table_plots(tables)
    ran_first = sorted(tables, key=lambda t: not any(e.value for e in t.entries.values()))
    sections = {
        "tables": ("Tables", f"<p>{READING}</p>{''.join(_table(t, pictures) for t in ran_first)}"),
        "curves": ("Training", _pair(_curves(folder, rows))),
        "confusion": ("Confusion", _pair(_confusions(rows))),
        "retrieval": ("Retrieval", _found(found) if found else ""),
        "motion": ("Motion", _previews(data) if data else ""),
        "provenance": ("Provenance", _provenance(rows, refused)),
    }
    sections = {name: s for name, s in sections.items() if s[1]}
    links = "".join(f'<a href="#{name}">{title}</a>' for name, (title, _) in sections.items())
    body = "".join(f'<section id="{n}"><h2>{title}</h2>{content}</section>' for n, (title, content) in sections.items())
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        '<link rel="icon" href="data:,">\n<title>Context and motion decoupling: results</title>\n'
        f"<style>\n{STYLE.read_text(encoding='utf-8')}</style>\n</head>\n<body>\n"
        f"<nav><div><b>Context and motion</b>{links}</div></nav>\n<main>\n{_head(tables, rows, refused)}\n{body}\n"
        f"<footer>Made by <code>python -m eval report</code>, {runs.git_commit() or 'outside a checkout'}."
        "</footer>\n</main>\n</body>\n</html>\n"
    )


def _head(tables: Sequence[Table], rows: Sequence[Row], refused: Refused) -> str:
    facts = {f"{what} run here": how_many for what, how_many in counted(tables).items()}
    facts["result rows"] = str(len(rows))
    facts["runs"] = str(len({(r["recipe"], r["pretraining"], r["seed"], r["trained_on"]) for r in rows}))
    facts["rows left out"] = str(len(refused))
    boxes = "".join(f"<div><b>{number}</b><span>{what}</span></div>" for what, number in facts.items())
    return f'{claim.screen(tables, rows)}<div class="facts">{boxes}</div>'


# ---- tables


def _table(table: Table, pictures: dict[str, str]) -> str:
    heads = "".join(f"<th{' class=text' * (c in TEXTS)}>{escape(c)}</th>" for c in table.columns)
    lines, mixed = [], not all(map(table.ours, table.rows))
    if table.chance:
        cells = "".join(f"<td>{table.chance.get(c, '')}</td>" for c in table.columns)
        lines.append(f"<tr><th>chance</th>{cells}</tr>")
    for row in table.rows:
        cells = "".join(_cell(table.at(row, c), c) for c in table.columns)
        kind = ' class="ours"' if mixed and table.ours(row) else ""
        lines.append(f"<tr{kind}><th>{escape(row)}</th>{cells}</tr>")
    listed = "".join(f"<li>{escape(note)}</li>" for note in table.notes)
    name, _, title = table.heading.partition(". ") if table.name in NINE else (table.name, "", table.title)
    plot = pictures.get(plot_name(table), "")
    drawn = f'<div class="plot">{_svg(plot, f"plot of table {table.name}")}</div>' if plot else ""
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
        return f'<td class="missing">{paper}<small>{NOT_RUN}</small></td>'
    v = entry.value
    seeds = " ".join(f'<a href="#row-{r["id"]}" title="{n:.1f}">{r["seed"]}</a>' for r, n in zip(v.rows, v.numbers))
    spread = f' <span class="spread">± {v.deviation:.1f}</span>' if len(v.rows) > 1 else ""
    beside = f"<small>paper {paper}, {entry.difference}</small>" if entry.paper else ""
    which = f"<small>{'seed' if len(v.rows) == 1 else 'seeds'} {seeds}</small>"
    return f'<td><b><a href="#row-{v.rows[0]["id"]}">{v.mean:.1f}</a></b>{spread}{beside}{which}</td>'


def _pair(cards: Iterable[str]) -> str:
    cards = list(cards)
    return f'<div class="pair">{"".join(cards)}</div>' if cards else ""


# ---- pictures


def _curves(folder: Path, rows: Sequence[Row]) -> Iterable[str]:
    """A card a recipe."""
    for name, folders, picture in training_curves(folder, rows):
        listed = ", ".join(f"<code>{escape(f)}</code>" for f in folders)
        drawn = _svg(picture, f"training of {name}")
        yield f'<div class="card"><h3>{escape(name)}<small>{listed}</small></h3>{drawn}</div>'


def _confusions(rows: Sequence[Row]) -> Iterable[str]:
    """A card for the latest classification of each recipe, pretraining and data set at its last epoch."""
    latest: dict[tuple[str, ...], Row] = {}
    for row in sorted(rows, key=lambda r: (r["epoch"], r["when"])):
        if row["kind"] == "classification" and row.get("confusion"):
            latest[row["recipe"], row["pretraining"], row["dataset"]] = row
    for (recipe, pretraining, dataset), row in latest.items():
        name = f"{recipe}, from {pretraining} on {dataset}" if pretraining else f"{recipe} on {dataset}"
        numbers = ", ".join(f"{k} {v:.1f}" for k, v in row["metrics"].items())
        linked = f'seed {row["seed"]}, <a href="#row-{row["id"]}">{numbers}</a>'
        figure = figures.confusion(row["classes"], np.array(row["confusion"]))
        drawn = _svg(figures.svg(figure, name), f"confusion of {name}")
        yield f'<div class="card"><h3>{escape(name)}<small>{linked}</small></h3>{drawn}</div>'


def _found(found: Mapping[str, Retrieval]) -> str:
    """A few queries with what each network finds."""
    first = next(iter(found.values()))
    shards = first.data.shards
    meanings = neighbours.meanings(shards.classes)
    key = "".join(
        f'<span><i style="background:{colour}"></i>{neighbours.MARKS[colour]} {what}</span>'
        for colour, what in meanings.items()
    )
    finds = []
    for query in neighbours.chosen(found):
        shown = _figure(animation(*neighbours.moving(shards, query.video)), query.label)
        groups = f'<div class="group"><span>query</span>{shown}</div>'
        for name, nearest in query.neighbours.items():
            strip = "".join(
                _figure(animation(*neighbours.moving(shards, n.video)), n.label, n.verdict) for n in nearest
            )
            groups += f'<div class="group"><span>nearest, {escape(name)}</span><div class="strip">{strip}</div></div>'
        finds.append(f'<div class="find">{groups}</div>')
    return (
        f'<p>{escape(first.data.name)}: {escape(first.protocol)}.</p><div class="key">{key}</div>'
        f'<div class="card scroll"><div class="finds">{"".join(finds)}</div></div>'
    )


def _previews(data: Data) -> str:
    """A few test videos, spread over the classes: the clip, its I-frame, its motion as colours and as arrows."""
    shards, cards = data.shards, []
    videos, _ = select(shards, data.manifest.subset("test"))
    for v in videos[neighbours.spread(shards.label[videos], PREVIEWS)].tolist():
        pictures = {
            "clip": neighbours.moving(shards, v),
            "I-frame: the context": ([neighbours.context(shards, v)], 1.0),
            "motion vectors": neighbours.moving(shards, v, "motion"),
            "on the frames": neighbours.moving(shards, v, "arrows"),
        }
        strip = "".join(_figure(animation(*frames), what) for what, frames in pictures.items())
        path = f"<small><code>{escape(shards.paths[v])}</code></small>"
        head = f"<h3>{escape(neighbours.label_name(shards, v))}{path}</h3>"
        cards.append(f'<div class="preview">{head}<div class="strip">{strip}</div></div>')
    text = (
        "What the shards hold: the hue of the motion says its direction (right red, down yellow, left azure, up "
        "violet), its saturation how far a block moved; hatched grey has no vector."
    )
    return f'<p>{text}</p><div class="card">{"".join(cards)}</div>'


def _figure(source: str, caption: str, colour: str = "") -> str:
    style = f' style="border-color:{colour}"' if colour else ""
    text = escape(caption)
    return f'<figure><img src="{source}" alt="{text}"{style}><figcaption>{text}</figcaption></figure>'


def _svg(picture: str, title: str) -> str:
    """An SVG document as a picture of its own, so that its identifiers and styles meet no others."""
    source = base64.b64encode(picture.encode()).decode("ascii")
    return f'<img class="chart" src="data:image/svg+xml;base64,{source}" alt="{escape(title)}">'


def animation(frames: Sequence[np.ndarray], rate: float) -> str:
    """uint8 RGB frames (H, W, 3) of equal size as an endless WebP of `rate` frames a second, no wider than WIDTH: a
    data: URI. One frame gives a still."""
    try:
        from PIL import Image
    except ImportError as error:
        raise ValueError("moving pictures need Pillow, which matplotlib brings: pip install '.[eval]'") from error
    step = -(-frames[0].shape[1] // WIDTH)  # by whole steps, each pixel the mean of those it stands for
    pictures = [Image.fromarray(frame).reduce(step) for frame in frames]
    buffer, milliseconds = io.BytesIO(), round(1000 / min(max(rate, 1.0), 50.0))
    options = {"save_all": True, "append_images": pictures[1:], "duration": milliseconds, "loop": 0}
    pictures[0].save(buffer, "WEBP", quality=QUALITY, method=3, **(options if len(pictures) > 1 else {}))
    return "data:image/webp;base64," + base64.b64encode(buffer.getvalue()).decode("ascii")


# ---- provenance


def _provenance(rows: Sequence[Row], refused: Refused) -> str:
    left_out = "".join(f"<li><code>{escape(row['file'])}</code>: {escape(why)}.</li>" for row, why in refused)
    parts = [f'<div class="card" id="paper"><h3>Published numbers</h3><p>{PAPER}</p></div>']
    if left_out:
        parts.append(f'<div class="card" id="left-out"><h3>Rows left out</h3><ul class="notes">{left_out}</ul></div>')
    if rows:
        ordered = sorted(rows, key=lambda r: (r["kind"], r["recipe"], r["dataset"], r["epoch"], r["seed"], r["when"]))
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
