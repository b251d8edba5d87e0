"""What of a video becomes a sample: every draw inside its limits, every allowed value drawn."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

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


def test_seventy_one_frames_are_enough_for_the_paper() -> None:
    assert [largest_stride(f, Sampling()) for f in (71, 70, 56, 41, 26, 25)] == [4, 3, 3, 2, 1, 0]


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


@given(seeds)
def test_photometric_draws(seed: int) -> None:
    def draw(**changes: Any) -> np.ndarray:
        return draw_photometric(np.random.default_rng(seed), Photometric(**changes))

    nothing = [0, 1, 1, 1, 0, 0]
    assert draw(blur_p=0, jitter_p=0, grey_p=0).tolist() == nothing
    sigma, brightness, contrast, saturation, hue, grey = draw(blur_p=1, jitter_p=1, grey_p=1).tolist()
    assert 0.1 <= sigma <= 2 and grey == 1 and abs(hue) <= 0.1
    assert all(0.6 - 1e-6 <= f <= 1.4 + 1e-6 for f in (brightness, contrast, saturation))
    # One probability leaves the other draws alone.
    assert draw(blur_p=0, jitter_p=1, grey_p=1).tolist() == [0, brightness, contrast, saturation, hue, 1]
    assert draw(blur_p=1, jitter_p=0, grey_p=1).tolist() == [sigma, *nothing[1:5], 1]


def test_the_blurring_kernel_reaches_three_deviations() -> None:
    assert Photometric().blur_taps == 13


def test_wrong_settings_are_refused() -> None:
    for make_one in (
        lambda: Sampling(frames=0),
        lambda: Sampling(gap=-1),
        lambda: Sampling(period="past"),  # type: ignore[arg-type]
        lambda: Cropping(area=(0.5, 1.2)),
        lambda: Cropping(aspect=(2, 1)),
        lambda: Cropping(flip=2),
        lambda: Photometric(blur_p=-1),
        lambda: Photometric(still_removed_p=1.5),
        lambda: Photometric(hue=0.7),
        lambda: Photometric(blur_sigma=(0, 1)),
    ):
        with pytest.raises(ValueError, match=r"choose|give"):
            make_one()


def test_clip_starts_by_hand() -> None:
    assert clip_starts(160, 61, 10).tolist() == [0, 11, 22, 33, 44, 55, 66, 77, 88, 99]
    # 39 i / 9 = 0, 4.3, 8.7, 13, 17.3, 21.7, 26, 30.3, 34.7, 39
    assert clip_starts(100, 61, 10).tolist() == [0, 4, 9, 13, 17, 22, 26, 30, 35, 39]
    assert clip_starts(62, 61, 10).tolist() == [0, 0, 0, 0, 0, 1, 1, 1, 1, 1]
    assert clip_starts(61, 61, 10).tolist() == clip_starts(8, 61, 10).tolist() == [0] * 10
    assert clip_starts(66, 61, 3).tolist() == [0, 3, 5]  # a half rounds up
    assert clip_starts(66, 61, 1).tolist() == [2]


@given(st.integers(1, 500), st.integers(1, 80), st.integers(2, 20))
def test_clips_stay_inside_and_reach_both_ends(frames: int, span: int, clips: int) -> None:
    starts = clip_starts(frames, span, clips)
    room = max(frames - span, 0)
    assert (starts[0], starts[-1]) == (0, room)
    np.testing.assert_allclose(starts, np.arange(clips) * room / (clips - 1), atol=0.5)
