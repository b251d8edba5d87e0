"""The V-Network of a run in one file for others: safetensors, which holds numbers and text and no code.

    python -m train export runs/c3d --out backbone.safetensors

    from train.export import load_backbone
    network, about = load_backbone("backbone.safetensors")

`network` takes clips float32 (B, 3, T, H, W): RGB in [0, 1], less about["mean"], over about["std"], `about["frames"]`
frames at stride `about["stride"]`, `about["size"]` pixels square; it returns maps (B, C, T1, H1, W1), whose mean over
the last three axes is a clip's global feature: the map that both pretraining tasks share, or with `layer="layer4"` that
of the last layer alone, which fine-tuning trains. By hand, without this module (forward_pretrain gives the shared map):

    from safetensors.torch import load_file
    from train.networks import build_video_network
    network = build_video_network("c3d", width=64)
    network.load_state_dict(load_file("backbone.safetensors"))
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import nn

from preprocess.files import replacing
from train import checkpoint, runs
from train.augment import IMAGENET_MEAN, IMAGENET_STD
from train.networks import build_video_network
from train.readout import SharedMap
from train.trained import Run

FORMAT = "context-motion-backbone"
VERSION = 1


def export(run: Run, out: Path) -> Path:
    """Write the V-Network of a run to `out`, whole or not at all; OSError where it cannot be written."""
    config, made = run.config, runs.read(run.folder)
    weights = {name: tensor.contiguous() for name, tensor in run.model.video.state_dict().items()}
    about = {
        "backbone": config.networks.backbone,
        "width": config.networks.width,
        "upsampling": config.networks.upsampling,
        "mean": IMAGENET_MEAN,
        "std": IMAGENET_STD,
        "frames": config.sampling.frames,
        "stride": config.sampling.stride,
        "size": config.size,
        "task": config.task,
        "recipe": run.recipe,
        "trained_on": made["trained_on"],
        "pretrained": made["pretrained"],
        "weights": run.weights,
        "epoch": run.epoch,
        "seed": config.seed,
        "commit": made["commit"],
        "config_sha256": config.sha256(),
        "weights_sha256": checkpoint.sha256(weights),
    }
    with replacing(out) as partial:
        try:
            save_file(weights, partial, {"format": FORMAT, "version": str(VERSION), "about": json.dumps(about)})
        except SafetensorError as error:
            raise OSError(error) from error
    return out


def load_backbone(
    path: str | Path, device: str | torch.device = "cpu", layer: Literal["shared", "layer4"] = "shared"
) -> tuple[nn.Module, dict[str, Any]]:
    """The V-Network in a file that `export` wrote, in evaluation mode, and what the file says about it.

    Raises ValueError saying why a file is refused: missing, damaged, written by others, of another version.
    """
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"{path} is no file; write one with python -m train export RUN --out {path.name}")
    try:
        with safe_open(path, "pt", device=str(device)) as file:
            said = file.metadata() or {}
            weights = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise ValueError(
            f"{path} cannot be read as safetensors: it is damaged, or of another kind ({error})"
        ) from error
    if said.get("format") != FORMAT:
        raise ValueError(f"{path} is safetensors, but not of this program: its format is {said.get('format')!r}")
    if said.get("version") != str(VERSION):
        raise ValueError(f"{path} has version {said.get('version')}; this program reads {VERSION}")
    about = json.loads(said["about"])
    if checkpoint.sha256(weights) != about["weights_sha256"]:
        raise ValueError(f"{path} is damaged: its weights are not those that were exported; export them again")
    upsampling = about.get("upsampling", "trilinear")  # files from before the field
    network = build_video_network(about["backbone"], about["width"], upsampling=upsampling)
    checkpoint.load_weights(network, weights, path)
    read = SharedMap(network) if layer == "shared" else network
    return read.to(device).eval(), about
