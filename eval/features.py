"""Features of whole videos: ten clips, pooled and averaged (paper section 4.1, 'video retrieval settings')."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn
from tqdm import tqdm

from preprocess.files import replacing
from preprocess.manifest import Manifest
from preprocess.shards import Settings, ShardSet
from train import augment
from train.config import Config
from train.data import ClipSet, Modality
from train.device import channels_last, choose_device
from train.loader import explaining_workers, make_loader
from train.trained import Run

Network = Literal["video", "iframe", "motion"]
Side = tuple[np.ndarray, np.ndarray, np.ndarray]
"""Features float32 (V, C), class numbers int32 (V,) and shard-set positions int64 (V,) of some videos."""
View = Callable[[Tensor, Tensor], Tensor]
"""Decoded clips (V, clips, ...) and the videos' rows of their data set (V,) -> clips of the same shape."""
NETWORKS: dict[Network, str] = {"video": "V-Network", "iframe": "I-Network", "motion": "M-Network"}
KEYS: dict[Modality, str] = {"video": "clips", "iframe": "iframes", "motion": "motion"}
CLIPS = 10
VIDEOS_A_BATCH = 4


def protocol(config: Config, network: Network, clips: int = CLIPS) -> str:
    """How features are made, in one sentence; it is printed and stored with every number."""
    s, size = config.sampling, config.size
    short = round(size * 128 / 112)
    what = {
        "video": f"{s.frames} frames at stride {s.stride}",
        "iframe": "the I-frame nearest the clip's centre",
        "motion": f"{s.motion_frames} motion maps around the clip's centre",
    }[network]
    return (
        f"{NETWORKS[network]}, {clips} evenly spread clips a video ({what}), short side {short}, centre {size}, global "
        "average pooling, clips averaged, cosine similarity, no augmentation, no video dropped"
    )


def unchanged(clips: Tensor, _: Tensor) -> Tensor:
    return clips


def pooled(maps: Tensor) -> Tensor:
    """Maps (N, C, t, h, w) -> global average, float32 (N, C)."""
    return maps.float().mean((2, 3, 4))


def video_features(
    run: Run,
    shards: ShardSet,
    manifest: Manifest,
    network: Network = "video",
    *,
    clips: int = CLIPS,
    device: str = "auto",
    workers: int = 2,
) -> Side:
    """Features, class numbers and shard-set positions of a manifest's videos."""
    data = ClipSet(shards, manifest, run.config.sampling, clips, network)
    (found,) = over_clips(part(run, network), data, run.config, pooled, device=device, workers=workers)
    return found, data.label, data.video


def sides(
    run: Run, shards: ShardSet, manifest: Manifest, network: Network, *, device: str, workers: int
) -> tuple[Side, Side]:
    """What `video_features` gives of the manifest's test videos and of its training videos; ValueError where one of
    them has no label."""
    found = [
        video_features(run, shards, manifest.subset(subset), network, device=device, workers=workers)
        for subset in ("test", "train")
    ]
    if any((label < 0).any() for _, label, _ in found):
        raise ValueError("these numbers need labels, and some videos of the manifest have none")
    return found[0], found[1]


def store(
    out: Path,
    found: np.ndarray,
    label: np.ndarray,
    video: np.ndarray,
    shards: ShardSet,
    manifest: Manifest,
    about: Mapping[str, Any],
) -> None:
    """Write what `video_features` returned to an NPZ file, whole or not at all, with its origin.

    Arrays: features float32 (V, C), label int32 (V,) into classes str (N,), -1 unknown, path and subset str (V,); and
    each value of `about` as text. np.load reads them without pickled code.
    """
    paths, subsets = shards.paths, dict(zip(manifest.paths, manifest.subsets))
    arrays: dict[str, Any] = {key: np.array(str(value)) for key, value in about.items() if key != "subset"}
    arrays |= {
        "features": found,
        "label": label,
        "classes": np.array(shards.classes, dtype=str),
        "path": np.array([paths[v] for v in video.tolist()], dtype=str),
        "subset": np.array([subsets[paths[v]] for v in video.tolist()], dtype=str),
    }
    with replacing(out) as partial, open(partial, "wb") as f:
        np.savez(f, **arrays)


@explaining_workers()
def over_clips(
    module: nn.Module,
    data: ClipSet,
    config: Config,
    read: Callable[[Any], Tensor],
    views: Sequence[View] = (unchanged,),
    *,
    device: str = "auto",
    workers: int = 2,
) -> np.ndarray:
    """What `read` takes from the module's outputs, averaged over a video's clips: float32 (len(views), V, K).

    Every view of the decoded clips passes through the module, so that a video is decoded once. Raises ValueError where
    an average is not finite: neighbours and classes would be found among such numbers too, and mean nothing.
    """
    where = torch.device(choose_device(device))
    module.to(where).eval()
    channels_last(module)
    loader = make_loader(data, workers, where, batch_size=VIDEOS_A_BATCH)
    network, settings = data.modality, data.shards.settings
    found: list[Tensor] = []
    with torch.inference_mode():
        for batch in tqdm(
            loader, desc=NETWORKS[network], unit=" videos", unit_scale=VIDEOS_A_BATCH, disable=None, leave=False
        ):
            clips = batch[KEYS[network]].to(where, non_blocking=True)  # (V, clips, ...)
            values = []
            for view in views:
                raw = view(clips, batch["index"]).flatten(0, 1)  # (V clips, ...)
                each = read(module(prepare(raw, network, config, settings)))  # (V clips, K)
                values.append(each.unflatten(0, clips.shape[:2]).mean(1).cpu())  # (V, K)
            found.append(torch.stack(values))
    every = torch.cat(found, 1).numpy()
    if not np.isfinite(every).all():
        raise ValueError(f"the {NETWORKS[network]} gives numbers that are not finite: are its weights sound?")
    return every


def part(run: Run, network: Network) -> nn.Module:
    """The V-, I- or M-Network of a run."""
    module = getattr(run.model, network, None)
    if network == "motion":
        module = getattr(module, "network", None)
    if module is None:
        raise ValueError(f"{run.folder} has no {NETWORKS[network]}: {run.recipe or 'its recipe'} trains none")
    return module


def prepare(raw: Tensor, network: Network, config: Config, settings: Settings) -> Tensor:
    """Stored pixels or vectors of n clips -> what the network takes, centre crop, nothing drawn."""
    height, width = (settings.height, settings.width)
    box = augment.fixed_box(width, height).to(raw.device).expand(len(raw), 4)
    flip = torch.zeros(len(raw), dtype=torch.bool, device=raw.device)
    if network == "motion":
        return augment.crop_motion(raw, box, flip, config.motion_size, width, height)  # (n, 2, W, M, M)
    frames = raw[:, None] if network == "iframe" else raw
    return augment.normalise(augment.crop(frames, box, flip, config.size))  # (n, 3, T, S, S)
