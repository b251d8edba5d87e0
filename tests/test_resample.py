"""Resampling against Pillow, whose filter the authors' release crops with: random boxes, shrunk and enlarged."""

from __future__ import annotations

import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from train.augment import crop, crop_motion, resample

fraction = st.floats(0, 0.45)
boxes = st.tuples(fraction, fraction, fraction, fraction).map(lambda e: (e[0], e[1], 1 - e[2], 1 - e[3]))
OTHER = (0.1, 0.2, 0.9, 0.7)


def pillow(picture: np.ndarray, box: tuple[float, ...], flip: bool, size: int) -> np.ndarray:
    """(h, w) float32, or uint8 (h, w, 3), cut out and resized by Pillow; the box in fractions."""
    height, width = picture.shape[:2]
    x0, y0, x1, y1 = box
    pixels = (x0 * width, y0 * height, x1 * width, y1 * height)
    found = np.asarray(Image.fromarray(picture).resize((size, size), Image.Resampling.BILINEAR, pixels))
    return found[:, ::-1] if flip else found


@settings(max_examples=60, deadline=None)
@given(boxes, st.booleans(), st.integers(1, 90), st.integers(1, 90), st.integers(1, 40), st.integers(0, 99))
def test_every_plane_is_what_pillow_makes_of_it(
    box: tuple, flip: bool, height: int, width: int, size: int, seed: int
) -> None:
    maps = np.random.default_rng(seed).normal(0, 100, (2, 2, height, width, 3)).astype(np.float32)
    both = torch.tensor([OTHER, box], dtype=torch.float32)
    out = resample(torch.from_numpy(maps), both, torch.tensor([not flip, flip]), size)
    assert out.shape == (2, 3, 2, size, size)
    for sample, (where, mirrored) in enumerate(((OTHER, not flip), (box, flip))):
        for t in range(2):
            for channel in range(3):
                expected = pillow(maps[sample, t, ..., channel], where, mirrored, size)
                np.testing.assert_allclose(out[sample, channel, t], expected, atol=0.02)  # of about 300


@settings(max_examples=20, deadline=None)
@given(boxes, st.booleans(), st.sampled_from([64, 112, 200]), st.integers(0, 99))
def test_clips_are_within_one_grey_level_of_the_release(box: tuple, flip: bool, size: int, seed: int) -> None:
    frames = np.random.default_rng(seed).integers(0, 256, (1, 2, 172, 228, 3), dtype=np.uint8)
    out = crop(torch.from_numpy(frames), torch.tensor([box], dtype=torch.float32), torch.tensor([flip]), size)
    for t in range(2):
        expected = pillow(frames[0, t], box, flip, size).astype(np.float64)
        assert np.abs(255 * out[0, :, t].permute(1, 2, 0).numpy() - expected).max() < 1


@settings(max_examples=30, deadline=None)
@given(boxes, st.booleans(), st.integers(0, 99))
def test_motion_is_interpolated_over_the_frame_and_not_over_the_grid(box: tuple, flip: bool, seed: int) -> None:
    # 22 columns of 16 pixels are 352, of which the frame covers 340: the box lies within those.
    vectors = np.random.default_rng(seed).integers(-40, 41, (1, 1, 16, 22, 2)).astype(np.int16)
    wide, high = (box[2] - box[0]) * 340, (box[3] - box[1]) * 256
    out = crop_motion(torch.from_numpy(vectors), torch.tensor([box]), torch.tensor([flip]), 112, 340, 256, 1e6)
    inside = (box[0] * 340 / 352, box[1], box[2] * 340 / 352, box[3])
    for axis, zoom in ((0, (-1 if flip else 1) * 112 / wide), (1, 112 / high)):
        expected = pillow(vectors[0, 0, ..., axis].astype(np.float32), inside, flip, 112) / 4 * zoom
        np.testing.assert_allclose(1e6 * out[0, axis, 0], expected, atol=0.01)


def test_a_network_in_bfloat16_is_fed_the_same_pixels() -> None:
    frames = torch.from_numpy(np.random.default_rng(0).integers(0, 256, (1, 2, 40, 50, 3), dtype=np.uint8))
    arguments = frames, torch.tensor([OTHER]), torch.tensor([True]), 32
    with torch.autocast("cpu", torch.bfloat16):
        found = crop(*arguments)
    assert torch.equal(found, crop(*arguments))


def test_a_picture_that_shrinks_does_not_alias() -> None:
    stripes = np.zeros((1, 1, 96, 96, 3), np.uint8)
    stripes[..., ::2, :] = 255  # finer than the output can show: only their mean may be left
    whole, no = torch.tensor([[0.0, 0.0, 1.0, 1.0]]), torch.tensor([False])
    assert (crop(torch.from_numpy(stripes), whole, no, 36) - 0.5).abs().max() < 0.05
