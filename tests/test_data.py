"""Samples: what is drawn, what is fetched for it, and how samples are dealt to ranks."""

from __future__ import annotations

import multiprocessing
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import simplejpeg
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from torch.utils.data import DataLoader

from preprocess.manifest import Manifest
from preprocess.shards import INTRA, Failure, Origin, Settings, ShardSet, Spool, Video, write_shard
from train.data import ClipSet, EpochSampler, FinetuneSet, PretrainSet, decode_frames, select
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

SETTINGS = Settings(width=64, height=48, frame_width=32, frame_height=32)
COUNTS = (160, 100, 71, 60, 40, 26, 25)  # frames of the numbered videos; the last cannot serve
LABELS = (0, 1, 0, 1, 0, 1, 0)
PATHS = tuple(f"{v}.avi" for v in range(len(COUNTS)))
FAILED = "broken.avi"
BLOCK = 16


# ---- shards whose pictures and maps say which frame of which video they are


def stamp(video: int, frame: int, height: int, width: int) -> bytes:
    """A JPEG of four flat blocks that survive the codec: frame // 16, frame % 16, video, 0."""
    picture = np.full((height, width, 3), 8, np.uint8)
    for i, digit in enumerate((frame // 16, frame % 16, video)):
        y, x = BLOCK * (i // 2), BLOCK * (i % 2)
        picture[y : y + BLOCK, x : x + BLOCK] = 16 * digit + 8
    return simplejpeg.encode_jpeg(picture, 90, "RGB", "420")


def read_stamp(picture: np.ndarray) -> tuple[int, int]:
    """(video, frame) of a decoded picture."""
    high, low, video = (int(picture[y : y + BLOCK, x : x + BLOCK].mean()) // 16 for y, x in ((0, 0), (0, 16), (16, 0)))
    return video, 16 * high + low


def stamps(pictures: np.ndarray) -> tuple[set[int], list[int]]:
    read = [read_stamp(p) for p in pictures]
    return {v for v, _ in read}, [f for _, f in read]


def make(folder: Path, shard: int, shards: int, videos: range, damage: int | None = None) -> None:
    spool = Spool(folder / "spool")
    spool.folder.mkdir(parents=True)
    rows, stored = [], {"frames": b"", "iframes": b"", "motion": b""}
    for v in videos:
        frames = [stamp(v, t, SETTINGS.frame_height, SETTINGS.frame_width) for t in range(COUNTS[v])]
        if damage is not None:
            frames[damage] = frames[damage][:200] + b"\xff\xd9"
        every = np.arange(0, COUNTS[v], SETTINGS.gop)
        iframes = [stamp(v, t, SETTINGS.height, SETTINGS.width) for t in every.tolist()]
        motion = np.zeros((COUNTS[v], *SETTINGS.grid, 2), np.int16)
        motion[..., 0], motion[..., 1] = np.arange(COUNTS[v])[:, None, None], v
        motion[every] = INTRA
        lengths, ilengths = (np.array([len(j) for j in jpegs]) for jpegs in (frames, iframes))
        rows.append(Video(v, PATHS[v], LABELS[v], 25.0, (240, 320), lengths, ilengths, every))
        for name, data in (("frames", b"".join(frames)), ("iframes", b"".join(iframes)), ("motion", motion.tobytes())):
            stored[name] += data
    for name, data in stored.items():
        spool.path(name).write_bytes(data)
    last = shard == shards - 1
    failures = [Failure(videos.stop, FAILED, "no frame")] if last else []
    origin = Origin(SETTINGS, "0" * 64, ("jump", "run"), {"av": "0"}, shards)
    write_shard(folder, shard, origin, videos.start, len(videos) + len(failures), rows, failures, spool)
    for left in spool.folder.iterdir():
        left.unlink()
    spool.folder.rmdir()


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> ShardSet:
    """Seven stamped videos in two shards, and one failure."""
    folder = tmp_path_factory.mktemp("stamped")
    make(folder, 0, 2, range(3))
    make(folder, 1, 2, range(3, len(COUNTS)))
    return ShardSet(folder)


def pretrain(shards: ShardSet, sampling: Sampling = Sampling(), seed: int = 0) -> PretrainSet:  # noqa: B008 - frozen
    return PretrainSet(shards, None, sampling, Cropping(), Photometric(), seed)


def some(rows: dict[str, str]) -> Manifest:
    return Manifest(tuple(rows), tuple(rows.values()), ("train",) * len(rows))


def same(a: dict, b: dict) -> bool:
    return a.keys() == b.keys() and all(np.array_equal(a[k], b[k]) for k in a)


# ---- what is drawn

samplings = st.builds(
    Sampling,
    frames=st.integers(1, 20),
    stride=st.integers(1, 5),
    motion_frames=st.integers(1, 12),
    gap=st.integers(0, 4),
    period=st.sampled_from(["future", "current"]),
    negatives=st.integers(0, 4),
    short_videos=st.sampled_from(["fit", "drop"]),
    avoid_iframes=st.booleans(),
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
    strides = range(1, s.stride + 1) if s.short_videos == "fit" else [s.stride]
    assert largest_stride(frames, s) == max((stride for stride in strides if serves(frames, stride, s)), default=0)


def test_seventy_one_frames_are_enough_for_the_paper() -> None:
    assert [largest_stride(f, Sampling()) for f in (71, 70, 56, 41, 26, 25)] == [4, 3, 3, 2, 1, 0]
    assert [largest_stride(f, Sampling(short_videos="drop")) for f in (71, 70, 26)] == [4, 0, 0]


@given(st.integers(1, 400), samplings, seeds)
def test_clip_window_and_negatives_stay_inside_and_apart(frames: int, s: Sampling, seed: int) -> None:
    assume(largest_stride(frames, s))
    rng = np.random.default_rng(seed)
    start, stride, window = draw_clip(rng, frames, s, every_iframe(frames))
    last = start + (s.frames - 1) * stride
    assert 0 <= start <= last < frames
    assert 0 <= window <= frames - s.motion_frames
    if s.period == "future":
        assert window - last - 1 == s.gap
    elif last - start + 1 >= s.motion_frames:
        assert 0 <= (start + last) - (window + window + s.motion_frames - 1) <= 1  # centres, doubled
    negatives = draw_negatives(rng, frames, window, s, every_iframe(frames)).tolist()
    assert len(negatives) == s.negatives
    positive = set(range(window, window + s.motion_frames))
    for n in negatives:
        assert 0 <= n <= frames - s.motion_frames
        assert positive.isdisjoint(range(n, n + s.motion_frames))


def test_every_start_and_distinct_negatives_are_drawn() -> None:
    rng = np.random.default_rng(0)
    assert {draw_clip(rng, 75, Sampling())[0] for _ in range(200)} == {0, 1, 2, 3, 4}
    drawn = [draw_negatives(rng, 71, 63, Sampling()).tolist() for _ in range(300)]
    assert all(len(set(d)) == 3 for d in drawn)
    assert {n for d in drawn for n in d} == set(range(56))
    assert draw_negatives(rng, 16, 8, Sampling()).tolist() == [0, 0, 0]  # the only one there is
    with pytest.raises(ValueError, match="no second window of 8"):
        draw_negatives(rng, 15, 4, Sampling())
    with pytest.raises(ValueError, match=r"25 frames cannot serve.*need 26"):
        draw_clip(rng, 25, Sampling())


@given(st.integers(84, 400), st.integers(0, 11), seeds)
def test_windows_keep_clear_of_iframes_where_asked(frames: int, first: int, seed: int) -> None:
    rng, s = np.random.default_rng(seed), Sampling(avoid_iframes=True)
    iframes = np.arange(first, frames, 12)
    _, _, window = draw_clip(rng, frames, s, iframes)
    for w in (window, *draw_negatives(rng, frames, window, s, iframes).tolist()):
        assert set(range(w, w + 8)).isdisjoint(iframes.tolist())


def test_the_fewest_iframes_where_none_is_impossible() -> None:
    rng = np.random.default_rng(0)
    s = Sampling(frames=2, stride=1, motion_frames=6, gap=0, negatives=1, avoid_iframes=True)
    # Six frames hold two multiples of four where the first is 0 or 3 beyond one, else one. Windows start at 2 to 13.
    windows = {draw_clip(rng, 19, s, every_iframe(19, 4))[2] for _ in range(200)}
    assert windows == {2, 5, 6, 9, 10, 13}
    negatives = {int(draw_negatives(rng, 19, 13, s, every_iframe(19, 4))[0]) for _ in range(200)}
    assert negatives == {1, 2, 5, 6}
    with pytest.raises(ValueError, match="pass iframes"):
        draw_clip(rng, 60, s)


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


def test_every_iframe_within_reach_is_drawn() -> None:
    rng, iframes = np.random.default_rng(0), every_iframe(200)
    drawn = {int(iframes[draw_iframe(rng, iframes, 17, 77, 5)]) for _ in range(300)}
    assert drawn == {12, 24, 36, 48, 60, 72}  # 12 = 17 - 5 is the first; 84 > 77 + 5


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


def test_boxes_fill_the_range_and_fall_back_to_the_centre() -> None:
    rng = np.random.default_rng(0)
    boxes = np.stack([draw_box(rng, Cropping(), 340, 256) for _ in range(2000)])
    area = (boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1])
    assert area.min() < 0.22 and area.max() > 0.9 and abs(boxes[:, [0, 2]].sum(1).mean() - 1) < 0.03
    # A square of at least 0.9 of a 2:1 frame does not exist: the largest square, centred.
    square = draw_box(rng, Cropping((0.9, 1.0), (1.0, 1.0)), 200, 100)
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


def test_photometric_probabilities() -> None:
    rng = np.random.default_rng(0)
    drawn = np.stack([draw_photometric(rng, Photometric()) for _ in range(4000)])
    rates = [(drawn[:, 0] > 0).mean(), (drawn[:, 4] != 0).mean(), drawn[:, 5].mean()]
    np.testing.assert_allclose(rates, [0.5, 0.5, 0.2], atol=0.03)
    jittered = drawn[drawn[:, 4] != 0]
    np.testing.assert_allclose(jittered[:, 1:5].min(0), [0.6, 0.6, 0.6, -0.1], atol=0.02)
    np.testing.assert_allclose(jittered[:, 1:5].max(0), [1.4, 1.4, 1.4, 0.1], atol=0.02)
    assert Photometric().blur_taps == 13


def test_wrong_settings_are_refused() -> None:
    for make_one in (
        lambda: Sampling(frames=0),
        lambda: Sampling(gap=-1),
        lambda: Sampling(period="past"),  # type: ignore[arg-type]
        lambda: Sampling(short_videos="skip"),  # type: ignore[arg-type]
        lambda: Cropping(area=(0.5, 1.2)),
        lambda: Cropping(aspect=(2, 1)),
        lambda: Cropping(flip=2),
        lambda: Photometric(blur_p=-1),
        lambda: Photometric(hue=0.7),
        lambda: Photometric(blur_sigma=(0, 1)),
    ):
        with pytest.raises(ValueError, match=r"choose|give"):
            make_one()


# ---- what is fetched


def test_a_sample_holds_what_was_drawn(shards: ShardSet) -> None:
    data = pretrain(shards)
    assert (len(data), data.dropped, data.failed) == (6, 1, 1)
    for index in range(len(data)):
        frames, stride = COUNTS[index], [4, 4, 4, 3, 1, 1][index]
        for epoch in range(4):
            sample = data[epoch, index]
            video, clip = stamps(sample["clip"])
            assert video == {index}
            start = clip[0]
            assert clip == [start + stride * t for t in range(16)]
            video, (iframe,) = stamps(sample["iframe"][None])
            assert video == {index} and iframe % 12 == 0 and clip[0] - 5 <= iframe <= clip[-1] + 5
            motion = sample["motion"]
            assert motion.shape == (4, 8, 3, 4, 2) and motion.dtype == np.int16
            windows = []
            for window in motion:
                vectors = window[:, 0, 0]
                plain = vectors[:, 0] != INTRA
                assert (window == vectors[:, None, None]).all() and (vectors[plain, 1] == index).all()
                (first,) = {int(v - i) for i, v in enumerate(vectors[:, 0]) if v != INTRA}
                assert [first + i for i in np.flatnonzero(~plain)] == [
                    f for f in range(first, first + 8) if f % 12 == 0
                ]
                windows.append(first)
            assert windows[0] == clip[-1] + 3
            assert all(abs(w - windows[0]) >= 8 and 0 <= w <= frames - 8 for w in windows[1:])
            assert np.array_equal(sample["motion_box"][0], sample["clip_box"])
            assert sample["motion_flip"][0] == sample["clip_flip"]
            boxes = {tuple(b) for b in (*sample["motion_box"].tolist(), sample["iframe_box"].tolist())}
            assert len(boxes) == 5
            assert (sample["index"], sample["label"]) == (index, LABELS[index])


def test_the_current_window_lies_in_the_middle(shards: ShardSet) -> None:
    sample = pretrain(shards, Sampling(period="current", avoid_iframes=False))[0, 1]
    _, clip = stamps(sample["clip"])
    vectors = sample["motion"][0, :, 0, 0, 0]
    expected = np.arange(clip[0] + 26, clip[0] + 34)  # 61 frames: 26, the 8, 27
    assert np.array_equal(vectors[vectors != INTRA], expected[expected % 12 != 0])


def test_types_and_shapes_of_a_collated_batch(shards: ShardSet) -> None:
    data = pretrain(shards)
    batch = next(iter(DataLoader(data, batch_sampler=EpochSampler(len(data), 3))))
    assert {k: (tuple(v.shape), v.dtype) for k, v in batch.items()} == {
        "clip": ((3, 16, 32, 32, 3), torch.uint8),
        "clip_box": ((3, 4), torch.float32),
        "clip_flip": ((3,), torch.bool),
        "clip_photo": ((3, 6), torch.float32),
        "iframe": ((3, 48, 64, 3), torch.uint8),
        "iframe_box": ((3, 4), torch.float32),
        "iframe_flip": ((3,), torch.bool),
        "iframe_photo": ((3, 6), torch.float32),
        "motion": ((3, 4, 8, 3, 4, 2), torch.int16),
        "motion_box": ((3, 4, 4), torch.float32),
        "motion_flip": ((3, 4), torch.bool),
        "index": ((3,), torch.int64),
        "label": ((3,), torch.int64),
    }


def test_draws_depend_on_seed_epoch_and_video_alone(shards: ShardSet) -> None:
    first = [pretrain(shards)[2, i] for i in range(6)]
    again = pretrain(shards)
    for i in (5, 0, 3, 3, 1):
        again[7, i]
        assert same(again[2, i], first[i])
    assert not same(pretrain(shards)[3, 0] | {"index": 0}, first[0])
    assert not same(pretrain(shards, seed=1)[2, 0], first[0])
    boxes = {tuple(s["clip_box"].tolist()) for s in first}
    assert len(boxes) == 6


@pytest.mark.parametrize(("workers", "context"), [(0, None), (1, "fork"), (2, "fork"), (1, "spawn")])
def test_workers_change_nothing(shards: ShardSet, workers: int, context: str | None) -> None:
    data = pretrain(shards)
    sampler = EpochSampler(len(data), 2, seed=3)
    sampler.start_at(1)
    # Spawned workers must unpickle the data set: that it holds no open file is part of the test.
    start = multiprocessing.get_context(context) if context else None
    seen = []
    for batch in DataLoader(data, batch_sampler=sampler, num_workers=workers, multiprocessing_context=start):
        for row, index in enumerate(batch["index"].tolist()):
            assert same({k: v[row].numpy() for k, v in batch.items()}, data[1, index])
            seen.append((1, index))
    assert seen == [key for batch in sampler for key in batch]


def test_short_videos_are_dropped_where_asked(shards: ShardSet) -> None:
    data = pretrain(shards, Sampling(short_videos="drop"))
    assert data.dropped == 4 and data.video.tolist() == [0, 1, 2]
    with pytest.raises(ValueError, match=r"none of 7 videos has the 161 frames.*short_videos=fit"):
        pretrain(shards, Sampling(frames=31, stride=5, short_videos="drop"))


def test_a_manifest_selects_by_path(shards: ShardSet) -> None:
    data = PretrainSet(
        shards,
        some({"4.avi": "jump", "0.avi": "", FAILED: "run", "1.avi": "run"}),
        Sampling(),
        Cropping(),
        Photometric(),
    )
    assert data.video.tolist() == [4, 0, 1] and data.label.tolist() == [0, 0, 1]
    assert (data.failed, data.dropped) == (1, 0)
    assert stamps(data[0, 0]["clip"])[0] == {4}


def test_manifests_that_do_not_fit_are_refused(shards: ShardSet) -> None:
    with pytest.raises(ValueError, match=r"6 of 7 paths.*no shard.*a0, a1, a2, a3, a4, ….*run stage 1"):
        select(shards, some({"0.avi": "jump"} | {f"a{i}": "jump" for i in range(6)}))
    with pytest.raises(ValueError, match=r"1 labels.*1\.avi is 'jump' here, 'run' there"):
        select(shards, some({"0.avi": "jump", "1.avi": "jump"}))
    with pytest.raises(ValueError, match="names no video"):
        select(shards, some({FAILED: "jump"}))


def test_damaged_pictures_are_named(tmp_path: Path) -> None:
    make(tmp_path, 0, 1, range(2, 3), damage=7)
    shard = ShardSet(tmp_path).shards[0]
    assert len(decode_frames(shard, np.array([6, 8]))) == 2
    with pytest.raises(ValueError, match=r"shard-00000\.h5: frame 7 "):
        decode_frames(shard, np.array([6, 7]))


# ---- evaluation and fine-tuning


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


def test_clips_of_a_video(shards: ShardSet) -> None:
    data = ClipSet(shards, None, Sampling())
    assert len(data) == 7  # no video is dropped
    sample = data[1]
    assert sample["clips"].shape == (10, 16, 32, 32, 3)
    for start, clip in zip([0, 4, 9, 13, 17, 22, 26, 30, 35, 39], sample["clips"]):
        assert stamps(clip) == ({1}, list(range(start, start + 61, 4)))
    assert (sample["index"], sample["label"]) == (1, 1)
    short = ClipSet(shards, None, Sampling(), clips=2)[6]["clips"]  # 25 frames
    repeated = [0, 4, 8, 12, 16, 20, 24, 3, 7, 11, 15, 19, 23, 2, 6, 10]
    assert [stamps(c) for c in short] == [({6}, repeated)] * 2


def test_iframes_nearest_the_clips_centres(shards: ShardSet) -> None:
    sample = ClipSet(shards, None, Sampling(), modality="iframe")[1]
    # Centres 30, 34, 39, 43, 47, 52, 56, 60, 65, 69; 30 lies between 24 and 36: the earlier.
    assert stamps(sample["iframes"]) == ({1}, [24, 36, 36, 48, 48, 48, 60, 60, 60, 72])
    short = ClipSet(shards, None, Sampling(), clips=1, modality="iframe")[6]["iframes"]
    assert stamps(short) == ({6}, [0])  # 30 % 25 = 5


def test_motion_around_the_clips_centres(shards: ShardSet) -> None:
    sample = ClipSet(shards, None, Sampling(), modality="motion")[1]
    assert sample["motion"].shape == (10, 8, 3, 4, 2)
    assert sample["motion"][0, :, 0, 0, 0].tolist() == [26, 27, 28, 29, 30, 31, 32, 33]
    assert sample["motion"][1, :, 0, 0, 0].tolist() == [30, 31, 32, 33, 34, 35, INTRA, 37]
    short = ClipSet(shards, None, Sampling(), clips=1, modality="motion")[6]["motion"]
    assert short[0, :, 2, 3].tolist() == [[i, 6] for i in (1, 2, 3, 4, 5, 6, 7, 8)]  # 26 % 25 = 1
    with pytest.raises(ValueError, match="'flow'; choose one of video, iframe, motion"):
        ClipSet(shards, None, Sampling(), modality="flow")  # type: ignore[arg-type]


def test_finetuning_clips(shards: ShardSet) -> None:
    data = FinetuneSet(shards, None, Sampling(), Cropping(), Photometric(), seed=5)
    assert len(data) == 7
    starts = set()
    for epoch in range(60):
        video, clip = stamps(data[epoch, 2]["clip"])  # 71 frames: eleven starts
        assert video == {2} and clip == list(range(clip[0], clip[0] + 61, 4))
        starts.add(clip[0])
    assert starts == set(range(11))
    sample = data[0, 6]
    assert stamps(sample["clip"])[1] == [4 * t % 25 for t in range(16)]
    assert sample["label"] == 0 and same(sample, data[0, 6]) and not same(sample, data[1, 6])
    assert set(sample) == {"clip", "clip_box", "clip_flip", "clip_photo", "index", "label"}


def test_finetuning_needs_labels(shards: ShardSet, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shards, "label", np.array([0, 1, 0, -1, 0, 1, 0], np.int32))
    with pytest.raises(ValueError, match=r"1 videos have no label \(3\.avi\)"):
        FinetuneSet(shards, None, Sampling(), Cropping(), Photometric())


# ---- how samples are dealt

epochs = st.integers(0, 50)


@given(st.integers(1, 200), st.integers(1, 10), st.sampled_from([1, 2, 4]), seeds, epochs)
def test_ranks_share_one_order(n: int, share: int, world: int, seed: int, epoch: int) -> None:
    batch = share * world
    assume(n >= batch)
    ranks = [EpochSampler(n, batch, r, world, seed) for r in range(world)]
    alone = EpochSampler(n, batch, seed=seed)
    for sampler in (*ranks, alone):
        sampler.start_at(epoch)
    together = [[key for part in parts for key in part] for parts in zip(*ranks)]
    assert together == list(alone)
    videos = [i for keys in together for e, i in keys]
    assert all(e == epoch for keys in together for e, _ in keys)
    assert len(videos) == len(set(videos)) == n - n % batch and set(videos) <= set(range(n))
    assert alone.dropped == n % batch and len(alone) == alone.steps == n // batch


@given(st.integers(1, 100), st.integers(1, 8), seeds, epochs, st.data())
def test_resuming_gives_the_remainder(n: int, batch: int, seed: int, epoch: int, data: st.DataObject) -> None:
    assume(n >= batch)
    whole = EpochSampler(n, batch, seed=seed)
    whole.start_at(epoch)
    step = data.draw(st.integers(0, whole.steps))
    rest = EpochSampler(n, batch, seed=seed)
    rest.start_at(epoch, step)
    assert list(rest) == list(whole)[step:] and len(rest) == whole.steps - step


def test_epochs_and_seeds_shuffle_anew() -> None:
    orders = []
    for seed, epoch in ((0, 0), (0, 1), (1, 0)):
        sampler = EpochSampler(50, 50, seed=seed)
        sampler.start_at(epoch)
        orders.append([i for _, i in next(iter(sampler))])
    assert len({tuple(o) for o in orders}) == 3 and all(o != sorted(o) for o in orders)


def test_batches_that_cannot_be_dealt_are_refused() -> None:
    with pytest.raises(ValueError, match="batch of 6 cannot be dealt to 4 ranks"):
        EpochSampler(100, 6, world=4)
    with pytest.raises(ValueError, match="7 videos do not fill one batch of 8"):
        EpochSampler(7, 8)
    with pytest.raises(ValueError, match="rank 2 of 2"):
        EpochSampler(100, 4, rank=2, world=2)
    with pytest.raises(ValueError, match="steps 0 to 25"):
        EpochSampler(100, 4).start_at(0, 26)
