"""A plan's jobs: described, run here one after another, or written as SLURM job arrays."""

from __future__ import annotations

import fcntl
import math
import os
import shlex
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from eval.plan import Job
from preprocess.files import write_text

PYTHON = (sys.executable, "-m")
"""What starts a job's command."""
DONE, FAILURES, INTERRUPTED, TERMINATED = 0, 3, 130, 143
SPARE = 1.5  # time asked of SLURM, over the estimate

ARRAY = """#!/bin/bash
#SBATCH --job-name=tables-{level}
#SBATCH --array=1-{count}
#SBATCH --gres=gpu:1
#SBATCH --cpus-per-task=8
#SBATCH --time={hours}:00:00
#SBATCH --requeue
#SBATCH --signal=B:TERM@120
#SBATCH --output={folder}/log-%A-%a.txt
# Task n is line n of level-{level}.txt. Every job may be started again: training goes on from its checkpoint.
cd {here} || exit 1
eval "exec $(sed -n "${{SLURM_ARRAY_TASK_ID}}p" {commands})"
"""


def describe(jobs: Sequence[Job]) -> str:
    """A line a job: number, hours, command, and the jobs that come first; then the sums."""
    if not jobs:
        return "nothing is missing"
    numbers = {job.name: n for n, job in enumerate(jobs, 1)}
    lines = []
    for n, job in enumerate(jobs, 1):
        how = "measured" if job.measured else "estimated"
        after = f"  # after {', '.join(str(numbers[x]) for x in job.needs)}" if job.needs else ""
        lacks = f"  # cannot run: {job.lacks}" if job.lacks else ""
        lines.append(f"{n:4}  {job.hours:7.2f} h {how:9}  python -m {shlex.join(job.command)}{after}{lacks}")
    ready = [job for job in jobs if not job.lacks]
    measured = sum(job.hours for job in ready if job.measured)
    estimated = sum(job.hours for job in ready if not job.measured)
    trainings = sum(job.command[0] == "train" for job in jobs)
    lines.append(
        f"{trainings} trainings and {len(jobs) - trainings} evaluations are missing, {len(ready)} of these can run: "
        f"{measured:.1f} hours by clips per second measured here, {estimated:.1f} GPU hours estimated"
    )
    return "\n".join(lines)


def run(plan: Callable[[], Sequence[Job]], folder: Path) -> int:
    """Run the jobs of a plan in their order; 0, or 3 where some failed, 130 and 143 where it was stopped.

    A job that failed leaves out those that need it, and no others. Only one such process works in a folder of runs; a
    job that a killed one left behind is waited for, before the plan is made.
    """
    failed: dict[str, str] = {}
    with _alone(folder) as lock, _passing_on_sigterm() as state:
        jobs = plan()
        for number, job in enumerate(jobs, 1):
            lost = next((n for n in job.needs if n in failed), "")
            if job.lacks or lost:
                failed[job.name] = job.lacks or f"{lost} failed"
                continue
            print(f"[{number}/{len(jobs)}] python -m {shlex.join(job.command)}", flush=True)
            # The child inherits the lock, and so holds it on where this process is killed.
            state.child = subprocess.Popen([*PYTHON, *job.command], pass_fds=[lock])
            if state.terminated:
                state.child.terminate()
            status = state.child.wait()
            if status in (INTERRUPTED, -signal.SIGINT):
                raise KeyboardInterrupt
            if state.terminated:
                print("terminated: the same command goes on from here", file=sys.stderr)
                return TERMINATED
            if status:
                failed[job.name] = f"it ended with status {status}"
    for name, reason in failed.items():
        print(f"not done: {name}: {reason}", file=sys.stderr)
    return FAILURES if failed else DONE


@dataclass
class _State:
    child: subprocess.Popen[bytes] | None = None
    terminated: bool = False


@contextmanager
def _passing_on_sigterm() -> Iterator[_State]:
    """SIGTERM goes to the job that runs, which saves and ends."""
    state = _State()

    def pass_on(*_: object) -> None:
        state.terminated = True
        if state.child:
            state.child.terminate()

    before = signal.signal(signal.SIGTERM, pass_on)
    try:
        yield state
    finally:
        signal.signal(signal.SIGTERM, before)


@contextmanager
def _alone(folder: Path) -> Iterator[int]:
    """Hold the lock of a folder of runs; yields its file descriptor."""
    folder.mkdir(parents=True, exist_ok=True)
    lock = os.open(folder / ".running", os.O_RDWR | os.O_CREAT, 0o644)
    try:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            print(f"another process works in {folder}, or a job that it left behind: waiting for it", file=sys.stderr)
            fcntl.flock(lock, fcntl.LOCK_EX)
        yield lock
    finally:
        os.close(lock)


def slurm(jobs: Sequence[Job], folder: Path) -> list[list[Job]]:
    """Write job arrays: a level is what needs nothing but earlier levels; submit.sh queues them one after another.

    Returns the levels. Jobs that lack something are left out. ValueError where nothing is left.
    """
    level: dict[str, int] = {}
    for job in jobs:
        if not job.lacks:
            level[job.name] = 1 + max((level[n] for n in job.needs), default=0)
    if not level:
        raise ValueError("there is no job to write: " + (jobs[0].lacks if jobs else "nothing is missing"))
    levels = [[j for j in jobs if level.get(j.name) == n] for n in range(1, max(level.values()) + 1)]
    folder.mkdir(parents=True, exist_ok=True)
    where, here = shlex.quote(str(folder.resolve())), shlex.quote(str(Path.cwd()))
    submit = ["#!/bin/bash", "set -e", f"cd {where}"]
    for n, some in enumerate(levels, 1):
        commands = folder.resolve() / f"level-{n}.txt"
        write_text(commands, "".join(f"{shlex.join([*PYTHON, *job.command])}\n" for job in some))
        text = ARRAY.format(
            level=n,
            count=len(some),
            hours=math.ceil(SPARE * max(job.hours for job in some)) + 1,
            folder=folder.resolve(),
            here=here,
            commands=shlex.quote(str(commands)),
        )
        write_text(folder / f"level-{n}.sbatch", text)
        # afterany: where one task failed, the others' successors still run, and its own say what is missing.
        after = ' --dependency="afterany:$previous"' if n > 1 else ""
        submit.append(f"previous=$(sbatch --parsable{after} level-{n}.sbatch)")
    write_text(folder / "submit.sh", "\n".join([*submit, 'echo "queued, the last array is $previous"', ""]))
    (folder / "submit.sh").chmod(0o755)
    return levels
