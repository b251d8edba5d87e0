"""What trackers show of a run: TensorBoard's files by its own reader, those of Weights & Biases by hand."""

from __future__ import annotations

import io
import json
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from running import RUNTIME, Tiny, run_again, start
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from train.watch import Watch, picture

WATCHED = replace(RUNTIME, watch="tensorboard")
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


def stop(_: torch.Tensor) -> torch.Tensor:
    raise KeyboardInterrupt


def test_a_run_that_goes_on_repeats_no_step(tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run_again(monkeypatch, 10, stop)
    with pytest.raises(KeyboardInterrupt):
        start(tiny, tmp_path, runtime=WATCHED)
    monkeypatch.undo()
    # Saved at 6, the end of the first epoch; step 8 has been written, and the picture of the second epoch.
    assert [step for step, _ in read(tmp_path)[0]["loss"]][-1] == 8 and len(read(tmp_path)[1]) == 2
    start(tiny, tmp_path, runtime=WATCHED)
    check(tmp_path)


def records(path: Path) -> list[Any]:
    """Of a file of Weights & Biases: seven bytes, then a LevelDB log. Its blocks of 32 KiB hold pieces of records with
    their checksum (4 bytes), length (2) and place in the record (1): all, first, middle, last."""
    from wandb.proto.wandb_internal_pb2 import Record  # takes a second, which collecting the tests should not

    data, at, found, whole = path.read_bytes(), 7, [], b""
    while at + 7 <= len(data):
        if (left := 32768 - at % 32768) < 7:
            at += left
            continue
        end, kind = at + 7 + int.from_bytes(data[at + 4 : at + 6], "little"), data[at + 6]
        if end > len(data):
            break
        whole += data[at + 7 : end]
        if kind in (1, 4):
            found.append(Record.FromString(whole))
            whole = b""
        at = end
    return found


def history(out: Path) -> tuple[set[str], list[tuple[int, dict[str, Any]]]]:
    """Of the one offline part of a run: its identities, and what was logged, by step."""
    (path,) = out.glob("wandb/offline-run-*/*.wandb")
    every = records(path)
    while not any(record.HasField("exit") for record in every):  # its writer is another process
        time.sleep(0.01)
        every = records(path)
    logged = [
        {item.nested_key[0]: json.loads(item.value_json) for item in record.history.item}
        for record in every
        if record.HasField("history")
    ]
    ids = {record.run.run_id for record in every if record.HasField("run")}
    return ids, [(values.pop("_step"), values) for values in logged]


def test_weights_and_biases_has_every_line(tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also of what was interrupted: the last part tells it all, and repeats no step."""
    import wandb

    monkeypatch.setenv("WANDB_MODE", "offline")
    watch = replace(RUNTIME, watch="wandb")
    with monkeypatch.context() as patch:
        run_again(patch, 10, stop)
        with pytest.raises(KeyboardInterrupt):
            start(tiny, tmp_path, runtime=watch)
    wandb.finish()
    (first,), told = history(tmp_path)
    assert [step for step, values in told if "loss" in values] == [2, 4, 6, 8]
    assert [step for step, values in told if "clips" in values] == [1, 7]
    (part,) = tmp_path.glob("wandb/offline-run-*")
    assert len(list(part.glob("files/media/images/*.png"))) == 2
    part.rename(tmp_path / "wandb" / "first")
    start(tiny, tmp_path, runtime=watch)
    lines = [json.loads(text) for text in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    (second,), told = history(tmp_path)
    assert first == second == (tmp_path / "wandb" / "id").read_text()
    scalars = [(step, values) for step, values in told if "loss" in values]
    assert [step for step, _ in scalars] == [line["step"] for line in lines]
    for (_, values), line in zip(scalars, lines):
        assert {name: values[tag] for name, tag in TAGS.items()} == {name: line[name] for name in TAGS}
    assert [step for step, values in told if "clips" in values] == [13]


@pytest.mark.parametrize("tracker", ["tensorboard", "wandb"])
def test_the_missing_package_is_named(
    tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tracker: str
) -> None:
    for name in [n for n in sys.modules if n.startswith("torch.utils.tensorboard")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, tracker, None)
    with pytest.raises(ValueError, match=rf"\({tracker}\): pip install '\.\[train,{tracker}\]', or leave the flag out"):
        start(tiny, tmp_path, runtime=replace(RUNTIME, watch=tracker))


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
    motion[:, -1, 2:, :, 1] = 0.2 * 0.1
    image = picture(torch.zeros(1, 3, 8, 4, 4), motion)
    columns = 4 + 2 * vectors + 4
    assert image.shape == (4, 4 * columns, 3)
    maps = image.reshape(4, columns, 4, 3).transpose(1, 0, 2, 3)
    assert (maps[4:-4] == 255).all(), "no motion"
    assert (maps[-4:-2] == 0).all() and (maps[-2:, :, :2] == 0).all() and (maps[-2:, :, 2:] == 51).all()


def test_the_picture_of_a_run_without_motion(tmp_path: Path) -> None:
    watch = Watch("tensorboard", tmp_path, 0)
    watch.clips(1, (torch.zeros(2, 3, 8, 32, 32), None, None))
    watch.close()
    ((_, image),) = read(tmp_path)[1]
    assert image.shape == (2 * 32, 4 * 32, 3)
