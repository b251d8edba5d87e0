"""Manifests made from what is on disk: folders of videos, and Kinetics with its annotation lists."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from data_manifests import kinetics
from preprocess.manifest import Manifest, scan

ROOT = Path(__file__).parent.parent

# --- folders ---


def tree(folder: Path, *files: str) -> Path:
    for file in files:
        (folder / file).parent.mkdir(parents=True, exist_ok=True)
        (folder / file).touch()
    return folder


def triples(manifest: Manifest) -> list[tuple[str, str, str]]:
    return list(zip(manifest.paths, manifest.labels, manifest.subsets))


@pytest.mark.parametrize(
    "files, expected",
    [
        (
            ("run/b.AVI", "run/deep/er/a.mp4", "jump, high/c (1)!.webm", "jump, high/notes.txt", "empty/readme"),
            [("jump, high/c (1)!.webm", "jump, high"), ("run/b.AVI", "run"), ("run/deep/er/a.mp4", "run")],
        ),
        (("b.mp4", "a.mov", "B.mp4"), [("B.mp4", ""), ("a.mov", ""), ("b.mp4", "")]),
        (("b.mp4", "run/c.mp4"), [("b.mp4", ""), ("run/c.mp4", "run")]),
        # One folder of another name: train, val and test are then classes like it.
        (
            ("train/run/a.mp4", "val/a.mp4", "test/a.mp4", "walk/a.mp4"),
            [("test/a.mp4", "test"), ("train/run/a.mp4", "train"), ("val/a.mp4", "val"), ("walk/a.mp4", "walk")],
        ),
        # What is no video, whatever its name.
        (("._v.avi", ".trash/v.avi", "avi", "v.avi.part", "v.csv", "f.avi/real.mp4"), [("f.avi/real.mp4", "f.avi")]),
    ],
)
def test_scan_labels_by_folders(files: tuple[str, ...], expected: list[tuple[str, str]], tmp_path: Path) -> None:
    assert triples(scan(tree(tmp_path, *files))) == [(*found, "") for found in expected]
    assert set(scan(tmp_path, labels=False).labels) == {""}


def test_scan_subset_folders(tmp_path: Path) -> None:
    tree(tmp_path, "train/run/a.mp4", "train/jump/x/b.mp4", "val/run/a.mp4", "test/c.mp4", "d.mp4", "notes/e.txt")
    assert triples(scan(tmp_path)) == [
        ("d.mp4", "", ""),
        ("test/c.mp4", "", "test"),
        ("train/jump/x/b.mp4", "jump", "train"),
        ("train/run/a.mp4", "run", "train"),
        ("val/run/a.mp4", "run", "val"),
    ]
    assert scan(tmp_path, labels=False).labels == ("",) * 5


def test_scan_makes_names_of_folders_that_are_numbers(tmp_path: Path) -> None:
    tree(tmp_path, "0/a.mp4", "10/b.mp4", "2.5/c.mp4", "7th/d.mp4")
    assert scan(tmp_path).labels == ("class_0", "class_10", "class_2.5", "7th")


def test_scan_follows_links_but_not_in_circles(tmp_path: Path) -> None:
    tree(tmp_path / "elsewhere", "a.mp4")
    tree(tmp_path / "set", "run/b.mp4")
    (tmp_path / "set" / "jump").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "set" / "run" / "circle").symlink_to(tmp_path / "set")
    (tmp_path / "set" / "run" / "gone.mp4").symlink_to(tmp_path / "gone.mp4")
    assert scan(tmp_path / "set").paths == ("jump/a.mp4", "run/b.mp4", "run/gone.mp4")


def test_scan_refuses_what_no_manifest_may_hold(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"is not a folder"):
        scan(tmp_path / "absent")
    with pytest.raises(ValueError, match=r"holds no video.*\.mp4"):
        scan(tree(tmp_path / "empty", "readme.txt"))
    with pytest.raises(ValueError, match=r"holds a backslash"):
        scan(tree(tmp_path / "backslash", "a\\b.mp4"))
    (tmp_path / "latin").mkdir()
    try:
        Path(os.fsdecode(os.fsencode(tmp_path / "latin") + b"/caf\xe9.mp4")).touch()
    except OSError:
        pytest.skip("this file system takes no file names that are not UTF-8")
    with pytest.raises(ValueError, match=r"not UTF-8: rename"):
        scan(tmp_path / "latin")


# --- Kinetics ---

HEADER = "label,youtube_id,time_start,time_end,split,is_cc"


def annotated(folder: Path, *lines: str, header: str = HEADER, name: str = "val.csv") -> Path:
    (folder / name).write_text("\n".join((header, *lines, "")))
    return folder / name


def test_kinetics_names_times_and_folders(tmp_path: Path) -> None:
    annotations = annotated(
        tmp_path,
        "air drumming,aaaaaaaaaaa,36,46,val,0",  # on disk by id, in a folder with underscores
        '"tying knot (not on a tie)",-b_b-b_b_00,417,427,val,1',  # by id and times; the id itself looks like times
        "zumba,ccccccccccc,0,10,val,0",  # missing
        "zumba,dddddddddd_,5,15,val,0",  # on disk at other times only
        "abseiling,eeeeeeeeeee,1,11,val,0",  # the same id at two times, both on disk
        "abseiling,eeeeeeeeeee,100,110,val,0",
        "abseiling,fffffffffff,1,11,val,0",  # the same id in two classes: the folder decides
        "zumba,fffffffffff,50,60,val,0",
        "abseiling,ggggggggggg,1,11,val,0",  # the same id twice and no way to tell
        "abseiling,ggggggggggg,50,60,val,0",
        "zumba,hhhhhhhhhhh,7,17,val,0",  # times without padding, in the wrong folder: the list decides
    )
    folder = tree(
        tmp_path / "videos",
        "air_drumming/aaaaaaaaaaa.mp4",
        "val/tying knot (not on a tie)/-b_b-b_b_00_000417_000427.MKV",
        "zumba/dddddddddd__000004_000014.mp4",
        "eeeeeeeeeee_000001_000011.mp4",
        "eeeeeeeeeee_000100_000110.webm",
        "Zumba/fffffffffff.mp4",
        "abseiling/ggggggggggg.mp4",
        "abseiling/hhhhhhhhhhh_7_17.avi",
        "zumba/not annotated.mp4",
        "zumba/zzzzzzzzzzz.mp4",
        "zumba/ccccccccccc.txt",
    )
    found = kinetics.scan(folder, annotations)
    assert triples(found.manifest) == [
        ("Zumba/fffffffffff.mp4", "zumba", "val"),
        ("abseiling/hhhhhhhhhhh_7_17.avi", "zumba", "val"),
        ("air_drumming/aaaaaaaaaaa.mp4", "air drumming", "val"),
        ("eeeeeeeeeee_000001_000011.mp4", "abseiling", "val"),
        ("eeeeeeeeeee_000100_000110.webm", "abseiling", "val"),
        ("val/tying knot (not on a tie)/-b_b-b_b_00_000417_000427.MKV", "tying knot (not on a tie)", "val"),
    ]
    assert found.missing == [
        "zumba/ccccccccccc_000000_000010",
        "zumba/dddddddddd__000005_000015",
        "abseiling/fffffffffff_000001_000011",
        "abseiling/ggggggggggg_000001_000011",
        "abseiling/ggggggggggg_000050_000060",
    ]
    assert found.unannotated == [
        "abseiling/ggggggggggg.mp4",
        "zumba/dddddddddd__000004_000014.mp4",
        "zumba/not annotated.mp4",
        "zumba/zzzzzzzzzzz.mp4",
    ]
    assert found.copies == []


def test_kinetics_lists_join_and_copies_are_told(tmp_path: Path) -> None:
    train = annotated(tmp_path, "zumba,aaaaaaaaaaa,1,11,train,0", "zumba,aaaaaaaaaaa,1,11,train,0", name="train.csv")
    val = annotated(tmp_path, "yoga,bbbbbbbbbbb,2,12,validate", header=HEADER.removesuffix(",is_cc"))
    names = ["a/aaaaaaaaaaa.mp4", "b/aaaaaaaaaaa_000001_000011.mp4", "c/aaaaaaaaaaa_000001_000011.mp4"]
    folder = tree(tmp_path / "videos", *names, "bbbbbbbbbbb.mp4")
    found = kinetics.scan(folder, train, val)
    assert triples(found.manifest) == [(names[1], "zumba", "train"), ("bbbbbbbbbbb.mp4", "yoga", "val")]
    assert (found.missing, found.unannotated, found.copies) == ([], [], [names[0], names[2]])


def test_the_script_writes_the_manifest_and_what_is_missing(tmp_path: Path) -> None:
    lists = [
        annotated(tmp_path, "zumba,aaaaaaaaaaa,1,11,train,0", "yoga,ccccccccccc,1,11,train,0", name="train.csv"),
        annotated(tmp_path, "yoga,bbbbbbbbbbb,2,12,validate,0"),
    ]
    folder = tree(tmp_path / "videos", "aaaaaaaaaaa.mp4", "bbbbbbbbbbb.mp4", "other.mp4")
    out = tmp_path / "k400.csv"
    command = [sys.executable, str(ROOT / "data_manifests" / "kinetics.py"), str(folder), *map(str, lists)]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run([*command, "--out", str(out)], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    assert out.read_text() == "path,label,subset\naaaaaaaaaaa.mp4,zumba,train\nbbbbbbbbbbb.mp4,yoga,val\n"
    assert (tmp_path / "k400.missing.txt").read_text() == "yoga/ccccccccccc_000001_000011\n"
    assert "2 videos in" in done.stdout and "1 annotated videos are missing" in done.stdout
    lists[0].write_text("")
    wrong = subprocess.run([*command, "--out", str(out)], capture_output=True, text=True, env=environment)
    assert wrong.returncode == 1 and "line 1: column 'label' is missing" in wrong.stderr


@pytest.mark.parametrize(
    ("line", "parts"),
    [
        ("zumba,short,1,11,val,0", ("'short'", "11")),
        ("zumba,#NAME?xxxxx,1,11,val,0", ("'#NAME?xxxxx'",)),
        ("zumba,bbbbbbbbbbb,1.5,11,val,0", ("'1.5'", "whole seconds")),
        ("zumba,bbbbbbbbbbb,11,11,val,0", ("'11' to '11'", "rising")),
        ("zumba,bbbbbbbbbbb,1,11,dev,0", ("unknown split 'dev'", "train, val, validate, test")),
        (
            "yoga,aaaaaaaaaaa,1,11,val,0",
            ("yoga/aaaaaaaaaaa_000001_000011", "line 2", "zumba/aaaaaaaaaaa_000001_000011"),
        ),
        ("zumba,aaaaaaaaaaa,1,11,train,0", ("(train)", "line 2", "(val)")),
        ("zumba,bbbbbbbbbbb,1,11,val", ("5 fields", "6")),
    ],
)
def test_kinetics_bad_annotations_are_refused_by_line(tmp_path: Path, line: str, parts: tuple[str, ...]) -> None:
    annotations = annotated(tmp_path, "zumba,aaaaaaaaaaa,1,11,val,0", line)
    with pytest.raises(ValueError) as caught:
        kinetics.scan(tree(tmp_path / "videos", "aaaaaaaaaaa.mp4"), annotations)
    assert str(caught.value).startswith(f"{annotations}, line 3: ")
    for part in parts:
        assert part in str(caught.value)


def test_kinetics_refuses_what_matches_nothing(tmp_path: Path) -> None:
    folder = tree(tmp_path / "videos", "one.mp4", "two.mp4")
    annotations = annotated(tmp_path, "zumba,aaaaaaaaaaa,1,11,val,0")
    with pytest.raises(ValueError, match=r"none of its 2 videos .* the 1 annotated .*aaaaaaaaaaa_000001_000011\.mp4"):
        kinetics.scan(folder, annotations)
    with pytest.raises(ValueError, match="no annotation list"):
        kinetics.scan(folder)
    with pytest.raises(ValueError, match="no rows below the header"):
        kinetics.scan(folder, annotated(tmp_path))
