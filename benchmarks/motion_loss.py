"""python -m benchmarks.motion_loss --batches 4 8 16 32 64 128

Takes about a minute on one idle CPU core and ends with a Markdown table: time and peak memory of equation (2), forward
and backward with accuracy, as it is usually written (the matrix of logits, then cross-entropy) beside ours (tiles of
rows). Sizes are the paper's: 49 motion points a clip, three negative windows, 512 channels, so that a batch of B has
49·B × 196·B logits. Memory is what a case needs beyond its embeddings: every case is a process of its own, and its peak
is measured against that after imports, inputs and a small warm-up run. On CUDA it is what torch's allocator counts.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import time

POINTS, WINDOWS, CHANNELS, TEMPERATURE = 49, 3, 512, 0.1
FORMS = ("usual", "tiled")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[1])
    parser.add_argument("--batches", type=int, nargs="+", default=[4, 8, 16, 32, 64, 128], help="clips of a batch")
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads of torch")
    parser.add_argument("--repeats", type=int, default=3, help="timed runs of a case, of which the fastest counts")
    parser.add_argument("--case", nargs=2, metavar=("FORM", "BATCH"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.case:
        form, batch = options.case
        print(json.dumps(measure(form, int(batch), options.device, options.threads, options.repeats)))
        return
    print(f"| batch | logits | {' | '.join(f'{form}, ms' for form in FORMS)} | time | ", end="")
    print(f"{' | '.join(f'{form}, MB' for form in FORMS)} | memory |")
    print("|" + "---:|" * 8)
    for batch in options.batches:
        (usual_time, usual_bytes), (tiled_time, tiled_bytes) = (run_case(form, batch, options) for form in FORMS)
        rows = batch * POINTS
        print(
            f"| {batch} | {rows:,} × {rows * (1 + WINDOWS):,} | {usual_time * 1e3:.1f} | {tiled_time * 1e3:.1f} | "
            f"{tiled_time / usual_time:.2f} | {usual_bytes / 1e6:.1f} | {tiled_bytes / 1e6:.1f} | "
            f"{tiled_bytes / usual_bytes:.2f} |",
            flush=True,
        )


def run_case(form: str, batch: int, options: argparse.Namespace) -> tuple[float, int]:
    """One case in a process of its own: a process's peak memory never goes down again."""
    command = [sys.executable, "-m", "benchmarks.motion_loss", "--case", form, str(batch), "--device", options.device]
    command += ["--threads", str(options.threads), "--repeats", str(options.repeats)]
    seconds, peak = json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout)
    return seconds, peak


def measure(form: str, batch: int, device: str, threads: int, repeats: int) -> tuple[float, int]:
    """Seconds of the fastest run, and bytes at the peak of the first beyond those before it."""
    # Imported here: on Linux a child's peak starts at its parent's, so the parent must stay smaller than any case.
    import torch
    from torch.nn.functional import cross_entropy, normalize

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
        begin = now()
        if form == "usual":
            loss = usual(predicted, positives, negatives)
        else:
            loss = motion_prediction(predicted, positives, negatives, TEMPERATURE)
        torch.autograd.grad(loss.value, inputs)
        return now() - begin

    def now() -> float:
        if device != "cpu":
            torch.cuda.synchronize()
        return time.perf_counter()

    def peak() -> int:
        if device != "cpu":
            return torch.cuda.max_memory_allocated()
        # Kilobytes on Linux, bytes on macOS.
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)

    torch.manual_seed(0)
    inputs = embeddings(batch)
    run(embeddings(1))
    before = peak()
    seconds = [run(inputs)]
    needed = peak() - before
    seconds += [run(inputs) for _ in range(repeats - 1)]
    return min(seconds), needed


if __name__ == "__main__":
    main()
