"""The V-Network of a run for others: a folder as the Hugging Face Hub takes it, without code.

    python -m train export runs/c3d --out c3d                       # model.safetensors, config.json, README.md
    python -m train export runs/c3d --out c3d --push owner/c3d      # and a repository of the Hub

    from train.export import load_backbone
    network, about = load_backbone("c3d")                           # or "owner/c3d", of the Hub

`network` takes clips float32 (B, 3, T, H, W): RGB in [0, 1], less about["mean"], over about["std"], `about["frames"]`
frames at stride `about["stride"]`, `about["size"]` pixels square; it returns maps (B, C, T1, H1, W1), whose mean over
the last three axes is a clip's global feature: the map that both pretraining tasks share, or with `layer="layer4"` that
of the last layer alone, which fine-tuning trains. By hand, without this module (forward_pretrain gives the shared map):

    from safetensors.torch import load_file
    from train.networks import build_video_network
    network = build_video_network("c3d", width=64)
    network.load_state_dict(load_file("c3d/model.safetensors"))
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from types import ModuleType
from typing import Any, Literal

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import nn

from preprocess.files import replacing, write_text
from train import checkpoint, runs
from train.augment import IMAGENET_MEAN, IMAGENET_STD
from train.card import card
from train.draws import one_of
from train.networks import build_video_network
from train.readout import SharedMap
from train.trained import Run

FORMAT = "context-motion-backbone"
VERSION = 2  # 1 was one file
WEIGHTS, CONFIG, CARD = FILES = ("model.safetensors", "config.json", "README.md")


def export(run: Run, out: Path, name: str = "") -> Path:
    """Write the V-Network of a run into the folder `out`, each file whole or not at all; OSError where it cannot be.

    `name` is what the card says to load it by; else the folder's.
    """
    config, made = run.config, runs.read(run.folder)
    weights = {key: tensor.contiguous() for key, tensor in run.model.video.state_dict().items()}
    about = {
        "format": FORMAT,
        "version": VERSION,
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
    text = card(run, made, name or out.name)
    with replacing(out / WEIGHTS) as partial:
        try:
            save_file(weights, partial, {"format": "pt"})
        except SafetensorError as error:
            raise OSError(error) from error
    write_text(out / CONFIG, json.dumps(about, indent=1) + "\n")
    write_text(out / CARD, text)
    return out


def push(folder: Path, name: str) -> str:
    """Put an exported folder into the repository `name` of the Hub, made where there is none: its address."""
    hub = _hub().HfApi()
    try:
        hub.create_repo(name, exist_ok=True)
        return hub.upload_folder(repo_id=name, folder_path=folder, allow_patterns=list(FILES)).repo_url
    except Exception as error:  # its HTTP client has errors of its own
        raise OSError(f"{folder} is written, but not pushed to {name}: {' '.join(str(error).split())}") from error


def load_backbone(
    source: str | Path,
    device: str | torch.device = "cpu",
    layer: Literal["shared", "layer4"] = "shared",
    revision: str | None = None,
) -> tuple[nn.Module, dict[str, Any]]:
    """The V-Network in a folder that `export` wrote, in evaluation mode, and what its config.json says of it.

    Of a `source` that is no folder but owner/name, the repository of the Hub, at a branch, tag or commit; without a
    network, as it was loaded before. Raises ValueError saying why it is refused: missing, damaged, written by others,
    of another version.
    """
    one_of("layer", layer, ("shared", "layer4"))
    if (folder := Path(source)).is_dir():
        paths = [folder / name for name in (WEIGHTS, CONFIG)]
    else:
        paths = _download(str(source), revision)
    about = _read_config(paths[1])
    try:
        with safe_open(paths[0], "pt", device=str(device)) as file:
            weights = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{paths[0]} cannot be read as safetensors: it is missing or damaged ({error})") from error
    if checkpoint.sha256(weights) != about["weights_sha256"]:
        raise ValueError(f"{paths[0]} is damaged: its weights are not those that were exported; export them again")
    network = build_video_network(about["backbone"], about["width"], upsampling=about["upsampling"])
    checkpoint.load_weights(network, weights, paths[0])
    read = SharedMap(network) if layer == "shared" else network
    return read.to(device).eval(), about


def _read_config(path: Path) -> dict[str, Any]:
    try:
        about = json.loads(path.read_text())
    except (ValueError, OSError) as error:
        raise ValueError(f"{path} cannot be read: it is missing or damaged ({error})") from error
    if not isinstance(about, dict) or about.get("format") != FORMAT:
        raise ValueError(f"{path} is not of this program, whose format is {FORMAT}")
    if about.get("version") != VERSION:
        raise ValueError(f"{path} has version {about.get('version')}; this program reads {VERSION}")
    return about


def _download(name: str, revision: str | None) -> list[Path]:
    """Weights and configuration of a repository of the Hub, from its cache or the network."""
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", name):
        raise ValueError(f"{name} is no folder, nor a name of the Hub (owner/name); python -m train export makes one")
    hub = _hub()
    try:
        return [Path(hub.hf_hub_download(name, file, revision=revision)) for file in (WEIGHTS, CONFIG)]
    except Exception as error:
        reason = " ".join(str(error).split())
        raise ValueError(f"{name} is no folder here, and the Hub does not give it: {reason}") from error


def _hub() -> ModuleType:
    try:
        import huggingface_hub
    except ModuleNotFoundError as error:
        raise ValueError(f"the Hub needs a package that is missing ({error.name}): pip install '.[hub]'") from error
    return huggingface_hub
