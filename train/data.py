"""From shards to samples: which frames of a video become a sample, and how the samples are dealt to ranks.

What is drawn is written in pure functions of a generator; the data sets only fetch and decode. Every generator is made
from (seed, epoch, video), so that a sample is the same whichever worker or rank makes it, in whichever order, before or
after a restart. Cropping, flipping and colours are drawn here and applied on the device, by `train.augment`.

Legend: B batch, T clip frames, W motion maps of a window, K negative windows, C clips of a video at evaluation,
h x w a stored frame, H x W an encoded frame (an I-frame), rows x cols the motion grid, P photometric numbers.
Boxes are (x0, y0, x1, y1) in fractions of the frame, 0 at the left and top edge and 1 at the right and bottom.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import simplejpeg
from torch.utils.data import Dataset, Sampler

from preprocess.shards import Shard, ShardSet
from train.draws import (
    Cropping,
    Photometric,
    Sampling,
    at_least,
    clip_starts,
    draw_box,
    draw_clip,
    draw_iframe,
    draw_negatives,
    draw_photometric,
    largest_stride,
    nearest,
    one_of,
)

if TYPE_CHECKING:
    from preprocess.manifest import Manifest

Modality = Literal["video", "iframe", "motion"]
Sample = dict[str, Any]

SHOWN = 5  # paths named in an error


class PretrainSet(Dataset[Sample]):
    """Clips with an I-frame, the motion window to predict and negative windows of the same video.

    `data[epoch, index]` is a dict of numpy arrays and numbers that torch collates:

    | key | type, shape | meaning |
    |---|---|---|
    | clip | uint8 (T, h, w, 3) | RGB frames |
    | clip_box, clip_flip, clip_photo | float32 (4,), bool, float32 (P,) | its crop, flip and colours |
    | iframe | uint8 (H, W, 3) | an I-frame in or near the clip |
    | iframe_box, iframe_flip, iframe_photo | as for the clip | drawn apart from the clip's |
    | motion | int16 (1+K, W, rows, cols, 2) | windows as stored, the positive first |
    | motion_box, motion_flip | float32 (1+K, 4), bool (1+K,) | the positive's are the clip's |
    | index, label | int | row of this data set; class number, -1 unknown |

    `dropped` counts videos too short to serve, `failed` rows of the manifest that stage 1 could not store.

    Raises ValueError where the manifest names videos or labels that the shards do not, or no video can serve.
    """

    def __init__(
        self,
        shards: ShardSet,
        manifest: Manifest | None,
        sampling: Sampling,
        cropping: Cropping,
        photometric: Photometric,
        seed: int = 0,
    ) -> None:
        _check_motion(shards, sampling)
        video, self.failed = select(shards, manifest)
        serves = np.array([largest_stride(f, sampling) > 0 for f in shards.frames[video].tolist()], bool)
        self.dropped = int((~serves).sum())
        self.video = video[serves]
        if not len(self.video):
            least = 1 if sampling.short_videos == "fit" else sampling.stride
            raise ValueError(
                f"none of {len(video)} videos has the {sampling.needed(least)} frames that a clip at stride {least} "
                "and its motion window need; choose fewer frames, a smaller stride, or short_videos=fit"
            )
        self.label = shards.label[self.video]
        self.shards, self.sampling, self.cropping, self.photometric = shards, sampling, cropping, photometric
        self.seed = seed

    def __len__(self) -> int:
        return len(self.video)

    def __getitem__(self, key: tuple[int, int]) -> Sample:
        return self.__getitems__([key])[0]

    def __getitems__(self, keys: list[tuple[int, int]]) -> list[Sample]:
        """What torch's loader asks for: a batch. Decoding a clip pushes everything else out of the processor's caches,
        which makes drawing four times as slow; so all are drawn first, then all decoded. Their pictures lie in one
        array each, whose memory the allocator gets in huge pages or keeps; an array a clip would be paged in anew."""
        drawn, s, stored = [self._drawn(key) for key in keys], self.sampling, self.shards.settings
        clips = np.empty((len(keys), s.frames, stored.frame_height, stored.frame_width, 3), np.uint8)
        iframes = np.empty((len(keys), 1, stored.height, stored.width, 3), np.uint8)
        for (shard, frames, iframe, _), clip, picture in zip(drawn, clips, iframes):
            decode_frames(shard, frames, clip)
            decode_iframes(shard, iframe, picture)
        return [{"clip": c, "iframe": i[0], **sample} for (*_, sample), c, i in zip(drawn, clips, iframes)]

    def _drawn(self, key: tuple[int, int]) -> tuple[Shard, np.ndarray, np.ndarray, Sample]:
        """(shard, the clip's frames (T,), its I-frame (1,), the sample without them), both numbered over the shard."""
        epoch, index = key
        s, rng = self.sampling, _generator(self.seed, epoch, index)
        shard, first, frames, iframes, first_iframe = _extent(self.shards, int(self.video[index]))
        start, stride, window = draw_clip(rng, frames, s, iframes)
        iframe = draw_iframe(rng, iframes, start, start + s.span(stride) - 1, s.iframe_reach)
        width, height = shard.settings.width, shard.settings.height
        sample: Sample = {
            "clip_box": draw_box(rng, self.cropping, width, height),
            "clip_flip": bool(rng.random() < self.cropping.flip),
            "clip_photo": draw_photometric(rng, self.photometric),
            "iframe_box": draw_box(rng, self.cropping, width, height),
            "iframe_flip": bool(rng.random() < self.cropping.flip),
            "iframe_photo": draw_photometric(rng, self.photometric),
            "index": int(index),
            "label": int(self.label[index]),
        }
        windows = [window, *draw_negatives(rng, frames, window, s, iframes)]
        sample |= _motion(shard, first, windows, s, sample, self.cropping, rng)
        return shard, first + start + stride * np.arange(s.frames), np.array([first_iframe + iframe]), sample


class FinetuneSet(Dataset[Sample]):
    """One random clip a video and epoch, with its label: `data[epoch, index]`, keyed as `PretrainSet`'s samples.

    Every video serves: one shorter than the clip repeats from its start, as at evaluation. With `with_motion` a sample
    has motion windows and `serves` (bool) too. The clip then leaves room for its window, at a smaller stride where the
    video is short; where no stride does, the clip is taken as without motion, `serves` is false and the maps are zero:
    such a video trains the classifier alone. `unserved` counts them.

    Raises ValueError as `select` does, and where a video has no label.
    """

    def __init__(
        self,
        shards: ShardSet,
        manifest: Manifest | None,
        sampling: Sampling,
        cropping: Cropping,
        photometric: Photometric,
        seed: int = 0,
        with_motion: bool = False,
    ) -> None:
        if with_motion:
            _check_motion(shards, sampling)
        self.video, self.failed = select(shards, manifest)
        self.label = shards.label[self.video]
        if (self.label < 0).any():
            paths = shards.paths
            unknown = [paths[v] for v in self.video[self.label < 0].tolist()]
            raise ValueError(
                f"{len(unknown)} videos have no label ({_some(unknown)}); leave them out of the manifest, "
                "or make the shards from a manifest that labels them"
            )
        self.shards, self.sampling, self.cropping, self.photometric = shards, sampling, cropping, photometric
        self.seed, self.with_motion = seed, with_motion
        frames = shards.frames[self.video].tolist()
        self.unserved = sum(not largest_stride(f, sampling) for f in frames) if with_motion else 0

    def __len__(self) -> int:
        return len(self.video)

    def __getitem__(self, key: tuple[int, int]) -> Sample:
        epoch, index = key
        s, rng = self.sampling, _generator(self.seed, epoch, index)
        shard, first, frames, iframes, _ = _extent(self.shards, int(self.video[index]))
        serves = self.with_motion and largest_stride(frames, s) > 0
        if serves:
            start, stride, window = draw_clip(rng, frames, s, iframes)
        else:
            start, stride = int(rng.integers(max(frames - s.span(s.stride), 0) + 1)), s.stride
        sample: Sample = {
            "clip": decode_frames(shard, first + (start + stride * np.arange(s.frames)) % frames),
            "clip_box": draw_box(rng, self.cropping, shard.settings.width, shard.settings.height),
            "clip_flip": bool(rng.random() < self.cropping.flip),
            "clip_photo": draw_photometric(rng, self.photometric),
            "index": int(index),
            "label": int(self.label[index]),
        }
        if self.with_motion:
            windows = [window, *draw_negatives(rng, frames, window, s, iframes)] if serves else []
            sample |= {"serves": serves} | _motion(shard, first, windows, s, sample, self.cropping, rng)
        return sample


class ClipSet(Dataset[Sample]):
    """All evenly spread clips of a video, for evaluation: `data[index]`, nothing drawn (paper section 4.1).

    | modality | key | type, shape | what of each clip |
    |---|---|---|---|
    | video | clips | uint8 (C, T, h, w, 3) | its frames |
    | iframe | iframes | uint8 (C, H, W, 3) | the I-frame nearest its centre, the earlier of two as near |
    | motion | motion | int16 (C, W, rows, cols, 2) | the maps around its centre, as stored |

    With `index` and `label` as in `PretrainSet`. A video shorter than the clip repeats from its start.
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
            _check_motion(shards, sampling)
        self.video, self.failed = select(shards, manifest)
        self.label = shards.label[self.video]
        self.shards, self.sampling, self.clips, self.modality = shards, sampling, clips, modality

    def __len__(self) -> int:
        return len(self.video)

    def __getitem__(self, index: int) -> Sample:
        s = self.sampling
        shard, first, frames, iframes, first_iframe = _extent(self.shards, int(self.video[index]))
        span = s.span(s.stride)
        starts = clip_starts(frames, span, self.clips)
        sample: Sample = {"index": int(index), "label": int(self.label[index])}
        if self.modality == "video":
            numbers = (starts[:, None] + s.stride * np.arange(s.frames)) % frames  # (C, T)
            decoded = decode_frames(shard, first + numbers.ravel())
            return sample | {"clips": decoded.reshape(*numbers.shape, *decoded.shape[1:])}
        if self.modality == "iframe":
            chosen = [nearest(iframes, centre) for centre in ((starts + span // 2) % frames).tolist()]
            return sample | {"iframes": decode_iframes(shard, first_iframe + np.array(chosen))}
        windows = starts[:, None] + (span - s.motion_frames) // 2 + np.arange(s.motion_frames)  # (C, W)
        return sample | {"motion": _maps(shard, s)[first + windows % frames]}


class EpochSampler(Sampler[list[tuple[int, int]]]):
    """Batches of (epoch, index) for one rank: a DataLoader's `batch_sampler`.

    An epoch is one shuffle of all videos, a function of (seed, epoch). It is cut into global batches, and each rank
    takes its slice of each; the `dropped` videos below one global batch wait for another epoch. So no video is seen
    twice in an epoch, and the global batches do not depend on the number of ranks.

    Iterating gives the rest of the epoch that `start_at` named. A DataLoader runs ahead of the training step: the loop
    that resumes must count its own steps and name them here.

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
        self.epoch = self.step = 0

    def start_at(self, epoch: int, step: int = 0) -> None:
        """The next iteration gives this epoch from this step on (0 = its beginning, `steps` = nothing left)."""
        if epoch < 0 or not 0 <= step <= self.steps:
            raise ValueError(f"epoch {epoch}, step {step}; an epoch has steps 0 to {self.steps}")
        self.epoch, self.step = epoch, step

    def __len__(self) -> int:
        return self.steps - self.step

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        epoch, share = self.epoch, self.global_batch // self.world
        order = np.random.default_rng([self.seed, epoch]).permutation(self.n)
        for step in range(self.step, self.steps):
            first = step * self.global_batch + self.rank * share
            yield [(epoch, i) for i in order[first : first + share].tolist()]


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
    if out is None:
        out = np.empty((len(frames), shard.settings.frame_height, shard.settings.frame_width, 3), np.uint8)
    for image, f in zip(out, frames.tolist()):
        _decode(shard.frame_jpeg(f), image, shard, f"frame {f}")
    return out


def decode_iframes(shard: Shard, iframes: np.ndarray, out: np.ndarray | None = None) -> np.ndarray:
    """Decode I-frames (n,), numbered over the shard, into one uint8 (n, H, W, 3) RGB array, `out` or a new one."""
    if out is None:
        out = np.empty((len(iframes), shard.settings.height, shard.settings.width, 3), np.uint8)
    for image, k in zip(out, iframes.tolist()):
        _decode(shard.iframe_jpeg(k), image, shard, f"I-frame {k}")
    return out


def _decode(jpeg: np.ndarray, image: np.ndarray, shard: Shard, what: str) -> None:
    """Decode straight into `image`. Damaged bytes raise: they must not train a network."""
    try:
        shape = simplejpeg.decode_jpeg(jpeg, "RGB", buffer=image).shape
    except ValueError as error:
        raise ValueError(f"{shard.path}: {what} is damaged ({error}); check the file and make it again") from error
    if shape != image.shape:
        raise ValueError(f"{shard.path}: {what} has shape {shape}, not {image.shape}; make the file again")


def _motion(
    shard: Shard,
    first: int,
    windows: list[int],
    s: Sampling,
    clip: Sample,
    cropping: Cropping,
    rng: np.random.Generator,
) -> Sample:
    """Motion windows of the video whose first frame is `first`, the positive one first, with its clip's crop and flip;
    zeros where there are no windows."""
    maps, count, length = _maps(shard, s), 1 + s.negatives, s.motion_frames
    width, height = shard.settings.width, shard.settings.height
    boxes = [clip["clip_box"], *(draw_box(rng, cropping, width, height) for _ in range(s.negatives))]
    flips = rng.random(s.negatives) < cropping.flip
    stored = [maps[first + w : first + w + length] for w in windows]
    return {
        "motion": np.stack(stored) if stored else np.zeros((count, length, *maps.shape[1:]), maps.dtype),
        "motion_box": np.stack(boxes),
        "motion_flip": np.array([clip["clip_flip"], *flips]),
    }


def _maps(shard: Shard, sampling: Sampling) -> np.ndarray:
    """Motion of every frame, int16 (F, rows, cols, 2): the stream's vectors, or its optical flow (table 4)."""
    return shard.flow if sampling.motion == "flow" else shard.motion


def _check_motion(shards: ShardSet, sampling: Sampling) -> None:
    """Raise ValueError where the shards do not have what `_maps` gives."""
    try:
        for shard in shards.shards:
            _maps(shard, sampling)
    except ValueError as error:
        raise ValueError(f"motion is {sampling.motion}, but {error}, or choose motion=vectors") from error


def _extent(shards: ShardSet, video: int) -> tuple[Shard, int, int, np.ndarray, int]:
    """(shard, first frame, frames, I-frames counted within the video, first I-frame) of a video."""
    shard, i = shards.locate(video)
    first, end = shard.frame_offset[i : i + 2].tolist()
    low, high = int(shard.iframe_frame.searchsorted(first)), int(shard.iframe_frame.searchsorted(end))
    return shard, first, end - first, shard.iframe_frame[low:high] - first, low


def _generator(seed: int, epoch: int, index: int) -> np.random.Generator:
    # numpy pads entropy with zeros, so (seed, epoch, 0) would be the stream that shuffles the epoch.
    # This is what default_rng makes of it, in a third of the time.
    return np.random.Generator(np.random.PCG64([seed, epoch, 1 + index]))


def _some(texts: list[str]) -> str:
    return ", ".join(texts[:SHOWN]) + (", …" if len(texts) > SHOWN else "")
