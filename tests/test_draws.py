"""What of a video becomes a sample: every draw inside its limits, every allowed value drawn."""

from __future__ import annotations

import re
from typing import Any

import numpy as np
import pytest
from conftest import TINY, make_shards, smooth_texture, write_video
from hypothesis import assume, given
from hypothesis import strategies as st

from preprocess.schema import INTRA
from preprocess.shards import ShardSet
from train.config import Config
from train.data import PretrainSet
from train.draws import (
    Cropping,
    Photometric,
    Sampling,
    clip_starts,
    draw_box,
    draw_clip,
    draw_iframe,
    draw_negatives,
    draw_photometric,
    largest_stride,
)

samplings = st.builds(
    Sampling,
    frames=st.integers(1, 20),
    stride=st.integers(1, 5),
    motion_frames=st.integers(1, 12),
    gap=st.integers(0, 4),
    period=st.sampled_from(["future", "current"]),
    negatives=st.integers(0, 4),
)
seeds = st.integers(0, 2**32)


def every_iframe(frames: int, gop: int = 12) -> np.ndarray:
    return np.arange(0, frames, gop)


def serves(frames: int, stride: int, s: Sampling) -> bool:
    """By trying: every possible start leaves room for its window and for a window beside it."""
    last = (s.frames - 1) * stride
    w = s.motion_frames
    possible = []
    for start in range(frames):
        if s.period == "future":
            inside = start + last + s.gap + w < frames
            window = start + last + 1 + s.gap
        else:
            inside = start + last < frames and w <= frames and start + max(last + 1, w) <= frames
            window = min(max(start + (last + 1 - w) // 2, 0), frames - w)
        if inside:
            others = [n for n in range(frames - w + 1) if n + w <= window or n >= window + w]
            possible.append(bool(others) or not s.negatives)
    return bool(possible) and all(possible)


@given(st.integers(1, 120), samplings)
def test_the_largest_stride_that_serves(frames: int, s: Sampling) -> None:
    assert largest_stride(frames, s) == max(
        (stride for stride in range(1, s.stride + 1) if serves(frames, stride, s)), default=0
    )


@given(st.integers(1, 400), samplings, seeds)
def test_clip_window_and_negatives_stay_inside_and_apart(frames: int, s: Sampling, seed: int) -> None:
    assume(largest_stride(frames, s))
    rng = np.random.default_rng(seed)
    start, stride, window = draw_clip(rng, frames, s)
    last = start + (s.frames - 1) * stride
    assert 0 <= start <= last < frames
    assert 0 <= window <= frames - s.motion_frames
    if s.period == "future":
        assert window - last - 1 == s.gap
    elif last - start + 1 >= s.motion_frames:
        assert 0 <= (start + last) - (window + window + s.motion_frames - 1) <= 1  # centres, doubled
    negatives = draw_negatives(rng, frames, window, s)
    assert len(negatives) == s.negatives
    positive = set(range(window, window + s.motion_frames))
    for n in negatives:
        assert 0 <= n <= frames - s.motion_frames
        assert positive.isdisjoint(range(n, n + s.motion_frames))


def test_every_start_and_distinct_negatives_are_drawn() -> None:
    rng = np.random.default_rng(0)
    assert {draw_clip(rng, 75, Sampling())[0] for _ in range(200)} == {0, 1, 2, 3, 4}
    drawn = [draw_negatives(rng, 71, 63, Sampling()) for _ in range(300)]
    assert all(len(set(d)) == 3 for d in drawn)
    assert {n for d in drawn for n in d} == set(range(56))
    around = {n for _ in range(300) for n in draw_negatives(rng, 40, 10, Sampling())}
    assert around == {0, 1, 2, *range(18, 33)}
    assert draw_negatives(rng, 16, 8, Sampling()) == [0, 0, 0]  # the only one there is
    with pytest.raises(ValueError, match="no second window of 8"):
        draw_negatives(rng, 15, 4, Sampling())
    with pytest.raises(ValueError, match=r"25 frames cannot serve.*need 26"):
        draw_clip(rng, 25, Sampling())


@given(st.integers(1, 400), st.integers(1, 40), st.integers(0, 10), seeds, st.data())
def test_the_iframe_is_within_reach(frames: int, gop: int, reach: int, seed: int, data: st.DataObject) -> None:
    first = data.draw(st.integers(0, frames - 1))
    last = data.draw(st.integers(first, frames - 1))
    iframes = every_iframe(frames, gop)
    frame = iframes[draw_iframe(np.random.default_rng(seed), iframes, first, last, reach)]
    if any(first - reach <= k <= last + reach for k in iframes):
        assert first - reach <= frame <= last + reach
    else:
        assert abs(frame - (first + last) / 2) == min(abs(k - (first + last) / 2) for k in iframes)


@given(
    st.tuples(st.floats(0.05, 1), st.floats(0.05, 1)).map(sorted),
    st.tuples(st.floats(0.3, 3), st.floats(0.3, 3)).map(sorted),
    st.integers(16, 800),
    st.integers(16, 800),
    seeds,
)
def test_boxes_keep_to_their_limits(area: list, aspect: list, width: int, height: int, seed: int) -> None:
    box = draw_box(np.random.default_rng(seed), Cropping(tuple(area), tuple(aspect)), width, height)
    x0, y0, x1, y1 = box.tolist()
    assert box.dtype == np.float32
    assert 0 <= x0 < x1 <= 1 and 0 <= y0 < y1 <= 1
    shape = (x1 - x0) * width / ((y1 - y0) * height)
    assert aspect[0] * (1 - 1e-4) <= shape <= aspect[1] * (1 + 1e-4)
    centred = np.allclose([x0 + x1, y0 + y1], 1) and (np.isclose(x1 - x0, 1) or np.isclose(y1 - y0, 1))
    assert centred or area[0] * (1 - 1e-4) <= (x1 - x0) * (y1 - y0) <= area[1] * (1 + 1e-4)


def test_where_no_box_fits_the_largest_in_the_centre_is_taken() -> None:
    # A square of at least 0.9 of a 2:1 frame does not exist: the largest square, centred.
    square = draw_box(np.random.default_rng(0), Cropping((0.9, 1.0), (1.0, 1.0)), 200, 100)
    np.testing.assert_allclose(square, [0.25, 0, 0.75, 1])


def test_one_probability_leaves_the_other_colours_alone() -> None:
    def draw(**probabilities: float) -> list[float]:
        return draw_photometric(np.random.default_rng(3), Photometric(**probabilities)).tolist()

    sigma, *jitter, grey = draw(blur_p=1, jitter_p=1, grey_p=1)
    assert draw(blur_p=0, jitter_p=1, grey_p=1) == [0, *jitter, grey]
    assert draw(blur_p=1, jitter_p=0, grey_p=1) == [sigma, 1, 1, 1, 0, grey]
    assert draw(blur_p=1, jitter_p=1, grey_p=0) == [sigma, *jitter, 0] and grey == 1
    assert Photometric(blur_sigma=(0.1, 2.1)).blur_taps == 15  # three deviations to each side


@pytest.mark.parametrize(
    ("kind", "wrong"),
    [
        *((Sampling, wrong) for wrong in ({"frames": 0}, {"gap": -1}, {"period": "past"}, {"motion": "both"})),
        *((Cropping, wrong) for wrong in ({"area": (0.5, 1.2)}, {"aspect": (2, 1)}, {"flip": 2})),
        *((Photometric, wrong) for wrong in ({"blur_p": -1}, {"still_removed_p": 1.5}, {"hue": 0.7})),
        (Photometric, {"blur_sigma": (0, 1)}),
    ],
)
def test_wrong_settings_are_refused(kind: Any, wrong: dict[str, Any]) -> None:
    ((name, value),) = wrong.items()
    with pytest.raises(ValueError, match=f"{name} is {re.escape(repr(value))}; (choose|give)"):
        kind(**wrong)


@given(st.integers(1, 500), st.integers(1, 80), st.integers(2, 20))
def test_clips_stay_inside_and_reach_both_ends(frames: int, span: int, clips: int) -> None:
    starts = clip_starts(frames, span, clips)
    room = max(frames - span, 0)
    assert (starts[0], starts[-1]) == (0, room)
    np.testing.assert_allclose(starts, np.arange(clips) * room / (clips - 1), atol=0.5)


def test_single_clips_lie_in_the_middle_and_halves_round_up() -> None:
    assert clip_starts(66, 61, 1).tolist() == [2] and clip_starts(66, 61, 3).tolist() == [0, 3, 5]


# ---- the frames and the motion of a sample, read off the pictures of a real video, through both codecs
#
# Every frame of the video carries its number as two grey blocks, and every step from one frame to the next has a
# displacement of its own. So what the data set delivers says by itself which frames it is, without its own word.

FRAMES, HEIGHT, WIDTH = 80, 144, 176
BLOCK = 40  # pixels of the video; the blocks lie side by side in the upper left corner


def displacement(number: int) -> tuple[int, int]:
    """Pixels right and down from frame number - 1 to this one: different for each of 81."""
    return number % 9 - 4, number // 9 - 4


def read_number(picture: np.ndarray) -> int:
    """The frame number that a picture carries, whatever its size."""
    h, w = picture.shape[0] / HEIGHT, picture.shape[1] / WIDTH
    rows = slice(round(8 * h), round((BLOCK - 8) * h))
    high, low = (picture[rows, round((x + 8) * w) : round((x + BLOCK - 8) * w)].mean() for x in (0, BLOCK))
    return 16 * (int(high) // 16) + int(low) // 16


def read_motion(maps: np.ndarray) -> list[int | None]:
    """The frame number that each motion map (W, rows, cols, 2) belongs to; None where it has no vectors."""
    found: list[int | None] = []
    for grid in maps:
        vectors = grid[3:, 6:].reshape(-1, 2)  # below and right of the blocks
        vectors = vectors[vectors[:, 0] != INTRA]
        if not len(vectors):
            found.append(None)
            continue
        dx, dy = np.round(np.median(vectors, 0) / 4).astype(int)  # quarter pixels
        found.append(int(dx + 4 + 9 * (dy + 4)))
    return found


@pytest.fixture(scope="module")
def numbered(tmp_path_factory: pytest.TempPathFactory) -> ShardSet:
    folder = tmp_path_factory.mktemp("numbered")
    texture = smooth_texture(np.random.default_rng(0), HEIGHT, WIDTH)
    frames, x, y = [], 0, 0
    for number in range(FRAMES):
        dx, dy = displacement(number)
        x, y = x + dx, y + dy
        frame = np.roll(texture, (y, x), axis=(0, 1))
        frame[:BLOCK, :BLOCK], frame[:BLOCK, BLOCK : 2 * BLOCK] = 16 * (number // 16) + 8, 16 * (number % 16) + 8
        frames.append(frame)
    write_video(folder / "videos" / "numbered.mp4", np.stack(frames))
    return make_shards(folder, folder / "videos", ["numbered.mp4"], ["one"], settings=TINY)


def without_iframes(first: int, count: int) -> list[int | None]:
    return [n if n % 12 else None for n in range(first, first + count)]


@pytest.mark.parametrize(
    "sampling", [Sampling(16, 4, 8, 2, "future", negatives=2), Sampling(9, 3, 5, 4, "current", negatives=2)]
)
def test_clips_and_windows_hold_the_frames_they_should(numbered: ShardSet, sampling: Sampling) -> None:
    data = PretrainSet(numbered, None, Config(sampling=sampling, seed=1))
    frames, stride, window, gap = sampling.frames, sampling.stride, sampling.motion_frames, sampling.gap
    starts = set()
    for epoch in range(12):
        sample = data[epoch, 0]
        clip = [read_number(picture) for picture in sample["clip"]]
        assert clip == [clip[0] + stride * t for t in range(frames)]
        starts.add(clip[0])
        iframe = read_number(sample["iframe"])
        assert iframe % 12 == 0 and clip[0] - 5 <= iframe <= clip[-1] + 5
        positive, *negatives = (read_motion(maps) for maps in sample["motion"])
        if sampling.period == "future":
            first = clip[-1] + 1 + gap  # the motion into the frame after the gap
        else:  # as many frames of the clip before the window as after it, or one fewer
            span = clip[-1] - clip[0] + 1
            first = min(max(clip[0] + (span - window) // 2, 0), FRAMES - window)
        assert positive == without_iframes(first, window)
        for negative in negatives:
            place, number = next((i, n) for i, n in enumerate(negative) if n is not None)
            assert negative == without_iframes(number - place, window)
            assert abs(number - place - first) >= window
    assert len(starts) > 3
