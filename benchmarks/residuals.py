"""python -m benchmarks.residuals --videos FOLDER_OR_FILE...

Takes about a minute and a half on one idle CPU core and ends with a Markdown table, a line a video: what residuals add
to stage 1, and how far from them one comes by CoViAR's way.

*Stage 1*: CPU time of this process from the video to its verified shard, without residuals and with them, in turns; the
ratio is the median of each turn's. *Alone*: CPU time of the residuals by themselves, exact, and as CoViAR takes them:
every pixel less the one that the vector, cut off to whole pixels, points to. *Energy*: of both, the mean over all
inter-coded pixels, in grey levels. *Half*: blocks whose vector does not point to whole pixels.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np

from benchmarks.common import CLIPS, ROOT
from benchmarks.stage1_cases import store
from preprocess import encode, extract, residual
from preprocess.schema import INTRA, MACROBLOCK, NO_RESIDUAL, QUARTERS, Settings
from preprocess.writer import Spool


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[1])
    parser.add_argument("--videos", type=Path, nargs="+", help=f"videos or folders of them; default {CLIPS}")
    parser.add_argument("--turns", type=int, default=5)
    parser.add_argument("--quick", action="store_true", help="one turn: whether it runs, not how fast")
    options = parser.parse_args()
    print("| video | frames | stage 1, µs a frame: without, with | ratio ", end="")
    print("| alone, µs a frame: exact, CoViAR's | energy: exact, CoViAR's | CoViAR's / exact | half |")
    print("|---|" + "---:|" * 7)
    places = options.videos or [ROOT / CLIPS]
    for video in (v for place in places for v in (sorted(place.iterdir()) if place.is_dir() else [place])):
        frames, without, with_them = stage1(str(video), 1 if options.quick else options.turns)
        ratio = median(b / a for a, b in zip(without, with_them))
        (exact, fast), (whole, slow), half = alone(str(video))
        cells = (
            *(video.name[:24], frames, micro(median(without), median(with_them)), f"{ratio:.2f}", micro(fast, slow)),
            *(f"{exact:.2f}, {whole:.2f}", f"{whole / exact:.2f}" if exact else "", f"{half:.0%}"),
        )
        print(f"| {' | '.join(map(str, cells))} |", flush=True)


def micro(*seconds: float) -> str:
    return ", ".join(f"{1e6 * s:.0f}" for s in seconds)


def stage1(video: str, turns: int) -> tuple[int, list[float], list[float]]:
    """Frames of a video, and the seconds a frame that its shard takes in each turn, without and with residuals."""
    taken: dict[tuple[str, ...], list[float]] = {Spool.names: [], (*Spool.names, "residual"): []}
    for _ in range(1 + turns):  # the first warms up
        for names, seconds in taken.items():
            with tempfile.TemporaryDirectory(prefix="context-motion-") as scratch:
                frames, spent = timed(store, Path(scratch), [video], names)
                seconds.append(spent / frames)
    without, with_them = (seconds[1:] for seconds in taken.values())
    return frames, without, with_them


def alone(video: str) -> tuple[tuple[float, float], tuple[float, float], float]:
    """Mean energy a pixel and seconds a frame, exact and CoViAR's way, and the share of blocks off whole pixels."""
    settings, decoded = Settings(), []
    sums, seconds, moved, off = np.zeros(2), np.zeros(2), 0, 0
    for frame, vectors in extract.decoded(encode.packets(video, settings, encode.Source())):
        luma, spent = timed(residual.padded_luma, frame, settings.grid)
        decoded.append((luma, vectors))
        seconds[0] += spent
    for first in range(0, len(decoded), settings.gop):
        lumas, records = zip(*decoded[first : first + settings.gop])
        motion = extract.grids(records, settings)
        for way, compute in enumerate((residual.energies, whole_pixels)):
            found, spent = timed(compute, lumas, motion)
            sums[way] += found[found != NO_RESIDUAL].sum(dtype=float)
            seconds[way] += spent
        inter = motion[..., 0] != INTRA
        moved += inter.sum()
        off += (motion[inter] % QUARTERS != 0).any(-1).sum()
    pixels, each = sums / (max(moved, 1) * MACROBLOCK**2), seconds / len(decoded)
    return (pixels[0], each[0]), (pixels[1], each[1]), off / max(moved, 1)


def whole_pixels(lumas: tuple[np.ndarray, ...], motion: np.ndarray) -> np.ndarray:
    """As `residual.energies`, by vectors cut off to whole pixels, a pixel at a time."""
    found = np.full(motion.shape[:3], NO_RESIDUAL, np.uint16)
    vectors = np.trunc(motion / QUARTERS).astype(np.int64).repeat(MACROBLOCK, 1).repeat(MACROBLOCK, 2)
    height, width = vectors.shape[1:3]
    y, x = np.mgrid[:height, :width]
    inside = np.s_[MACROBLOCK:-MACROBLOCK, MACROBLOCK:-MACROBLOCK]
    for t in range(1, len(lumas)):
        dx, dy = np.moveaxis(vectors[t], -1, 0)
        before = lumas[t - 1][inside][(y - dy).clip(0, height - 1), (x - dx).clip(0, width - 1)]
        difference = np.abs(lumas[t][inside].astype(np.int16) - before)
        blocks = difference.reshape(height // MACROBLOCK, MACROBLOCK, -1, MACROBLOCK)
        found[t] = blocks.sum((1, 3), dtype=np.uint16)
    found[motion[..., 0] == INTRA] = NO_RESIDUAL
    return found


def timed(function: Callable[..., Any], *arguments: Any) -> tuple[Any, float]:
    """What a function returns, and the seconds of CPU time that it takes."""
    begin = time.process_time()
    return function(*arguments), time.process_time() - begin


if __name__ == "__main__":
    main()
