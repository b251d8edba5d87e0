"""Evaluation: which clips are seen, who the neighbours are, what the recalls are, and where the numbers are kept."""

from __future__ import annotations

import json
import math
import shutil
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import simplejpeg
import torch
from conftest import ROOT, tiny_config
from hypothesis import given
from hypothesis import strategies as st
from matplotlib.colors import to_rgba
from matplotlib.figure import Figure
from sklearn.neighbors import NearestNeighbors
from torch import Tensor, nn

from eval import __main__ as command
from eval import features, gallery, retrieve, rows
from eval.retrieve import Retrieval, chance, labellings, neighbours, recall
from preprocess.manifest import Manifest
from preprocess.shards import ShardSet
from train import checkpoint, data, loop, tasks
from train.config import Objective, Runtime
from train.model import PretrainingModel
from train.runs import Origin
from train.trained import load_run

Tiny = tuple[Path, Path]
RUNTIME = Runtime(device="cpu", loader_workers=0)
IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))


@pytest.fixture(scope="module")
def run(tiny: Tiny, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One epoch of training, both tasks; its weights are kept."""
    out = tmp_path_factory.mktemp("evaluated") / "joint"
    config = tiny_config(batch_size=4, epochs=1)
    rows, origin = Manifest.read(tiny[1]).subset("train"), Origin("small", "split", "train")
    loop.train(config, replace(RUNTIME, keep_epochs=(1,)), tiny[0], rows, out, origin)
    return out


def look(run: features.Run, tiny: Tiny, subset: str = "test", network: features.Network = "video") -> np.ndarray:
    rows = Manifest.read(tiny[1]).subset(subset)
    return features.video_features(run, ShardSet(tiny[0]), rows, network, device="cpu", workers=0)[0]


def equal_states(a: nn.Module, b: dict[str, Tensor]) -> bool:
    return list(a.state_dict()) == list(b) and all(torch.equal(a.state_dict()[k], b[k]) for k in b)


# ---- neighbours and recalls


def naive_recall(queries: np.ndarray, gallery: np.ndarray, q_labels: list[int], g_labels: list[int], k: int) -> float:
    found = 0
    for query, label in zip(queries.tolist(), q_labels):
        cosines = []
        for row, other in zip(gallery.tolist(), g_labels):
            product = math.fsum(a * b for a, b in zip(query, row))
            cosines.append((product / math.hypot(*query) / math.hypot(*row), other))
        found += label in [other for _, other in sorted(cosines, reverse=True)[:k]]
    return 100 * found / len(q_labels)


@given(st.integers(0, 1 << 30), st.integers(1, 9), st.integers(1, 40), st.sampled_from([1, 3, 10]))
def test_recalls_are_those_of_a_naive_loop_and_of_scikit_learn(seed: int, q: int, g: int, k: int) -> None:
    rng = np.random.default_rng(seed)
    queries, rows = (rng.standard_normal((n, 6)) * rng.uniform(0.1, 10, (n, 1)) for n in (q, g))
    q_labels, g_labels = rng.integers(0, 4, q), rng.integers(0, 4, g)
    order = neighbours(queries.astype(np.float32), rows.astype(np.float32), k)
    learned = NearestNeighbors(n_neighbors=min(k, g), metric="cosine", algorithm="brute").fit(rows)
    np.testing.assert_array_equal(order, learned.kneighbors(queries, return_distance=False))
    expected = naive_recall(queries, rows, q_labels.tolist(), g_labels.tolist(), k)
    assert recall(order, q_labels, g_labels, k) == pytest.approx(expected)


def test_neighbours_come_by_falling_cosine_and_ties_by_row() -> None:
    rows = np.array([[0, 2], [3, 3], [5, 0], [-1, 0], [0, 0.1]], np.float32)
    order = neighbours(np.array([[1, 0.1], [0, 7]], np.float32), rows, 9)
    assert order.tolist() == [[2, 1, 0, 4, 3], [0, 4, 1, 2, 3]]
    nothing = neighbours(np.zeros((1, 2), np.float32), rows, 2)  # a dead network has no direction, and no error either
    assert nothing.tolist() == [[0, 1]]


def test_recall_counts_a_query_once() -> None:
    order = np.array([[0, 1, 2], [2, 1, 0], [1, 0, 2]])
    queries, rows = np.array([7, 7, 8]), np.array([7, 7, 9])
    assert recall(order, queries, rows, 1) == pytest.approx(100 / 3)
    assert recall(order, queries, rows, 2) == pytest.approx(200 / 3)
    assert recall(order, queries, rows, 3) == pytest.approx(200 / 3)


def test_labels_of_two_parts_are_scored_three_times() -> None:
    found = {k: v.tolist() for k, v in labellings(["a/x", "a/y", "b/x"]).items()}
    assert found == {"context": [0, 0, 1], "motion": [0, 1, 0], "both": [0, 1, 2]}
    for classes in (["run", "jump"], ["a/x", "jump"], ["a/x/1"], []):
        assert {k: v.tolist() for k, v in labellings(classes).items()} == {"class": list(range(len(classes)))}


def test_chance_by_hand(tiny: Tiny) -> None:
    # Labels of the tiny videos: a/right, b/right, a/left, b/left, and again.
    train, test = ("00.mp4", "01.mp4", "02.mp4", "04.mp4"), ("12.mp4", "13.mp4")  # a/r, b/r, a/l, a/r; a/r, b/r
    table = Manifest(train + test, ("",) * 6, ("train",) * 4 + ("test",) * 2)
    assert chance(ShardSet(tiny[0]), table) == pytest.approx({"context": 50, "motion": 75, "both": 37.5})


# ---- features


class Recorder(nn.Module):
    """Stands for a network: keeps what it is shown, and returns the upper left pixel of every frame."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[Tensor] = []

    def forward(self, x: Tensor) -> Tensor:
        self.seen.append(x)
        return x[..., :1, :1]


def test_ten_clips_reach_the_network_at_their_places(tiny: Tiny, run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def numbered(shard: Any, frames: np.ndarray) -> np.ndarray:
        settings = shard.settings  # every video has 40 frames
        return np.broadcast_to(
            (frames % 40).astype(np.uint8)[:, None, None, None],
            (len(frames), settings.frame_height, settings.frame_width, 3),
        ).copy()

    monkeypatch.setattr(data, "decode_frames", numbered)
    loaded = load_run(run)
    loaded.model.video = recorder = Recorder()  # type: ignore[assignment]
    found = look(loaded, tiny)
    mean, std = (torch.tensor(x).view(1, 3, 1, 1, 1) for x in IMAGENET)
    seen = torch.cat(recorder.seen) * std + mean
    assert seen.shape == (8 * 10, 3, 8, 32, 32)
    # (40 - 15) / 9 = 2.78 frames apart, rounded: a clip of 8 frames at stride 2 spans 15.
    starts = torch.tensor([0, 3, 6, 8, 11, 14, 17, 19, 22, 25])
    expected = (starts[:, None] + 2 * torch.arange(8)).repeat(8, 1)  # (videos clips, T)
    shown = (seen * 255)[:, :, :, 5, 5]
    torch.testing.assert_close(shown, expected[:, None].float().expand(-1, 3, -1), rtol=0, atol=1e-3)
    # Pooled over time and space, averaged over clips: 12.5 + 7 on average.
    average = (19.5 / 255 - mean.flatten()) / std.flatten()
    np.testing.assert_allclose(found, average.expand(8, 3).numpy(), atol=1e-4)


def test_features_do_not_depend_on_the_batch_nor_on_the_time(
    tiny: Tiny, run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded = load_run(run)
    for network in ("video", "iframe", "motion"):
        found = look(loaded, tiny, network=network)
        assert found.dtype == np.float32 and found.shape == (8, 32) and np.isfinite(found).all()
        assert np.ptp(found, axis=0).max() > 0
        np.testing.assert_array_equal(look(loaded, tiny, network=network), found)
        monkeypatch.setattr(features, "VIDEOS_A_BATCH", 3)
        np.testing.assert_allclose(look(loaded, tiny, network=network), found, rtol=1e-4, atol=1e-5)
        monkeypatch.undo()
    assert not np.allclose(look(loaded, tiny), look(load_run(run, "initial"), tiny))


def test_each_network_gives_features_of_its_own(tiny: Tiny, run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    loaded = load_run(run)
    shapes: dict[str, tuple[int, ...]] = {"video": (3, 8), "iframe": (3, 1), "motion": (2, 8)}
    networks: list[features.Network] = ["video", "iframe", "motion"]
    for network in networks:
        recorder = Recorder()
        setattr(*((loaded.model.motion, "network") if network == "motion" else (loaded.model, network)), recorder)
        look(loaded, tiny, network=network)
        assert {tuple(x.shape[1:3]) for x in recorder.seen} == {shapes[network]}
        assert sum(len(x) for x in recorder.seen) == 80


def test_untrained_means_the_weights_before_the_first_step(
    tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    caught: dict[str, Tensor] = {}

    def catch(_: object, network: nn.Module, *__: object) -> None:
        caught.update({k: v.clone() for k, v in network.state_dict().items()})
        raise KeyboardInterrupt

    monkeypatch.setattr(tasks.PretrainingTask, "loss", catch)
    with pytest.raises(KeyboardInterrupt):
        loop.train(tiny_config(seed=3), RUNTIME, tiny[0], Manifest.read(tiny[1]).subset("train"), tmp_path)
    torch.manual_seed(99)
    untrained = load_run(tmp_path, "initial")
    assert equal_states(untrained.model, caught) and untrained.epoch == 0
    with pytest.raises(ValueError, match="does not exist: has the run been started"):
        load_run(tmp_path, "last")


def test_trained_weights_are_those_of_the_checkpoint(run: Path, tmp_path: Path) -> None:
    last = load_run(run)
    assert equal_states(last.model, checkpoint.load(run / "checkpoint.pt")["model"]) and last.epoch == 1
    kept = load_run(run, "epoch-0001")
    assert kept.weights_sha256() == last.weights_sha256()
    assert load_run(run, "initial").weights_sha256() != last.weights_sha256()
    with pytest.raises(ValueError, match=r"epoch-0002\.pt does not exist"):
        load_run(run, "epoch-0002")
    with pytest.raises(ValueError, match="holds no run"):
        load_run(tmp_path)
    shutil.copytree(run, tmp_path / "mixed")
    state = checkpoint.load(run / "checkpoint.pt")
    other = json.dumps(json.loads(state["config"]) | {"seed": 5})
    checkpoint.save(tmp_path / "mixed" / "checkpoint.pt", state | {"config": other})
    with pytest.raises(ValueError, match=r"checkpoint\.pt is not of the run .* \(seed: 5 there, 0 here\)"):
        load_run(tmp_path / "mixed")


@pytest.mark.parametrize(("alpha", "network", "name"), [(0.0, "motion", "M-Network"), (1.0, "iframe", "I-Network")])
def test_a_network_the_run_lacks_is_an_error(
    tiny: Tiny, tmp_path: Path, alpha: float, network: features.Network, name: str
) -> None:
    config = tiny_config(objective=Objective(alpha=alpha))
    missing = features.Run(tmp_path, config, "small", "initial", 0.0, PretrainingModel(config))
    with pytest.raises(ValueError, match=rf"has no {name}: small trains none"):
        look(missing, tiny, network=network)


# ---- what is kept


def test_retrieval_finds_what_its_features_say(tiny: Tiny, run: Path) -> None:
    loaded, table, shards = load_run(run), Manifest.read(tiny[1]), ShardSet(tiny[0])
    found = retrieve.retrieve(loaded, shards, table, device="cpu", workers=0, ks=(1, 5))
    assert [shards.paths[v] for v in found.query] == list(table.subset("test").paths)
    assert [shards.paths[v] for v in found.gallery] == list(table.subset("train").paths)
    queries, rows = look(loaded, tiny, "test"), look(loaded, tiny, "train")
    for name in ("context", "motion", "both"):
        part = {"context": slice(0, 1), "motion": slice(1, 2), "both": slice(0, 2)}[name]
        numbers = [
            [hash(tuple(label.split("/")[part])) for label in table.subset(subset).labels]
            for subset in ("test", "train")
        ]
        for k in (1, 5):
            expected = naive_recall(queries.astype(float), rows.astype(float), *numbers, k)
            assert found.recalls[name][k] == pytest.approx(expected)


def test_videos_without_labels_cannot_be_scored(tiny: Tiny, run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    nameless = np.zeros((4, 2), np.float32), np.array([0, -1, 0, 0]), np.arange(4)
    monkeypatch.setattr(features, "video_features", lambda *_, **__: nameless)
    with pytest.raises(ValueError, match="need labels"):
        retrieve.retrieve(load_run(run), ShardSet(tiny[0]), Manifest.read(tiny[1]))


def result(number: int = 0) -> Retrieval:
    order = np.arange(8)[:, None] % 4 + np.arange(4)
    return Retrieval(np.arange(12, 20), np.arange(12), order, {"class": {1: float(number), 5: 50.0}})


def test_a_result_says_where_it_came_from(tiny: Tiny, run: Path, tmp_path: Path) -> None:
    shutil.copytree(run, tmp_path / "run")
    loaded, shards, table = load_run(tmp_path / "run"), ShardSet(tiny[0]), Manifest.read(tiny[1])
    origin = rows.about(loaded, shards, table, "split")
    path = rows.write(tmp_path / "run", origin | retrieve.row(result(25), loaded.config, "video"))
    assert path.parent == tmp_path / "run" / "results"
    row = json.loads(path.read_text())
    hashes = {
        "config_sha256": loaded.config.sha256(),
        "manifest_sha256": table.sha256,
        "shards_sha256": shards.sha256(),
        "weights_sha256": loaded.weights_sha256(),
    }
    assert {k: row[k] for k in hashes} == hashes and all(len(h) == 64 for h in hashes.values())
    assert row["metrics"] == {"class R@1": 25.0, "class R@5": 50.0}
    known = {"kind": "retrieval", "recipe": "small", "backbone": "r3d10", "network": "video", "weights": "last"}
    known |= {"epoch": 1, "dataset": "split", "split": "", "trained_on": "split", "subset": "train", "seed": 0}
    assert {k: row[k] for k in known} == known and (row["queries"], row["gallery"]) == (8, 12)
    assert row["pretraining"] == row["pretrained_on"] == "" and len(row["training_sha256"]) == 64
    assert "10 evenly spread clips" in row["protocol"] and "8 frames at stride 2" in row["protocol"]
    assert rows.about(loaded, shards, table, "ucf101_split3")["split"] == "3"


def test_a_table_has_a_row_a_run_and_a_column_a_number() -> None:
    rows = {"untrained": {"context": {1: 10, 5: 20.06}}, "joint": {"context": {1: 99.96, 5: 100}}}
    assert retrieve.table(rows, (1, 5)).splitlines() == [
        "| | context R@1 | context R@5 |", "|---|---|---|", "| untrained | 10.0 | 20.1 |", "| joint | 100.0 | 100.0 |",
    ]  # fmt: skip


# ---- the picture and the command line


@pytest.mark.parametrize("places", [4, 2])
def test_the_picture_shows_queries_and_neighbours(tiny: Tiny, tmp_path: Path, places: int) -> None:
    found = replace(result(), order=result().order[:, :places])
    out = gallery.draw(ShardSet(tiny[0]), {"untrained": found, "joint": found}, tmp_path / "new" / "picture.png")
    header = out.read_bytes()[:24]
    assert header[:8] == b"\x89PNG\r\n\x1a\n"
    width, height = int.from_bytes(header[16:20], "big"), int.from_bytes(header[20:24], "big")
    # Five columns of the query and three neighbours for each network; four classes, hence four rows.
    assert width == pytest.approx(100 * (1.9 * 11 + 0.9), abs=2)
    assert height == pytest.approx(100 * (4 * (1.9 * 92 / 112 + 0.32) + 0.9), abs=2)


@pytest.mark.parametrize("plain", [False, True])
def test_neighbours_are_marked_by_what_they_share_with_their_query(
    tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, plain: bool
) -> None:
    drawn: list[Any] = []
    save = Figure.savefig
    monkeypatch.setattr(Figure, "savefig", lambda figure, out, **how: drawn.append(figure) or save(figure, out, **how))
    shards = ShardSet(tiny[0])
    if plain:
        monkeypatch.setattr(ShardSet, "classes", ["Lunges", "JumpingJack", "Archery", "TaiChi"])
    # Labels of the tiny videos: a/right, b/right, a/left, b/left, and again. Every query finds the first three.
    found = Retrieval(np.arange(12, 16), np.arange(12), np.tile(np.arange(3), (4, 1)), {})
    gallery.draw(shards, {"mine": found}, tmp_path / "picture.png")
    (figure,) = drawn
    said = {a.get_title() for a in figure.axes} - {""}
    legend = figure.texts[0].get_text()
    if plain:  # numbers of a/left, a/right, b/left, b/right in the alphabet's order
        assert said == {
            *(f"query: {c}" for c in ShardSet.classes),  # type: ignore[attr-defined]
            *(f"{mark} {c}" for mark in "✓✗" for c in ("JumpingJack", "TaiChi", "Lunges")),
        }
        assert "½" not in legend and "another class" in legend
    else:
        assert {"✓ a/left", "½ a/left", "✗ a/left", "query: b/right"} <= said and "½" in legend
    for axes in figure.axes:
        colour = {"✓": gallery.FOUND, "½": gallery.HALF, "✗": gallery.MISSED}.get(axes.get_title()[:1], "#444444")
        assert axes.spines["left"].get_edgecolor() == to_rgba(colour)


def evaluate(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> int:
    monkeypatch.setattr(sys, "argv", ["python -m eval", *map(str, arguments)])
    monkeypatch.chdir(ROOT)
    return command.main()


def test_retrieve_prints_its_protocol_and_stores_the_number(
    tiny: Tiny, run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ["--shards", tiny[0], "--manifest", tiny[1], "--device", "cpu", "--workers", "0"]
    picture = tmp_path / "gallery.png"
    asked = ["--run", run, "--network", "motion", "--picture", picture]
    assert evaluate(monkeypatch, "retrieve", *asked, *options) == 0 and picture.exists()
    said = capsys.readouterr().out
    assert said.startswith("8 queries, 12 in the gallery; M-Network, 10 evenly spread clips")
    assert "R@1 by chance: context 50.0, motion 50.0, both 25.0" in said
    stored = json.loads(Path(said.split("stored in ")[1].strip()).read_text())
    assert stored["network"] == "motion"
    assert f"| {stored['metrics']['both R@20']:.1f} |" in said and stored["metrics"]["both R@20"] == 100
    assert evaluate(monkeypatch, "retrieve", "--run", tiny[0], *options) == 1
    assert "holds no run (run.json is missing)" in capsys.readouterr().err


def test_compare_tells_runs_of_the_same_name_apart(
    tiny: Tiny, run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(run, tmp_path / "joint")
    picture = tmp_path / "picture.png"
    options = ["--shards", tiny[0], "--manifest", tiny[1], "--device", "cpu", "--workers", "0"]
    assert evaluate(monkeypatch, "compare", run, tmp_path / "joint", *options, "--picture", picture) == 0
    said = capsys.readouterr().out
    assert said.splitlines()[0] == "| | context R@1 | motion R@1 | both R@1 |"
    names = [line.split("|")[1].strip() for line in said.splitlines()[2:5]]
    assert names == ["untrained", str(run), str(tmp_path / "joint")]
    assert "chance: context 50.0, motion 50.0, both 25.0" in said and picture.exists()
    assert said.count("stored in ") == 3
    assert evaluate(monkeypatch, "compare", *options) == 1
    assert "nothing to compare: give the folders" in capsys.readouterr().err


def test_a_damaged_frame_is_an_error_of_one_line(
    tiny: Tiny, run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def damage(*_: object, **__: object) -> Callable[..., Any]:
        raise ValueError("Error reading JPEG header")

    monkeypatch.setattr(simplejpeg, "decode_jpeg", damage)
    options = ["--shards", tiny[0], "--manifest", tiny[1], "--device", "cpu", "--workers", "1"]
    assert evaluate(monkeypatch, "retrieve", "--run", run, *options) == 1
    errors = capsys.readouterr().err.splitlines()
    assert len(errors) == 1 and errors[0].startswith("error: ") and "is damaged" in errors[0]
