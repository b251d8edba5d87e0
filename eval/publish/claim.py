"""The first screen of the page: what all of it is for, in a paragraph and a picture.

Bars of what neighbours share in the embedded scenes, before training and after, and from either half of the stream
alone where that ran.
"""

from __future__ import annotations

from collections.abc import Sequence

from eval.publish.tables import Table, Value
from eval.results import Row
from train.recipes import RECIPES

CLAIM = (
    "A compressed video has already taken itself apart: its <b>I-frames</b> show the scene, its <b>motion vectors</b> "
    "what moves. A video network that learns from both, without a label, finds videos that share both; one that learns "
    "from either finds its half."
)
SCENES = "The embedded scenes cross context (backgrounds) with motion (how things move): neither tells the other."
NETWORKS = {
    "untrained": "untrained",
    "scenes-context": "I-frames alone",
    "scenes-motion": "motion vectors alone",
    "scenes": "both",
}
"""Rows of the scenes' table, which are classes of the style, and what they learned from."""
SHARED = {"context R@1": "same context", "motion R@1": "same motion", "both R@1": "both"}
"""Its columns."""
ALTERED = ("motion R@1", "motion R@1 frozen", "opposite R@1 reversed")
"""Metrics of a diagnosis."""


def screen(tables: Sequence[Table], rows: Sequence[Row]) -> str:
    """The claim, and what bears it out of what ran here. `rows` are sound ones, `tables` are built of them."""
    text = f"<h1>Context and motion decoupling</h1><p>{CLAIM}</p>{_altered(rows)}"
    return f'<div class="hero"><div>{text}</div>{_picture(tables)}</div>'


def _picture(tables: Sequence[Table]) -> str:
    """Empty where the scenes were not run, or not both before training and after."""
    drawn = ({row: v for row in NETWORKS if len(v := _values(table, row)) == len(SHARED)} for table in tables)
    networks = next((of for of in drawn if {"untrained", "scenes"} <= of.keys()), None)
    if networks is None:
        return ""
    groups = "".join(_group(column, {row: of[column] for row, of in networks.items()}) for column in SHARED)
    key = "".join(f'<span><i class="{row}"></i>{NETWORKS[row]}</span>' for row in networks)
    seeds = max(len(v.rows) for values in networks.values() for v in values.values())
    over = f"Mean ± deviation of {seeds} seeds" if seeds > 1 else "One seed"
    dashes = "; dashes: by chance" if "<i" in groups else ""
    return (
        '<figure class="card claim"><h3>Nearest neighbours that share what a test scene shows, %</h3>'
        f'<div class="key">{key}</div><div class="groups">{groups}</div>'
        f"<figcaption>{SCENES} {over}{dashes}.</figcaption></figure>"
    )


def _values(table: Table, row: str) -> dict[str, Value]:
    return {column: value for column in SHARED if (value := table.at(row, column).value)}


def _group(column: str, values: dict[str, Value]) -> str:
    """A bar a network, each of which leads to a row it is made of, and a dashed line at chance."""
    bars = "".join(
        f'<a class="{row}" href="#row-{v.rows[0]["id"]}" title="{NETWORKS[row]}: {v}" '
        f'style="--value:{v.mean:.1f};--deviation:{v.deviation:.1f}"><b>{v.mean:.0f}</b></a>'
        for row, v in values.items()
    )
    known = [chance for v in values.values() for chance in v.beside("chance")]
    line = f'<i style="--value:{known[0]:.1f}"></i>' if known else ""
    return f'<div><div class="bars">{bars}{line}</div>{SHARED[column]}</div>'


def _altered(rows: Sequence[Row]) -> str:
    """What the latest diagnosis of the trained network says of its motion; empty where there is none."""
    wanted = {"recipe": "scenes", "dataset": "scenes", "epoch": RECIPES["scenes"].config.epochs}
    trained = [row for row in rows if wanted.items() <= row.items()]
    diagnosed = [row for row in trained if row["metrics"].keys() >= {*ALTERED}]
    if not diagnosed:
        return ""
    row = max(diagnosed, key=lambda r: r["when"])
    own, frozen, opposite = (f"{row['metrics'][name]:.0f} %" for name in ALTERED)
    return (
        f'<p>Does it see motion? <a href="#row-{row["id"]}">{own}</a> of its neighbours move as the query does, '
        f"{frozen} where the query is frozen to one frame, and {opposite} move the opposite way where it runs "
        "backwards.</p>"
    )
