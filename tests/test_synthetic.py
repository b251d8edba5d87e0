"""The embedded scenes: crossed in equal numbers, no motion in a single frame, true motion in two, files that decode."""

from __future__ import annotations

import hashlib
import math
import os
import platform
import subprocess
import sys
from collections import Counter
from dataclasses import replace
from fractions import Fraction
from itertools import product
from pathlib import Path

import av
import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from preprocess import encode, extract, synthetic
from preprocess.encode import film
from preprocess.manifest import Manifest
from preprocess.schema import INTRA, Settings
from preprocess.synthetic import CONTEXTS, MOTIONS, Scene, Scenes, background, opacity, render, sprites, track, write

SMALL = Scenes(train=36, test=36, frames=13, width=96, height=80)
MOVING = list(MOTIONS)[:6]
HEADINGS = {"rightward": (1, 0), "leftward": (-1, 0), "upward": (0, -1), "downward": (0, 1)}  # as seen; y points down


def grey(image: np.ndarray) -> np.ndarray:
    return image.astype(np.float64).mean(-1)


def from_sprites(scene: Scene, frame: int) -> np.ndarray:
    """How far each pixel is from the nearest sprite's centre, around the edges: (H, W)."""
    width, height = scene.scenes.width, scene.scenes.height
    away = []
    for x, y in track(scene)[frame]:
        across = (np.arange(width) - x + width / 2) % width - width / 2
        down = (np.arange(height) - y + height / 2) % height - height / 2
        away.append(np.hypot(across, down[:, None]))
    return np.min(away, axis=0)


def decode(path: Path) -> np.ndarray:
    with av.open(str(path)) as container:
        return np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)])


def digests(folder: Path) -> dict[str, str]:
    files = [path for path in folder.rglob("*") if path.is_file()]
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


@settings(max_examples=30)
@given(contexts=st.integers(1, 6), motions=st.integers(1, 8), train=st.integers(0, 4), test=st.integers(0, 4))
@example(contexts=6, motions=6, train=8, test=10)
def test_contexts_and_motions_are_crossed_in_equal_numbers(contexts: int, motions: int, train: int, test: int) -> None:
    cells = contexts * motions
    scenes = Scenes(contexts=contexts, motions=motions, train=train * cells, test=test * cells)
    specs = scenes.specs()
    assert cells < 36 or (train, test) != (8, 10) or scenes == Scenes()
    assert [scene.subset for scene in specs] == ["train"] * scenes.train + ["test"] * scenes.test
    for subset, each in (("train", train), ("test", test)):
        counts = Counter((scene.context, scene.motion) for scene in specs if scene.subset == subset)
        crossed = product(list(CONTEXTS)[:contexts], list(MOTIONS)[:motions])
        assert counts == (dict.fromkeys(crossed, each) if each else {})
    assert len({scene.path for scene in specs}) == len(specs)
    assert all(scene.label == f"{scene.context}/{scene.motion}" for scene in specs)
    assert all(scene.path.startswith(f"videos/{scene.context}-{scene.motion}/scene_") for scene in specs)


def test_pixels_are_a_function_of_seed_subset_and_index() -> None:
    first = SMALL.specs()[7]
    pixels = render(first)
    assert pixels.shape == (13, 80, 96, 3) and pixels.dtype == np.uint8
    assert np.array_equal(pixels, render(first))
    assert np.array_equal(pixels, render(replace(first, scenes=replace(SMALL, train=72, test=0))))
    for other in (
        replace(first, index=43),
        replace(first, subset="test"),
        replace(first, scenes=replace(SMALL, seed=1)),
    ):
        assert not np.array_equal(pixels[0], render(other)[0])


# --- nothing gives the motion away -----------------------------------------------------------------------------------


def test_a_frame_tells_of_the_motion_only_where_sprites_are(monkeypatch: pytest.MonkeyPatch) -> None:
    of_each = [Scene(replace(SMALL, frames=4), "train", 5, "meadow", motion) for motion in MOVING]
    firsts = [render(scene)[0] for scene in of_each]
    assert all(np.array_equal(first, firsts[0]) for first in firsts)
    # Whatever way sprites came, a frame shows no more than where they are.
    way = track(of_each[0])[:1] + np.array([[31, 5], [9, 20], [3, 3], [0, 0]])[:, None]  # (T, N, 2)
    monkeypatch.setattr(synthetic, "track", lambda scene: way)
    assert all(np.array_equal(render(scene)[-1], firsts[0]) for scene in of_each)


@settings(max_examples=4)
@given(index=st.integers(0, 10_000), motion=st.sampled_from(MOVING))
def test_sprites_and_their_way_are_the_same_whatever_the_context(index: int, motion: str) -> None:
    scenes = [Scene(SMALL, "test", index, context, motion) for context in CONTEXTS]
    assert all(np.array_equal(track(scene), track(scenes[0])) for scene in scenes)
    frames = [render(scene)[-1] for scene in scenes]
    inside = from_sprites(scenes[0], -1) < 4
    assert inside.sum() > 40
    assert all(np.array_equal(frame[inside], frames[0][inside]) for frame in frames)
    assert not np.array_equal(frames[0], frames[1])


@pytest.mark.parametrize("motion", ["leftward", "clockwise"])
def test_sprites_are_equally_likely_everywhere_in_every_frame(motion: str) -> None:
    scenes = Scenes()
    places = np.stack([track(Scene(scenes, "train", index, "dunes", motion)) for index in range(600)])  # (600, T, N, 2)
    for frame in 0, 30, 71:
        for sprite in range(places.shape[2]):
            x, y = (places[:, frame, sprite] / (scenes.width, scenes.height) % 1).T
            counts = np.histogram2d(x, y, bins=4, range=((0, 1), (0, 1)))[0]
            # Chi-square with 15 degrees of freedom: 44.3 is exceeded once in 10,000.
            assert ((counts - 37.5) ** 2 / 37.5).sum() < 44.3


# --- the motion is what the label says -------------------------------------------------------------------------------


@given(seed=st.integers(0, 99), index=st.integers(0, 9999), motion=st.sampled_from(MOVING))
def test_steps_are_even_and_turn_as_the_motion_says(seed: int, index: int, motion: str) -> None:
    scenes = Scenes(seed=seed)
    steps = np.diff(track(Scene(scenes, "test", index, "grove", motion)), axis=0)  # (T - 1, N, 2)
    assert steps.shape == (71, 2, 2)
    assert np.allclose(steps, steps[:, :1], atol=1e-9)  # all move alike
    steps = steps[:, 0]
    length = np.hypot(*steps.T)
    assert np.allclose(length, length[0]) and 2 <= length[0] <= 4
    turned = np.arctan2(
        steps[:-1, 0] * steps[1:, 1] - steps[:-1, 1] * steps[1:, 0], (steps[:-1] * steps[1:]).sum(1)
    )  # > 0: from right to down, clockwise as seen
    if motion in HEADINGS:
        assert np.allclose(turned, 0)
        assert steps[0] @ HEADINGS[motion] >= length[0] * math.cos(math.radians(10.001))
    else:
        assert np.allclose(turned, turned[0]) and (turned[0] > 0) == (motion == "clockwise")
        assert 16 <= length[0] / abs(turned[0]) <= 24


def test_turning_sprites_set_out_in_every_direction() -> None:
    scenes = [Scene(replace(SMALL, frames=2), "train", index, "dunes", "clockwise") for index in range(400)]
    steps = np.stack([np.diff(track(scene)[:, 0], axis=0)[0] for scene in scenes])
    counts = np.histogram(np.arctan2(steps[:, 1], steps[:, 0]), bins=8, range=(-math.pi, math.pi))[0]
    # Chi-square with 7 degrees of freedom: 29.9 is exceeded once in 10,000.
    assert ((counts - 50) ** 2 / 50).sum() < 29.9


def test_only_sprites_move() -> None:
    scenes = Scenes(train=36, test=0, frames=4)
    for scene in scenes.specs()[::7]:
        frames = render(scene)
        away = np.min([from_sprites(scene, t) for t in range(scenes.frames)], axis=0) > 72 / 2 + 2
        assert away.sum() > 50
        still = np.clip(background(scene) + 0.5, 0, 255).astype(np.uint8)
        assert (frames[:, away] == still[away]).all()


# --- what comes and goes where it stands -----------------------------------------------------------------------------


def test_sprites_come_up_and_fade_or_the_reverse_and_no_frame_tells_which() -> None:
    scenes = Scenes()
    shares = []
    for index in range(300):
        appearing, vanishing = (Scene(scenes, "test", index, "grove", motion) for motion in ("appearing", "vanishing"))
        assert (np.diff(track(appearing), axis=0) == 0).all()
        assert np.allclose(opacity(appearing) + opacity(vanishing), 1, atol=1e-6)
        steps = np.diff(opacity(vanishing), axis=0)
        period = 1 / steps.max()
        assert 12 <= period <= 24 and np.isclose(steps[steps > 0], 1 / period, atol=1e-6).all()
        assert np.isclose(steps[steps < 0], 1 / period - 1, atol=1e-6).all()
        assert 72 / period - 1.1 <= (steps[:, 0] < 0).sum() <= 72 / period + 1
        shares.append(opacity(appearing)[[0, 40]].ravel())
    counts = np.histogram(shares, bins=8, range=(0, 1))[0]
    # Chi-square with 7 degrees of freedom: 29.9 is exceeded once in 10,000.
    assert ((counts - 150) ** 2 / 150).sum() < 29.9


def test_vectors_say_nothing_of_what_comes_and_goes_and_residuals_do(tmp_path: Path) -> None:
    stored = Settings(width=176, height=144, frame_width=112, frame_height=92)
    for motion in "appearing", "vanishing":
        scene = Scene(Scenes(), "test", 3, "grove", motion)
        film(tmp_path / "scene.mp4", render(scene), Fraction(25))
        groups = extract.groups(
            encode.packets(str(tmp_path / "scene.mp4"), stored, encode.Source()), stored, residuals=True
        )
        vectors, energy = (np.concatenate(parts) for parts in zip(*((g.motion, g.residual) for g in groups)))
        moving = (np.abs(vectors) > 2).any(-1) & (vectors[..., 0] != INTRA)  # more than half a pixel
        assert moving.mean() < 0.05
        sudden = np.abs(np.diff(opacity(scene), axis=0, prepend=opacity(scene)[:1])).max(1) > 0.5  # (T,)
        predicted = np.arange(72) % 12 > 0
        strong = (energy > 256 * 10).sum((1, 2))  # or intra
        assert np.median(strong[sudden & predicted]) >= 8 > 1 >= np.median(strong[~sudden & predicted])


def test_an_mpeg4_encoder_finds_the_motion(tmp_path: Path) -> None:
    right = total = 0
    for scene in Scenes(frames=18).specs()[:36:7]:  # one of each context and motion
        film(tmp_path / "scene.mp4", render(scene), Fraction(25), "mpeg4")
        steps = np.diff(track(scene), axis=0)
        with av.open(str(tmp_path / "scene.mp4")) as container:
            container.streams.video[0].codec_context.options = {"flags2": "+export_mvs"}
            for t, frame in enumerate(container.decode(video=0)):
                side_data = frame.side_data.get("MOTION_VECTORS")
                if side_data is None:
                    continue
                away = from_sprites(scene, t)
                for vector in side_data.to_ndarray():
                    x, y = int(vector["dst_x"]), int(vector["dst_y"])
                    if 16 < x < 160 and 16 < y < 128 and away[y - 8 : y + 8, x - 8 : x + 8].max() < 24:
                        found = -np.array([vector["motion_x"], vector["motion_y"]]) / vector["motion_scale"]
                        right += np.hypot(*(found - steps[t - 1, 0])) < 1
                        total += 1
    assert total > 200 and right / total > 0.95


@settings(max_examples=10)
@given(index=st.integers(0, 9999))
def test_sprites_are_whole_and_as_large_as_said(index: int) -> None:
    for sprite in sprites(Scene(SMALL, "train", index, "dunes", "upward")):
        colour, clear = sprite[..., :3], sprite[..., 3]
        border = np.ones(clear.shape, bool)
        border[1:-1, 1:-1] = False
        assert np.all(clear[border] == 1) and np.all(colour[border] == 0)
        assert colour.min() >= 0 and colour.max() <= 255 and clear.min() == 0
        for axis in (0, 1):
            assert 0.7 * 56 < (clear.min(axis) < 0.5).sum() <= 73


def test_files_hold_the_scenes_whatever_the_number_of_workers(tmp_path: Path) -> None:
    scenes = replace(SMALL, contexts=2, motions=2, train=4, test=4)
    manifest = write(tmp_path / "one", scenes)
    assert write(tmp_path / "two", scenes, workers=2) == manifest == Manifest.read(tmp_path / "one" / "manifest.csv")
    files = digests(tmp_path / "one")
    assert files == digests(tmp_path / "two")
    assert set(files) == {*manifest.paths, "manifest.csv", "scenes.json"}
    assert manifest.subsets == ("train",) * 4 + ("test",) * 4
    assert manifest.classes == ("dunes/leftward", "dunes/rightward", "meadow/leftward", "meadow/rightward")
    for scene, path, label in zip(scenes.specs(), manifest.paths, manifest.labels):
        frames = decode(tmp_path / "one" / path)
        assert frames.shape == (13, 80, 96, 3)
        assert label.replace("/", "-") == Path(path).parent.name
        assert np.abs(grey(frames) - grey(render(scene))).mean() < 3
    with av.open(str(tmp_path / "one" / manifest.paths[0])) as container:
        assert container.streams.video[0].average_rate == 25
        assert [frame.time for frame in container.decode(video=0)] == pytest.approx(np.arange(13) / 25)


def test_writing_again_finishes_what_is_missing_and_nothing_else(tmp_path: Path) -> None:
    scenes = replace(SMALL, contexts=2, motions=1, train=2, test=2)
    manifest = write(tmp_path, scenes)
    whole = digests(tmp_path)
    times = {path: (tmp_path / path).stat().st_mtime_ns for path in whole}
    assert write(tmp_path, scenes) == manifest
    assert {path: (tmp_path / path).stat().st_mtime_ns for path in whole} == times
    (tmp_path / manifest.paths[2]).unlink()
    (tmp_path / "manifest.csv").unlink()
    write(tmp_path, scenes)
    assert digests(tmp_path) == whole
    again = {path for path in whole if (tmp_path / path).stat().st_mtime_ns != times[path]}
    assert again == {manifest.paths[2], "manifest.csv"}


def test_a_failing_encoder_leaves_no_partial_video(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def half(path: Path, *_: object) -> None:
        Path(path).write_bytes(b"half")
        raise OSError("disk full")

    monkeypatch.setattr(synthetic, "film", half)
    scenes = replace(SMALL, contexts=1, motions=1, train=1, test=1)
    with pytest.raises(OSError, match="disk full"):
        write(tmp_path, scenes)
    assert set(digests(tmp_path)) == {"scenes.json"}
    monkeypatch.undo()
    assert len(decode(tmp_path / write(tmp_path, scenes).paths[0])) == 13


def test_other_settings_are_refused_by_name(tmp_path: Path) -> None:
    scenes = replace(SMALL, contexts=1, motions=1, train=1, test=1)
    write(tmp_path, scenes)
    before = digests(tmp_path)
    with pytest.raises(ValueError, match="frames is 13 there, 12 here; seed is 0 there, 5 here"):
        write(tmp_path, replace(scenes, seed=5, frames=12))
    assert digests(tmp_path) == before
    for damaged in ("{", "[]"):
        (tmp_path / "scenes.json").write_text(damaged)
        with pytest.raises(ValueError, match=r"scenes\.json"):
            write(tmp_path, scenes)
    (tmp_path / "scenes.json").unlink()
    with pytest.raises(ValueError, match=r"no scenes\.json"):
        write(tmp_path, scenes)
    before.pop("scenes.json")
    assert digests(tmp_path) == before


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"contexts": 7}, "contexts is 7, but must be 1 to 6: dunes"),
        ({"motions": 0}, "motions is 0, but must be 1 to 8: rightward"),
        ({"train": 100}, "train is 100, but must be a multiple of 36 .* 108 would do"),
        ({"test": -36}, "test is -36"),
        ({"frames": 0}, "0 frames of 176 x 144"),
        ({"width": 175}, "even width"),
        ({"height": 74}, "from 76 on"),
    ],
)
def test_settings_that_cannot_work_are_refused(change: dict, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        Scenes(**change)


ON_ANOTHER_CPU = """
import ctypes, hashlib, sys
from pathlib import Path
import av
from preprocess import encode, extract, synthetic
from preprocess.schema import Settings
if sys.argv[2] == "limited":
    library = next(Path(av.__file__).parent.parent.glob("av.libs/libavutil*"))
    ctypes.CDLL(str(library)).av_force_cpu_flags(0x1B)  # MMX to SSE2: what every x86-64 has
    encode.X264.append("asm=sse2")
scenes = synthetic.Scenes(train=36, test=0, frames=13)
for scene in scenes.specs()[::17]:
    path = Path(sys.argv[1]) / "scene.mp4"
    encode.film(path, synthetic.render(scene), encode.Fraction(25))
    print(hashlib.sha256(path.read_bytes()).hexdigest())
    settings = Settings(width=128, height=112, frame_width=112, frame_height=92)
    source = encode.Source()
    for group in extract.groups(encode.packets(str(path), settings, source), settings):
        print(hashlib.sha256(b"".join([*group.frames, group.iframe, group.motion.tobytes()])).hexdigest())
"""


@pytest.mark.skipif(platform.machine() != "x86_64", reason="limits the instructions of an x86-64")
def test_scenes_and_shards_are_the_same_on_any_cpu(tmp_path: Path) -> None:
    features = np.show_config(mode="dicts")["SIMD Extensions"].get("found", [])
    said = [
        subprocess.run(
            [sys.executable, "-c", ON_ANOTHER_CPU, str(tmp_path), which],
            env={**os.environ, **limits},
            check=True,
            capture_output=True,
            text=True,
        ).stdout.split()
        for which, limits in (("all", {}), ("limited", {"NPY_DISABLE_CPU_FEATURES": " ".join(features)}))
    ]
    assert said[0] == said[1] and len(set(said[0])) == 9  # three files of two groups
