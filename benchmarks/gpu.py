"""make gpu SHARDS=shards/ucf101 MANIFEST=data_manifests/ucf101_split1.csv

Every number that wants a GPU, in --minutes at the most; the same command goes on with what is missing. Part after part
is stored in OUT/measurements.json and, as Markdown, in OUT/table.md, which is also printed at the end:

agreement   a small step in float32 on the GPU and on the CPU, both beside float64; the tests marked `cuda`
steps       table 9's recipes in all precisions, compiled or not, against a plain loop (benchmarks.train_step)
equation 2  in tiles and written out, up to batches that only tiles can hold (benchmarks.motion_loss)
loader      clips a second on all cores (benchmarks.loader)
training    table 9's C3D on SHARDS for the time that is left, and then what it retrieves; without SHARDS, left out

Without a GPU everything runs on the CPU with tiny networks, in half a minute, and says so: whether it runs, not
how fast. Status 1 where a part failed: it is tried again the next time.
"""

from __future__ import annotations

import argparse
import gc
import json
import math
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import redirect_stdout
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import default_collate

from benchmarks import motion_loss, train_step
from benchmarks.common import ROOT, rendered
from benchmarks.loader import throughput
from benchmarks.train_step import BACKBONES, TINY, Case, configuration, label
from preprocess.command import DONE, ERROR, TERMINATED, ended
from preprocess.files import write_text
from preprocess.schema import Settings
from preprocess.shards import ShardSet
from train.config import Config
from train.data import PretrainSet
from train.device import choose_device
from train.model import build_model
from train.runs import git_commit
from train.tasks import PretrainingTask

RECIPE = "pretrain-ucf101-c3d"
TRAINING = 6 * 60  # seconds that are kept for it
TOLERANCE = 1e-3  # of inputs, and of loss and gradient in their length
Part = Callable[[], dict[str, Any]]


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[1])
    parser.add_argument("--shards", type=Path, help="folder of real shards; default a few scenes, and no training")
    parser.add_argument("--manifest", type=Path, help="their manifest, with train and test rows")
    parser.add_argument("--out", type=Path, default=Path("gpu_out"))
    parser.add_argument("--minutes", type=float, default=25.0)
    options = parser.parse_args()
    if (options.shards is None) != (options.manifest is None):
        parser.error("--shards and --manifest belong together")
    deadline = time.monotonic() + 60 * options.minutes
    device = choose_device("auto")
    stored = options.out / "measurements.json"
    record = resumed(stored, machine(device))
    with tempfile.TemporaryDirectory(prefix="context-motion-") as folder:
        shards, manifest = options.shards, options.manifest
        if shards is None:
            small = {"width": 176, "height": 144, "frame_width": 112, "frame_height": 92}
            settings = Settings(**({} if device.type == "cuda" else small))
            with redirect_stdout(sys.stderr):
                shards, manifest = rendered(Path(folder), settings, test=9)
        todo = dict(parts(ShardSet(shards), device))
        until = dict.fromkeys(todo, deadline - (TRAINING if options.shards else 0))
        if options.shards or device.type == "cpu":
            todo["training"] = partial(train, shards, manifest, options.out / "c3d", device, deadline)
            until["training"] = math.inf  # it takes the time that is left
        failed = work_off(todo, until, record, stored)
    text = page(record)
    write_text(options.out / "table.md", text)
    print(text)
    for line in failed:
        print(f"failed: {line}", file=sys.stderr)
    if missing := [name for name in todo if is_missing(record, name)]:
        print(f"not finished, the same command goes on: {', '.join(missing)}", file=sys.stderr)
    return ERROR if failed else DONE


def work_off(todo: dict[str, Part], until: dict[str, float], record: dict[str, Any], stored: Path) -> list[str]:
    """Measure what is missing of the record and store it part by part; none is begun after its time. Returns what
    failed, and why: whatever it was, it costs no other part."""
    failed = []
    for name, part in todo.items():
        begin = time.monotonic()
        if not is_missing(record, name) or begin > until[name]:
            continue
        print(f"{name} ...", file=sys.stderr, flush=True)
        try:
            found = part()
            record["parts"][name] = found | {"commit": git_commit(), "seconds": round(time.monotonic() - begin, 1)}
        except Exception as error:
            failed.append(f"{name}: {type(error).__name__}: {error}")
        write_text(stored, json.dumps(record, indent=1) + "\n")
        if torch.cuda.is_available():
            torch.compiler.reset()
            gc.collect()
            torch.cuda.empty_cache()
    return failed


def is_missing(record: dict[str, Any], name: str) -> bool:
    return record["parts"].get(name, {"unfinished": True}).get("unfinished", False)


def machine(device: torch.device) -> dict[str, Any]:
    on_gpu = device.type == "cuda"
    return {
        "device": torch.cuda.get_device_name(device) if on_gpu else "CPU",
        "torch": torch.__version__,
        "cudnn": torch.backends.cudnn.version(),
        "cores": len(os.sched_getaffinity(0)),
    }


def resumed(stored: Path, here: dict[str, Any]) -> dict[str, Any]:
    """What earlier calls found; ValueError where they ran elsewhere."""
    if not stored.exists():
        return {"machine": here, "parts": {}}
    record = json.loads(stored.read_text())
    if record["machine"] != here:
        there = record["machine"]
        raise ValueError(f"{stored} was measured on {there}, this is {here}: remove it, or choose another --out")
    return record


def parts(shards: ShardSet, device: torch.device) -> Iterator[tuple[str, Part]]:
    """What is measured before training, what matters most first."""
    on_gpu = device.type == "cuda"
    changes, batch, seconds, workers = ({}, 64, 5.0, None) if on_gpu else (TINY, 2, 0.0, 0)

    def steps(*cases: Case) -> Iterator[tuple[str, Part]]:
        for case in cases:
            measured = partial(train_step.measure, case, changes, shards, device, workers, seconds)
            yield f"step of {case.backbone}, {label(case._asdict())}", measured

    yield "agreement", partial(agreement, configuration(Case("c3d", batch=4), TINY), shards, device)
    yield "tests", tests
    precisions = ("bfloat16", "TF32", "float32") if on_gpu else ("float32",)
    for backbone in BACKBONES:
        yield from steps(Case(backbone, "plain", precisions[-2:][0], batch=batch))
        yield from steps(*(Case(backbone, "ours", precision, batch=batch) for precision in precisions))
    yield from steps(Case("c3d", "ours", precisions[0], recompute=True, batch=batch))
    batches = (64, 128, 256, 512, 768, 1024, 1536) if on_gpu else (2, 4)
    yield "equation 2", partial(equation_2, batches, device)
    yield "loader", partial(loader, configuration(Case("c3d", batch=batch), changes), shards, seconds)
    if on_gpu:
        yield from steps(Case("c3d", "ours", "bfloat16", recompute=True, batch=512))
        for precision in precisions:
            yield from steps(*(Case(backbone, "ours", precision, compiled=True) for backbone in BACKBONES))


# The parts that no other benchmark has


def agreement(config: Config, shards: ShardSet, device: torch.device) -> dict[str, Any]:
    """How far loss and gradient of a step in float32 are from float64, on the device and on the CPU, and how far the
    device's augmentation is from the CPU's; ValueError beyond `TOLERANCE`."""
    torch.backends.cudnn.allow_tf32 = False
    torch.set_float32_matmul_precision("highest")
    task = PretrainingTask(config, shards, None)  # type: ignore[arg-type]
    batch = default_collate(task.data.__getitems__([(0, i) for i in range(config.batch_size)]))
    inputs, there = (task.inputs({k: v.to(d) for k, v in batch.items()}) for d in ("cpu", device))
    off = max(float((a - b.cpu()).abs().max()) for a, b in zip(inputs, there) if a is not None and b is not None)

    def step(where: torch.device, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        torch.manual_seed(0)
        model = build_model(config, 1).to(where, dtype).train()
        for part in model.modules():
            if isinstance(part, nn.Dropout):
                part.p = 0.0
        loss, _ = task.loss(model, tuple(x if x is None else x.to(where, dtype) for x in inputs), batch)  # type: ignore[arg-type]
        loss.backward()
        gradient = torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])
        return loss.detach().double().cpu(), gradient.double().cpu()

    exact = step(torch.device("cpu"), torch.float64)
    found: dict[str, Any] = {"inputs": off}
    for name, where in (("device", device), ("cpu", torch.device("cpu"))):
        for what, value, truth in zip(("loss", "gradient"), step(where, torch.float32), exact):
            found[f"{what}, {name}"] = float((value - truth).norm() / truth.norm())
    if not max(found.values()) < TOLERANCE:
        raise ValueError(f"{found}, where the tolerance is {TOLERANCE}")
    return found


def tests() -> dict[str, Any]:
    """The tests that need a GPU; skipped without one."""
    files = [str(p) for p in sorted((ROOT / "tests").glob("test_*.py")) if "mark.cuda" in p.read_text()]
    command = [sys.executable, "-m", "pytest", "-m", "cuda", "-p", "no:cacheprovider", *files]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(done.stdout[-2000:] + done.stderr[-2000:])
    return {"summary": done.stdout.strip().splitlines()[-1]}


def equation_2(batches: tuple[int, ...], device: torch.device) -> dict[str, Any]:
    """(seconds, bytes) of both forms by batch; None where the GPU's memory does not suffice."""
    torch.set_float32_matmul_precision("high")
    rows = []
    for batch in batches:
        row: dict[str, Any] = {"batch": batch}
        for form in motion_loss.FORMS:
            found = motion_loss.measure(form, batch, str(device), 1, 3)
            row[form] = None if math.isnan(found[0]) else found
        rows.append(row)
    return {"rows": rows}


def loader(config: Config, shards: ShardSet, seconds: float) -> dict[str, Any]:
    data = PretrainSet(shards, None, config)
    cores = len(os.sched_getaffinity(0))
    return {"cores": cores, "clips_per_second": throughput(data, cores, config.batch_size, 2 * seconds)}


def train(shards: Path, manifest: Path, out: Path, device: torch.device, deadline: float) -> dict[str, Any]:
    """Train as long as there is time, then retrieve; `unfinished` where the recipe has more epochs."""
    changes = {} if device.type == "cuda" else TINY | {"batch_size": 2, "epochs": 1}
    flags = [text for name, value in changes.items() for text in (f"--{name.replace('_', '-')}", str(value))]
    data = ["--shards", str(shards), "--manifest", str(manifest)]
    command = [sys.executable, "-m", "train", RECIPE, *data, "--out", str(out), *flags]
    child = subprocess.Popen(command, stdout=sys.stderr)
    try:
        status = child.wait(max(deadline - time.monotonic() - TRAINING / 4, TRAINING / 4))
    except subprocess.TimeoutExpired:
        child.terminate()  # it saves
        status = child.wait()
    if status not in (DONE, TERMINATED):
        raise RuntimeError(f"python -m train ended with status {status}")
    subprocess.run([sys.executable, "-m", "eval", "retrieve", str(out), *data], check=True, stdout=sys.stderr)
    rows = [json.loads(path.read_text()) for path in (out / "results").glob("*.json")]
    row = max(rows, key=lambda row: row["epoch"])
    line = json.loads((out / "metrics.jsonl").read_text().splitlines()[-1])
    found = {name: line.get(name) for name in ("clips_per_second", "waiting", "mfu")}
    found |= {"epoch": row["epoch"], "manifest": manifest.stem, **row["metrics"]}
    return found | ({"unfinished": True} if status == TERMINATED else {})


# What is shown


def page(record: dict[str, Any]) -> str:
    """Markdown, as the README's chapter on speed has it."""
    here, found = record["machine"], record["parts"]
    commits = ", ".join(sorted({part["commit"] for part in found.values()}))
    text = [f"{here['device']}, torch {here['torch']}, cuDNN {here['cudnn']}, {here['cores']} cores ({commits})"]
    if here["device"] == "CPU":
        text.insert(0, "**A dry run without a GPU, of tiny networks: no number means anything.**")
    if steps := [part for name, part in found.items() if name.startswith("step of")]:
        text.append(train_step.table(sorted(steps, key=lambda row: BACKBONES.index(row["backbone"]))))
    if "equation 2" in found:
        lines = ["| batch | equation (2), written out | in tiles |", "|---:|---:|---:|"]
        for row in found["equation 2"]["rows"]:
            cells = [
                f"{1e3 * row[form][0]:.1f} ms, {row[form][1] / 1e6:.0f} MB" if row[form] else "does not fit"
                for form in motion_loss.FORMS
            ]
            lines.append(f"| {row['batch']} | {' | '.join(cells)} |")
        text.append("\n".join(lines))
    names = [name for name in ("agreement", "tests", "loader", "training") if name in found]
    text.append("\n".join(f"- {name}: {told(found[name])}" for name in names))
    return "\n\n".join(text) + "\n"


def told(part: dict[str, Any]) -> str:
    values = {k: v for k, v in part.items() if k != "commit" and v is not None}
    return ", ".join(f"{k} {v:.3g}" if isinstance(v, float) else f"{k} {v}" for k, v in values.items())


if __name__ == "__main__":
    sys.exit(ended(main, "interrupted: the same command goes on"))
