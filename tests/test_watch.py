"""What TensorBoard shows of a run, read back with its own reader."""

from __future__ import annotations

import io
import json
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from running import RUNTIME, Tiny, run_again, start
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from train.watch import Watch, picture

WATCHED = replace(RUNTIME, tensorboard=True)
TAGS = {
    "loss": "loss", "context_loss": "loss/context", "context_accuracy": "accuracy/context",
    "motion_loss": "loss/motion", "motion_accuracy": "accuracy/motion",
    "lr": "lr", "gradient_norm": "gradient_norm", "epoch": "epoch",
    "clips_per_second": "clips_per_second", "waiting": "waiting",
}  # fmt: skip


def read(out: Path) -> tuple[dict[str, list[tuple[int, float]]], list[tuple[int, np.ndarray]]]:
    """Scalars as tag -> (step, value), and the pictures."""
    events = EventAccumulator(str(out / "tensorboard"), size_guidance={"images": 0, "scalars": 0})
    events.Reload()
    tags = events.Tags()
    assert tags["images"] == ["clips"]
    scalars = {tag: [(e.step, e.value) for e in events.Scalars(tag)] for tag in tags["scalars"]}
    pictures = [(e.step, np.asarray(Image.open(io.BytesIO(e.encoded_image_string)))) for e in events.Images("clips")]
    return scalars, pictures


def check(out: Path) -> None:
    """All of metrics.jsonl, nothing twice, and a picture an epoch."""
    lines = [json.loads(text) for text in (out / "metrics.jsonl").read_text().splitlines()]
    scalars, pictures = read(out)
    assert set(scalars) == set(TAGS.values())
    for name, tag in TAGS.items():
        assert scalars[tag] == [(line["step"], pytest.approx(line[name], rel=1e-6)) for line in lines]
    assert [step for step, _ in pictures] == [1, 7, 13]
    # Two samples of a batch; four frames and four maps of 32 pixels.
    assert all(image.shape == (2 * 32, 8 * 32, 3) and image.std() > 10 for _, image in pictures)


def test_a_run_that_goes_on_repeats_no_step(tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def stop(_: torch.Tensor) -> torch.Tensor:
        raise KeyboardInterrupt

    run_again(monkeypatch, 10, stop)
    with pytest.raises(KeyboardInterrupt):
        start(tiny, tmp_path, runtime=WATCHED)
    monkeypatch.undo()
    # Saved at 6, the end of the first epoch; step 8 has been written, and the picture of the second epoch.
    assert [step for step, _ in read(tmp_path)[0]["loss"]][-1] == 8 and len(read(tmp_path)[1]) == 2
    start(tiny, tmp_path, runtime=WATCHED)
    check(tmp_path)


def test_the_missing_package_is_named(tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [n for n in sys.modules if n.startswith("torch.utils.tensorboard")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "tensorboard", None)
    with pytest.raises(ValueError, match=r"\(tensorboard\): pip install '\.\[train,watch\]', or leave the flag out"):
        start(tiny, tmp_path, runtime=WATCHED)


def test_the_picture_by_hand() -> None:
    """Frame t of sample b is grey 10 b + t; the content moves right by 5 pixels, in the second half of the maps not."""
    mean, std = (torch.tensor(x).view(1, 3, 1, 1, 1) for x in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
    grey = (10 * torch.arange(5)[:, None] + torch.arange(7)).float() / 255  # (B, T)
    clip = (grey[:, None, :, None, None].expand(5, 3, 7, 4, 4) - mean) / std
    motion = torch.zeros(5, 2, 4, 2, 2)
    motion[:, 0, :2] = 0.5
    image = picture(clip, motion)
    assert image.dtype == np.uint8 and image.shape == (4 * 4, 8 * 4, 3)
    blocks = image.reshape(4, 4, 8, 4, 3)
    for row in range(4):
        for column, frame in enumerate((0, 2, 4, 6)):
            assert (blocks[row, :, column] == 10 * row + frame).all()
        assert (blocks[row, :, 4:6] == [255, 0, 0]).all() and (blocks[row, :, 6:] == 255).all()


@pytest.mark.parametrize("vectors", [0, 2])
def test_the_picture_of_energies_is_grey(vectors: int) -> None:
    motion = torch.zeros(1, vectors + 1, 4, 2, 2)
    motion[:, -1, 2:, :, 1] = 0.2
    image = picture(torch.zeros(1, 3, 8, 4, 4), motion)
    columns = 4 + 2 * vectors + 4
    assert image.shape == (4, 4 * columns, 3)
    maps = image.reshape(4, columns, 4, 3).transpose(1, 0, 2, 3)
    assert (maps[4:-4] == 255).all(), "no motion"
    assert (maps[-4:-2] == 0).all() and (maps[-2:, :, :2] == 0).all() and (maps[-2:, :, 2:] == 51).all()


def test_the_picture_of_a_run_without_motion(tmp_path: Path) -> None:
    watch = Watch(tmp_path, 0)
    watch.clips(1, (torch.zeros(2, 3, 8, 32, 32), None, None))
    watch.close()
    ((_, image),) = read(tmp_path)[1]
    assert image.shape == (2 * 32, 4 * 32, 3)
