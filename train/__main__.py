r"""Stage 2: shards -> weights (GPU or CPU; no video library).

    python -m train pretrain-ucf101-c3d --shards shards/ucf101 \
        --manifest data_manifests/ucf101_split1.csv --out runs/c3d
    python -m train --list
    python -m train export runs/c3d --out c3d

The first pretrains C3D on UCF101's training split as the paper does; the second lists the recipes; the third writes a
run's V-Network for others. The same command goes on where a run was interrupted. torchrun spreads it over GPUs and
machines.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import tyro

from preprocess.command import DONE, TERMINATED, ended, process, say, unknown, verb, wrong
from train.config import Comparison, Finetuning, Pretraining, Runtime


@dataclass(frozen=True, kw_only=True)
class Arguments:
    shards: str
    """Folder of shards that stage 1 made; with --stage-to, any address of python -m preprocess copy."""
    manifest: Path
    """CSV whose rows to train on."""
    out: Path
    """Folder of the run: run.json, metrics.jsonl, checkpoint.pt."""
    subset: str = "train"
    """Rows of the manifest to use; 'all' takes every row."""
    stage_to: Path | None = None
    """Folder on a disk of this machine to copy the shards to first, and to train from: one process of each machine
    copies what is missing there, the others wait."""
    runtime: Annotated[Runtime, tyro.conf.arg(name="")] = field(default_factory=Runtime)


@dataclass(frozen=True, kw_only=True)
class PretrainingArguments(Arguments):
    config: Annotated[Pretraining, tyro.conf.arg(name="")]


@dataclass(frozen=True, kw_only=True)
class ComparisonArguments(Arguments):
    config: Annotated[Comparison, tyro.conf.arg(name="")]


@dataclass(frozen=True, kw_only=True)
class FinetuningArguments(Arguments):
    pretrained: Path | None = None
    """The run whose V-Network a finetune recipe begins from."""
    pretrained_weights: str = "last"
    """Its last weights, or a kept epoch's such as epoch-0005."""
    config: Annotated[Finetuning, tyro.conf.arg(name="")]


PROG = "python -m train"
ARGUMENTS = {Pretraining: PretrainingArguments, Comparison: ComparisonArguments, Finetuning: FinetuningArguments}


def list_recipes() -> None:
    """Every recipe; the costs take a quarter of a minute to count."""
    from train import cost
    from train.recipes import RECIPES

    print(
        f"GPU hours are an estimate, not a measurement: they are for an {cost.GPU} that reaches "
        f"{cost.UTILISATION:.0%} of its {cost.GPU_FLOPS / 1e12:.0f} bfloat16 TFLOP/s. So is GPU memory: of the whole "
        "batch on one GPU, in bfloat16, counted tensor by tensor; of several GPUs each takes its share.\n"
    )
    for name, recipe in RECIPES.items():
        c = recipe.config
        print(f"{name}\n    {recipe.about}\n    batch {c.batch_size}, {c.epochs} epochs, {c.size}x{c.size}")
        print(f"    {cost.describe(name, c)}", flush=True)
        if recipe.base:
            changes = ", ".join(f"{field} {own} ({before})" for field, (own, before) in recipe.changes().items())
            print(f"    differs from {recipe.base}: {changes}")


def export_run(run: tyro.conf.Positional[Path], out: Path, weights: str = "last", push: str | None = None) -> None:
    """Write a run's V-Network into a folder as the Hugging Face Hub takes it: safetensors, config, model card.

    The card has the results that python -m eval has stored. train/export.py shows how to load it.

    Args:
        run: Folder of a run.
        out: Folder to write.
        weights: last, initial (untrained), or a kept epoch such as epoch-0005.
        push: OWNER/NAME of the Hub to put it into as well, made public where there is none yet (the extra 'hub').
    """
    from train import export
    from train.trained import load_run

    loaded = load_run(run, weights)
    folder = export.export(loaded, out, push or "")
    print(f"{folder}: {loaded.config.networks.backbone} of {loaded.recipe}, {weights} weights, epoch {loaded.epoch:g}")
    if push:
        print(export.push(folder, push))


def main(argv: list[str]) -> int:
    again = "interrupted: the same command goes on from the last checkpoint"
    return ended(lambda: run(argv), again, (FloatingPointError,))


def run(argv: list[str]) -> int:
    from train.recipes import RECIPES

    if argv[:1] == ["--list"]:
        list_recipes()
        return DONE
    if argv[:1] in (["export"], ["--version"]):
        return verb({"export": export_run}, argv, PROG, __doc__ or "")
    if not argv:
        return wrong(f"the recipe is missing; {PROG} --list shows them")
    if argv[0] in ("-h", "--help"):
        print(f"{__doc__}\nrecipes: {', '.join(RECIPES)}\n{PROG} RECIPE --help shows every setting")
        return DONE
    if argv[0] not in RECIPES:
        return unknown("recipe", argv[0], [*RECIPES, "export"], f"{PROG} --list shows them")
    recipe = RECIPES[argv[0]]
    missing = tyro.MISSING
    kind: Any = ARGUMENTS[type(recipe.config)]
    default = kind(shards=missing, manifest=missing, out=missing, config=recipe.config)
    a = tyro.cli(kind, args=argv[1:], default=default, prog=f"{PROG} {argv[0]}", description=recipe.about)
    # Of what was typed only what differs: a default that is spelt out leaves the recipe, and its hash, what it is.
    typed = a.config.differences(recipe.config)
    config = recipe.config.changed({name: value for name, (value, _) in typed.items()})
    if late := [epoch for epoch in a.runtime.keep_epochs if not 1 <= epoch <= config.epochs]:
        raise ValueError(f"--keep-epochs names {late[0]}; this run has epochs 1 to {config.epochs}")
    from torch import OutOfMemoryError

    from preprocess.manifest import Manifest, dataset_name
    from train import trained
    from train.loop import Terminated, train
    from train.origin import Origin

    shards = Path(a.shards)
    if a.stage_to:
        from preprocess import transfer  # with fsspec, which torch brings

        transfer.copy(a.shards, str(a.stage_to))
        shards = a.stage_to
    elif "://" in a.shards:
        raise ValueError(f"{a.shards} is no folder, and training maps files: add --stage-to FOLDER, on a local disk")
    whole = Manifest.read(a.manifest)
    rows = whole if a.subset == "all" else whole.subset(a.subset)
    held_out = whole.subset("test") if "test" in whole.subsets and a.subset not in ("all", "test") else None
    pretrained = None
    if isinstance(a, FinetuningArguments) and not a.pretrained and a.pretrained_weights != "last":
        raise ValueError("--pretrained-weights says which of a run's weights to begin from: name it with --pretrained")
    if isinstance(a, FinetuningArguments) and a.pretrained:
        pretrained = trained.load_pretrained(a.pretrained, a.pretrained_weights)
    origin = Origin(argv[0], dataset_name(a.manifest), a.subset, pretrained)
    try:
        train(config, a.runtime, shards, rows, a.out, origin, held_out)
        if not process():
            print(f"done: weights in {a.out / 'checkpoint.pt'}; python -m eval --help says what to ask of them")
    except Terminated as stop:
        say(f"terminated: {stop}")
        return TERMINATED
    except OutOfMemoryError as error:
        raise ValueError(
            f"{str(error).splitlines()[0]} Keep less there with --recompute (python -m train --list says how much), "
            "spread the batch over more GPUs (torchrun), or train with a smaller --batch-size"
        ) from error
    return DONE


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
