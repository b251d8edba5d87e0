"""Result rows: written side by side without loss, read back from files and from CSV, and left out where hashes tell."""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from conftest import ROOT
from evaluating import HASH, example
from hypothesis import given, settings
from hypothesis import strategies as st
from running import ready_process

from eval import results
from eval.publish import collect
from eval.results import Row
from train import runs
from train.recipes import RECIPES


def sound(found: list[Row], **known: Any) -> list[Row]:
    return collect.check(found, **known)[0]


def reasons(found: list[Row], **known: Any) -> list[str]:
    return [reason for _, reason in collect.check(found, **known)[1]]


# ---- writing


def _write_for_ever(folder: Path) -> None:
    number = 0
    while True:
        results.write(folder, example(metrics={"top-1": float(number)}))
        number += 1


def test_a_killed_writer_leaves_whole_rows(tmp_path: Path) -> None:
    writer = ready_process(_write_for_ever, tmp_path)
    while len(list(tmp_path.glob("results/*.json"))) < 20:
        time.sleep(0.01)
    writer.kill()
    writer.join()
    assert writer.exitcode == -signal.SIGKILL
    found = collect.read([tmp_path])
    assert not reasons(found)
    assert sorted(r["metrics"]["top-1"] for r in found) == [float(n) for n in range(len(found))]


def test_a_file_is_named_by_its_content(tmp_path: Path) -> None:
    path = results.write(tmp_path, example())
    assert path.parent == tmp_path / "results"
    assert path.name == f"retrieval-{hashlib.sha256(path.read_bytes()).hexdigest()[:16]}.json"
    assert results.write(tmp_path, example()) == path and len(list(path.parent.iterdir())) == 1


@pytest.mark.parametrize(
    ("row", "complaint"),
    [
        ({k: v for k, v in example().items() if k not in ("seed", "commit")}, "commit, seed missing"),
        (example(kind="guess"), "its kind is 'guess'; there are retrieval, classification"),
        (example(metrics={"top-1": float("nan")}), "top-1 of a wrong type, or not a number"),
        (example(epoch="60", split=1), "split, epoch of a wrong type"),
        (example(errors={"both R@1": None}), "both R@1 of a wrong type"),
        (example(chance=25.0), "chance: no object"),
    ],
)
def test_what_is_no_row_is_refused(tmp_path: Path, row: Row, complaint: str) -> None:
    with pytest.raises(ValueError, match=complaint):
        results.write(tmp_path, row)
    assert not list(tmp_path.iterdir())


# ---- reading


def test_rows_come_back_from_any_depth_with_their_files(tmp_path: Path) -> None:
    paths = [results.write(tmp_path / place, example(seed=n)) for n, place in enumerate(["a", "b/c", "b/d/e"])]
    (tmp_path / "a" / "results" / ".half.partial").write_text("{")
    found = collect.read([tmp_path])
    assert [(r["file"], r["seed"]) for r in found] == [(str(p), n) for n, p in enumerate(paths)]
    assert {k: found[0][k] for k in results.KEYS} == {k: example()[k] for k in results.KEYS}


numbers = st.floats(0, 100) | st.integers(0, 100)
texts = st.text(st.characters(codec="utf-8", exclude_characters="\r"), max_size=20)


@settings(max_examples=20)
@given(st.dictionaries(st.sampled_from(["top-1", "top-5", "class R@1"]), numbers, min_size=1), numbers, texts)
def test_a_csv_keeps_every_number_and_text(
    tmp_path_factory: pytest.TempPathFactory, metrics: dict[str, float], epoch: float, text: str
) -> None:
    folder = tmp_path_factory.mktemp("csv")
    beside = {"errors": {k: v / 9 for k, v in metrics.items()}, "chance": dict(list(metrics.items())[1:])}
    results.write(folder, example(metrics=metrics, epoch=epoch, machine=text, per_class=[1.0, 2.0], **beside))
    results.write(folder, example(seed=1, errors={}, chance={}))
    first = collect.read([folder])
    collect.export(first, folder / "results.csv")
    second = collect.read([folder / "results.csv"])
    every = (*results.KEYS, "errors", "chance")
    plain = [sorted((r["id"], *((k, r[k]) for k in every)) for r in some) for some in (first, second)]
    assert plain[0] == plain[1] and not reasons(second)
    assert len(sound(first + second)) == 2  # the same rows twice
    assert all(row["file"].endswith(".json") for row in sound(second + first))


def test_a_csv_is_the_same_whatever_the_locale(tmp_path: Path) -> None:
    rows = collect.read([results.write(tmp_path, example(machine="Zürich")).parents[1]])
    code = "import sys, json, pathlib; from eval.publish import collect; "
    code += "collect.export(json.loads(sys.argv[1]), pathlib.Path(sys.argv[2]))"
    plain = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0", "PYTHONPATH": str(ROOT)}
    out = tmp_path / "results.csv"
    subprocess.run([sys.executable, "-c", code, json.dumps(rows), out], env=os.environ | plain, check=True)
    assert collect.read([out])[0]["machine"] == "Zürich"


def test_another_csv_is_refused(tmp_path: Path) -> None:
    (tmp_path / "results.csv").write_text("recipe,value\nscenes,3\n")
    with pytest.raises(ValueError, match=r"no CSV of results: .*backbone.* unknown or missing"):
        collect.read([tmp_path / "results.csv"])


# ---- checking


def test_a_row_that_was_changed_is_named(tmp_path: Path) -> None:
    good, bad, cut = (results.write(tmp_path, example(seed=n)) for n in range(3))
    bad.write_text(bad.read_text().replace("25.5", "99.5"))
    cut.write_text(cut.read_text()[:40])
    kept, refused = collect.check(collect.read([tmp_path]))
    assert [row["file"] for row in kept] == [str(good)]
    why = {row["file"]: reason for row, reason in refused}
    assert set(why) == {str(bad), str(cut)}
    assert "its name is not the hash of what it holds" in why[str(bad)] and "cannot be read" in why[str(cut)]


@pytest.mark.parametrize(
    ("old", "new", "reason"), [("25.5", "99.5", "changed after it was written"), ("60.0", "x", "cannot be read")]
)
def test_a_line_of_a_csv_that_was_changed_is_named(tmp_path: Path, old: str, new: str, reason: str) -> None:
    results.write(tmp_path, example())
    results.write(tmp_path, example(seed=1, metrics={"top-1": 3.0}, epoch=5))
    collect.export(collect.read([tmp_path]), tmp_path / "results.csv")
    text = (tmp_path / "results.csv").read_text()
    (tmp_path / "results.csv").write_text(text.replace(old, new))
    found = collect.read([tmp_path / "results.csv"])
    assert [row["seed"] for row in sound(found)] == [1]
    (why,) = reasons(found)
    assert reason in why


def read_back(tmp_path: Path, *some: Row) -> list[Row]:
    for number, row in enumerate(some):
        results.write(tmp_path / f"run{number}", row)
    return collect.read([tmp_path])


@pytest.mark.parametrize(
    ("wrong", "reason"),
    [
        ({"config_sha256": HASH}, r"settings \(config_sha256\) are not those of the recipe scenes"),
        ({"recipe": "gone"}, "no recipe is called 'gone'"),
        (
            {"manifest_sha256": "cd" * 32},
            r"another manifest \(manifest_sha256 cdcdcdcd, that of most rows on manifest abababab\)",
        ),
        ({"shard_settings_sha256": "cd" * 32}, "its shards were made with other settings of stage 1 .* abababab"),
        ({"training_settings_sha256": "cd" * 32}, "trained with another manifest, or on shards of other settings"),
    ],
)
def test_a_row_with_a_wrong_hash_is_named_and_left_out(tmp_path: Path, wrong: dict[str, str], reason: str) -> None:
    found = read_back(tmp_path, example(), example(seed=1), example(seed=2, **wrong))
    assert [row["seed"] for row in sound(found)] == [0, 1]
    (why,) = reasons(found)
    assert re.search(reason, why)


def test_of_equal_camps_the_later_stays(tmp_path: Path) -> None:
    later = example(seed=1, manifest_sha256="cd" * 32, when="2026-01-02T03:04:06+00:00")
    found = read_back(tmp_path, example(), later, example(dataset="elsewhere", manifest_sha256="ef" * 32))
    assert sorted((row["seed"], row["dataset"]) for row in sound(found)) == [(0, "elsewhere"), (1, "manifest")]


def test_training_on_other_rows_of_a_manifest_is_another_thing(tmp_path: Path) -> None:
    every = [example(seed=n, subset="all", training_settings_sha256="cd" * 32) for n in (1, 2)]
    assert len(sound(read_back(tmp_path, example(subset="train"), *every))) == 3


def test_seeds_that_began_from_other_data_are_left_out(tmp_path: Path) -> None:
    """Of Kinetics-400 any manifest will do, but one for all; others are told apart by name."""
    recipe, other = "finetune-ucf101-c3d", {"pretraining_settings_sha256": "cd" * 32}
    for pretraining, kept in (("pretrain-k400-c3d", [0, 1]), ("pretrain-ucf101-c3d", [0, 1, 2])):
        began = {"recipe": recipe, "pretraining": pretraining, "epoch": 120.0}
        found = [example(**began, seed=n, pretrained_on="k400") for n in (0, 1)]
        found.append(example(**began, seed=2, pretrained_on="mine", **other))
        folder = tmp_path / pretraining
        assert [row["seed"] for row in sound(read_back(folder, *found))] == kept
    (why,) = reasons(collect.read([tmp_path / "pretrain-k400-c3d"]))
    assert why.startswith("the run it began from saw another manifest") and "most rows on pretrain-k400-c3d ab" in why


def test_shards_of_other_bytes_are_comparable(tmp_path: Path) -> None:
    other = {"shards_sha256": "cd" * 32, "training_sha256": "cd" * 32}
    assert len(sound(read_back(tmp_path, example(), example(seed=1, **other)))) == 2


def test_errors_and_chance_are_no_part_of_a_rows_name(tmp_path: Path) -> None:
    """A CSV of an earlier program, without their columns, has the rows of the runs, whose files say more."""
    beside: dict[str, Any] = {"errors": {"both R@1": 2.5}, "chance": {"both R@1": 2.8, "both R@5": 13.1}}
    results.write(tmp_path / "run", example(**beside))
    collect.export(collect.read([tmp_path / "run"]), tmp_path / "new.csv")
    lines = [line.split(",") for line in (tmp_path / "new.csv").read_text().splitlines()]
    assert [line[-5:-1] for line in lines] == [
        ["metric", "value", "error", "chance"],
        ["both R@1", "25.5", "2.5", "2.8"],
        ["both R@5", "50.0", "", "13.1"],
    ]
    (tmp_path / "old.csv").write_text("".join(",".join([*line[:-3], line[-1]]) + "\n" for line in lines))
    (row,) = sound(collect.read([tmp_path / "old.csv", tmp_path / "run"]))
    assert row["errors"] == beside["errors"] and row["file"].endswith(".json")


def test_rows_of_earlier_programs_are_read_and_keep_their_names(tmp_path: Path) -> None:
    """As they are committed, and as runs of those programs hold them: without the columns that came later."""
    committed = collect.read([ROOT / "eval" / "results.csv"])
    assert committed and all("fault" not in row for row in committed)
    collect.export(committed, tmp_path / "again.csv")
    assert {row["id"] for row in sound(collect.read([tmp_path / "again.csv"]))} == {row["id"] for row in committed}
    row = {key: value for key, value in example().items() if key not in results.LATER}
    text = json.dumps(row)
    path = tmp_path / "run" / "results" / f"retrieval-{results.digest(text)}.json"
    path.parent.mkdir(parents=True)
    path.write_text(text)
    results.write(tmp_path / "new", example(seed=1, shard_settings_sha256="cd" * 32))
    found = collect.read([tmp_path])
    assert len(sound(found)) == 2  # what a row does not say is not held against it
    assert found[1]["id"] == results.identity(row | dict.fromkeys(results.LATER, ""))
    collect.export(found, tmp_path / "rows.csv")
    assert {row["id"] for row in sound(collect.read([tmp_path / "rows.csv"]))} == {row["id"] for row in found}


@pytest.mark.parametrize(("what", "key"), [("manifests", "manifest_sha256"), ("settings", "shard_settings_sha256")])
def test_data_at_hand_decide_alone(tmp_path: Path, what: str, key: str) -> None:
    found = read_back(tmp_path, example(), example(seed=1), example(seed=2, **{key: "cd" * 32}))
    known: Any = {what: {"manifest": "cd" * 32}}
    assert [row["seed"] for row in sound(found, **known)] == [2]
    assert [f"({key} abababab, that of manifest at hand cdcdcdcd)" in r for r in reasons(found, **known)] == [True] * 2
    elsewhere: Any = {name: {"other": "cd" * 32} for name in known}
    assert [row["seed"] for row in sound(found, **elsewhere)] == [0, 1]


def test_other_programs_networks_need_no_recipe(tmp_path: Path) -> None:
    assert sound(read_back(tmp_path, example("gone", kind="diagnosis", weights="given")))


def test_replaced_weights_are_named(tmp_path: Path) -> None:
    results.write(tmp_path / "run", example(weights_sha256="01" * 32))
    results.write(tmp_path / "run", example(dataset="other", when="2026-01-03T00:00:00+00:00"))
    results.write(tmp_path / "run", example(epoch=5.0, weights="epoch-0005", weights_sha256="02" * 32))
    results.write(tmp_path / "another", example(weights_sha256="03" * 32))
    for number, network in enumerate(("a:build", "b:build")):
        given = {"kind": "diagnosis", "weights": "given", "weights_sha256": f"{number + 4:02}" * 32}
        results.write(tmp_path / "foreign", example("gone", **given) | {"recipe": network})
    found = collect.read([tmp_path])
    assert {row["weights_sha256"][:2] for row in sound(found)} == {"ab", "02", "03", "04", "05"}
    assert ["have been replaced since" in why for why in reasons(found)] == [True]


@pytest.mark.parametrize("value", [math.inf, -1.0, 1e9, math.nan])
def test_what_is_no_percentage_is_refused(tmp_path: Path, value: float) -> None:
    with pytest.raises(ValueError, match="top-1"):
        results.write(tmp_path, example(metrics={"top-1": value}))
    csv = tmp_path / "rows.csv"
    results.write(tmp_path / "run", example())
    collect.export(sound(collect.read([tmp_path / "run"])), csv)
    csv.write_text(csv.read_text().replace("25.5", str(value)))
    assert len(reasons(collect.read([csv]))) == 1


def test_a_csv_that_was_cut_short_is_named(tmp_path: Path) -> None:
    csv = tmp_path / "rows.csv"
    results.write(tmp_path / "run", example())
    collect.export(sound(collect.read([tmp_path / "run"])), csv)
    text = csv.read_text()
    for end in range(text.index("\n") + 2, len(text) - 1, 7):
        csv.write_text(text[:end])
        assert sound(collect.read([csv])) == [], end


def test_a_run_says_in_what_it_is_not_its_recipe(tmp_path: Path) -> None:
    config = RECIPES["scenes"].config.changed({"epochs": 3})
    results.write(tmp_path, example(config_sha256=config.sha256()))
    about: dict[str, Any] = {name: kind() for name, kind in runs.KEYS.items()}
    about |= {"config": json.loads(config.to_json()), "config_sha256": config.sha256()}
    (tmp_path / "run.json").write_text(json.dumps(about))
    (why,) = reasons(collect.read([tmp_path]))
    assert why.endswith("not those of the recipe scenes (epochs: 3 there, 60 here)")
    (tmp_path / "run.json").write_text(json.dumps(about | {"config_sha256": HASH}))
    (why,) = reasons(collect.read([tmp_path]))
    assert f"not those of the run in {tmp_path}" in why
    (tmp_path / "run.json").write_text("{")
    (why,) = reasons(collect.read([tmp_path]))
    assert "cannot be read" in why


def test_the_commit_is_this_programs_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not that of a checkout in which it happens to be installed."""
    git = ["git", "-c", "user.name=a", "-c", "user.email=a@b", "-C", str(tmp_path)]
    for arguments in (["init", "-q"], ["commit", "-q", "--allow-empty", "-m", "theirs"]):
        subprocess.run([*git, *arguments], check=True)
    installed = tmp_path / "venv" / "runs.py"
    installed.parent.mkdir()
    installed.write_text("")
    monkeypatch.setattr(runs, "__file__", str(installed))
    assert runs.git_commit() == ""
    subprocess.run([*git, "add", "venv/runs.py"], check=True)
    assert re.fullmatch(r"[0-9a-f]{40}\+", runs.git_commit())


def test_networks_of_other_protocols_say_each_theirs() -> None:
    one, other = SimpleNamespace(protocol="stride 1"), SimpleNamespace(protocol="stride 4")
    assert results.protocols({"a": one, "b": one}) == "stride 1"
    assert results.protocols({"a": one, "b": other}) == "\na: stride 1\nb: stride 4"
