"""Make a manifest of Kinetics' videos on disk from its official annotation lists; needs the package `preprocess`.

    python data_manifests/kinetics.py K400 kinetics-400_train.csv kinetics-400_val.csv --out k400.csv

takes seconds, writes k400.csv, and k400.missing.txt beside it: the annotated videos that are not on disk. Files may lie
in any folders and be called ID.mp4 or ID_START_END.mp4, with any common video extension; they must have been cut to the
annotated seconds already.
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Sequence
from pathlib import Path, PurePosixPath
from typing import NamedTuple

from preprocess.manifest import Manifest, StrPath, from_rows, list_videos, read_csv

COLUMNS = ("label", "youtube_id", "time_start", "time_end", "split")
SUBSETS = {"train": "train", "val": "val", "validate": "val", "test": "test"}  # "validate": Kinetics-700
NAME = re.compile(r"([A-Za-z0-9_-]{11})(?:_(\d+)_(\d+))?")


class Scan(NamedTuple):
    """What `scan` found."""

    manifest: Manifest
    missing: list[str]  # annotated, not on disk: LABEL/ID_START_END, in the order of the annotations
    unannotated: list[str]  # on disk, left out: no annotation names it
    copies: list[str]  # on disk, left out: another file of the same annotated clip was taken


class Clip(NamedTuple):
    """One annotated Kinetics clip; start and end in whole seconds of the original video."""

    label: str
    youtube_id: str
    start: int
    end: int
    subset: str

    @property
    def file_name(self) -> str:
        return f"{self.youtube_id}_{self.start:06d}_{self.end:06d}"

    @property
    def name(self) -> str:
        return f"{self.label}/{self.file_name}"


def scan(folder: StrPath, *annotations: StrPath) -> Scan:
    """Match the videos in a folder with one or more of the official Kinetics annotation lists.

    A list is a CSV file with the columns label, youtube_id, time_start, time_end (whole seconds), split (train, val
    or validate, test) and perhaps is_cc. Videos lie at any depth, under any folder names, with any of
    VIDEO_EXTENSIONS, and are called ID.mp4 or ID_START_END.mp4 (times usually padded to six digits). A name with
    times must have the annotated ones. A name without is enough where the lists hold that id once; where they hold
    it several times, a folder above the file must be called like the label of one (spaces or underscores).
    Labels and subsets are the lists', whatever the folders are called. Files are taken whole: the times are not
    applied, so clips must have been cut already.

    Of several files of one clip one with times in its name is taken, else the first by path; see `copies`.

    Raises ValueError for a list that is malformed or contradicts itself (naming file and line), and where not one
    annotated video is found.
    """
    clips = read_annotations(annotations)
    by_id: dict[str, list[Clip]] = {}
    for clip in clips:
        by_id.setdefault(clip.youtube_id, []).append(clip)

    unannotated: list[str] = []
    candidates: dict[Clip, list[tuple[bool, str]]] = {}
    for path in list_videos(folder):
        name = NAME.fullmatch(PurePosixPath(path).stem)
        matches = by_id.get(name[1], []) if name else []
        if name and name[2]:
            matches = [clip for clip in matches if (clip.start, clip.end) == (int(name[2]), int(name[3]))]
        elif len(matches) > 1:
            above = {_plain(part) for part in path.split("/")[:-1]}
            matches = [clip for clip in matches if _plain(clip.label) in above]
        if name and len(matches) == 1:
            candidates.setdefault(matches[0], []).append((not name[2], path))
        else:
            unannotated.append(path)
    if not candidates:
        raise ValueError(
            f"{folder}: none of its {len(unannotated)} videos is among the {len(clips)} annotated ones; names must be "
            f"like {clips[0].youtube_id}.mp4 or {clips[0].file_name}.mp4: check the folder and the list"
        )
    rows = sorted((min(files)[1], clip.label, clip.subset) for clip, files in candidates.items())
    return Scan(
        from_rows(rows, str(folder), lambda row: f"{folder}: video {rows[row][0]!r}"),
        [clip.name for clip in clips if clip not in candidates],
        unannotated,
        sorted(path for files in candidates.values() for _, path in sorted(files)[1:]),
    )


def _plain(name: str) -> str:
    return name.replace("_", " ").casefold()


def read_annotations(annotations: Sequence[StrPath]) -> list[Clip]:
    """All clips of the lists, in their order, each once."""
    if not annotations:
        raise ValueError("no annotation list is given: name at least one of Kinetics' CSV files")
    seen: dict[tuple[str, int, int], tuple[Clip, str]] = {}
    for path in annotations:
        for line, (label, youtube_id, start, end, split) in zip(*read_csv(path, COLUMNS, ("is_cc",))):
            where = f"{path}, line {line}"
            if not re.fullmatch(r"[A-Za-z0-9_-]{11}", youtube_id):
                raise ValueError(f"{where}: youtube_id {youtube_id!r} is not 11 letters, digits, - or _: correct it")
            if not (re.fullmatch("[0-9]+", start) and re.fullmatch("[0-9]+", end) and int(start) < int(end)):
                raise ValueError(f"{where}: times {start!r} to {end!r} are not two rising whole seconds: correct them")
            if split not in SUBSETS:
                raise ValueError(f"{where}: unknown split {split!r}; write one of {', '.join(SUBSETS)}")
            clip = Clip(label, youtube_id, int(start), int(end), SUBSETS[split])
            first, first_where = seen.setdefault(clip[1:4], (clip, where))
            if first != clip:
                raise ValueError(
                    f"{where}: {clip.name} ({clip.subset}) contradicts {first_where}, where the same clip is "
                    f"{first.name} ({first.subset}): delete one of the two lines"
                )
    if not seen:
        raise ValueError(f"{', '.join(map(str, annotations))}: no rows below the header: name a list that has some")
    return [clip for clip, _ in seen.values()]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="folder of the videos")
    parser.add_argument("lists", type=Path, nargs="+", metavar="LIST", help="official annotation list, CSV")
    parser.add_argument("--out", type=Path, required=True, help="manifest to write")
    arguments = parser.parse_args()
    try:
        found = scan(arguments.folder, *arguments.lists)
        found.manifest.write(arguments.out)
        missing = arguments.out.with_suffix(".missing.txt")
        missing.write_text("".join(f"{name}\n" for name in found.missing))
    except (OSError, ValueError) as error:
        parser.exit(1, f"{parser.prog}: {error}\n")
    print(
        f"{len(found.manifest.paths)} videos in {arguments.out}; {len(found.missing)} annotated videos are missing "
        f"({missing}); left out are {len(found.unannotated)} files that are in no list, and {len(found.copies)} other "
        "files of videos that are taken"
    )


if __name__ == "__main__":
    main()
