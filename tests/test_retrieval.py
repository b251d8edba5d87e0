"""Retrieval: who the neighbours are, what the recalls are, what is stored and printed, and how it is drawn."""

from __future__ import annotations

import hashlib
import json
import math
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import simplejpeg
from conftest import ROOT
from evaluating import CPU, Tiny, evaluate, options
from hypothesis import given, settings
from hypothesis import strategies as st
from matplotlib.colors import to_rgba
from matplotlib.figure import Figure
from sklearn.neighbors import NearestNeighbors

from eval import neighbours, retrieve
from eval.features import video_features
from eval.results import Data, about
from eval.retrieve import Retrieval, beyond, chance, groups, hits, labellings, nearest, standard_error
from preprocess.manifest import Manifest
from preprocess.shards import ShardSet
from train.trained import load_run

# ---- neighbours and recalls


def naive_recall(queries: np.ndarray, gallery: np.ndarray, q_labels: list[Any], g_labels: list[Any], k: int) -> float:
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
    queries, gallery = (rng.standard_normal((n, 6)) * rng.uniform(0.1, 10, (n, 1)) for n in (q, g))
    q_labels, g_labels = rng.integers(0, 4, q), rng.integers(0, 4, g)
    order = nearest(queries.astype(np.float32), gallery.astype(np.float32), k)
    learned = NearestNeighbors(n_neighbors=min(k, g), metric="cosine", algorithm="brute").fit(gallery)
    np.testing.assert_array_equal(order, learned.kneighbors(queries, return_distance=False))
    expected = naive_recall(queries, gallery, q_labels.tolist(), g_labels.tolist(), k)
    found = hits(order, q_labels, g_labels)
    assert found.shape == order.shape and 100 * found[:, -1].mean() == pytest.approx(expected)


def test_neighbours_come_by_falling_cosine_and_ties_by_row() -> None:
    rows = np.array([[0, 2], [3, 3], [5, 0], [-1, 0], [0, 0.1]], np.float32)
    order = nearest(np.array([[1, 0.1], [0, 7]], np.float32), rows, 9)
    assert order.tolist() == [[2, 1, 0, 4, 3], [0, 4, 1, 2, 3]]
    nothing = nearest(np.zeros((1, 2), np.float32), rows, 2)  # a dead network has no direction, and no error either
    assert nothing.tolist() == [[0, 1]]


def test_recall_and_chance_by_hand() -> None:
    order = np.array([[0, 1, 2], [2, 1, 0], [1, 0, 2]])
    queries, gallery = np.array([7, 7, 8]), np.array([7, 7, 9])
    assert hits(order, queries, gallery).tolist() == [[True] * 3, [False, True, True], [False] * 3]
    assert chance(queries, gallery) == pytest.approx(100 * (2 + 2 + 0) / 9)
    # Of 5 in the gallery 2 are right: both draws miss with 3/5 · 2/4; of the other query none is right.
    assert chance(np.array([7, 8]), np.array([7, 7, 9, 9, 9]), 2) == pytest.approx(100 * (1 - 3 / 5 * 2 / 4) / 2)


@pytest.mark.parametrize(
    ("manifest", "train", "test", "largest"),
    [("ucf101_split1", 101 * 18, 101 * 7, 7), ("hmdb51_split1", 1433, 590, 62)],
)
def test_groups_are_the_recordings_of_real_manifests(manifest: str, train: int, test: int, largest: int) -> None:
    rows = Manifest.read(ROOT / "data_manifests" / f"{manifest}.csv")
    group, subsets = groups(rows.paths), np.array(rows.subsets)
    of_train, of_test = ({*group[subsets == name].tolist()} for name in ("train", "test"))
    # Official splits keep recordings apart, which shows were two of them one group.
    assert (len(of_train), len(of_test), np.bincount(group).max()) == (train, test, largest)
    assert not of_train & of_test and len({*zip(group.tolist(), rows.labels)}) == group.max() + 1


def test_videos_of_other_names_are_groups_of_their_own() -> None:
    alike = ["A/v_A_g03_c01.avi", "A/v_A_g03_c12.avi", "B/v_A_g03_c01.avi", "A/v_A_g04_c01.avi"]
    assert groups(alike).tolist() == [0, 0, 2, 1]
    others = ["a/v_c01.avi", "a/v_c02.avi", "a/g03_c02_x.avi", "a/g03_c03_x.avi", "0001.mp4", "0002.mp4"]
    assert len({*groups(others).tolist()}) == len(others) and groups(others).dtype == np.int64


@given(st.integers(0, 1 << 30), st.integers(100, 200), st.sampled_from([0.0, 0.3, 3.0]))
@settings(max_examples=15)
def test_errors_are_those_of_the_closed_form(seed: int, recordings: int, alike: float) -> None:
    """The cluster-robust error of a mean; `alike` is how much more groups differ than clips of one group."""
    rng = np.random.default_rng(seed)
    group = np.repeat(np.arange(recordings), rng.integers(1, 8, recordings))
    hit = rng.random(len(group)) < 1 / (1 + np.exp(alike * rng.standard_normal(recordings)[group]))
    sums = [sum(hit[group == g] - hit.mean()) for g in range(recordings)]
    assert standard_error(hit, group) == pytest.approx(100 * math.hypot(*sums) / len(hit), rel=0.1)


def test_clips_of_one_recording_count_once() -> None:
    hit = np.arange(200) % 4 == 0
    binomial = 100 * math.sqrt(0.25 * 0.75 / 200)
    alone = standard_error(hit, np.arange(200))
    assert alone == pytest.approx(binomial, rel=0.05) and alone == standard_error(hit, np.arange(200))
    # Five clips each that are all found or all missed tell no more than one: √5 times what a thousand clips would have.
    assert standard_error(np.repeat(hit, 5), np.repeat(np.arange(200), 5)) == pytest.approx(binomial, rel=0.05)
    assert standard_error(hit, np.zeros(200, int)) == 0


def test_labels_of_two_parts_are_scored_three_times() -> None:
    found = {k: v.tolist() for k, v in labellings(["a/x", "a/y", "b/x"]).items()}
    assert found == {"context": [0, 0, 1], "motion": [0, 1, 0], "both": [0, 1, 2]}
    for classes in (["run", "jump"], ["a/x", "jump"], ["a/x/1"], []):
        assert {k: v.tolist() for k, v in labellings(classes).items()} == {"class": list(range(len(classes)))}


def test_retrieval_finds_what_its_features_say(tiny: Tiny, joint_run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    loaded, data = load_run(joint_run), Data.open(*tiny)
    found = retrieve.measure(loaded, data, machine=CPU)
    sides = {name: data.subset(name) for name in ("test", "train")}
    for name, videos in (("test", found.query), ("train", found.gallery)):
        assert [data.shards.paths[v] for v in videos] == list(sides[name].manifest.paths)
    queries, gallery = (video_features(loaded, side, machine=CPU).vectors for side in sides.values())
    for name, part in {"context": slice(0, 1), "motion": slice(1, 2), "both": slice(0, 2)}.items():
        labels = [["/".join(label.split("/")[part]) for label in side.manifest.labels] for side in sides.values()]
        for k in (1, 5):
            expected = naive_recall(queries.astype(float), gallery.astype(float), *labels, k)
            assert found.recalls[name][k] == pytest.approx(expected)
            others = [sum(a != b for b in labels[1]) for a in labels[0]]
            missed = [math.comb(n, k) / math.comb(len(labels[1]), k) for n in others]
            assert found.chance[name][k] == pytest.approx(100 * (1 - sum(missed) / len(missed)))
            p = found.recalls[name][k]  # eight videos of no known recording
            assert found.errors[name][k] == pytest.approx(math.sqrt(p * (100 - p) / 8), rel=0.1)
    assert found.groups == 8
    monkeypatch.setattr(retrieve, "KS", (1, 11, 12, 20))
    assert list(retrieve.measure(loaded, data, machine=CPU).recalls["both"]) == [1, 11]


# ---- what is stored and printed


def test_a_result_says_where_it_came_from(tiny: Tiny, joint_run: Path) -> None:
    loaded, data = load_run(joint_run), Data.open(*tiny)
    origin = about(loaded, data)
    hashes = {
        "config_sha256": loaded.config.sha256(),
        "manifest_sha256": data.manifest.sha256,
        "shards_sha256": data.shards.sha256(),
        "shard_settings_sha256": data.shards.settings.sha256(),
        "weights_sha256": loaded.weights_sha256(),
    }
    assert {k: origin[k] for k in hashes} == hashes and all(len(h) == 64 for h in hashes.values())
    known = {"recipe": "small", "backbone": "r3d10", "weights": "last", "epoch": 1, "seed": 0, "dataset": "split"}
    known |= {"split": "", "trained_on": "split", "subset": "train", "pretraining": "", "pretrained_on": ""}
    assert {k: origin[k] for k in known} == known and len(origin["training_sha256"]) == 64
    trained_with = f"{data.manifest.subset('train').sha256} {data.shards.settings.sha256()}"
    assert origin["training_settings_sha256"] == hashlib.sha256(trained_with.encode()).hexdigest()
    assert about(loaded, Data(data.shards, data.manifest, "ucf101_split3"))["split"] == "3"


def test_retrieve_prints_its_protocol_and_stores_the_number(
    tiny: Tiny, joint_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    picture = tmp_path / "new" / "neighbours.png"
    asked = ["retrieve", joint_run, "--network", "motion", "--picture", picture]
    assert evaluate(monkeypatch, *asked, *options(tiny)) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("8 queries, 12 in the gallery; M-Network, 10 evenly spread clips")
    by_chance = next(line for line in lines if line.startswith("| by chance | 50.0 | "))
    assert by_chance.count("|") == lines[1].count("|") == 2 + 3 * 3 and str(picture) in lines  # R@1, 5, 10 of 12
    errors = next(line for line in lines if line.startswith("| standard error, 8 groups resampled | "))
    path = Path(lines[-1].removeprefix("stored in "))
    assert path.parent == joint_run / "results" and path.name.startswith("retrieval-")
    row = json.loads(path.read_text())
    assert (row["kind"], row["network"], row["queries"], row["gallery"]) == ("retrieval", "motion", 8, 12)
    assert row["protocol"] in lines[0] and row["chance"]["both R@1"] == 25 and row["groups"] == 8
    assert errors.split("|")[2:-1] == [f" {row['errors'][name]:.1f} " for name in row["metrics"]]
    heads = [f"{name} R@{k}" for name in ("context", "motion", "both") for k in (1, 5, 10)]
    assert list(row["metrics"]) == heads and lines[1] == f"|  | {' | '.join(heads)} |"
    assert lines[3] == "| small, last, epoch 1 | " + " | ".join(f"{v:.1f}" for v in row["metrics"].values()) + " |"
    header = picture.read_bytes()[:24]
    assert header[:8] == b"\x89PNG\r\n\x1a\n"
    # Five columns of the query and three neighbours; four classes, hence four rows.
    assert int.from_bytes(header[16:20], "big") == pytest.approx(100 * (1.9 * 8 + 0.6), abs=2)
    assert int.from_bytes(header[20:24], "big") == pytest.approx(100 * (4 * (1.9 * 92 / 112 + 0.32) + 0.9), abs=2)
    assert evaluate(monkeypatch, "retrieve", tiny[0], *options(tiny)) == 1
    assert "holds no run (run.json is missing)" in capsys.readouterr().err


def test_compare_tells_runs_of_the_same_name_apart(
    tiny: Tiny, joint_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    copy = shutil.copytree(joint_run, tmp_path / joint_run.name)
    picture = tmp_path / "picture.png"
    assert evaluate(monkeypatch, "compare", joint_run, copy, *options(tiny), "--picture", picture) == 0
    said = capsys.readouterr().out
    table = [line for line in said.splitlines() if line.startswith("| ")]
    assert table[0] == "|  | context R@1 | motion R@1 | both R@1 |"
    assert [line.split("|")[1].strip() for line in table[6:]] == [f"less {joint_run}", "untrained", str(copy)]
    assert table[8].split("|")[2:] == [" +0.0 ± 0.0 "] * 3 + [""]  # the same network
    *networks, by_chance, error = [line.split("|")[1].strip() for line in table[1:6]]
    assert networks == ["untrained", str(joint_run), str(copy)]
    assert (by_chance, error) == ("by chance", "largest standard error, 8 groups resampled")
    assert table[2].split("|")[2:] == table[3].split("|")[2:]
    assert table[4] == "| by chance | 50.0 | 50.0 | 25.0 |" and picture.exists()
    assert said.count("stored in ") == 3
    assert evaluate(monkeypatch, "compare", *options(tiny)) == 1
    assert "nothing to compare: give the folders" in capsys.readouterr().err


def test_of_several_networks_the_largest_error_is_printed(tiny: Tiny) -> None:
    first = replace(finding(Data.open(*tiny)), chance={"class": {1: 40.0}})
    found = {str(n): replace(first, hit={"class": {1: np.arange(8) < n}}) for n in (1, 4, 8)}
    largest = max(of.errors["class"][1] for of in found.values())
    assert largest == found["4"].errors["class"][1] == pytest.approx(100 * math.sqrt(0.25 / 8), rel=0.05)
    assert retrieve.compared(found).endswith(f"| largest standard error, 8 groups resampled | {largest:.1f} |")


def test_a_difference_is_of_the_same_queries(tiny: Tiny) -> None:
    """Forty recordings of five clips each: one network finds what the other does, and a tenth of them beside it."""
    recording = np.repeat(np.arange(40), 5)
    less, more = recording % 2 == 0, (recording % 2 == 0) | (recording % 10 == 1)
    common = {"query": np.arange(200), "group": recording, "chance": {"class": {1: 5.0}}}
    first = replace(finding(Data.open(*tiny)), **common)
    drawn = {"untrained": ~more, "less": less, "more": more}
    found = {name: replace(first, hit={"class": {1: hit}}) for name, hit in drawn.items()}
    ((by, error),) = beyond(found["more"], found["less"])["class"].values()
    assert by == pytest.approx(10) and error == pytest.approx(100 * math.sqrt(0.1 * 0.9 / 40), rel=0.05)
    *_, untrained, last = retrieve.compared(found, against="less").splitlines()
    assert last == f"| more | +10.0 ± {error:.1f} |" and untrained.startswith("| untrained | -10.0 ± ")


def test_a_damaged_frame_is_an_error_of_one_line(
    tiny: Tiny, joint_run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def damage(*_: object, **__: object) -> Callable[..., Any]:
        raise ValueError("Error reading JPEG header")

    monkeypatch.setattr(simplejpeg, "decode_jpeg", damage)
    assert evaluate(monkeypatch, "retrieve", joint_run, *options(tiny, workers=1)) == 1
    errors = capsys.readouterr().err.splitlines()
    assert len(errors) == 1 and errors[0].startswith("error: ") and "is damaged" in errors[0]


# ---- pictures


def finding(data: Data, places: int = 3) -> Retrieval:
    """Eight queries, each of which finds the first training videos."""
    order = np.tile(np.arange(places), (8, 1))
    return Retrieval(data, np.arange(12, 20), np.arange(12), order, "video", {}, {}, np.arange(8), "protocol")


@pytest.mark.parametrize("plain", [False, True])
def test_neighbours_are_marked_by_what_they_share_with_their_query(
    tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, plain: bool
) -> None:
    drawn: list[Any] = []
    save = Figure.savefig
    monkeypatch.setattr(Figure, "savefig", lambda figure, out, **how: drawn.append(figure) or save(figure, out, **how))
    data = Data.open(*tiny)
    if plain:
        monkeypatch.setattr(ShardSet, "classes", ["Lunges", "JumpingJack", "Archery", "TaiChi"])
    # Labels of the tiny videos: a/right, b/right, a/left, b/left, and again; the alphabet's order numbers them.
    neighbours.draw({"untrained": finding(data), "mine": finding(data, 2)}, tmp_path / "picture.png")
    (figure,) = drawn
    said = [a.get_title() for a in figure.axes]
    legend = figure.texts[0].get_text()
    assert len(said) == 4 * (5 + 3 + 2)
    heads = [t.get_text() for a in figure.axes for t in a.texts]
    assert heads == [*neighbours.HEADS, "nearest videos, untrained", "nearest videos, mine"]
    if plain:
        assert {*said} == {
            "",
            *(f"query: {c}" for c in ShardSet.classes),  # type: ignore[attr-defined]
            *(f"{mark} {c}" for mark in "✓✗" for c in ("JumpingJack", "TaiChi", "Lunges")),
        }
        assert "½" not in legend and "another class" in legend
    else:
        assert {"✓ a/left", "½ a/left", "✗ a/left", "query: b/right"} <= {*said} and "½ amber" in legend
    for axes in figure.axes:
        colour = {"✓": neighbours.FOUND, "½": neighbours.HALF, "✗": neighbours.MISSED}.get(axes.get_title()[:1])
        assert axes.spines["left"].get_edgecolor() == to_rgba(colour or neighbours.GREY)


def test_a_moving_clip_is_the_middle_of_its_video(tiny: Tiny) -> None:
    shards = ShardSet(tiny[0])
    frames, rate = neighbours.moving(shards, 13)
    shard, index = shards.locate(13)
    first = int(shard.frame_offset[index])  # 40 frames at 25 a second: 31 of them from the fifth on, every other one
    expected = [simplejpeg.decode_jpeg(shard.frame_jpeg(first + 4 + 2 * n), colorspace="RGB") for n in range(16)]
    np.testing.assert_array_equal(frames, expected)
    assert rate == 12.5
    arrows, _ = neighbours.moving(shards, 13, "arrows")
    assert len(arrows) == 16 and arrows[0].shape == (184, 224, 3)


@pytest.mark.parametrize("moving", [True, False])
def test_motion_has_the_colour_of_its_direction(tiny: Tiny, moving: bool) -> None:
    shards = ShardSet(tiny[0])
    channels = {}
    for video in (12, 14):  # labelled a/right and a/left
        pictures = neighbours.moving(shards, video, "motion")[0] if moving else neighbours.still(shards, video)[4:]
        high, wide = pictures[0].shape[:2]
        inner = (slice(high // 5, -high // 5), slice(wide // 5, -wide // 5))
        channels[neighbours.label_name(shards, video)] = np.mean([p[inner].mean((0, 1)) for p in pictures], 0)
    right, left = channels["a/right"], channels["a/left"]
    assert right[0] > right[1] + 30 and right[0] > right[2] + 30  # red
    assert left[2] > left[0] + 30  # towards azure
