"""TensorBoard of a run, on request: its metrics, and what the first batch of an epoch looks like after augmentation.

    python -m train RECIPE … --tensorboard
    tensorboard --logdir RUN

Values are written where the loop has them on the host anyway; pictures fetch a few clips once an epoch.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from preprocess.draw import colour_wheel
from train.augment import IMAGENET_MEAN, IMAGENET_STD

SAMPLES, MOMENTS = 4, 4  # rows of the picture; frames, and motion maps, of a row
FULL_COLOUR = 0.5  # of motion maps, which hold tens of pixels


class Watch:
    """Event files in the folder of a run.

    A run that goes on at `step` drops what was written of later steps, since those steps run again. Raises ValueError
    where the package is missing.
    """

    def __init__(self, out: Path, step: int) -> None:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ModuleNotFoundError as error:
            raise ValueError(
                f"--tensorboard needs a package that is missing ({error.name}): pip install '.[train,watch]', or leave "
                "the flag out"
            ) from error
        self.writer = SummaryWriter(str(out / "tensorboard"), purge_step=step + 1)

    def metrics(self, line: Mapping[str, float]) -> None:
        """A line of metrics as scalars: loss/motion, accuracy/motion, lr, clips_per_second, waiting, …"""
        for name, value in line.items():
            if name != "step":
                what, _, kind = name.rpartition("_")
                tag = f"{kind}/{what}" if kind in ("loss", "accuracy") and what else name
                self.writer.add_scalar(tag, value, int(line["step"]))
        self.writer.flush()

    def clips(self, step: int, inputs: tuple[Tensor, Tensor | None, Tensor | None]) -> None:
        """What the model takes in this step, drawn by `picture`."""
        clip, _, motion = inputs
        self.writer.add_image("clips", picture(clip, None if motion is None else motion[:, 0]), step, dataformats="HWC")
        self.writer.flush()

    def close(self) -> None:
        self.writer.close()


def picture(clip: Tensor, motion: Tensor | None) -> np.ndarray:
    """A row a sample: frames, and beside them the maps of the motion window to predict: vectors in the colours of
    motion, the energy of residuals in grey.

    clip (B, 3, T, S, S), normalised; motion (B, D, W, M, M) in tens of pixels, and of grey levels. Returns uint8 RGB, S
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
        energies = [np.rint(255 * maps[..., -1:]).astype(np.uint8).repeat(3, -1)] if depth % 2 else []
        columns += [each[:, :, place[:, None], place] for each in vectors + energies]  # (b, w, S, S, 3)
    grid = np.concatenate(columns, 1)
    b, n, side = grid.shape[:3]
    return grid.transpose(0, 2, 1, 3, 4).reshape(b * side, n * side, 3)


def _spread(count: int) -> list[int]:
    """Up to `MOMENTS` of so many, evenly spread."""
    return sorted(set(np.linspace(0, count - 1, MOMENTS).round().astype(int).tolist()))
