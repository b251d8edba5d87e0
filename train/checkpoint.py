"""Checkpoints: written whole or not at all, read without running any code from them."""

from __future__ import annotations

import hashlib
import json
import pickle
import zipfile
from pathlib import Path
from typing import Any

import torch
from torch import nn

from preprocess.files import replacing, write_text

FORMAT = "context-motion-checkpoint"
VERSION = 2  # 1 had the numbers of pending steps by position, and one group of parameters for AdamW
KEYS: dict[str, type | tuple[type, ...]] = {"model": dict, "config": str, "step": int, "epoch": (int, float)}


def weights_path(folder: Path, weights: str) -> Path:
    """The file of a run's 'last' weights or of a kept epoch's; ValueError for any other name."""
    kept = sorted(path.stem for path in folder.glob("epoch-*.pt"))
    if weights not in ("last", *kept):
        raise ValueError(
            f"{folder} has no weights {weights!r}, but {', '.join(('initial', 'last', *kept))}; --keep-epochs of "
            "python -m train keeps more"
        )
    return folder / ("checkpoint.pt" if weights == "last" else f"{weights}.pt")


def sha256(weights: dict[str, torch.Tensor]) -> str:
    """Of a state dict: names and values, whatever the file around them."""
    digest = hashlib.sha256()
    for name, tensor in sorted(weights.items()):
        digest.update(name.encode() + tensor.cpu().reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def save(path: Path, state: dict[str, Any]) -> None:
    """Write a checkpoint atomically, and JSON beside it that says what is inside.

    Raises OSError where writing fails (disk full); the checkpoint before it stays.
    """
    with replacing(path) as partial, open(partial, "wb") as f:
        try:
            torch.save({"format": FORMAT, "version": VERSION} | state, f)
        except RuntimeError as error:  # torch's writer makes it of some failed writes
            raise OSError(error) from error
    readable = {k: v for k, v in state.items() if isinstance(v, int | float | str)}
    write_text(path.with_suffix(".json"), json.dumps(readable, indent=1) + "\n")


def load(path: Path, device: str | torch.device = "cpu") -> dict[str, Any]:
    """Read a checkpoint: tensors and plain values only, never code. Raises ValueError saying why it is refused."""
    if not path.exists():
        raise ValueError(f"{path} does not exist: has the run been started, and saved for the first time?")
    if not zipfile.is_zipfile(path):  # a zip file ends with its table of contents
        raise ValueError(f"{path} is truncated, or no checkpoint at all")
    with zipfile.ZipFile(path) as archive:  # torch checks no sums
        if damaged := archive.testzip():
            raise ValueError(f"{path} is damaged: {damaged} in it does not fit its checksum")
    try:
        state = torch.load(path, map_location=device, weights_only=True)
    except pickle.UnpicklingError as error:
        reason = next((text for text in str(error).splitlines() if "GLOBAL" in text), "").strip()
        raise ValueError(f"{path} is refused: it holds more than tensors and plain values. {reason}".strip()) from error
    except (RuntimeError, EOFError, OSError, KeyError) as error:
        raise ValueError(f"{path} cannot be read, it may be damaged: {str(error).splitlines()[0]}") from error
    if not isinstance(state, dict) or state.get("format") != FORMAT:
        raise ValueError(f"{path} is not a checkpoint of this program")
    if state.get("version") != VERSION:
        raise ValueError(f"{path} has checkpoint version {state.get('version')}; this program reads {VERSION}")
    wrong = [key for key, kind in KEYS.items() if not isinstance(state.get(key), kind)]
    if wrong:
        raise ValueError(f"{path} is not a whole checkpoint: {', '.join(wrong)} missing or of another type")
    return state


def load_weights(module: nn.Module, weights: dict[str, torch.Tensor], path: Path) -> None:
    """Strictly; ValueError names a few keys or shapes that do not fit."""
    try:
        module.load_state_dict(weights, strict=True)
    except RuntimeError as error:
        lines = str(error).splitlines()
        raise ValueError(f"{path} holds another architecture: {' '.join(lines[1:3]).strip() or lines[0]}") from error


def load_optimiser(optimiser: torch.optim.Optimizer, state: dict[str, Any], path: Path) -> None:
    """The optimiser's state of a checkpoint; ValueError where it holds none, or another optimiser's."""
    if "optimiser" not in state:
        raise ValueError(f"{path} holds weights alone, from which no run goes on; restore the run's own checkpoint")
    try:
        for group in state["optimiser"]["param_groups"]:
            group["fused"] = optimiser.defaults["fused"]  # of this device, whichever it was saved on
        optimiser.load_state_dict(state["optimiser"])
    except (ValueError, KeyError) as error:
        raise ValueError(f"{path} holds another optimiser's state: {error}") from error


def check_finite(model: nn.Module, step: int) -> None:
    """Raise FloatingPointError where the last update made weights that are not finite, which no loss has met yet."""
    if not nn.utils.get_total_norm(model.parameters()).isfinite():
        raise FloatingPointError(
            f"weights are not finite after step {step}; the last checkpoint is kept. Lower --optimiser.lr-per-sample"
        )
