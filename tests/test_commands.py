"""What is typed: every error names what was given and the way out, in a line or in a few, before any work; versions."""

from __future__ import annotations

import re
import shlex
import signal
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import ROOT

from eval import __main__ as evaluating
from preprocess import __main__ as preparing
from preprocess import __version__
from train import __main__ as training

Tiny = tuple[Path, Path]
PROGRAMS: dict[str, Callable[[], int]] = {
    "preprocess": preparing.main,
    "train": lambda: training.main(sys.argv[1:]),
    "eval": evaluating.main,
}
RUN = "preprocess run MANIFEST --videos VIDEOS --out OUT"
SMALL = "train small DATA --out OUT --batch-size 2"
TUNE = "train small-finetune DATA --out OUT --batch-size 2"
WRONG = {
    # A verb, or none.
    "preprocess": "the verb is missing; choose from run, manifest,",
    "preprocess rnu": "no verb 'rnu'; did you mean run?",
    "eval retreive": "no verb 'retreive'; did you mean retrieve?",
    "eval everything": "no verb 'everything'; choose from retrieve,",
    "eval DATA retrieve RUN": "the verb comes first, before --shards; choose from",
    "train": "the recipe is missing; python -m train --list",
    "train smal": "no recipe 'smal'; did you mean small",
    "train exprot RUN": "did you mean export?",
    "train DATA small": "the recipe comes first, before --shards; python -m train --list",
    # What has no flag.
    "eval compare --run RUN": "--run is no flag: write python -m eval compare RUNS …, without it",
    "eval probe --runs=RUN DATA": "--runs is no flag: write python -m eval probe RUNS …",
    "preprocess info --shards SHARDS": "--shards is no flag: write python -m preprocess info SHARDS …",
    "preprocess run --manifest MANIFEST": "--manifest is no flag: write python -m preprocess run MANIFEST …",
    "train export --run RUN --out OUT": "--run is no flag: write python -m train export RUN …",
    # What is not there.
    "preprocess run no.csv --videos VIDEOS --out OUT": "no manifest no.csv: .* python -m preprocess manifest FOLDER",
    "preprocess run MANIFEST --videos no --out OUT": "--videos .*/no is not a folder",
    "preprocess run MANIFEST --videos VIDEOS --out MANIFEST": "split.csv",
    "preprocess run MANIFEST --videos VIDEOS --out /proc/no": "/proc/no",
    "preprocess manifest no --out OUT": "no is not a folder: name the folder that holds the videos",
    "preprocess check no": "no holds no shards .* python -m preprocess run",
    "preprocess info SHARDS/shard-00000.h5": "holds no shards .*name a folder that does",
    "preprocess inspect SHARDS --video no.mp4 --out x.png": "no video 'no.mp4' in these shards .* but 19.mp4",
    "train small --shards SHARDS --manifest no.csv --out OUT": "no manifest no.csv",
    f"{SMALL} --subset training": "no row .* subset 'training'; it has 'train' .12., .*--subset all",
    f"{TUNE}": "name its run with --pretrained RUN",
    f"{TUNE} --pretrained no": "no holds no run .*give the --out of python -m train",
    f"{TUNE} --pretrained RUN --pretrained-weights initial": "initial are not pretrained: begin from last",
    "train export RUN --out OUT --weights best": "small has no weights 'best', but initial, last, epoch-0001",
    "eval retrieve RUN --shards SHARDS --manifest no.csv": "no manifest no.csv",
    "eval retrieve no DATA": "no holds no run .*give the --out of python -m train",
    "eval retrieve RUN DATA --weights epoch-0007": "'epoch-0007', but initial, last, epoch-0001; --keep-epochs",
    "eval tables --results no.csv": "no.csv does not exist: name a folder of runs, or a CSV",
    "eval tables --results MANIFEST": "split.csv is no CSV of results",
    "eval report --runs no": "no folder no: name the folder of runs with --runs",
    # Beyond a limit.
    f"{RUN} --workers 0": "--workers is 0; choose 1 or more",
    f"{RUN} --workers two": "Error parsing --workers: .*'two'",
    f"{RUN} --max-failures -1": "--max-failures is -1; choose 0 or more",
    f"{RUN} --part 2": "--part is '2'; write i/n",
    f"{RUN} --part 0/2": "--part 0/2",
    f"{RUN} --part 3/2": "--part 3/2",
    f"{RUN} --videos-per-shard 0": "--videos-per-shard is 0; choose 1 or more",
    f"{RUN} --time-limit 0": "--time-limit is 0; it must be more",
    f"{RUN} --time-limit inf": r"--time-limit is inf; it must be more than 0 and at most 1e\+06",
    f"{RUN} --time-limit nan": "--time-limit is nan; it must be more",
    f"{RUN} --jpeg-quality 101": "jpeg_quality is 101; choose a value from 1 to 100",
    "preprocess check SHARDS --workers 0": "--workers is 0; choose 1",
    "preprocess copy SHARDS OUT --workers 0": "--workers is 0; choose 1",
    "preprocess synthetic --out OUT --seed -1": "--seed is -1; choose 0",
    "preprocess synthetic --out OUT --workers 0": "--workers is 0; choose 1",
    "preprocess manifest VIDEOS --out OUT --test-share 2": "test share is 2.0; choose one between 0 and 1",
    "preprocess inspect SHARDS --out x.jpg": "x.jpg ends in .jpg: a sheet ends in .png",
    f"{SMALL} --batch-size 1": "batch_size is 1; choose 2 or more",
    f"{SMALL} --batch-size 1000": "12 videos do not fill one batch of 1000; choose a batch of at most 12",
    f"{SMALL} --epochs 3 --keep-epochs 4": "--keep-epochs names 4; this run has epochs 1 to 3",
    f"{SMALL} --objective.alpha 80": r"alpha is 80.0; .* within \[0, 1\]",
    f"{SMALL} --device tpu": "no device 'tpu': choose auto, cpu",
    "eval retrieve RUN DATA --workers -1": "workers is -1; choose 0 or more",
    "eval retrieve RUN DATA --network vidoe": "'vidoe' .*'video', 'layer4', 'iframe', 'motion'",
    "eval retrieve RUN DATA --picture x.jpg": "--picture is x.jpg; .* end in .png",
    "eval tables --only 10 --plan": "no table 10; there are 1, 2,",
    "eval tables --plan --data ucf=a:b": "data set ucf; there are ucf101, hmdb51",
    "eval tables --plan --data ucf101=a": "write NAME=SHARDS:MANIFEST",
    # What does not go together, or does nothing.
    f"{RUN} --backend dask": "--scheduler ADDRESS",
    f"{RUN} --scheduler tcp://127.0.0.1:1": "--scheduler ADDRESS",
    f"{RUN} --no-such-flag": "no-such-flag",
    f"{SMALL} --objective.alhpa 1": "Perhaps you meant: .*--objective.alpha FLOAT",
    "eval tables --only 9 --seeds 7": "--only, --seeds say what to plan or run: add --plan, --run or --slurm FOLDER",
    "eval tables --plan --run": "--plan, --run and --slurm exclude each other",
    "eval tables --plan --export x.csv": "leave one out",
    "eval compare DATA": "nothing to compare: give the folders",
    "eval classify RUN DATA": "no classifier. .* --pretrained .*small",
    "eval diagnose DATA": "a RUN, or --module package.module:factory",
    "eval report --gallery RUN": "need both --shards and --manifest",
}
"""What is typed, with places for paths -> what must be said of it."""


@pytest.mark.parametrize("typed", WRONG)
def test_what_is_typed_wrong_is_told_with_the_way_out(
    typed: str,
    tiny: Tiny,
    joint_run: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    shards, manifest = map(str, tiny)
    places = {"DATA": f"--shards {shards} --manifest {manifest}", "SHARDS": shards, "MANIFEST": manifest}
    places |= {"VIDEOS": str(tiny[0].parent / "videos"), "RUN": str(joint_run), "OUT": str(tmp_path / "out")}
    argv = shlex.split(re.sub("|".join(places), lambda word: places[word[0]], typed))
    monkeypatch.setattr(sys, "argv", argv)
    monkeypatch.setattr(signal, "signal", lambda *_: None)
    monkeypatch.chdir(tmp_path)
    try:
        status = PROGRAMS[argv[0]]()
    except SystemExit as stop:
        status = stop.code  # type: ignore[assignment]
    said = capsys.readouterr().err
    assert status in (1, 2) and list(tmp_path.iterdir()) == []
    assert re.search(WRONG[typed], " ".join(re.sub("[│╭╰─╮╯]", " ", said).split())), said
    assert said.count("\n") == 1 if said.startswith("error: ") else said.count("\n") < 16


@pytest.mark.parametrize("program", PROGRAMS)
def test_the_version_is_that_of_the_changelog(
    program: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", [program, "--version"])
    monkeypatch.setattr(signal, "signal", lambda *_: None)
    assert PROGRAMS[program]() == 0
    assert capsys.readouterr().out == f"context-motion {__version__}\n"
    latest = re.search(r"^## (\S+)", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    assert latest and latest[1] == __version__
