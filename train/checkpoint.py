"""Checkpoints: written whole or not at all, read without running any code from them."""

from __future__ import annotations

import json
import os
import pickle
from pathlib import Path
from typing import Any

import torch
from torch import nn

FORMAT = "context-motion-checkpoint"
VERSION = 1


def save(path: Path, state: dict[str, Any]) -> None:
    """Write a checkpoint atomically; where writing fails (disk full), the one before it stays. JSON beside it says
    what is inside."""
    partial = path.with_name(path.name + ".partial")
    try:
        with open(partial, "wb") as f:
            torch.save({"format": FORMAT, "version": VERSION} | state, f)
            f.flush()
            os.fsync(f.fileno())
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)
    readable = {k: v for k, v in state.items() if isinstance(v, int | float | str)}
    path.with_suffix(".json").write_text(json.dumps(readable, indent=1) + "\n")


def load(path: Path, device: str | torch.device = "cpu") -> dict[str, Any]:
    """Read a checkpoint: tensors and plain values only, never code. Raises ValueError saying why it is refused."""
    if not path.exists():
        raise ValueError(f"{path} does not exist: has the run been started, and saved its first epoch?")
    try:
        state = torch.load(path, map_location=device, weights_only=True)
    except pickle.UnpicklingError as error:
        raise ValueError(f"{path} is refused: it holds more than tensors and plain values ({error})") from error
    except (RuntimeError, EOFError, OSError) as error:
        raise ValueError(f"{path} cannot be read, it may be truncated: {error}") from error
    if not isinstance(state, dict) or state.get("format") != FORMAT:
        raise ValueError(f"{path} is not a checkpoint of this program")
    if state.get("version") != VERSION:
        raise ValueError(f"{path} has checkpoint version {state.get('version')}; this program reads {VERSION}")
    return state


def load_weights(module: nn.Module, weights: dict[str, torch.Tensor], path: Path) -> None:
    """Strictly; ValueError names a few keys or shapes that do not fit."""
    try:
        module.load_state_dict(weights, strict=True)
    except RuntimeError as error:
        lines = str(error).splitlines()
        raise ValueError(f"{path} holds another architecture: {' '.join(lines[1:3]).strip() or lines[0]}") from error
