"""Features of whole videos: ten clips, pooled and averaged (paper section 4.1, 'video retrieval settings')."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader
from tqdm import tqdm

from preprocess.manifest import Manifest
from preprocess.shards import Settings, ShardSet
from train import augment, checkpoint, runs
from train.config import Config
from train.data import ClipSet, Modality
from train.loop import channels_last, choose_device, explaining_workers, heed_only_parent
from train.model import FinetuningModel, PretrainingModel, build_model

Network = Literal["video", "iframe", "motion"]
View = Callable[[Tensor, Tensor], Tensor]
"""Decoded clips (V, clips, ...) and the videos' rows of their data set (V,) -> clips of the same shape."""
NETWORKS: dict[Network, str] = {"video": "V-Network", "iframe": "I-Network", "motion": "M-Network"}
KEYS: dict[Modality, str] = {"video": "clips", "iframe": "iframes", "motion": "motion"}
CLIPS = 10
VIDEOS_A_BATCH = 4


@dataclass(frozen=True)
class Run:
    """One run at one state of its weights."""

    folder: Path
    config: Config
    recipe: str
    weights: str
    """'initial' (untrained), 'last', or the name of a kept checkpoint such as 'epoch-0005'."""
    epoch: float
    model: PretrainingModel | FinetuningModel

    def weights_sha256(self) -> str:
        return checkpoint.sha256(self.model.state_dict())


def load_run(folder: Path, weights: str = "last") -> Run:
    """A run's networks with its 'initial' weights (untrained, from its seed), its 'last', or those of a kept epoch."""
    about = runs.read(folder)
    config = Config.from_json(json.dumps(about["config"]))
    if weights == "initial" and about["pretrained"]:
        raise ValueError(f"{folder} began from the weights of another run, {about['pretrained']['recipe']}: look there")
    torch.manual_seed(config.seed)  # as the training loop does before it builds the networks
    model = build_model(config, len(about["classes"]))
    epoch = 0.0
    if weights != "initial":
        saved = checkpoint.weights_path(folder, weights)
        state = checkpoint.load(saved)
        checkpoint.load_weights(model, state["model"], saved)
        epoch = float(state["epoch"])
    return Run(folder, config, about["recipe"], weights, epoch, model)


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
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Features float32 (V, C), class numbers int32 (V,) and shard-set positions int64 (V,) of a manifest's videos."""
    data = ClipSet(shards, manifest, run.config.sampling, clips, network)
    (found,) = over_clips(part(run, network), data, run.config, pooled, device=device, workers=workers)
    return found, data.label, data.video


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
    loader = DataLoader(
        data,
        VIDEOS_A_BATCH,
        num_workers=workers,
        pin_memory=where.type == "cuda",
        worker_init_fn=heed_only_parent,
    )
    network, settings = data.modality, data.shards.settings
    found: list[Tensor] = []
    with torch.inference_mode():
        for batch in tqdm(loader, unit=f"{VIDEOS_A_BATCH} videos", desc=NETWORKS[network], disable=None, leave=False):
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
