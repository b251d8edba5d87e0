"""Which frames and which motion a sample holds, read off the pictures: from a real video, through both codecs.

Every frame of the video carries its number as two grey blocks, and every step from one frame to the next has a
displacement of its own. So what the data set delivers says by itself which frames it is, without the data set's word.
"""

from __future__ import annotations

import numpy as np
import pytest
from conftest import TINY, make_shards, smooth_texture, write_video

from preprocess.shards import INTRA, ShardSet
from train.data import PretrainSet
from train.draws import Cropping, Period, Photometric, Sampling

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
def shards(tmp_path_factory: pytest.TempPathFactory) -> ShardSet:
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


@pytest.mark.parametrize("period", ["future", "current"])
@pytest.mark.parametrize(("frames", "stride", "window", "gap"), [(16, 4, 8, 2), (9, 3, 5, 4)])
def test_clips_and_windows_hold_the_frames_they_should(
    shards: ShardSet, period: Period, frames: int, stride: int, window: int, gap: int
) -> None:
    sampling = Sampling(frames, stride, window, gap, period, negatives=2)
    data = PretrainSet(shards, None, sampling, Cropping(), Photometric(), seed=1)
    starts = set()
    for epoch in range(12):
        sample = data[epoch, 0]
        clip = [read_number(picture) for picture in sample["clip"]]
        assert clip == [clip[0] + stride * t for t in range(frames)]
        starts.add(clip[0])
        iframe = read_number(sample["iframe"])
        assert iframe % 12 == 0 and clip[0] - 5 <= iframe <= clip[-1] + 5
        positive, *negatives = (read_motion(maps) for maps in sample["motion"])
        if period == "future":
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
