"""Optical flow: its direction and unit, how it is averaged, stored, checked and read, and what it costs to lack it."""

from __future__ import annotations

from dataclasses import replace
from importlib.metadata import PackageNotFoundError
from pathlib import Path

import av
import h5py
import numpy as np
import pytest
from conftest import make_shards, panned, write_video
from hypothesis import given
from hypothesis import strategies as st
from scipy.ndimage import map_coordinates
from test_check import assert_found
from test_shards import TINY, set_item, write

from preprocess import check, encode, flow, pipeline
from preprocess.shards import INTRA, Settings, Shard, ShardSet
from train.data import ClipSet, FinetuneSet, PretrainSet
from train.draws import Cropping, Photometric, Sampling

SMALL = Settings(
    width=120, height=88, frame_width=48, frame_height=32, gop=3, flow=True
)  # a grid of 6 x 8, half outside
PAN = (3, -2)
LENGTHS = (5, 2)
NOISE = replace(TINY, flow=True)


@pytest.fixture(scope="module")
def videos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of two videos of a texture that moves by PAN pixels a frame."""
    folder = tmp_path_factory.mktemp("videos")
    for seed, length in enumerate(LENGTHS):
        write_video(folder / f"{seed}.mp4", panned(length, PAN, 88, 120, seed))
    return folder


@pytest.fixture(scope="module")
def shards(videos: Path, tmp_path_factory: pytest.TempPathFactory) -> ShardSet:
    folder = tmp_path_factory.mktemp("one")
    return make_shards(folder, videos, ["0.mp4", "1.mp4"], settings=SMALL, videos_per_shard=1)


# ---- what is computed


def test_a_panned_texture_flows_as_it_was_panned(shards: ShardSet) -> None:
    for shard, length in zip(shards.shards, LENGTHS):
        assert shard.flow.shape == shard.motion.shape == (length, 6, 8, 2) and shard.flow.dtype == np.int16
        assert (shard.flow[0] == INTRA).all()  # and that of the I-frame at 3 is as any other:
        interior = shard.flow[1:, 1:-1, 1:-1] - np.multiply(4, PAN)
        assert np.abs(interior).max() <= 1, "quarter pixels"


def sampled(picture: np.ndarray, dx: np.ndarray, dy: np.ndarray) -> np.ndarray:
    """The picture (H, W), moved: at each pixel what lay (dx, dy) before it."""
    y, x = np.mgrid[: picture.shape[0], : picture.shape[1]]
    return map_coordinates(picture, (y - dy, x - dx), order=1, mode="nearest")


def test_warping_by_the_flow_explains_the_next_frame_of_a_real_clip(real_clips: list[Path], tmp_path: Path) -> None:
    settings = Settings(width=176, height=144, flow=True)
    clip = next(c for c in real_clips if c.name.startswith("v_SoccerJuggling"))
    encode.encode(str(clip), str(tmp_path / "encoded.nut"), settings)
    with av.open(str(tmp_path / "encoded.nut")) as container:
        pictures = [flow.luma(f) for f, _ in zip(container.decode(video=0), range(4))]
    maps = [m for m, _ in zip(flow.maps(str(tmp_path / "encoded.nut"), settings), range(4))]
    for before, now, cells in zip(pictures, pictures[1:], maps[1:]):
        still = np.abs(now - before).mean()
        dx, dy = np.moveaxis(flow.displacement(before, now), -1, 0)
        assert np.abs(now - sampled(before, dx, dy)).mean() < 0.7 * still
        dx, dy = np.moveaxis(cells.repeat(16, 0).repeat(16, 1)[:144, :176] / 4, -1, 0)
        assert np.abs(now - sampled(before, dx, dy)).mean() < 0.9 * still
        assert np.abs(now - sampled(before, -dx, -dy)).mean() > still


@given(st.integers(1, 40), st.integers(1, 40), st.integers(0, 9))
def test_cells_are_the_mean_of_the_pixels_inside(height: int, width: int, seed: int) -> None:
    pixels = np.random.default_rng(seed).normal(0, 20, (height, width, 2)).astype(np.float32)
    cells = flow.grid(pixels)
    assert cells.shape == (-(-height // 16), -(-width // 16), 2) and cells.dtype == np.int16
    for r, row in enumerate(cells):
        for c, cell in enumerate(row):
            inside = pixels[16 * r : 16 * r + 16, 16 * c : 16 * c + 16].reshape(-1, 2)
            assert np.abs(cell / 4 - inside.mean(0)).max() <= 0.125 + 1e-4


def test_flow_out_of_range_is_not_taken_for_no_vector() -> None:
    far = np.full((16, 16, 2), -1e6, np.float32)
    assert (flow.grid(far) == -32767).all() and (flow.grid(-far) == 32767).all()


@pytest.mark.parametrize("height, width", [(16, 16), (16, 120)])
def test_flat_and_tiny_pictures_do_not_move(height: int, width: int) -> None:
    flat = np.full((height, width), 0.5, np.float32)
    assert (flow.displacement(flat, flat) == 0).all()


# ---- what is stored


def test_the_same_bytes_whatever_workers_and_the_rest_as_without_flow(
    shards: ShardSet, videos: Path, tmp_path: Path
) -> None:
    options = {"videos_per_shard": 1}
    two = make_shards(tmp_path / "two", videos, ["0.mp4", "1.mp4"], settings=SMALL, workers=2, **options)
    plain = make_shards(tmp_path / "plain", videos, ["0.mp4", "1.mp4"], settings=replace(SMALL, flow=False), **options)
    for one, other, without in zip(shards.shards, two.shards, plain.shards):
        assert one.path.read_bytes() == other.path.read_bytes()
        for name in ("frames/jpeg", "iframes/jpeg", "motion"):
            np.testing.assert_array_equal(one[name], without[name])
        with h5py.File(without.path) as f:
            assert "flow" not in f and "flow" not in f.attrs["settings"].decode()
    assert check.problems(shards.folder) == []
    assert "with optical flow" in check.describe(shards.folder) and "flow" not in check.describe(plain.folder)
    assert {"scikit-image", "scipy"} == set(shards.origin.versions) - set(plain.origin.versions)
    with pytest.raises(ValueError, match=r"made by another run .*settings\.flow: True there, False here"):
        make_shards(shards.folder.parent, videos, ["0.mp4", "1.mp4"], settings=replace(SMALL, flow=False), **options)
    with pytest.raises(ValueError, match=r"shard-00000\.h5 holds no optical flow: run stage 1 with --flow"):
        _ = plain.shards[0].flow


def test_flow_without_its_extra_says_how_to_get_it(
    videos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    version = pipeline.version

    def absent(name: str) -> str:
        if name == "scikit-image":
            raise PackageNotFoundError(name)
        return version(name)

    monkeypatch.setattr(pipeline, "version", absent)
    with pytest.raises(ValueError, match=r"--flow needs scikit-image: pip install '\.\[preprocess,flow\]'"):
        make_shards(tmp_path, videos, ["1.mp4"], settings=SMALL)
    assert not (tmp_path / "shards").exists()
    make_shards(tmp_path, videos, ["1.mp4"], settings=replace(SMALL, flow=False))


def test_check_finds_a_flipped_bit_of_the_flow(tmp_path: Path) -> None:
    written = write(tmp_path, [14, 3], options=NOISE)
    shard = Shard(written.path)
    np.testing.assert_array_equal(shard.flow, np.concatenate(written.flow))
    assert check.problems(tmp_path) == []
    with h5py.File(written.path) as f:
        start, size = f["flow"].id.get_offset(), f["flow"].nbytes
    for place, bit in (start, 0), (start + size // 2, 5), (start + size - 1, 7):
        assert_found(written.path, place, bit)


def missing(f: h5py.File) -> None:
    del f["flow"]


def other_shape(f: h5py.File) -> None:
    flow = f["flow"][:-1]
    del f["flow"]
    f["flow"] = flow


@pytest.mark.parametrize(
    "change, words",
    [
        (missing, "flow is missing"),
        (other_shape, "flow has shape"),
        (set_item("flow", 14, 0), "first frame carries optical flow"),
        (set_item("flow", 12, INTRA), "later frame of a video lacks"),
    ],
)
def test_wrong_flow_is_found_under_a_right_checksum(change, words: str, tmp_path: Path) -> None:
    path = write(tmp_path, [14, 3], options=NOISE).path
    with h5py.File(path, "r+") as f:
        change(f)
    assert any(words in problem for problem in check.shard_problems(path))


# ---- what is read


def test_data_sets_read_the_flow_where_they_are_told_to(tmp_path: Path) -> None:
    write(tmp_path, [40, 40], options=NOISE)
    shards = ShardSet(tmp_path)
    shard = shards.shards[0]
    vectors = Sampling(frames=4, stride=2, motion_frames=3, negatives=2)
    chosen = replace(vectors, motion="flow")
    pretraining = [PretrainSet(shards, None, s, Cropping(), Photometric()) for s in (vectors, chosen)]
    clips = [ClipSet(shards, None, s, 5, "motion") for s in (vectors, chosen)]
    for index in range(2):
        for a, b in ((d[3, index] for d in pretraining), (d[index] for d in clips)):
            assert a.keys() == b.keys()
            for key in a.keys() - {"motion"}:
                np.testing.assert_array_equal(a[key], b[key])
            for window, flowing in zip(a["motion"], b["motion"], strict=True):
                (first,) = (t for t in range(78) if np.array_equal(shard.motion[t : t + 3], window))
                np.testing.assert_array_equal(flowing, shard.flow[first : first + 3])


def test_shards_without_flow_are_refused_where_flow_is_wanted(tmp_path: Path) -> None:
    write(tmp_path, [40, 40])
    shards, sampling = ShardSet(tmp_path), Sampling(frames=4, motion="flow")
    shards.label[:] = 0
    words = f"{tmp_path} holds no optical flow: run stage 1 with --flow into another folder, or choose motion=vectors"
    with pytest.raises(ValueError, match=words):
        PretrainSet(shards, None, sampling, Cropping(), Photometric())
    with pytest.raises(ValueError, match=words):
        FinetuneSet(shards, None, sampling, Cropping(), Photometric(), with_motion=True)
    with pytest.raises(ValueError, match=words):
        ClipSet(shards, None, sampling, modality="motion")
    # What shows no motion needs none.
    assert len(FinetuneSet(shards, None, sampling, Cropping(), Photometric())) == 2
    assert len(ClipSet(shards, None, sampling)) == 2
