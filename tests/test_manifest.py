"""Manifests: the committed lists, the file format, and manifests made from folders."""

from __future__ import annotations

import hashlib
import re
import subprocess
import sys
from collections import Counter
from functools import cache
from pathlib import Path

import numpy as np
import pytest
from conftest import DATA, ROOT
from hypothesis import example, given, settings
from hypothesis import strategies as st

from data_manifests import generate
from preprocess.manifest import SUBSETS, Manifest, dataset_name

LISTS = ROOT / "data_manifests"
OFFICIAL = DATA / "splits"
UCF101 = ["ucf101.csv", "ucf101_split1.csv", "ucf101_split2.csv", "ucf101_split3.csv"]
UCF20 = ["ucf20.csv", "ucf20_validation.csv"]
HMDB51 = ["hmdb51.csv", "hmdb51_split1.csv", "hmdb51_split2.csv", "hmdb51_split3.csv"]

needs_official_lists = pytest.mark.skipif(
    not OFFICIAL.is_dir(),
    reason=f"no official lists in {OFFICIAL}: data_manifests/README.md says where they are; unpack them there as "
    "ucf101_official and hmdb51_official",
)


@cache
def committed(name: str) -> Manifest:
    return Manifest.read(LISTS / name)


# --- training and test videos ---


@settings(max_examples=50)
@given(st.lists(st.sampled_from(["run", "jump", ""]), min_size=1, max_size=60), st.integers(0, 5), st.data())
def test_a_share_of_each_class_is_for_tests(labels: list[str], seed: int, data: st.DataObject) -> None:
    whole = Manifest(tuple(f"{n}.mp4" for n in range(len(labels))), tuple(labels), ("",) * len(labels))
    share = data.draw(st.floats(0.05, 0.95))
    counts = {label: (round(share * labels.count(label)), labels.count(label)) for label in set(labels)}
    if not all(0 < test < all_ for test, all_ in counts.values()):
        with pytest.raises(ValueError, match="leaves no test or no training video"):
            whole.divided(share, seed)
        return
    made = whole.divided(share, seed)
    assert (made.paths, made.labels) == (whole.paths, whole.labels)
    assert set(made.subsets) == {"train", "test"}
    for label, (test, _) in counts.items():
        assert sum(x == (label, "test") for x in zip(made.labels, made.subsets)) == test
    assert made == whole.divided(share, seed)
    with pytest.raises(ValueError, match="have subsets already"):
        made.divided(share)


# --- the committed lists ---


COUNTS = {
    "ucf101.csv": {"": 13320},
    "ucf101_split1.csv": {"train": 9537, "test": 3783},
    "ucf101_split2.csv": {"train": 9586, "test": 3734},
    "ucf101_split3.csv": {"train": 9624, "test": 3696},
    "ucf20.csv": {"train": 1947, "test": 776},
    "ucf20_validation.csv": {"train": 1405, "test": 542, "unused": 776},
    "hmdb51.csv": {"": 6766},
    "hmdb51_split1.csv": {"train": 3570, "test": 1530, "unused": 1666},
    "hmdb51_split2.csv": {"train": 3570, "test": 1530, "unused": 1666},
    "hmdb51_split3.csv": {"train": 3570, "test": 1530, "unused": 1666},
}


@pytest.mark.parametrize("path", sorted(LISTS.glob("*.csv")), ids=lambda path: path.name)
def test_committed_lists_have_the_published_counts_and_the_bytes_that_write_writes(path: Path, tmp_path: Path) -> None:
    manifest = committed(path.name)
    assert Counter(manifest.subsets) == COUNTS[path.name]
    assert list(manifest.paths) == sorted(manifest.paths)
    assert {label for label, n in Counter(manifest.labels).items() if n >= 100} == set(manifest.classes)
    assert all(set(manifest.subset(s).labels) == set(manifest.labels) for s in COUNTS[path.name])
    manifest.write(tmp_path / path.name)
    assert (tmp_path / path.name).read_bytes() == path.read_bytes()


def test_ucf101_classes_are_in_the_official_order() -> None:
    classes = committed("ucf101.csv").classes
    assert len(classes) == 101
    # Official numbers, from 1, of classes where a plain sort or an off-by-one would show.
    official = {
        "ApplyEyeMakeup": 1, "Billiards": 12, "BodyWeightSquats": 15, "Hammering": 35, "HammerThrow": 36,
        "HandstandPushups": 37, "HandstandWalking": 38, "JumpingJack": 47, "JumpRope": 48, "YoYo": 101,
    }  # fmt: skip
    assert {name: classes.index(name) + 1 for name in official} == official
    manifest = committed("ucf101_split1.csv")
    assert manifest.label_numbers[manifest.paths.index("HandstandPushups/v_HandStandPushups_g01_c01.avi")] == 36


@pytest.mark.parametrize("whole", [UCF101, HMDB51], ids=["ucf101", "hmdb51"])
def test_splits_cover_the_whole_set(whole: list[str]) -> None:
    first, *splits = map(committed, whole)
    assert all((split.paths, split.labels) == (first.paths, first.labels) for split in splits)
    assert len({split.subsets for split in splits}) == 3
    assert all(path.split("/")[0] == label and path.count("/") == 1 for path, label in zip(first.paths, first.labels))


def test_ucf101_groups_lie_on_one_side_and_videos_are_tested_once() -> None:
    tested: list[str] = []
    for split in map(committed, UCF101[1:]):
        train, test = ({path.rsplit("_c", 1)[0] for path in split.subset(name).paths} for name in ("train", "test"))
        assert not train & test and len(train | test) == 101 * 25
        tested += split.subset("test").paths
    assert len(tested) == len(set(tested))


def test_what_chooses_settings_shares_no_recording_with_the_test_part() -> None:
    split, validation = map(committed, UCF20)
    assert split.paths == validation.paths and split.labels == validation.labels
    assert set(validation.subset("unused").paths) == set(split.subset("test").paths)
    train, test = ({path.rsplit("_c", 1)[0] for path in validation.subset(name).paths} for name in ("train", "test"))
    assert not train & test and (len(train), len(test)) == (20 * 13, 20 * 5)


def generated(monkeypatch: pytest.MonkeyPatch, *arguments: str | Path) -> int | str | None:
    """The exit status of generate.py with these arguments."""
    monkeypatch.setattr(sys, "argv", ["generate.py", *map(str, arguments)])
    try:
        generate.main()
    except SystemExit as ended:
        return ended.code
    return 0


@needs_official_lists
def test_generate_makes_the_committed_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folders = ["--ucf101", OFFICIAL / "ucf101_official", "--hmdb51", OFFICIAL / "hmdb51_official"]
    assert generated(monkeypatch, *folders, "--out", tmp_path) == 0
    assert {path.name for path in tmp_path.iterdir()} == {*UCF101, *HMDB51, *UCF20}
    for path in tmp_path.iterdir():
        assert path.read_bytes() == (LISTS / path.name).read_bytes(), path.name


def invented_ucf101(folder: Path) -> None:
    folder.mkdir()
    (folder / "classInd.txt").write_text("1 Archery\n2 YoYo\n\n")
    for n in (1, 2, 3):
        (folder / f"trainlist0{n}.txt").write_text("YoYo/b.avi 2\nYoYo/a.avi 2\n")
        (folder / f"testlist0{n}.txt").write_text("Archery/c.avi\r\n")


def test_generate_on_invented_lists(tmp_path: Path) -> None:
    invented_ucf101(tmp_path / "ucf")
    (tmp_path / "hmdb").mkdir()
    for n, numbers in ((1, "120"), (2, "201"), (3, "012")):
        lines = [f"{name} {number} \n" for name, number in zip(("z[1].avi", "a!.avi", "b;c.avi"), numbers)]
        (tmp_path / "hmdb" / f"brush_hair_test_split{n}.txt").write_text("".join(lines))
    command = [sys.executable, str(LISTS / "generate.py"), "--ucf101", str(tmp_path / "ucf"), "--hmdb51"]
    subprocess.run([*command, str(tmp_path / "hmdb"), "--out", str(tmp_path)], check=True)
    assert (tmp_path / "ucf101.csv").read_bytes() == (
        b"path,label,subset\nArchery/c.avi,Archery,\nYoYo/a.avi,YoYo,\nYoYo/b.avi,YoYo,\n"
    )
    assert (tmp_path / "ucf101_split2.csv").read_bytes() == (
        b"path,label,subset\nArchery/c.avi,Archery,test\nYoYo/a.avi,YoYo,train\nYoYo/b.avi,YoYo,train\n"
    )
    assert (tmp_path / "hmdb51_split1.csv").read_bytes() == (
        b"path,label,subset\nbrush_hair/a!.avi,brush_hair,test\nbrush_hair/b;c.avi,brush_hair,unused\n"
        b"brush_hair/z[1].avi,brush_hair,train\n"
    )


@pytest.mark.parametrize(
    ("file", "text", "complaint"),
    [
        ("trainlist02.txt", "YoYo/b.avi 1\nYoYo/a.avi 2\n", "'YoYo/b.avi 1' contradicts classInd.txt"),
        ("trainlist03.txt", "Yoyo/b.avi 2\nYoYo/a.avi 2\n", "'Yoyo/b.avi 2' contradicts classInd.txt"),
        ("testlist01.txt", "Archery/c.avi\nYoYo/a.avi\n", "'YoYo/a.avi' is listed twice"),
        ("testlist01.txt", "Archery/d.avi\n", "do not cover the same videos"),
    ],
)
def test_generate_refuses_damaged_lists(
    file: str, text: str, complaint: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys
) -> None:
    invented_ucf101(tmp_path / "ucf")
    (tmp_path / "ucf" / file).write_text(text)
    assert generated(monkeypatch, "--ucf101", tmp_path / "ucf", "--out", tmp_path) == 1
    assert complaint in capsys.readouterr().err
    assert not list(tmp_path.glob("*.csv"))


# --- the file ---


HEADER = "path,label,subset\n"
BAD_ROWS = {
    ",Archery,": ("empty path", "relative to the video folder"),
    "/data/a.avi,Archery,": ("absolute path '/data/a.avi'", "relative"),
    "C:/data/a.avi,Archery,": ("absolute path 'C:/data/a.avi'",),
    "b/../a.avi,Archery,": ("'b/../a.avi'", "'..'"),
    "Archery\\a.avi,Archery,": (repr("Archery\\a.avi"), "backslash", "'/'"),
    "b//a.avi,Archery,": ("'b//a.avi'", "write 'b/a.avi'"),
    ".,Archery,": ("path '.'",),
    '"a\nb.avi",Archery,': (r"'a\nb.avi'", "control character", "rename"),
    "a.avi,7,": ("label '7'", "number", "'class_7'"),
    "a.avi,-3.0,": ("label '-3.0'", "number"),
    'a.avi,"A\x7f",': ("label", "control character", "rename the class"),
    "a.avi, Archery,": ("label ' Archery'", "white space", "'Archery'"),
    "a.avi,Archery,Train": ("unknown subset 'Train'", "train, val, test, unused", "empty"),
    "good.avi,Archery,": ("duplicate path 'good.avi'", "line 2"),
    "a.avi,Archery": ("2 fields", "3", "quotes"),
}
BAD_FILES: dict[str | bytes, tuple[str, ...]] = {
    "": ("line 1: column 'path' is missing", "path,label,subset"),
    "label,subset,Path\n": ("line 1: column 'path' is missing",),
    "path,label,subset,fps\n": ("line 1: unknown column 'fps'", "path,label,subset"),
    "path,label,subset,label\n": ("line 1: column 'label' appears 2 times",),
    HEADER + "\n\n": ("no rows: list at least one video",),
    (HEADER + "a.avi,A,\ncafé.avi,A,\n").encode("latin-1"): ("line 3: byte 0xe9 is not UTF-8", "save"),
    (HEADER + "a.avi,A,\n").encode("utf-16"): ("line 1: byte 0xff is not UTF-8",),
    HEADER + '"a.avi"x,A,\n': ("line 2: not a CSV row",),
    HEADER + '"a.avi,A,\nb.avi,B,\n': ("not a CSV row",),
    HEADER + "a\x00.avi,A,\n": ("line 2: ",),
} | {
    f"{HEADER}good.avi,Archery,train\n\n{row}\nlast.avi,YoYo,test\n": (f", line {4 + row.count(chr(10))}: ", *parts)
    for row, parts in BAD_ROWS.items()
}


@pytest.mark.parametrize("content", BAD_FILES)
def test_bad_files_are_refused_naming_file_and_line(content: str | bytes, tmp_path: Path) -> None:
    file = tmp_path / "list.csv"
    file.write_bytes(content.encode() if isinstance(content, str) else content)
    with pytest.raises(ValueError) as caught:
        Manifest.read(file)
    message = str(caught.value)
    assert message.startswith(str(file)) and all(part in message for part in BAD_FILES[content])


@pytest.mark.parametrize(
    "content",
    [
        b"\xef\xbb\xbfpath,label,subset\nb.avi,B,test\na.avi,,train\n",
        b"path,label,subset\r\nb.avi,B,test\r\n\r\na.avi,,train\r\n",
        b"subset,path,label\ntest,b.avi,B\ntrain,a.avi,\n",
        b'"path","label","subset"\n"b.avi","B","test"\n"a.avi","","train"',
    ],
    ids=["byte order mark", "windows line ends", "other order", "quotes, no last line end"],
)
def test_other_spellings_of_a_file_are_the_same_manifest(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "list.csv").write_bytes(content)
    manifest = Manifest.read(tmp_path / "list.csv")
    plain = Manifest(("b.avi", "a.avi"), ("B", ""), ("test", "train"))
    assert manifest == plain
    assert manifest.sha256 == plain.sha256


def test_the_hash_is_over_rows_in_order() -> None:
    rows = '["b,\\u00e9.avi","B","test"]\n["a.avi","","train"]\n'
    manifest = Manifest(("b,é.avi", "a.avi"), ("B", ""), ("test", "train"))
    assert manifest.sha256 == hashlib.sha256(f"manifest 1\n{rows}".encode()).hexdigest()


names = st.text(st.characters(blacklist_categories=("Cc", "Cs"), blacklist_characters="/\\"), min_size=1, max_size=12)
paths = st.lists(names.filter(lambda name: name not in (".", "..")), min_size=1, max_size=4).map("/".join)
labels = names.map(str.strip).filter(lambda name: not name[-1:].isdigit() and not name.endswith(".")) | st.just("")
rows = st.lists(
    st.tuples(paths.filter(lambda path: not re.match("[A-Za-z]:/", path)), labels, st.sampled_from(SUBSETS)),
    min_size=1,
    max_size=8,
    unique_by=lambda row: row[0],
)


@given(rows=rows)
@example(rows=[('a "quoted", (name) \u2028!.avi', "it's, so", "val"), ("\ufeff.avi", "", ""), (" -;=\x85 ", "é", "")])
@settings(max_examples=50)
def test_round_trip_is_exact(tmp_path_factory: pytest.TempPathFactory, rows: list[tuple[str, str, str]]) -> None:
    file = tmp_path_factory.mktemp("round") / "list.csv"
    manifest = Manifest(*(tuple(column) for column in zip(*rows)))
    manifest.write(file)
    again = Manifest.read(file)
    assert [*zip(again.paths, again.labels, again.subsets)] == rows
    assert again.sha256 == manifest.sha256
    first = file.read_bytes()
    again.write(file)
    assert file.read_bytes() == first
    assert b"\r" not in first and [*file.parent.iterdir()] == [file]


# --- the class ---


def test_class_numbers() -> None:
    manifest = Manifest(tuple("abcdef"), ("jump", "Hop", "", "hop", "Hop", "éclair"), ("",) * 6)
    assert manifest.classes == ("Hop", "hop", "jump", "éclair")
    assert manifest.label_numbers.tolist() == [2, 0, -1, 1, 0, 3] and manifest.label_numbers.dtype == np.int32
    with pytest.raises(ValueError, match="read-only"):
        manifest.label_numbers[0] = 5
    # Pairs that differ in case only: a sort by case-folded names alone would leave each to the hash seed.
    pairs = [(f"A{chr(97 + i)}", f"a{chr(97 + i)}") for i in range(26)]
    labels = tuple(name for pair in pairs for name in reversed(pair))
    many = Manifest(tuple(map(str, range(52))), labels, ("",) * 52)
    assert many.classes == tuple(name for pair in pairs for name in pair)


def test_subsets_keep_class_numbers() -> None:
    manifest = Manifest(("a", "b", "c", "d"), ("walk", "run", "walk", ""), ("train", "train", "test", "test"))
    test = manifest.subset("test")
    assert (test.paths, test.labels, test.subsets) == (("c", "d"), ("walk", ""), ("test", "test"))
    assert test.classes == ("run", "walk")
    assert test.label_numbers.tolist() == [1, -1]
    with pytest.raises(ValueError, match=r"subset 'val'; it has 'train' \(2\), 'test' \(2\)"):
        manifest.subset("val")


def test_construction_is_checked() -> None:
    with pytest.raises(ValueError, match="2 paths, 1 labels and 2 subsets"):
        Manifest(("a", "b"), ("A",), ("", ""))
    with pytest.raises(ValueError, match="no rows"):
        Manifest((), (), ())
    with pytest.raises(ValueError, match=r"row 1 \(counted from 0\): duplicate path 'a', first at manifest row 0"):
        Manifest(("a", "a"), ("A", "A"), ("", ""))
    with pytest.raises(ValueError, match=r"row 0 .*label 3 is a int"):
        Manifest(("a",), (3,), ("",))  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"row 0 .*is a PosixPath|row 0 .*is a WindowsPath"):
        Manifest((Path("a"),), ("A",), ("",))  # type: ignore[arg-type]


def test_names_of_data_sets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "scenes").mkdir()
    monkeypatch.chdir(tmp_path / "scenes")
    assert dataset_name("../ucf101_split1.csv") == "ucf101_split1"
    assert dataset_name("manifest.csv") == dataset_name(tmp_path / "scenes" / "manifest.csv") == "scenes"
