"""The verbs that publish: tables and report."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from eval.rows import Row, check, read
from eval.rows import export as export_csv
from preprocess.files import write_text

if TYPE_CHECKING:
    from eval.plan import Data

DONE = 0


def tables(
    out: Path = Path("tables"),
    runs: Path = Path("runs"),
    results: tuple[Path, ...] = (),
    export: Path | None = None,
    plan: bool = False,
    run: bool = False,
    slurm: Path | None = None,
    only: tuple[str, ...] = (),
    data: tuple[str, ...] = (),
    seeds: tuple[int, ...] = (0,),
    training: str = "",
    evaluation: str = "",
) -> int:
    """Tables 1 to 9 and those of the small experiments: paper, ours, difference, as Markdown, CSV and plots.

    With --plan, --run or --slurm, also the runs that they miss: a training once for all cells that need it, each
    before what follows from it.

    Args:
        out: Folder for tables.md, tables.csv and the plots.
        runs: Folder of runs, whose results are read at any depth, and where --run and --slurm put theirs.
        results: More folders of runs, and CSV files that --export wrote.
        export: CSV to write with every row that went in, a line a metric.
        plan: Only list the runs that are missing, each as its command, with its hours.
        run: Carry them out here one after another, then write the tables; the same command goes on after any kill.
        slurm: Folder to write SLURM job arrays to, and submit.sh, which queues them.
        only: Tables to plan or run: 1 to 9, scenes, small. All of the nine unless told otherwise.
        data: Data sets at hand, each as NAME=SHARDS:MANIFEST; NAME is ucf101, hmdb51, k400, scenes or small.
        seeds: Seeds to run.
        training: Further flags of every training: --training="--precision bfloat16".
        evaluation: Further flags of every evaluation: --evaluation="--workers 8".
    """
    from eval import execute
    from eval import plan as planning
    from eval import tables as rendering
    from eval.cells import NINE

    if plan + run + bool(slurm) > 1:
        raise ValueError("--plan, --run and --slurm exclude each other")
    if not seeds:
        raise ValueError("--seeds names no seed: give one or more, such as --seeds 0 1 2")
    status, wanted = DONE, only or NINE
    at_hand = [planning.Data.parse(text) for text in data]
    for d in at_hand:
        if not d.shards.exists():
            print(f"note: there are no shards in {d.shards} yet; python -m preprocess run makes them", file=sys.stderr)

    def missing() -> list[planning.Job]:
        flags = shlex.split(training), shlex.split(evaluation)
        return planning.make(wanted, seeds, at_hand, _results(runs, results, at_hand, False)[0], runs, *flags)

    if plan:
        print(execute.describe(missing()))
        return DONE
    if slurm:
        levels = execute.slurm(missing(), slurm)
        print(f"wrote {slurm}/submit.sh, which queues {len(levels)} arrays of {', '.join(str(len(x)) for x in levels)}")
        return DONE
    if run:
        status = execute.run(missing, runs)
    if status not in (DONE, execute.FAILURES):
        return status
    found, refused = _results(runs, results, at_hand, not run)
    if export:
        export_csv(found, export)
        print(f"wrote {export}")
    made = rendering.build(found)
    for path in rendering.write(made, refused, out):
        print(f"wrote {path}")
    for row, reason in refused:
        print(f"left out: {row['file']}: {reason}", file=sys.stderr)
    return status


def report(
    out: Path = Path("report.html"),
    runs: Path = Path("runs"),
    results: tuple[Path, ...] = (),
    gallery: tuple[Path, ...] = (),
    shards: Path | None = None,
    manifest: Path | None = None,
    device: str = "auto",
    workers: int = 2,
) -> int:
    """One HTML page that needs nothing but itself: tables, curves, confusions, retrieval, motion, provenance.

    Args:
        out: The page.
        runs: Folder of runs, whose results are read at any depth and whose curves are drawn.
        results: More folders of runs, and CSV files that tables --export wrote.
        gallery: Runs whose nearest videos are shown as moving clips, beside those of the first one untrained.
        shards: Folder of shards, for the clips; wanted with --gallery, else for the motion alone.
        manifest: CSV with train and test rows, for the same.
        device: auto, cpu, cuda or cuda:1.
        workers: Processes that decode.
    """
    import numpy as np

    from eval import features, moving
    from eval import report as reporting
    from eval import retrieve as retrieval
    from eval import tables as rendering
    from preprocess.manifest import Manifest, dataset_name
    from preprocess.shards import ShardSet
    from train.trained import load_run

    if (shards is None) != (manifest is None) or (gallery and shards is None):
        raise ValueError("moving clips need both --shards and --manifest")
    rows, refused = _results(runs, results)
    finds, previews, about = [], [], ""
    if shards is not None and manifest is not None:
        table, shard_set = Manifest.read(manifest), ShardSet(shards)
        test = set(table.subset("test").paths)
        places = [v for v, path in enumerate(shard_set.paths) if path in test]
        previews = moving.previews(shard_set, np.array(places))
        if gallery:
            found = {}
            runs_of = zip(retrieval.names(gallery), gallery)
            for name, folder, weights in [("untrained", gallery[0], "initial"), *((n, r, "last") for n, r in runs_of)]:
                loaded = load_run(folder, weights)
                found[name] = retrieval.retrieve(loaded, shard_set, table, device=device, workers=workers)
            finds = moving.neighbours(shard_set, found)
            about = f"{dataset_name(manifest)}: {features.protocol(loaded.config, 'video')}."
    made = rendering.build(rows)
    text = reporting.page(made, rows, refused, runs, finds, previews, about)
    write_text(out, text)
    print(f"wrote {out}, {len(text) / 1e6:.1f} MB")
    return DONE


def _results(
    runs: Path, results: tuple[Path, ...], at_hand: Sequence[Data] = (), needed: bool = True
) -> tuple[list[Row], list[tuple[Row, str]]]:
    """(sound rows, the others with the reasons) of everything named, beside the committed manifests and the data at
    hand; ValueError where nothing is named that exists, and that is `needed`."""
    from eval import tables as rendering
    from preprocess.manifest import Manifest
    from preprocess.shards import ShardSet

    if needed and not results and not runs.exists():
        raise ValueError(f"there is no folder {runs}: name the folder of runs with --runs, or rows with --results")
    found = read([*([runs] if runs.exists() else []), *results])
    manifests = rendering.known_manifests(found) | {d.dataset: Manifest.read(d.manifest).sha256 for d in at_hand}
    made = {d.dataset: ShardSet(d.shards).sha256() for d in at_hand if d.shards.exists()}
    return check(found, manifests, made)
