"""Pictures of what a shard holds: a sheet of a few videos (PNG), or one video in motion (MP4).

    python -m preprocess inspect SHARDS --video PATH --out picture.png
    python -m preprocess inspect SHARDS --sample 4 --seed 0 --out picture.png
    python -m preprocess inspect SHARDS --video PATH --out clip.mp4

About a second a video for a sheet and some seconds for a clip. Needs matplotlib, and PyAV for a clip. Everything shown
is read back from the shard: a picture that looks right says that frames, motion vectors and their alignment are right.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt
import simplejpeg

from preprocess.draw import DPI, Image, arrows, colour_view, energy_view, enlarge, new_figure, pixels, wheel_legend
from preprocess.files import replacing
from preprocess.schema import INTRA, MACROBLOCK, NO_RESIDUAL, QUARTERS, beside_path
from preprocess.shards import Shard, ShardSet

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import SubFigure

TIMES = 4  # pictures of moving frames a video, besides the first I-frame
MOST_VIDEOS = 24  # each takes about a thousand lines of the page
WIDTH, HEIGHT = 2000, 1120  # pixels of a sheet that one video takes
RESIDUAL_HEIGHT = 320  # and as many more where there are residuals
LIMITS = (2, 3, 4, 6, 8, 12, 16, 24, 32, 48)
PICTURE_WIDTH = 456  # frames are enlarged by a whole factor to about this before arrows are drawn on them
MOST_INTRA = 0.25  # beyond this share of blocks without a vector a frame is a cut, and its vectors are arbitrary
INK, PALE, I_FRAME, SHOWN = "#222222", "#666666", "#c2410c", "#0369a1"
SEPARATOR = "  ·  "

Pixels = npt.NDArray[np.floating]


def inspect(shards_folder: Path, video: str | None, sample: int, seed: int, out: Path) -> Path:
    """Draw the video with this manifest path, or `sample` videos drawn with `seed`, into `out` (.png or .mp4).

    Returns `out`. ValueError where the path is unknown (naming similar ones), where neither or too much is asked for,
    or where the ending of `out` is neither .png nor .mp4.
    """
    kind = out.suffix.lower()
    if kind not in (".png", ".mp4"):
        raise ValueError(f"{out} ends in {kind or 'nothing'}: a sheet ends in .png, a clip in .mp4")
    shard_set = ShardSet(shards_folder)
    if video is not None:
        chosen = [_find(shard_set, video)]
    elif sample < 1:
        raise ValueError(f"nothing to draw: name a video, or ask for a sample of at least 1 (it is {sample})")
    else:
        chosen = sorted(np.random.default_rng(seed).permutation(len(shard_set))[:sample].tolist())
    if kind == ".png":
        return contact_sheet(shard_set, chosen, out)
    if len(chosen) != 1:
        raise ValueError(f"{out} would show {len(chosen)} videos, but a clip shows one: name it, or sample 1")
    return animation(shard_set, chosen[0], out)


def contact_sheet(shard_set: ShardSet, videos: Sequence[int], out_png: Path) -> Path:
    """A sheet with a group of rows for each video: its first I-frame and the moments that move most.

    Rows: the frame; the same with motion as arrows; motion as colours, with the wheel that explains them. Below them
    the mean motion of every frame, with the I-frames and the moments shown. Columns after the first are the frames of
    largest mean motion in equal parts of the video. videos: numbers in the set, at most MOST_VIDEOS.
    Returns `out_png`, written at once or not at all. ValueError where there is nothing, or too much, to draw.
    """
    if not 1 <= len(videos) <= MOST_VIDEOS:
        raise ValueError(f"{len(videos)} videos: a sheet shows 1 to {MOST_VIDEOS}")
    views = [_View.of(shard_set, number) for number in videos]
    height = HEIGHT + (RESIDUAL_HEIGHT if any(view.residual is not None for view in views) else 0)
    figure = new_figure(WIDTH, height * len(videos), layout="constrained")
    for part, view in zip(figure.subfigures(len(videos), 1, squeeze=False)[:, 0], views):
        _draw(part, view)
    with replacing(out_png) as partial:
        figure.savefig(partial, format="png", dpi=DPI, facecolor="white")
    return out_png


def animation(shard_set: ShardSet, video: int, out_mp4: Path) -> Path:
    """A clip of one video: frames with motion as arrows beside motion as colours, at the source's frame rate.

    Above them the path, the frame number, the frame's type and the legend. H.264 where the local PyAV has the encoder,
    else MPEG-4 Part 2; yuv420p. Returns `out_mp4`, written at once or not at all.
    ValueError where PyAV or matplotlib is missing.
    """
    try:
        from preprocess.encode import film
    except ImportError as error:
        raise ValueError("a clip needs PyAV: pip install av, or ask for a .png") from error
    view = _View.of(shard_set, video)
    with replacing(out_mp4) as partial:
        film(partial, _clip_pictures(view), frame_rate(view.fps))
    return out_mp4


def frame_rate(fps: float) -> Fraction:
    """The frame rate as the fraction an encoder takes: 29.97 broadcast rates become n/1001, nonsense becomes 25."""
    if not (np.isfinite(fps) and 0.01 <= fps <= 1000):
        return Fraction(25)
    return Fraction(fps).limit_denominator(min(1001, int(65535 / max(fps, 1))))  # MPEG-4 counts in 16 bits


@dataclass(frozen=True)
class _View:
    """One video of a set, with what both pictures need to know of it."""

    shard: Shard
    index: int
    path: str
    label: str
    fps: float
    encoded: tuple[int, int]  # width, height
    mean: Pixels  # (T,) mean motion of each frame, pixels
    i_frames: npt.NDArray[np.int64]  # frame numbers in the video
    moments: list[int]  # frames of largest motion in equal parts of the video; never I-frames
    limit: int  # pixels, full colour
    residual: npt.NDArray[np.uint16] | None  # (T, rows, cols) as stored, where the set has it
    energy_limit: int  # grey levels a pixel, black

    @classmethod
    def of(cls, shard_set: ShardSet, number: int) -> _View:
        shard, index = shard_set.locate(number)
        start, stop = (int(f) for f in shard.frame_offset[index : index + 2])
        label = int(shard.label[index])
        numbers = shard.iframe_frame
        i_frames = numbers[(numbers >= start) & (numbers < stop)] - start
        mean = np.array([_magnitude(shard.motion[f]).mean() for f in range(start, stop)])
        cut = np.array([(shard.motion[f, ..., 0] == INTRA).mean() > MOST_INTRA for f in range(start, stop)])
        moments = _moments(np.where(cut, -1.0, mean), i_frames)
        shown = np.concatenate([np.ravel(_magnitude(shard.motion[start + t])) for t in moments] or [np.zeros(1)])
        residual = shard.residual[start:stop] if beside_path(shard.path, "residual").exists() else None
        energy = np.zeros(1) if residual is None else _energy(residual[moments])
        return cls(
            shard=shard,
            index=index,
            path=_printable(shard.paths[index]),
            label=_shorten(_printable(shard.origin.classes[label]), 60) if label >= 0 else "unlabelled",
            fps=float(shard.fps[index]),
            encoded=(shard.settings.width, shard.settings.height),
            mean=mean,
            i_frames=i_frames,
            moments=moments,
            limit=_limit(shown),
            residual=residual,
            energy_limit=_limit(energy),
        )

    @property
    def gain(self) -> float:
        """How much longer than the motion to draw: an arrow at the limit spans a block and a half, never below half."""
        return min(6.0, max(0.5, round(2 * 24 / self.limit) / 2))

    @property
    def facts(self) -> str:
        height, width = self.shard.source_size[self.index].tolist()
        parts = [
            self.label,
            f"frames: {len(self.mean)}, I-frames: {len(self.i_frames)}",
            f"{self.fps:.4g} fps" if self.fps > 0 else "frame rate unknown",
            f"source {width}×{height}, encoded {self.encoded[0]}×{self.encoded[1]}",
            f"packets that did not decode: {self.shard.decode_errors[self.index]}",
        ]
        return SEPARATOR.join(parts)

    def caption(self, t: int) -> str:
        kind = "I-frame, no vectors" if t in self.i_frames else f"mean motion {self.mean[t]:.1f} px"
        return f"frame {t}{SEPARATOR}{kind}"

    def pictures(self, t: int) -> list[Image]:
        """Frame t as stored (an I-frame at its full size), with arrows, its motion in colours, and its residual where
        there is one: uint8 (H, W, 3)."""
        f = int(self.shard.frame_offset[self.index]) + t
        small = simplejpeg.decode_jpeg(self.shard.frame_jpeg(f), colorspace="RGB")
        stored = small
        if t in self.i_frames:
            number = int(np.searchsorted(self.shard.iframe_frame, f))
            stored = simplejpeg.decode_jpeg(self.shard.iframe_jpeg(number), colorspace="RGB")
        frame = enlarge(small, max(1, round(PICTURE_WIDTH / small.shape[1])))
        motion, intra = _pixels(self.shard.motion[f])
        size = (frame.shape[1], frame.shape[0])
        colours = colour_view(motion, self.limit, self.encoded, size, intra)
        pictures = [stored, arrows(frame, motion, self.encoded, self.gain), colours]
        if self.residual is not None:
            pictures.append(energy_view(_energy(self.residual[t]), self.energy_limit, self.encoded, size, intra))
        return pictures


def _draw(page: SubFigure, view: _View) -> None:
    """One video's part of a sheet."""
    page.suptitle(f"{_shorten(view.path, 150)}\n{view.facts}", x=0.01, ha="left", color=INK, parse_math=False)
    length = "drawn at true length" if view.gain == 1 else f"drawn {view.gain:g} times as long"
    rows = {
        "Frame": "as stored in the shard",
        "Motion as arrows": f"how each 16×16 block moved\nsince the previous frame,\n{length}",
        "Motion as colour": f"rim: {view.limit} px a frame or more\nwhite: still\nhatched: no vector (intra)",
        "Residual": f"what vectors did not predict\nwhite: nothing\nblack: {view.energy_limit} grey levels or more",
        "Motion over time": "mean over all blocks, px",
    }
    if view.residual is None:
        del rows["Residual"]
    heights, widths = [3] * (len(rows) - 1), [3] * (TIMES + 1)
    grid = page.add_gridspec(len(rows), TIMES + 2, height_ratios=(*heights, 1.5), width_ratios=(2, *widths))
    for row, (title, text) in enumerate(rows.items()):
        axes = page.add_subplot(grid[row, 0])
        axes.set_title(title, loc="left", fontweight="bold", fontsize="medium")
        if row == 2:
            axes.imshow(wheel_legend(312))
            axes.set_xlabel(text, loc="left", color=PALE)
        else:
            axes.text(0, 1, text, color=PALE, va="top", transform=axes.transAxes)
        _without_axis(axes)
    for column, t in enumerate([0, *view.moments], start=1):
        colour = I_FRAME if t in view.i_frames else INK
        for row, picture in enumerate(view.pictures(t)):
            axes = page.add_subplot(grid[row, column])
            axes.imshow(picture)
            axes.set_title(view.caption(t) if row == 0 else "", loc="left", color=colour, fontsize="medium")
            _without_axis(axes, colour)
    _curve(page.add_subplot(grid[-1, 1:]), view)


def _curve(axes: Axes, view: _View) -> None:
    """Mean motion of every frame, the I-frames and the moments shown."""
    # I-frames carry no vectors: the curve has gaps there rather than drops to zero that nothing in the scene made.
    mean = view.mean.copy()
    mean[view.i_frames] = np.nan
    axes.vlines(view.i_frames, 0, 1, color=I_FRAME, lw=0.8, transform=axes.get_xaxis_transform(), label="I-frames")
    axes.plot(mean, color=INK, linewidth=1.2, marker=".", markersize=3)
    axes.plot(view.moments, mean[view.moments], "v", color=SHOWN, markersize=9, label="shown above")
    axes.set_xlim(-0.5, len(view.mean) - 0.5)
    axes.set_ylim(0, 1.25 * max(1.0, float(view.mean.max())))
    axes.set_xlabel("frame", color=PALE)
    axes.locator_params(axis="x", integer=True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(loc="upper right", frameon=False, ncols=2)


def _without_axis(axes: Axes, border: str | None = None) -> None:
    axes.set(xticks=[], yticks=[])
    for spine in axes.spines.values():
        spine.set(visible=border is not None, color=border, linewidth=2.5 if border == I_FRAME else 0.8)


def _clip_pictures(view: _View) -> Iterator[Image]:
    """Each frame of a clip: arrows, colours and residuals side by side below what they are; even sizes."""
    _, *first = view.pictures(0)
    height, width = first[0].shape[:2]
    figure = new_figure(len(first) * width + 180, 2 * (height // 2 + 50), layout="constrained")
    *places, legend = figure.subplots(1, len(first) + 1, width_ratios=(*[width] * len(first), 120))
    panels = [axes.imshow(picture) for axes, picture in zip(places, first)]
    texts = (
        f"motion since the previous frame, arrows ×{view.gain:g}",
        "as colours; hatched: no vector",
        f"residual; black: {view.energy_limit} grey levels a pixel",
    )
    for axes, text in zip(places, texts):
        axes.set_xlabel(text, loc="left", color=PALE)
    legend.imshow(wheel_legend(312))
    legend.set_xlabel(f"rim: {view.limit} px\na frame", color=PALE)
    for axes in (*places, legend):
        _without_axis(axes)
    title = f"{_shorten(view.path, 100)}{SEPARATOR}{view.label}"
    for t in range(len(view.mean)):
        for panel, picture in zip(panels, view.pictures(t)[1:]):
            panel.set_data(picture)
        seconds = t / float(frame_rate(view.fps))
        colour = I_FRAME if t in view.i_frames else INK
        figure.suptitle(
            f"{title}\n{view.caption(t)}{SEPARATOR}{seconds:.2f} s", x=0.01, ha="left", color=colour, parse_math=False
        )
        yield pixels(figure)[..., :3]
        figure.set_layout_engine("none")  # once placed, nothing moves


def _pixels(stored: npt.NDArray[np.int16]) -> tuple[Pixels, npt.NDArray[np.bool_]]:
    """Stored motion (..., 2) as pixels, zero where a block has no vector, and the mask (...) of those blocks."""
    intra = stored[..., 0] == INTRA
    return np.where(intra[..., None], 0.0, stored / QUARTERS), intra


def _energy(stored: npt.NDArray[np.uint16]) -> Pixels:
    """Stored energies as grey levels a pixel, zero where a block has none."""
    return np.where(stored == NO_RESIDUAL, 0.0, stored / MACROBLOCK**2)


def _limit(values: Pixels) -> int:
    """What is shown in full: few values are larger, of those that are not small; they must not pale the rest."""
    large = values[values >= 0.5]
    most = float(np.percentile(large, 90)) if len(large) else 0.0
    return next((n for n in LIMITS if n >= most), 64)


def _magnitude(stored: npt.NDArray[np.int16]) -> Pixels:
    return np.hypot(*np.moveaxis(_pixels(stored)[0], -1, 0))


def _moments(score: Pixels, i_frames: npt.NDArray[np.int64]) -> list[int]:
    """The frame of highest score in each of up to TIMES equal parts of a video, I-frames left out."""
    parts = np.array_split(np.setdiff1d(np.arange(len(score)), i_frames), TIMES)
    return [int(part[np.argmax(score[part])]) for part in parts if len(part)]


def _find(shard_set: ShardSet, path: str) -> int:
    paths = shard_set.paths
    if path in paths:
        return paths.index(path)
    for failure in shard_set.failed:
        if failure.path == path:
            raise ValueError(f"{path} could not be stored, so there is nothing to draw: {failure.reason}")
    # People give a bare file name, or the path from their own folder, as often as the manifest's path.
    same_name = [p for p in paths if Path(p).name == Path(path).name]
    similar = (same_name or difflib.get_close_matches(path, paths, cutoff=0.3) or paths)[:3]
    raise ValueError(f"no video {path!r} in these shards (paths are those of the manifest), but {', '.join(similar)}")


def _printable(text: str) -> str:
    """Text that a font can show: undecodable bytes and control characters become a mark."""
    return "".join(c if c.isprintable() else "\ufffd" for c in text)


def _shorten(text: str, most: int) -> str:
    """At most this many letters: the middle goes, because names differ in their ends."""
    return text if len(text) <= most else f"{text[: most // 2 - 1]}…{text[len(text) - (most - most // 2) :]}"
