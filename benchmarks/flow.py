"""python -m benchmarks.flow --videos FILE...

Takes about half a minute on one idle CPU core and ends with a Markdown table: what the two kinds of motion of table 4
cost, and how far they agree, on one real clip where it is at hand and on one embedded scene of the paper's size. Both
read the same encoded stream, decoding included: motion vectors as stage 1 takes them, all of them, and TV-L1 optical
flow of the first --frames frames. Times are CPU time of this process.

The two are compared on the blocks that move: inter-coded, and either of the two at least --least pixels long. The
end-point difference is the length of flow - vector; the angle is the field's usual one, between (dx, dy, 1) of both.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

import av
import numpy as np

from benchmarks.common import CLIPS, ROOT
from preprocess import encode, extract, flow, synthetic
from preprocess.schema import INTRA, QUARTERS, Settings

CLIP = "v_SoccerJuggling_g23_c01.avi"
UCF101_FRAMES = 27 * 3600 * 25  # 27 hours at 25 frames a second


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[1])
    parser.add_argument("--videos", type=Path, nargs="+", help=f"default: {CLIPS / CLIP} and a scene")
    parser.add_argument("--frames", type=int, default=24, help="frames of a video whose flow is computed")
    parser.add_argument("--least", type=float, default=1.0, help="pixels a frame from which a block counts as moving")
    parser.add_argument("--quick", action="store_true", help="three frames: whether it runs, not how fast")
    options = parser.parse_args()
    settings, frames = Settings(), 3 if options.quick else options.frames
    print("| source | vectors, ms a frame | flow, ms a frame | ratio | blocks that move ", end="")
    print(
        "| end-point difference, px: mean, median | angle, degrees: mean, median | UCF101: vectors, flow, CPU hours |"
    )
    print("|---|" + "---:|" * 7)
    with tempfile.TemporaryDirectory(prefix="context-motion-") as folder:
        for video in options.videos or list(usual(Path(folder), settings)):
            packets = list(encode.packets(str(video), settings, encode.Source()))
            vectors, fast = timed(vector_maps(packets, settings), len(packets))
            pictures = (picture for picture, _ in extract.decoded(packets))
            flows, slow = timed(flow.maps(pictures, settings), min(frames, len(packets)))
            hours = (seconds * UCF101_FRAMES / 3600 for seconds in (fast, slow))
            moving, length, angle = compared(np.stack(vectors), np.stack(flows), options.least)
            print(
                f"| {video.name} | {fast * 1e3:.2f} | {slow * 1e3:.0f} | {slow / fast:.0f} | {moving} | "
                f"{length.mean():.2f}, {np.median(length):.2f} | {angle.mean():.1f}, {np.median(angle):.1f} | "
                f"{', '.join(f'{h:.1f}' for h in hours)} |",
                flush=True,
            )


def usual(folder: Path, settings: Settings) -> Iterator[Path]:
    if (ROOT / CLIPS / CLIP).exists():
        yield (ROOT / CLIPS / CLIP).resolve()
    size = {"width": settings.width, "height": settings.height}
    manifest = synthetic.write(folder, synthetic.Scenes(1, 1, train=1, test=0, **size))
    yield folder / manifest.paths[0]


def vector_maps(packets: list[av.Packet], settings: Settings) -> Iterator[np.ndarray]:
    """Motion vectors of every frame, a group of pictures at a time, as stage 1 takes them: int16 (rows, cols, 2)."""
    frames = (vectors for _, vectors in extract.decoded(packets))
    while group := list(islice(frames, settings.gop)):
        yield from extract.grids(group, settings)


def timed(maps: Iterator, count: int) -> tuple[list, float]:
    """The first `count` maps, and the seconds of CPU time that each took."""
    begin = time.process_time()
    taken = list(islice(maps, count))
    return taken, (time.process_time() - begin) / len(taken)


def compared(vectors: np.ndarray, flows: np.ndarray, least: float) -> tuple[int, np.ndarray, np.ndarray]:
    """How many blocks move, and of each the end-point difference (pixels) and the angle (degrees) of its two motions.

    Both are int16 (T, rows, cols, 2), vectors perhaps of more frames.
    """
    vectors = vectors[: len(flows)]
    known = (vectors[..., 0] != INTRA) & (flows[..., 0] != INTRA)
    a, b = (maps[known] / QUARTERS for maps in (vectors, flows))
    moving = np.maximum(np.linalg.norm(a, axis=1), np.linalg.norm(b, axis=1)) >= least
    a, b = a[moving], b[moving]
    a3, b3 = (np.column_stack([m, np.ones(len(m))]) for m in (a, b))
    cosine = (a3 * b3).sum(1) / np.linalg.norm(a3, axis=1) / np.linalg.norm(b3, axis=1)
    return len(a), np.linalg.norm(a - b, axis=1), np.degrees(np.arccos(cosine.clip(-1, 1)))


if __name__ == "__main__":
    main()
