"""Checkpoints: written whole or not at all; what cannot be trusted is refused, and said why."""

from __future__ import annotations

import json
import os
import resource
import threading
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from train import checkpoint


def state(size: int = 4, **changes: Any) -> dict[str, Any]:
    model = nn.Linear(size, 2)
    optimiser = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
    values = {"model": model.state_dict(), "optimiser": optimiser.state_dict(), "pending": [{"loss": torch.ones(())}]}
    return values | {"config": "{}", "step": 3, "epoch": 0.5} | changes


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    checkpoint.save(tmp_path / "checkpoint.pt", state())
    return tmp_path / "checkpoint.pt"


def test_what_is_saved_comes_back(tmp_path: Path) -> None:
    values = state()
    checkpoint.save(tmp_path / "checkpoint.pt", values)
    back = checkpoint.load(tmp_path / "checkpoint.pt")
    assert back.pop("format") == "context-motion-checkpoint" and back.pop("version") == 2
    assert back.pop("config") == values.pop("config")
    torch.testing.assert_close(back, values, rtol=0, atol=0)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["checkpoint.json", "checkpoint.pt"]
    readable = json.loads((tmp_path / "checkpoint.json").read_text())
    assert readable == {"config": "{}", "step": 3, "epoch": 0.5}


def test_weights_have_one_name_each(tmp_path: Path) -> None:
    (tmp_path / "epoch-0005.pt").touch()
    assert checkpoint.weights_path(tmp_path, "last") == tmp_path / "checkpoint.pt"
    assert checkpoint.weights_path(tmp_path, "epoch-0005") == tmp_path / "epoch-0005.pt"
    for name in ("checkpoint", "../other/checkpoint", "epoch-5", "initial"):
        with pytest.raises(ValueError, match=rf"has no weights '{name}', but initial, last, epoch-0005"):
            checkpoint.weights_path(tmp_path, name)


def whole(**changes: Any) -> dict[str, Any]:
    """What `save` writes."""
    return {"format": checkpoint.FORMAT, "version": checkpoint.VERSION} | state(**changes)


def cut(keep: float) -> Callable[[Path], None]:
    return lambda path: os.truncate(path, int(keep * path.stat().st_size))


def damage(path: Path) -> None:
    """One bit of a tensor."""
    content = bytearray(path.read_bytes())
    content[content.index(checkpoint.load(path)["model"]["weight"].numpy().tobytes()) + 10] ^= 1
    path.write_bytes(content)


def archive(path: Path) -> None:
    with zipfile.ZipFile(path, "w") as other:
        other.writestr("notes.txt", "a zip file of something else")


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        *((cut(keep), r"checkpoint\.pt is truncated, or no checkpoint at all") for keep in (0.0, 0.01, 0.5, 0.999)),
        (lambda path: path.write_text("a text\n"), "no checkpoint at all"),
        (damage, r"checkpoint\.pt is damaged: \S+ in it does not fit its checksum"),
        (lambda path: path.unlink(), "does not exist: has the run been started"),
        (archive, "cannot be read, it may be damaged"),
        (lambda path: torch.save({"state_dict": {}}, path), "is not a checkpoint of this program"),
        (lambda path: torch.save(torch.zeros(3), path), "is not a checkpoint of this program"),
        (lambda path: torch.save(whole(version=99), path), "has checkpoint version 99; this program reads 2"),
        (
            lambda path: checkpoint.save(path, state(config=None, step="three")),
            "not a whole checkpoint: config, step missing or of another type",
        ),
    ],
)
def test_what_cannot_be_trusted_is_refused(saved: Path, spoil: Callable[[Path], None], message: str) -> None:
    spoil(saved)
    with pytest.raises(ValueError, match=message):
        checkpoint.load(saved)


class Intruder:
    """What unpickles as a call of the attacker's choice."""

    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self) -> tuple[Any, tuple[str]]:
        return os.mkdir, (str(self.target),)


def test_a_checkpoint_that_carries_code_is_refused_and_the_code_not_run(tmp_path: Path) -> None:
    path, target = tmp_path / "checkpoint.pt", tmp_path / "broken-in"
    torch.save(whole(extra=Intruder(target)), path)
    with pytest.raises(ValueError, match=r"is refused: it holds more than tensors and plain values.*mkdir") as caught:
        checkpoint.load(path)
    assert not target.exists()
    assert "\n" not in str(caught.value)
    torch.load(path, weights_only=False)  # the trap works
    assert target.exists()
    torch.save(whole(extra=threading.Event), path)
    with pytest.raises(ValueError, match="is refused"):
        checkpoint.load(path)


def test_weights_and_optimisers_that_do_not_fit_are_refused(saved: Path) -> None:
    values = checkpoint.load(saved)
    for module, what in ((nn.Linear(5, 2), "size mismatch for weight"), (nn.Linear(4, 2, bias=False), "bias")):
        with pytest.raises(ValueError, match=f"holds another architecture: .*{what}"):
            checkpoint.load_weights(module, values["model"], saved)
    other = torch.optim.SGD([torch.zeros(3, requires_grad=True)], 0.1)
    with pytest.raises(ValueError, match="holds another optimiser's state"):
        checkpoint.load_optimiser(other, values, saved)
    del values["optimiser"]
    with pytest.raises(ValueError, match="holds weights alone"):
        checkpoint.load_optimiser(other, values, saved)


def test_an_optimiser_goes_on_by_the_kernels_of_its_own_device(saved: Path) -> None:
    """A GPU's are fused; a run may begin on a CPU, and end on a GPU."""
    fused = torch.optim.SGD(nn.Linear(4, 2).parameters(), 0.1, momentum=0.9, fused=True)
    checkpoint.load_optimiser(fused, checkpoint.load(saved), saved)
    assert [group["fused"] for group in fused.param_groups] == [True]


def test_a_failed_write_leaves_the_checkpoint_before(saved: Path) -> None:
    before = saved.read_bytes()
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    for limit in (0, 1000, 50_000):  # at the beginning, in the middle of the tensors
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
        try:
            with pytest.raises(OSError, match=r"checkpoint\.pt could not be written .* before is kept. Make room"):
                checkpoint.save(saved, state(size=10_000))
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        assert saved.read_bytes() == before
        assert sorted(p.name for p in saved.parent.iterdir()) == ["checkpoint.json", "checkpoint.pt"]
    assert checkpoint.load(saved)["step"] == 3
