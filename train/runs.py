"""The folder of a run: run.json (what made it), metrics.jsonl (how it went), checkpoint.pt (train.checkpoint)."""

from __future__ import annotations

import errno
import fcntl
import hashlib
import json
import subprocess
from pathlib import Path
from typing import IO, Any

from preprocess.files import LEFT
from preprocess.schema import Settings
from train.config import Config, here_and_there

KEYS: dict[str, type] = {
    **dict.fromkeys(("recipe", "trained_on", "subset", "config_sha256", "manifest_sha256", "shards_sha256"), str),
    **{"pretrained": dict, "classes": list, "seed": int, "config": dict},
}
"""What of run.json others read."""


def hold(out: Path) -> IO[str]:
    """Keep every other process from training in `out` until the file that this returns is closed, or this process ends.

    ValueError where another one trains there. A lock of POSIX: loader workers that outlive a killed trainer for a
    moment do not hold it.
    """
    out.mkdir(parents=True, exist_ok=True)
    held = open(out / ".training", "w")
    try:
        fcntl.lockf(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in (errno.EAGAIN, errno.EACCES):
            held.close()
            raise ValueError(f"another process trains in {out}: wait for its end, or choose another --out") from error
        return held  # a file system without locks, where nothing can be held
    for left in out.glob(LEFT):  # by a trainer that was killed while it saved: as large as a checkpoint
        left.unlink()
    return held


def read(folder: Path) -> dict[str, Any]:
    """The run.json of a folder; ValueError where it is missing or damaged."""
    path = folder / "run.json"
    if not path.exists():
        raise ValueError(f"{folder} holds no run ({path.name} is missing); give the --out of python -m train")
    try:
        about = json.loads(path.read_text())
        wrong = [k for k, kind in KEYS.items() if not isinstance(about.get(k), kind)]
    except (ValueError, AttributeError) as error:  # undecodable bytes and JSON are ValueErrors
        raise ValueError(f"{path} is damaged ({error}); the run cannot be told apart from others") from error
    if wrong:
        raise ValueError(f"{path} is damaged, or another program's: {', '.join(wrong)} missing or of another type")
    return about


def training_settings(made: dict[str, Any]) -> str:
    """SHA-256 of what a run's `made` (run.json) says of its data: the rows, and the settings of stage 1 of the shards
    that had them."""
    settings = Settings.from_json(json.dumps(made["shards_settings"]))
    return hashlib.sha256(f"{made['manifest_sha256']} {settings.sha256()}".encode()).hexdigest()


def refuse_another(out: Path, there: Config, here: Config) -> None:
    """ValueError naming the fields in which the configuration of the run in `out` differs from this one."""
    if differing := here.differences(there):
        raise ValueError(f"{out} holds another run ({here_and_there(differing)}): choose another --out")


def git_commit() -> str:
    """Commit of this program's checkout, with + where it was changed; empty where it is not a checkout."""
    try:
        here = Path(__file__).resolve().parent
        run = {"cwd": here, "capture_output": True, "text": True, "check": True}
        # Installed inside another project's checkout, this file is none of that project's.
        subprocess.run(["git", "ls-files", "--error-unmatch", __file__], **run)  # type: ignore[call-overload]
        commit = subprocess.run(["git", "rev-parse", "HEAD"], **run).stdout.strip()  # type: ignore[call-overload]
        changed = subprocess.run(["git", "status", "--porcelain", "-uno"], **run).stdout.strip()  # type: ignore[call-overload]
        return commit + ("+" if changed else "")
    except (OSError, subprocess.CalledProcessError):
        return ""
