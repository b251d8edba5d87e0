"""Figures of one kind: written as PNG, or as SVG that is read on light and dark pages."""

from __future__ import annotations

import io
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from preprocess.files import replacing

if TYPE_CHECKING:
    from matplotlib.figure import Figure

INK, BLUE = "#1b1f24", "#2456d6"
PAGE_INKS = "svg { color: #1b1f24 } @media (prefers-color-scheme: dark) { svg { color: #e8ebf0 } }"
NUMBERED = 20  # classes up to which a confusion has its counts written into it
CONFUSION_KEY = "row: true class; column: taken for; shade: share of the row's videos"


@contextmanager
def drawing() -> Iterator[type[Figure]]:
    """Matplotlib's Figure, to be filled and written with our colours; ValueError where it is not installed."""
    try:
        import matplotlib
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ValueError("the picture needs matplotlib: pip install '.[eval]'") from error
    inked: tuple[Any, ...] = ("text.color", "axes.edgecolor", "axes.labelcolor", "xtick.color", "ytick.color")
    with matplotlib.rc_context(dict.fromkeys(inked, INK)):
        yield Figure


def save_png(figure: Figure, out: Path) -> Path:
    with replacing(out) as partial:
        figure.savefig(partial, format="png")
    return out


def svg(figure: Figure, title: str) -> str:
    """The figure as an SVG document: text as text, no background, ink in the colour of the page; always the same."""
    import matplotlib

    buffer = io.StringIO()
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": title}):
        metadata = dict.fromkeys(("Creator", "Date", "Format", "Type"))
        figure.savefig(buffer, format="svg", transparent=True, metadata={**metadata, "Title": title})
    style = '<style type="text/css">'
    return buffer.getvalue().replace(INK, "currentColor").replace(style, f"{style}{PAGE_INKS} ", 1)


def confusion(classes: Sequence[str], counts: np.ndarray, title: str = "") -> Figure:
    """A line a true class, a column a class that it is taken for; shades the share of the line's videos, grey for a
    class without any. counts: int (K, K). Up to `NUMBERED` classes the counts are written into it."""
    k, total = len(classes), counts.sum(1, keepdims=True)
    share = np.where(total, 100 * counts / np.maximum(total, 1), np.nan)
    cell, letters = (0.5, 9.0) if k <= NUMBERED else (0.115, 6.0)  # inches, points
    margin = 0.6 + max(map(len, classes)) * letters * 0.6 / 72  # room for the longest name
    side = margin + cell * k
    with drawing() as Figure:
        from matplotlib.colors import LinearSegmentedColormap, to_rgb

        figure = Figure(figsize=(max(side + 0.9, 4.5), side + 0.4), dpi=150)
        wide, high = figure.get_size_inches()
        axes = figure.add_axes((margin / wide, 0.1 / high, cell * k / wide, cell * k / high))
        ends = [(*to_rgb(BLUE), 0.0), (*to_rgb(BLUE), 1.0)]
        shades = LinearSegmentedColormap.from_list("", ends).with_extremes(bad="#9aa4b2")
        image = axes.imshow(np.ma.masked_invalid(share), cmap=shades, vmin=0, vmax=100, interpolation="nearest")
        axes.set_xticks(range(k), classes, rotation=90, size=letters)
        axes.set_yticks(range(k), classes, size=letters)
        axes.tick_params(length=0, top=True, labeltop=True, bottom=False, labelbottom=False)
        for line, column in zip(*np.nonzero(counts)) if k <= NUMBERED else ():
            colour = "white" if share[line, column] > 55 else INK
            axes.text(column, line, str(counts[line, column]), ha="center", va="center", size=9, color=colour)
        bar = figure.add_axes(((margin + cell * k + 0.15) / wide, 0.1 / high, 0.12 / wide, cell * k / high))
        figure.colorbar(image, cax=bar).ax.tick_params(labelsize=7)
        bar.set_title("%", size=8)
        figure.text(0.08 / wide, 1 - 0.06 / high, f"{title}\n{CONFUSION_KEY}".strip(), size=8, va="top")
    return figure
