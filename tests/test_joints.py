"""Where parts meet: what of a batch enters the networks, what of their outputs enters the losses, with which weight.

Every expected number is worked out here by hand or in a loop, with settings that are all different from each other.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from conftest import tiny_config
from running import Tiny
from test_networks import wake
from torch import Tensor

from preprocess.shards import ShardSet
from train.config import Objective, Supervision
from train.model import FinetuningModel, PretrainingModel
from train.objectives import Points
from train.tasks import FinetuningTask, PretrainingTask, prepare

VIDEOS, POINTS, WINDOWS, WIDTH = 4, 3, 2, 5


def unit(rows: int, seed: int) -> Tensor:
    x = np.random.default_rng(seed).standard_normal((rows, WIDTH))
    return torch.from_numpy(x / np.linalg.norm(x, axis=1, keepdims=True))


def points() -> Points:
    return Points(*(unit(n * VIDEOS * POINTS, seed) for seed, n in enumerate((1, 1, WINDOWS))))


def matched(queries: Tensor, keys: Tensor, temperature: float, rows: list[int], columns: list[int]) -> float:
    """The sum of -log softmax over `columns` at each of `rows`, whose own key has the row's number."""
    total = 0.0
    for r in rows:
        logits = {k: float(queries[r] @ keys[k]) / temperature for k in columns}
        total += math.log(sum(map(math.exp, logits.values()))) - logits[r]
    return total


# ---- losses


def test_the_pretraining_loss_by_hand(tiny: Tiny) -> None:
    objective = Objective(0.3, context_temperature=0.2, motion_temperature=0.7, loss_scale=1.7)
    task = PretrainingTask(tiny_config(objective=objective), ShardSet(tiny[0]), None)
    clips, iframes, found = unit(VIDEOS, 7), unit(VIDEOS, 8), points()
    loss, parts = task.loss(lambda *_: (clips, iframes, found), (torch.empty(0), None, None), {})  # type: ignore[arg-type]
    each, every = list(range(VIDEOS)), list(range(VIDEOS * POINTS))
    context = matched(clips, iframes, 0.2, each, each) / VIDEOS
    keys = torch.cat((found.targets, found.negatives))
    motion = matched(found.predicted, keys, 0.7, every, list(range(len(keys)))) / len(every)
    assert float(parts["context_loss"]) == pytest.approx(context)
    assert float(parts["motion_loss"]) == pytest.approx(motion)
    assert float(loss) == pytest.approx(1.7 * (0.7 * context + 0.3 * motion))
    assert list(parts) == ["context_loss", "context_accuracy", "motion_loss", "motion_accuracy"]


def test_the_finetuning_loss_by_hand(tiny: Tiny) -> None:
    """The second video is too short for motion: neither a row nor a key of equation (2), but a sample to classify."""
    supervision = Supervision("scratch", motion_weight=0.3, motion_temperature=0.6)
    task = FinetuningTask(tiny_config("small-regularised", supervision=supervision), ShardSet(tiny[0]), None)
    found, scores = points(), unit(VIDEOS, 9) * 3
    labels, serves = [2, 0, 4, 1], [True, False, True, True]
    batch = {"label": torch.tensor(labels), "serves": torch.tensor(serves)}
    loss, parts = task.loss(lambda *_: (scores, found), (torch.empty(0), None, None), batch)  # type: ignore[arg-type]
    expected = 0.0
    for row, label in zip(scores.tolist(), labels):
        expected += (math.log(sum(map(math.exp, row))) - row[label]) / VIDEOS
    rows = [v * POINTS + p for v in range(VIDEOS) if serves[v] for p in range(POINTS)]
    others = [v * WINDOWS * POINTS + p for v in range(VIDEOS) if serves[v] for p in range(WINDOWS * POINTS)]
    keys = torch.cat((found.targets, found.negatives))
    columns = rows + [VIDEOS * POINTS + k for k in others]
    motion = matched(found.predicted, keys, 0.6, rows, columns) / (VIDEOS * POINTS)
    assert float(parts["class_loss"]) == pytest.approx(expected)
    assert float(parts["motion_loss"]) == pytest.approx(motion)
    assert float(loss) == pytest.approx(expected + 0.3 * motion)
    right = [int(np.argmax(row)) == label for row, label in zip(scores.tolist(), labels)]
    assert float(parts["class_accuracy"]) == pytest.approx(np.mean(right))
    nearest = [max(columns, key=lambda k: float(found.predicted[r] @ keys[k])) for r in rows]
    assert float(parts["motion_accuracy"]) == pytest.approx(np.mean([k == r for k, r in zip(nearest, rows)]))


# ---- what the networks give to the losses


def motion_windows() -> Tensor:
    """Windows of four videos, (4, 2, 2, 8, 32, 32), each of one vector: 0.3 and -0.2 in the positive ones."""
    found = torch.full((4, 2, 2, 8, 32, 32), 0.9)
    found[:, 0, 0], found[:, 0, 1] = 0.3, -0.2
    return found


def test_clips_and_iframes_are_pooled_by_their_mean() -> None:
    torch.manual_seed(0)
    model: Any = wake(PretrainingModel(tiny_config())).eval()
    model.clip_head = model.iframe_head = torch.nn.Identity()
    clip, iframe = torch.randn(2, 3, 8, 64, 64), torch.randn(2, 3, 1, 64, 64)
    with torch.no_grad():
        clips, iframes, nothing = model(clip, iframe, None)
        maps, pictures = model.video.forward_pretrain(clip).numpy(), model.iframe(iframe).numpy()
    assert nothing is None and maps[0, 0].size > 1 and pictures[0, 0].size > 1
    np.testing.assert_allclose(clips, maps.reshape(2, maps.shape[1], -1).sum(2) / maps[0, 0].size, rtol=1e-4, atol=1e-6)
    each = pictures.reshape(2, pictures.shape[1], -1)
    np.testing.assert_allclose(iframes, each.sum(2) / each.shape[2], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(("kind", "target"), [("mse", [2.0, -0.5]), ("cross_entropy", [3, 1])])
def test_values_are_predicted_of_the_positive_window(kind: Any, target: list[float]) -> None:
    """On the scale of vectors of mean 0.1 and 0, deviation 0.1 and 0.4; quartiles at 0, 0.1, 0.2 and -0.4, 0, 0.4."""
    config = tiny_config(motion_size=32, objective=Objective(1.0, motion_loss=kind, motion_bins=4))
    model: Any = PretrainingModel(config)
    scale = model.motion.scale
    scale.mean.copy_(torch.tensor([0.1, 0.0]))
    scale.deviation.copy_(torch.tensor([0.1, 0.4]))
    scale.edges.copy_(torch.tensor([[0.0, 0.1, 0.2], [-0.4, 0.0, 0.4]]))
    _, _, found = model(torch.randn(4, 3, 8, 32, 32), None, motion_windows())
    expected = np.tile(target, (len(found.predicted), 1))
    np.testing.assert_allclose(found.targets, expected, rtol=1e-3)


def test_features_are_predicted_of_the_positive_window_against_the_others() -> None:
    torch.manual_seed(0)
    model: Any = wake(PretrainingModel(tiny_config(motion_size=32, objective=Objective(1.0)))).eval()
    motion = torch.randn(3, 3, 2, 8, 32, 32)
    with torch.no_grad():
        _, _, found = model(torch.randn(3, 3, 8, 32, 32), None, motion)
        alone = [[model.motion.network(motion[v, k][None])[0] for k in range(3)] for v in range(3)]  # (C, T3, H3, W3)
        rows = [[model.motion.target_head(maps.flatten(1).T) for maps in windows] for windows in alone]  # (N, C)
    torch.testing.assert_close(found.targets, torch.cat([windows[0] for windows in rows]))
    torch.testing.assert_close(found.negatives, torch.cat([r for windows in rows for r in windows[1:]]))


@pytest.mark.parametrize("backbone", ["r3d10", "c3d"])
def test_a_regularised_network_classifies_its_plain_map(backbone: Any) -> None:
    """With motion beside it and without, the scores are those of the mean over the plain map."""
    torch.manual_seed(0)
    config = tiny_config("small-regularised", size=48).changed({"networks.backbone": backbone})
    model: Any = wake(FinetuningModel(config, 3)).eval()
    clip, motion = torch.randn(2, 3, 8, 48, 48), torch.randn(2, 2, 2, 8, 32, 32)
    with torch.no_grad():
        scores, found = model(clip, motion)
        plain, nothing = model(clip)
        maps = model.video(clip)
    torch.testing.assert_close(scores, plain)
    assert found is not None and nothing is None
    pooled = maps.numpy().reshape(2, maps.shape[1], -1).mean(2)
    by_hand = pooled @ model.classifier.weight.detach().numpy().T + model.classifier.bias.detach().numpy()
    np.testing.assert_allclose(scores, by_hand, rtol=1e-4, atol=1e-6)
    assert maps[0, 0].numel() > 1 and not np.allclose(maps.amax((2, 3, 4)), pooled)


def test_dropout_takes_its_share_of_the_pooled_features() -> None:
    model = FinetuningModel(tiny_config("small-scratch", supervision=Supervision("scratch", dropout=0.75)), 3)
    seen: list[Tensor] = []
    model.classifier.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    torch.manual_seed(0)
    for training in (True, False):
        model.train(training).classify(torch.ones(100, model.video.channels, 1, 2, 2))  # type: ignore[operator]
    kept = seen[0] != 0
    assert kept.float().mean() == pytest.approx(0.25, abs=0.03) and (seen[0][kept] == 4).all()
    assert (seen[1] == 1).all()


# ---- what of a batch enters the networks


def pictures(count: int, colours: list[list[int]]) -> Tensor:
    """uint8 (1, count, 40, 48, 3), a colour a quarter: upper left, upper right, lower left, lower right."""
    upper, lower = (np.repeat(np.array([row], np.uint8), 24, 1).repeat(20, 0) for row in (colours[:2], colours[2:]))
    return torch.from_numpy(np.concatenate((upper, lower))).expand(1, count, -1, -1, -1)


@pytest.mark.parametrize("kind", ["small", "small-scratch"])
def test_what_stands_still_is_taken_from_the_clips_that_are_drawn(tiny: Tiny, kind: str) -> None:
    """The left half of a clip stands still, the right half grows brighter by 10 a frame."""
    config = tiny_config(kind, size=16).changed({"photometric.still_removed_p": 0.5})
    frames = torch.full((2, 8, 32, 32, 3), 90, dtype=torch.uint8)
    frames[:, :, :, 16:] = 10 * torch.arange(8, dtype=torch.uint8).view(1, 8, 1, 1, 1)
    batch = {
        "clip": frames,
        "clip_box": torch.tensor([[0.0, 0.0, 1.0, 1.0]] * 2),
        "clip_flip": torch.tensor([False] * 2),
        "clip_photo": torch.tensor([[0.0, 1, 1, 1, 0, 0]] * 2),
        "clip_still_removed": torch.tensor([True, False]),
    }
    clip, _, _ = prepare(batch, config, ShardSet(tiny[0]).settings, with_iframe=False, with_motion=False)
    mean, std = (np.array(x)[:, None] for x in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
    rising = 10 * np.arange(8) / 255
    np.testing.assert_allclose(clip[0, :, :, 5, 2], np.zeros((3, 8)), atol=1e-5)
    np.testing.assert_allclose(clip[0, :, :, 5, 13], (rising - 35 / 255) / std, atol=1e-5)
    np.testing.assert_allclose(clip[1, :, :, 5, 2], np.tile((90 / 255 - mean) / std, 8), atol=1e-5)
    np.testing.assert_allclose(clip[1, :, :, 5, 13], (rising - mean) / std, atol=1e-5)
    off = config.changed({"photometric.still_removed_p": 0.0})
    plain, _, _ = prepare(batch, off, ShardSet(tiny[0]).settings, with_iframe=False, with_motion=False)
    np.testing.assert_allclose(plain[:, :, :, 5, 13], np.stack([(rising - mean) / std] * 2), atol=1e-5)


def test_a_clip_its_iframe_and_its_windows_each_have_their_own_crop_flip_and_colours(tiny: Tiny) -> None:
    """Quarters of a picture are of one colour each: so crop, flip and brightness can be read off the result."""
    config = tiny_config(size=32, motion_size=16)
    task = PretrainingTask(config, ShardSet(tiny[0]), None)
    colours = [[200, 100, 40], [30, 150, 90], [80, 60, 220], [10, 180, 120]]
    plain, brighter = [0.0, 1, 1, 1, 0, 0], [0.0, 1.1, 1, 1, 0, 0]
    boxes = [[0.0, 0.0, 1.0, 0.5], [0.25, 0.0, 0.75, 1.0]]
    batch = {
        "clip": pictures(8, colours),
        "clip_box": torch.tensor([[0.0, 0.0, 1.0, 0.5]]),
        "clip_flip": torch.tensor([False]),
        "clip_photo": torch.tensor([plain]),
        "iframe": pictures(1, colours)[:, 0],
        "iframe_box": torch.tensor([[0.0, 0.5, 1.0, 1.0]]),
        "iframe_flip": torch.tensor([True]),
        "iframe_photo": torch.tensor([brighter]),
        "motion": torch.tensor([8, -4], dtype=torch.int16).expand(1, 2, 8, *task.settings.grid, 2),
        "motion_box": torch.tensor([boxes]),
        "motion_flip": torch.tensor([[False, True]]),
    }
    clip, iframe, motion = task.inputs(batch)
    assert (
        clip.shape == (1, 3, 8, 32, 32) and iframe.shape == (1, 3, 1, 32, 32) and motion.shape == (1, 2, 2, 8, 16, 16)
    )
    mean, std = np.array([0.485, 0.456, 0.406]), np.array([0.229, 0.224, 0.225])
    for found, factor, left, right in ((clip, 1, 0, 1), (iframe, 1.1, 3, 2)):
        for column, quarter in ((2, left), (-3, right)):
            expected = (np.array(colours[quarter]) * factor / 255 - mean) / std
            np.testing.assert_allclose(found[0, :, 0, 16, column], expected, atol=1e-4)
    # 2 pixels right and 1 up, of a frame of 176 x 144, in tens of pixels of crops of 16.
    np.testing.assert_allclose(motion[0, 0, 0], 2 * 16 / 176 / 10, rtol=1e-4)
    np.testing.assert_allclose(motion[0, 0, 1], -1 * 16 / 72 / 10, rtol=1e-4)
    np.testing.assert_allclose(motion[0, 1, 0], -2 * 16 / 88 / 10, rtol=1e-4)
    np.testing.assert_allclose(motion[0, 1, 1], -1 * 16 / 144 / 10, rtol=1e-4)
