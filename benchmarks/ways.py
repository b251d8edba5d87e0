"""The ways to get a clip's frames that `benchmarks.loader` compares."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import h5py
import numpy as np
import simplejpeg

from preprocess.schema import Settings
from preprocess.shards import Shard
from train import data as reading
from train.data import PretrainSet
from train.draws import Sampling

Key = tuple[int, int]
Way = Callable[["list[Key]", "list[Clip]"], "Iterable[np.ndarray]"]
"""(a batch of keys, what each of them decodes) -> the frames of each clip, as they come"""


class Clip(NamedTuple):
    """What a sample decodes: JPEGs in memory, and numbers of frames in the source video."""

    frames: list[bytes]
    iframe: bytes
    video: int
    numbers: list[int]
    """Of the clip."""
    iframe_number: int
    windows: list[int]
    """First frames of the motion windows."""


def readers(data: PretrainSet, videos: Path | None) -> dict[str, Way]:
    """Every way that can run here, bound and ours first."""
    settings, paths = data.shards.settings, data.shards.paths
    height, width = settings.frame_height, settings.frame_width
    frames = np.zeros((data.sampling.frames, height, width, 3), np.uint8)
    iframe = np.zeros((settings.height, settings.width, 3), np.uint8)
    plain = copy.copy(data)  # the same data set over h5py
    plain.shards = copy.copy(data.shards)
    files = [OrdinaryShard(s) for s in data.shards.shards]
    plain.shards.shards = files  # type: ignore[assignment]
    plain._expect = lambda _: None  # type: ignore[method-assign]

    def bound(_: Key, clip: Clip) -> np.ndarray:
        for jpeg, image in zip(clip.frames, frames):
            simplejpeg.decode_jpeg(jpeg, "RGB", buffer=image)
        simplejpeg.decode_jpeg(clip.iframe, "RGB", buffer=iframe)
        return frames

    def anew(key: Key, _: Clip) -> np.ndarray:
        for file in files:
            file.close()
        return plain[key]["clip"]

    def each(one: Callable[[Key, Clip], np.ndarray]) -> Way:
        return lambda keys, clips: map(one, keys, clips)

    ways: dict[str, Way] = {
        "bound": each(bound),
        "ours": lambda keys, _: [sample["clip"] for sample in data.__getitems__(keys)],
        "ours, clips one by one": each(lambda key, _: data[key]["clip"]),
        "h5py, file kept open": lambda keys, _: [sample["clip"] for sample in plain.__getitems__(keys)],
        "h5py, opened for each clip": each(anew),
    }
    absent = missing(videos)
    if videos is not None and "PyAV" not in absent:
        ways["PyAV"] = each(lambda _, clip: decode_pyav(videos / paths[clip.video], clip.numbers, width, height))
        ways["PyAV, the whole sample"] = each(
            lambda _, clip: decode_sample(videos / paths[clip.video], clip, data.sampling.motion_frames, settings)
        )
    if videos is not None and "torchcodec" not in absent:
        for mode in ("exact", "approximate"):

            def decode(_: Key, clip: Clip, mode: str = mode) -> np.ndarray:
                return decode_torchcodec(videos / paths[clip.video], clip.numbers, width, height, mode)

            ways[f"torchcodec, {mode}"] = each(decode)
    return ways


def missing(videos: Path | None) -> dict[str, str]:
    """Decoders that cannot run here, and why."""
    reasons = {}
    for name, module in (("PyAV", "av"), ("torchcodec", "torchcodec.decoders")):
        try:
            __import__(module)
            if videos is None:
                reasons[name] = "no --videos"
        except ModuleNotFoundError:
            reasons[name] = "not installed"
        except (OSError, RuntimeError) as error:  # torchcodec that finds no FFmpeg or another torch
            reasons[name] = f"cannot be loaded: {str(error).strip().splitlines()[0]}"
    return reasons


@contextmanager
def recorded(data: PretrainSet) -> Iterator[list[Clip]]:
    """A list that fills with what every sample taken meanwhile decodes."""
    clips: list[Clip] = []
    frame_jpeg, iframe_jpeg, read_motion = Shard.frame_jpeg, Shard.iframe_jpeg, reading._motion
    taken: list[tuple[bytes, int]] = []
    drawn: list[np.ndarray] = []  # a batch is drawn before any of it is decoded

    def motion(maps: np.ndarray, windows: np.ndarray, sampling: Sampling) -> np.ndarray:
        drawn.append(windows)
        return read_motion(maps, windows, sampling)

    def frame(shard: Shard, number: int) -> np.ndarray:
        jpeg = frame_jpeg(shard, number)
        taken.append((bytes(jpeg), number))
        return jpeg

    def iframe(shard: Shard, number: int) -> np.ndarray:
        jpeg = iframe_jpeg(shard, number)
        index = int(np.searchsorted(shard.frame_offset, taken[0][1], "right")) - 1
        first = int(shard.frame_offset[index])
        before = sum(len(s) for s in data.shards.shards[: data.shards.shards.index(shard)])
        numbers = [n - first for _, n in taken]
        picture = int(shard.iframe_frame[number]) - first
        windows = (drawn.pop(0) - first).tolist()
        clips.append(Clip([j for j, _ in taken], bytes(jpeg), before + index, numbers, picture, windows))
        taken.clear()
        return jpeg

    Shard.frame_jpeg, Shard.iframe_jpeg, reading._motion = frame, iframe, motion  # type: ignore[method-assign]
    try:
        yield clips
    finally:
        Shard.frame_jpeg, Shard.iframe_jpeg, reading._motion = frame_jpeg, iframe_jpeg, read_motion  # type: ignore[method-assign]


class OrdinaryShard:
    """A shard as one usually reads HDF5: what tells videos apart in memory, the rest sliced from h5py's datasets."""

    def __init__(self, shard: Shard) -> None:
        self.path, self.settings = shard.path, shard.settings
        self.frame_offset, self.iframe_frame = np.array(shard.frame_offset), np.array(shard.iframe_frame)
        self.file: h5py.File | None = None

    def close(self) -> None:
        if self.file is not None:
            self.file.close()
            self.file = None

    def frame_jpeg(self, number: int) -> np.ndarray:
        return self._jpeg("frames", number)

    def iframe_jpeg(self, number: int) -> np.ndarray:
        return self._jpeg("iframes", number)

    @property
    def motion(self) -> h5py.Dataset:
        return self._opened()["motion"]

    def _jpeg(self, kind: str, number: int) -> np.ndarray:
        file = self._opened()
        first, end = file[f"{kind}/jpeg_offset"][number : number + 2].tolist()
        return file[f"{kind}/jpeg"][first:end]

    def _opened(self) -> h5py.File:
        if self.file is None:
            self.file = h5py.File(self.path, "r")
        return self.file


def decode_pyav(path: Path, numbers: list[int], width: int, height: int) -> np.ndarray:
    """Frames by their numbers, rising: seek to the key frame before, decode on, resize only what is wanted."""
    out, rgb = np.zeros((len(numbers), height, width, 3), np.uint8), resizing()
    wanted = 0
    for number, frame in frames_from(path, numbers[0]):
        if number >= numbers[wanted]:
            out[wanted] = rgb(frame, width, height)
            wanted += 1
            if wanted == len(numbers):
                break
    return out


def decode_sample(path: Path, clip: Clip, motion_frames: int, settings: Settings) -> np.ndarray:
    """A clip's frames, its I-frame and the motion vectors of its windows, where the source has them, in one pass."""
    from av.sidedata.sidedata import SideDataContainer

    from preprocess.extract import RECORD

    out = np.zeros((len(clip.numbers), settings.frame_height, settings.frame_width, 3), np.uint8)
    rgb = resizing()
    place = {number: k for k, number in enumerate(clip.numbers)}
    maps = {n for window in clip.windows for n in range(window, window + motion_frames)}
    wanted = {*place, *maps, clip.iframe_number}
    kept: list[Any] = []
    for number, frame in frames_from(path, min(wanted), vectors=True):
        if number in place:
            out[place[number]] = rgb(frame, settings.frame_width, settings.frame_height)
        if number in maps:
            found = SideDataContainer(frame).get("MOTION_VECTORS")
            kept.append(None if found is None else np.frombuffer(found, RECORD).copy())
        if number == clip.iframe_number:
            kept.append(resizing()(frame, settings.width, settings.height))
        if number >= max(wanted):
            break
    return out


def resizing() -> Callable[[Any, int, int], np.ndarray]:
    """A function of (frame, width, height) -> RGB (height, width, 3), set up once for frames of one size."""
    from av.video.reformatter import VideoReformatter

    scaler = VideoReformatter()

    def rgb(frame: Any, width: int, height: int) -> np.ndarray:
        # One thread: starting several takes longer than the scaling.
        return scaler.reformat(frame, width, height, "rgb24", interpolation="BILINEAR", threads=1).to_ndarray()

    return rgb


def frames_from(path: Path, first: int, vectors: bool = False) -> Iterator[tuple[int, Any]]:
    """(number, frame) from the key frame before `first` on, by one thread."""
    import av

    with av.open(str(path), metadata_errors="ignore") as container:
        stream = container.streams.video[0]
        stream.codec_context.thread_count = 1
        if vectors:
            stream.codec_context.options = {"flags2": "+export_mvs"}
        rate, base, start = stream.average_rate, stream.time_base, stream.start_time or 0
        assert rate is not None and base is not None
        container.seek(start + int(first / rate / base), stream=stream)
        for frame in container.decode(stream):
            at = frame.pts if frame.pts is not None else frame.dts
            if at is not None:
                yield round((at - start) * base * rate), frame


def decode_torchcodec(path: Path, numbers: list[int], width: int, height: int, mode: str) -> np.ndarray:
    from torchcodec.decoders import VideoDecoder
    from torchcodec.transforms import Resize

    resize = [Resize((height, width))]
    decoder = VideoDecoder(str(path), dimension_order="NHWC", num_ffmpeg_threads=1, seek_mode=mode, transforms=resize)
    return decoder.get_frames_at(numbers).data.numpy()
