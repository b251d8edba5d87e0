"""Optical flow: its direction and unit, how it is averaged, written beside a shard, checked and read."""

from __future__ import annotations

import json
import resource
import shutil
import subprocess
import sys
from dataclasses import replace
from importlib.metadata import PackageNotFoundError
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
from conftest import ROOT, make_shards, panned, write_video
from hypothesis import given, settings
from hypothesis import strategies as st
from test_check import assert_found, renew_checksum
from test_shards import make_anew, put, write

from preprocess import check, flow, pipeline, writer
from preprocess.codec import Codec
from preprocess.schema import INTRA, Settings
from preprocess.shards import Shard, ShardSet
from train.config import Config
from train.data import ClipSet, FinetuneSet, PretrainSet
from train.draws import Sampling

SMALL = Settings(width=120, height=88, frame_width=48, frame_height=32, gop=3)  # a grid of 6 x 8, half outside
PAN = (3, -2)
LENGTHS = (5, 2, 3)
NAMES = ["0.mp4", "1.mp4", "2.mp4"]


@pytest.fixture(scope="module")
def videos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of three videos of a texture that moves by PAN pixels a frame."""
    folder = tmp_path_factory.mktemp("videos")
    for name, length in zip(NAMES, LENGTHS):
        write_video(folder / name, panned(length, PAN, 88, 120, length))
    return folder


@pytest.fixture(scope="module")
def without(videos: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of two shards without flow."""
    folder = tmp_path_factory.mktemp("without")
    return make_shards(folder, videos, NAMES, settings=SMALL, videos_per_shard=2).folder


@pytest.fixture(scope="module")
def flowing(without: Path, videos: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same, with flow."""
    folder = tmp_path_factory.mktemp("flowing") / "shards"
    shutil.copytree(without, folder)
    assert flow.run(folder, videos) == (2, 0)
    return folder


@pytest.fixture
def copy(flowing: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(flowing, tmp_path / "shards"))


def files(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


# ---- what is computed


def test_a_panned_texture_flows_as_it_was_panned(flowing: Path) -> None:
    found = ShardSet(flowing)
    for video, length in enumerate(LENGTHS):
        shard, k = found.locate(video)
        maps = shard.flow[slice(*shard.frame_offset[k : k + 2])]
        assert maps.shape == (length, 6, 8, 2) and maps.dtype == np.int16 and not maps.flags.writeable
        assert (maps[0] == INTRA).all()  # and that of the I-frame at 3 is as any other:
        assert np.abs(maps[1:, 1:-1, 1:-1] - np.multiply(4, PAN)).max() <= 1, "quarter pixels"


@settings(max_examples=30)
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


def test_flat_and_tiny_pictures_do_not_move() -> None:
    flat = np.full((16, 16), 0.5, np.float32)
    assert (flow.displacement(flat, flat) == 0).all()


# ---- what is written


def test_flow_lies_beside_its_shard_in_the_same_bytes_whatever_the_workers(
    without: Path, flowing: Path, videos: Path, tmp_path: Path
) -> None:
    shutil.copytree(without, tmp_path / "two")
    assert flow.run(tmp_path / "two", videos, workers=2) == (2, 0)
    added = {f"shard-0000{n}.flow.h5{end}" for n in (0, 1) for end in ("", ".sha256")}
    before, after = files(without), files(flowing)
    assert files(tmp_path / "two") == after and set(after) - set(before) == added
    assert all(after[name] == data for name, data in before.items())
    assert check.problems(flowing) == []
    assert "optical flow of 2 shards" in check.describe(flowing)
    assert "optical flow of 0 shards" in check.describe(without)
    with h5py.File(flowing / "shard-00000.flow.h5") as f:
        assert f["flow"].chunks is None and f["flow"].dtype == "<i2"
        assert set(json.loads(f.attrs["versions"])) == {
            *flow.LIBRARIES,
            "libavcodec",
            "libavformat",
            "libswscale",
            "machine",
        }


def test_a_shard_whose_flow_was_stopped_goes_on_after_its_last_video(
    without: Path, flowing: Path, videos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(without, tmp_path / "shards")
    computed: list[str] = []
    compute = Codec.run

    def stopping(codec: Codec, verb: str, source: Path, *arguments: Any, **options: Any) -> dict[str, Any]:
        computed.append(source.name)
        if len(computed) == 2:
            raise KeyboardInterrupt
        return compute(codec, verb, source, *arguments, **options)

    monkeypatch.setattr(writer, "SAVE_SECONDS", 0.0)
    monkeypatch.setattr(Codec, "run", stopping)
    with pytest.raises(KeyboardInterrupt):
        flow.run(tmp_path / "shards", videos)
    assert flow.run(tmp_path / "shards", videos) == (2, 0)
    assert computed == [NAMES[0], NAMES[1], *NAMES[1:]]
    assert files(tmp_path / "shards") == files(flowing)


def test_what_is_missing_is_made_again_and_only_that(copy: Path, videos: Path) -> None:
    """Through the command, stopped by a disk that is full."""
    expected = files(copy)
    for path in copy.glob("shard-00001.flow.h5*"):
        path.unlink()
    command = [sys.executable, "-m", "preprocess", "flow", str(copy), "--videos", str(videos)]
    options = {"cwd": ROOT, "capture_output": True, "text": True}
    stopped = subprocess.run(
        command, **options, preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (100, 100))
    )
    assert stopped.returncode == 1 and "shard-00001.flow.h5 cannot be made: File too large" in stopped.stderr
    assert not (copy / "shard-00001.flow.h5").exists()
    before = (copy / "shard-00000.flow.h5").stat().st_mtime_ns
    done = subprocess.run(command, **options)
    assert (done.returncode, done.stdout) == (0, "optical flow of 1 shards made, of 1 already there\n"), done.stderr
    assert files(copy) == expected and (copy / "shard-00000.flow.h5").stat().st_mtime_ns == before


@pytest.mark.parametrize(
    "change, options, words",
    [
        (lambda v: (v / "1.mp4").unlink(), {}, r"1\.mp4 for .*00000\.h5: \[Errno 2\] No such.*as --videos"),
        (lambda v: shutil.copy(v / "0.mp4", v / "1.mp4"), {}, r"1\.mp4 .*: it has 5 frames, and the shard holds 2"),
        (lambda v: None, {"time_limit": 0}, "--time-limit is 0"),
    ],
)
def test_what_cannot_flow_is_refused(
    change, options: dict, words: str, without: Path, videos: Path, tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(videos, tmp_path / "videos"))
    shards = Path(shutil.copytree(without, tmp_path / "shards"))
    change(folder)
    with pytest.raises(ValueError, match=words):
        flow.run(shards, folder, **options)
    assert not (shards / "shard-00000.flow.h5").exists()


def test_flow_without_its_extra_says_how_to_get_it(
    without: Path, videos: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def absent(name: str) -> str:
        raise PackageNotFoundError(name)

    monkeypatch.setattr(pipeline, "version", absent)
    with pytest.raises(ValueError, match=r"optical flow needs scikit-image: pip install '\.\[preprocess,flow\]'"):
        flow.run(without, videos)


# ---- what is found wrong


def test_check_finds_a_flipped_bit_of_the_flow(copy: Path) -> None:
    assert_found(copy / "shard-00000.flow.h5", (copy / "shard-00000.flow.h5").stat().st_size // 2, 5)


@pytest.mark.parametrize(
    "change, words",
    [
        (lambda f: f.pop("flow"), "flow is missing"),
        (lambda f: make_anew(f, "flow", f["flow"][:-1]), "flow has shape"),
        (lambda f: make_anew(f, "flow", chunks=True), "not stored contiguously"),
        (lambda f: f.attrs.create("format", b"photos"), "not a context-motion-flow"),
        (lambda f: f.attrs.create("version", np.int64(2)), "format version 2"),
        (lambda f: f.attrs.create("shard_sha256", b"0" * 64), "the flow of another shard"),
        (lambda f: put(f, "flow", 5, 0), "first frame carries optical flow"),
        (lambda f: put(f, "flow", 3, INTRA), "later frame of a video lacks"),
    ],
)
def test_wrong_flow_is_found_under_a_right_checksum(change, words: str, copy: Path, videos: Path) -> None:
    path = copy / "shard-00000.flow.h5"
    with h5py.File(path, "r+") as f:
        change(f)
    renew_checksum(path)
    (problem,) = check.problems(copy)
    assert str(path) in problem and words in problem
    if "frame" not in words:
        with pytest.raises(ValueError, match=words):
            flow.run(copy, videos)


# ---- what is read


def test_data_sets_read_the_flow_where_they_are_told_to(tmp_path: Path) -> None:
    written = write(tmp_path, [40, 40])
    with h5py.File(tmp_path / "shard-00000.flow.h5", "w") as f:
        f["flow"] = np.random.default_rng(0).integers(-60, 60, (80, 3, 4, 2), np.int16)
        f.attrs.update(format=b"context-motion-flow", version=1, shard_sha256=Shard(written.path).sha256.encode())
    shards = ShardSet(tmp_path)
    shard = shards.shards[0]
    vectors = Sampling(frames=4, stride=2, motion_frames=3, negatives=2)
    chosen = replace(vectors, motion="flow")
    pretraining = [PretrainSet(shards, None, Config(sampling=s)) for s in (vectors, chosen)]
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
    words = (
        rf"motion is flow, but shard-00000\.flow\.h5 is missing from {tmp_path}: make it with "
        rf"python -m preprocess flow {tmp_path} --videos FOLDER, or choose motion=vectors"
    )
    with pytest.raises(ValueError, match=words):
        PretrainSet(shards, None, Config(sampling=sampling))
    with pytest.raises(ValueError, match=words):
        FinetuneSet(shards, None, Config(sampling=sampling), with_motion=True)
    with pytest.raises(ValueError, match=words):
        ClipSet(shards, None, sampling, modality="motion")
    # What shows no motion needs none.
    assert len(FinetuneSet(shards, None, Config(sampling=sampling))) == 2
    assert len(ClipSet(shards, None, sampling)) == 2
