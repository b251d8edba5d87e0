"""Residuals against oracles that share no code with them: the decoder itself, the encoder's bits, plain arithmetic."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from dataclasses import replace
from itertools import islice
from pathlib import Path

import av
import h5py
import numpy as np
import pytest
from conftest import make_shards, panned, write_video
from test_check import assert_found, renew_checksum
from test_shards import make_anew, put, write
from test_stage1 import alive, encoded, files

from preprocess import check, child, encode, extract, residual
from preprocess.schema import INTRA, NO_RESIDUAL, Settings
from preprocess.shards import Shard, ShardSet
from preprocess.writer import Spool
from train import cost
from train.config import Config
from train.data import ClipSet, PretrainSet
from train.draws import Sampling
from train.model import build_model
from train.recipes import RECIPES

ODD = Settings(width=120, height=90, frame_width=48, frame_height=32)  # macroblocks overhang both sides
SMALL = replace(ODD, gop=4)
NAMES = ["0.mp4", "1.mp4", "2.mp4", "3.mp4"]


# ---- exact


def read(packets: list[av.Packet], **options: str) -> Iterator[av.VideoFrame]:
    decoder = av.CodecContext.create("mpeg4", "r")
    decoder.thread_count, decoder.options = 1, options
    for packet in packets:
        yield from decoder.decode(packet)


def first_predictions(source: Path, settings: Settings) -> tuple[int, int, int]:
    """Inter blocks of the first P-frames of a video's first groups: how many, how many of which FFmpeg's decoder
    predicts as we do when it is told to add no residual, and how many it would with the other rounding."""
    packets = [*islice(encode.packets(str(source), settings, encode.Source()), settings.gop + 2)]
    motion = np.concatenate([group.motion for group in extract.groups(packets, settings)])
    blocks = same = otherwise = 0
    for t, frame in enumerate(read(packets, skip_idct="nokey")):
        luma = residual.padded_luma(frame, settings.grid)
        if t % settings.gop == 0:
            before = luma
        if t % settings.gop == 1:
            (_, energy) = residual.energies([before, luma], motion[t - 1 : t + 1])
            (_, _, wrong) = residual.energies([before, before, luma], motion[[t - 1, t - 1, t]])
            inter = motion[t, ..., 0] != INTRA
            assert (energy[~inter] == NO_RESIDUAL).all()
            blocks, same, otherwise = blocks + inter.sum(), same + (energy == 0).sum(), otherwise + (wrong == 0).sum()
    return int(blocks), int(same), int(otherwise)


def test_the_decoder_without_residuals_shows_the_same_prediction_of_real_clips(real_clips: list[Path]) -> None:
    for clip in real_clips:
        blocks, same, otherwise = first_predictions(clip, Settings())
        assert blocks > 400 and same == blocks, clip.name
        assert otherwise < 0.95 * blocks, clip.name


def test_the_decoder_without_residuals_shows_the_same_prediction_where_blocks_overhang_the_frame(
    tmp_path: Path,
) -> None:
    source = write_video(tmp_path / "a.mp4", panned(26, (9, -13), 98, 170))
    blocks, same, otherwise = first_predictions(source, ODD)
    assert same == blocks > 40 > otherwise


def test_at_the_coarsest_quantiser_most_blocks_have_no_residual_with_either_rounding(real_clips: list[Path]) -> None:
    """A prediction that is wrong by a bit would be right for few: the other rounding shows how few."""
    settings = Settings(quantiser=31)
    for clip in real_clips:
        packets = [*islice(encode.packets(str(clip), settings, encode.Source()), 12)]
        decoded = list(extract.decoded(packets))
        motion = extract.grids([vectors for _, vectors in decoded], settings)
        lumas = [residual.padded_luma(frame, settings.grid) for frame, _ in decoded]
        for first_p in 1, 2:  # frames of odd and of even place in the group
            inter = right = wrong = 0
            for t in range(first_p, len(lumas), 2):
                pair = lumas[t - 1], lumas[t]
                (_, odd), (_, _, even) = (
                    residual.energies([pair[0]] * n + [pair[1]], motion[[t - 1] * n + [t]]) for n in (1, 2)
                )
                inter += (motion[t, ..., 0] != INTRA).sum()
                right += ((odd, even)[first_p - 1] == 0).sum()
                wrong += ((even, odd)[first_p - 1] == 0).sum()
            assert right > 0.6 * inter and right > 1.5 * wrong, (clip.name, first_p, right / inter, wrong / inter)


def test_residuals_equal_plain_arithmetic() -> None:
    """Every half pixel, far beyond every edge: noise of 3 x 4 blocks, pixel by pixel."""
    rng = np.random.default_rng(0)
    pictures = rng.integers(0, 256, (6, 48, 64))
    motion = (2 * rng.integers(-24, 25, (6, 3, 4, 2)) * rng.choice([1, 7], (6, 3, 4, 1))).astype(np.int16)
    motion[0], motion[2, 1, 1] = INTRA, INTRA
    assert {tuple(p) for p in (motion[1:] // 2 % 2).reshape(-1, 2).tolist()} == {(0, 0), (0, 1), (1, 0), (1, 1)}
    padded = np.pad(pictures.astype(np.uint8), ((0, 0), (16, 16), (16, 16)), "edge")
    found = residual.energies(list(padded), motion)
    assert found.shape == (6, 3, 4) and found.dtype == np.uint16
    for t, r, c in np.ndindex(found.shape):
        if motion[t, r, c, 0] == INTRA:
            assert found[t, r, c] == NO_RESIDUAL
            continue
        energy = 0
        for y, x in np.ndindex(16, 16):
            y2, x2 = 2 * (16 * r + y) - motion[t, r, c, 1] // 2, 2 * (16 * c + x) - motion[t, r, c, 0] // 2
            near = [
                pictures[t - 1, min(max(int(b), 0), 47), min(max(int(a), 0), 63)]
                for b in {y2 // 2, (y2 + 1) // 2}
                for a in {x2 // 2, (x2 + 1) // 2}
            ]
            rounding = {1: 0, 2: t % 2 == 0, 4: 2 - t % 2}[len(near)]
            energy += abs(int(pictures[t, 16 * r + y, 16 * c + x]) - (sum(near) + rounding) // len(near))
        assert found[t, r, c] == energy
    ends = np.stack([np.zeros((48, 48), np.uint8), np.full((48, 48), 255, np.uint8)])
    assert residual.energies(list(ends), np.zeros((2, 1, 1, 2), np.int16))[1] == 256 * 255 < NO_RESIDUAL


def test_what_stands_still_leaves_nothing_and_what_appears_much(tmp_path: Path) -> None:
    frames = np.repeat(panned(1, height=96, width=128), 10, axis=0)
    frames[5:, 32:64, 48:80] = panned(1, height=32, width=32, seed=1)[0]
    settings = replace(ODD, width=128, height=96)
    source = write_video(tmp_path / "a.mp4", frames)
    (group,) = extract.groups(encoded(source, settings), settings, residuals=True)
    assert group.residual.shape == (10, 6, 8)
    new = np.zeros((6, 8), bool)
    new[2:4, 3:5] = True
    assert (group.residual[5][new] > 2000).all(), "more than eight levels a pixel, or intra"
    assert np.median(group.residual[5][~new]) < 256 > np.median(group.residual[6])


# ---- what is learned from


def test_data_sets_read_residuals_where_they_are_told_to(tmp_path: Path) -> None:
    written = write(tmp_path, [40, 40])
    with h5py.File(tmp_path / "shard-00000.residual.h5", "w") as f:
        f["residual"] = np.random.default_rng(0).integers(0, 65536, (80, 3, 4), np.uint16)
        f.attrs.update(format=b"context-motion-residual", version=1, shard_sha256=Shard(written.path).sha256.encode())
    shards = ShardSet(tmp_path)
    shard = shards.shards[0]
    vectors = Sampling(frames=4, stride=2, motion_frames=3, negatives=2)
    both, alone = (replace(vectors, motion=motion) for motion in ("vectors+residual", "residual"))
    every = vectors, both, alone
    pretraining = [PretrainSet(shards, None, Config(sampling=s)) for s in every]
    clips = [ClipSet(shards, None, s, 5, "motion") for s in every]
    for index in range(2):
        for samples in ([d[3, index] for d in pretraining], [d[index] for d in clips]):
            for key in samples[0].keys() - {"motion"}:
                for sample in samples[1:]:
                    np.testing.assert_array_equal(sample[key], samples[0][key])
            for plain, three, one in zip(*(s["motion"] for s in samples), strict=True):
                (first,) = (t for t in range(78) if np.array_equal(shard.motion[t : t + 3], plain))
                np.testing.assert_array_equal(three[..., :2], plain)
                np.testing.assert_array_equal(three[..., 2], shard.residual[first : first + 3])
                np.testing.assert_array_equal(one[..., 0], three[..., 2])


def test_shards_without_residuals_are_refused_where_they_are_wanted(tmp_path: Path) -> None:
    write(tmp_path, [40, 40])
    words = r"motion is vectors\+residual, but shard-00000\.residual\.h5 is missing.* or choose motion=vectors"
    with pytest.raises(ValueError, match=words):
        PretrainSet(ShardSet(tmp_path), None, Config(sampling=Sampling(motion="vectors+residual")))


def test_the_m_network_and_the_losses_know_what_they_see() -> None:
    configs = [RECIPES[name].config for name in ("small-residual-only", "small", "small-residual")]
    for depth, config in enumerate(configs, 1):
        first, *_ = build_model(config, 2).motion.network.parameters()
        assert first.shape[1] == depth
    one, two, three = map(cost.flops_per_clip, configs)
    assert three - two == two - one > 0
    with pytest.raises(ValueError, match=r"motion_loss is mse, of vectors, but motion is residual; choose infonce"):
        RECIPES["small-mse"].config.changed({"sampling.motion": "residual"})


# ---- beside the shard


@pytest.fixture(scope="module")
def videos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("videos")
    for seed, name in enumerate(NAMES):
        write_video(folder / name, panned(5 + seed, (5, -3), 90, 120, seed))
    return folder


OPTIONS = {"settings": SMALL, "videos_per_shard": 3}


@pytest.fixture(scope="module")
def made(videos: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of two shards with residuals."""
    return make_shards(tmp_path_factory.mktemp("made"), videos, NAMES, **OPTIONS, residuals=True).folder


@pytest.fixture
def copy(made: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(made, tmp_path / "shards"))


def test_residuals_lie_beside_shards_that_are_the_same_without_them(made: Path, videos: Path, tmp_path: Path) -> None:
    without = make_shards(tmp_path / "without", videos, NAMES, **OPTIONS)
    before, after = files(without.folder), files(made)
    assert after.items() > before.items()
    assert set(after) - set(before) == {f"shard-0000{n}.residual.h5{e}" for n in (0, 1) for e in ("", ".sha256")}
    assert check.problems(made) == [] and "residuals of 2" in check.describe(made)
    assert "residuals of 0" in check.describe(without.folder)
    shards = ShardSet(made)
    for k, name in enumerate(NAMES):
        shard, index = shards.locate(k)
        rows = slice(*shard.frame_offset[index : index + 2])
        groups = list(extract.groups(encoded(videos / name, SMALL), SMALL, residuals=True))
        np.testing.assert_array_equal(shard.residual[rows], np.concatenate([g.residual for g in groups]))
    assert shard.residual.dtype == np.uint16 and not shard.residual.flags.writeable
    with h5py.File(made / "shard-00000.residual.h5") as f:
        assert f["residual"].chunks is None and f["residual"].dtype == "<u2"
    with pytest.raises(ValueError, match=r"residual\.h5 is missing .*preprocess run --residuals"):
        without.shards[0].residual  # noqa: B018


def test_the_other_reader_gives_the_same_residuals(made: Path, videos: Path, tmp_path: Path) -> None:
    spool = Spool(tmp_path, (*Spool.names, "residual"))
    child.convert(str(videos / NAMES[0]), spool, SMALL, alive, "mvextractor")
    expected = Shard(made / "shard-00000.h5").residual[:5]
    assert spool.path("residual").read_bytes() == expected.tobytes()


def test_failed_videos_that_are_tried_again_join_the_residuals(made: Path, videos: Path, tmp_path: Path) -> None:
    some = Path(shutil.copytree(videos, tmp_path / "videos"))
    (some / NAMES[0]).unlink()
    options = OPTIONS | {"residuals": True}
    assert len(make_shards(tmp_path, some, NAMES, **options).failed) == 1
    shutil.copy(videos / NAMES[0], some)
    make_shards(tmp_path, some, NAMES, **options, retry_failed=True)
    assert files(tmp_path / "shards") == files(made)


def test_a_kill_between_the_two_files_costs_neither(
    made: Path, videos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And what was begun without residuals begins anew with them."""
    replace_file = os.replace

    def stop(source: Path, target: Path) -> None:
        if Path(target).name == "shard-00000.h5":
            raise KeyboardInterrupt
        replace_file(source, target)

    monkeypatch.setattr(os, "replace", stop)
    for residuals in False, True:
        with pytest.raises(KeyboardInterrupt):
            make_shards(tmp_path, videos, NAMES, **OPTIONS, residuals=residuals)
        assert (tmp_path / "shards/shard-00000.residual.h5").exists() == residuals
    monkeypatch.undo()
    make_shards(tmp_path, videos, NAMES, **OPTIONS, residuals=True)
    assert files(tmp_path / "shards") == files(made)


def test_a_kill_before_the_new_shard_leaves_none_beside_anothers_residuals(
    made: Path, videos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    some = Path(shutil.copytree(videos, tmp_path / "videos"))
    (some / NAMES[0]).unlink()
    make_shards(tmp_path, some, NAMES, **OPTIONS, residuals=True)
    shutil.copy(videos / NAMES[0], some)
    replace_file = os.replace

    def stop(source: Path, target: Path) -> None:
        replace_file(source, target)
        if Path(target).name == "shard-00000.residual.h5":
            raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(os, "replace", stop)
        make_shards(tmp_path, some, NAMES, **OPTIONS, residuals=True, retry_failed=True)
    make_shards(tmp_path, some, NAMES, **OPTIONS, residuals=True)
    assert files(tmp_path / "shards") == files(made)


def test_sets_with_residuals_and_without_do_not_mix(copy: Path, videos: Path) -> None:
    with pytest.raises(ValueError, match=r"made by another run \(--residuals: True there, False here\)"):
        make_shards(copy.parent, videos, NAMES, **OPTIONS)
    for path in copy.glob("*.residual.h5*"):
        path.unlink()
    with pytest.raises(ValueError, match=r"--residuals: False there, True here"):
        make_shards(copy.parent, videos, NAMES, **OPTIONS, residuals=True)


def test_check_finds_a_flipped_bit_of_the_residuals(copy: Path) -> None:
    path = copy / "shard-00000.residual.h5"
    assert_found(path, path.stat().st_size // 2, 5)


@pytest.mark.parametrize(
    "change, words",
    [
        (lambda f: make_anew(f, "residual", f["residual"][:-1]), "residual has shape"),
        (lambda f: f.attrs.create("format", b"context-motion-flow"), "not a context-motion-residual"),
        (lambda f: f.attrs.create("shard_sha256", b"0" * 64), "the residual of another shard"),
        (lambda f: put(f, "residual", 0, 0), "not where the motion vectors are"),
        (lambda f: put(f, "residual", 6, NO_RESIDUAL), "not where the motion vectors are"),
    ],
)
def test_wrong_residuals_are_found_under_a_right_checksum(change, words: str, copy: Path) -> None:
    path = copy / "shard-00000.residual.h5"
    with h5py.File(path, "r+") as f:
        change(f)
    renew_checksum(path)
    (problem,) = check.problems(copy)
    assert str(path) in problem and words in problem
