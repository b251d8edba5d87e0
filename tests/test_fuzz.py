"""Damaged files of every container: none crashes a run, none hangs it, none is stored as less than it declares."""

from __future__ import annotations

from pathlib import Path

import av
import numpy as np
import pytest
from conftest import make_shards, panned, remux, write_video

from preprocess import check
from preprocess.schema import Settings

TINY = Settings(width=64, height=48, frame_width=48, frame_height=32)
UNDECLARED = ("mpegts", "mpeg")  # containers that say neither how many frames they hold nor how long they last


@pytest.fixture(scope="module")
def sources(real_clips: list[Path], tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """The real clips, those of H.264 in other containers too, and small ones of codecs that real clips lack."""
    folder = tmp_path_factory.mktemp("sources")
    made = [c for c in real_clips if c.stat().st_size < 900_000]
    for number, clip in enumerate(c for c in made[:] if c.suffix == ".mp4"):
        made += [remux(clip, folder / f"{number}.{end}") for end in ("mkv", "ts", "flv")]
        made.append(remux(clip, folder / f"{number}.mp4", movflags="frag_keyframe+empty_moov"))
    frames = panned(80, height=96, width=128)
    realtime = {"b": "800k", "deadline": "realtime"}
    for end, codec_name, options in (
        *(("webm", "libvpx", realtime), ("webm", "libvpx-vp9", realtime), ("flv", "flv1", {"b": "800k"})),
        *(("mpg", "mpeg2video", {"b": "800k"}), ("ts", "mpeg2video", {"b": "800k"}), ("wmv", "wmv2", {"b": "800k"})),
    ):
        made.append(write_video(folder / f"{codec_name}.{end}", frames, codec_name, options))
    return made


def mutate(data: bytes, rng: np.random.Generator) -> bytes:
    """Cut, flip, overwrite, remove or repeat at random places; every third time near the start, where headers are."""
    changed = bytearray(data)
    size = len(data) if rng.integers(3) else 4096
    kind = rng.integers(5)
    if kind == 0:
        return data[: int(rng.integers(size))]
    if kind == 1:
        for place in rng.integers(0, size, int(rng.integers(1, 200))):
            changed[place] ^= 1 << int(rng.integers(8))
        return bytes(changed)
    start, length = int(rng.integers(size)), int(rng.integers(1, 5000))
    if kind == 2:
        changed[start : start + length] = rng.bytes(len(changed[start : start + length]))
    elif kind == 3:
        del changed[start : start + length]
    else:
        changed[start:start] = data[start : start + length]
    return bytes(changed)


def declared(path: Path) -> tuple[object, ...] | None:
    """What a container says about how much it holds, where it does; None where it does not, or cannot be opened."""
    try:
        with av.open(str(path), metadata_errors="ignore") as container:
            stream = container.streams.video[0]
            if container.format.name in UNDECLARED:
                return None
            return stream.frames, container.duration, stream.average_rate, container.format.name
    except (av.FFmpegError, IndexError):
        return None


def held(path: Path) -> int:
    with av.open(str(path), metadata_errors="ignore") as container:
        return sum(1 for _ in container.decode(video=0))


def damage_and_run(sources: list[Path], folder: Path, count: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    (folder / "videos").mkdir()
    names, origins = [], {}
    for k in range(count):
        source = sources[(k + seed) % len(sources)]
        names.append(f"{k:04d}{source.suffix}")
        origins[names[-1]] = source
        (folder / "videos" / names[-1]).write_bytes(mutate(source.read_bytes(), rng))
    shards = make_shards(folder, folder / "videos", names, settings=TINY, videos_per_shard=25, time_limit=120)
    failed = [f.path for f in shards.failed]
    assert sorted([*shards.paths, *failed]) == names
    assert check.problems(folder / "shards") == []
    assert not [f for f in shards.failed if "decoder process" in f.reason or "no progress within" in f.reason]
    assert all(f.reason for f in shards.failed)
    parts = -(-count // 25)
    assert len(list((folder / "shards").iterdir())) == 2 * parts + 1  # shards, checksums, failures.csv: no leftover
    assert len(shards) > count // 5 and len(failed) > count // 20  # the mutations neither spare nor ruin all
    intact = {source: (declared(source), held(source)) for source in sources}
    checked = 0
    for name, frames in zip(shards.paths, shards.frames.tolist()):
        promise, whole = intact[origins[name]]
        if promise and declared(folder / "videos" / name) == promise:  # of others the header itself was hit
            assert frames >= 0.9 * whole, f"{name}, of {origins[name].name}: {frames} of {whole} frames"
            checked += 1
    assert checked > count // 10
    print(
        f"{count} damaged files: {len(shards)} stored, {len(failed)} failed, 0 crashed, 0 hung; {checked} promises kept"
    )


def test_damaged_files_are_stored_or_failure_rows(sources: list[Path], tmp_path: Path) -> None:
    damage_and_run(sources, tmp_path, 60, seed=0)


@pytest.mark.soak
@pytest.mark.parametrize("step", range(10))
def test_five_thousand_damaged_files(step: int, sources: list[Path], tmp_path: Path) -> None:
    damage_and_run(sources, tmp_path, 500, seed=1 + step)
