"""The numbers of a run by name: from scalars on the device to lines of metrics.jsonl and of the screen."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from preprocess.files import write_text
from train import distributed


def fetch(steps: Sequence[Mapping[str, Tensor]]) -> dict[str, np.ndarray]:
    """Scalars of some steps, all of the same names -> name: (steps,), means over ranks. Waits for the device."""
    table = torch.stack([torch.stack(list(found.values())) for found in steps])  # (steps, names)
    return dict(zip(steps[0], distributed.mean_over_ranks(table).cpu().numpy().T, strict=True))


def check_finite(values: Mapping[str, np.ndarray], step: int) -> None:
    """Raise FloatingPointError naming the first step whose loss or gradient is not finite; the last is `step`."""
    losses, norms = values["loss"].tolist(), values["gradient_norm"].tolist()
    for number, (loss, norm) in enumerate(zip(losses, norms), step - len(losses) + 1):
        if not (math.isfinite(loss) and math.isfinite(norm)):
            what = f"norm of the gradient is {norm}" if math.isfinite(loss) else f"loss is {loss}"
            raise FloatingPointError(
                f"the {what} at step {number}; the last checkpoint is kept. Lower --optimiser.lr-per-sample, or try "
                "--precision float32"
            )


class Metrics:
    """JSON lines; on a restart the lines after the checkpoint are dropped, since those steps run again."""

    def __init__(self, path: Path, step: int) -> None:
        self.path = path
        self.last: dict[str, Any] = {}
        """The latest line."""
        kept = []
        for text in path.read_text().splitlines() if path.exists() else []:
            try:
                line = json.loads(text)
                earlier = line["step"] <= step
            except (ValueError, KeyError, TypeError):  # the line that a kill cut short
                break
            if earlier:
                kept.append(f"{text}\n")
                self.last = line
        write_text(path, "".join(kept))

    def write(self, line: dict[str, Any]) -> None:
        """Append a line and see it on the disk, before a checkpoint says that its steps are done."""
        with open(self.path, "a") as f:
            f.write(json.dumps(line) + "\n")
            f.flush()
            os.fsync(f.fileno())
        self.last = line


def dense(line: Mapping[str, float]) -> str:
    """A line of metrics for people: every task's loss, in brackets its accuracy and that of held-out videos."""
    tasks = []
    for name, value in line.items():
        if name.endswith("_loss"):
            task = name.removesuffix("_loss")
            shares = {"": line.get(f"{task}_accuracy"), "held out ": line.get(f"heldout_{task}_accuracy")}
            found = ", ".join(f"{of}{100 * share:.0f} %" for of, share in shares.items() if share is not None)
            tasks.append(f"{task} {value:.2f}" + (f" ({found})" if found else ""))
    if "heldout_recall" in line:
        tasks.append(f"held out R@1 {100 * line['heldout_recall']:.0f} %")
    return (
        f"epoch {line['epoch']:.1f}, {', '.join(tasks)}, lr {line['lr']:.2g}, {line['clips_per_second']:.1f} clips/s, "
        f"waiting {100 * line['waiting']:.0f} %" + (f", MFU {100 * line['mfu']:.0f} %" if "mfu" in line else "")
    )
