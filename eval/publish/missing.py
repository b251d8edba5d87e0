"""What tables still miss, as commands: listed, carried out here one after another, or written as SLURM job arrays.

    python -m eval tables --plan --data ucf101=shards/ucf101:data_manifests/ucf101_split1.csv

A command is left out where its output is there: of a training a checkpoint that has reached its epochs, of an
evaluation a sound row. A training comes before what is evaluated or continued from it, once however many cells need it.
"""

from __future__ import annotations

import fcntl
import json
import math
import os
import shlex
import signal
import statistics
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from eval.features import CLIPS
from eval.publish.cells import FAMILIES, NINE, STEMS, Cell, cells, trained_on
from eval.publish.collect import AtHand
from eval.results import Row
from preprocess.command import DONE, INTERRUPTED, TERMINATED, WITH_FAILURES, say
from preprocess.files import write_text
from preprocess.manifest import Manifest
from preprocess.shards import ShardSet
from train import cost, runs
from train.config import Config
from train.data import check_motion
from train.heldout import FORWARD
from train.recipes import RECIPES

VERBS = {"retrieval": "retrieve", "classification": "classify", "pretext": "pretext"}
RECENT = 100  # lines of metrics whose clips per second count
PYTHON = (sys.executable, "-m")
"""What starts a command."""
SPARE = 1.5  # time asked of SLURM, over the estimate
PUBLISHED = {
    **{"ucf101": (9537, 3783), "hmdb51": (3570, 1530), "k400": (246_000, 0), "ucf20": (1947, 776)},
    **dict.fromkeys(("scenes", "small"), (288, 360)),
}
"""(training, test) videos of data sets that are not at hand."""

TASK = """#!/bin/bash
#SBATCH --job-name=tables
#SBATCH --gres=gpu:1
#SBATCH --cpus-per-task=8
#SBATCH --requeue
#SBATCH --signal=B:TERM@120
#SBATCH --output=log-%A-%a.txt
# Task n is line n of the file that is given. Every task may be started again: training goes on from its checkpoint.
cd {here} || exit 1
eval "exec $(sed -n "${{SLURM_ARRAY_TASK_ID}}p" {folder}/"$1")"
"""


def parse(text: str) -> AtHand:
    """Of --data NAME=SHARDS:MANIFEST; ValueError where it is none, or of no table."""
    name, equals, rest = text.partition("=")
    shards, colon, manifest = rest.rpartition(":")
    if not (name and equals and shards and colon and manifest):
        raise ValueError(f"--data {text}: write NAME=SHARDS:MANIFEST")
    names = (*STEMS, "k400", *FAMILIES)
    if name not in names:
        raise ValueError(f"--data {text}: no table has the data set {name}; there are {', '.join(names)}")
    found = AtHand(name, Path(shards), Path(manifest))
    if found.dataset != STEMS.get(name, found.dataset):
        raise ValueError(f"--data {text}: the tables are of {STEMS[name]}.csv; name that manifest")
    return found


@dataclass(frozen=True)
class Step:
    """A command whose output is missing."""

    command: tuple[str, ...]
    """What follows python -m."""
    hours: float
    measured: bool
    """By the speed of runs on this machine; else by train.cost."""
    after: Step | None
    """What comes first, where that is missing too."""
    lacks: str
    """Why it cannot run; empty where it can."""

    def __str__(self) -> str:
        return f"python -m {shlex.join(self.command)}"

    def chain(self) -> list[Step]:
        """Everything that comes first, and itself."""
        return [*(self.after.chain() if self.after else []), self]


class Training(NamedTuple):
    recipe: str
    pretraining: str
    seed: int

    @property
    def name(self) -> str:
        """Of its folder."""
        began = f"-from-{self.pretraining}" if self.pretraining else ""
        return f"{self.recipe}{began}-s{self.seed}"

    @property
    def config(self) -> Config:
        return RECIPES[self.recipe].config.changed({"seed": self.seed})

    @property
    def kept(self) -> list[int]:
        """Epochs whose weights some table wants, before the last."""
        mine = [c.epoch for c in cells(NINE) if (c.recipe, c.pretraining) == (self.recipe, self.pretraining)]
        return sorted({e for e in mine if 0 < e < self.config.epochs})


class Existing(NamedTuple):
    """What there is of a training."""

    folder: Path
    epoch: float
    """Of its last checkpoint."""
    speed: float
    """Operations a second, by train.cost, zero where its log has no clips per second."""


class Place:
    """A folder of runs with the data at hand, and the steps that are missing in it."""

    def __init__(
        self, folder: Path, data: Sequence[AtHand], training: Sequence[str] = (), evaluation: Sequence[str] = ()
    ) -> None:
        """`training` and `evaluation` are further flags of every such step."""
        self.folder, self.data = folder, {d.name: d for d in data}
        self.flags = {"train": training, "eval": evaluation}
        self.existing = self._scan()
        subsets = {d.name: Manifest.read(d.manifest).subsets for d in data}
        self.videos = PUBLISHED | {name: (max(1, of.count("train")), of.count("test")) for name, of in subsets.items()}

    def missing(self, tables: Sequence[str], seeds: Sequence[int], rows: Sequence[Row]) -> list[Step]:
        """The steps that fill some tables, each after what it needs; `rows` are sound ones."""
        steps: dict[Step, None] = {}
        for cell in cells(tables):
            dataset = self.data[cell.data].dataset if cell.data in FAMILIES and cell.data in self.data else ""
            done = {row["seed"] for row in rows if cell.is_of(row, dataset)}
            for seed in seeds:
                if seed not in done:
                    steps |= dict.fromkeys(self.evaluation(cell, seed).chain())
        return list(steps)

    def training(self, wanted: Training) -> Step | None:
        """None where it is finished."""
        there, epochs = self.existing.get(wanted), wanted.config.epochs
        left = 1 - there.epoch / epochs if there else 1.0
        if left <= 0:
            return None
        options, before = ["--seed", str(wanted.seed)], None
        if wanted.kept:
            options += ["--keep-epochs", *map(str, wanted.kept)]
        if wanted.pretraining:
            first = Training(wanted.pretraining, "", wanted.seed)
            before = self.training(first)
            options += ["--pretrained", str(self._run(first))]
        hours, measured = self._hours(wanted)
        what = ["train", wanted.recipe, "--out", str(self._run(wanted))]
        lacks = self._lacks(wanted)
        return self._step(what, options, (hours * left, measured), before, trained_on(wanted.recipe), lacks)

    def evaluation(self, cell: Cell, seed: int) -> Step:
        of = Training(cell.recipe, cell.pretraining, seed)
        last, kept, there = cell.epoch == of.config.epochs, f"epoch-{cell.epoch:04d}", self.existing.get(of)
        options = ["--weights", "last" if last else kept if cell.epoch else "initial"]
        gone = there and 0 < cell.epoch <= there.epoch and not last and not (there.folder / f"{kept}.pt").exists()
        lacks = f"{there.folder} did not keep {kept}: train elsewhere with --keep-epochs" if there and gone else ""
        if cell.kind == "retrieval":
            options += ["--network", cell.network]
        hours, measured = self._hours(of)
        train, test = self.videos[cell.data]
        clips = {"retrieval": CLIPS * (train + test), "classification": CLIPS * test, "pretext": test}[cell.kind]
        hours *= FORWARD * clips / (of.config.epochs * self.videos[trained_on(cell.recipe)][0])
        what = ["eval", VERBS[cell.kind], str(self._run(of))]
        return self._step(what, options, (hours, measured), self.training(of), cell.data, lacks)

    def _lacks(self, training: Training) -> str:
        """What its shards, where they are at hand, lack of the motion that it predicts: flow, or residuals."""
        data, sampling = self.data.get(trained_on(training.recipe)), training.config.sampling
        if data is None or sampling.motion == "vectors" or not data.shards.exists():
            return ""
        try:
            check_motion(ShardSet(data.shards), sampling)
        except ValueError as error:
            return str(error)
        return ""

    def _step(
        self, what: list[str], options: list[str], hours: tuple[float, bool], after: Step | None, data: str, lacks: str
    ) -> Step:
        d = self.data.get(data)
        shards, manifest = (str(d.shards), str(d.manifest)) if d else ("SHARDS", "MANIFEST")
        lacks = lacks if d else f"--data {data}=SHARDS:MANIFEST is not given"
        command = (*what, "--shards", shards, "--manifest", manifest, *options, *self.flags[what[0]])
        return Step(command, *hours, after, lacks or (after.lacks if after else ""))

    def _run(self, training: Training) -> Path:
        return self.existing[training].folder if training in self.existing else self.folder / training.name

    def _hours(self, training: Training) -> tuple[float, bool]:
        """(hours of the whole training, whether by the speed of runs of the same networks)."""
        mine, videos = training.config, self.videos[trained_on(training.recipe)][0]
        alike = [t for t in self.existing if (t.config.networks, t.config.size) == (mine.networks, mine.size)]
        if speeds := [self.existing[t].speed for t in alike if self.existing[t].speed]:
            return mine.epochs * videos * cost.flops_per_clip(mine) / statistics.median(speeds) / 3600, True
        return cost.gpu_hours(mine, videos), False

    def _scan(self) -> dict[Training, Existing]:
        """The trainings of recipes, with their own settings and the data at hand; of several alike the furthest."""
        found: dict[Training, Existing] = {}
        for path in sorted(self.folder.glob("*/run.json")):
            try:
                about = runs.read(path.parent)
                training = Training(about["recipe"], about["pretrained"].get("recipe", ""), about["seed"])
                data = self.data.get(trained_on(training.recipe)) if training.recipe in RECIPES else None
                mine = data is None or data.dataset == about["trained_on"]
                if not mine or about["subset"] != "train" or about["config_sha256"] != training.config.sha256():
                    continue
                state = path.with_name("checkpoint.json")
                epoch = float(json.loads(state.read_text())["epoch"]) if state.exists() else 0.0
            except (ValueError, KeyError, TypeError):  # another program's, or damaged
                continue
            if training not in found or epoch > found[training].epoch:
                rate = _rate(path.with_name("metrics.jsonl"))
                found[training] = Existing(path.parent, epoch, rate and rate * cost.flops_per_clip(training.config))
        return found


def _rate(path: Path) -> float:
    """Median of the clips per second that a run's log ends with; zero where it has none."""
    found = []
    for text in path.read_text().splitlines()[-RECENT:] if path.exists() else []:
        try:
            found.append(float(json.loads(text)["clips_per_second"]))
        except (ValueError, KeyError, TypeError):  # a line that a kill cut short
            continue
    return statistics.median(found) if found else 0.0


def describe(steps: Sequence[Step]) -> str:
    """A line a step: number, hours, command, and the step that comes first; then the sums."""
    if not steps:
        return "nothing is missing"
    lines = []
    for n, step in enumerate(steps, 1):
        how = "measured" if step.measured else "estimated"
        after = f"  # after {1 + steps.index(step.after)}" if step.after else ""
        lacks = f"  # cannot run: {step.lacks}" if step.lacks else ""
        lines.append(f"{n:4}  {step.hours:7.2f} h {how:9}  {step}{after}{lacks}")
    ready = [step for step in steps if not step.lacks]
    trainings = sum(step.command[0] == "train" for step in steps)
    lines.append(f"{trainings} trainings and {len(steps) - trainings} evaluations are missing: {_total(steps)}")
    if len(ready) < len(steps):
        lines.append(f"{len(ready)} of these can run: {_total(ready)}" if ready else "none of these can run")
    return "\n".join(lines)


def _total(steps: Sequence[Step]) -> str:
    said = []
    for measured, unit in ((True, "hours by clips per second measured here"), (False, "GPU hours estimated")):
        if each := [step.hours for step in steps if step.measured == measured]:
            said.append(f"{sum(each):.1f} {unit}" if sum(each) >= 0.05 else f"under 0.1 {unit}")
    return ", ".join(said)


# ---- carried out here


def run(plan: Callable[[], Sequence[Step]], folder: Path) -> int:
    """Run the steps of a plan in their order; 0, or 3 where some failed, 130 and 143 where it was stopped.

    A step that failed leaves out those that need it, and no others. Only one such process works in a folder of runs; a
    step that a killed one left behind is waited for, before the plan is made.
    """
    failed: dict[Step, str] = {}
    child: subprocess.Popen[bytes] | None = None
    terminated = False

    def pass_on(*_: object) -> None:  # SIGTERM goes to the step that runs, which saves and ends
        nonlocal terminated
        terminated = True
        if child:
            child.terminate()

    before = signal.signal(signal.SIGTERM, pass_on)
    try:
        with _alone(folder) as lock:
            steps = plan()
            for number, step in enumerate(steps, 1):
                if step.lacks or step.after in failed:
                    failed[step] = step.lacks or "what it needs failed"
                    continue
                print(f"[{number}/{len(steps)}] {step}", flush=True)
                # The child inherits the lock, and so holds it on where this process is killed.
                child = subprocess.Popen([*PYTHON, *step.command], pass_fds=[lock])
                if terminated:
                    child.terminate()
                status = child.wait()
                if status in (INTERRUPTED, -signal.SIGINT):
                    raise KeyboardInterrupt
                if terminated:
                    say("terminated: the same command goes on from here")
                    return TERMINATED
                if status:
                    failed[step] = f"it ended with status {status}"
    finally:
        signal.signal(signal.SIGTERM, before)
    for step, reason in failed.items():
        say(f"not done: {step}: {reason}")
    return WITH_FAILURES if failed else DONE


@contextmanager
def _alone(folder: Path) -> Iterator[int]:
    """Hold the lock of a folder of runs; yields its file descriptor."""
    folder.mkdir(parents=True, exist_ok=True)
    lock = os.open(folder / ".running", os.O_RDWR | os.O_CREAT, 0o644)
    try:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            say(f"another process works in {folder}, or a step that it left behind: waiting for it")
            fcntl.flock(lock, fcntl.LOCK_EX)
        except OSError:
            say(f"{folder} is on a file system without locks: see that no other process works in it")
        yield lock
    finally:
        os.close(lock)


# ---- as SLURM job arrays


def write_slurm(steps: Sequence[Step], folder: Path) -> list[list[Step]]:
    """Write job arrays: a level is what needs nothing but earlier levels; submit.sh queues them one after another.

    Returns the levels. Steps that lack something are left out. ValueError where nothing is left.
    """
    ready = [step for step in steps if not step.lacks]
    if not ready:
        raise ValueError("there is no job to write: " + (steps[0].lacks if steps else "nothing is missing"))
    depth = max(len(step.chain()) for step in ready)
    levels = [[step for step in ready if len(step.chain()) == n] for n in range(1, depth + 1)]
    where, here = shlex.quote(str(folder.resolve())), shlex.quote(str(Path.cwd()))
    submit = ["#!/bin/bash", "set -e", f"cd {where}"]
    for n, level in enumerate(levels, 1):
        write_text(folder / f"level-{n}.txt", "".join(f"{shlex.join([*PYTHON, *step.command])}\n" for step in level))
        hours = math.ceil(SPARE * max(step.hours for step in level)) + 1
        # afterany: where one task failed, the others' successors still run, and its own say what is missing.
        after = ' --dependency="afterany:$previous"' if n > 1 else ""
        array = f"--array=1-{len(level)} --time={hours}:00:00"
        submit.append(f"previous=$(sbatch --parsable {array}{after} task.sbatch level-{n}.txt)")
    write_text(folder / "task.sbatch", TASK.format(folder=where, here=here))
    write_text(folder / "submit.sh", "\n".join([*submit, 'echo "queued, the last array is $previous"', ""]))
    (folder / "submit.sh").chmod(0o755)
    return levels
