"""What a run of stage 1 came to: failures.csv, and the lines that it ends with."""

from __future__ import annotations

import csv
import re
import sys
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from preprocess.files import replacing
from preprocess.schema import Failure, shard_paths
from preprocess.shards import open_shard

REASONS = 20  # of failures, shown in the end


@dataclass(frozen=True)
class Summary:
    """What a run ends with."""

    videos: int
    frames: int
    failures: list[Failure]
    shards_made: int
    shards_skipped: int
    seconds: float
    shards_left: int = 0
    """Those that another process works on."""


def write_failures(out: Path) -> list[Failure]:
    """Collect the failure rows of every finished shard into failures.csv; returns them."""
    seen: dict[str, int] | None = None
    failures: list[Failure] = []
    # Of several parts, the last to come sees every shard; none writes over it what it saw before.
    while seen != (there := _inodes(out)):
        shards = (open_shard(p) for p in shard_paths(out))
        seen, failures = there, [f for s in shards if s is not None for f in s.failed]
        with (
            replacing(out / "failures.csv") as partial,
            open(partial, "w", newline="", encoding="utf-8", errors="surrogateescape") as file,
        ):
            writer = csv.writer(file, lineterminator="\n")
            writer.writerow(Failure._fields)
            writer.writerows(failures)
    return failures


def _inodes(out: Path) -> dict[str, int]:
    found = {}
    for path in shard_paths(out):
        with suppress(FileNotFoundError):  # another process puts a new one there
            found[path.name] = path.stat().st_ino
    return found


def report(summary: Summary, out: Path) -> None:
    """Say what a run did, failures first: a line a reason, with the first video that it is told of."""
    reasons: dict[str, list[Failure]] = {}
    for failure in summary.failures:
        kind = re.sub(r"\d+", "…", failure.reason.replace(failure.path, "…"))
        reasons.setdefault(kind, []).append(failure)
    for alike in sorted(reasons.values(), key=len, reverse=True)[:REASONS]:
        count = f"{len(alike)} videos, such as " if len(alike) > 1 else ""
        print(f"failed  {count}{alike[0].path}: {alike[0].reason}", file=sys.stderr)
    if len(reasons) > REASONS:
        print(f"failed  … {len(reasons) - REASONS} more reasons in {out / 'failures.csv'}", file=sys.stderr)
    rate = summary.frames / max(summary.seconds, 1e-9)
    left = f", {summary.shards_left} left to another process" if summary.shards_left else ""
    print(
        f"{summary.shards_made} shards made, {summary.shards_skipped} already there{left}: {summary.videos} videos, "
        f"{summary.frames} frames in {summary.seconds:.1f} s ({rate:.0f} frames/s), {len(summary.failures)} failed"
    )
