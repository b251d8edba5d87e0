"""The embedded data set: scenes that cross context with motion, rendered by numpy and encoded as real video files.

A scene is a static background with textured sprites that drift over it. The background belongs to a *context* (a family
of palette and texture scale), the drift to a *motion* (four headings, two turning senses). The two are crossed in equal
numbers, so that neither tells the other, and:

- everything else (background noise, colours, light, sprites, places, speeds) is drawn without looking at either;
- sprites start anywhere and wrap around the frame's edges (a torus). A place drawn uniformly on a torus stays uniform
  whatever the motion, so every single frame has the same distribution for all motions. Bouncing would turn the heading,
  and leaving the frame would let the place tell it;
- the sprites of a scene move alike, hence nearly every crop sees the motion.

Two further motions, which no data set has unless it is asked for them, ask what motion vectors cannot say: sprites
stand where they are, and come up at once and fade, again and again, or the reverse. How far they have faded is drawn
uniformly for every frame of both, so that no single frame tells the two apart.

Every pixel is a function of (seed, subset, index) and the settings; the number of workers changes nothing.
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import NamedTuple

import joblib
import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from preprocess.encode import film, film_codec
from preprocess.files import replacing, write_text
from preprocess.manifest import Manifest

RENDERING = 2  # raise it whenever the pixels of a video change: folders written before are refused, not mixed
FRAME_RATE = 25
SETTINGS_NAME = "scenes.json"
MANIFEST_NAME = "manifest.csv"
SUBSETS = ("train", "test")

Colour = tuple[int, int, int]
Floats = NDArray[np.float32]
Image = NDArray[np.uint8]


class Family(NamedTuple):
    """A context: the colours of troughs, slopes and crests of its texture (RGB, 0-255) and its wavelength in pixels."""

    dark: Colour
    middle: Colour
    light: Colour
    wavelength: float


# Three palettes that overlap at their ends, each at two texture scales: colour alone cannot tell the six apart, scale
# alone cannot either. The scales lie further apart than a crop of a fifth of the frame (2.2 times) can move them.
CONTEXTS: dict[str, Family] = {
    "dunes": Family((122, 88, 54), (176, 140, 92), (214, 188, 140), 40.0),
    "meadow": Family((58, 76, 40), (104, 132, 66), (168, 176, 104), 9.0),
    "lagoon": Family((40, 74, 88), (70, 124, 138), (142, 182, 176), 40.0),
    "gravel": Family((96, 82, 66), (154, 136, 108), (204, 190, 160), 9.0),
    "grove": Family((44, 64, 40), (92, 120, 62), (156, 164, 96), 40.0),
    "rapids": Family((52, 80, 96), (88, 134, 146), (168, 194, 188), 9.0),
}


class Motion(NamedTuple):
    """Heading at frame 0 in degrees (0 right, 90 down, as y points down; None anywhere), turning sense (+1 clockwise);
    or the sign of the slope at which sprites that stand still become opaque."""

    heading: float | None
    sense: int = 0
    fading: int = 0


MOTIONS: dict[str, Motion] = {
    "rightward": Motion(0.0),
    "leftward": Motion(180.0),
    "upward": Motion(270.0),
    "downward": Motion(90.0),
    "clockwise": Motion(None, 1),
    "anticlockwise": Motion(None, -1),
    "appearing": Motion(None, fading=-1),
    "vanishing": Motion(None, fading=1),
}


# How hard the contexts are: variation inside a family (standard deviations).
SCALE_JITTER = 0.25  # octaves of the texture's wavelength
PALETTE_JITTER = 12.0  # of 255, each colour and channel on its own
TINT_JITTER = 12.0  # of 255, each channel, the same for the three colours of a scene
BRIGHTNESS_JITTER = 0.15  # natural logarithm of the gain
CONTRAST_JITTER = 0.25  # natural logarithm of the texture's amplitude
LIGHTING = 0.12  # of blotches of light and shade as large as the frame, relative

# How hard the motions are. Ranges (lowest, highest) are drawn from uniformly; lengths are pixels of the video.
SPRITES = 2
SPRITE_SIZE = (56.0, 72.0)  # across, at the widest
SPRITE_WAVELENGTH = (12.0, 20.0)  # smooth enough for an encoder to match, too long to mismatch
SPRITE_SATURATION = 0.5  # 0 grey ... 1 full colour
SPEED = (2.0, 4.0)  # pixels a frame along the path
RADIUS = (16.0, 24.0)  # of the turning motions' circle
PERIOD = (12.0, 24.0)  # frames from one sudden change of a fading sprite to the next
HEADING_JITTER = 10.0  # degrees either side, straight motions
CLEAR = np.array([0, 0, 0, 1], np.float32)  # a pixel of a sprite that is not there
SMALLEST_SIDE = 76  # of the frame: a sprite must not meet itself where it wraps around


@dataclass(frozen=True)
class Scenes:
    """What the data set holds.

    ValueError for counts that do not fill the contexts x motions cells equally, and for frames too small.
    """

    contexts: int = 6  # the first so many of CONTEXTS
    motions: int = 6  # the first so many of MOTIONS; 8 adds those that fade
    train: int = 288
    test: int = 360
    frames: int = 72
    width: int = 176
    height: int = 144
    seed: int = 0

    def __post_init__(self) -> None:
        for name, value, most in (("contexts", self.contexts, CONTEXTS), ("motions", self.motions, MOTIONS)):
            if not 1 <= value <= len(most):
                raise ValueError(f"{name} is {value}, but must be 1 to {len(most)}: {', '.join(most)}")
        for name, value in (("train", self.train), ("test", self.test)):
            if value < 0 or value % self.cells:
                enough = math.ceil(value / self.cells) * self.cells
                raise ValueError(
                    f"{name} is {value}, but must be a multiple of {self.cells} ({self.contexts} contexts x "
                    f"{self.motions} motions), so that neither tells the other: {enough} would do"
                )
        if self.frames < 1 or min(self.width, self.height) < SMALLEST_SIDE or self.width % 2 or self.height % 2:
            raise ValueError(
                f"{self.frames} frames of {self.width} x {self.height}, but there must be at least 1, of even width "
                f"and height (video encoders halve the colour planes) from {SMALLEST_SIDE} on (sprites must fit)"
            )

    @property
    def cells(self) -> int:
        return self.contexts * self.motions

    def specs(self) -> list[Scene]:
        """Every scene, train before test; scene i of a subset lies in cell i mod cells, contexts slowest."""
        found = []
        for subset, count in (("train", self.train), ("test", self.test)):
            for index in range(count):
                context, motion = divmod(index % self.cells, self.motions)
                found.append(Scene(self, subset, index, list(CONTEXTS)[context], list(MOTIONS)[motion]))
        return found


@dataclass(frozen=True)
class Scene:
    """One scene: what `render` draws. All that is random follows (seed, subset, index), not context or motion."""

    scenes: Scenes
    subset: str
    index: int
    context: str
    motion: str

    @property
    def label(self) -> str:
        return f"{self.context}/{self.motion}"

    @property
    def path(self) -> str:
        """Relative to the data set's folder; train and test share a folder a class, so the numbers continue."""
        number = self.index + (self.scenes.train if self.subset == "test" else 0)
        return f"videos/{self.context}-{self.motion}/scene_{number:05d}.mp4"

    def rng(self, part: int) -> np.random.Generator:
        """A generator of its own for each part of the scene, so that a setting of one part leaves the others alone."""
        return np.random.default_rng([self.scenes.seed, SUBSETS.index(self.subset), self.index, part])


def render(scene: Scene) -> Image:
    """All frames of a scene, RGB: (T, H, W, 3)."""
    scenes = scene.scenes
    frames = np.repeat(_pixels(background(scene))[None], scenes.frames, axis=0)
    path, opaque = track(scene), opacity(scene)  # (T, N, 2), (T, N)
    for number, sprite in enumerate(sprites(scene)):
        side = len(sprite)
        corner = path[:, number] - (side - 1) / 2
        whole = np.floor(corner).astype(np.int64)
        part = (corner - whole).astype(np.float32)
        for frame, (x, y), (across, down), share in zip(frames, whole, part, opaque[:, number]):
            moved = sprite[:, 1:] + across * (sprite[:, :-1] - sprite[:, 1:])
            moved = moved[1:] + down * (moved[:-1] - moved[1:])  # (side - 1, side - 1, 4), from pixel x + 1, y + 1 on
            moved = share * moved + (1 - share) * CLEAR
            rows = (np.arange(y + 1, y + side) % scenes.height)[:, None]
            columns = np.arange(x + 1, x + side) % scenes.width
            frame[rows, columns] = _pixels(frame[rows, columns] * moved[..., 3:] + moved[..., :3])
    return frames


def track(scene: Scene) -> NDArray[np.float64]:
    """Where the sprites' centres are, in pixels: (T, N, 2) as x, y; pixel (0, 0) has its centre at 0, 0.

    Not wrapped: take it modulo (width, height) for places on the frame; differences along T are the true displacements,
    of equal length all along.
    """
    scenes = scene.scenes
    rng = scene.rng(0)
    start = rng.random(2) * (scenes.width, scenes.height)
    speed = rng.uniform(*SPEED)
    radius = rng.uniform(*RADIUS)
    jitter = rng.uniform(-1, 1) * math.radians(HEADING_JITTER)
    anywhere = rng.uniform(0, 2 * math.pi)
    spread = rng.uniform(-1, 1, (SPRITES, 2)) / (8 * SPRITES)
    heading, sense, fading = MOTIONS[scene.motion]
    if fading:
        speed = 0.0
    first = anywhere if heading is None else math.radians(heading) + jitter
    angle = first + sense * speed / radius * np.arange(scenes.frames - 1)  # (T - 1,)
    steps = speed * np.stack([np.cos(angle), np.sin(angle)], axis=1)
    shift = np.concatenate([np.zeros((1, 2)), np.cumsum(steps, axis=0)])  # (T, 2)
    # Sprites stand apart by equal parts of both sides of the frame, less a little of their own: they hardly overlap.
    apart = (np.arange(SPRITES)[:, None] / SPRITES + spread) * (scenes.width, scenes.height)
    return start + apart + shift[:, None]


def opacity(scene: Scene) -> Floats:
    """How far each sprite covers what is behind it, 0 to 1: (T, N). All of it, unless it fades."""
    rng, fading = scene.rng(3), MOTIONS[scene.motion].fading
    since = (np.arange(scene.scenes.frames)[:, None] / rng.uniform(*PERIOD) + rng.random(SPRITES)) % 1  # (T, N)
    shares = {0: np.ones_like(since), 1: since, -1: 1 - since}
    return shares[fading].astype(np.float32)


def background(scene: Scene) -> Floats:
    """The scene's background in colours 0-255 (values may lie beyond): (H, W, 3). It tiles the plane."""
    scenes = scene.scenes
    family = CONTEXTS[scene.context]
    rng = scene.rng(1)
    wavelength = family.wavelength * 2 ** (SCALE_JITTER * rng.standard_normal())
    gain = math.exp(BRIGHTNESS_JITTER * rng.standard_normal())
    contrast = math.exp(CONTRAST_JITTER * rng.standard_normal())
    tint = TINT_JITTER * rng.standard_normal(3)
    palette = np.array([family.dark, family.middle, family.light]) + PALETTE_JITTER * rng.standard_normal((3, 3))
    noise = contrast * _noise(rng, scenes.height, scenes.width, wavelength)
    # Colours between the three, by the noise's height: dark at -1.5 deviations, light at +1.5.
    colours = np.stack(
        [np.interp(noise, (-1.5, 0, 1.5), palette[:, channel] + tint[channel]) for channel in range(3)], -1
    )
    light = gain * (1 + LIGHTING * _noise(rng, scenes.height, scenes.width, scenes.width))
    return (colours * light[..., None]).astype(np.float32)


def sprites(scene: Scene) -> list[Floats]:
    """The scene's sprites: (S, S, 4), colour times coverage (0-255), then transparency (0-1); borders empty.

    Two colours in a smooth texture within a wobbly round outline, soft over two pixels: nothing that tells context or
    motion, and no edge straight enough to hide a shift along it.
    """
    rng = scene.rng(2)
    made = []
    for _ in range(SPRITES):
        size = rng.uniform(*SPRITE_SIZE)
        wavelength = rng.uniform(*SPRITE_WAVELENGTH)
        wobble, turn = rng.uniform(0, 0.08, 2), rng.uniform(0, 2 * math.pi, 2)
        hues = rng.random((2, 3)) * 2 - 1  # two colours around a dark and a light grey
        side = math.ceil(size) + 4
        x = np.arange(side) - (side - 1) / 2
        distance, angle = np.hypot(x, x[:, None]), np.arctan2(x[:, None], x)
        outline = 1 + wobble[0] * np.cos(3 * angle + turn[0]) + wobble[1] * np.cos(5 * angle + turn[1])
        edge = size / 2 / (1 + wobble.sum()) * outline
        cover = np.clip((edge - distance) / 2 + 0.5, 0, 1)[..., None]
        ends = np.clip(np.array([[50.0], [205.0]]) + 100 * SPRITE_SATURATION * hues, 0, 255)
        mix = 0.5 + 0.5 * np.tanh(2 * _noise(rng, side, side, wavelength))[..., None]
        whole = np.concatenate([cover * (ends[0] + mix * (ends[1] - ends[0])), 1 - cover], axis=2)
        made.append(whole.astype(np.float32))
    return made


def write(folder: str | os.PathLike[str], scenes: Scenes, workers: int = 1) -> Manifest:
    """Render and encode every scene into FOLDER/videos/CONTEXT-MOTION/, then write FOLDER/manifest.csv and return it.

    Videos appear under their final names only when complete, and those that exist are kept: the same call finishes what
    an interrupted one began, and does nothing where all is there. ValueError where the folder holds scenes of other
    settings (naming each difference) or videos of unknown origin; nothing is deleted.
    """
    root = Path(folder)
    _claim(root, scenes)
    specs = scenes.specs()
    missing = [scene for scene in specs if not (root / scene.path).exists()]
    for parent in sorted({(root / scene.path).parent for scene in missing}):
        parent.mkdir(parents=True, exist_ok=True)
    tasks = (joblib.delayed(_make)(scene, root / scene.path) for scene in missing)
    done = joblib.Parallel(n_jobs=workers, return_as="generator_unordered")(tasks)
    for _ in tqdm(done, total=len(missing), desc="scenes", unit="scene", disable=None if missing else True):
        pass
    manifest = Manifest(
        paths=tuple(scene.path for scene in specs),
        labels=tuple(scene.label for scene in specs),
        subsets=tuple(scene.subset for scene in specs),
    )
    if missing or not (root / MANIFEST_NAME).exists():
        manifest.write(root / MANIFEST_NAME)
    return manifest


def _make(scene: Scene, path: Path) -> None:
    """Render and encode one scene; what lies under the final name is complete."""
    with replacing(path) as partial:
        film(partial, render(scene), Fraction(FRAME_RATE))


def _claim(root: Path, scenes: Scenes) -> None:
    """Leave the settings in the folder, or compare them with those that lie there."""
    wanted = {"rendering": RENDERING, "codec": film_codec(), **dataclasses.asdict(scenes)}
    note = root / SETTINGS_NAME
    if note.exists():
        try:
            found = json.loads(note.read_text(encoding="utf-8"))
        except json.JSONDecodeError as error:
            raise ValueError(f"{note} is not JSON ({error}): give another folder, or remove this one") from error
        if not isinstance(found, dict):
            raise ValueError(f"{note} holds no settings: give another folder, or remove this one")
        nothing = "nothing"
        differences = [
            f"{key} is {found.get(key, nothing)} there, {wanted.get(key, nothing)} here"
            for key in {**wanted, **found}
            if found.get(key, nothing) != wanted.get(key, nothing)
        ]
        if differences:
            raise ValueError(
                f"{root} holds scenes of other settings: {'; '.join(differences)}. "
                "Give another folder, or the same settings"
            )
        return
    if (root / "videos").exists() or (root / MANIFEST_NAME).exists():
        raise ValueError(f"{root} holds videos but no {SETTINGS_NAME} that says what they are: give another folder")
    write_text(note, json.dumps(wanted, indent=2) + "\n")


def _noise(rng: np.random.Generator, height: int, width: int, wavelength: float) -> NDArray[np.float64]:
    """Noise of one octave around a wavelength in pixels, mean 0, deviation 1, that tiles the plane: (height, width)."""
    spectrum = np.fft.rfft2(rng.standard_normal((height, width)))
    frequency = np.hypot(np.fft.fftfreq(height)[:, None], np.fft.rfftfreq(width))  # cycles a pixel
    frequency[0, 0] = np.inf  # the mean, which is left out
    noise = np.fft.irfft2(spectrum * np.exp(-2 * np.log2(frequency * wavelength) ** 2), s=(height, width))
    return noise / noise.std()


def _pixels(image: Floats) -> Image:
    return np.clip(image + 0.5, 0, 255).astype(np.uint8)
