"""What retrieval finds, as pictures: queries spread over the classes, their neighbours, and each video taken apart."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import simplejpeg

from eval import figures
from eval.results import Data
from preprocess.draw import arrows, colour_view, enlarge
from preprocess.schema import INTRA, QUARTERS
from preprocess.shards import Shard, ShardSet

QUERIES, NEIGHBOURS = 5, 3
APART = 8  # frames between the two still frames of a video
FRAMES, STRIDE = 16, 2  # of a moving clip
LIMIT, GAIN = 4.0, 4.0  # pixels in full colour; how much longer than the motion arrows are drawn
FOUND, HALF, MISSED = "#1a7f37", "#c27c0e", "#c0392b"
MARKS = {FOUND: "✓", HALF: "½", MISSED: "✗"}  # for those to whom the colours look alike
GREY = "#444444"
HEADS = ("frame", f"{APART} frames later", "I-frame: the context", "vectors: the motion", "vectors as colours")


@dataclass(frozen=True)
class Nearest:
    """What a network finds for every query."""

    data: Data
    query: np.ndarray
    """Positions of the queries in the shard set, int64 (Q,)."""
    gallery: np.ndarray
    """Positions of the gallery, int64 (G,)."""
    order: np.ndarray
    """Gallery rows by falling similarity, int64 (Q, k)."""


@dataclass(frozen=True)
class Neighbour:
    video: int
    """Position in the shard set, as everywhere here."""
    label: str
    """With the mark of its verdict."""
    verdict: str
    """Colour of its frame: FOUND, HALF or MISSED."""


@dataclass(frozen=True)
class Query:
    video: int
    label: str
    neighbours: dict[str, list[Neighbour]]
    """Nearest first, by each network."""


def chosen(found: Mapping[str, Nearest]) -> list[Query]:
    """A few queries, spread over the classes, and what each network finds for them."""
    first = next(iter(found.values()))
    shards = first.data.shards
    queries = []
    for q in spread(shards.label[first.query], QUERIES):
        mine = label_name(shards, int(first.query[q]))
        by = {}
        for name, retrieval in found.items():
            videos = retrieval.gallery[retrieval.order[q, :NEIGHBOURS]].tolist()
            by[name] = [_neighbour(mine, video, label_name(shards, video)) for video in videos]
        queries.append(Query(int(first.query[q]), mine, by))
    return queries


def spread(labels: np.ndarray, count: int) -> list[int]:
    """One place in `labels` of each of `count` classes, spread over all of them."""
    classes = np.unique(labels)
    wanted = classes[np.unique(np.linspace(0, len(classes) - 1, count).astype(int))]
    return [int(np.flatnonzero(labels == c)[0]) for c in wanted]


def label_name(shards: ShardSet, video: int) -> str:
    label = int(shards.label[video])
    return shards.classes[label] if label >= 0 else "unlabelled"


def _neighbour(mine: str, video: int, theirs: str) -> Neighbour:
    parts = mine.split("/"), theirs.split("/")
    half = len(parts[0]) == len(parts[1]) == 2 and any(a == b for a, b in zip(*parts))
    verdict = FOUND if mine == theirs else HALF if half else MISSED
    return Neighbour(video, f"{MARKS[verdict]} {theirs}", verdict)


def meanings(classes: list[str]) -> dict[str, str]:
    """What the colours of the frames say, for classes of these names."""
    said = {FOUND: "as the query", HALF: "its context or its motion", MISSED: "another class"}
    return said if all(c.count("/") == 1 for c in classes) else {k: v for k, v in said.items() if k != HALF}


def draw(found: Mapping[str, Nearest], out: Path) -> Path:
    """A row for each of a few queries: `still`, then for each network its nearest training videos, framed green where
    all of the label agrees, amber where one part of context/motion does, red where nothing does; a PNG."""
    shards = next(iter(found.values())).data.shards
    queries, settings = chosen(found), shards.settings
    columns = len(HEADS) + len(found) * NEIGHBOURS
    high = 1.9 * settings.frame_height / settings.frame_width + 0.32
    widths = [1.0] * len(HEADS) + ([0.15] + [1.0] * NEIGHBOURS) * len(found)
    with figures.drawing() as Figure:
        figure = Figure(figsize=(1.9 * columns + 0.3 * (len(found) + 1), high * len(queries) + 0.9), dpi=100)
        top = 1 - 0.75 / figure.get_figheight()
        place = {"left": 0.01, "right": 0.99, "top": top, "bottom": 0.01, "wspace": 0.05, "hspace": 0.25}
        grid = figure.add_gridspec(len(queries), len(widths), width_ratios=widths, **place)

        def show(line: int, column: int, picture: np.ndarray, caption: str, colour: str, head: str = "") -> None:
            axes = figure.add_subplot(grid[line, column], xticks=[], yticks=[])
            axes.imshow(picture, aspect="auto", interpolation="bilinear")
            axes.spines[:].set(color=colour, linewidth=2.5)
            axes.set_title(caption, size=8, color=colour, pad=3)
            if line == 0 and head:
                weight = "bold" if column >= len(HEADS) else "normal"
                where: dict[str, Any] = {"xycoords": "axes fraction", "textcoords": "offset points", "ha": "center"}
                axes.annotate(head, (0.5, 1), (0, 20), size=10, weight=weight, **where)

        for line, query in enumerate(queries):
            for column, (head, picture) in enumerate(zip(HEADS, still(shards, query.video))):
                show(line, column, picture, f"query: {query.label}" if column == 0 else "", GREY, head)
            for group, (name, nearest) in enumerate(query.neighbours.items()):
                first = len(HEADS) + group * (NEIGHBOURS + 1) + 1
                for n, neighbour in enumerate(nearest):
                    head = f"nearest videos, {name}" if n == len(nearest) // 2 else ""
                    picture = still(shards, neighbour.video)[3]
                    show(line, first + n, picture, neighbour.label, neighbour.verdict, head)
        names = {FOUND: "green", HALF: "amber", MISSED: "red"}
        legend = "; ".join(f"{MARKS[c]} {names[c]}: {what}" for c, what in meanings(shards.classes).items())
        figure.text(0.99, 1 - 0.04 / figure.get_figheight(), legend, ha="right", va="top", size=8, color=GREY)
        return figures.save_png(figure, out)


# ---- one video


def still(shards: ShardSet, video: int) -> list[np.ndarray]:
    """The pictures of `HEADS`: two frames, the I-frame before them, and the motion between them as arrows and as
    colours; uint8 (H, W, 3)."""
    shard, index = shards.locate(video)
    end = int(shard.frame_offset[index + 1])
    iframe = middle_iframe(shard, index)
    start = int(shard.iframe_frame[iframe])
    last = min(start + APART, end - 1)
    frames = [enlarge(_frame(shard, f), 2) for f in (start, last)]
    motion, _ = _motion(shard, start + 1, last + 1)
    encoded = (shard.settings.width, shard.settings.height)
    size = (2 * shard.settings.frame_width, 2 * shard.settings.frame_height)
    colours = colour_view(motion, LIMIT, encoded, size)
    return [*frames, _iframe(shard, iframe), arrows(frames[0], motion, encoded, GAIN), colours]


def moving(
    shards: ShardSet, video: int, what: Literal["frames", "motion", "arrows"] = "frames"
) -> tuple[list[np.ndarray], float]:
    """(frames of the middle of a video, uint8 (H, W, 3), frames a second): as they are, or the motion into each as
    colours, or both, as arrows on the frames, which are twice as large."""
    shard, index = shards.locate(video)
    first, end = (int(f) for f in shard.frame_offset[index : index + 2])
    span = min((FRAMES - 1) * STRIDE + 1, end - first)
    start = first + (end - first - span) // 2
    settings = shard.settings
    encoded, size = (settings.width, settings.height), (settings.frame_width, settings.frame_height)
    pictures = []
    for f in range(start, start + span, STRIDE):
        if what == "frames":
            pictures.append(_frame(shard, f))
            continue
        motion, none = _motion(shard, f, f + 1)
        if what == "motion":
            pictures.append(colour_view(motion, LIMIT, encoded, size, none))
        else:
            pictures.append(arrows(enlarge(_frame(shard, f), 2), motion, encoded, GAIN))
    return pictures, float(shard.fps[index]) / STRIDE


def context(shards: ShardSet, video: int) -> np.ndarray:
    """The I-frame in the middle of a video, uint8 (H, W, 3)."""
    shard, index = shards.locate(video)
    return _iframe(shard, middle_iframe(shard, index))


def middle_iframe(shard: Shard, index: int) -> int:
    """Number of the I-frame in the middle of a shard's video, among all of the shard."""
    first, end = np.searchsorted(shard.iframe_frame, shard.frame_offset[index : index + 2])
    return int(first + (end - first) // 2)


def _motion(shard: Shard, first: int, end: int) -> tuple[np.ndarray, np.ndarray]:
    """(mean motion of some frames in pixels, float32 (rows, cols, 2), where none of them has a vector)."""
    stored = shard.motion[first:end]
    none = (stored[..., 0] == INTRA).all(0)
    if not len(stored):
        return np.zeros((*none.shape, 2), np.float32), none
    return np.where(stored == INTRA, 0, stored).mean(0, dtype=np.float32) / QUARTERS, none


def _frame(shard: Shard, frame: int) -> np.ndarray:
    return simplejpeg.decode_jpeg(shard.frame_jpeg(frame), colorspace="RGB")


def _iframe(shard: Shard, iframe: int) -> np.ndarray:
    return simplejpeg.decode_jpeg(shard.iframe_jpeg(iframe), colorspace="RGB")
