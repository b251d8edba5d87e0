"""A step of training as the device sees it: nothing asks for a value and waits; compiled, it is the same."""

from __future__ import annotations

import shutil
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import tiny_config
from running import RUNTIME, Tiny, lines, start
from torch.utils.data import default_collate

from preprocess.shards import ShardSet
from train.config import Objective, Supervision
from train.loop import update
from train.model import build_model
from train.tasks import make_task


@pytest.mark.parametrize(
    "config",
    [
        tiny_config(objective=Objective(alpha=0.5)),
        tiny_config(objective=Objective(motion_loss="mse")),
        tiny_config(objective=Objective(motion_loss="cross_entropy")),
        tiny_config("small-regularised"),
        tiny_config("small-regularised", supervision=Supervision("scratch", motion_weight=0.0)),
    ],
    ids=["joint", "mse", "cross_entropy", "regularised", "labels"],
)
def test_a_step_reads_nothing_back(tiny: Tiny, monkeypatch: pytest.MonkeyPatch, config: Any) -> None:
    """On tensors without memory any .item(), .cpu(), bool(tensor) or shape that depends on values is an error; on a GPU
    it would make the host wait for all the work it has queued."""
    # Autocast knows no such device; it changes types, and waits for nothing.
    monkeypatch.setattr(torch, "autocast", lambda *_, **__: nullcontext())
    task = make_task(config, ShardSet(tiny[0]), None)
    model = build_model(config, 4).to("meta")
    optimiser = torch.optim.SGD(model.parameters(), 0.1)  # AdamW's counter of steps would lie on a meta tensor
    batch = {k: v.to("meta") for k, v in default_collate([task.data[0, i] for i in range(4)]).items()}
    found = update(model, task, optimiser, 0.1, task.inputs(batch), batch, "float32")
    loss = found["loss"]
    assert found["gradient_norm"].shape == loss.shape == () and loss.dtype == torch.float32
    for ask, refusal in (  # such a question would have shown
        (float, r"Tensor\.item\(\) cannot be called on meta tensors"),
        (bool, r"Tensor\.item\(\) cannot be called on meta tensors"),
        (torch.Tensor.cpu, "Cannot copy out of meta tensor"),
        (torch.Tensor.nonzero, "data-independent implementation does not exist"),
    ):
        with pytest.raises(RuntimeError, match=refusal):
            ask(loss)


@pytest.mark.soak  # half a minute to two of compilation
def test_compiled_steps_are_the_same(tiny: Tiny, tmp_path: Path) -> None:
    if not any(map(shutil.which, ("c++", "g++", "clang++"))):
        pytest.skip("no C++ compiler, which torch.compile needs on a CPU")
    # Two steps of what compiles soonest: one network, and no dropout, which would draw other numbers.
    config = tiny_config("small-scratch", batch_size=6, epochs=1, supervision=Supervision("scratch", dropout=0.0))
    config = replace(config, networks=replace(config.networks, backbone="c3d"))
    runtime = replace(RUNTIME, log_steps=1)
    start(tiny, tmp_path / "eager", config, runtime)
    start(tiny, tmp_path / "compiled", config, replace(runtime, compile=True))
    eager, compiled = (lines(tmp_path / name) for name in ("eager", "compiled"))
    assert [line["step"] for line in compiled] == [1, 2]
    for name in ("loss", "gradient_norm"):
        np.testing.assert_allclose([c[name] for c in compiled], [e[name] for e in eager], rtol=1e-3)
    # What is saved has the names of the eager network, whichever wrote it.
    start(tiny, tmp_path / "compiled", config, runtime)
