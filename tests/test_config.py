"""Configurations: what they refuse, how they are written, told apart and added to."""

from __future__ import annotations

import json
from dataclasses import dataclass, field

import pytest
from conftest import tiny_config
from hypothesis import given
from hypothesis import strategies as st

from train import config
from train.config import BEFORE, Config, Objective, Pretraining, here_and_there
from train.draws import Cropping


@given(
    st.builds(
        tiny_config,
        objective=st.builds(Objective, st.floats(0, 1)),
        cropping=st.builds(Cropping, area=st.tuples(st.floats(0.1, 0.5), st.floats(0.5, 1))),
        seed=st.integers(0, 1 << 40),
        epochs=st.integers(1, 500),
    )
)
def test_a_config_survives_json(one: Config) -> None:
    back = Config.from_json(one.to_json())
    assert back == one and back.sha256() == one.sha256() and one.differences(back) == {}


def test_unknown_and_missing_keys_list_the_valid_ones() -> None:
    values = json.loads(tiny_config().to_json())
    values["objective"]["beta"] = values["objective"].pop("alpha")
    with pytest.raises(ValueError, match=r"config\.objective: \['alpha', 'beta'\] .*keys are alpha, motion_loss"):
        Config.from_json(json.dumps(values))


def test_differences_are_named_as_on_the_command_line() -> None:
    found = tiny_config().differences(tiny_config(objective=Objective(alpha=0.25), epochs=4))
    assert found == {"objective.alpha": (0.5, 0.25), "epochs": (3, 4)}
    assert here_and_there(found) == "epochs: 4 there, 3 here; objective.alpha: 0.25 there, 0.5 here"


@dataclass(frozen=True)
class GrownObjective(Objective):
    """`Objective` after a year: runs without the field smoothed nothing, new ones do by default."""

    smoothing: float = field(default=0.1, metadata={BEFORE: 0.0})


@dataclass(frozen=True)
class GrownPretraining(Pretraining):
    objective: GrownObjective = field(default_factory=GrownObjective)
    second: Cropping = field(default_factory=Cropping, metadata={BEFORE: Cropping(flip=0.0)})


def test_what_is_added_later_changes_no_hash_of_old_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    old = tiny_config(objective=Objective(alpha=0.25))
    monkeypatch.setitem(config.TASKS, "pretraining", GrownPretraining)
    read = Config.from_json(old.to_json())
    assert isinstance(read, GrownPretraining)
    assert (read.objective.alpha, read.objective.smoothing, read.second.flip) == (0.25, 0.0, 0.0)
    assert read.to_json() == old.to_json() and read.sha256() == old.sha256()
    new = read.changed({"objective.smoothing": 0.1, "second.flip": 0.5})
    assert Config.from_json(new.to_json()) == new and new.sha256() != old.sha256()
    assert new.differences(read) == {"objective.smoothing": (0.1, 0.0), "second.flip": (0.5, 0.0)}
