"""Samples: what is drawn, and what is fetched for it. test_sampler.py has how samples are dealt to ranks."""

from __future__ import annotations

import copy
import mmap
import os
import pickle
import resource
import shutil
from collections.abc import Callable
from itertools import product
from pathlib import Path

import numpy as np
import pytest
import simplejpeg
import torch
from torch.utils.data import DataLoader

from preprocess import shards as reading
from preprocess.manifest import Manifest
from preprocess.schema import INTRA, Failure, Origin, Settings
from preprocess.shards import ShardSet
from preprocess.writer import Spool, Video, write_shard
from train.config import Config, Objective, Pretraining
from train.data import ClipSet, EpochSampler, FinetuneSet, PretrainSet, decode_frames, select
from train.draws import Cropping, Photometric, Sampling
from train.loader import make_loader
from train.tasks import PretrainingTask

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
            cut = frames[damage].index(b"\xff\xda") + 20  # in the coefficients: the header is whole
            frames[damage] = frames[damage][:cut] + b"\xff\xd9"
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
    return PretrainSet(shards, None, Config(sampling=sampling, seed=seed))


def some(rows: dict[str, str]) -> Manifest:
    return Manifest(tuple(rows), tuple(rows.values()), ("train",) * len(rows))


def same(a: dict, b: dict) -> bool:
    return a.keys() == b.keys() and all(np.array_equal(a[k], b[k]) for k in a)


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


@pytest.mark.parametrize(("alpha", "unread", "reads"), [(0.0, "motion", "_motion"), (1.0, "iframe", "decode_iframes")])
def test_one_task_alone_reads_nothing_of_the_other_and_is_drawn_alike(
    shards: ShardSet, monkeypatch: pytest.MonkeyPatch, alpha: float, unread: str, reads: str
) -> None:
    both = [pretrain(shards)[1, i] for i in range(6)]
    monkeypatch.setattr(f"train.data.{reads}", lambda *_: pytest.fail("it was read"))
    data = PretrainingTask(Pretraining(objective=Objective(alpha)), shards, None).data
    for i, sample in enumerate(both):
        assert same(data[1, i], {key: value for key, value in sample.items() if not key.startswith(unread)})
        assert f"{unread}_box" in sample
        drawn = data._draw((1, i))  # of which the disk is told
        assert len(drawn.windows if unread == "motion" else drawn.iframe) == 0


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


def test_the_disk_is_asked_for_a_batch_at_once(shards: ShardSet, tmp_path: Path) -> None:
    """Pages that the kernel has let go of: unannounced, a batch waits for the disk page by page."""
    copy_of = Path(shutil.copytree(shards.folder, tmp_path / "shards"))

    def waits(announced: bool) -> int:
        data, keys = pretrain(ShardSet(copy_of)), [(0, index) for index in range(6)]
        if not announced:
            data._expect = lambda _: None  # type: ignore[method-assign]
        expected = [data[key] for key in keys]
        for shard in data.shards.shards:
            # As a disk far away, which reads no more than it is asked for.
            reading._libc.madvise(shard._mapped.ctypes.data, shard._mapped.size, mmap.MADV_RANDOM)
            shard.release()
            with open(shard.path, "rb") as f:
                os.fsync(f.fileno())
                os.posix_fadvise(f.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        before = resource.getrusage(resource.RUSAGE_SELF).ru_majflt
        found = data.__getitems__(keys)
        count = resource.getrusage(resource.RUSAGE_SELF).ru_majflt - before
        assert all(same(a, b) for a, b in zip(found, expected))
        return count

    unannounced = waits(False)
    if not unannounced:
        pytest.skip("this file system keeps its pages in memory")
    assert waits(True) < unannounced / 4


@pytest.mark.parametrize(
    ("cores", "processes", "workers"), [(1, 1, 1), (2, 1, 1), (8, 1, 7), (64, 1, 8), (64, 8, 7), (8, 8, 1)]
)
def test_loader_workers_follow_the_cores(
    shards: ShardSet, monkeypatch: pytest.MonkeyPatch, cores: int, processes: int, workers: int
) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(cores)))
    monkeypatch.setenv("LOCAL_WORLD_SIZE", str(processes))
    data, cpu = pretrain(shards), torch.device("cpu")
    assert make_loader(data, None, cpu).num_workers == workers and make_loader(data, 0, cpu).num_workers == 0


def test_workers_change_nothing(shards: ShardSet) -> None:
    data = pickle.loads(pickle.dumps(pretrain(shards)))  # as workers get it that are not forked: no open file in it
    keys = list(EpochSampler(len(data), 2, seed=3).between(3, 6))
    seen = []
    for batch in DataLoader(data, batch_sampler=keys, num_workers=2):
        for row, index in enumerate(batch["index"].tolist()):
            assert same({k: v[row].numpy() for k, v in batch.items()}, pretrain(shards)[1, index])
            seen.append((1, index))
    assert seen == [key for batch in keys for key in batch]


def test_a_manifest_selects_by_path(shards: ShardSet) -> None:
    data = PretrainSet(
        shards,
        some({"4.avi": "jump", "0.avi": "", FAILED: "run", "1.avi": "run"}),
        Config(),
    )
    assert data.video.tolist() == [4, 0, 1] and data.label.tolist() == [0, 0, 1]
    assert (data.failed, data.dropped) == (1, 0)
    assert stamps(data[0, 0]["clip"])[0] == {4}


def test_damaged_pictures_are_named(tmp_path: Path) -> None:
    make(tmp_path, 0, 1, range(2, 3), damage=7)
    shard = ShardSet(tmp_path).shards[0]
    assert len(decode_frames(shard, np.array([6, 8]))) == 2
    with pytest.raises(ValueError, match=r"shard-00000\.h5: frame 7 "):
        decode_frames(shard, np.array([6, 7]))


# ---- how what is drawn is distributed, seen in many samples of one video of 160 frames, 64 x 48 pixels

MANY = 3000
FEW = Sampling(frames=2, stride=60, motion_frames=2, negatives=2)  # a span of 61 frames, of which two are decoded
# Of such boxes none is refused for leaving the frame.
COLOURS = Photometric(blur_p=0.6, jitter_p=0.7, grey_p=0.25, still_removed_p=0.4)
DRAWN = Pretraining(
    sampling=FEW, cropping=Cropping(area=(0.1, 0.5), aspect=(0.8, 1.6), flip=0.3), photometric=COLOURS, seed=11
)


@pytest.fixture(scope="module")
def drawn(shards: ShardSet) -> list[dict]:
    data = PretrainSet(shards, some({PATHS[0]: ""}), DRAWN)
    return [data[epoch, 0] for epoch in range(MANY)]


def assert_uniform(values: np.ndarray, low: float = 0, high: float = 1) -> None:
    """Kolmogorov and Smirnov's distance from the uniform distribution; a fair draw exceeds this once in 2,000."""
    expected = (np.sort(values.ravel()) - low) / (high - low)
    steps = np.arange(1, expected.size + 1) / expected.size
    distance = max((steps - expected).max(), (expected - steps + 1 / expected.size).max())
    assert distance * expected.size**0.5 < 1.95, distance


def assert_independent(*columns: np.ndarray) -> None:
    """No two of them correlate; a fair draw exceeds this once in 16,000 pairs."""
    found = np.corrcoef(np.stack(columns).astype(float)) - np.eye(len(columns))
    assert np.abs(found).max() < 4 / len(columns[0]) ** 0.5, found


def test_boxes_are_drawn_as_they_are_said_to_be(drawn: list[dict]) -> None:
    """Area uniform, aspect in pixels log-uniform, place uniform across and down, each by itself."""
    boxes = np.stack([[s["clip_box"], s["iframe_box"], *s["motion_box"][1:]] for s in drawn]).astype(float)
    x0, y0, x1, y1 = boxes.reshape(-1, 4).T
    w, h = x1 - x0, y1 - y0
    across, down = x0 / (1 - w), y0 / (1 - h)
    assert_uniform(w * h, 0.1, 0.5)
    assert_uniform(np.log((64 * w) / (48 * h)), np.log(0.8), np.log(1.6))
    assert_uniform(across)
    assert_uniform(down)
    assert_independent(w * h, np.log(w / h), across, down)
    assert_independent(*boxes[:, :, 0].T)  # of clip, I-frame and two windows


def test_flips_come_at_their_rate_each_by_itself(drawn: list[dict]) -> None:
    flips = np.array([[s["clip_flip"], s["iframe_flip"], *s["motion_flip"][1:]] for s in drawn])
    np.testing.assert_allclose(flips.mean(0), 0.3, atol=4 * (0.3 * 0.7 / MANY) ** 0.5)
    assert_independent(*flips.T)
    assert all(s["motion_flip"][0] == s["clip_flip"] for s in drawn)


def test_colours_are_drawn_as_they_are_said_to_be(drawn: list[dict]) -> None:
    photo = np.stack([[s["clip_photo"], s["iframe_photo"]] for s in drawn]).astype(float)
    for column in photo.T:
        assert_independent(*column)  # of clip and I-frame
    blurred, jittered, grey = photo[..., 0] > 0, photo[..., 4] != 0, photo[..., 5] > 0
    rates = [x.mean() for x in (blurred, jittered, grey)]
    np.testing.assert_allclose(rates, [0.6, 0.7, 0.25], atol=4 * (0.25 / MANY / 2) ** 0.5)
    assert_independent(blurred.ravel(), jittered.ravel(), grey.ravel())
    assert_uniform(photo[blurred][:, 0], 0.1, 2)
    for column, strength, middle in ((1, 0.4, 1), (2, 0.4, 1), (3, 0.4, 1), (4, 0.1, 0)):
        assert_uniform(photo[jittered][:, column], middle - strength, middle + strength)
    assert_independent(*photo[jittered][:, 1:5].T)
    assert (photo[~jittered][:, 1:5] == [1, 1, 1, 0]).all()


def test_clips_lose_what_stands_still_at_its_rate_and_nothing_else_is_drawn_otherwise(
    shards: ShardSet, drawn: list[dict]
) -> None:
    removed = np.array([s["clip_still_removed"] for s in drawn])
    np.testing.assert_allclose(removed.mean(), 0.4, atol=4 * (0.24 / MANY) ** 0.5)
    assert_independent(removed, [s["clip_flip"] for s in drawn], [s["motion_flip"][-1] for s in drawn])
    plain = PretrainSet(shards, some({PATHS[0]: ""}), DRAWN.changed({"photometric.still_removed_p": 0.0}))
    for epoch in range(5):
        assert same(plain[epoch, 0] | {"clip_still_removed": removed[epoch]}, drawn[epoch])
        assert not plain[epoch, 0]["clip_still_removed"]


def test_iframes_are_drawn_from_the_whole_clip_and_its_reach(drawn: list[dict]) -> None:
    places: dict[int, list[int]] = {5: [], 6: []}  # of so many that are near, which
    for sample in drawn:
        first, last = (read_stamp(p)[1] for p in sample["clip"])
        assert last - first == 60
        near = [k for k in range(0, COUNTS[0], 12) if first - 5 <= k <= last + 5]
        places[len(near)].append(near.index(read_stamp(sample["iframe"])[1]))
    for count, chosen in places.items():
        rates = np.bincount(chosen, minlength=count) / len(chosen)
        np.testing.assert_allclose(rates, 1 / count, atol=4 * (1 / count / len(chosen)) ** 0.5)


def test_the_first_video_is_not_drawn_as_its_epoch_is_shuffled(drawn: list[dict]) -> None:
    starts = [read_stamp(s["clip"][0])[1] for s in drawn]
    assert_uniform(np.array(starts) + np.random.default_rng(0).random(MANY), 0, 160 - 65 + 1)
    same_stream = [int(np.random.default_rng([11, epoch]).integers(160 - 65 + 1)) for epoch in range(MANY)]
    assert np.mean([a == b for a, b in zip(starts, same_stream)]) < 0.05


# ---- evaluation and fine-tuning


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


def test_finetuning_clips(shards: ShardSet) -> None:
    data = FinetuneSet(shards, None, Config(seed=5))
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
    assert set(sample) == {"clip", "clip_box", "clip_flip", "clip_photo", "clip_still_removed", "index", "label"}


def test_motion_beside_labels_changes_no_clip(shards: ShardSet) -> None:
    """Table 6: the networks differ in what they learn from, not in what they see. Clip, gap and window are 71 frames;
    a clip that begins too late for them has the video's last maps, which do not count."""
    alone, beside = (FinetuneSet(shards, None, Config(seed=5), with_motion) for with_motion in (False, True))
    assert beside.unserved == 4
    found = set()
    for index, epoch in product(range(7), range(40)):
        one, both = alone[epoch, index], beside[epoch, index]
        assert all(np.array_equal(one[key], both[key]) for key in one)
        start, frames = stamps(one["clip"])[1][0], COUNTS[index]
        assert both["serves"] == (start + 71 <= frames)
        window = start + 63 if both["serves"] else frames - 8
        maps = both["motion"][0, :, 0, 0, 0]
        assert all(n in (window + i, INTRA) for i, n in enumerate(maps.tolist())) and (maps != INTRA).sum() >= 7
        found.add((index, bool(both["serves"])))
    assert found == {*product(range(3), (True, False)), *product(range(3, 7), (False,))}


# ---- what is refused


@pytest.mark.parametrize(
    ("make_one", "message"),
    [
        (
            lambda s: PretrainSet(s, None, Config(sampling=Sampling(frames=161))),
            r"none of 7 videos has the 171 frames .* at stride 1 .*choose fewer frames",
        ),
        (
            lambda s: select(s, some({"0.avi": "jump"} | {f"a{i}": "jump" for i in range(6)})),
            r"6 of 7 paths.*no shard.*a0, a1, a2, a3, a4, ….*run stage 1",
        ),
        (
            lambda s: select(s, some({"0.avi": "jump", "1.avi": "jump"})),
            r"1 labels.*1\.avi is 'jump' here, 'run' there",
        ),
        (lambda s: select(s, some({FAILED: "jump"})), "names no video"),
        (lambda s: FinetuneSet(unlabelled(s), None, Config()), r"1 videos have no label \(3\.avi\)"),
        (
            lambda s: ClipSet(s, None, Sampling(), modality="flow"),  # type: ignore[arg-type]
            "'flow'; choose one of video, iframe, motion",
        ),
        (lambda _: EpochSampler(100, 6, world=4), "batch of 6 cannot be dealt to 4 ranks"),
        (lambda _: EpochSampler(7, 8), "7 videos do not fill one batch of 8"),
        (lambda _: EpochSampler(100, 4, rank=2, world=2), "rank 2 of 2"),
    ],
)
def test_what_cannot_train_is_refused(shards: ShardSet, make_one: Callable[[ShardSet], object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make_one(shards)


def unlabelled(shards: ShardSet) -> ShardSet:
    """The same, without the label of one video."""
    one = copy.copy(shards)
    one.label = shards.label.copy()
    one.label[3] = -1
    return one
