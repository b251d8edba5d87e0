"""From shards to samples: which frames of a video become a sample, and how the samples are dealt to ranks.

What is drawn is written in pure functions of a generator; the data sets only fetch and decode. Every generator is made
from (seed, epoch, video), so that a sample is the same whichever worker or rank makes it, in whichever order, before or
after a restart. Cropping, flipping and colours are drawn here and applied on the device, by `train.augment`.

Legend: B batch, T clip frames, W motion maps of a window, K negative windows, C clips of a video at evaluation,
h x w a stored frame, H x W an encoded frame (an I-frame), rows x cols the motion grid, D channels of a motion map, P
photometric numbers.
Boxes are (x0, y0, x1, y1) in fractions of the frame, 0 at the left and top edge and 1 at the right and bottom.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import numpy as np
import simplejpeg
import torch
from torch import Tensor
from torch.utils.data import Dataset, Sampler

from preprocess.command import at_least
from preprocess.shards import Shard, ShardSet, expect
from train import draws
from train.config import Config
from train.draws import Motion, Sampling, one_of

if TYPE_CHECKING:
    from preprocess.manifest import Manifest

Modality = Literal["video", "iframe", "motion"]
Sample = dict[str, Any]

COLUMNS: dict[Motion, tuple[str, ...]] = {
    "vectors": ("motion",),
    "flow": ("flow",),
    "vectors+residual": ("motion", "residual"),
    "residual": ("residual",),
}
"""Of a shard, which make up its motion."""
SHOWN = 5  # paths named in an error


class Drawn(NamedTuple):
    """A sample before anything is read; frames are numbered over the shard."""

    shard: Shard
    frames: np.ndarray
    """Of the clip, (T,)."""
    iframe: np.ndarray
    """(1,), or (0,) where none is wanted."""
    windows: np.ndarray
    """First frames of the motion windows, (1+K,), the positive first; (0,) where there are none."""
    sample: Sample
    """What is not read from the shard."""


class TrainingSet(Dataset[Sample], ABC):
    """One random clip a video and epoch: `data[epoch, index]` is a dict of arrays and numbers that torch collates.

    | key | type, shape | meaning |
    |---|---|---|
    | clip | uint8 (T, h, w, 3) | RGB frames |
    | clip_box, clip_flip, clip_photo | float32 (4,), bool, float32 (P,) | its crop, flip and colours |
    | clip_still_removed | bool | whether it loses its mean over time |
    | iframe | uint8 (H, W, 3) | an I-frame in or near the clip |
    | iframe_box, iframe_flip, iframe_photo | as for the clip | drawn apart from the clip's |
    | motion | int16 or int32 (1+K, W, rows, cols, D) | windows as stored, the positive first; see `_maps` |
    | motion_box, motion_flip | float32 (1+K, 4), bool (1+K,) | the positive's are the clip's |
    | serves | bool | false where the video ends before the positive window, in whose place its last maps stand |
    | index, label | int | row of this data set; class number, -1 unknown |

    `failed` counts rows of the manifest that stage 1 could not store. What is `unread`, "iframe" or "motion", is drawn,
    so that the rest is what it would be, but neither read nor in the sample. Raises ValueError as `select` does.
    """

    def __init__(
        self,
        shards: ShardSet,
        manifest: Manifest | None,
        config: Config,
        *,
        with_iframe: bool,
        with_motion: bool,
        unread: Modality | None = None,
    ) -> None:
        sampling = config.sampling
        if with_motion:
            check_motion(shards, sampling)
        self.shards, self.sampling, self.cropping = shards, sampling, config.cropping
        self.photometric, self.seed = config.photometric, config.seed
        self.with_iframe, self.with_motion, self.unread = with_iframe, with_motion, unread
        self.video, self.failed = select(shards, manifest)
        self.label = shards.label[self.video]

    def __len__(self) -> int:
        return len(self.video)

    def __getitem__(self, key: tuple[int, int]) -> Sample:
        return self.__getitems__([key])[0]

    def __getitems__(self, keys: list[tuple[int, int]]) -> list[Sample]:
        """What torch's loader asks for: a batch. Decoding a clip pushes everything else out of the processor's caches,
        which makes drawing four times as slow; so all are drawn first, then all decoded, and in between the disk is
        asked for all that they read. Their pictures lie in one array each, whose memory the allocator gets in huge
        pages or keeps; an array a clip would be paged in anew."""
        drawn = [self._draw(key) for key in keys]
        self._expect(drawn)
        if self.with_motion and self.unread != "motion":
            for shard, *_, windows, sample in drawn:
                sample["motion"] = _motion(shard, windows, self.sampling)
        stored, length = self.shards.settings, self.sampling.frames
        clips = np.empty((len(keys), length, stored.frame_height, stored.frame_width, 3), np.uint8)
        with_iframe = self.with_iframe and self.unread != "iframe"
        iframes = np.empty((len(keys), int(with_iframe), stored.height, stored.width, 3), np.uint8)
        for (shard, frames, near, _, sample), clip, pictures in zip(drawn, clips, iframes):
            sample["clip"] = decode_frames(shard, frames, clip)
            if with_iframe:
                (sample["iframe"],) = decode_iframes(shard, near, pictures)
        return [sample for *_, sample in drawn]

    def windows(self, keys: list[tuple[int, int]]) -> tuple[Tensor, Tensor, Tensor]:
        """The positive motion windows of some samples, without their pictures: int (n, W, rows, cols, D), and their
        boxes float32 (n, 4) and flips bool (n,)."""
        drawn = [self._draw(key) for key in keys]
        motion = [_motion(d.shard, d.windows[:1], self.sampling)[0] for d in drawn]
        boxes, flips = (np.stack([d.sample[name][0] for d in drawn]) for name in ("motion_box", "motion_flip"))
        return torch.from_numpy(np.stack(motion)), torch.from_numpy(boxes), torch.from_numpy(flips)

    def _expect(self, drawn: list[Drawn]) -> None:
        for shard, frames, near, windows, _ in drawn:
            shard.expect("frames", frames)
            shard.expect("iframes", near)
            for column in _columns(shard, self.sampling) if len(windows) else ():
                expect(column, windows, windows + self.sampling.motion_frames)

    def _draw(self, key: tuple[int, int]) -> Drawn:
        epoch, index = key
        s, rng = self.sampling, generator(self.seed, epoch, index)
        shard, first, frames, iframes, first_iframe = extent(self.shards, int(self.video[index]))
        start, stride, window = self._clip(rng, frames)
        near, windows = [], []
        if self.with_iframe:
            last = start + s.span(stride) - 1
            near = [first_iframe + draws.draw_iframe(rng, iframes, start, last, s.iframe_reach)]
        sample: Sample = {"index": int(index), "label": int(self.label[index])} | self._view(rng, "clip")
        if self.with_iframe:
            sample |= self._view(rng, "iframe")
        if self.with_motion:
            if window is not None:
                windows = [window, *draws.draw_negatives(rng, frames, window, s)]
            elif frames >= s.motion_frames:  # for the statistics of batch norm, of which zeros are no sample
                windows = [frames - s.motion_frames] * (1 + s.negatives)
            boxes = [sample["clip_box"], *(self._box(rng) for _ in range(s.negatives))]
            flips = [sample["clip_flip"], *(rng.random(s.negatives) < self.cropping.flip)]
            sample |= {
                "motion_box": np.stack(boxes),
                "motion_flip": np.array(flips),
                "serves": window is not None,
            }
        # Last, so that it shifts no other draw.
        sample["clip_still_removed"] = bool(rng.random() < self.photometric.still_removed_p)
        clip = first + (start + stride * np.arange(s.frames)) % frames
        if self.unread:
            sample = {key: value for key, value in sample.items() if not key.startswith(self.unread)}
            near, windows = ([], windows) if self.unread == "iframe" else (near, [])
        return Drawn(shard, clip, np.array(near, int), first + np.array(windows, int), sample)

    @abstractmethod
    def _clip(self, rng: np.random.Generator, frames: int) -> tuple[int, int, int | None]:
        """A clip of a video of so many frames: its start, stride and positive motion window, None without room."""

    def _view(self, rng: np.random.Generator, of: str) -> Sample:
        return {
            f"{of}_box": self._box(rng),
            f"{of}_flip": bool(rng.random() < self.cropping.flip),
            f"{of}_photo": draws.draw_photometric(rng, self.photometric),
        }

    def _box(self, rng: np.random.Generator) -> np.ndarray:
        return draws.draw_box(rng, self.cropping, self.shards.settings.width, self.shards.settings.height)


class PretrainSet(TrainingSet):
    """Clips with an I-frame, the motion window to predict and negative windows of the same video.

    A video too short for clip and window at the stride wanted is taken at a smaller one. `dropped` counts those too
    short at any, which are left out; ValueError where all are.
    """

    def __init__(
        self, shards: ShardSet, manifest: Manifest | None, config: Config, unread: Modality | None = None
    ) -> None:
        super().__init__(shards, manifest, config, with_iframe=True, with_motion=True, unread=unread)
        serves = np.array(
            [draws.largest_stride(f, self.sampling) > 0 for f in shards.frames[self.video].tolist()], bool
        )
        if not serves.any():
            raise ValueError(
                f"none of {len(self)} videos has the {self.sampling.needed(1)} frames that a clip at stride 1 and its "
                "motion window need; choose fewer frames or motion_frames"
            )
        self.dropped = int((~serves).sum())
        self.video, self.label = self.video[serves], self.label[serves]

    def _clip(self, rng: np.random.Generator, frames: int) -> tuple[int, int, int | None]:
        return draws.draw_clip(rng, frames, self.sampling)


class FinetuneSet(TrainingSet):
    """Clips with their label and, where wanted, motion windows; no I-frames.

    Clips are the same with motion and without: from anywhere in the video, repeating from its start where that is
    shorter, as at evaluation. Every clip trains the classifier; one that leaves no room for its window takes no part in
    motion prediction, and none of `unserved` videos leaves any. ValueError where a video has no label.
    """

    def __init__(self, shards: ShardSet, manifest: Manifest | None, config: Config, with_motion: bool = False) -> None:
        super().__init__(shards, manifest, config, with_iframe=False, with_motion=with_motion)
        if (self.label < 0).any():
            paths = shards.paths
            unknown = [paths[v] for v in self.video[self.label < 0].tolist()]
            raise ValueError(
                f"{len(unknown)} videos have no label ({_some(unknown)}); leave them out of the manifest, "
                "or make the shards from a manifest that labels them"
            )
        self.unserved = int((shards.frames[self.video] < self.sampling.needed(self.sampling.stride)).sum())

    def _clip(self, rng: np.random.Generator, frames: int) -> tuple[int, int, int | None]:
        s = self.sampling
        start = int(rng.integers(max(frames - s.span(s.stride), 0) + 1))
        roomy = max(s.needed(s.stride), start + s.extent(s.stride)) <= frames
        return start, s.stride, s.window(start, s.stride, frames) if roomy else None


class ClipSet(Dataset[Sample]):
    """All evenly spread clips of a video, for evaluation: `data[index]`, nothing drawn (paper section 4.1).

    | modality | key | type, shape | what of each clip |
    |---|---|---|---|
    | video | clips | uint8 (C, T, h, w, 3) | its frames |
    | iframe | iframes | uint8 (C, H, W, 3) | the I-frame nearest its centre, the earlier of two as near |
    | motion | motion | int16 or int32 (C, W, rows, cols, D) | the maps around its centre, as stored |

    With `index` and `label` as in `TrainingSet`. A video shorter than the clip repeats from its start.
    """

    def __init__(
        self,
        shards: ShardSet,
        manifest: Manifest | None,
        sampling: Sampling,
        clips: int = 10,
        modality: Modality = "video",
    ) -> None:
        at_least("clips", clips, 1)
        one_of("modality", modality, ("video", "iframe", "motion"))
        if modality == "motion":
            check_motion(shards, sampling)
        self.video, self.failed = select(shards, manifest)
        self.label = shards.label[self.video]
        self.shards, self.sampling, self.clips, self.modality = shards, sampling, clips, modality

    def __len__(self) -> int:
        return len(self.video)

    def __getitem__(self, index: int) -> Sample:
        s = self.sampling
        shard, first, frames, iframes, first_iframe = extent(self.shards, int(self.video[index]))
        span = s.span(s.stride)
        starts = draws.clip_starts(frames, span, self.clips)
        sample: Sample = {"index": int(index), "label": int(self.label[index])}
        if self.modality == "video":
            numbers = (starts[:, None] + s.stride * np.arange(s.frames)) % frames  # (C, T)
            shard.expect("frames", first + numbers.ravel())
            decoded = decode_frames(shard, first + numbers.ravel())
            return sample | {"clips": decoded.reshape(*numbers.shape, *decoded.shape[1:])}
        if self.modality == "iframe":
            chosen = [draws.nearest(iframes, centre) for centre in ((starts + span // 2) % frames).tolist()]
            return sample | {"iframes": decode_iframes(shard, first_iframe + np.array(chosen))}
        windows = starts[:, None] + (span - s.motion_frames) // 2 + np.arange(s.motion_frames)  # (C, W)
        return sample | {"motion": _maps(shard, s, first + windows % frames)}


class EpochSampler(Sampler[list[tuple[int, int]]]):
    """Batches of (epoch, index) for one rank: a DataLoader's `batch_sampler`, for one epoch or for the steps `between`.

    An epoch is one shuffle of all videos, a function of (seed, epoch). It is cut into global batches, and each rank
    takes its slice of each; the `dropped` videos below one global batch wait for another epoch. So no video is seen
    twice in an epoch, and the global batches do not depend on the number of ranks.

    Raises ValueError where the batch cannot be dealt evenly, or is larger than the data set.
    """

    def __init__(self, n: int, global_batch: int, rank: int = 0, world: int = 1, seed: int = 0) -> None:
        if not 0 <= rank < world:
            raise ValueError(f"rank {rank} of {world}; ranks count from 0 and stay below their number")
        if global_batch < world or global_batch % world:
            raise ValueError(f"a batch of {global_batch} cannot be dealt to {world} ranks; choose a multiple")
        if n < global_batch:
            raise ValueError(f"{n} videos do not fill one batch of {global_batch}; choose a batch of at most {n}")
        self.n, self.global_batch, self.rank, self.world, self.seed = n, global_batch, rank, world, seed
        self.steps, self.dropped = divmod(n, global_batch)

    def __len__(self) -> int:
        return self.steps

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        return self.between(0, self.steps)

    def between(self, step: int, end: int) -> Iterator[list[tuple[int, int]]]:
        """The batches of steps `step` to `end` of a run, through its epochs, so that no loader pauses between them."""
        share, shuffled = self.global_batch // self.world, -1
        while step < end:
            epoch, number = divmod(step, self.steps)
            if epoch != shuffled:
                order, shuffled = np.random.default_rng([self.seed, epoch]).permutation(self.n), epoch
            first = number * self.global_batch + self.rank * share
            yield [(epoch, i) for i in order[first : first + share].tolist()]
            step += 1


def select(shards: ShardSet, manifest: Manifest | None) -> tuple[np.ndarray, int]:
    """Videos of `shards` that a manifest names, in its order, int64 (n,), and how many of its rows stage 1 failed on.

    Without a manifest, all. Numbers of classes stay the shards'; a row without a label takes the shards' label.

    Raises ValueError where a path is in no shard, where a label differs, or where nothing is left.
    """
    if manifest is None:
        return np.arange(len(shards)), len(shards.failed)
    known = {path: v for v, path in enumerate(shards.paths)}
    failed = {f.path for f in shards.failed}
    if missing := [p for p in manifest.paths if p not in known and p not in failed]:
        raise ValueError(
            f"{len(missing)} of {len(manifest.paths)} paths of the manifest are in no shard of {shards.folder} "
            f"({_some(missing)}); select from the manifest the shards were made from, or run stage 1 on this one"
        )
    rows = [(known[p], p, label) for p, label in zip(manifest.paths, manifest.labels) if p in known]
    names = [*shards.classes, ""]  # label -1 is the last
    differing = [
        (p, label, names[shards.label[v]]) for v, p, label in rows if label not in ("", names[shards.label[v]])
    ]
    wrong = [f"{p} is {mine!r} here, {theirs!r} there" for p, mine, theirs in differing]
    if wrong:
        raise ValueError(
            f"{len(wrong)} labels of the manifest differ from those in {shards.folder} ({_some(wrong)}); "
            "correct the manifest, or run stage 1 on this one into another folder"
        )
    if not rows:
        raise ValueError(f"the manifest names no video that {shards.folder} holds; is the subset empty?")
    return np.array([v for v, _, _ in rows], np.int64), len(manifest.paths) - len(rows)


def decode_frames(shard: Shard, frames: np.ndarray, out: np.ndarray | None = None) -> np.ndarray:
    """Decode frames (n,), numbered over the shard, into one uint8 (n, h, w, 3) RGB array, `out` or a new one."""
    size = (shard.settings.frame_height, shard.settings.frame_width)
    return _decode(shard.path, "frame", shard.frame_jpeg, frames, size, out)


def decode_iframes(shard: Shard, iframes: np.ndarray, out: np.ndarray | None = None) -> np.ndarray:
    """Decode I-frames (n,), numbered over the shard, into one uint8 (n, H, W, 3) RGB array, `out` or a new one."""
    size = (shard.settings.height, shard.settings.width)
    return _decode(shard.path, "I-frame", shard.iframe_jpeg, iframes, size, out)


def _decode(
    path: Path,
    what: str,
    jpeg: Callable[[int], np.ndarray],
    numbers: np.ndarray,
    size: tuple[int, int],
    out: np.ndarray | None,
) -> np.ndarray:
    """Decode straight into the array. Damaged bytes raise: they must not train a network."""
    out = np.empty((len(numbers), *size, 3), np.uint8) if out is None else out
    for image, number in zip(out, numbers.tolist()):
        try:
            shape = simplejpeg.decode_jpeg(jpeg(number), "RGB", buffer=image).shape
        except ValueError as error:
            raise ValueError(
                f"{path}: {what} {number} is damaged ({error}); check the file and make it again"
            ) from error
        if shape != image.shape:
            raise ValueError(f"{path}: {what} {number} has shape {shape}, not {image.shape}; make the file again")
    return out


def _motion(shard: Shard, windows: np.ndarray, s: Sampling) -> np.ndarray:
    """Motion from each first frame on, (1+K, W, rows, cols, D); of no windows, zeros."""
    if not len(windows):
        none = _maps(shard, s, slice(0))
        return np.zeros((1 + s.negatives, s.motion_frames, *none.shape[1:]), none.dtype)
    return np.stack([_maps(shard, s, slice(w, w + s.motion_frames)) for w in windows.tolist()])


def _maps(shard: Shard, sampling: Sampling, frames: slice | np.ndarray) -> np.ndarray:
    """Motion of some frames (...), as stored: (..., rows, cols, D).

    The stream's vectors or its optical flow, int16 with D = 2; int32 with the energy of the residual as a third channel
    or alone.
    """
    columns = [c[frames] if c.ndim == 4 else c[frames][..., None].astype(np.int32) for c in _columns(shard, sampling)]
    return columns[0] if len(columns) == 1 else np.concatenate(columns, -1)


def _columns(shard: Shard, sampling: Sampling) -> list[np.ndarray]:
    """What `_maps` reads: vectors (F, rows, cols, 2), energies (F, rows, cols)."""
    return [getattr(shard, name) for name in COLUMNS[sampling.motion]]


def check_motion(shards: ShardSet, sampling: Sampling) -> None:
    """Raise ValueError where the shards do not have what `_columns` gives."""
    try:
        for shard in shards.shards:
            _columns(shard, sampling)
    except ValueError as error:
        raise ValueError(f"motion is {sampling.motion}, but {error}, or choose motion=vectors") from error


def extent(shards: ShardSet, video: int) -> tuple[Shard, int, int, np.ndarray, int]:
    """(shard, first frame, frames, I-frames counted within the video, first I-frame) of a video."""
    shard, i = shards.locate(video)
    first, end = shard.frame_offset[i : i + 2].tolist()
    low, high = int(shard.iframe_frame.searchsorted(first)), int(shard.iframe_frame.searchsorted(end))
    return shard, first, end - first, shard.iframe_frame[low:high] - first, low


def generator(seed: int, epoch: int, index: int) -> np.random.Generator:
    # numpy pads entropy with zeros, so (seed, epoch, 0) would be the stream that shuffles the epoch.
    # This is what default_rng makes of it, in a third of the time.
    return np.random.Generator(np.random.PCG64([seed, epoch, 1 + index]))


def _some(texts: list[str]) -> str:
    return ", ".join(texts[:SHOWN]) + (", …" if len(texts) > SHOWN else "")
