"""python -m benchmarks.busy

Takes about two minutes and prints a Markdown table: clips a second of training steps, alone and beside a second such
program, each with as many threads as there are cores. libgomp: its threads spin as long as they do by default while
they wait for each other. Ours: as `train` sets them before torch is loaded.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import time
from statistics import median

from benchmarks.common import ROOT

WAITING = {"libgomp": "300000", "ours": None}  # GOMP_SPINCOUNT; None: what importing train sets
PROGRAM = "import sys; from benchmarks.busy import steps; print(steps(float(sys.argv[1])))"


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[1])
    parser.add_argument("--seconds", type=float, default=10, help="a turn, starting not counted")
    parser.add_argument("--turns", type=int, default=3)
    options = parser.parse_args()
    found: dict[tuple[str, int], list[float]] = {(which, n): [] for which in WAITING for n in (1, 2)}
    for _ in range(options.turns):
        for which, programs in found:
            found[which, programs] += run(WAITING[which], programs, options.seconds)
    print(f"{os.cpu_count()} cores; clips/s of each program, median of {options.turns} turns\n")
    print("| threads wait as | alone | beside another |\n|---|---:|---:|")
    for which in WAITING:
        print(f"| {which} | {median(found[which, 1]):.1f} | {median(found[which, 2]):.1f} |")


def run(spins: str | None, programs: int, seconds: float) -> list[float]:
    """Clips a second of each of some programs that run at the same time."""
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("OMP_", "GOMP_"))}
    environment = kept | ({"GOMP_SPINCOUNT": spins} if spins else {})
    command = [sys.executable, "-c", PROGRAM, str(seconds)]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    started = [subprocess.Popen(command, env=environment, cwd=ROOT, **pipes) for _ in range(programs)]
    for program in started:
        program.stdout.readline()  # it has taken its first step
    for program in started:
        program.stdin.write("\n")
        program.stdin.flush()
    return [float(program.communicate()[0]) for program in started]


def steps(seconds: float) -> float:
    """Clips a second of the scenes' backbone, forward and backward, on noise, counted from a line on standard input."""
    import train  # noqa: F401, I001  # before torch
    import torch
    from train.networks import build_video_network

    network, clips = build_video_network("r3d10", width=16), torch.randn(32, 3, 8, 64, 64)

    def step() -> None:
        network.forward_pretrain(clips).mean().backward()

    step()
    print("ready", flush=True)
    sys.stdin.readline()
    begin, done = time.monotonic(), 0
    while time.monotonic() < begin + seconds:
        step()
        done += len(clips)
    return done / (time.monotonic() - begin)


if __name__ == "__main__":
    main()
