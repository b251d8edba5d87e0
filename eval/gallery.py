"""What retrieval finds, as a picture: queries taken apart into context and motion, and their nearest neighbours."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import simplejpeg

from eval.retrieve import Retrieval, labellings
from preprocess.draw import arrows, colour_view, enlarge
from preprocess.files import replacing
from preprocess.shards import INTRA, QUARTERS, Shard, ShardSet

QUERIES = 5
NEIGHBOURS = 3
APART = 8  # frames between the two frames shown of a query
LIMIT, GAIN = 4.0, 4.0  # pixels in full colour; how much longer than the motion arrows are drawn
FOUND, HALF, MISSED = "#1a7f37", "#c27c0e", "#c0392b"
MARKS = {FOUND: "✓", HALF: "½", MISSED: "✗"}  # for those to whom the colours look alike


def draw(shards: ShardSet, found: dict[str, Retrieval], out: Path) -> Path:
    """A row for each of a few queries, spread over the classes: two frames, the I-frame, the motion vectors as arrows
    and as colours, then for each network its nearest training videos, framed green where all of the label agrees,
    amber where one part of context/motion does, red where nothing does."""
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ValueError("the picture needs matplotlib: pip install '.[eval]'") from error
    names, classes = list(found), shards.classes
    query = found[names[0]].query
    chosen = spread(shards.label[query], QUERIES)
    columns = 5 + len(names) * NEIGHBOURS
    settings = shards.settings
    high = 1.9 * settings.frame_height / settings.frame_width + 0.32
    figure = Figure(figsize=(1.9 * columns + 0.3 * (len(names) + 1), high * len(chosen) + 0.9), dpi=100)
    widths = [1.0] * 5 + ([0.15] + [1.0] * NEIGHBOURS) * len(names)
    grid = figure.add_gridspec(
        len(chosen), len(widths), width_ratios=widths, left=0.01, right=0.99, top=1 - 0.75 / figure.get_figheight(),
        bottom=0.01, wspace=0.05, hspace=0.25,
    )  # fmt: skip
    heads = ["frame", f"{APART} frames later", "I-frame: the context", "vectors: the motion", "vectors as colours"]
    for line, q in enumerate(chosen):
        pictures = _apart(shards, int(query[q]))
        for column, picture in enumerate(pictures):
            axes = figure.add_subplot(grid[line, column])
            caption = f"query: {label_name(classes, shards.label[query[q]])}" if column == 0 else ""
            _show(axes, picture, caption, "#444444")
            if line == 0:
                axes.annotate(heads[column], (0.5, 1), (0, 20), "axes fraction", "offset points", ha="center", size=10)
        for group, name in enumerate(names):
            retrieval = found[name]
            places = min(NEIGHBOURS, retrieval.order.shape[1])
            for place in range(places):
                column = 5 + group * (NEIGHBOURS + 1) + 1 + place
                neighbour = int(retrieval.gallery[retrieval.order[q, place]])
                mine, theirs = label_name(classes, shards.label[query[q]]), label_name(classes, shards.label[neighbour])
                axes = figure.add_subplot(grid[line, column])
                colour = verdict(mine, theirs)
                _show(axes, _apart(shards, neighbour)[3], f"{MARKS[colour]} {theirs}", colour)
                if line == 0 and place == places // 2:
                    axes.annotate(
                        f"nearest videos, {name}", (0.5, 1), (0, 20), "axes fraction", "offset points",
                        ha="center", size=10, weight="bold",
                    )  # fmt: skip
    green, amber = f"{MARKS[FOUND]} green: as the query", f"{MARKS[HALF]} amber: its context or its motion"
    in_parts = "motion" in labellings(classes)
    legend = "; ".join([green, *([amber] if in_parts else []), f"{MARKS[MISSED]} red: another class"])
    figure.text(0.99, 1 - 0.04 / figure.get_figheight(), legend, ha="right", va="top", size=8, color="#444444")
    with replacing(out) as partial:
        figure.savefig(partial, format="png")
    return out


def spread(labels: np.ndarray, count: int) -> list[int]:
    """One query of each of `count` classes, spread over all of them and off the diagonal of context x motion."""
    classes = np.unique(labels)
    wanted = classes[np.unique(np.linspace(0, len(classes) - 1, count).astype(int))]
    return [int(np.flatnonzero(labels == c)[0]) for c in wanted]


def label_name(classes: list[str], label: int) -> str:
    return classes[label] if label >= 0 else "unlabelled"


def verdict(mine: str, theirs: str) -> str:
    """The colour of a neighbour's frame, for a query labelled `mine`: FOUND, HALF or MISSED."""
    parts = mine.split("/"), theirs.split("/")
    half = len(parts[0]) == len(parts[1]) == 2 and any(a == b for a, b in zip(*parts))
    return FOUND if mine == theirs else HALF if half else MISSED


def middle_iframe(shard: Shard, index: int) -> int:
    """Number of the I-frame in the middle of a shard's video, among all of the shard."""
    first, end = np.searchsorted(shard.iframe_frame, shard.frame_offset[index : index + 2])
    return int(first + (end - first) // 2)


def _apart(shards: ShardSet, video: int) -> list[np.ndarray]:
    """Two frames, the I-frame before them, and the motion between them as arrows and as colours; uint8 (H, W, 3)."""
    shard, index = shards.locate(video)
    end = int(shard.frame_offset[index + 1])
    iframe = middle_iframe(shard, index)
    start = int(shard.iframe_frame[iframe])
    last = min(start + APART, end - 1)
    settings = shard.settings
    size = (settings.frame_width * 2, settings.frame_height * 2)
    vectors = shard.motion[start + 1 : last + 1].astype(np.float32) / QUARTERS
    vectors[vectors == INTRA / QUARTERS] = 0
    mean = vectors.mean(0) if len(vectors) else np.zeros((*settings.grid, 2), np.float32)
    encoded = (settings.width, settings.height)
    frames = [enlarge(_frame(shard, f), 2) for f in (start, last)]
    still = simplejpeg.decode_jpeg(shard.iframe_jpeg(iframe), colorspace="RGB")
    return [*frames, still, arrows(frames[0], mean, encoded, GAIN), colour_view(mean, LIMIT, encoded, size)]


def _frame(shard: Shard, frame: int) -> np.ndarray:
    return simplejpeg.decode_jpeg(shard.frame_jpeg(frame), colorspace="RGB")


def _show(axes, picture: np.ndarray, caption: str, colour: str) -> None:
    axes.imshow(picture, aspect="auto", interpolation="bilinear")
    axes.set_xticks([])
    axes.set_yticks([])
    for spine in axes.spines.values():
        spine.set(color=colour, linewidth=2.5)
    if caption:
        axes.set_title(caption, size=8, color=colour, pad=3)
