"""What of a video becomes a sample: every random choice of stage 2's data, as pure functions of a generator.

Nothing here reads a file. `train.data` makes one generator a sample, from (seed, epoch, video).

Legend: W motion maps of a window, K negative windows, P photometric numbers, C clips of a video at evaluation. Frames
are numbered within their video. Boxes are (x0, y0, x1, y1) in fractions of the frame: 0 at its left and top edge, 1 at
its right and bottom.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Literal

import numpy as np

from preprocess.command import at_least

Period = Literal["future", "current"]
Motion = Literal["vectors", "flow", "vectors+residual", "residual"]
MOTION_CHANNELS: dict[Motion, int] = {"vectors": 2, "flow": 2, "vectors+residual": 3, "residual": 1}
Generator = np.random.Generator

BEFORE = "before"
"""A field added once there are runs is field(default=..., metadata={BEFORE: what those runs did}): where it has that
value it stands in no JSON, so that their hashes stay; where JSON lacks it, it has that value (train.config)."""
TRIES = 10  # random boxes tried before the centre of the frame is taken


@dataclass(frozen=True)
class Sampling:
    """Which frames make a sample (paper section 4.1, table 1; the reach and the gap are the authors' released ones)."""

    frames: int = 16
    """RGB frames a clip."""
    stride: int = 4
    """Frames from one frame of a clip to the next."""
    motion_frames: int = 8
    """Consecutive motion maps a window."""
    gap: int = 2
    """Frames skipped between a clip's last frame and its future motion window."""
    period: Period = "future"
    """Motion to be predicted: after the clip, or in its middle (table 1)."""
    motion: Motion = "vectors"
    """What is predicted: the stream's motion vectors, or what else of it lies beside the shards: TV-L1 optical flow
    (table 4), the energy of the residuals, or vectors and energy (the paper's section 5)."""
    negatives: int = 3
    """Further motion windows of the same video, none of which overlaps the positive one."""
    iframe_reach: int = 5
    """How far outside the clip its I-frame may lie, in frames."""

    def __post_init__(self) -> None:
        for name, least in (("frames", 1), ("stride", 1), ("motion_frames", 1)):
            at_least(name, getattr(self, name), least)
        for name in ("gap", "negatives", "iframe_reach"):
            at_least(name, getattr(self, name), 0)
        one_of("period", self.period, ("future", "current"))
        one_of("motion", self.motion, tuple(MOTION_CHANNELS))

    @property
    def motion_channels(self) -> int:
        return MOTION_CHANNELS[self.motion]

    def span(self, stride: int) -> int:
        """Frames from a clip's first to its last, both counted."""
        return (self.frames - 1) * stride + 1

    def extent(self, stride: int) -> int:
        """Frames that a clip and its positive window take up together."""
        span = self.span(stride)
        return span + self.gap + self.motion_frames if self.period == "future" else max(span, self.motion_frames)

    def window(self, start: int, stride: int, frames: int) -> int:
        """First frame of the positive motion window of the clip at `start`, in a video of `frames` frames."""
        if self.period == "future":
            return start + self.span(stride) + self.gap
        # A clip shorter than the window may lie too near an end of the video to be its middle.
        middle = start + (self.span(stride) - self.motion_frames) // 2
        return min(max(middle, 0), frames - self.motion_frames)

    def needed(self, stride: int) -> int:
        """Least frames of a video that can serve at this stride, whatever start is drawn."""
        ahead = self.extent(stride) - self.motion_frames
        if self.period == "current":
            ahead //= 2
        # With fewer than motion_frames frames ahead of every window, only 3W-1 frames are certain to leave W free ones
        # on one side of it.
        windows = 3 * self.motion_frames - 1 if self.negatives and ahead < self.motion_frames else 0
        return max(self.extent(stride), windows)


@dataclass(frozen=True)
class Cropping:
    """Random resized crop and flip, shared by a clip and its positive motion window."""

    area: tuple[float, float] = (0.2, 1.0)
    """Least and largest share of the frame's area."""
    aspect: tuple[float, float] = (3 / 4, 4 / 3)
    """Least and largest width : height of the box in pixels."""
    flip: float = 0.5
    """Probability of mirroring left and right."""

    def __post_init__(self) -> None:
        if not 0 < self.area[0] <= self.area[1] <= 1:
            raise ValueError(f"area is {self.area}; give two shares of the frame, rising, above 0 and at most 1")
        if not 0 < self.aspect[0] <= self.aspect[1]:
            raise ValueError(f"aspect is {self.aspect}; give two positive ratios, rising, as (0.75, 1.333)")
        probability("flip", self.flip)


@dataclass(frozen=True)
class Photometric:
    """Blur, colour jitter and grey for clips and I-frames (paper section 4.1 names them; strengths are the usual)."""

    blur_p: float = 0.5
    """Probability of a Gaussian blur."""
    blur_sigma: tuple[float, float] = (0.1, 2.0)
    """Least and largest standard deviation of the blur, in pixels of the crop."""
    jitter_p: float = 0.5
    """Probability of a colour jitter."""
    brightness: float = 0.4
    """Factor drawn from 1 - this to 1 + this."""
    contrast: float = 0.4
    """Factor drawn from 1 - this to 1 + this."""
    saturation: float = 0.4
    """Factor drawn from 1 - this to 1 + this."""
    hue: float = 0.1
    """Shift drawn from - this to this, in turns of the colour circle."""
    grey_p: float = 0.2
    """Probability of losing all colour."""
    still_removed_p: float = field(default=0.0, metadata={BEFORE: 0.0})
    """Probability that a clip loses its mean over time, and so what stands still in it: the room cannot be recognised,
    and motion has to be seen."""

    def __post_init__(self) -> None:
        for name in ("blur_p", "jitter_p", "grey_p", "still_removed_p", "brightness", "contrast", "saturation"):
            probability(name, getattr(self, name))
        if not 0 < self.blur_sigma[0] <= self.blur_sigma[1]:
            raise ValueError(f"blur_sigma is {self.blur_sigma}; give two positive numbers of pixels, rising")
        if not 0 <= self.hue <= 0.5:
            raise ValueError(f"hue is {self.hue}; give a number of turns from 0 to 0.5")

    @property
    def blur_taps(self) -> int:
        """Length of the blurring kernel: three standard deviations of the strongest blur to each side."""
        return 2 * math.ceil(3 * self.blur_sigma[1]) + 1


def largest_stride(frames: int, sampling: Sampling) -> int:
    """Largest stride, at most `sampling.stride`, at which a video of `frames` frames can serve; 0 where none can."""
    return next((s for s in range(sampling.stride, 0, -1) if sampling.needed(s) <= frames), 0)


def draw_clip(rng: Generator, frames: int, sampling: Sampling) -> tuple[int, int, int]:
    """A clip and its positive motion window: (start, stride, window start), frame numbers within the video.

    The start is uniform over all that leave room for the window. Raises ValueError where no stride is short enough.
    """
    stride = largest_stride(frames, sampling)
    if not stride:
        raise ValueError(
            f"a video of {frames} frames cannot serve: {sampling.frames} frames, a gap of {sampling.gap} and "
            f"{sampling.motion_frames} motion maps need {sampling.needed(1)} at stride 1; drop it"
        )
    start = int(rng.integers(frames - sampling.extent(stride) + 1))
    return start, stride, sampling.window(start, stride, frames)


def draw_negatives(rng: Generator, frames: int, window: int, sampling: Sampling) -> list[int]:
    """First frames of the K negative motion windows; none overlaps the positive one, which starts at `window`.

    They are distinct where the video has room for that many starts. Raises ValueError where no window fits beside the
    positive one.
    """
    length = sampling.motion_frames
    before, after = max(window - length + 1, 0), max(frames - window - 2 * length + 1, 0)
    if sampling.negatives and not before + after:
        raise ValueError(
            f"a video of {frames} frames has no second window of {length} beside the one at {window}; "
            "choose fewer motion_frames, or negatives=0"
        )
    beside = window + length - before  # the starts are 0 to before - 1, then go on behind the positive window
    drawn = rng.choice(before + after, sampling.negatives, replace=before + after < sampling.negatives)
    return [n if n < before else n + beside for n in drawn.tolist()]


def draw_iframe(rng: Generator, iframes: np.ndarray, first: int, last: int, reach: int) -> int:
    """Which of a video's I-frames goes with the clip from frame `first` to `last`: a position in `iframes`, rising.

    Uniform over those from `reach` frames before the clip to `reach` after it. With one I-frame every 12 frames a clip
    of 61 always has several; where a longer GOP leaves none, the one nearest the clip's middle.
    """
    low, high = iframes.searchsorted(first - reach), iframes.searchsorted(last + reach, "right")
    return int(rng.integers(low, high)) if low < high else nearest(iframes, (first + last) / 2)


def draw_box(rng: Generator, cropping: Cropping, width: int, height: int) -> np.ndarray:
    """A random box of a frame of `width` x `height` pixels: float32 (x0, y0, x1, y1), fractions of the frame.

    Area uniform, aspect log-uniform (in pixels), position uniform, among boxes inside the frame; where ten draws do
    not give one, the largest centred box of an allowed aspect.
    """
    low, high = math.log(cropping.aspect[0]), math.log(cropping.aspect[1])
    for a, b, x, y in rng.random((TRIES, 4)).tolist():
        area = cropping.area[0] + a * (cropping.area[1] - cropping.area[0])
        shape = math.exp(low + b * (high - low)) * height / width  # the aspect, in fractions of the frame
        w, h = math.sqrt(area * shape), math.sqrt(area / shape)
        if w <= 1 and h <= 1:
            return _box(w, h, x, y)
    shape = min(max(width / height, cropping.aspect[0]), cropping.aspect[1]) * height / width
    return _box(min(1.0, shape), min(1.0, 1 / shape), 0.5, 0.5)


def _box(w: float, h: float, x: float, y: float) -> np.ndarray:
    """A box of size (w, h), at the share (x, y) of the room it leaves."""
    x0, y0 = x * (1 - w), y * (1 - h)
    return np.array([x0, y0, min(x0 + w, 1), min(y0 + h, 1)], np.float32)


def draw_photometric(rng: Generator, photometric: Photometric) -> np.ndarray:
    """What `train.augment.photometric` does to a clip, float32 (P,) = (6,).

    | column | meaning | not drawn |
    |---|---|---|
    | 0 | standard deviation of the blur, pixels of the crop | 0 |
    | 1, 2, 3 | factors of brightness, contrast, saturation | 1, 1, 1 |
    | 4 | shift of the hue, turns | 0 |
    | 5 | grey: 1 yes, 0 no | 0 |
    """
    p = photometric
    # All are drawn whether used or not, so that one probability does not shift the other draws.
    blur, sigma, jitter, *change, grey = rng.random(8).tolist()
    low, high = p.blur_sigma
    strength = 2.0 if jitter < p.jitter_p else 0.0
    brightness, contrast, saturation, hue = (strength * (c - 0.5) for c in change)
    return np.array(
        [
            low + sigma * (high - low) if blur < p.blur_p else 0.0,
            1 + p.brightness * brightness,
            1 + p.contrast * contrast,
            1 + p.saturation * saturation,
            p.hue * hue,
            grey < p.grey_p,
        ],
        np.float32,
    )


def clip_starts(frames: int, span: int, clips: int) -> np.ndarray:
    """Starts of `clips` clips spread evenly over a video, int64 (C,): round(i (frames - span) / (clips - 1)).

    Halves round up. A single clip sits in the middle; a video shorter than the clip gives 0 throughout.
    """
    room = max(frames - span, 0)
    if clips == 1:
        return np.array([room // 2])
    return (2 * np.arange(clips) * room + clips - 1) // (2 * (clips - 1))


def nearest(iframes: np.ndarray, frame: float) -> int:
    return int(np.abs(iframes - frame).argmin())


def positive(name: str, value: float) -> None:
    """Zero, infinite and NaN are none."""
    if not 0 < value < math.inf:
        raise ValueError(f"{name} is {value}; choose a number above 0")


def one_of(name: str, value: str, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise ValueError(f"{name} is {value!r}; choose one of {', '.join(choices)}")


def probability(name: str, value: float) -> None:
    if not 0 <= value <= 1:
        raise ValueError(f"{name} is {value}; choose a number from 0 to 1")
