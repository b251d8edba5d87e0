"""Stage 3: weights -> numbers, tables, pictures.

    python -m eval retrieve --run runs/c3d --shards shards/ucf101 --manifest data_manifests/ucf101_split1.csv

prints R@1, 5, 10 and 20 of the test videos among the training videos, and stores them with where they came from.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import tyro

from eval.publish import report, tables
from preprocess.command import DONE, ended

if TYPE_CHECKING:
    from preprocess.manifest import Manifest
    from preprocess.shards import ShardSet


def retrieve(
    run: Path,
    shards: Path,
    manifest: Path,
    network: Literal["video", "iframe", "motion"] = "video",
    weights: str = "last",
    picture: Path | None = None,
    device: str = "auto",
    workers: int = 2,
) -> int:
    """Video retrieval: the manifest's test videos query its training videos (tables 1, 4, 5, 7 and 9).

    Args:
        run: Folder of a run, the --out of python -m train.
        shards: Folder of shards.
        manifest: CSV with train and test rows.
        network: V-Network, I-Network or M-Network (table 5).
        weights: last, initial (untrained), or a kept epoch such as epoch-0005.
        picture: PNG to write: a query of each of a few classes with its I-frame and motion vectors, and its neighbours.
        device: auto, cpu, cuda or cuda:1.
        workers: Processes that decode.
    """
    from eval import features, gallery, rows
    from eval import retrieve as retrieval
    from train.trained import load_run

    table, shard_set, dataset = _data(shards, manifest)
    loaded = load_run(run, weights)
    found = retrieval.retrieve(loaded, shard_set, table, network, device=device, workers=workers)
    origin = rows.about(loaded, shard_set, table, dataset)
    path = rows.write(run, origin | retrieval.row(found, loaded.config, network))
    name = f"{loaded.recipe}, {weights}, epoch {loaded.epoch:g}"
    print(
        f"{len(found.query)} queries, {len(found.gallery)} in the gallery; {features.protocol(loaded.config, network)}"
    )
    print(retrieval.table({name: found.recalls}, retrieval.KS))
    print(_chance(shard_set, table))
    if picture:
        print(gallery.draw(shard_set, {name: found}, picture))
    print(f"stored in {path}")
    return DONE


def classify(
    run: Path,
    shards: Path,
    manifest: Path,
    weights: str = "last",
    picture: Path | None = None,
    device: str = "auto",
    workers: int = 2,
) -> int:
    """Action recognition by a run trained with labels: top-1 and top-5 of the test videos (tables 2, 3, 6 and 8).

    Args:
        run: Folder of a run of a finetune-, scratch- or regularised- recipe.
        shards: Folder of shards with the classes of the run.
        manifest: CSV with test rows.
        weights: last, or a kept epoch such as epoch-0005.
        picture: PNG to write: the confusion matrix.
        device: auto, cpu, cuda or cuda:1.
        workers: Processes that decode.
    """
    from eval import classify as recognition
    from eval import rows
    from train.trained import load_run

    table, shard_set, dataset = _data(shards, manifest)
    loaded = load_run(run, weights)
    found = recognition.classify(loaded, shard_set, table, device=device, workers=workers)
    origin = rows.about(loaded, shard_set, table, dataset)
    path = rows.write(run, origin | recognition.row(found, loaded.config))
    numbers = ", ".join(f"{name} {value:.1f}" for name, value in found.metrics.items())
    title = f"{loaded.recipe}, {weights}, epoch {loaded.epoch:g}, on {dataset}: {numbers}"
    print(f"{len(found.label)} videos; {recognition.protocol(loaded.config)}")
    print(recognition.table(found))
    print(title)
    if picture:
        print(recognition.draw(found, title, picture))
    print(f"stored in {path}")
    return DONE


def probe(
    runs: tyro.conf.Positional[tuple[Path, ...]],
    shards: Path,
    manifest: Path,
    network: Literal["video", "iframe", "motion"] = "video",
    weights: str = "last",
    device: str = "auto",
    workers: int = 2,
) -> int:
    """k-NN and a linear probe on frozen features: what the training videos teach about the test videos.

    Args:
        runs: Folders of runs.
        shards: Folder of shards.
        manifest: CSV with train and test rows.
        network: V-Network, I-Network or M-Network.
        weights: last, initial (untrained), or a kept epoch such as epoch-0005.
        device: auto, cpu, cuda or cuda:1.
        workers: Processes that decode.
    """
    if not runs:
        raise ValueError("nothing to probe: give the folders of one or more runs")
    from eval import probe as probing
    from eval import rows
    from train.trained import load_run

    table, shard_set, dataset = _data(shards, manifest)
    found, stored = {}, []
    for folder in runs:
        loaded = load_run(folder, weights)
        found[str(folder)] = probing.probe(loaded, shard_set, table, network, device=device, workers=workers)
        origin = rows.about(loaded, shard_set, table, dataset)
        for row in probing.found_rows(found[str(folder)], loaded.config, network):
            stored.append(rows.write(folder, origin | row))
    print(f"k=: {probing.VOTE}\nlinear: {probing.LINEAR}")
    print(probing.table(found))
    print(_chance(shard_set, table))
    print("\n".join(f"stored in {path}" for path in stored))
    return DONE


def diagnose(
    shards: Path,
    manifest: Path,
    run: Path | None = None,
    weights: str = "last",
    module: str = "",
    frames: int | None = None,
    stride: int | None = None,
    size: int | None = None,
    out: Path | None = None,
    picture: Path | None = None,
    device: str = "auto",
    workers: int = 2,
) -> int:
    """How much context and how much motion a network knows, asked of the embedded scenes (make scenes).

    Test clips query training clips by context, by motion and by both: as they are, reversed in time, frozen to one
    frame, and with their frames shuffled. A network that sees only scenes finds the same every time.

    Any backbone will do: --run RUN, or --module package.module:factory, where factory() returns an nn.Module that takes
    RGB clips (N, 3, frames, size, size), normalised by ImageNet's mean and deviation, and gives features (N, C) or maps
    (N, C, t, h, w), which are averaged.

    Args:
        shards: Folder of the scenes' shards; make scenes makes them in demo_out/shards.
        manifest: Their manifest, demo_out/scenes/manifest.csv.
        run: Folder of a run; its V-Network is diagnosed, at the run's own frames, stride and size.
        weights: Of the run: last, initial (untrained), or a kept epoch such as epoch-0005.
        module: Import path of a network of your own, instead of --run.
        frames: Frames of the module's clips; 16 unless given.
        stride: From one frame to the next; 1 unless given. The sprites move 2 to 4 pixels a frame.
        size: Height and width of the module's clips in pixels; 112 unless given.
        out: Folder in whose results/ the module's numbers are stored.
        picture: PNG to write: the shares as bars.
        device: auto, cpu, cuda or cuda:1.
        workers: Processes that decode.
    """
    from eval import diagnose as diagnosis
    from eval import features, rows
    from train.config import Config, Pretraining
    from train.draws import Sampling
    from train.trained import load_run

    if (run is None) == (not module):
        raise ValueError("give a network to diagnose: --run RUN, or --module package.module:factory, and not both")
    table, shard_set, dataset = _data(shards, manifest)
    if run is None:
        t, step, side = (usual if v is None else v for usual, v in ((16, frames), (1, stride), (112, size)))
        config: Config = Pretraining(sampling=Sampling(frames=t, stride=step), size=side)
        network, folder, name = diagnosis.load_module(module, config), out, module
    else:
        own = {"frames": frames, "stride": stride, "size": size, "out": out}
        if given := [f"--{name}" for name, value in own.items() if value is not None]:
            raise ValueError(f"{', '.join(given)}: a run has its own; they are for a --module")
        loaded = load_run(run, weights)
        config, network, folder = loaded.config, features.part(loaded, "video"), run
        name = f"{loaded.recipe}, {weights}, epoch {loaded.epoch:g}"
    found = diagnosis.diagnose(network, config, shard_set, table, device=device, workers=workers)
    print(f"{found.queries} queries, {found.gallery} in the gallery; {diagnosis.protocol(config)}")
    print(f"nearest neighbours of {name}, in percent:")
    print(diagnosis.table(found))
    print(diagnosis.verdict(found))
    if folder is None:
        print("not stored: --out FOLDER keeps it")
    else:
        if run is None:
            origin = diagnosis.about_module(module, network, config, shard_set, table, dataset)
        else:
            origin = rows.about(loaded, shard_set, table, dataset)
        print(f"stored in {rows.write(folder, origin | diagnosis.row(found, config))}")
    if picture:
        print(diagnosis.draw(found, name, picture))
    return DONE


def features(
    run: Path,
    shards: Path,
    manifest: Path,
    out: Path,
    network: Literal["video", "iframe", "motion"] = "video",
    weights: str = "last",
    device: str = "auto",
    workers: int = 2,
) -> int:
    """One feature a video, averaged over ten clips, into an NPZ file: arrays features, label, path, subset, classes.

    Args:
        run: Folder of a run, the --out of python -m train.
        shards: Folder of shards.
        manifest: CSV whose videos to describe, of every subset.
        out: NPZ to write; it also says where the features came from.
        network: V-Network, I-Network or M-Network.
        weights: last, initial (untrained), or a kept epoch such as epoch-0005.
        device: auto, cpu, cuda or cuda:1.
        workers: Processes that decode.
    """
    from eval import features, rows
    from train.trained import load_run

    table, shard_set, dataset = _data(shards, manifest)
    loaded = load_run(run, weights)
    found, label, video = features.video_features(loaded, shard_set, table, network, device=device, workers=workers)
    about = rows.about(loaded, shard_set, table, dataset)
    about |= {"network": network, "protocol": features.protocol(loaded.config, network)}
    features.store(out, found, label, video, shard_set, table, about)
    print(f"{len(found)} features of {found.shape[1]} numbers in {out}; {about['protocol']}")
    return DONE


def compare(
    runs: tyro.conf.Positional[tuple[Path, ...]],
    shards: Path,
    manifest: Path,
    picture: Path | None = None,
    device: str = "auto",
    workers: int = 2,
) -> int:
    """One table of R@1 for several runs beside the untrained network, and a picture of what they retrieve.

    Args:
        runs: Folders of runs; the first is drawn, and its initial weights are the untrained network.
        shards: Folder of shards.
        manifest: CSV with train and test rows.
        picture: PNG to write: queries with their I-frame and motion vectors, and their neighbours.
        device: auto, cpu, cuda or cuda:1.
        workers: Processes that decode.
    """
    if not runs:
        raise ValueError("nothing to compare: give the folders of one or more runs")
    from eval import gallery, rows
    from eval import retrieve as retrieval
    from train.trained import load_run

    table, shard_set, dataset = _data(shards, manifest)
    names, found, stored = retrieval.names(runs), {}, []
    for name, folder, weights in [("untrained", runs[0], "initial"), *((n, r, "last") for n, r in zip(names, runs))]:
        loaded = load_run(folder, weights)
        found[name] = retrieval.retrieve(loaded, shard_set, table, device=device, workers=workers)
        origin = rows.about(loaded, shard_set, table, dataset)
        stored.append(rows.write(folder, origin | retrieval.row(found[name], loaded.config, "video")))
    print(retrieval.table({name: f.recalls for name, f in found.items()}, (1,)))
    print(_chance(shard_set, table))
    if picture:
        print(gallery.draw(shard_set, {n: found[n] for n in ("untrained", names[0])}, picture))
    print("\n".join(f"stored in {path}" for path in stored))
    return DONE


def pretext(
    run: Path,
    shards: Path,
    manifest: Path,
    weights: str = "last",
    device: str = "auto",
    workers: int = 2,
) -> int:
    """How well a pretrained run solves its own tasks on the manifest's test videos (table 7).

    Args:
        run: Folder of a pretraining run.
        shards: Folder of shards.
        manifest: CSV with test rows.
        weights: last, initial (untrained), or a kept epoch such as epoch-0005.
        device: auto, cpu, cuda or cuda:1.
        workers: Processes that decode.
    """
    from eval import pretext as tasks
    from eval import rows
    from train.trained import load_run

    table, shard_set, dataset = _data(shards, manifest)
    loaded = load_run(run, weights)
    found = tasks.pretext(loaded, shard_set, table, device=device, workers=workers)
    what = {"kind": "pretext", "network": "video", "videos": found.videos, "metrics": found.metrics}
    origin = rows.about(loaded, shard_set, table, dataset)
    path = rows.write(run, origin | what | {"protocol": tasks.protocol(found.batch)})
    print(f"{found.videos} test videos, {found.left} left over; {tasks.protocol(found.batch)}")
    for name, value in found.metrics.items():
        print(f"{name} {value:.1f} %")
    print(f"stored in {path}")
    return DONE


def _data(shards: Path, manifest: Path) -> tuple[Manifest, ShardSet, str]:
    """The manifest, the shards, and the data set's name in results."""
    from preprocess.manifest import Manifest, dataset_name
    from preprocess.shards import ShardSet

    return Manifest.read(manifest), ShardSet(shards), dataset_name(manifest)


def _chance(shards: ShardSet, manifest: Manifest) -> str:
    """What R@1 would be for neighbours at random."""
    from eval import retrieve as retrieval

    return "R@1 by chance: " + ", ".join(f"{n} {v:.1f}" for n, v in retrieval.chance(shards, manifest).items())


def main() -> int:
    verbs: dict[str, Callable[..., int]] = {
        "retrieve": retrieve,
        "classify": classify,
        "probe": probe,
        "diagnose": diagnose,
        "features": features,
        "compare": compare,
        "pretext": pretext,
        "tables": tables,
        "report": report,
    }
    return ended(
        lambda: tyro.extras.subcommand_cli_from_dict(verbs, prog="python -m eval", description=__doc__), "interrupted"
    )


if __name__ == "__main__":
    sys.exit(main())
