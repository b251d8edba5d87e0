"""Features of whole videos: ten clips, pooled and averaged (paper section 4.1, 'video retrieval settings')."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn
from tqdm import tqdm

from eval.results import Data, Foreign
from preprocess.command import at_least
from preprocess.files import replacing
from train.config import Config
from train.data import ClipSet, Modality
from train.device import channels_last, choose_device, keep_freed_memory
from train.loader import explaining_workers, make_loader
from train.readout import SharedMap, pooled, prepare
from train.trained import Run

Network = Literal["video", "layer4", "iframe", "motion"]
"""What is read: the map that both pretraining tasks share (section 3.2), plain layer 4, or the I- or M-Network."""
View = Callable[[Tensor, Tensor], Tensor]
"""Decoded clips (V, clips, ...) and the videos' rows of their data set (V,) -> clips of the same shape."""
NETWORKS: dict[Network, str] = {
    "video": "V-Network, the map that both tasks share",
    "layer4": "V-Network, plain layer 4",
    "iframe": "I-Network",
    "motion": "M-Network",
}
SAMPLE_KEYS: dict[Modality, str] = {"video": "clips", "iframe": "iframes", "motion": "motion"}
CLIPS = 10
VIDEOS_A_BATCH = 4


@dataclass(frozen=True)
class Machine:
    """What a measure runs on."""

    device: str = "auto"
    workers: int | None = None
    """Processes that decode; None: one a core at hand but this process's own, 8 at most."""

    def __post_init__(self) -> None:
        if self.workers is not None:
            at_least("workers", self.workers, 0)


AUTO = Machine()


@dataclass(frozen=True)
class Features:
    """Of some videos."""

    vectors: np.ndarray
    """float32 (V, C)."""
    label: np.ndarray
    """Class numbers, int32 (V,), -1 unknown."""
    video: np.ndarray
    """Positions in the shard set, int64 (V,)."""
    failed: int
    """Videos of the manifest that stage 1 could not store."""


def protocol(config: Config, network: Network, failed: int = 0, name: str = "") -> str:
    """How features are made, in one sentence; it is printed and stored with every number."""
    s, size = config.sampling, config.motion_size if network == "motion" else config.size
    short = round(size * 128 / 112)
    frames = f"{s.frames} frames at stride {s.stride}"
    what = {
        "video": frames,
        "layer4": frames,
        "iframe": "the I-frame nearest the clip's centre",
        "motion": f"{s.motion_frames} motion maps around the clip's centre",
    }[network]
    return (
        f"{name or NETWORKS[network]}, {CLIPS} evenly spread clips a video ({what}), short side {short}, centre "
        f"{size}, global average pooling, clips averaged, cosine similarity, no augmentation, {dropped(failed)}"
    )


def dropped(failed: int) -> str:
    return f"{failed} videos dropped that stage 1 could not store" if failed else "no video dropped"


def unchanged(clips: Tensor, _: Tensor) -> Tensor:
    return clips


def video_features(run: Run, data: Data, network: Network = "video", machine: Machine = AUTO) -> Features:
    """Features of all videos of the data's manifest."""
    modality: Modality = "video" if network == "layer4" else network
    clip_set = ClipSet(data.shards, data.manifest, run.config.sampling, CLIPS, modality)
    (vectors,) = over_clips(part(run, network), clip_set, run.config, pooled, machine=machine)
    return Features(vectors, clip_set.label, clip_set.video, clip_set.failed)


def sides(run: Run, data: Data, network: Network, machine: Machine) -> tuple[Features, Features]:
    """Features of the test videos, which query, and of the training videos, the gallery; ValueError where one has no
    label."""
    test, train = (video_features(run, data.subset(name), network, machine) for name in ("test", "train"))
    if (test.label < 0).any() or (train.label < 0).any():
        raise ValueError("these numbers need labels, and some videos of the manifest have none")
    return test, train


def store(out: Path, found: Features, data: Data, about: Mapping[str, Any]) -> None:
    """Write features to an NPZ file, whole or not at all, with their origin.

    Arrays: features float32 (V, C), label int32 (V,) into classes str (N,), -1 unknown, path and subset str (V,); and
    each value of `about` as text. np.load reads them without pickled code.
    """
    paths, subsets = data.shards.paths, dict(zip(data.manifest.paths, data.manifest.subsets))
    arrays: dict[str, Any] = {key: np.array(str(value)) for key, value in about.items() if key != "subset"}
    arrays |= {
        "features": found.vectors,
        "label": found.label,
        "classes": np.array(data.shards.classes, dtype=str),
        "path": np.array([paths[v] for v in found.video.tolist()], dtype=str),
        "subset": np.array([subsets[paths[v]] for v in found.video.tolist()], dtype=str),
    }
    with replacing(out) as partial, open(partial, "wb") as f:
        np.savez(f, **arrays)


@explaining_workers()
def over_clips(
    module: nn.Module,
    clip_set: ClipSet,
    config: Config,
    read: Callable[[Any], Tensor],
    views: Sequence[View] = (unchanged,),
    machine: Machine = AUTO,
) -> np.ndarray:
    """What `read` takes from the module's outputs, averaged over a video's clips: float32 (len(views), V, K).

    Every view of the decoded clips passes through the module, so that a video is decoded once. Raises ValueError where
    an average is not finite: neighbours and classes would be found among such numbers too, and mean nothing.
    """
    where = choose_device(machine.device)
    keep_freed_memory()
    module.to(where).eval()
    channels_last(module)
    loader = make_loader(clip_set, machine.workers, where, batch_size=VIDEOS_A_BATCH)
    network, settings = clip_set.modality, clip_set.shards.settings
    progress: dict[str, Any] = {"unit": " videos", "unit_scale": VIDEOS_A_BATCH, "disable": None, "leave": False}
    found: list[Tensor] = []
    with torch.inference_mode():
        for batch in tqdm(loader, desc="features", **progress):
            clips = batch[SAMPLE_KEYS[network]].to(where, non_blocking=True)  # (V, clips, ...)
            values = []
            for view in views:
                raw = view(clips, batch["index"]).flatten(0, 1)  # (V clips, ...)
                each = read(module(prepare(raw, network, config, settings)))  # (V clips, K)
                values.append(each.unflatten(0, clips.shape[:2]).mean(1).cpu())  # (V, K)
            found.append(torch.stack(values))
    every = torch.cat(found, 1).numpy()
    if not np.isfinite(every).all():
        raise ValueError("the network gives numbers that are not finite: are its weights sound?")
    return every


def part(run: Run | Foreign, network: Network) -> nn.Module:
    """What of a run is read; a foreign network is its own."""
    if isinstance(run, Foreign):
        return run.network
    if network == "video":
        return SharedMap(run.model.video)
    module = getattr(run.model, "video" if network == "layer4" else network, None)
    if network == "motion":
        module = getattr(module, "network", None)
    if module is None:
        raise ValueError(f"{run.folder} has no {NETWORKS[network]}: {run.recipe or 'its recipe'} trains none")
    return module
