"""Stage 3: weights -> numbers, tables, pictures.

    python -m eval retrieve runs/c3d --shards shards/ucf101 --manifest data_manifests/ucf101_split1.csv

prints R@1, 5, 10 and 20 of the test videos among the training videos, and stores them with where they came from.
"""

from __future__ import annotations

import shlex
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import tyro

from preprocess.command import DONE, WITH_FAILURES, ended, say, verb

if TYPE_CHECKING:
    from eval.results import Foreign, Result
    from train.trained import Run

Runs = tyro.conf.Positional[tuple[Path, ...]]
NetworkName = Literal["video", "layer4", "iframe", "motion"]


@dataclass(frozen=True)
class Common:
    """What every measure is told."""

    shards: Path
    """Folder of shards."""
    manifest: Path
    """CSV that says which of their videos are test and which training videos."""
    weights: str = "last"
    """last, initial (untrained), or a kept epoch such as epoch-0005."""
    device: str = "auto"
    """auto, cpu, cuda or cuda:1."""
    workers: int | None = None
    """Processes that decode; None: one a core at hand but this process's own, 8 at most."""


CommonFlags = Annotated[Common, tyro.conf.OmitArgPrefixes]


def retrieve(
    run: tyro.conf.Positional[Path], common: CommonFlags, network: NetworkName = "video", picture: Path | None = None
) -> None:
    """Video retrieval: the manifest's test videos query its training videos (tables 1, 4, 5, 7 and 9).

    Args:
        run: Folder of a run, the --out of python -m train.
        network: video, the V-Network's map that both tasks share; layer4, what fine-tuning trains of it; the I- or the
            M-Network (table 5).
        picture: PNG to write: a query of each of a few classes with its I-frame and motion vectors, and its neighbours.
    """
    from eval.retrieve import measure

    _evaluate(partial(measure, network=network), _load([run], common.weights), common, picture)


def classify(run: tyro.conf.Positional[Path], common: CommonFlags, picture: Path | None = None) -> None:
    """Action recognition by a run trained with labels: top-1 and top-5 of the test videos (tables 2, 3, 6 and 8).

    Args:
        run: Folder of a run of a finetune-, scratch- or regularised- recipe, trained on the classes of the shards.
        picture: PNG to write: the confusion matrix.
    """
    from eval.classify import measure

    _evaluate(measure, _load([run], common.weights), common, picture)


def probe(runs: Runs, common: CommonFlags, network: NetworkName = "video") -> None:
    """k-NN and a linear probe on frozen features: what the training videos teach about the test videos.

    Args:
        runs: Folders of runs.
        network: As of retrieve: video, layer4, iframe or motion.
    """
    from eval.probe import compared, measure

    if not runs:
        raise ValueError("nothing to probe: give the folders of one or more runs")
    loaded, titles = _load(runs, common.weights), list(map(str, runs))
    _evaluate(partial(measure, network=network), loaded, common, titles=titles, show=compared)


def diagnose(
    common: CommonFlags,
    run: tyro.conf.Positional[Path | None] = None,
    module: str = "",
    frames: int | None = None,
    stride: int | None = None,
    size: int | None = None,
    out: Path | None = None,
    picture: Path | None = None,
) -> None:
    """How much context and how much motion a network knows, asked of the embedded scenes (make scenes).

    Test clips query training clips by context, by motion and by both: as they are, reversed in time, frozen to one
    frame, and with their frames shuffled. A network that sees only scenes finds the same every time.

    Any backbone will do: a RUN, or --module package.module:factory, where factory() returns an nn.Module that takes
    RGB clips (N, 3, frames, size, size), normalised by ImageNet's mean and deviation, and gives features (N, C) or maps
    (N, C, t, h, w), which are averaged. make scenes makes demo_out/shards and demo_out/scenes/manifest.csv.

    Args:
        run: Folder of a run; its V-Network is diagnosed, at the run's own frames, stride and size.
        module: Import path of a network of your own, instead of a run.
        frames: Frames of the module's clips; 16 unless given.
        stride: From one frame to the next; 1 unless given. The sprites move 2 to 4 pixels a frame.
        size: Height and width of the module's clips in pixels; 112 unless given.
        out: Folder in whose results/ the module's numbers are stored.
        picture: PNG to write: the shares as bars.
    """
    from eval.diagnose import load_module, measure

    if (run is None) == (not module):
        raise ValueError("give a network to diagnose: a RUN, or --module package.module:factory, and not both")
    own = {"frames": frames, "stride": stride, "size": size, "out": out}
    given = [f"--{name}" for name, value in own.items() if value is not None]
    if run is None and common.weights != "last":
        raise ValueError(f"--weights {common.weights}: a --module has its own; they are for a run")
    if run is None:
        _evaluate(measure, [load_module(module, out, frames, stride, size)], common, picture)
    elif given:
        raise ValueError(f"{', '.join(given)}: a run has its own; they are for a --module")
    else:
        _evaluate(measure, _load([run], common.weights), common, picture)


def features(run: tyro.conf.Positional[Path], common: CommonFlags, out: Path, network: NetworkName = "video") -> None:
    """One feature a video, averaged over ten clips, into an NPZ file: arrays features, label, path, subset, classes.

    Args:
        run: Folder of a run.
        out: NPZ to write, of the manifest's videos of every subset; it also says where the features came from.
        network: As of retrieve: video, layer4, iframe or motion.
    """
    from eval.features import Machine, protocol, store, video_features
    from eval.results import Data, about
    from train.trained import load_run

    data, loaded = Data.open(common.shards, common.manifest), load_run(run, common.weights)
    found = video_features(loaded, data, network, Machine(common.device, common.workers))
    how = protocol(loaded.config, network, found.failed)
    store(out, found, data, about(loaded, data) | {"network": network, "protocol": how})
    print(f"{len(found.vectors)} features of {found.vectors.shape[1]} numbers in {out}; {how}")


def compare(runs: Runs, common: CommonFlags, picture: Path | None = None) -> None:
    """One table of R@1 for several runs beside the untrained network, and a picture of what they retrieve.

    A second table says by how much the others differ from the first run on the same queries, with the standard error of
    that: smaller than the errors of two recalls apart, since what is hard for one network is hard for another.

    Args:
        runs: Folders of runs; the first is drawn, and its initial weights are the untrained network.
        picture: PNG to write: queries with their I-frame and motion vectors, and their neighbours.
    """
    from eval.neighbours import draw
    from eval.retrieve import compared, folder_names, measure

    if not runs:
        raise ValueError("nothing to compare: give the folders of one or more runs")
    loaded, titles = chain(_load(runs[:1], "initial"), _load(runs, common.weights)), ["untrained", *folder_names(runs)]
    found = _evaluate(measure, loaded, common, picture, titles, show=partial(compared, against=titles[1]))
    if picture:
        print(draw({title: found[title] for title in titles[:2]}, picture))


def pretext(run: tyro.conf.Positional[Path], common: CommonFlags) -> None:
    """How well a pretrained run solves its own tasks on the manifest's test videos (table 7).

    Args:
        run: Folder of a pretraining run.
    """
    from eval.pretext import measure

    _evaluate(measure, _load([run], common.weights), common)


def _load(folders: Iterable[Path], weights: str) -> Iterator[Run]:
    """Runs, each when its turn has come."""
    from train.trained import load_run

    for folder in folders:
        yield load_run(folder, weights)


def _evaluate(
    measure: Callable[..., Result],
    networks: Iterable[Run | Foreign],
    common: Common,
    picture: Path | None = None,
    titles: Sequence[str] = (),
    show: Callable[[dict[str, Any]], str] | None = None,
) -> dict[str, Any]:
    """What every measure does: load, measure, store the rows, print, draw.

    Returns the results by their titles. `show` says what is printed of several together.
    """
    from eval import results
    from eval.features import Machine

    if picture and picture.suffix.lower() != ".png":
        raise ValueError(f"--picture is {picture}; it is a PNG: let its name end in .png")
    data, found, stored = results.Data.open(common.shards, common.manifest), {}, []
    machine = Machine(common.device, common.workers)
    for number, network in enumerate(networks):
        result: Any = measure(network, data, machine=machine)
        title = titles[number] if titles else results.title(network)
        found[title] = result
        if network.folder:
            origin = results.about(network, data)
            stored += [results.write(network.folder, origin | row) for row in result.records()]
        if not show:
            print(result.markdown(title))
        if picture and not show:
            print(result.draw(title, picture))
    if show:
        print(show(found))
    for path in stored:
        print(f"stored in {path}")
    if not stored:
        print("not stored: --out FOLDER keeps it")
    return found


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
        only: Tables to plan or run: 1 to 9, scenes, small, ucf20. All of the nine unless told otherwise.
        data: Data sets at hand, each as NAME=SHARDS:MANIFEST; NAME is ucf101, hmdb51, k400, scenes, small or ucf20.
        seeds: Seeds to run.
        training: Further flags of every training: --training="--precision bfloat16".
        evaluation: Further flags of every evaluation: --evaluation="--workers 8".
    """
    from eval.publish import collect, missing
    from eval.publish.cells import NINE
    from eval.publish.plots import table_plots
    from eval.publish.tables import build, idle, write

    if plan + run + bool(slurm) > 1:
        raise ValueError("--plan, --run and --slurm exclude each other")
    if not seeds:
        raise ValueError("--seeds names no seed: give one or more, such as --seeds 0 1 2")
    steps_only = {"--only": only, "--seeds": seeds != (0,), "--training": training, "--evaluation": evaluation}
    if unused := [flag for flag, given in steps_only.items() if given and not (plan or run or slurm)]:
        raise ValueError(f"{', '.join(unused)} say what to plan or run: add --plan, --run or --slurm FOLDER")
    if export and (plan or slurm):
        raise ValueError("--export writes rows, and --plan and --slurm only read them: leave one out")
    at_hand = list(map(missing.parse, data))
    for d in at_hand:
        if not d.shards.exists():
            say(f"note: there are no shards in {d.shards} yet; python -m preprocess run makes them")

    def steps() -> list[missing.Step]:
        rows, _ = collect.gather(runs, results, at_hand, needed=False)
        place = missing.Place(runs, at_hand, shlex.split(training), shlex.split(evaluation))
        return place.missing(only or NINE, seeds, rows)

    if plan:
        print(missing.describe(steps()))
        return DONE
    if slurm:
        levels = missing.write_slurm(steps(), slurm)
        print(f"wrote {slurm}/submit.sh, which queues {len(levels)} arrays of {', '.join(str(len(x)) for x in levels)}")
        return DONE
    status = missing.run(steps, runs) if run else DONE
    if status not in (DONE, WITH_FAILURES):
        return status
    rows, refused = collect.gather(runs, results, at_hand, needed=not run)
    if export:
        collect.export(rows, export)
        print(f"wrote {export}")
    made = build(rows)
    for path in write(made, refused, table_plots(made), out):
        print(f"wrote {path}")
    if unused := idle(made, rows):
        say(f"note: results of {', '.join(unused)} fill no cell of these tables; --export writes them too")
    for row, reason in refused:
        say(f"left out: {row['file']}: {reason}")
    return status


def report(
    out: Path = Path("report.html"),
    runs: Path = Path("runs"),
    results: tuple[Path, ...] = (),
    gallery: tuple[Path, ...] = (),
    shards: Path | None = None,
    manifest: Path | None = None,
    device: str = "auto",
    workers: int | None = None,
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
        workers: Processes that decode; None: one a core at hand but this process's own, 8 at most.
    """
    from eval.features import Machine
    from eval.publish.collect import gather
    from eval.publish.page import page
    from eval.publish.tables import build
    from eval.results import Data
    from eval.retrieve import folder_names, measure
    from preprocess.files import write_text

    if (shards is None) != (manifest is None) or (gallery and shards is None):
        raise ValueError("moving clips need both --shards and --manifest")
    rows, refused = gather(runs, results)
    data = Data.open(shards, manifest) if shards and manifest else None
    found = {}
    if data and gallery:
        titles = ["untrained", *folder_names(gallery)]
        loaded = chain(_load(gallery[:1], "initial"), _load(gallery, "last"))
        machine = Machine(device, workers)
        found = {title: measure(run, data, machine=machine) for title, run in zip(titles, loaded)}
    text = page(build(rows), rows, refused, runs, data, found)
    write_text(out, text)
    print(f"wrote {out}, {len(text) / 1e6:.1f} MB")
    return DONE


def main() -> int:
    verbs = (retrieve, classify, probe, diagnose, features, compare, pretext, tables, report)
    named: dict[str, Callable[..., int | None]] = {v.__name__: v for v in verbs}
    return ended(partial(verb, named, sys.argv[1:], "python -m eval", __doc__), "interrupted")


if __name__ == "__main__":
    sys.exit(main())
