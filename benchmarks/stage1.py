"""python -m benchmarks.stage1 --clips FOLDER_OR_FILE...

Takes about five minutes on two idle CPU cores (--quick: half of one) and ends with five Markdown tables: speed on every
source, where ours goes, scaling to two workers, peak memory over the number of videos, and what Kinetics-400 takes on
64 cores.
Three ways through the same clips, each a process of its own, in turns (limit ours usual limit ours usual ...):

limit   decode, scale to 340x256, encode as MPEG-4, decode again with motion vectors exported; one thread, encoder and
        scaler set as ours are, nothing else
usual   ffmpeg's command line as CoViAR runs it, then mvextractor: of every frame a JPEG file and a .npy file of vectors
ours    preprocess.pipeline.run, from the manifest to verified shards and their checksums

CPU time is user and system time of a way's whole process tree, ffmpeg processes and codec subprocesses included. Clips
are repeated under other names until --frames frames run (a quarter of that where a clip is high-definition). What a
process costs before its first frame (interpreter, imports, the codec subprocess of every worker) is measured in the
same turns on a video of one frame and taken off; a column shows it for ours. Figures are medians over the turns and
ratios medians of each turn's. Clips are grouped by codec: UCF101 comes in Xvid, HMDB51 in DivX, Kinetics in H.264.
The phases of ours are measured in one process, with a clock around the functions that make them up; what a real run
takes beyond their sum is the row "processes": two of them, the pipe, the progress. The clock slows what it measures by
some hundredths beyond what is taken off for it, so that the row can be negative.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from contextlib import redirect_stdout
from io import StringIO
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import av
import numpy as np

from benchmarks.common import CLIPS, ROOT
from benchmarks.stage1_cases import HEIGHT, LIMIT_PHASES, OUR_PHASES, WIDTH, run_case

WAYS = ("limit", "usual", "ours")
HIGH_DEFINITION = 576  # lines; taller clips are a source of their own: decoding them outweighs all the rest
NAMES = {"XVID": "Xvid", "DX50": "DivX", "DIVX": "DivX", "AVC1": "H.264", "H264": "H.264"}
SHARD_VIDEOS, CORES = 128, 64
KINETICS_VIDEOS, KINETICS_FRAMES = 246_000 + 20_000, 300  # training and validation; about 10 s at 30 frames a second


class Clip(NamedTuple):
    """A video file and the number of frames that it declares."""

    path: Path
    frames: int


class Cost(NamedTuple):
    """What one source takes: frames a CPU-second, limit's and ours, and bytes of a shard a frame."""

    limit: float
    ours: float
    size: float


class Result(NamedTuple):
    """What one measurement found: frames stored, seconds, bytes of all shards, peak memory in bytes (ours only)."""

    frames: int
    cpu: float
    wall: float
    size: int = 0
    worker_peak: int = 0
    codec_peak: int = 0


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[1])
    parser.add_argument("--clips", type=Path, nargs="+", help=f"videos or folders of them; default {CLIPS}")
    parser.add_argument("--repeats", type=int, default=3, help="turns")
    parser.add_argument("--frames", type=int, default=3000, help="frames of a measurement, at least")
    parser.add_argument("--videos", type=int, default=8, help="different clips of a source, at most")
    parser.add_argument("--quick", action="store_true", help="one turn, 300 frames: whether it runs, not how fast")
    parser.add_argument("--case", nargs=3, metavar=("WAY", "FOLDER", "WORKERS"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.case:
        with redirect_stdout(StringIO()):  # what stage 1 says of its work
            found = run_case(options.case[0], Path(options.case[1]), int(options.case[2]))
        print(json.dumps(found))
        return
    if options.quick:
        options.repeats, options.frames = 1, 300
    places = options.clips or [ROOT / CLIPS]
    sources = find_sources(places, options.videos)
    if not sources:
        sys.exit(f"no video in {', '.join(map(str, places))}: name files or folders of real videos with --clips")
    if not shutil.which("ffmpeg"):
        print("no ffmpeg on the PATH: nothing to compare with in the column of the usual way", file=sys.stderr)
    with tempfile.TemporaryDirectory(prefix="context-motion-") as folder:
        empty = one_frame(Path(folder) / "one.avi")
        costs = speed(sources, empty, options.repeats, options.frames)
        where(sources, costs, options.repeats, options.frames)
        scaling(next(iter(sources.values())), empty, options.repeats, options.frames)
        shortest = min((c for clips in sources.values() for c in clips), key=lambda c: c.frames)
        memory(shortest, (1, 2, 4) if options.quick else (4, 16, 64))
    kinetics(costs)


def find_sources(places: list[Path], most: int) -> dict[str, list[Clip]]:
    """Clips by codec, at most so many of each, spread evenly over the names; what is not a video is left out."""
    found: dict[str, list[Clip]] = defaultdict(list)
    files = [f for p in places for f in (sorted(p.rglob("*")) if p.is_dir() else [p]) if not f.is_dir()]
    for file in files:
        try:
            with av.open(str(file), metadata_errors="ignore") as container:
                stream = container.streams.video[0]
                codec = stream.codec_context
                name = NAMES.get(codec.codec_tag.upper(), codec.name)
                tall = f", {codec.height} lines" if codec.height > HIGH_DEFINITION else ""
                count = stream.frames or sum(1 for _ in container.decode(stream))
                found[name + tall].append(Clip(file.resolve(), count))
        except (av.FFmpegError, IndexError) as error:
            print(f"left out: {file}: {error}", file=sys.stderr)
    order = sorted(found, key=lambda name: ("lines" in name, name != "Xvid", name))
    return {name: found[name][:: -(-len(found[name]) // most)] for name in order}


def one_frame(path: Path) -> Clip:
    """A video of one frame: what it takes is what a process costs before it does anything."""
    with av.open(str(path), "w") as output:
        stream = output.add_stream("mpeg4", rate=25)
        stream.width, stream.height, stream.pix_fmt = WIDTH, HEIGHT, "yuv420p"
        grey = np.full((HEIGHT, WIDTH, 3), 128, np.uint8)
        output.mux(stream.encode(av.VideoFrame.from_ndarray(grey, "rgb24")))
        output.mux(stream.encode())
    return Clip(path, 1)


# The tables


def speed(sources: dict[str, list[Clip]], empty: Clip, repeats: int, frames: int) -> dict[str, Cost]:
    """The first table; returns what each source takes."""
    ways = [w for w in WAYS if w != "usual" or shutil.which("ffmpeg")]
    runs: dict[tuple[str, str], list[Result]] = defaultdict(list)
    for _ in range(repeats):
        for source, clips in {"": [empty], **sources}.items():
            for way in sorted(ways):  # ours between the two that it is held against
                runs[source, way].append(measure(way, repeated(clips, share(source, frames)), 1))
    start = {way: start_up(runs["", way]) for way in ways}
    print("Frames per CPU-second (and, in parentheses, per second), one worker\n")
    print("| source | clips | limit | usual | ours | ours / limit | ours / usual | start-up of ours, CPU s |")
    print("|---|" + "---:|" * 7)
    costs = {}
    for source, clips in sources.items():
        cpu = {w: [r.frames / (r.cpu - start[w].cpu) for r in runs[source, w]] for w in ways}
        wall = {w: [r.frames / (r.wall - start[w].wall) for r in runs[source, w]] for w in ways}
        cells = [f"{median(cpu[w]):.0f} ({median(wall[w]):.0f})" if w in ways else "no ffmpeg" for w in WAYS]
        ratio = {w: f"{median([o / x for o, x in zip(cpu['ours'], cpu[w])]):.2f}" if w in ways else "–" for w in WAYS}
        print(
            f"| {source} | {len(clips)} | {' | '.join(cells)} | {ratio['limit']} | {ratio['usual']} | "
            f"{start['ours'].cpu:.2f} |"
        )
        last = runs[source, "ours"][-1]
        costs[source] = Cost(median(cpu["limit"]), median(cpu["ours"]), last.size / last.frames)
    typical = SHARD_VIDEOS * KINETICS_FRAMES / median([cost.ours for cost in costs.values()])
    print(f"\nThat start-up is {start['ours'].cpu / typical:.1%} of a shard of {SHARD_VIDEOS} videos of ten seconds.\n")
    return costs


def where(sources: dict[str, list[Clip]], costs: dict[str, Cost], repeats: int, frames: int) -> None:
    """The second table: where the time of ours goes."""
    spent = {}
    for source, clips in sources.items():
        runs = []
        for _ in range(repeats):
            ((answer,), _, _) = run("phases", repeated(clips, share(source, frames)), 1)
            runs.append({phase: 1e6 * s / answer["frames"] for phase, s in answer["phases"].items()})
        spent[source] = {phase: median([r[phase] for r in runs]) for phase in (*LIMIT_PHASES, *OUR_PHASES)}
    print("Microseconds of CPU time a frame: where ours goes\n")
    print(f"| phase | {' | '.join(sources)} |")
    print("|---|" + "---:|" * len(sources))
    ours = {source: 1e6 / costs[source].ours for source in sources}
    rows = {phase: [spent[s][phase] for s in sources] for phase in (*LIMIT_PHASES, *OUR_PHASES)}
    rows["processes, and the clock's error"] = [ours[s] - sum(spent[s].values()) for s in sources]
    rows["ours, whole"] = list(ours.values())
    rows["the first four, which the limit does too"] = [sum(spent[s][p] for p in LIMIT_PHASES) for s in sources]
    rows["limit, whole"] = [1e6 / costs[s].limit for s in sources]
    for name, values in rows.items():
        print(f"| {name} | {' | '.join(f'{v:.0f}' for v in values)} |")
    print()


def scaling(clips: list[Clip], empty: Clip, repeats: int, frames: int) -> None:
    """The third table: two at once against one, ours and two independent processes of the limit."""
    runs: dict[tuple[str, int, bool], list[Result]] = defaultdict(list)
    cases = [(way, n) for n in (1, 2) for way in ("limit", "ours")]
    for _ in range(repeats):
        for way, n in cases:
            runs[way, n, True].append(measure(way, [empty], n))
        for way, n in cases:
            runs[way, n, False].append(measure(way, repeated(clips, frames), n))
    wall, cpu = {}, {}
    for way, n in cases:
        start = start_up(runs[way, n, True])
        wall[way, n] = [r.frames / (r.wall - start.wall) for r in runs[way, n, False]]
        cpu[way, n] = [r.frames / (r.cpu - start.cpu) for r in runs[way, n, False]]
    print("Two workers of ours against two independent processes of the limit\n")
    print("| | limit, one | two | gain | ours, one | two | gain | gain of ours / gain of limit |")
    print("|---|" + "---:|" * 7)
    for label, rate in (("frames per second", wall), ("frames per CPU-second", cpu)):
        gain = {w: [b / a for a, b in zip(rate[w, 1], rate[w, 2])] for w in ("limit", "ours")}
        cells = [f"{median(rate[w, 1]):.0f} | {median(rate[w, 2]):.0f} | {median(gain[w]):.2f}" for w in gain]
        relative = median([o / x for o, x in zip(gain["ours"], gain["limit"])])
        print(f"| {label} | {' | '.join(cells)} | {relative:.2f} |")
    print()


def memory(clip: Clip, counts: tuple[int, ...]) -> None:
    """The fourth table: the same clip under more and more names, all in one shard."""
    print(f"Peak memory (resident, MB) of a worker, a clip of {clip.frames} frames under so many names, one shard\n")
    print("| videos | frames | shard | worker | codec subprocess |")
    print("|" + "---:|" * 5)
    for count in counts:
        r = measure("ours", [clip] * count, 1)
        megabytes = [f"{b / 1e6:.1f}" for b in (r.size, r.worker_peak, r.codec_peak)]
        print(f"| {count} | {r.frames} | {' | '.join(megabytes)} |", flush=True)
    print()


def kinetics(costs: dict[str, Cost]) -> None:
    """The last table: what the measured figures make of Kinetics-400, were all of it like these clips."""
    frames = KINETICS_VIDEOS * KINETICS_FRAMES
    print(f"Kinetics-400, {KINETICS_VIDEOS:,} videos of {KINETICS_FRAMES} frames, on {CORES} such cores\n")
    print("| if all were like | frames per CPU-second | bytes a frame | hours | GB |")
    print("|---|" + "---:|" * 4)
    for source, cost in costs.items():
        if source.startswith("H.264") or not any(s.startswith("H.264") for s in costs):
            hours = frames / cost.ours / CORES / 3600
            print(f"| {source} | {cost.ours:.0f} | {cost.size:.0f} | {hours:.2f} | {frames * cost.size / 1e9:.0f} |")


def share(source: str, frames: int) -> int:
    """How many frames of a source are run; of none, one."""
    return 1 if not source else frames // 4 if "lines" in source else frames


def repeated(clips: list[Clip], frames: int) -> list[Clip]:
    """The clips over and over until so many frames are reached."""
    rounds = -(-frames // sum(c.frames for c in clips))
    return clips * rounds


def start_up(runs: list[Result]) -> Result:
    return Result(1, median([r.cpu for r in runs]), median([r.wall for r in runs]))


# One measurement


def measure(way: str, clips: list[Clip], workers: int) -> Result:
    """Run one way over the clips: `workers` processes, each over all of them, or ours with as many workers."""
    answers, cpu, wall = run(way, clips, workers)
    frames = sum(a.pop("frames") for a in answers)
    return Result(frames, cpu, wall, **answers[0])


def run(way: str, clips: list[Clip], workers: int) -> tuple[list[dict[str, Any]], float, float]:
    """What each process answered, and the seconds of CPU and of wall time that all took."""
    with tempfile.TemporaryDirectory(prefix="context-motion-") as scratch:
        videos = Path(scratch) / "videos"
        videos.mkdir()
        copies = workers if way == "ours" else 1
        for k, clip in enumerate(clips * copies):
            (videos / f"{k:04d}{clip.path.suffix}").symlink_to(clip.path)
        command = [sys.executable, "-m", "benchmarks.stage1", "--case", way, scratch, str(workers)]
        environment = os.environ | {"OMP_NUM_THREADS": "1"}
        begin_cpu, begin = children_cpu(), time.perf_counter()
        processes = [
            subprocess.Popen(command, stdout=subprocess.PIPE, cwd=ROOT, env=environment)
            for _ in range(1 if way == "ours" else workers)
        ]
        outputs = [p.communicate()[0] for p in processes]
        wall, cpu = time.perf_counter() - begin, children_cpu() - begin_cpu
        if any(p.returncode for p in processes):
            raise RuntimeError(f"{way} failed with status {[p.returncode for p in processes]}; see above")
    answers = [json.loads(o) for o in outputs]
    frames = sum(a["frames"] for a in answers)
    print(f"{way} x {workers}: {frames} frames, {cpu:.2f} CPU s, {wall:.2f} s", file=sys.stderr, flush=True)
    return answers, cpu, wall


def children_cpu() -> float:
    """User and system seconds of every descendant that has ended and been waited for."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


if __name__ == "__main__":
    main()
