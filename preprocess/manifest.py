"""Manifests: which videos make up a data set, as a CSV file with the columns path,label,subset.

    path     relative to the video folder, forward slashes, any letters, in UTF-8; each video once
    label    a class name; empty where unknown. Numbers are never written: they follow from the sorted names
    subset   train, val, test, unused; empty in the manifest of a whole data set

The order of the rows is part of a manifest: shards refer to videos by row (counted from 0, header not counted).

`Manifest.read` and `Manifest.write` are the file; `scan` makes one from a folder of videos. numpy and the standard
library only.
"""

from __future__ import annotations

import csv
import hashlib
import io
import json
import os
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path, PurePosixPath

import numpy as np

from preprocess.files import write_text

COLUMNS = ("path", "label", "subset")
SUBSETS = ("train", "val", "test", "unused", "")
VIDEO_EXTENSIONS = (
    ".3gp", ".asf", ".avi", ".divx", ".flv", ".m2ts", ".m4v", ".mkv", ".mov", ".mp4", ".mpeg", ".mpg", ".mts", ".ogv",
    ".ts", ".vob", ".webm", ".wmv",
)  # fmt: skip

StrPath = str | os.PathLike[str]

# Lone surrogates stand for file names that are not UTF-8. Control characters would break the line-wise failure table,
# and csv writers of different Python versions disagree on quoting a carriage return.
_UNWRITABLE = re.compile("[\x00-\x1f\x7f\ud800-\udfff]")
_WINDOWS_DRIVE = re.compile(r"[A-Za-z]:/")
_NUMBER = re.compile(r"[+-]?[0-9]+(\.[0-9]*)?")


@dataclass(frozen=True)
class Manifest:
    """A table of videos: three columns of one length, validated on construction.

    `known_classes` holds the classes of the manifest that this one is a subset of, so that a class without a video in
    the subset does not renumber the others; it is neither written nor compared.

    Raises ValueError, naming the row, for: columns of different lengths, no rows, a path that is empty, absolute,
    with "..", backslashes or another spelling of a shorter path, a path listed twice, a label that is a number or has
    white space around it, an unknown subset, control characters and undecodable file names.
    """

    paths: tuple[str, ...]
    labels: tuple[str, ...]
    subsets: tuple[str, ...]
    known_classes: tuple[str, ...] = field(default=(), compare=False, repr=False)

    def __post_init__(self) -> None:
        _check(self.paths, self.labels, self.subsets, "manifest", lambda row: f"manifest row {row} (counted from 0)")

    def __len__(self) -> int:
        return len(self.paths)

    @cached_property
    def classes(self) -> tuple[str, ...]:
        """Class names by class number: the alphabet, upper and lower case alike.

        That is the official order of UCF101, HMDB51 and Kinetics-400. Names that differ in case only follow each
        other in code point order, so that the order never depends on the run.
        """
        return in_order(({*self.labels} | {*self.known_classes}) - {""})

    @cached_property
    def label_numbers(self) -> np.ndarray:
        """Class number of each row, int32 (n,), read only; -1 where the label is unknown."""
        number = {name: i for i, name in enumerate(self.classes)} | {"": -1}
        numbers = np.fromiter((number[label] for label in self.labels), np.int32, len(self))
        numbers.flags.writeable = False
        return numbers

    @cached_property
    def sha256(self) -> str:
        """Hex digest over the rows in their order; the same however the file quotes them or orders its columns."""
        digest = hashlib.sha256(b"manifest 1\n")
        for row in zip(self.paths, self.labels, self.subsets):
            digest.update(json.dumps(row, separators=(",", ":")).encode("ascii") + b"\n")
        return digest.hexdigest()

    @cached_property
    def videos_sha256(self) -> str:
        """Hex digest over paths and labels in their order, which is what shards are made from: without the subsets."""
        return replace(self, subsets=("",) * len(self)).sha256

    def subset(self, name: str) -> Manifest:
        """The rows of one subset, in order, class numbers unchanged; ValueError where there is none."""
        rows = [i for i, subset in enumerate(self.subsets) if subset == name]
        if not rows:
            present = ", ".join(f"{s!r} ({self.subsets.count(s)})" for s in SUBSETS if s in self.subsets)
            raise ValueError(
                f"no row of the manifest has the subset {name!r}; it has {present}: "
                "write train and test into that column (shards stay as they are), or train with --subset all"
            )
        return Manifest(
            tuple(self.paths[i] for i in rows),
            tuple(self.labels[i] for i in rows),
            tuple(self.subsets[i] for i in rows),
            self.classes,
        )

    def divided(self, test_share: float, seed: int = 0) -> Manifest:
        """A copy in which a share of each class, drawn at random, has the subset test, and the rest train.

        ValueError where rows have a subset already, or the share leaves a class without one or the other.
        """
        if any(self.subsets):
            raise ValueError("the videos have subsets already, those of their folders: leave the test share out")
        if not 0 < test_share < 1:
            raise ValueError(f"the test share is {test_share}; choose one between 0 and 1")
        generator, subsets = np.random.default_rng(seed), np.full(len(self), "train", object)
        for number in np.unique(self.label_numbers):
            rows = np.flatnonzero(self.label_numbers == number)
            count = round(test_share * len(rows))
            if not 0 < count < len(rows):
                raise ValueError(
                    f"a share of {test_share} of the {len(rows)} videos labelled {self.labels[rows[0]]!r} is {count}, "
                    "which leaves no test or no training video: choose another, or fill in the column by hand"
                )
            subsets[generator.permutation(rows)[:count]] = "test"
        return Manifest(self.paths, self.labels, tuple(subsets))

    @classmethod
    def read(cls, path: StrPath) -> Manifest:
        """Read and validate a manifest file: UTF-8 (a byte order mark is tolerated), columns in any order.

        Raises ValueError, naming the file and the line, for what the class refuses and for bytes that are not UTF-8,
        a missing, doubled or unknown column, rows of another length, and quotes that do not close.
        """
        if Path(path).is_dir():
            raise ValueError(
                f"{path} is a folder, not a manifest of one: make that with python -m preprocess manifest {path} --out "
                "videos.csv"
            )
        if not Path(path).exists():
            raise ValueError(
                f"there is no manifest {path}: data_manifests/ has some, and one of a folder of videos is made with "
                f"python -m preprocess manifest FOLDER --out {path}"
            )
        lines, rows = read_csv(path, COLUMNS)
        return from_rows(rows, str(path), lambda row: f"{path}, line {lines[row]}")

    def write(self, path: StrPath) -> None:
        """Write the file (UTF-8, LF line ends); all of it or, where that fails, none: an older file stays."""
        text = io.StringIO(newline="")
        writer = csv.writer(text, lineterminator="\n")
        writer.writerow(COLUMNS)
        writer.writerows(zip(self.paths, self.labels, self.subsets))
        write_text(Path(path), text.getvalue())


def in_order(classes: Iterable[str]) -> tuple[str, ...]:
    """Names of classes in the order of their numbers."""
    return tuple(sorted(classes, key=lambda name: (name.casefold(), name)))


def dataset_name(path: StrPath) -> str:
    """What results call a manifest: its file's name without the ending, or its folder's where that says no more.

    data_manifests/ucf101_split1.csv is ucf101_split1, demo_out/scenes/manifest.csv is scenes.
    """
    whole = Path(path).resolve()
    return whole.parent.name if whole.stem == "manifest" else whole.stem


def scan(folder: StrPath, labels: bool = True) -> Manifest:
    """Make a manifest of the videos in a folder, at any depth, sorted by path.

    A video is a file with one of VIDEO_EXTENSIONS, in upper or lower case. Names that begin with a dot are skipped;
    links are followed. Its label is the name of the first folder under `folder` that holds it, and empty for a video
    that lies directly in `folder` (so a flat folder has no labels). Where every first-level folder that holds videos
    is called train, val or test, that is the subset, and the label is the second-level folder; otherwise the subset
    is empty. A folder whose name is a number, 7, is the class class_7. `labels=False` leaves every label empty, for
    folders that are not classes.

    Raises ValueError where `folder` is no folder or holds no video, or a name cannot stand in a manifest; OSError
    where a folder cannot be listed.
    """
    paths = list_videos(folder)
    first = {path.split("/", 1)[0] for path in paths if "/" in path}
    by_subset = bool(first) and first <= {"train", "val", "test"}
    rows = []
    for path in paths:
        *folders, _ = path.split("/")
        subset = folders.pop(0) if by_subset and folders else ""
        label = folders[0] if labels and folders else ""
        rows.append((path, f"class_{label}" if _NUMBER.fullmatch(label) else label, subset))
    return from_rows(rows, str(folder), lambda row: f"{folder}: video {paths[row]!r}")


def list_videos(folder: StrPath) -> list[str]:
    """Paths of the video files under a folder, relative to it, with forward slashes, sorted; at least one."""
    if not os.path.isdir(folder):
        raise ValueError(f"{folder} is not a folder: name the folder that holds the videos")
    found: list[str] = []

    def walk(path: str, prefix: str, above: frozenset[tuple[int, int]]) -> None:
        status = os.stat(path)
        here = (status.st_dev, status.st_ino)
        if here in above:  # a link to a folder that contains it would never end
            return
        for name in os.listdir(path):
            full = os.path.join(path, name)
            if name.startswith("."):  # "._clip.avi" and the like: what file systems leave beside the real ones
                continue
            if os.path.isdir(full):
                walk(full, f"{prefix}{name}/", above | {here})
            # A broken link counts: it becomes a row of the failure table, not a silent gap.
            elif name.lower().endswith(VIDEO_EXTENSIONS) and (os.path.isfile(full) or os.path.islink(full)):
                found.append(prefix + name)

    walk(os.fspath(folder), "", frozenset())
    if not found:
        raise ValueError(f"{folder} holds no video: none of its files ends in {' '.join(VIDEO_EXTENSIONS)}")
    return sorted(found)


def read_csv(path: StrPath, required: Sequence[str], optional: Sequence[str] = ()) -> tuple[list[int], list[list[str]]]:
    """Line numbers (from 1) and the fields of the required columns, in that order, of every line that is not blank.

    Raises ValueError, naming file and line, for what is no such table.
    """
    data = Path(path).read_bytes().removeprefix(b"\xef\xbb\xbf")
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise ValueError(
            f"{path}, line {line}: byte 0x{data[error.start]:02x} is not UTF-8: save the file as UTF-8"
        ) from None

    reader = csv.reader(io.StringIO(text, newline=""), strict=True)
    valid = f"the columns are {','.join(required)}" + "".join(f" and perhaps {name}" for name in optional)
    try:
        header = next(reader, [])
        for name in required:
            if name not in header:
                raise ValueError(f"{path}, line 1: column {name!r} is missing from {','.join(header)!r}; {valid}")
        for name in header:
            if name not in required and name not in optional:
                raise ValueError(f"{path}, line 1: unknown column {name!r}; {valid}: delete the others")
            if header.count(name) > 1:
                raise ValueError(f"{path}, line 1: column {name!r} appears {header.count(name)} times; keep one")
        order = [header.index(name) for name in required]
        lines, rows = [], []
        for fields in reader:
            if not fields:
                continue
            if len(fields) != len(header):
                raise ValueError(
                    f"{path}, line {reader.line_num}: {len(fields)} fields where the header has {len(header)}; put a "
                    f"field that holds a comma in double quotes"
                )
            lines.append(reader.line_num)
            rows.append([fields[i] for i in order])
    except csv.Error as error:
        raise ValueError(f"{path}, line {reader.line_num}: not a CSV row ({error}): check its quotes") from None
    return lines, rows


def from_rows(rows: Sequence[Sequence[str]], whole: str, where: Callable[[int], str]) -> Manifest:
    """A manifest of rows (path, label, subset); errors have the caller's names for the `whole` and for a row."""
    paths, labels, subsets = (tuple(row[column] for row in rows) for column in range(len(COLUMNS)))
    _check(paths, labels, subsets, whole, where)
    return Manifest(paths, labels, subsets)


def _check(
    paths: Sequence[str], labels: Sequence[str], subsets: Sequence[str], whole: str, where: Callable[[int], str]
) -> None:
    """Raise ValueError for the first row that no manifest may hold; `where` names a row for the message."""
    if not len(paths) == len(labels) == len(subsets):
        raise ValueError(
            f"{whole}: {len(paths)} paths, {len(labels)} labels and {len(subsets)} subsets; give one of each a video"
        )
    if not paths:
        raise ValueError(f"{whole}: no rows: list at least one video")
    seen: dict[str, int] = {}
    for row, (path, label, subset) in enumerate(zip(paths, labels, subsets)):
        if fault := _path_fault(path) or _label_fault(label):
            raise ValueError(f"{where(row)}: {fault}")
        if subset not in SUBSETS:
            valid = ", ".join(SUBSETS[:-1])
            raise ValueError(f"{where(row)}: unknown subset {subset!r}; write one of {valid}, or leave it empty")
        if seen.setdefault(path, row) != row:
            raise ValueError(
                f"{where(row)}: duplicate path {path!r}, first at {where(seen[path])}; each video may be listed once: "
                f"delete one"
            )


def _path_fault(path: str) -> str:
    """What is wrong with a path, and the way out; empty where nothing is."""
    if not isinstance(path, str):
        return f"path {path!r} is a {type(path).__name__}: give text"
    if not path:
        return "empty path: write the video's path relative to the video folder"
    if _UNWRITABLE.search(path):
        return f"path {path!r} holds a control character or is not UTF-8: rename the file"
    if "\\" in path:
        return f"path {path!r} holds a backslash: separate folders by '/'"
    if path.startswith("/") or _WINDOWS_DRIVE.match(path):
        return f"absolute path {path!r}: write it relative to the video folder, which is named on the command line"
    if ".." in path.split("/"):
        return f"path {path!r} holds '..', which may leave the video folder: name a folder above all videos instead"
    if path == "." or str(PurePosixPath(path)) != path:
        return f"path {path!r} has an empty or '.' part: write {str(PurePosixPath(path))!r}"
    return ""


def _label_fault(label: str) -> str:
    """What is wrong with a label, and the way out; empty where nothing is."""
    if not isinstance(label, str):
        return f"label {label!r} is a {type(label).__name__}: give a class name as text"
    if _NUMBER.fullmatch(label):
        return (
            f"label {label!r} is a number; class numbers follow from the sorted names: write a name, such as "
            f"{'class_' + label!r}, or leave it empty"
        )
    if _UNWRITABLE.search(label):
        return f"label {label!r} holds a control character or is not UTF-8: rename the class"
    if label != label.strip():
        return f"label {label!r} has white space around it, which makes another class: write {label.strip()!r}"
    return ""
