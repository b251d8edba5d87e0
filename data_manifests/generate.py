"""Make the UCF101 and HMDB51 manifests from the official lists; needs nothing but Python.

    python data_manifests/generate.py --ucf101 ucfTrainTestlist --hmdb51 testTrainMulti_7030_splits

takes a second and writes ucf101.csv, ucf101_split1..3.csv, ucf20.csv, ucf20_validation.csv, hmdb51.csv and
hmdb51_split1..3.csv beside this file (or into --out), printing the number of rows of each. `ucfTrainTestlist` is the
folder with classInd.txt, trainlist0N.txt and testlist0N.txt; `testTrainMulti_7030_splits` the one with
CLASS_test_splitN.txt, or one above it. Either may be left out.
"""

from __future__ import annotations

import argparse
import csv
import re
from collections import Counter
from pathlib import Path

Table = dict[str, tuple[str, str]]  # path -> (label, subset)

UCF20 = (
    "ApplyEyeMakeup", "ApplyLipstick", "Archery", "BabyCrawling", "BalanceBeam", "BandMarching", "BaseballPitch",
    "Basketball", "BasketballDunk", "BodyWeightSquats", "BoxingPunchingBag", "CricketBowling", "CricketShot",
    "JugglingBalls", "JumpingJack", "Lunges", "PizzaTossing", "PlayingCello", "PlayingSitar", "WalkingWithDog",
)  # fmt: skip
"""Whole classes of ucf20.csv: UCF101 for a laptop."""
VALIDATION = {f"g{n:02}" for n in range(8, 13)}
"""Groups of its training part (8 to 25) that ucf20_validation.csv tests on, so that the test part (1 to 7) chooses
nothing."""
HMDB51_SUBSETS = {"0": "unused", "1": "train", "2": "test"}


def ucf101(lists: Path) -> dict[str, Table]:
    """Manifests by file name, from classInd.txt, trainlist0N.txt ("PATH NUMBER") and testlist0N.txt ("PATH").

    Paths are kept as listed: HandstandPushups holds files called v_HandStandPushups, with a capital S.
    Raises ValueError where a line contradicts classInd.txt or a split lists a video twice.
    """
    number = {name: i for i, name in (line.split() for line in _lines(lists / "classInd.txt"))}
    splits: dict[str, Table] = {}
    for n in (1, 2, 3):
        table = splits[f"ucf101_split{n}.csv"] = {}
        for subset in ("train", "test"):
            source = lists / f"{subset}list0{n}.txt"
            for line in _lines(source):
                path, *numbers = line.split()
                label = path.split("/")[0]
                if label not in number or numbers not in ([], [number[label]]):
                    raise ValueError(f"{source}: {line!r} contradicts classInd.txt: fetch the lists again")
                _add(table, path, label, subset, source)
    few = {path: row for path, row in splits["ucf101_split1.csv"].items() if row[0] in UCF20}
    return _with_whole("ucf101.csv", splits) | {"ucf20.csv": few, "ucf20_validation.csv": _validation(few)}


def hmdb51(lists: Path) -> dict[str, Table]:
    """Manifests by file name, from CLASS_test_splitN.txt ("NAME 0|1|2": unused, train, test).

    The lists hold bare names; the archives unpack into one folder a class, so the path is CLASS/NAME.
    Raises ValueError where a line has another form or a split lists a video twice.
    """
    if not lists.is_dir():
        raise ValueError(f"{lists} is no folder: give the one that the official lists were unpacked into")
    splits: dict[str, Table] = {}
    for n in (1, 2, 3):
        table = splits[f"hmdb51_split{n}.csv"] = {}
        for source in sorted(lists.rglob(f"*_test_split{n}.txt")):
            label = source.name.removesuffix(f"_test_split{n}.txt")
            for line in _lines(source):
                match = re.fullmatch(r"(\S+) ([012])", line)
                if not match:
                    raise ValueError(f"{source}: {line!r} is not a name and 0, 1 or 2: fetch the lists again")
                _add(table, f"{label}/{match[1]}", label, HMDB51_SUBSETS[match[2]], source)
    return _with_whole("hmdb51.csv", splits)


def write(path: Path, table: Table) -> None:
    """Write one manifest: path,label,subset, sorted by path, LF line ends."""
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(("path", "label", "subset"))
        writer.writerows((video, *table[video]) for video in sorted(table))


def _lines(path: Path) -> list[str]:
    return [line.strip() for line in path.read_text(encoding="ascii").split("\n") if line.strip()]


def _add(table: Table, path: str, label: str, subset: str, source: Path) -> None:
    if path in table:
        raise ValueError(f"{source}: {path!r} is listed twice in this split: fetch the lists again")
    table[path] = (label, subset)


def _validation(table: Table) -> Table:
    """The same videos: some groups of the training part as the test part, whose own videos are unused."""
    moved = {"train": "train", "test": "unused"}
    held_out = {path for path, (_, subset) in table.items() if subset == "train" and path.split("_")[-2] in VALIDATION}
    return {path: (label, "test" if path in held_out else moved[subset]) for path, (label, subset) in table.items()}


def _with_whole(name: str, splits: dict[str, Table]) -> dict[str, Table]:
    """Add the manifest of the whole data set, after making sure that every split covers the same videos."""
    first, *others = splits.values()
    if not first or any(other.keys() != first.keys() for other in others):
        sizes = ", ".join(f"{split}: {len(table)}" for split, table in splits.items())
        raise ValueError(f"the splits do not cover the same videos ({sizes}): fetch the lists again, all of them")
    return {name: {path: (label, "") for path, (label, _) in first.items()}, **splits}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ucf101", type=Path, metavar="DIR", help="folder of the official UCF101 lists")
    parser.add_argument("--hmdb51", type=Path, metavar="DIR", help="folder of the official HMDB51 lists")
    parser.add_argument("--out", type=Path, metavar="DIR", default=Path(__file__).parent, help="where to write")
    arguments = parser.parse_args()
    if not (arguments.ucf101 or arguments.hmdb51):
        parser.error("nothing to do: give --ucf101, --hmdb51 or both")
    tables: dict[str, Table] = {}
    try:
        if arguments.ucf101:
            tables |= ucf101(arguments.ucf101)
        if arguments.hmdb51:
            tables |= hmdb51(arguments.hmdb51)
    except (OSError, ValueError) as error:
        parser.exit(1, f"{parser.prog}: {error}\n")
    for name, table in tables.items():
        write(arguments.out / name, table)
        counts = Counter(subset or "videos" for _, subset in table.values())
        print(f"{name}: {len(table)} rows ({', '.join(f'{count} {what}' for what, count in sorted(counts.items()))})")


if __name__ == "__main__":
    main()
