"""Moving pictures of what a shard holds, small enough to lie inside a web page: animated WebP."""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import simplejpeg

from eval.gallery import MARKS, label_name, middle_iframe, spread, verdict
from eval.retrieve import Retrieval
from preprocess.draw import arrows, colour_view, enlarge
from preprocess.shards import INTRA, QUARTERS, ShardSet

FRAMES, STRIDE = 16, 2
WIDTH = 228  # of a picture, pixels at most
QUALITY = 55
QUERIES, NEIGHBOURS, PREVIEWS = 5, 3, 4
LIMIT, GAIN = 4.0, 3.0  # pixels in full colour; how much longer than the motion arrows are drawn


@dataclass(frozen=True)
class Clip:
    source: str
    """data: URI."""
    label: str
    verdict: str = ""
    """Colour of `gallery.verdict`; empty of a query."""


@dataclass(frozen=True)
class Found:
    """A query with its neighbours by each network."""

    query: Clip
    neighbours: dict[str, list[Clip]]


@dataclass(frozen=True)
class Preview:
    """A video taken apart."""

    label: str
    path: str
    pictures: dict[str, str]
    """What it shows -> data: URI."""


def animation(frames: Sequence[np.ndarray], rate: float) -> str:
    """uint8 RGB frames (H, W, 3) of equal size as an endless WebP of `rate` frames a second, a data: URI.

    One frame gives a still.
    """
    try:
        from PIL import Image
    except ImportError as error:
        raise ValueError("moving pictures need Pillow, which matplotlib brings: pip install '.[eval]'") from error
    pictures = [Image.fromarray(frame) for frame in frames]
    buffer, milliseconds = io.BytesIO(), round(1000 / min(max(rate, 1.0), 50.0))
    options = {"save_all": True, "append_images": pictures[1:], "duration": milliseconds, "loop": 0}
    pictures[0].save(buffer, "WEBP", quality=QUALITY, method=3, **(options if len(pictures) > 1 else {}))
    return "data:image/webp;base64," + base64.b64encode(buffer.getvalue()).decode("ascii")


def clip(shards: ShardSet, video: int, which: str = "frames") -> tuple[list[np.ndarray], float]:
    """(frames of the middle of a video, frames a second): as they are, or the 'motion' into each as colours, or both,
    the motion as 'arrows' on the frames."""
    shard, index = shards.locate(video)
    first, end = (int(f) for f in shard.frame_offset[index : index + 2])
    span = min((FRAMES - 1) * STRIDE + 1, end - first)
    start = first + (end - first - span) // 2
    settings = shard.settings
    encoded, size = (settings.width, settings.height), (settings.frame_width, settings.frame_height)
    rate = float(shard.fps[index]) / STRIDE
    found = []
    for frame in range(start, start + span, STRIDE):
        vectors = shard.motion[frame].astype(np.float32) / QUARTERS
        none = shard.motion[frame, ..., 0] == INTRA
        vectors[none] = 0
        if which == "motion":
            found.append(colour_view(vectors, LIMIT, encoded, size, none))
            continue
        picture = simplejpeg.decode_jpeg(shard.frame_jpeg(frame), colorspace="RGB")
        found.append(arrows(enlarge(picture, 2), vectors, encoded, GAIN) if which == "arrows" else picture)
    return [_fit(frame) for frame in found], rate


def _fit(frame: np.ndarray) -> np.ndarray:
    """A frame no wider than WIDTH, by whole steps, each pixel the mean of those it stands for."""
    step = -(-frame.shape[1] // WIDTH)
    if step == 1:
        return frame
    high, wide = frame.shape[0] // step, frame.shape[1] // step
    whole = frame[: high * step, : wide * step].reshape(high, step, wide, step, 3)
    return np.rint(whole.mean((1, 3))).astype(np.uint8)


def neighbours(shards: ShardSet, found: dict[str, Retrieval]) -> list[Found]:
    """A few queries, spread over the classes, and what each network finds for them."""
    first = next(iter(found.values()))
    gallery = []
    for q in spread(shards.label[first.query], QUERIES):
        mine = label_name(shards.classes, shards.label[first.query[q]])
        by = {}
        for name, retrieval in found.items():
            places = retrieval.gallery[retrieval.order[q, :NEIGHBOURS]].tolist()
            by[name] = [_neighbour(shards, v, mine) for v in places]
        gallery.append(Found(Clip(animation(*clip(shards, int(first.query[q]))), mine), by))
    return gallery


def _neighbour(shards: ShardSet, video: int, mine: str) -> Clip:
    label = label_name(shards.classes, shards.label[video])
    colour = verdict(mine, label)
    return Clip(animation(*clip(shards, video)), f"{MARKS[colour]} {label}", colour)


def previews(shards: ShardSet, videos: np.ndarray) -> list[Preview]:
    """A few of some videos, spread over the classes: the clip, its I-frame, its motion as colours and as arrows."""
    found = []
    for v in videos[spread(shards.label[videos], PREVIEWS)].tolist():
        shard, index = shards.locate(v)
        still = simplejpeg.decode_jpeg(shard.iframe_jpeg(middle_iframe(shard, index)), colorspace="RGB")
        pictures = {
            "clip": animation(*clip(shards, v)),
            "I-frame: the context": animation([_fit(still)], 1),
            "motion vectors": animation(*clip(shards, v, "motion")),
            "on the frames": animation(*clip(shards, v, "arrows")),
        }
        found.append(Preview(label_name(shards.classes, shards.label[v]), shards.paths[v], pictures))
    return found
