"""Fixtures that make real things: encoded videos, shards of them, shards of the real clips where they are at hand."""

from __future__ import annotations

import os
import signal
import sys
from dataclasses import asdict, replace
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import hypothesis
import numpy as np
import pytest

from preprocess import pipeline
from preprocess.manifest import Manifest
from preprocess.schema import Settings
from preprocess.shards import ShardSet
from train.config import Config, Networks, flatten
from train.draws import Sampling
from train.recipes import RECIPES

ROOT = Path(__file__).resolve().parent.parent
DATA = Path(os.environ.get("TEST_DATA", ROOT.parent / "shared" / "data"))
"""Real videos and official lists, for the tests that want some."""
TINY = Settings(width=176, height=144, frame_width=112, frame_height=92)
PAN = (3, -2)
"""Displacement of the content of the panned video, pixels of the encoded frame, each frame."""


def pytest_configure() -> None:
    # Started in a shell's background, Python ignores Ctrl-C, and so would every process that the tests send it to.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    hypothesis.settings.register_profile("unhurried", deadline=None)  # no test rests on how fast a busy machine is
    hypothesis.settings.load_profile("unhurried")


def pytest_runtest_setup(item: pytest.Item) -> None:
    if item.get_closest_marker("cuda"):
        import torch

        if not torch.cuda.is_available():
            pytest.skip("needs a CUDA device")


def write_video(
    path: Path,
    frames: np.ndarray,
    codec: str = "libx264",
    options: dict[str, str] | None = None,
    rate: int = 25,
    pix_fmt: str = "yuv420p",
) -> Path:
    """Encode uint8 RGB frames (T, H, W, 3) with PyAV, nearly losslessly unless told otherwise."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=rate, options=options or {"crf": "8", "preset": "veryfast"})
        stream.height, stream.width = frames.shape[1:3]
        stream.pix_fmt = pix_fmt
        for number, picture in enumerate(frames):
            frame = av.VideoFrame.from_ndarray(picture, "rgb24")
            frame.pts, frame.time_base = number, Fraction(1, rate)
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return path


def remux(source: Path, target: Path, **muxer: str) -> Path:
    """The same packets in another container."""
    with (
        av.open(str(source), metadata_errors="ignore") as a,
        av.open(str(target), "w", options=muxer) as b,
    ):
        stream = a.streams.video[0]
        copy = b.add_stream_from_template(stream)
        for number, packet in enumerate(a.demux(stream)):
            if packet.size:
                if packet.pts is None:  # an old AVI numbers its frames, and does not time them
                    packet.pts = packet.dts if packet.dts is not None else number
                packet.stream = copy
                b.mux(packet)
    return target


def smooth_texture(rng: np.random.Generator, height: int, width: int) -> np.ndarray:
    """Band-limited noise, uint8 RGB (height, width, 3), periodic in both directions."""
    y, x = np.fft.fftfreq(height)[:, None], np.fft.fftfreq(width)[None]
    radius = np.hypot(y, x)
    band = np.exp(-(((radius - 0.06) / 0.03) ** 2))
    noise = np.fft.ifft2(np.fft.fft2(rng.standard_normal((3, height, width))) * band).real
    noise = noise / noise.std(axis=(1, 2), keepdims=True) * 45 + 128
    return noise.clip(0, 255).astype(np.uint8).transpose(1, 2, 0)


def panned(frames: int, pan: tuple[int, int] = PAN, height: int = 256, width: int = 340, seed: int = 0) -> np.ndarray:
    """A smooth texture whose content moves by `pan` (right, down) every frame; uint8 (frames, height, width, 3)."""
    texture = smooth_texture(np.random.default_rng(seed), height, width)
    return np.stack([np.roll(texture, (t * pan[1], t * pan[0]), axis=(0, 1)) for t in range(frames)])


def make_shards(folder: Path, videos: Path, paths: list[str], labels: list[str] | None = None, **options) -> ShardSet:
    """Run stage 1 on some videos; the shards lie in folder/shards."""
    manifest = Manifest(tuple(paths), tuple(labels or [""] * len(paths)), ("",) * len(paths))
    folder.mkdir(parents=True, exist_ok=True)
    manifest.write(folder / "manifest.csv")
    settings = options.pop("settings", Settings())
    pipeline.run(folder / "manifest.csv", videos, folder / "shards", settings, **options)
    return ShardSet(folder / "shards")


@pytest.fixture(scope="session")
def panned_shards(tmp_path_factory: pytest.TempPathFactory) -> ShardSet:
    """Three videos of 96, 30 and 20 frames, each panned by PAN pixels a frame, labelled a, b, a."""
    folder = tmp_path_factory.mktemp("panned")
    names = []
    for seed, frames in enumerate((96, 30, 20)):
        write_video(folder / "videos" / f"{seed}.mp4", panned(frames, seed=seed))
        names.append(f"{seed}.mp4")
    return make_shards(folder, folder / "videos", names, ["a", "b", "a"])


@pytest.fixture(scope="session")
def real_clips() -> list[Path]:
    """The real clips of several sources, as files."""
    clips = sorted((DATA / "clips").glob("*")) if DATA.is_dir() else []
    if not clips:
        pytest.skip(f"no real videos in {DATA / 'clips'}: put some there, or name another folder by TEST_DATA")
    return clips


@pytest.fixture(scope="session")
def real_shards(real_clips: list[Path], tmp_path_factory: pytest.TempPathFactory) -> ShardSet:
    """Every real clip through stage 1."""
    return make_shards(tmp_path_factory.mktemp("real"), real_clips[0].parent, [c.name for c in real_clips])


# ---- a tiny data set and a tiny run on it, for what trains and evaluates


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """(folder of two shards, split manifest): 12 train and 8 test videos of 40 frames, labelled context/motion."""
    folder = tmp_path_factory.mktemp("tiny")
    pans = {"right": (3, -1), "left": (-3, 1)}
    paths, labels, subsets = [], [], []
    for number in range(20):
        context, motion = ("a", "b")[number % 2], list(pans)[number // 2 % 2]
        frames = panned(40, pans[motion], 144, 176, seed=number)
        shade = np.array([255, 160, 90] if context == "a" else [90, 160, 255])
        paths.append(
            write_video(folder / "videos" / f"{number:02d}.mp4", (frames * (shade / 255)).astype(np.uint8)).name
        )
        labels.append(f"{context}/{motion}")
        subsets.append("train" if number < 12 else "test")
    make_shards(folder, folder / "videos", paths, labels, settings=TINY, videos_per_shard=10)
    Manifest(tuple(paths), tuple(labels), tuple(subsets)).write(folder / "split.csv")
    return folder / "shards", folder / "split.csv"


def tiny_config(recipe: str = "small", **changes: Any) -> Any:
    """A run that takes about two seconds: six steps an epoch on the videos of `tiny`."""
    small: Any = replace(
        RECIPES[recipe].config,
        networks=Networks("r3d10", 4, 4, 4, predictor_width=16, head_hidden=16, head_out=8),
        sampling=Sampling(frames=8, stride=2, negatives=1),
        size=32,
        batch_size=2,
        epochs=3,
    )
    return replace(small, **changes)


def train_command(tiny: tuple[Path, Path], out: Path, config: Config, *options: str) -> list[str]:
    """`python -m train small …`, to be run in ROOT, with the flags that make it train `config`."""
    usual, flags = flatten(asdict(RECIPES["small"].config)), []
    for key, value in flatten(asdict(config)).items():
        if value != usual[key]:
            flags += [f"--{key.replace('_', '-')}", *map(str, value if isinstance(value, tuple) else (value,))]
    paths = ["--shards", str(tiny[0]), "--manifest", str(tiny[1]), "--out", str(out), "--device", "cpu"]
    return [sys.executable, "-m", "train", "small", *paths, *flags, *options]


def one_thread() -> dict[str, str]:
    """Environment of a subprocess that computes in one thread, as bitwise comparisons and busy machines want."""
    return os.environ | {"OMP_NUM_THREADS": "1"}


@pytest.fixture(autouse=True, scope="session")
def _one_thread():
    """Sums over threads differ in their last bits, and the tests compare bit for bit."""
    import torch

    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def undisturbed(tiny: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run of `tiny_config` that nothing interrupted, its samples decoded in the training process."""
    from running import start

    out = tmp_path_factory.mktemp("undisturbed") / "run"
    start(tiny, out)
    return out


@pytest.fixture(scope="session")
def joint_run(tiny: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of one epoch of both pretext tasks, its weights kept."""
    return _one_epoch("small", tiny, tmp_path_factory.mktemp("evaluated"))


@pytest.fixture(scope="session")
def labelled_run(tiny: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of one epoch with labels, its weights kept."""
    return _one_epoch("small-scratch", tiny, tmp_path_factory.mktemp("evaluated"))


def _one_epoch(recipe: str, tiny: tuple[Path, Path], folder: Path) -> Path:
    from train.config import Runtime
    from train.loop import train
    from train.origin import Origin

    config, runtime = tiny_config(recipe, batch_size=4, epochs=1), Runtime("cpu", 0, keep_epochs=(1,))
    rows, origin = Manifest.read(tiny[1]).subset("train"), Origin(recipe, "split", "train")
    train(config, runtime, tiny[0], rows, folder / recipe, origin)
    return folder / recipe
