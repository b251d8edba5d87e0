"""python -m benchmarks.motion_loss --batches 4 8 16 32 64 128 256 512

Takes about five minutes on one idle CPU core (to batch 128: one) and ends with a Markdown table: time and peak memory
of equation (2), forward and backward with accuracy, as it is usually written (the matrix of logits, then cross-entropy)
beside ours (tiles of rows); then with the line that fits our peak memory against the batch. Sizes are the paper's: 49
motion points a clip, three negative windows, 512 channels, so that a batch of B has 49·B × 196·B logits. Memory is what
a case needs beyond its embeddings: every case is a process of its own, and its peak is measured against that after
imports, inputs and a small warm-up run; on CUDA it is what torch's allocator counts. Time is the process's CPU time; on
CUDA, until the device is done. Above batch 128 a case runs once.
"""

from __future__ import annotations

import argparse
import json
import math
import resource
import subprocess
import sys
from pathlib import Path

import numpy as np

POINTS, WINDOWS, CHANNELS, TEMPERATURE = 49, 3, 512, 0.1
FORMS = ("usual", "tiled")
COPIES = 3.2  # matrices of logits that the usual form holds at its peak
FEW = 128  # the largest batch that is run several times


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[1])
    parser.add_argument(
        "--batches", type=int, nargs="+", default=[4, 8, 16, 32, 64, 128, 256, 512], help="clips of a batch"
    )
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads of torch")
    parser.add_argument("--repeats", type=int, default=3, help="timed runs of a case, of which the fastest counts")
    parser.add_argument("--quick", action="store_true", help="two small batches: whether it runs, not how fast")
    parser.add_argument("--case", nargs=2, metavar=("FORM", "BATCH"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.quick:
        options.batches, options.repeats = [2, 4], 1
    if options.case:
        form, batch = options.case
        print(json.dumps(measure(form, int(batch), options.device, options.threads, options.repeats)))
        return
    print(f"| batch | logits | {' | '.join(f'{form}, ms' for form in FORMS)} | time | ", end="")
    print(f"{' | '.join(f'{form}, MB' for form in FORMS)} | memory |")
    print("|" + "---:|" * 8)
    memory = {}
    for batch in options.batches:
        (usual_time, usual_bytes), (tiled_time, tiled_bytes) = (run_case(form, batch, options) for form in FORMS)
        rows, memory[batch] = batch * POINTS, tiled_bytes / 1e6
        usual = [f"{usual_time * 1e3:.1f}", f"{tiled_time / usual_time:.2f}", f"{usual_bytes / 1e6:.1f}"]
        if math.isnan(usual_time):
            usual = ["does not fit", "", f"about {COPIES * 4 * rows * rows * (1 + WINDOWS) / 1e6:.0f}"]
        share = "" if math.isnan(usual_time) else f"{tiled_bytes / usual_bytes:.2f}"
        print(
            f"| {batch} | {rows:,} × {rows * (1 + WINDOWS):,} | {usual[0]} | {tiled_time * 1e3:.1f} | {usual[1]} | "
            f"{usual[2]} | {tiled_bytes / 1e6:.1f} | {share} |",
            flush=True,
        )
    print(fit(memory))


def fit(memory: dict[int, float]) -> str:
    """The line through the peaks (batch -> MB) of batches whose logits fill more than a tile, by least squares."""
    full = {b: mb for b, mb in memory.items() if 4 * (1 + WINDOWS) * (b * POINTS) ** 2 > 64 * 2**20}
    if len(full) < 3:
        return "\nA line needs three batches of 42 clips or more, whose logits fill more than a tile."
    batches, peaks = np.array(list(full)), np.array(list(full.values()))
    slope, constant = np.polyfit(batches, peaks, 1)
    off = np.abs(slope * batches + constant - peaks).max() / peaks.max()
    return (
        f"\nPeak memory, tiled, from batch {batches.min()} on: {constant:.0f} MB + {slope:.2f} MB a clip; no point is "
        f"further from the line than {off:.1%} of the largest."
    )


def run_case(form: str, batch: int, options: argparse.Namespace) -> tuple[float, int]:
    """One case in a process of its own: a process's peak memory never goes down again."""
    command = [sys.executable, "-m", "benchmarks.motion_loss", "--case", form, str(batch), "--device", options.device]
    command += ["--threads", str(options.threads), "--repeats", str(options.repeats if batch <= FEW else 1)]
    seconds, peak = json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout)
    return seconds, peak


def measure(form: str, batch: int, device: str, threads: int, repeats: int) -> tuple[float, int]:
    """Seconds of the fastest run, and bytes at the peak of the first beyond those before; NaN for what does not fit."""
    # Imported here: on Linux a child's peak starts at its parent's, so the parent must stay smaller than any case.
    import torch
    from torch.nn.functional import cross_entropy, normalize

    from benchmarks.common import clock
    from train.objectives import Loss, motion_prediction

    torch.set_num_threads(threads)

    def usual(predicted: torch.Tensor, positives: torch.Tensor, negatives: torch.Tensor) -> Loss:
        logits = predicted @ torch.cat((positives, negatives)).T
        logits = logits / TEMPERATURE
        target = torch.arange(len(logits), device=logits.device)
        return Loss(cross_entropy(logits, target), (logits.argmax(1) == target).float().mean())

    def embeddings(clips: int) -> list[torch.Tensor]:
        rows = (clips * POINTS, clips * POINTS, clips * POINTS * WINDOWS)
        return [normalize(torch.randn(n, CHANNELS, device=device), dim=1).requires_grad_() for n in rows]

    def run(inputs: list[torch.Tensor]) -> float:
        predicted, positives, negatives = inputs
        begin = clock(device)
        if form == "usual":
            loss = usual(predicted, positives, negatives)
        else:
            loss = motion_prediction(predicted, positives, negatives, TEMPERATURE)
        torch.autograd.grad(loss.value, inputs)
        return clock(device) - begin

    def peak() -> int:
        if device != "cpu":
            return torch.cuda.max_memory_allocated()
        # Kilobytes on Linux, bytes on macOS.
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)

    # A CPU's memory is asked for first: who asks for too much there is killed.
    if device == "cpu" and form == "usual" and COPIES * 4 * (batch * POINTS) ** 2 * (1 + WINDOWS) > free():
        return math.nan, 0
    torch.manual_seed(0)
    try:
        inputs = embeddings(batch)
        run(embeddings(1))
        if device != "cpu":
            torch.cuda.reset_peak_memory_stats()
        before = peak()
        seconds = [run(inputs)]
        needed = peak() - before
        seconds += [run(inputs) for _ in range(repeats - 1)]
    except torch.OutOfMemoryError:
        return math.nan, 0
    return min(seconds), needed


def free() -> float:
    """Bytes that can still be had of a CPU's memory."""
    meminfo = Path("/proc/meminfo")
    if not meminfo.exists():  # not Linux: let it try
        return math.inf
    return 1024 * int(next(line.split()[1] for line in meminfo.read_text().splitlines() if "MemAvailable" in line))


if __name__ == "__main__":
    main()
