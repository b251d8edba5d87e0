"""Motion as colours and arrows (preprocess/draw.py), and the pictures of what a shard holds (preprocess/preview.py)."""

from __future__ import annotations

import colorsys
import sys
from collections.abc import Callable
from fractions import Fraction
from itertools import combinations, pairwise
from pathlib import Path

import av
import numpy as np
import pytest
import simplejpeg
from conftest import make_shards, panned, write_video
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from matplotlib.figure import Figure
from matplotlib.image import AxesImage, imread
from matplotlib.text import Text

import preprocess
from preprocess import draw, preview
from preprocess.encode import film
from preprocess.schema import INTRA
from preprocess.shards import ShardSet

ENCODED = (340, 256)
GRID = (16, 22)
angles = st.floats(0, 2 * np.pi, exclude_max=True)


def hue(colour: np.ndarray) -> float:
    return 360 * colorsys.rgb_to_hsv(*(float(c) / 255 for c in colour))[0]


def middlebury() -> np.ndarray:
    """The 55 colours of the Middlebury wheel, listed arc by arc as its authors describe it; float (55, 3)."""
    colours = []
    corners = [(255, 0, 0), (255, 255, 0), (0, 255, 0), (0, 255, 255), (0, 0, 255), (255, 0, 255), (255, 0, 0)]
    for length, start, end in zip((15, 6, 4, 11, 13, 6), corners, corners[1:]):
        for k in range(length):
            colours.append([a + (b - a) * k / length for a, b in zip(start, end)])
    return np.array(colours)


def test_wheel_has_the_middlebury_colours() -> None:
    expected = middlebury()
    turn = np.arange(55) / 55 * 2 * np.pi
    colours = draw.colour_wheel(np.stack([np.cos(turn), np.sin(turn)], axis=-1), 1.0)
    np.testing.assert_allclose(colours, expected, atol=1)


@settings(max_examples=30)
@given(angles, st.floats(0, 3), st.floats(0.5, 50))
def test_saturation_is_the_magnitude_in_any_direction(angle: float, share: float, limit: float) -> None:
    vector = share * limit * np.array([np.cos(angle), np.sin(angle)])
    colour = draw.colour_wheel(vector, limit)
    assert colour.max() == 255
    assert colour.min() == pytest.approx(255 * (1 - min(share, 1)), abs=1)


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: draw.colour_wheel(np.zeros((2, 3)), 1.0), r"shape \(2, 3\)"),
        (lambda: draw.colour_wheel(np.zeros((4, 2)), 1.0, np.zeros(3, bool)), "4"),
        (lambda: draw.arrows(np.zeros((8, 8), np.uint8), np.zeros((*GRID, 2)), ENCODED), r"\(8, 8\)"),
        (lambda: draw.arrows(np.zeros((8, 8, 3), np.uint8), np.zeros((16, 21, 2)), ENCODED), "16, 22"),
    ],
)
def test_nonsense_is_refused(call: Callable[[], object], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        call()


def test_legend_shows_each_direction_on_its_side() -> None:
    size = 101
    legend = draw.wheel_legend(size)
    assert legend.shape == (size, size, 3)
    assert (legend[[0, 0, -1, -1], [0, -1, 0, -1]] == 255).all()  # corners lie outside the disc
    assert legend[50, 50].min() >= 250
    for (x, y), vector in {(97, 50): (1, 0), (50, 97): (0, 1), (3, 50): (-1, 0), (50, 3): (0, -1)}.items():
        assert hue(legend[y, x]) == pytest.approx(hue(draw.colour_wheel(vector, 1)), abs=4)


@settings(deadline=None, max_examples=25)
@given(st.integers(1, 120), st.integers(1, 120), st.integers(1, 100), st.integers(1, 100), st.integers(0, 2**16))
def test_colour_view_covers_the_frame_and_not_the_overhang(
    width: int, height: int, encoded_width: int, encoded_height: int, seed: int
) -> None:
    rng = np.random.default_rng(seed)
    rows, cols = -(-encoded_height // 16), -(-encoded_width // 16)
    motion = rng.uniform(-8, 8, (rows, cols, 2))
    view = draw.colour_view(motion, 8.0, (encoded_width, encoded_height), (width, height))
    assert view.shape == (height, width, 3)
    for x, y in zip(rng.integers(0, width, 10).tolist(), rng.integers(0, height, 10).tolist()):
        # The middle of pixel x is at (2x + 1) / (2 width) of the frame: in exact arithmetic, which block is that?
        c = Fraction(2 * x + 1, 2 * width) * encoded_width // 16
        r = Fraction(2 * y + 1, 2 * height) * encoded_height // 16
        assert (view[y, x] == draw.colour_wheel(motion[r, c], 8.0)).all()


def test_no_motion_is_white_and_intra_blocks_are_hatched() -> None:
    intra = np.zeros(GRID, bool)
    intra[2, 5] = True
    view = draw.colour_view(np.zeros((*GRID, 2)), 1.0, ENCODED, ENCODED, intra)
    block = view[32:48, 80:96].reshape(-1, 3)
    assert {tuple(c) for c in block.tolist()} == {draw.INTRA_GREY, draw.HATCH_GREY}
    assert (view == 255).all(axis=-1).sum() == 340 * 256 - 256


@settings(deadline=None, max_examples=15, phases=[Phase.explicit, Phase.generate])
@given(
    row=st.integers(0, GRID[0] - 1),
    col=st.integers(0, GRID[1] - 2),
    angle=angles,
    magnitude=st.floats(0.6, 40),
    gain=st.floats(0.5, 4),
    size=st.sampled_from([(340, 256), (228, 172), (456, 344), (200, 300)]),
    background=st.sampled_from([0, 90, 128, 255]),
)
def test_an_arrow_lies_along_its_vector(
    row: int, col: int, angle: float, magnitude: float, gain: float, size: tuple[int, int], background: int
) -> None:
    motion = np.zeros((*GRID, 2))
    motion[row, col] = magnitude * np.cos(angle), magnitude * np.sin(angle)
    frame = np.full((size[1], size[0], 3), background, np.uint8)
    before = frame.copy()
    picture = draw.arrows(frame, motion, ENCODED, gain)
    assert (frame == before).all()  # the caller's frame is left alone
    assert picture.dtype == np.uint8 and picture.shape == frame.shape

    scale_x, scale_y = size[0] / 340, size[1] / 256
    tail = np.array([(16 * col + 8) * scale_x, (16 * row + 8) * scale_y])
    tip = tail + gain * motion[row, col] * [scale_x, scale_y]
    line = tail + np.linspace(0, 1, 400)[:, None] * (tip - tail)  # (400, 2)
    y, x = np.nonzero((picture != frame).any(axis=-1))
    assert len(x)
    away = np.hypot(x[:, None] + 0.5 - line[:, 0], y[:, None] + 0.5 - line[:, 1])  # (pixels, 400)
    shaft, rim = max(1.2, 0.004 * size[0]), max(1.0, 0.003 * size[0])
    assert away.min(axis=1).max() <= 2 * shaft + 2 * rim + 3  # the head's half width, the rim, a corner's point
    # Wide only near the tip: the tail's side holds nothing but the shaft.
    from_tip = np.hypot(*(tip - tail)) * (1 - away.argmin(axis=1) / 399)
    assert away.min(axis=1)[from_tip > 4 * shaft + 2 * rim + 3].max(initial=0) <= shaft / 2 + rim + 3
    # Every point of the line inside the frame is drawn, to the pixel, and stands out from any background.
    inside = ((line >= 1) & (line < np.subtract(size, 1))).all(axis=1)
    assert away[:, inside].min(axis=0).max(initial=0) <= 1.5
    assert np.abs(picture.astype(int) - background).max() >= 60


def test_still_blocks_and_the_overhang_get_no_arrow() -> None:
    rng = np.random.default_rng(0)
    frame = rng.integers(0, 256, (172, 228, 3), dtype=np.uint8)
    motion = rng.uniform(-0.35, 0.35, (*GRID, 2))
    motion[:, 21] = (-12, 0)  # these blocks are centred at 344, beyond the 340 pixels of the frame
    assert (draw.arrows(frame, motion, ENCODED, gain=2.0) == frame).all()
    motion[3, 4] = (0.6, 0)
    assert (draw.arrows(frame, motion, ENCODED) != frame).any()


def test_energies_are_grey_and_black_from_the_limit_on() -> None:
    energy, intra = np.zeros(GRID), np.zeros(GRID, bool)
    energy[2, 3:6], intra[2, 5] = (1.5, 9, 9), True
    view = draw.energy_view(energy, 6.0, ENCODED, ENCODED, intra)
    assert view.shape == (256, 340, 3) and view.dtype == np.uint8
    assert (view[32:48, 48:64] == 191).all() and (view[32:48, 64:80] == 0).all()
    assert {tuple(c) for c in view[32:48, 80:96].reshape(-1, 3).tolist()} == {draw.INTRA_GREY, draw.HATCH_GREY}
    view[32:48, 48:96] = 255
    assert (view == 255).all()


@pytest.fixture(scope="module")
def sideways(tmp_path_factory: pytest.TempPathFactory) -> ShardSet:
    """A grey texture panned right, the same panned left, and a single frame with an awkward name; one is missing."""
    folder = tmp_path_factory.mktemp("sideways")
    for name, pan in (("left/a.mp4", (-4, 0)), ("right/a.mp4", (4, 0))):
        grey = panned(16, pan).mean(axis=-1, keepdims=True).astype(np.uint8).repeat(3, axis=-1)
        write_video(folder / "videos" / name, grey)
    single = "still/" + "$x_" * 60 + "$.mp4"
    write_video(folder / "videos" / single, panned(1))
    names = ["left/a.mp4", "right/a.mp4", single, "missing.mp4"]
    return make_shards(folder, folder / "videos", names, ["left", "right", "", ""], residuals=True)


def red_and_azure(page: np.ndarray) -> tuple[int, int]:
    """Pixels of the clear hues of right and left."""
    r, g, b = (page[..., c].astype(int) for c in range(3))
    return int(((r > 240) & (g < 120) & (b < 120)).sum()), int(((r < 120) & (g > 160) & (b > 240)).sum())


def test_sheet_shows_pans_in_the_hues_of_their_directions_below_texts_that_never_touch(
    sideways: ShardSet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pages: list[Figure] = []
    save = Figure.savefig
    monkeypatch.setattr(Figure, "savefig", lambda page, *a, **o: (pages.append(page), save(page, *a, **o)))
    out = preview.contact_sheet(sideways, [0, 2, 1], tmp_path / "deep" / "sheet.png")
    assert [path.name for path in out.parent.iterdir()] == ["sheet.png"]
    page = np.rint(imread(out)[..., :3] * 255)
    assert (page[0] == 255).all() and (page[:, 0] == 255).all()
    (left_red, left_azure), (right_red, right_azure) = (red_and_azure(page[k : k + 1440]) for k in (0, 2880))
    assert right_red > 100_000 > 10 * right_azure  # four panels of 340 x 256, but for noise and the legend
    assert left_azure > 100_000 > 10 * left_red

    texts = [
        (t.get_text(), t.get_window_extent()) for t in pages[0].findobj(Text) if t.get_text().strip("−0123456789.")
    ]  # ticks aside
    images = pages[0].findobj(AxesImage)
    first = simplejpeg.decode_jpeg(sideways.shards[0].iframe_jpeg(0))
    assert sum(np.array_equal(image.get_array(), first) for image in images) == 1
    pictures = [image.get_window_extent() for image in images]
    for (one, a), (other, b) in combinations(texts, 2):
        assert not a.overlaps(b), f"{one!r} lies on {other!r}"
    for text, box in texts:
        assert pages[0].bbox.x0 <= box.x0 and box.x1 <= pages[0].bbox.x1, f"{text!r} leaves the page"
        assert not any(box.overlaps(p) for p in pictures), f"{text!r} lies on a picture"
    words = "\n\n".join(t for t, _ in texts)
    assert "left/a.mp4\nleft  ·  frames: 16, I-frames: 2  ·  25 fps  ·  source 340×256" in words
    assert "\nunlabelled  ·  frames: 1, I-frames: 1" in words
    assert words.count("I-frame, no vectors") == 3 and words.count("mean motion") == 2 * preview.TIMES


@settings(max_examples=30)
@given(st.integers(1, 80), st.integers(1, 20), st.integers(0, 2**16))
def test_moments_are_the_busiest_of_their_part(frames: int, gop: int, seed: int) -> None:
    score = np.random.default_rng(seed).permutation(frames).astype(float)
    i_frames = np.arange(0, frames, gop)
    moments = preview._moments(score, i_frames)
    moving = [t for t in range(frames) if t % gop]
    assert len(moments) == min(preview.TIMES, len(moving))
    assert moments == sorted(set(moments)) and set(moments) <= set(moving)
    if moving:
        assert max(moving, key=lambda t: score[t]) in moments
    for a, b in pairwise(moments):  # each is the best of its own side of some boundary
        between = [t for t in moving if a <= t <= b]
        assert max(between, key=lambda t: score[t]) in (a, b)


def test_no_vector_is_drawn_where_none_is_stored(sideways: ShardSet) -> None:
    view = preview._View.of(sideways, 1)
    assert view.i_frames.tolist() == [0, 12] and (view.mean[[0, 12]] == 0).all()
    shard, index = sideways.locate(1)
    small = simplejpeg.decode_jpeg(shard.frame_jpeg(int(shard.frame_offset[index]) + 12), colorspace="RGB")
    stored, drawn, *views = view.pictures(12)
    assert stored.shape == (256, 340, 3)  # the I-frame at its own size
    assert (drawn == small.repeat(2, axis=0).repeat(2, axis=1)).all()
    for picture in views:
        assert {tuple(c) for c in picture.reshape(-1, 3).tolist()} == {draw.INTRA_GREY, draw.HATCH_GREY}
    first = int(shard.frame_offset[index])
    energy, intra = shard.residual[first + 11], shard.motion[first + 11, ..., 0] == INTRA
    expected = draw.energy_view(energy / 256, view.energy_limit, ENCODED, (456, 344), intra)
    np.testing.assert_array_equal(view.pictures(11)[3], expected)
    assert len(views) == 2 and expected.min() == 0 and len(np.unique(expected)) > 5


def test_clip_has_every_frame(sideways: ShardSet, tmp_path: Path) -> None:
    out = preview.animation(sideways, 1, tmp_path / "right.mp4")
    with av.open(str(out)) as container:
        stream = container.streams.video[0]
        assert stream.codec_context.pix_fmt == "yuv420p" and stream.average_rate == 25
        frames = [f.to_ndarray(format="rgb24") for f in container.decode(stream)]
    assert len(frames) == 16
    for t, frame in enumerate(frames):
        red, azure = red_and_azure(frame)  # the legend has both
        assert azure < 5000
        assert (red > 80_000) if t % 12 else (red < 5000)  # I-frames carry no vectors
    assert [p.name for p in tmp_path.iterdir()] == ["right.mp4"]


@pytest.mark.parametrize("encoder", ["h264", "mpeg4"])
def test_films_are_h264_or_where_that_is_missing_mpeg4(
    encoder: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if encoder == "mpeg4":
        monkeypatch.setattr(av.codec, "codecs_available", av.codecs_available - {"libx264"})
    elif "libx264" not in av.codecs_available:
        pytest.skip("this PyAV has no libx264")
    frames = panned(3, height=48, width=64)
    film(tmp_path / "film.mp4", frames, Fraction(10))
    with av.open(str(tmp_path / "film.mp4")) as container:
        assert container.streams.video[0].codec_context.name == encoder
        back = [f.to_ndarray(format="rgb24") for f in container.decode(video=0)]
    assert np.abs(np.mean(back, -1) - frames.mean(-1)).mean() < 3


def test_frame_rate_is_one_that_encoders_take() -> None:
    known = {30000 / 1001: Fraction(30000, 1001), 24000 / 1001: Fraction(24000, 1001), 12.5: Fraction(25, 2)}
    known |= dict.fromkeys((0.0, 0.009, 1001.0, float("nan")), Fraction(25))
    assert {fps: preview.frame_rate(fps) for fps in known} == known
    for fps in 0.01, 0.3333333333, 1 / 3.1, 59.94005994, 999.999:
        rate = preview.frame_rate(fps)
        assert max(rate.numerator, rate.denominator) <= 65535 and float(rate) == pytest.approx(fps, rel=0.01)


def test_inspect_draws_what_is_named_or_a_seeded_sample(
    sideways: ShardSet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn: list[list[int]] = []

    def remember(_: ShardSet, videos: list[int], out: Path) -> Path:
        drawn.append(videos)
        return out

    monkeypatch.setattr(preview, "contact_sheet", remember)
    out = tmp_path / "p.PNG"
    assert preview.inspect(sideways.folder, "right/a.mp4", 3, 0, out) == out
    for seed in (*range(8), 0):
        preview.inspect(sideways.folder, None, 2, seed, out)
    preview.inspect(sideways.folder, None, 99, 0, out)
    assert drawn[0] == [1] and drawn[-1] == [0, 1, 2]
    samples = drawn[1:-1]
    assert all(len(set(s)) == 2 and s == sorted(s) for s in samples)
    assert samples[0] == samples[-1] and len({tuple(s) for s in samples}) > 1


@pytest.mark.parametrize(
    ("video", "sample", "out", "words"),
    [
        ("rihgt/a.mp4", 0, "p.png", "but .*right/a.mp4"),
        ("/home/me/videos/left/a.mp4", 0, "p.png", "but left/a.mp4"),
        ("0123456789", 0, "p.png", "but left/a.mp4, right/a.mp4"),
        ("missing.mp4", 0, "p.png", r"missing\.mp4 could not be stored.*: \S"),
        (None, 0, "p.png", "at least 1"),
        (None, 2, "p.mp4", "2 videos, but a clip shows one"),
        ("left/a.mp4", 0, "p.gif", r"ends in \.gif"),
        ("left/a.mp4", 0, "p", "ends in nothing"),
    ],
)
def test_inspect_explains_what_it_cannot_do(
    sideways: ShardSet, tmp_path: Path, video: str | None, sample: int, out: str, words: str
) -> None:
    with pytest.raises(ValueError, match=words):
        preview.inspect(sideways.folder, video, sample, 0, tmp_path / out)
    assert not list(tmp_path.iterdir())


def test_too_many_videos_are_refused(sideways: ShardSet, tmp_path: Path) -> None:
    for videos in [], [0] * 25:
        with pytest.raises(ValueError, match=f"{len(videos)} videos: a sheet shows 1 to 24"):
            preview.contact_sheet(sideways, videos, tmp_path / "p.png")


@pytest.mark.parametrize(("missing", "out", "word"), [("matplotlib", "p.png", "matplotlib"), ("av", "p.mp4", "PyAV")])
def test_a_missing_library_is_named(
    sideways: ShardSet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, missing: str, out: str, word: str
) -> None:
    monkeypatch.delitem(sys.modules, "preprocess.encode")
    monkeypatch.delattr(preprocess, "encode")  # else the module that this imports would stay there for other tests
    for module in [m for m in sys.modules if m.partition(".")[0] == missing] + [missing]:
        monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(ValueError, match=f"needs? {word}"):
        preview.inspect(sideways.folder, "left/a.mp4", 0, 0, tmp_path / out)
    assert not list(tmp_path.iterdir())
