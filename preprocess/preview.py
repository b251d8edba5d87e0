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
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import simplejpeg

from preprocess.draw import Image, arrows, colour_view, enlarge, wheel_legend
from preprocess.files import replacing
from preprocess.shards import INTRA, QUARTERS, Shard, ShardSet

if TYPE_CHECKING:
    from matplotlib.figure import Figure

TIMES = 4  # pictures of moving frames a video, besides the first I-frame
MOST_VIDEOS = 24  # each takes about a thousand lines of the page
PICTURE_WIDTH = 456  # frames are enlarged by a whole factor to about this before arrows are drawn on them
MOST_INTRA = 0.25  # beyond this share of blocks without a vector a frame is a cut, and its vectors are arbitrary
DPI = 100
INK, PALE, I_FRAME, SHOWN = "#222222", "#666666", "#c2410c", "#0369a1"
SEPARATOR = "  ·  "
TEXT: dict[str, Any] = {"color": INK, "va": "center", "parse_math": False}  # names may hold $, which starts no formula

Pixels = npt.NDArray[np.floating]


def inspect(shards_folder: str | Path, video: str | None, sample: int, seed: int, out: Path) -> Path:
    """Draw the video with this manifest path, or `sample` videos drawn with `seed`, into `out` (.png or .mp4).

    Returns `out`. ValueError where the path is unknown (naming similar ones), where neither or too much is asked for,
    or where the ending of `out` is neither .png nor .mp4.
    """
    out = Path(out)
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
    sheet = _Sheet(shard_set, len(videos))
    for place, number in enumerate(videos):
        sheet.add(_View.of(shard_set, number), place)
    return sheet.save(Path(out_png))


def animation(shard_set: ShardSet, video: int, out_mp4: Path) -> Path:
    """A clip of one video: frames with motion as arrows beside motion as colours, at the source's frame rate.

    Above them the path, the frame number, the frame's type and the legend. H.264 where the local PyAV has the encoder,
    else MPEG-4 Part 2; yuv420p. Returns `out_mp4`, written at once or not at all.
    ValueError where PyAV or matplotlib is missing.
    """
    try:
        import av
    except ImportError as error:
        raise ValueError("a clip needs PyAV: pip install av, or ask for a .png") from error
    view = _View.of(shard_set, video)
    name, options = "libx264", {"crf": "18", "preset": "veryfast"}
    if name not in av.codecs_available:
        name, options = "mpeg4", {"qmin": "2", "qmax": "4"}
    rate = frame_rate(view.fps)
    out_mp4 = Path(out_mp4)
    with replacing(out_mp4) as partial, av.open(str(partial), "w", format="mp4") as container:
        stream: Any = None
        for t, picture in enumerate(_clip_pictures(view)):
            if stream is None:
                stream = container.add_stream(name, rate=rate, options=options)
                stream.height, stream.width = picture.shape[:2]
                stream.pix_fmt = "yuv420p"
            frame = av.VideoFrame.from_ndarray(picture, format="rgb24")
            frame.pts, frame.time_base = t, 1 / rate
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
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

    @classmethod
    def of(cls, shard_set: ShardSet, number: int) -> _View:
        if not 0 <= number < len(shard_set):
            raise ValueError(f"video {number}: this set has videos 0 to {len(shard_set) - 1}")
        shard, index = shard_set.locate(number)
        start, stop = (int(f) for f in shard.frame_offset[index : index + 2])
        label = int(shard.label[index])
        numbers = shard.iframe_frame
        i_frames = numbers[(numbers >= start) & (numbers < stop)] - start
        mean = np.array([_magnitude(shard.motion[f]).mean() for f in range(start, stop)])
        cut = np.array([(shard.motion[f, ..., 0] == INTRA).mean() > MOST_INTRA for f in range(start, stop)])
        moments = _moments(np.where(cut, -1.0, mean), i_frames)
        shown = np.concatenate([np.ravel(_magnitude(shard.motion[start + t])) for t in moments] or [np.zeros(1)])
        moving = shown[shown >= 0.5]
        largest = float(np.percentile(moving, 90)) if len(moving) else 0.0  # a few wild vectors must not pale the rest
        return cls(
            shard=shard,
            index=index,
            path=_printable(shard.paths[index]),
            label=_shorten(_printable(shard.classes[label]), 60) if label >= 0 else "unlabelled",
            fps=float(shard.fps[index]),
            encoded=(shard.settings.width, shard.settings.height),
            mean=mean,
            i_frames=i_frames,
            moments=moments,
            limit=next((n for n in (2, 3, 4, 6, 8, 12, 16, 24, 32, 48) if n >= largest), 64),
        )

    @property
    def gain(self) -> float:
        """How much longer than the motion to draw: an arrow at the limit spans a block and a half, never below half."""
        return min(6.0, max(0.5, round(2 * 24 / self.limit) / 2))

    @property
    def facts(self) -> str:
        height, width = (int(n) for n in self.shard.source_size[self.index])
        errors = int(self.shard.decode_errors[self.index])
        parts = [
            self.label,
            f"{_count(len(self.mean), 'frame')} ({_count(len(self.i_frames), 'I-frame')})",
            f"{self.fps:.4g} fps" if self.fps > 0 else "frame rate unknown",
            f"source {width}×{height}, encoded {self.encoded[0]}×{self.encoded[1]}",
        ]
        return SEPARATOR.join([*parts, f"{_count(errors, 'packet')} did not decode"] if errors else parts)

    def caption(self, t: int) -> str:
        kind = "I-frame, no vectors" if t in self.i_frames else f"mean motion {self.mean[t]:.1f} px"
        return f"frame {t}{SEPARATOR}{kind}"

    def pictures(self, t: int) -> tuple[Image, Image, Image]:
        """Frame t as stored (an I-frame at its full size), with arrows, and its motion in colours: uint8 (H, W, 3)."""
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
        return stored, arrows(frame, motion, self.encoded, self.gain), colours


class _Sheet:
    """The page of `contact_sheet`: places everything in pixels, so that nothing can come to lie on anything else."""

    MARGIN, LEFT, GAP = 28, 196, 10
    TITLE, CAPTION, PLOT, FOOT = 62, 24, 96, 74  # heights: two lines of text; a line; the curve; its axis and a gap

    def __init__(self, shard_set: ShardSet, videos: int) -> None:
        settings = shard_set.settings
        self.wide = 340
        self.high = round(self.wide * settings.frame_height / settings.frame_width)
        self.step = max(self.high, 210) + self.GAP  # from row to row; the legend needs 210
        self.group = self.TITLE + self.CAPTION + 3 * self.step + self.PLOT + self.FOOT
        self.width = 2 * self.MARGIN + self.LEFT + (TIMES + 1) * (self.wide + self.GAP)
        self.height = 2 * self.MARGIN + videos * self.group
        self.figure = _figure(self.width, self.height)

    def add(self, view: _View, place: int) -> None:
        top = self.MARGIN + place * self.group
        self._text(self.MARGIN, top + 12, _shorten(view.path, 150), size=15, weight="bold")
        self._text(self.MARGIN, top + 38, view.facts, size=12, color=PALE)
        rows = top + self.TITLE + self.CAPTION
        for column, t in enumerate([0, *view.moments]):
            left = self.MARGIN + self.LEFT + column * (self.wide + self.GAP)
            colour = I_FRAME if t in view.i_frames else INK
            self._text(left, rows - 13, view.caption(t), size=12, color=colour)
            for row, picture in enumerate(view.pictures(t)):
                self._image(left, rows + row * self.step, self.wide, self.high, picture, colour)
        self._legends(view, rows)
        self._curve(view, rows + 3 * self.step + 14)

    def save(self, path: Path) -> Path:
        with replacing(path) as partial:
            self.figure.savefig(partial, format="png", dpi=DPI, facecolor="white")
        return path

    def _legends(self, view: _View, rows: int) -> None:
        step, wheel = self.step, 104
        self._text(self.MARGIN, rows + 14, "Frame", size=13, weight="bold")
        self._text(self.MARGIN, rows + 36, "as stored in the shard", size=11, color=PALE)
        self._text(self.MARGIN, rows + step + 14, "Motion as arrows", size=13, weight="bold")
        length = "drawn at true length" if view.gain == 1 else f"drawn {view.gain:g} times as long"
        lines = ["how each 16×16 block moved", "since the previous frame,", length]
        for n, line in enumerate(lines):
            self._text(self.MARGIN, rows + step + 36 + 18 * n, line, size=11, color=PALE)
        self._text(self.MARGIN, rows + 2 * step + 14, "Motion as colour", size=13, weight="bold")
        self._image(self.MARGIN, rows + 2 * step + 32, wheel, wheel, wheel_legend(3 * wheel), None)
        below = rows + 2 * step + 32 + wheel + 14
        self._text(self.MARGIN, below, f"rim: {view.limit} px a frame or more", size=11, color=PALE)
        self._text(self.MARGIN, below + 18, "white: still", size=11, color=PALE)
        hatch = colour_view(np.zeros((1, 1, 2)), 1.0, (16, 16), (32, 20), np.ones((1, 1), np.bool_))
        self._image(self.MARGIN, below + 32, 32, 20, hatch, None)
        self._text(self.MARGIN + 40, below + 42, "no vector (intra)", size=11, color=PALE)

    def _curve(self, view: _View, top: int) -> None:
        left, wide = self.MARGIN + self.LEFT, (TIMES + 1) * (self.wide + self.GAP) - self.GAP
        axes = self.figure.add_axes(self._box(left, top, wide, self.PLOT))
        axes.vlines(view.i_frames, 0, 1, color=I_FRAME, linewidth=0.8, alpha=0.6, transform=axes.get_xaxis_transform())
        # I-frames carry no vectors: the curve has gaps there rather than drops to zero that nothing in the scene made.
        mean = view.mean.copy()
        mean[view.i_frames] = np.nan
        axes.plot(mean, color=INK, linewidth=1.2, marker=".", markersize=3)
        if view.moments:
            axes.plot(view.moments, mean[view.moments], "v", color=SHOWN, markersize=9)
        axes.set_xlim(-0.5, len(view.mean) - 0.5)
        axes.set_ylim(0, 1.25 * max(1.0, float(view.mean.max())))
        axes.set_xlabel("frame", fontsize=11, color=PALE, labelpad=1)
        axes.tick_params(labelsize=10, colors=PALE)
        axes.locator_params(axis="x", integer=True)
        axes.spines[["top", "right"]].set_visible(False)
        self._text(self.MARGIN, top + 14, "Motion over time", size=13, weight="bold")
        lines = [("mean over all blocks, px", PALE), ("▼ shown above", SHOWN), ("│ I-frames", I_FRAME)]
        for n, (line, colour) in enumerate(lines):
            self._text(self.MARGIN, top + 36 + 18 * n, line, size=11, color=colour)

    def _text(self, x: float, y: float, text: str, size: int, **style: Any) -> None:
        """A line of text that begins at x and is centred on y, in pixels from the top left."""
        self.figure.text(x / self.width, 1 - y / self.height, text, fontsize=0.8 * size, **(TEXT | style))

    def _image(self, left: float, top: float, wide: float, high: float, image: Image, border: str | None) -> None:
        axes = self.figure.add_axes(self._box(left, top, wide, high))
        axes.imshow(image, aspect="auto", interpolation="antialiased")
        axes.set(xticks=[], yticks=[])
        for spine in axes.spines.values():
            spine.set(visible=border is not None, color=border, linewidth=2.5 if border == I_FRAME else 0.8)

    def _box(self, left: float, top: float, wide: float, high: float) -> tuple[float, float, float, float]:
        return left / self.width, 1 - (top + high) / self.height, wide / self.width, high / self.height


def _clip_pictures(view: _View) -> Iterator[Image]:
    """Each frame of a clip: a header line above the arrows and the colours side by side; even sizes."""
    gap, head = 8, 76
    header: _Header | None = None
    for t in range(len(view.mean)):
        _, drawn, colours = view.pictures(t)
        high, wide = drawn.shape[:2]
        page = np.full((head + high + high % 2, 2 * wide + gap, 3), 255, np.uint8)
        page[head : head + high, :wide] = drawn
        page[head : head + high, wide + gap :] = colours
        header = header or _Header(view, page.shape[1], head)
        page[:head] = header.draw(t)
        yield page


class _Header:
    """The band above a clip: what it is, which frame this is, and the legend."""

    def __init__(self, view: _View, width: int, height: int) -> None:
        self.view, self.width, self.figure = view, width, _figure(width, height)
        from matplotlib.backends.backend_agg import FigureCanvasAgg

        self.canvas = FigureCanvasAgg(self.figure)
        wheel = height - 12
        axes = self.figure.add_axes(((width - wheel - 6) / width, 6 / height, wheel / width, wheel / height))
        axes.imshow(wheel_legend(3 * wheel), aspect="auto")
        axes.axis("off")
        self._line(0.20, _shorten(view.path, int(width / 8.5) - 22), weight="bold")
        self._line(0.50, f"{view.label}{SEPARATOR}arrows: motion since the previous frame, ×{view.gain:g}", color=PALE)
        self.now = self._line(0.80, "")
        beside = 1 - (wheel + 14) / width
        for y, text in ((0.32, f"rim: {view.limit} px a frame"), (0.68, "hatched: no vector")):
            self._line(y, text, x=beside, ha="right", color=PALE)

    def draw(self, t: int) -> Image:
        """The band for frame t, uint8 (height, width, 3)."""
        self.now.set_text(f"{self.view.caption(t)}{SEPARATOR}{t / float(frame_rate(self.view.fps)):.2f} s")
        self.now.set_color(I_FRAME if t in self.view.i_frames else INK)
        self.canvas.draw()
        return np.asarray(self.canvas.buffer_rgba())[..., :3]

    def _line(self, y: float, text: str, x: float | None = None, **style: Any) -> Any:
        return self.figure.text(8 / self.width if x is None else x, 1 - y, text, fontsize=9.5, **(TEXT | style))


def _figure(width: int, height: int) -> Figure:
    """An empty white page of this many pixels, apart from pyplot's global state."""
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ValueError("pictures need matplotlib: pip install matplotlib") from error
    return Figure(figsize=(width / DPI, height / DPI), dpi=DPI, facecolor="white")


def _pixels(stored: npt.NDArray[np.int16]) -> tuple[Pixels, npt.NDArray[np.bool_]]:
    """Stored motion (..., 2) as pixels, zero where a block has no vector, and the mask (...) of those blocks."""
    intra = stored[..., 0] == INTRA
    return np.where(intra[..., None], 0.0, stored / QUARTERS), intra


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
    # People give a bare file name, or the path from their own folder, as often as the manifest's path.
    same_name = [p for p in paths if Path(p).name == Path(path).name]
    close = (same_name or difflib.get_close_matches(path, paths, n=3, cutoff=0.5))[:3]
    for failure in shard_set.failed:
        if failure.path == path:
            raise ValueError(f"{path} could not be stored, so there is nothing to draw: {failure.reason}")
    hint = f"; similar: {', '.join(close)}" if close else f"; the first of {len(paths)} is {paths[0] if paths else '-'}"
    raise ValueError(f"no video {path!r} in these shards (paths are those of the manifest){hint}")


def _count(number: int, what: str) -> str:
    return f"{number} {what}" if number == 1 else f"{number} {what}s"


def _printable(text: str) -> str:
    """Text that a font can show: undecodable bytes and control characters become a mark."""
    return "".join(c if c.isprintable() else "\ufffd" for c in text)


def _shorten(text: str, most: int) -> str:
    """At most this many letters: the middle goes, because names differ in their ends."""
    return text if len(text) <= most else f"{text[: most // 2 - 1]}…{text[len(text) - (most - most // 2) :]}"
