"""Augmentation against slow references that share no code with it, and motion against what it must explain.

The oracle: moving the pixels of frame t by the motion map of frame t+1 must come closer to frame t+1 than leaving them,
as stored, and after the same crop, flip and resampling of both.
"""

from __future__ import annotations

import colorsys
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from preprocess.schema import INTRA, NO_RESIDUAL
from preprocess.shards import Shard, ShardSet
from train import augment
from train.augment import crop, crop_motion, fixed_box, normalise, photometric
from train.data import decode_frames
from train.draws import Cropping, Photometric, draw_box, draw_photometric

SIZE = 112
WIDTH, HEIGHT = 340, 256
WHOLE = torch.tensor([[0.0, 0.0, 1.0, 1.0]])
NO, YES = torch.tensor([False]), torch.tensor([True])
NOTHING = [0.0, 1, 1, 1, 0, 0]
NOISE = 0.6
"""Frames that differ by less, of 255, show a still scene: what differs is the codec's noise, which nothing explains."""

fraction = st.floats(0, 0.45)
boxes = st.tuples(fraction, fraction, fraction, fraction).map(lambda e: (e[0], e[1], 1 - e[2], 1 - e[3]))


def noise(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def unit(*shape: int, seed: int = 0) -> Tensor:
    return torch.from_numpy(np.random.default_rng(seed).random(shape, np.float32))


# ---- crop


@given(boxes, st.integers(1, 12))
@settings(max_examples=30, deadline=None)
def test_a_flip_mirrors_the_crop(box: tuple, size: int) -> None:
    frames, where = torch.from_numpy(noise(1, 2, 11, 14, 3)), torch.tensor([box], dtype=torch.float32)
    plain, flipped = crop(frames, where, NO, size), crop(frames, where, YES, size)
    np.testing.assert_allclose(flipped.flip(-1), plain, atol=2e-5)
    mirrored = torch.tensor([[1 - box[2], box[1], 1 - box[0], box[3]]], dtype=torch.float32)
    np.testing.assert_allclose(crop(frames.flip(3), mirrored, YES, size), plain, atol=2e-5)


def test_the_whole_frame_at_its_own_size_is_itself() -> None:
    frames = noise(1, 3, 20, 20, 3)
    out = crop(torch.from_numpy(frames), WHOLE, NO, 20)
    np.testing.assert_allclose(out[0].numpy(), frames[0].transpose(3, 0, 1, 2) / 255, atol=1e-5)


def test_the_evaluation_box_by_hand() -> None:
    # 256 lines are short: 7/8 of them are 224 pixels; 340 - 224 = 116, half of it left free on each side.
    np.testing.assert_allclose(fixed_box(340, 256), [58 / 340, 16 / 256, 282 / 340, 240 / 256], rtol=1e-6)
    np.testing.assert_allclose(fixed_box(100, 200, 0.5), [0.25, 0.375, 0.75, 0.625])


# ---- motion


def constant(dx: int, dy: int) -> Tensor:
    """Quarter pixels everywhere, int16 (1, 2, 16, 22, 2)."""
    return torch.tensor([dx, dy], dtype=torch.int16).expand(1, 2, 16, 22, 2)


def test_a_constant_field_by_hand() -> None:
    # 12 quarters = 3 pixels right, -8 quarters = 2 pixels up. The box is 170 x 64 pixels, shown as 112 x 112.
    box = torch.tensor([[0.25, 0.5, 0.75, 0.75]])
    dx, dy = 3 * 112 / 170 / 10, -2 * 112 / 64 / 10  # 0.19765, -0.35
    for flip, sign in ((NO, 1), (YES, -1)):
        out = crop_motion(constant(12, -8), box, flip, SIZE, WIDTH, HEIGHT)
        assert out.shape == (1, 2, 2, SIZE, SIZE)
        np.testing.assert_allclose(out[0, 0], sign * dx, rtol=1e-5)
        np.testing.assert_allclose(out[0, 1], dy, rtol=1e-5)


def test_values_are_clamped_to_the_limit() -> None:
    out = crop_motion(constant(200, -16), WHOLE, NO, SIZE, WIDTH, HEIGHT)  # 50 pixels are 16.5 of the crop's
    assert (out[0, 0] == 1).all()
    np.testing.assert_allclose(out[0, 1], -4 * 112 / 256 / 10, rtol=1e-5)
    assert (crop_motion(constant(-200, 0), WHOLE, NO, SIZE, WIDTH, HEIGHT)[0, 0] == -1).all()
    wide = crop_motion(constant(200, -16), WHOLE, NO, SIZE, WIDTH, HEIGHT, limit=20.0)
    np.testing.assert_allclose(wide[0, 0], 50 * 112 / 340 / 20, rtol=1e-5)


@settings(max_examples=40, deadline=None)
@given(boxes, st.booleans())
def test_cells_keep_their_place_though_the_grid_overhangs(box: tuple, flip: bool) -> None:
    """A field whose dx is its column's centre and whose dy is its row's: bilinear resampling gives positions back."""
    centres_x, centres_y = 16 * np.arange(22) + 8, 16 * np.arange(16) + 8  # pixels, up to 344 of 340
    field = np.zeros((1, 1, 16, 22, 2), np.int16)
    field[..., 0], field[..., 1] = 4 * centres_x, 4 * centres_y[:, None]
    where = torch.tensor([box], dtype=torch.float32)
    out = crop_motion(torch.from_numpy(field), where, torch.tensor([flip]), 32, WIDTH, HEIGHT, limit=1e6) * 1e6
    x0, y0, x1, y1 = box
    across = (np.arange(32) + 0.5) / 32
    x = (x0 + (1 - across if flip else across) * (x1 - x0)) * WIDTH
    y = (y0 + across * (y1 - y0)) * HEIGHT
    dx = np.clip(x, 8, 344) * 32 / ((x1 - x0) * WIDTH) * (-1 if flip else 1)
    dy = np.clip(y, 8, 248) * 32 / ((y1 - y0) * HEIGHT)
    np.testing.assert_allclose(out[0, 0, 0].numpy(), np.tile(dx, (32, 1)), rtol=1e-4)
    np.testing.assert_allclose(out[0, 1, 0].numpy(), np.tile(dy[:, None], 32), rtol=1e-4)


def test_blocks_without_a_vector_are_zero() -> None:
    motion = constant(12, -8).clone()
    motion[0, 1] = INTRA  # an I-frame
    motion[0, 0, :, 11:] = INTRA
    out = crop_motion(motion, WHOLE, NO, SIZE, WIDTH, HEIGHT)
    assert (out[0, :, 1] == 0).all()
    vector = [3 * 112 / 340 / 10, -2 * 112 / 256 / 10]
    # The weight of the filled cells falls from the centre of column 10 (168) to that of column 11 (184).
    x = (np.arange(SIZE) + 0.5) / SIZE * WIDTH
    weight = np.clip((184 - x) / 16, 0, 1)
    for axis in (0, 1):
        np.testing.assert_allclose(out[0, axis, 0].numpy(), np.tile(weight * vector[axis], (SIZE, 1)), atol=1e-5)


def with_energy(field: np.ndarray) -> Tensor:
    """Vectors of (12, -8) and these energies (rows, cols), a map, int32 (1, 1, rows, cols, 3)."""
    vectors = np.broadcast_to([12, -8], (*field.shape, 2))
    return torch.from_numpy(np.concatenate([vectors, field[..., None]], -1).astype(np.int32))[None, None]


@settings(max_examples=40, deadline=None)
@given(boxes, st.booleans())
def test_energies_keep_their_place_and_are_neither_rescaled_nor_negated(box: tuple, flip: bool) -> None:
    """Grey levels a pixel that say where their block is: its column's centre, less half its row's."""
    centres_x, centres_y = 16 * np.arange(22) + 8, 16 * np.arange(16) + 8
    stored = with_energy(256 * (centres_x - centres_y[:, None] / 2 + 200))
    where, mirrored = torch.tensor([box], dtype=torch.float32), torch.tensor([flip])
    three = crop_motion(stored, where, mirrored, 32, WIDTH, HEIGHT, limit=1e6)
    x0, y0, x1, y1 = box
    across = (np.arange(32) + 0.5) / 32
    x = np.clip((x0 + (1 - across if flip else across) * (x1 - x0)) * WIDTH, 8, 344)
    y = np.clip((y0 + across * (y1 - y0)) * HEIGHT, 8, 248)
    np.testing.assert_allclose(three[0, 2, 0] * 1e7, x - y[:, None] / 2 + 200, rtol=1e-4)
    vectors, energy = (crop_motion(part, where, mirrored, 32, WIDTH, HEIGHT, 1e6) for part in stored.split([2, 1], -1))
    torch.testing.assert_close(torch.cat([vectors, energy], 1), three, rtol=0, atol=0)


def test_energies_are_clamped_and_blocks_without_prediction_count_as_the_highest() -> None:
    field = np.full((16, 22), 256 * 4)  # four grey levels a pixel
    field[:, 4:8], field[:, 12:16] = 256 * 60, NO_RESIDUAL
    p_frame, i_frame = with_energy(field), with_energy(np.full((16, 22), NO_RESIDUAL))
    found = crop_motion(torch.cat([p_frame, i_frame], 1), WHOLE, NO, 22, 352, HEIGHT)
    line = [0.04] * 4 + [0.1] * 4 + [0.04] * 4 + [0.1] * 4 + [0.04] * 6  # a tenth of what vectors weigh
    np.testing.assert_allclose(found[0, 2, 0], np.tile(line, (22, 1)), rtol=1e-5)
    assert (found[0, 2, 1] == 0).all(), "an I-frame says nothing"
    limited = crop_motion(p_frame, WHOLE, NO, 22, 352, HEIGHT, limit=80.0)[0, 2, 0, 0]
    np.testing.assert_allclose(limited[[0, 5, 13]], [0.4 / 80, 6 / 80, 0.1], rtol=1e-5)


# ---- colours


def drawn(*rows: list[float]) -> Tensor:
    return torch.tensor(rows, dtype=torch.float32)


def test_what_is_not_drawn_keeps_its_bits() -> None:
    clip = unit(3, 3, 2, 16, 16)
    assert torch.equal(photometric(clip, drawn(NOTHING, NOTHING, NOTHING)), clip)
    mixed = photometric(clip, drawn(NOTHING, [1.0, 1.2, 0.8, 0.9, 0.1, 1], NOTHING))
    assert torch.equal(mixed[[0, 2]], clip[[0, 2]])
    assert not torch.allclose(mixed[1], clip[1], atol=0.01)


def draws(count: int, seed: int = 0) -> Tensor:
    rng = np.random.default_rng(seed)
    return torch.from_numpy(np.stack([draw_photometric(rng, Photometric()) for _ in range(count)]))


def test_a_sample_does_not_depend_on_its_neighbours() -> None:
    clip, params = unit(8, 3, 4, 20, 20), draws(8)
    together = photometric(clip, params)
    assert torch.equal(together, photometric(clip, params))
    assert together.min() >= 0 and together.max() <= 1 + 1e-6
    order = torch.tensor([5, 2, 7])
    np.testing.assert_allclose(photometric(clip[order], params[order]), together[order], atol=1e-6)
    for i in range(8):
        np.testing.assert_allclose(photometric(clip[i : i + 1], params[i : i + 1])[0], together[i], atol=1e-6)


def test_selecting_after_computing_all_is_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    """Parameters on a device take the other way through the code; it needs no device to be run."""
    clip, params = unit(8, 3, 4, 20, 20), draws(8)
    expected = photometric(clip, params)
    monkeypatch.setattr(augment, "_only_drawn", augment._all_then_select)
    other = photometric(clip, params)
    np.testing.assert_allclose(other, expected, atol=1e-6)
    untouched = (params == drawn(NOTHING)).all(1)
    assert untouched.any() and torch.equal(other[untouched], clip[untouched])


@pytest.mark.cuda
def test_a_device_gives_what_the_cpu_gives() -> None:
    clip, params = unit(8, 3, 4, 20, 20), draws(8)
    found = photometric(clip.cuda(), params.cuda()).cpu()
    np.testing.assert_allclose(found, photometric(clip, params), atol=2e-3)


def test_all_frames_of_a_clip_are_treated_alike() -> None:
    clip = unit(2, 3, 1, 24, 24).expand(-1, -1, 5, -1, -1)
    out = photometric(clip, drawn([1.5, 1.3, 0.7, 1.2, -0.1, 0], [0.5, 0.8, 1.4, 0.6, 0.05, 1]))
    for t in range(1, 5):
        np.testing.assert_allclose(out[:, :, t], out[:, :, 0], atol=1e-6)


@pytest.mark.parametrize("sigma", [0.1, 0.7, 2.0])
def test_blur_against_a_reference(sigma: float) -> None:
    clip = unit(1, 3, 2, 15, 17)
    out = photometric(clip, drawn([sigma, *NOTHING[1:]]))[0].numpy()
    offsets = range(-6, 7)
    weights = [math.exp(-o * o / (2 * sigma**2)) for o in offsets]
    padded = np.pad(clip[0].numpy().astype(np.float64), ((0, 0), (0, 0), (6, 6), (6, 6)), mode="reflect")
    expected = np.zeros(out.shape)
    for dy, wy in zip(offsets, weights):
        for dx, wx in zip(offsets, weights):
            expected += wy * wx * padded[:, :, 6 + dy : 21 + dy, 6 + dx : 23 + dx]
    np.testing.assert_allclose(out, expected / sum(weights) ** 2, atol=1e-5)


def jittered(clip: np.ndarray, brightness: float, contrast: float, saturation: float, hue: float) -> np.ndarray:
    """The four operations as torchvision defines them, on (3, N) pixels, the hue by the standard library."""
    luma = np.array([0.299, 0.587, 0.114])
    out = (clip * brightness).clip(0, 1)
    mean = (luma @ out).mean()
    out = (contrast * out + (1 - contrast) * mean).clip(0, 1)
    out = (saturation * out + (1 - saturation) * (luma @ out)).clip(0, 1)
    pixels = []
    for r, g, b in out.T.tolist():
        h, s, v = colorsys.rgb_to_hsv(r, g, b)
        pixels.append(colorsys.hsv_to_rgb((h + hue) % 1, s, v))
    return np.array(pixels).T


@pytest.mark.parametrize(
    "factors",
    [
        (1.4, 1, 1, 0),
        (1, 0.6, 1, 0),
        (1, 1, 1.4, 0),
        (1, 1, 0.6, 0),
        (1, 1, 1, 0.1),
        (1, 1, 1, -0.1),
        (0.7, 1.3, 1.2, 0.05),
    ],
)
def test_jitter_against_a_reference(factors: tuple[float, float, float, float]) -> None:
    clip = unit(1, 3, 2, 6, 5)
    out = photometric(clip, drawn([0, *factors, 0]))[0].reshape(3, -1).numpy()
    np.testing.assert_allclose(out, jittered(clip[0].reshape(3, -1).numpy(), *factors), atol=1e-5)


def test_grey_by_hand() -> None:
    clip = torch.tensor([0.2, 0.5, 0.8]).view(1, 3, 1, 1, 1).expand(1, 3, 2, 4, 4)
    out = photometric(clip, drawn([*NOTHING[:5], 1]))
    np.testing.assert_allclose(out, 0.2 * 0.299 + 0.5 * 0.587 + 0.8 * 0.114, rtol=1e-5)


def test_normalisation_by_hand() -> None:
    clip = torch.tensor([0.485, 0.5, 1.0]).view(1, 3, 1, 1, 1)
    expected = [0, (0.5 - 0.456) / 0.224, (1 - 0.406) / 0.225]
    np.testing.assert_allclose(normalise(clip).flatten(), expected, atol=1e-6)


# ---- the oracle


def warp(image: np.ndarray, dx: np.ndarray, dy: np.ndarray) -> np.ndarray:
    """Move the content of (h, w, 3) by (dx, dy) pixels (h, w): each pixel takes what was at (x - dx, y - dy) before."""
    h, w = image.shape[:2]
    x = (np.arange(w) - dx).clip(0, w - 1)
    y = (np.arange(h)[:, None] - dy).clip(0, h - 1)
    i, j = np.minimum(x.astype(int), w - 2), np.minimum(y.astype(int), h - 2)
    a, b = (x - i)[..., None], (y - j)[..., None]
    top = image[j, i] * (1 - a) + image[j, i + 1] * a
    return top * (1 - b) + (image[j + 1, i] * (1 - a) + image[j + 1, i + 1] * a) * b


def stored_displacement(shard: Shard, frame: int) -> tuple[np.ndarray, np.ndarray]:
    """The map of a frame in pixels of the stored frames, (h, w) each: every pixel takes its macroblock's vector."""
    s = shard.settings
    x = ((np.arange(s.frame_width) + 0.5) * s.width / s.frame_width // 16).astype(int)
    y = ((np.arange(s.frame_height) + 0.5) * s.height / s.frame_height // 16).astype(int)
    vectors = shard.motion[frame][y][:, x].astype(np.float64)
    vectors[vectors == INTRA] = 0
    return vectors[..., 0] / 4 * s.frame_width / s.width, vectors[..., 1] / 4 * s.frame_height / s.height


def moving_pairs(shards: ShardSet, each: int) -> list[tuple[str, Shard, int]]:
    """(path, shard, t) of frame pairs t, t+1 that are no I-frame, up to `each` a video, those that move most."""
    pairs = []
    for video, path in enumerate(shards.paths):
        shard, i = shards.locate(video)
        frames = np.arange(shard.frame_offset[i] + 1, shard.frame_offset[i + 1])
        frames = frames[~np.isin(frames, shard.iframe_frame)][:120]
        maps = shard.motion[frames].astype(np.float64)
        speed = np.abs(np.where(maps == INTRA, 0, maps)).mean((1, 2, 3))
        pairs += [(path, shard, int(f) - 1) for f in frames[np.argsort(-speed, kind="stable")[:each]]]
    return pairs


def errors_as_stored(shard: Shard, t: int) -> tuple[float, float]:
    """Mean absolute difference from frame t+1 of frame t moved, and of frame t."""
    before, after = decode_frames(shard, np.array([t, t + 1])).astype(np.float64)
    moved = warp(before, *stored_displacement(shard, t + 1))
    return float(np.abs(moved - after).mean()), float(np.abs(before - after).mean())


def errors_cropped(shard: Shard, t: int, box: np.ndarray, flip: bool, sign: int = 1) -> tuple[float, float]:
    """The same after cropping, flipping and resampling both; sign -1 undoes what the flip did to dx."""
    where, mirrored = torch.from_numpy(box)[None], torch.tensor([flip])
    pictures = crop(torch.from_numpy(decode_frames(shard, np.array([t, t + 1])))[None], where, mirrored, SIZE)
    before, after = pictures[0].permute(1, 2, 3, 0).double().numpy() * 255  # (T, S, S, 3)
    motion = torch.from_numpy(shard.motion[t + 1].copy())[None, None]
    s = shard.settings
    dx, dy = crop_motion(motion, where, mirrored, SIZE, s.width, s.height, limit=1000)[0, :, 0].double().numpy() * 1000
    moved = warp(before, sign * dx, dy)
    return float(np.abs(moved - after).mean()), float(np.abs(before - after).mean())


def random_boxes(count: int) -> list[np.ndarray]:
    rng = np.random.default_rng(1)
    return [draw_box(rng, Cropping(), WIDTH, HEIGHT) for _ in range(count)]


def test_panned_vectors_by_hand(panned_shards: ShardSet) -> None:
    """The content of every frame moves 3 pixels right and 2 up, of 340 x 256."""
    shard, _ = panned_shards.locate(0)
    box = torch.tensor([[0.25, 0.25, 0.75, 0.75]])
    motion = torch.from_numpy(shard.motion[5:7].copy())[None]
    for flip, sign in ((NO, 1), (YES, -1)):
        dx, dy = crop_motion(motion, box, flip, SIZE, WIDTH, HEIGHT)[0]
        np.testing.assert_allclose(dx.median(), sign * 3 * 112 / 170 / 10, rtol=1e-4)
        np.testing.assert_allclose(dy.median(), -2 * 112 / 128 / 10, rtol=1e-4)


@pytest.mark.parametrize("flip", [False, True])
def test_motion_explains_a_pan(panned_shards: ShardSet, flip: bool) -> None:
    for _, shard, t in moving_pairs(panned_shards, 2):
        moved, still = errors_as_stored(shard, t)
        assert moved < 0.35 * still
        for box in random_boxes(4):
            moved, still = errors_cropped(shard, t, box, flip)
            assert moved < 0.35 * still
            if flip:
                wrong, _ = errors_cropped(shard, t, box, flip, sign=-1)
                assert wrong > still > moved


def test_motion_explains_real_clips(real_shards: ShardSet) -> None:
    pairs: dict[str, list[tuple[Shard, int]]] = {}
    for path, shard, t in moving_pairs(real_shards, 6):
        pairs.setdefault(path, []).append((shard, t))
    explained = 0
    for path, some in pairs.items():
        moved, still = np.mean([errors_as_stored(shard, t) for shard, t in some], 0)
        if still < NOISE:
            continue
        assert moved < still, f"{path} as stored: {moved:.2f} moved, {still:.2f} not"
        for flip in (False, True):
            results = [errors_cropped(shard, t, box, flip) for shard, t in some for box in random_boxes(3)]
            moved, still = np.mean(results, 0)
            assert moved < still, f"{path} flip={flip}: {moved:.2f} moved, {still:.2f} not"
        explained += 1
    assert explained >= 0.8 * len(pairs)


def test_a_flip_without_the_sign_would_show(real_shards: ShardSet) -> None:
    """The test above can fail: where dx keeps its sign under a flip, moving pixels makes things worse."""
    pairs = [(s, t) for _, s, t in moving_pairs(real_shards, 6)]
    right, wrong = (
        np.mean([errors_cropped(s, t, box, True, sign)[0] for s, t in pairs for box in random_boxes(2)])
        for sign in (1, -1)
    )
    assert wrong > 1.1 * right
