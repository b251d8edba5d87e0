"""Features: which clips reach which network, how they are prepared, pooled and averaged, and of which weights."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import tiny_config
from evaluating import CPU, Tiny
from running import RUNTIME
from torch import Tensor, nn

from eval import features
from eval.features import prepare
from eval.results import Data
from preprocess.manifest import Manifest
from preprocess.schema import Settings
from train import checkpoint, data, loop, tasks
from train.config import Objective
from train.loader import explaining_workers
from train.model import PretrainingModel
from train.trained import load_run

IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
SHAPES: dict[features.Network, tuple[int, ...]] = {"video": (3, 8), "iframe": (3, 1), "motion": (2, 8)}


def look(run: features.Run, tiny: Tiny, network: features.Network = "video", subset: str = "test") -> np.ndarray:
    return features.video_features(run, Data.open(*tiny).subset(subset), network, CPU).vectors


class Recorder(nn.Module):
    """Stands for a network: keeps what it is shown, and returns the upper left pixel of every frame."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[Tensor] = []

    def forward(self, x: Tensor) -> Tensor:
        self.seen.append(x)
        return x[..., :1, :1]

    forward_pretrain = forward


# ---- what the networks are shown

# An encoded frame that is not square, overhung by its motion grid, and stored frames of another shape.
SETTINGS = Settings(width=340, height=256, frame_width=100, frame_height=60)
# Seven eighths of the short side, from the middle: 224 pixels of the encoded frame, from (58, 16). The centres of the
# pixels of a crop of 56 lie at:
ACROSS, DOWN = 58 + (np.arange(56) + 0.5) * 4, 16 + (np.arange(56) + 0.5) * 4


@pytest.mark.parametrize(("network", "shape"), [("video", (2, 3, 60, 100, 3)), ("iframe", (2, 256, 340, 3))])
def test_pixels_are_cut_from_the_middle_and_not_mirrored(network: features.Network, shape: tuple[int, ...]) -> None:
    """Of 112: stored frames are enlarged, I-frames halved, and both leave a ramp what it is."""
    wide, high = shape[-2], shape[-3]
    steps, first = ((2, 4), 0) if wide == 100 else ((1, 1), 42)  # a ramp that 255 does not end within the crop
    picture = np.zeros((high, wide, 3), np.uint8)
    picture[..., 0] = np.clip(np.arange(wide) * steps[0] - first, 0, 255)
    picture[..., 1] = (np.arange(high) * steps[1])[:, None]
    picture[..., 2] = 77
    raw = torch.from_numpy(np.broadcast_to(picture, shape).copy())
    config = tiny_config(size=112)
    made = prepare(raw, network, config, SETTINGS)
    assert made.shape == (2, 3, 1 if network == "iframe" else 3, 112, 112)
    across, down = 58 + (np.arange(112) + 0.5) * 2, 16 + (np.arange(112) + 0.5) * 2
    red = (across * wide / 340 - 0.5) * steps[0] - first
    green = (down * high / 256 - 0.5) * steps[1]
    planes = [np.broadcast_to(red, (112, 112)), np.broadcast_to(green[:, None], (112, 112)), np.full((112, 112), 77)]
    expected = np.stack([(p / 255 - mean) / std for p, mean, std in zip(planes, *IMAGENET)])
    for clip in made.numpy():
        np.testing.assert_allclose(clip, np.broadcast_to(expected[:, None], clip.shape), atol=1e-4)


def test_a_protocol_names_the_crop_that_its_network_sees() -> None:
    config = tiny_config(size=112, motion_size=56)
    told = {network: features.protocol(config, network) for network in features.NETWORKS}
    assert {n for n, text in told.items() if "short side 128, centre 112," in text} == {"video", "layer4", "iframe"}
    assert "short side 64, centre 56," in told["motion"]


def test_a_lost_worker_is_explained_with_the_flag_of_the_command() -> None:
    with pytest.raises(ChildProcessError, match="eval: --workers"), explaining_workers():
        raise RuntimeError("DataLoader worker (pid 1) is killed by signal: Killed.")


def test_motion_is_cut_as_the_pixels_are_and_measured_in_pixels_of_the_crop() -> None:
    ramp = np.zeros((2, 8, 16, 22, 2), np.int16)  # quarters of a pixel, one vector a block of 16 pixels
    ramp[..., 0] = 4 * np.arange(22) - 36
    ramp[..., 1] = (3 * np.arange(16) - 12)[:, None]
    config = tiny_config(motion_size=56)
    made = prepare(torch.from_numpy(ramp), "motion", config, SETTINGS).numpy()
    assert made.shape == (2, 2, 8, 56, 56)
    dx, dy = (ACROSS / 16 - 0.5) - 9, 0.75 * (DOWN / 16 - 0.5) - 3  # in pixels of the encoded frame
    planes = [np.broadcast_to(dx, (56, 56)), np.broadcast_to(dy[:, None], (56, 56))]
    expected = np.stack(planes)[:, None] * (56 / 224) / 10
    np.testing.assert_allclose(made, np.broadcast_to(expected, made.shape), atol=1e-5)


def test_ten_clips_reach_the_network_at_their_places(
    tiny: Tiny, joint_run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def numbered(shard: Any, frames: np.ndarray) -> np.ndarray:
        settings = shard.settings  # every video has 40 frames
        return np.broadcast_to(
            (frames % 40).astype(np.uint8)[:, None, None, None],
            (len(frames), settings.frame_height, settings.frame_width, 3),
        ).copy()

    monkeypatch.setattr(data, "decode_frames", numbered)
    loaded = load_run(joint_run)
    loaded.model.video = recorder = Recorder()  # type: ignore[assignment]
    found = look(loaded, tiny)
    mean, std = (torch.tensor(x).view(1, 3, 1, 1, 1) for x in IMAGENET)
    seen = torch.cat(recorder.seen) * std + mean
    assert seen.shape == (8 * 10, 3, 8, 32, 32)
    # (40 - 15) / 9 = 2.78 frames apart, rounded: a clip of 8 frames at stride 2 spans 15.
    starts = torch.tensor([0, 3, 6, 8, 11, 14, 17, 19, 22, 25])
    expected = (starts[:, None] + 2 * torch.arange(8)).repeat(8, 1)  # (videos clips, T)
    shown = (seen * 255)[:, :, :, 5, 5]
    torch.testing.assert_close(shown, expected[:, None].float().expand(-1, 3, -1), rtol=0, atol=1e-3)
    # Pooled over time and space, averaged over clips: 12.5 + 7 on average.
    average = (19.5 / 255 - mean.flatten()) / std.flatten()
    np.testing.assert_allclose(found, average.expand(8, 3).numpy(), atol=1e-4)


@pytest.mark.parametrize("network", SHAPES)
def test_each_network_sees_its_own_and_no_batch_changes_it(
    tiny: Tiny, joint_run: Path, network: features.Network, monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded = load_run(joint_run)
    found = look(loaded, tiny, network)
    assert found.dtype == np.float32 and found.shape == (8, 32) and np.ptp(found, axis=0).max() > 0
    np.testing.assert_array_equal(look(loaded, tiny, network), found)
    assert not np.allclose(look(load_run(joint_run, "initial"), tiny, network), found)
    monkeypatch.setattr(features, "VIDEOS_A_BATCH", 3)
    np.testing.assert_allclose(look(loaded, tiny, network), found, rtol=1e-4, atol=1e-5)
    recorder = Recorder()
    setattr(*((loaded.model.motion, "network") if network == "motion" else (loaded.model, network)), recorder)
    look(loaded, tiny, network)
    assert {tuple(x.shape[1:3]) for x in recorder.seen} == {SHAPES[network]}
    assert sum(len(x) for x in recorder.seen) == 80


@pytest.mark.parametrize(("alpha", "network", "name"), [(0.0, "motion", "M-Network"), (1.0, "iframe", "I-Network")])
def test_a_network_the_run_lacks_is_an_error(
    tiny: Tiny, tmp_path: Path, alpha: float, network: features.Network, name: str
) -> None:
    config = tiny_config(objective=Objective(alpha=alpha))
    missing = features.Run(tmp_path, config, "small", "initial", 0.0, PretrainingModel(config))
    with pytest.raises(ValueError, match=rf"has no {name}: small trains none"):
        look(missing, tiny, network)


# ---- of which weights


def equal_states(a: nn.Module, b: dict[str, Tensor]) -> bool:
    return list(a.state_dict()) == list(b) and all(torch.equal(a.state_dict()[k], b[k]) for k in b)


def test_untrained_means_the_weights_before_the_first_step(
    tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    caught: dict[str, Tensor] = {}

    def catch(_: object, network: nn.Module, *__: object) -> None:
        caught.update({k: v.clone() for k, v in network.state_dict().items()})
        raise KeyboardInterrupt

    monkeypatch.setattr(tasks.PretrainingTask, "loss", catch)
    with pytest.raises(KeyboardInterrupt):
        loop.train(tiny_config(seed=3), RUNTIME, tiny[0], Manifest.read(tiny[1]).subset("train"), tmp_path)
    torch.manual_seed(99)
    untrained = load_run(tmp_path, "initial")
    assert equal_states(untrained.model, caught) and untrained.epoch == 0
    with pytest.raises(ValueError, match="does not exist: has the run been started"):
        load_run(tmp_path, "last")


def test_trained_weights_are_those_of_the_checkpoint(joint_run: Path, tmp_path: Path) -> None:
    last = load_run(joint_run)
    assert equal_states(last.model, checkpoint.load(joint_run / "checkpoint.pt")["model"]) and last.epoch == 1
    kept = load_run(joint_run, "epoch-0001")
    assert kept.weights_sha256() == last.weights_sha256()
    assert load_run(joint_run, "initial").weights_sha256() != last.weights_sha256()
    with pytest.raises(ValueError, match="has no weights 'epoch-0002'"):
        load_run(joint_run, "epoch-0002")
    with pytest.raises(ValueError, match="holds no run"):
        load_run(tmp_path)
    shutil.copytree(joint_run, tmp_path / "mixed")
    state = checkpoint.load(joint_run / "checkpoint.pt")
    other = json.dumps(json.loads(state["config"]) | {"seed": 5})
    checkpoint.save(tmp_path / "mixed" / "checkpoint.pt", state | {"config": other})
    with pytest.raises(ValueError, match=r"checkpoint\.pt is not of the run .* \(seed: 5 there, 0 here\)"):
        load_run(tmp_path / "mixed")


def test_videos_without_labels_have_no_sides(tiny: Tiny, joint_run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    nameless = features.Features(np.zeros((4, 2), np.float32), np.array([0, -1, 0, 0]), np.arange(4), 0)
    labelled = replace(nameless, label=np.zeros(4, int))
    for order in ([nameless, labelled], [labelled, nameless]):
        monkeypatch.setattr(features, "video_features", lambda *_, order=order: order.pop())
        with pytest.raises(ValueError, match="need labels"):
            features.sides(load_run(joint_run), Data.open(*tiny), "video", CPU)
