"""The diagnosis: networks of which it is known what they know, clips altered in time, what is counted and said."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import TINY, make_shards
from evaluating import CPU, Tiny, evaluate, options
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from eval import diagnose
from eval.diagnose import OPPOSITES, VIEWS, Diagnosis, load_module, vectors
from eval.results import Data, Foreign
from preprocess import synthetic
from preprocess.shards import ShardSet
from train.config import Pretraining
from train.draws import Sampling

CONFIG = Pretraining(sampling=Sampling(frames=8, stride=1), size=32)


@pytest.fixture(scope="module")
def scenes(tmp_path_factory: pytest.TempPathFactory) -> Tiny:
    """(shards, manifest) of scenes of three contexts and four headings: 48 to find among, 36 to ask with."""
    folder = tmp_path_factory.mktemp("scenes")
    table = synthetic.write(folder, synthetic.Scenes(contexts=3, motions=4, train=48, test=36, frames=16))
    make_shards(folder / "stage1", folder, list(table.paths), list(table.labels), settings=TINY)
    return folder / "stage1" / "shards", folder / "manifest.csv"


def ask(module: nn.Module, scenes: Tiny, config: Pretraining = CONFIG) -> Diagnosis:
    return diagnose.measure(Foreign(None, config, "mine", module), Data.open(*scenes), CPU)


# ---- networks of which it is known what they know


class MiddleColour(nn.Module):
    """Sees the mean colour of the middle frame, and nothing else."""

    def forward(self, x: Tensor) -> Tensor:
        return x[:, :, x.shape[2] // 2].mean((2, 3))


class Flow(nn.Module):
    """Sees one displacement for the whole clip: least squares over the derivatives in space and time. No colours."""

    def forward(self, x: Tensor) -> Tensor:
        grey = x.mean(1)  # (N, T, S, S)
        between = (grey[:, 1:] + grey[:, :-1]) / 2
        across, down = between.diff(dim=3)[:, :, :-1], between.diff(dim=2)[..., :-1]
        later = grey.diff(dim=1)[..., :-1, :-1]
        a = torch.stack([across, down], -1).flatten(1, 3)  # (N, P, 2)
        return torch.linalg.solve(a.mT @ a, -(a.mT @ later.flatten(1)[..., None]))[..., 0]  # (N, 2)


class Constant(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return torch.ones(len(x), 4, 2, 1, 1)


def test_a_network_that_sees_one_frame_knows_scenes_and_no_motion(scenes: Tiny) -> None:
    found = ask(MiddleColour(), scenes)
    assert found.shares["as it is"]["context"] > 80 and found.knows("context")
    assert not found.knows("motion") and found.shares["as it is"]["motion"] < 50
    assert found.shares["frozen"] == found.shares["as it is"]  # the very same frame
    assert all(found.loses("context", view) == "no" for view in VIEWS)
    assert diagnose.summary(found) == "it sees scenes, and no motion"


def test_a_network_that_sees_change_knows_motion_and_no_scenes(scenes: Tiny) -> None:
    found = ask(Flow(), scenes)
    assert found.shares["as it is"]["motion"] > 90 and found.knows("motion") and not found.knows("context")
    assert found.shares["reversed"]["opposite"] > 90 and found.shares["reversed"]["motion"] < 5 and found.turns()
    # Nothing moves: all queries find the same video.
    assert found.shares["frozen"] == pytest.approx({"context": 100 / 3, "motion": 25, "both": 100 / 12, "opposite": 25})
    assert found.loses("motion", "frozen") == "yes"
    assert found.shares["shuffled"]["motion"] < 75
    assert diagnose.summary(found) == "it sees motion, and no scenes"
    assert "loses motion when frozen: yes" in diagnose.verdict(found)
    assert "knows which way time runs: yes" in diagnose.verdict(found)


def test_a_network_that_sees_both(scenes: Tiny) -> None:
    class Both(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            parts = [MiddleColour()(x), Flow()(x)]
            return torch.cat([p / p.norm(dim=1, keepdim=True).clamp(min=1e-6) for p in parts], 1)

    found = ask(Both(), scenes)
    assert found.knows("context") and found.knows("motion") and found.shares["as it is"]["both"] > 60
    assert found.loses("context", "frozen") == "no" and found.loses("motion", "frozen") == "yes"
    assert diagnose.summary(found) == "it knows scenes and motion"


def test_constant_features_are_at_chance(scenes: Tiny) -> None:
    found = ask(Constant(), scenes)
    chance = {"context": 100 / 3, "motion": 25, "both": 100 / 12, "opposite": 25}
    assert found.chance == pytest.approx(chance) and (found.queries, found.gallery) == (36, 48)
    assert all(shares == pytest.approx(chance) for shares in found.shares.values())
    assert diagnose.summary(found) == "it knows neither scenes nor motion"


# ---- alterations


def test_views_by_hand() -> None:
    clips = torch.arange(2 * 3 * 5).view(2, 3, 5, 1, 1, 1)
    index = torch.tensor([4, 9])

    def frames(view: str) -> list[int]:
        return VIEWS[view](clips, index)[1, 2].flatten().tolist()

    assert frames("as it is") == [25, 26, 27, 28, 29]
    assert frames("reversed") == [29, 28, 27, 26, 25]
    assert frames("frozen") == [27] * 5
    assert sorted(frames("shuffled")) == [25, 26, 27, 28, 29]


def test_frames_are_shuffled_by_video_and_clip_alone() -> None:
    shuffled = VIEWS["shuffled"]
    clips = torch.arange(16).expand(6, 10, 16).clone()[..., None]
    found = shuffled(clips, torch.arange(6))
    assert torch.equal(found.sort(2).values, clips)
    assert torch.equal(shuffled(clips, torch.arange(6)), found)
    assert torch.equal(shuffled(clips[:2], torch.tensor([5, 3])), found[[5, 3]])
    orders = {tuple(order) for order in found.flatten(0, 1).flatten(1).tolist()}
    assert len(orders) == 60 and tuple(range(16)) not in orders
    # Every frame comes to every place.
    assert len({(place, frame) for order in orders for place, frame in enumerate(order)}) > 240


# ---- counting


def test_opposites_are_what_backwards_scenes_show() -> None:
    for name, opposite in OPPOSITES.items():
        heading, sense, fading = synthetic.MOTIONS[name]
        turned, against, rising = synthetic.MOTIONS[opposite]
        assert (against, rising) == (-sense, -fading)
        assert (heading is None and turned is None) or (heading + 180) % 360 == turned  # type: ignore[operator]
    assert set(OPPOSITES) == set(synthetic.MOTIONS)


@given(st.integers(0, 1 << 30), st.integers(1, 30), st.integers(1, 30), st.booleans())
def test_shares_are_those_of_a_loop(seed: int, q: int, g: int, pairs: bool) -> None:
    rng = np.random.default_rng(seed)
    motions = ["leftward", "rightward", "upward", "downward"] if pairs else ["leftward", "upward", "downward"]
    classes = [f"{c}/{m}" for c in "ab" for m in motions]
    query, gallery = rng.integers(0, len(classes), q), rng.integers(0, len(classes), g)
    nearest = {view: rng.integers(0, g, q) for view in VIEWS}
    found = diagnose.count(nearest, query, gallery, classes)
    opposite = {"leftward": "rightward", "rightward": "leftward", "upward": "downward", "downward": "upward"}
    hits: dict[str, Any] = {
        "context": lambda a, b: a[0] == b[0],
        "motion": lambda a, b: a[1] == b[1],
        "both": lambda a, b: a == b,
    } | ({"opposite": lambda a, b: opposite[a[1]] == b[1]} if pairs else {})
    assert list(found.chance) == list(hits)
    for name, hit in hits.items():
        every = [[hit(classes[a].split("/"), classes[b].split("/")) for b in gallery] for a in query]
        assert found.chance[name] == pytest.approx(100 * np.mean(every))
        for view, rows in nearest.items():
            chosen = [line[row] for line, row in zip(every, rows)]
            assert found.shares[view][name] == pytest.approx(100 * np.mean(chosen))


def stated(context: float, motion: float, frozen: float, back: tuple[float, float] = (20, 20)) -> Diagnosis:
    """360 queries at chance 16.7, with some shares given."""
    usual = {"context": context, "motion": motion, "both": 10.0, "opposite": 16.7}
    chance = {"context": 16.7, "motion": 16.7, "both": 2.8, "opposite": 16.7}
    shares = {
        "as it is": usual,
        "reversed": usual | {"motion": back[0], "opposite": back[1]},
        "frozen": usual | {"motion": frozen},
        "shuffled": usual | {"motion": 25.0},
    }
    return Diagnosis(360, 288, shares, chance)


def test_every_number_that_is_stored_has_its_chance() -> None:
    (row,) = stated(70.8, 55.3, 15.8).records()
    assert row["chance"].keys() == row["metrics"].keys()
    assert (row["chance"]["both R@1"], row["chance"]["motion R@1 frozen"]) == (2.8, 16.7)


def test_the_verdict_by_hand() -> None:
    # Three standard errors of 16.7 % of 360: 5.9.
    assert stated(0, 0, 0).limit("motion") == pytest.approx(16.7 + 3 * (0.167 * 0.833 / 360) ** 0.5 * 100)
    found = stated(70.8, 55.3, 15.8, (12.5, 53.1))
    assert diagnose.verdict(found).splitlines() == [
        "knows context: yes (70.8; chance 16.7, which luck may raise to 22.6)",
        "knows motion: yes (55.3; chance 16.7, which luck may raise to 22.6; frozen clips, which have none: 15.8)",
        "loses context when frozen: no (70.8 -> 70.8)",
        "loses motion when frozen: yes (55.3 -> 15.8)",
        "loses motion when shuffled: in part (55.3 -> 25.0)",
        "knows which way time runs: yes (reversed, 53.1 find the opposite motion and 12.5 their own)",
        "both at once: 10.0, where its context alone would give 11.8 and its motion alone 9.2",
        "In short: it knows scenes and motion",
    ]
    # A little above chance, and no more than in frozen clips: luck, or what single frames tell.
    assert stated(51.9, 22.8, 20.8).knows("motion") is False
    assert diagnose.summary(stated(51.9, 22.8, 20.8)) == "it sees scenes, and no motion"
    assert "by single frames" in diagnose.summary(stated(51.9, 60, 58))
    assert stated(20, 60, 30).knows("motion") and stated(20, 60, 30).loses("motion", "frozen") == "in part"
    assert diagnose.summary(stated(20, 60, 30)) == "it sees motion, and no scenes"
    assert diagnose.summary(stated(20, 20, 20)) == "it knows neither scenes nor motion"
    assert not stated(70, 60, 16, (30, 36)).turns() and not stated(70, 60, 16, (60, 10)).turns()
    assert "which way time runs" not in diagnose.verdict(stated(70, 17, 16))


# ---- what cannot be diagnosed


def test_other_data_and_clips_without_an_order_are_refused(tiny: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match="clips of 2 frames have no order"):
        ask(Constant(), tiny, replace(CONFIG, sampling=Sampling(frames=2)))
    monkeypatch.setattr(ShardSet, "classes", ["jump", "run", "sit", "walk"])
    with pytest.raises(ValueError, match=r"not labelled context/motion \(but jump, run, sit, …\).*`make scenes`"):
        ask(Constant(), tiny)


def test_motions_without_opposites_have_no_such_column(tiny: Tiny) -> None:
    found = ask(Constant(), tiny)
    assert list(found.chance) == ["context", "motion", "both"]
    assert "\n| queries | context | motion | both |\n" in found.markdown("mine")
    assert "which way time runs" not in diagnose.verdict(found)


def test_features_and_maps_are_taken() -> None:
    maps = torch.arange(2 * 3 * 2 * 2 * 2).view(2, 3, 2, 2, 2)
    assert vectors(maps).tolist() == [[3.5, 11.5, 19.5], [27.5, 35.5, 43.5]]
    assert vectors(maps[:, :, 0, 0, 0]).tolist() == [[0, 8, 16], [24, 32, 40]]
    with pytest.raises(ValueError, match=r"gives a tensor of shape \(2, 3, 2, 2\); it must give features"):
        vectors(maps[..., 0])
    with pytest.raises(ValueError, match="gives tuple; it must give"):
        vectors((maps,))


USERS = """
import torch
from torch import nn

class Mean(nn.Module):
    def forward(self, x):
        return x.mean((2, 3, 4))

class Maps(nn.Conv3d):
    def __init__(self):
        super().__init__(3, 4, 1)

class Flat(nn.Module):
    def forward(self, x):
        return x.mean((1, 2, 3, 4))

class Merged(nn.Module):
    def forward(self, x):
        return x.transpose(1, 2).flatten(0, 1).mean((2, 3))

class Large(nn.Linear):
    def __init__(self):
        super().__init__(224, 3)

def broken():
    raise KeyError("weights")

number = 3
def none():
    return None
"""


def test_networks_by_import_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "users_networks.py").write_text(USERS)
    (tmp_path / "users_fault.py").write_text("import a_library_that_is_not_there")
    monkeypatch.syspath_prepend(tmp_path)
    for name in ("Mean", "Maps"):
        assert not load_module(f"users_networks:{name}", frames=8, size=32).network.training
    for name, message in (
        ("users_networks", "give package.module:factory"),
        ("users_networks:", "give package.module:factory"),
        ("users_nets:Mean", r"users_nets cannot be imported \(ModuleNotFoundError: .*PYTHONPATH"),
        ("users_fault:Mean", "No module named 'a_library_that_is_not_there'"),
        ("users_networks:Median", "users_networks has no callable 'Median'"),
        ("users_networks:number", "no callable 'number'"),
        ("users_networks:broken", r"users_networks:broken\(\) raised KeyError: 'weights'; it is called without"),
        ("users_networks:none", "returned NoneType; it must return an nn.Module"),
        ("users_networks:Flat", r"gives a tensor of shape \(2,\); it must give features \(N, C\)"),
        ("users_networks:Merged", r"gives features \(16, 3\) for 2 clips"),
        ("users_networks:Large", r"raised RuntimeError for clips \(2, 3, 8, 32, 32\): .*--frames and --size"),
    ):
        with pytest.raises(ValueError, match=message):
            load_module(name, frames=8, size=32)


# ---- the command


def test_a_run_is_diagnosed(
    scenes: Tiny, joint_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    picture = tmp_path / "new" / "diagnosis.png"
    assert evaluate(monkeypatch, "diagnose", joint_run, *options(scenes), "--picture", picture) == 0
    said = capsys.readouterr().out
    path = Path(said.split("stored in ")[1].splitlines()[0])
    row = json.loads(path.read_text())
    assert path.parent == joint_run / "results" and path.name.startswith("diagnosis-")
    assert (row["kind"], row["recipe"], row["queries"], row["gallery"]) == ("diagnosis", "small", 36, 48)
    assert len(row["metrics"]) == 4 * 4 and row["chance"]["motion R@1"] == pytest.approx(25)
    shares = [row["metrics"][f"{name} R@1 frozen"] for name in ("context", "motion", "both", "opposite")]
    assert "| frozen | " + " | ".join(f"{s:.1f}" for s in shares) + " |" in said
    assert "knows context: " in said and "In short: " in said and row["protocol"] in said
    assert picture.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    assert evaluate(monkeypatch, "diagnose", joint_run, *options(scenes), "--size", "64", "--out", tmp_path) == 1
    assert "--size, --out: a run has its own" in capsys.readouterr().err


def test_a_network_of_ones_own_is_diagnosed(
    scenes: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    (tmp_path / "users_backbone.py").write_text(USERS)
    monkeypatch.syspath_prepend(tmp_path)
    mine = ["diagnose", "--module", "users_backbone:Mean", "--frames", "8", "--size", "32", *options(scenes)]
    assert evaluate(monkeypatch, *mine) == 0
    assert "not stored: --out FOLDER keeps it" in capsys.readouterr().out
    assert evaluate(monkeypatch, *mine, "--out", tmp_path / "mine") == 0
    said = capsys.readouterr().out
    row = json.loads(Path(said.split("stored in ")[1].strip()).read_text())
    assert (row["recipe"], row["weights"], row["kind"]) == ("users_backbone:Mean", "given", "diagnosis")
    assert "8 frames at stride 1" in row["protocol"] and "centre 32" in row["protocol"]
    # Means over time know no order: reversed and shuffled clips change nothing.
    shares = {view: [v for k, v in row["metrics"].items() if k.endswith(view)] for view in ("reversed", "shuffled")}
    assert shares["reversed"] == shares["shuffled"]
    for wrong, complaint in (
        ([*mine, tmp_path], "and not both"),
        ([*mine, "--weights", "initial"], "--weights initial: a --module has its own"),
        (["diagnose", *options(scenes)], "and not both"),
        ([*mine[:3], "--frames", "0", *options(scenes)], "frames is 0; choose 1 or more"),
    ):
        assert evaluate(monkeypatch, *wrong) == 1
        assert complaint in capsys.readouterr().err
