"""Stage 1: videos -> shards (CPU, parallel, restartable).

    python -m preprocess run data_manifests/ucf101.csv --videos UCF-101 --out shards/ucf101 --workers 8

makes UCF101's 13,320 videos into 105 shards of about 0.3 GB, with a progress bar, and ends with a table of the videos
that could not be stored. Run the same command again after any interruption: finished shards are kept.
"""

from __future__ import annotations

import re
import signal
import sys
from functools import partial
from pathlib import Path
from typing import Annotated, Literal, NoReturn

import tyro

from preprocess.command import DONE, ERROR, TERMINATED, WITH_FAILURES, at_least, ended, verb
from preprocess.schema import Settings


def run(
    manifest: tyro.conf.Positional[Path],
    videos: Path,
    out: Path,
    workers: int = 1,
    backend: Literal["processes", "dask"] = "processes",
    scheduler: str | None = None,
    settings: Annotated[Settings, tyro.conf.arg(name="")] = Settings(),  # noqa: B008 - frozen
    videos_per_shard: int = 128,
    part: str = "1/1",
    retry_failed: bool = False,
    max_failures: int = 0,
    time_limit: float = 600.0,
    reader: Literal["pyav", "mvextractor"] = "pyav",
    residuals: bool = False,
    spool: Path | None = None,
    dry_run: bool = False,
) -> int:
    """Re-encode the videos of a manifest with a fixed GOP and store frames, I-frames and motion vectors in shards.

    Re-running finishes what is missing, within a shard too; rows that were appended to the manifest are added. Ends
    with status 3 when more than --max-failures videos could not be stored (OUT/failures.csv says which and why), else
    with 0, also where shards are left to another process that works on them.

    Args:
        manifest: CSV with the columns path,label,subset; see data_manifests/ and the verb `manifest`.
        videos: Folder that the manifest's paths are relative to.
        out: Folder for the shards.
        workers: Processes on this machine; each keeps one core busy.
        backend: Where shards are made: processes of this machine, or the workers of a running Dask cluster.
        scheduler: Address of the cluster's scheduler, such as tcp://node1:8786, or the .json file that it writes; its
            workers must see the same folders.
        settings: How to encode and store; part of every shard.
        videos_per_shard: Manifest rows a shard; the unit of work and of restart.
        part: i/n makes every n-th shard only, for a job array on a shared file system: 1/16 … 16/16.
        retry_failed: Try the failed videos of finished shards again; the others are kept.
        max_failures: So many videos may fail without status 3, for jobs that begin after this one (afterok).
        time_limit: Seconds without progress, which is a group of twelve frames, before a video's decoder is replaced.
        reader: What reads the motion vectors: PyAV, in the decode that gives the pictures, or mvextractor, in one of
            its own (Linux on x86-64). The bytes are the same.
        residuals: Write the energy of what motion vectors did not predict, exact, into a file beside each shard; two
            bytes a macroblock, and a quarter more time. The shards are the same.
        spool: Folder on a local disk for what becomes a shard, which otherwise lies beside the shards: it takes as much
            as a shard for each worker, and half of all that is written. Each job must get the same one again to go on
            within a shard.
        dry_run: Only say what there is to do, and what room it takes.
    """
    from preprocess import pipeline
    from preprocess.summary import report

    at_least("--workers", workers, 1)
    at_least("--max-failures", max_failures, 0)
    match = re.fullmatch(r"(\d+)/(\d+)", part)
    if not match:
        raise ValueError(f"--part is {part!r}; write i/n, for example 3/16")
    summary = pipeline.run(
        manifest,
        videos,
        out,
        settings,
        workers=workers,
        backend=backend,
        scheduler=scheduler,
        videos_per_shard=videos_per_shard,
        part=(int(match[1]), int(match[2])),
        retry_failed=retry_failed,
        time_limit=time_limit,
        reader=reader,
        residuals=residuals,
        spool=spool,
        dry_run=dry_run,
    )
    if summary is None:
        return DONE
    report(summary, out)
    return WITH_FAILURES if len(summary.failures) > max_failures else DONE


def manifest(
    folder: tyro.conf.Positional[Path], out: Path, labels: bool = True, test_share: float = 0.0, seed: int = 0
) -> int:
    """Write a manifest of the videos in a folder; classes are folder names, or none where the folder is flat.

    A folder called 7 is the class class_7: labels are names, since numbers follow from their order.

    Training takes the rows of subset train, evaluation compares test with train: folders called train, val and test
    above the classes say which is which, or --test-share does, or you fill in the column by hand. For Kinetics and its
    annotation lists there is data_manifests/kinetics.py.

    Args:
        folder: Folder to search for videos.
        out: CSV to write.
        labels: Whether folders are classes.
        test_share: Share of each class that is drawn as its test videos, the others for training. Clips cut from one
            recording belong on one side: then fill in the column by hand.
        seed: Which random draw.
    """
    from preprocess import manifest as manifests

    table = manifests.scan(folder, labels)
    if test_share:
        table = table.divided(test_share, seed)
    table.write(out)
    counts = ", ".join(f"{table.subsets.count(s)} {s}" for s in manifests.SUBSETS if s and s in table.subsets)
    print(f"{len(table.paths)} videos of {len(table.classes)} classes in {out}; {counts or 'no subsets'}")
    return DONE


def flow(shards: tyro.conf.Positional[Path], videos: Path, workers: int = 1, time_limit: float = 600.0) -> int:
    """Compute TV-L1 optical flow (table 4) and write it beside each shard: half a second of CPU time a frame.

    Re-running finishes the shards that have none.

    Args:
        shards: Folder of shards.
        videos: Folder of the videos that the shards were made from.
        workers: Processes on this machine; each keeps one core busy.
        time_limit: Seconds that the flow of a frame may take before the process is replaced.
    """
    from preprocess import flow as flows

    at_least("--workers", workers, 1)
    made, skipped = flows.run(shards, videos, workers, time_limit)
    print(f"optical flow of {made} shards made, of {skipped} already there")
    return DONE


def inspect(
    shards: tyro.conf.Positional[Path], out: Path, video: str | None = None, sample: int = 3, seed: int = 0
) -> int:
    """Draw what a shard holds: frames, the same with motion vectors as arrows, their colours, and the I-frames.

    Args:
        shards: Folder of shards.
        out: Picture (.png, a contact sheet) or film (.mp4, one video) to write.
        video: Path of a video as the manifest has it; without it, a random sample.
        sample: How many videos to draw when none is named.
        seed: Which random sample.
    """
    from preprocess import preview

    print(preview.inspect(shards, video, sample, seed, out))
    return DONE


def synthetic(out: Path, workers: int = 1, train: int = 288, test: int = 360, motions: int = 6, seed: int = 0) -> int:
    """Render the embedded data set: scenes that cross context (a background) with motion (how sprites move).

    Args:
        out: Folder for videos/ and manifest.csv.
        workers: Processes.
        train: Training scenes; a multiple of 36 keeps every pair of context and motion equally frequent.
        test: Test scenes.
        motions: 8 adds sprites that appear and that vanish where they stand, which motion vectors cannot tell; then
            train and test are multiples of 48.
        seed: Seed of every scene.
    """
    from preprocess.synthetic import Scenes, write

    at_least("--workers", workers, 1)
    at_least("--seed", seed, 0)
    made = write(out, Scenes(motions=motions, train=train, test=test, seed=seed), workers=workers)
    print(f"{len(made.paths)} scenes of {len(made.classes)} classes in {out / 'videos'}, {out / 'manifest.csv'}")
    return DONE


def info(shards: tyro.conf.Positional[Path]) -> int:
    """Say what a set of shards holds: videos, frames, hours, classes, settings, size, failures.

    Args:
        shards: Folder of shards.
    """
    from preprocess import check

    print(check.describe(shards))
    return DONE


def check(shards: tyro.conf.Positional[Path], workers: int = 1) -> int:
    """Verify every checksum, count, offset, I-frame position and JPEG header; status 1 where anything is wrong.

    Args:
        shards: Folder of shards.
        workers: Processes.
    """
    from preprocess import check as checks

    at_least("--workers", workers, 1)
    problems = checks.problems(shards, workers)
    for problem in problems:
        print(problem, file=sys.stderr)
    print(f"{len(problems)} problems" if problems else "every shard is sound")
    return ERROR if problems else DONE


def copy(
    source: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="SOURCE")],
    target: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="TARGET")],
    workers: int = 8,
) -> int:
    """Copy a finished set of shards from or to object storage, a web server, the Hugging Face Hub, another disk.

    An address is a path, s3://bucket/folder, gs://…, hf://datasets/OWNER/NAME/folder, http://… or any other of fsspec,
    whose packages (s3fs, gcsfs, huggingface_hub) and ways to log in apply. Re-running copies what is missing; a shard
    gets its name only once its bytes are those of its .sha256.

    A source need not be listed: its shards are looked for by name, until one is not there. So a folder that any web
    server serves will do. One cannot copy to a web server; to hf:// each file is a commit, where `hf upload` makes one.

    Args:
        source: The set.
        target: Folder for the set, which holds no other.
        workers: Files that are copied at a time.
    """
    try:
        from preprocess import transfer
    except ModuleNotFoundError as error:
        raise ValueError(f"copy needs a package that is missing ({error.name}): pip install '.[remote]'") from error

    at_least("--workers", workers, 1)
    copied, there = transfer.copy(source, target, workers)
    print(f"{copied} files copied, each with its checksum; {there} were there")
    return DONE


def terminate(*_: object) -> NoReturn:
    print("terminated: run the same command again to go on", file=sys.stderr)
    sys.exit(TERMINATED)


def main() -> int:
    signal.signal(signal.SIGTERM, terminate)
    verbs = {v.__name__: v for v in (run, manifest, flow, inspect, check, info, copy, synthetic)}
    command = partial(verb, verbs, sys.argv[1:], "python -m preprocess", __doc__)
    return ended(command, "interrupted: run the same command again to go on", (RuntimeError,))


if __name__ == "__main__":
    sys.exit(main())
