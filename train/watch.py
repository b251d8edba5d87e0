"""A tracker of a run, on request: its metrics, and what the first batch of an epoch looks like after augmentation.

    python -m train RECIPE … --watch tensorboard        then: tensorboard --logdir RUN
    python -m train RECIPE … --watch wandb              Weights & Biases; WANDB_PROJECT, WANDB_MODE=offline and so on

Values are those of metrics.jsonl, written where the loop has them on the host anyway; pictures fetch a few clips once
an epoch.
"""

from __future__ import annotations

import json
import os
import uuid
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from preprocess.draw import colour_wheel
from preprocess.files import write_text
from train import runs
from train.augment import ENERGY, IMAGENET_MEAN, IMAGENET_STD

SAMPLES, MOMENTS = 4, 4  # rows of the picture; frames, and motion maps, of a row
FULL_COLOUR = 0.5  # of motion maps, which hold tens of pixels


class TensorBoard:
    """Event files in OUT/tensorboard. A run that goes on at `step` drops what was written of later steps."""

    def __init__(self, out: Path, step: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self.writer = SummaryWriter(str(out / "tensorboard"), purge_step=step + 1)

    def scalars(self, values: Mapping[str, float], step: int) -> None:
        for tag, value in values.items():
            self.writer.add_scalar(tag, value, step)
        self.writer.flush()

    def image(self, tag: str, rgb: np.ndarray, step: int) -> None:
        self.writer.add_image(tag, rgb, step, dataformats="HWC")
        self.writer.flush()

    def close(self) -> None:
        self.writer.close()


class WeightsAndBiases:
    """A run of Weights & Biases, whose files lie in OUT/wandb; one that goes on is the same run there.

    Steps that run again give the same numbers, and it keeps the first. Offline nothing is known of an earlier part, so
    that this one tells all of metrics.jsonl: its folder alone is to be synchronised.
    """

    def __init__(self, out: Path, step: int) -> None:
        import wandb

        self.image_type, name = wandb.Image, out / "wandb" / "id"
        if not name.exists():
            write_text(name, uuid.uuid4().hex[:8])
        self.run = wandb.init(
            project=os.environ.get("WANDB_PROJECT", "context-motion"),
            dir=out,
            id=name.read_text(),
            name=out.resolve().name,
            config=runs.read(out),
            resume="allow",
            settings=wandb.Settings(console="off"),
        )
        for text in (out / "metrics.jsonl").read_text().splitlines():
            line = json.loads(text)
            self.scalars(tagged(line), line["step"])

    def scalars(self, values: Mapping[str, float], step: int) -> None:
        if step >= self.run.step:
            self.run.log(dict(values), step=step, commit=True)

    def image(self, tag: str, rgb: np.ndarray, step: int) -> None:
        if step >= self.run.step:
            self.run.log({tag: self.image_type(rgb)}, step=step)  # with the scalars of this step or the next ones

    def close(self) -> None:
        self.run.finish()


TRACKERS: dict[str, type[TensorBoard | WeightsAndBiases]] = {"tensorboard": TensorBoard, "wandb": WeightsAndBiases}


class Watch:
    """A tracker of a run that begins, or goes on, at `step`. Raises ValueError where its package is missing."""

    def __init__(self, tracker: str, out: Path, step: int) -> None:
        try:
            self.to = TRACKERS[tracker](out, step)
        except ModuleNotFoundError as error:
            raise ValueError(
                f"--watch {tracker} needs a package that is missing ({error.name}): pip install '.[train,{tracker}]', "
                "or leave the flag out"
            ) from error

    def metrics(self, line: Mapping[str, float]) -> None:
        self.to.scalars(tagged(line), int(line["step"]))

    def clips(self, step: int, inputs: tuple[Tensor, Tensor | None, Tensor | None]) -> None:
        """What the model takes in this step, drawn by `picture`."""
        clip, _, motion = inputs
        self.to.image("clips", picture(clip, None if motion is None else motion[:, 0]), step)

    def close(self) -> None:
        self.to.close()


def tagged(line: Mapping[str, float]) -> dict[str, float]:
    """A line of metrics by the names that trackers group: loss/motion, accuracy/motion, lr, clips_per_second, …"""
    values = {}
    for name, value in line.items():
        if name != "step":
            what, _, kind = name.rpartition("_")
            values[f"{kind}/{what}" if kind in ("loss", "accuracy") and what else name] = value
    return values


def picture(clip: Tensor, motion: Tensor | None) -> np.ndarray:
    """A row a sample: frames, and beside them the maps of the motion window to predict: vectors in the colours of
    motion, the energy of residuals in grey.

    clip (B, 3, T, S, S), normalised; motion (B, D, W, M, M) as `train.augment` crops it. Returns uint8 RGB, S
    pixels a cell.
    """
    shown = clip[:SAMPLES, :, _spread(clip.shape[2])].float().cpu()  # (b, 3, t, S, S)
    mean, std = (torch.tensor(x).view(1, 3, 1, 1, 1) for x in (IMAGENET_MEAN, IMAGENET_STD))
    frames = ((shown * std + mean) * 255).round().clamp(0, 255).byte().permute(0, 2, 3, 4, 1).numpy()  # (b, t, S, S, 3)
    columns = [frames]
    if motion is not None:
        maps = motion[:SAMPLES, :, _spread(motion.shape[2])].float().cpu().permute(0, 2, 3, 4, 1).numpy()
        place = np.arange(clip.shape[-1]) * maps.shape[2] // clip.shape[-1]  # the nearest block of each pixel
        depth = maps.shape[-1]
        vectors = [colour_wheel(maps[..., :2], FULL_COLOUR)] if depth > 1 else []
        energies = [np.rint(255 / ENERGY * maps[..., -1:]).astype(np.uint8).repeat(3, -1)] if depth % 2 else []
        columns += [each[:, :, place[:, None], place] for each in vectors + energies]  # (b, w, S, S, 3)
    grid = np.concatenate(columns, 1)
    b, n, side = grid.shape[:3]
    return grid.transpose(0, 2, 1, 3, 4).reshape(b * side, n * side, 3)


def _spread(count: int) -> list[int]:
    """Up to `MOMENTS` of so many, evenly spread."""
    return sorted(set(np.linspace(0, count - 1, MOMENTS).round().astype(int).tolist()))
