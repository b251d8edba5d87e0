"""What tables still miss: in which order, once each, carried out however often it is killed, or given to SLURM."""

from __future__ import annotations

import errno
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
from conftest import ROOT, one_thread
from evaluating import evaluate
from test_tables import fixtures

from eval.publish import missing
from eval.publish.cells import NINE
from eval.publish.collect import AtHand
from eval.publish.missing import Place, Step, Training
from eval.results import Row
from train import __main__ as training
from train import cost, loop, runs, trained
from train.recipes import RECIPES

Tiny = tuple[Path, Path]
MANIFESTS = ROOT / "data_manifests"
UCF101 = AtHand("ucf101", Path("shards/ucf101"), MANIFESTS / "ucf101_split1.csv")
HMDB51 = AtHand("hmdb51", Path("shards/hmdb51"), MANIFESTS / "hmdb51_split1.csv")
C3D = Training("pretrain-ucf101-c3d", "", 0)


@pytest.fixture(autouse=True)
def quick_estimates(monkeypatch: pytest.MonkeyPatch) -> None:
    """A stand-in for the slow count of operations: an hour for a million clips, and mean squared error is cheap."""
    monkeypatch.setattr(cost, "gpu_hours", lambda config, videos: config.epochs * videos / 1e6)
    monkeypatch.setattr(cost, "flops_per_clip", lambda config: 1e9 if "mse" in config.to_json() else 4e9)


def planned(
    tables: tuple[str, ...],
    folder: Path,
    seeds: tuple[int, ...] = (0,),
    rows: Sequence[Row] = (),
    **place: Any,
) -> list[Step]:
    return Place(folder, **({"data": [UCF101, HMDB51]} | place)).missing(tables, seeds, rows)


def by_output(steps: list[Step]) -> dict[str, Step]:
    """Trainings by the name of their folder, evaluations by what their command says of run, data and weights."""

    def flag(step: Step, name: str) -> str:
        return step.command[step.command.index(name) + 1]

    found = {}
    for step in steps:
        if step.command[0] == "train":
            found[Path(flag(step, "--out")).name] = step
        else:
            data = Path(flag(step, "--manifest")).stem.partition("_")[0]
            network = [flag(step, "--network")] if "--network" in step.command else []
            found[" ".join([Path(step.command[2]).name, step.command[1], data, *network, flag(step, "--weights")])] = (
                step
            )
    assert len(found) == len(steps)
    return found


def put_run(folder: Path, run: Training, epoch: float, trained_on: str = "ucf101_split1", **changes: Any) -> Path:
    """What a run leaves of itself, as far as a plan looks."""
    folder.mkdir(parents=True)
    about: dict[str, Any] = {name: kind() for name, kind in runs.KEYS.items()}
    about |= {"recipe": run.recipe, "seed": run.seed, "subset": "train", "trained_on": trained_on}
    about |= {"config_sha256": run.config.sha256()}
    about |= {"pretrained": {"recipe": run.pretraining} if run.pretraining else {}}
    (folder / "run.json").write_text(json.dumps(about | changes))
    (folder / "checkpoint.json").write_text(json.dumps({"epoch": epoch, "step": 1}))
    return folder


# ---- the plan


def test_all_nine_tables_need_each_training_once_and_in_order(tmp_path: Path) -> None:
    steps = planned(NINE, tmp_path)
    by_output(steps)  # each once
    trained_ = [s.command[1] for s in steps if s.command[0] == "train"]
    # By hand: C3D on UCF101 and seven variants, two more backbones there, three on Kinetics; on each of two data sets
    # three from scratch, three regularised and six fine-tuned.
    assert len(trained_) == 8 + 2 + 3 + 2 * (3 + 3 + 6)
    assert sum(name.startswith("finetune") for name in trained_) == 12 and trained_.count("pretrain-ucf101-c3d") == 1
    evaluated = [s.command[1] for s in steps if s.command[0] == "eval"]
    # Retrieval: ten pretrained networks on two data sets, two more networks of one, five epochs. Pretext: six epochs.
    # Classification: 24 runs, and five earlier epochs of three.
    assert (evaluated.count("retrieve"), evaluated.count("pretext")) == (10 * 2 + 4 + 5, 6)
    assert evaluated.count("classify") == 24 + 15
    for place, step in enumerate(steps):
        assert step.after is None or steps.index(step.after) < place
        if step.command[0] == "eval":
            assert step.after and f"--out {step.command[2]} " in str(step.after)


def test_commands_say_everything_that_a_step_is(tmp_path: Path) -> None:
    options: Any = {"training": ["--precision", "bfloat16"], "evaluation": ["--workers", "8"]}
    steps = by_output(planned(("5", "7", "3"), tmp_path, (4,), **options))
    shards, table = str(UCF101.shards), str(UCF101.manifest)
    c3d = str(tmp_path / "pretrain-ucf101-c3d-s4")
    assert steps["pretrain-ucf101-c3d-s4"].command == (
        "train", "pretrain-ucf101-c3d", "--out", c3d, "--shards", shards, "--manifest", table, "--seed", "4",
        "--keep-epochs", "1", "5", "10", "20", "50", "--precision", "bfloat16",
    )  # fmt: skip
    assert steps["pretrain-ucf101-c3d-s4 retrieve hmdb51 motion last"].command == (
        "eval", "retrieve", c3d, "--shards", str(HMDB51.shards), "--manifest", str(HMDB51.manifest),
        "--weights", "last", "--network", "motion", "--workers", "8",
    )  # fmt: skip
    assert "pretrain-ucf101-c3d-s4 pretext hmdb51 epoch-0005" in steps
    finetuning = steps["finetune-ucf101-r2plus1d26-from-pretrain-ucf101-r2plus1d26-s4"]
    assert finetuning.after == steps["pretrain-ucf101-r2plus1d26-s4"]
    assert finetuning.command[-4:-2] == ("--pretrained", str(tmp_path / "pretrain-ucf101-r2plus1d26-s4"))


@pytest.mark.parametrize(
    "name",
    [
        "pretrain-ucf101-c3d-s4",
        "scratch-hmdb51-r3d26-s4",
        "finetune-ucf101-r2plus1d26-from-pretrain-ucf101-r2plus1d26-s4",
    ],
)
def test_training_understands_the_commands(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []
    monkeypatch.setattr(loop, "train", lambda *arguments: asked.append(arguments))
    monkeypatch.setattr(trained, "load_pretrained", lambda folder, _: folder)
    command = by_output(planned(("2", "7"), tmp_path, (4,), training=["--precision", "bfloat16"]))[name].command
    assert training.run(list(command[1:])) == 0
    ((config, runtime, shards, table, out, origin, held_out),) = asked
    assert config == RECIPES[command[1]].config.changed({"seed": 4})
    assert runtime.precision == "bfloat16" and set(table.subsets) == {"train"} and origin.recipe == command[1]
    assert set(held_out.subsets) == {"test"}
    assert (shards, out) == ((HMDB51 if "hmdb51" in name else UCF101).shards, tmp_path / name)
    assert runtime.keep_epochs == (() if "hmdb51" in name else (1, 5, 10, 20, 50))
    assert origin.pretrained == (tmp_path / "pretrain-ucf101-r2plus1d26-s4" if "from" in name else None)


def test_what_has_a_row_is_not_planned(tmp_path: Path) -> None:
    rows = fixtures()
    assert planned(("1", "5", "9"), tmp_path, rows=rows) == []
    assert len(planned(("1",), tmp_path, (0, 3), rows)) == 5 * 3
    left = by_output(planned(("2",), tmp_path, rows=rows))
    assert all("k400" in name for name in left) and len(left) == 3 + 2 * 3
    # An evaluation that has another metric, of labels of two parts, is not made again.
    assert planned(("1",), tmp_path, rows=[row | {"metrics": {"both R@1": 3.0}} for row in rows]) == []


def test_what_is_not_at_hand_is_said_down_the_line(tmp_path: Path) -> None:
    steps = by_output(planned(("2",), tmp_path))
    assert {name for name, step in steps.items() if step.lacks} == {name for name in steps if "k400" in name} != set()
    assert {step.lacks for step in steps.values()} == {"", "--data k400=SHARDS:MANIFEST is not given"}
    lines = missing.describe(planned(("1",), tmp_path, data=[UCF101])).splitlines()
    assert len(lines) == 17 and "python -m train pretrain-ucf101-c3d-current --out" in lines[0]
    assert lines[1].endswith("# after 1") and "# cannot run: --data hmdb51=" in lines[2]
    assert lines[-2] == "5 trainings and 10 evaluations are missing: 6.0 GPU hours estimated"
    assert lines[-1] == "10 of these can run: 5.9 GPU hours estimated"
    assert missing.describe(planned(("1",), tmp_path, data=[])).endswith("estimated\nnone of these can run")
    assert missing.describe([]) == "nothing is missing"


def test_runs_that_are_there_are_used(tmp_path: Path) -> None:
    mse = Training("pretrain-ucf101-c3d-mse", "", 0)
    put_run(tmp_path / "mine", C3D, 120.0)
    half = put_run(tmp_path / mse.name, mse, 90.0)
    log = '{"step": 1, "clips_per_second": 400}\n{"step": 2, "clips_per_second": 600}\n{"s'
    (half / "metrics.jsonl").write_text(log)
    steps = by_output(planned(("1",), tmp_path))
    assert C3D.name not in steps and steps["mine retrieve ucf101 video last"].after is None
    assert steps[mse.name].measured and not steps["pretrain-ucf101-c3d-convgru-s0"].measured
    assert steps[mse.name].hours == pytest.approx(30 * 9537 / 500 / 3600)
    current = steps["pretrain-ucf101-c3d-current-s0"]  # the same networks, four times as much work a clip
    assert current.measured and current.hours == pytest.approx(120 * 9537 / (500 / 4) / 3600)
    assert steps["pretrain-ucf101-c3d-convgru-s0"].hours == pytest.approx(120 * 9537 / 1e6)
    # Ten clips of 9537 + 3783 videos, at a third of what a clip costs in training.
    assert steps[f"{mse.name} retrieve ucf101 video last"].hours == pytest.approx(13320 * 10 / 3 / 500 / 3600)


def test_runs_that_are_others_are_not_used(tmp_path: Path) -> None:
    put_run(tmp_path / "a", C3D, 120.0, trained_on="ucf101_split2")
    put_run(tmp_path / "b", C3D, 120.0, config_sha256="another")
    put_run(tmp_path / "c", C3D, 120.0, subset="all")
    put_run(tmp_path / "d", C3D._replace(seed=1), 120.0)
    put_run(tmp_path / "e", C3D, 119.5)
    (tmp_path / "f").mkdir()
    (tmp_path / "f" / "run.json").write_text("{")
    (step,) = (s for s in planned(("5",), tmp_path) if s.command[0] == "train")
    assert f"--out {tmp_path / 'e'} " in str(step)  # to be finished


def test_weights_that_a_run_did_not_keep_are_missed_in_the_plan(tmp_path: Path) -> None:
    run = put_run(tmp_path / "mine", C3D, 30.0)  # of table 7's epochs it has passed 1, 5, 10 and 20
    for epoch in (1, 5, 20):
        (run / f"epoch-{epoch:04d}.pt").touch()
    lacking = {step for step in planned(("7",), tmp_path) if step.lacks}
    weights = [step.command[step.command.index("--weights") + 1] for step in lacking]
    assert weights and set(weights) == {"epoch-0010"}
    assert {step.lacks for step in lacking} == {f"{run} did not keep epoch-0010: train elsewhere with --keep-epochs"}


def test_motion_that_the_shards_do_not_have_is_missed_in_the_plan(tmp_path: Path, tiny: tuple[Path, Path]) -> None:
    steps = planned(("scenes",), tmp_path, data=[AtHand("scenes", *tiny)])
    assert {step.command[1] for step in steps if step.command[0] == "train" and step.lacks} == {
        "scenes-residual", "scenes-residual-only",
    }  # fmt: skip
    for step in steps:
        assert bool(step.lacks) == ("residual" in str(step)) and ("run --residuals" in step.lacks) == bool(step.lacks)


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("ucf101", "write NAME=SHARDS:MANIFEST"),
        ("ucf101=shards", "write NAME=SHARDS:MANIFEST"),
        ("kinetics=a:b.csv", "no table has the data set kinetics; there are ucf101, hmdb51, k400, scenes, small"),
        ("ucf101=a:data/ucf101_split2.csv", "the tables are of ucf101_split1.csv"),
    ],
)
def test_data_that_cannot_be_is_refused(text: str, complaint: str) -> None:
    with pytest.raises(ValueError, match=complaint):
        missing.parse(text)
    assert missing.parse("k400=a:b/c:d.csv") == AtHand("k400", Path("a:b/c"), Path("d.csv"))


# ---- carrying it out


@pytest.fixture
def script(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Step]:
    """Steps whose command is a line of Python."""
    monkeypatch.setattr(missing, "PYTHON", (sys.executable, "-c"))

    def step(code: str, after: Step | None = None, lacks: str = "") -> Step:
        return Step((code, str(tmp_path)), 0.0, False, after, lacks)

    return step


TOUCH = "import sys, pathlib; (pathlib.Path(sys.argv[1]) / {0!r}).touch()"


def test_a_failure_leaves_out_what_needs_it_and_nothing_else(
    script: Callable[..., Step], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bad, other = script("raise SystemExit(7)"), script(TOUCH.format("z"))
    after = script(TOUCH.format("x"), bad)
    steps = [bad, after, script(TOUCH.format("y"), after), other, script(TOUCH.format("w"), lacks="no data")]
    assert missing.run(lambda: steps, tmp_path / "runs") == 3
    assert {p.name for p in tmp_path.iterdir()} == {"runs", "z"}
    lines = capsys.readouterr().err.splitlines()
    reasons = ["it ended with status 7", "what it needs failed", "what it needs failed", "no data"]
    assert lines == [f"not done: {s}: {reason}" for s, reason in zip([*steps[:3], steps[4]], reasons)]
    assert missing.run(lambda: [other], tmp_path / "runs") == 0


def test_a_file_system_without_locks_is_worked_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def unsupported(*_: object) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(missing.fcntl, "flock", unsupported)
    assert missing.run(list, tmp_path) == 0


def test_interrupted_and_terminated_steps_end_the_plan(script: Callable[..., Step], tmp_path: Path) -> None:
    last = script(TOUCH.format("x"))
    with pytest.raises(KeyboardInterrupt):
        missing.run(lambda: [script("raise SystemExit(130)"), last], tmp_path / "runs")
    saving = "import os, signal, sys, time, pathlib\n"
    saving += f"signal.signal(signal.SIGTERM, lambda *_: [{TOUCH.format('saved').split('; ')[1]}, sys.exit(143)])\n"
    saving += "os.kill(os.getppid(), signal.SIGTERM)\ntime.sleep(60)"
    assert missing.run(lambda: [script(saving), last], tmp_path / "runs") == 143
    assert (tmp_path / "saved").exists() and not (tmp_path / "x").exists()
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL


def results(folder: Path) -> list[dict[str, Any]]:
    """Every row, without the time at which it was made; places do not enter it."""
    found = [json.loads(p.read_text()) for p in folder.glob("*/results/*.json")]
    return sorted(({k: v for k, v in row.items() if k != "when"} for row in found), key=json.dumps)


def wait_for(condition: Callable[[], bool], process: subprocess.Popen[bytes]) -> None:
    while not condition() and process.poll() is None:
        time.sleep(0.01)


def test_a_killed_run_resumes_to_the_same_rows(tiny: Tiny, tmp_path: Path) -> None:
    def start(folder: Path) -> subprocess.Popen[bytes]:
        program = [sys.executable, str(ROOT / "tests" / "tiny_program.py"), "eval", "tables", "--run"]
        program += ["--only", "scenes", "--data", f"scenes={tiny[0]}:{tiny[1]}"]
        program += ["--runs", str(folder), "--out", str(folder / "tables")]
        program += ["--training=--device cpu --loader-workers 0", "--evaluation=--device cpu --workers 0"]
        environment = one_thread() | {"PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'tests'}"}
        return subprocess.Popen(program, cwd=ROOT, env=environment, start_new_session=True, stdout=subprocess.DEVNULL)

    calm = start(tmp_path / "calm")
    # First the plan alone is killed, while it trains: the training it leaves behind is waited for. Then all of it is,
    # when one result is there: the rest follows.
    folder = tmp_path / "killed"
    first = start(folder)
    wait_for(lambda: (folder / "scenes-s0" / "checkpoint.json").exists(), first)
    first.kill()
    first.wait()
    second = start(folder)
    wait_for(lambda: bool(results(folder)), second)
    os.killpg(second.pid, signal.SIGKILL)
    second.wait()
    assert (first.returncode, second.returncode) == (-signal.SIGKILL, -signal.SIGKILL)
    assert start(folder).wait() == 0 and calm.wait() == 0
    expected, found = results(tmp_path / "calm"), results(folder)
    assert found == expected
    assert sorted((r["kind"], r["recipe"], r["pretraining"], r["weights"]) for r in found) == [
        ("classification", "scenes-finetune", "scenes", "last"),
        ("retrieval", "scenes", "", "initial"),
        ("retrieval", "scenes", "", "last"),
    ]
    tables = [(f / "tables" / "tables.csv").read_text().splitlines() for f in (tmp_path / "calm", folder)]
    without = [[",".join(line.split(",")[:-2]) for line in t if line.startswith("scenes on split")] for t in tables]
    assert without[0] == without[1] and sum("not run" not in line for line in without[0]) == 3 + 3 + 1


# ---- SLURM


def test_slurm_arrays_run_every_step_after_what_it_needs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "some where"
    data = [f"ucf101={UCF101.shards}:{UCF101.manifest}", f"hmdb51={HMDB51.shards}:{HMDB51.manifest}"]
    monkeypatch.setattr(missing, "PYTHON", ("echo", "job"))
    asked = ["--only", "2", "--runs", tmp_path / "none", "--slurm", folder, "--data", *data]
    assert evaluate(monkeypatch, "tables", *asked) == 0
    assert "submit.sh, which queues 3 arrays of 9, 12, 6" in capsys.readouterr().out
    # A scheduler that runs each task of an array at once, and says what it was asked.
    scheduler = tmp_path / "bin" / "sbatch"
    scheduler.parent.mkdir()
    scheduler.write_text(
        "#!/bin/bash\n"
        f"echo \"$@\" >> '{tmp_path}/asked'\n"
        'last=$(sed "s/.*--array=1-\\([0-9]*\\).*/\\1/" <<< "$*")\n'
        'for n in $(seq "$last"); do SLURM_ARRAY_TASK_ID=$n bash "${@: -2:1}" "${@: -1}"; done >> '
        f"'{tmp_path}/ran' && echo 17\n"
    )
    scheduler.chmod(0o755)
    environment = os.environ | {"PATH": f"{scheduler.parent}{os.pathsep}{os.environ['PATH']}"}
    done = subprocess.run([folder / "submit.sh"], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "asked").read_text().splitlines() == [
        "--parsable --array=1-9 --time=3:00:00 task.sbatch level-1.txt",
        "--parsable --array=1-12 --time=3:00:00 --dependency=afterany:17 task.sbatch level-2.txt",
        "--parsable --array=1-6 --time=2:00:00 --dependency=afterany:17 task.sbatch level-3.txt",
    ]
    ran = (tmp_path / "ran").read_text().splitlines()
    expected = [step for step in planned(("2",), tmp_path / "none") if not step.lacks]
    assert sorted(ran) == sorted(" ".join(["job", *step.command]) for step in expected)
    for step in expected:
        line = " ".join(["job", *step.command])
        assert step.after is None or ran.index(" ".join(["job", *step.after.command])) < ran.index(line)


def test_slurm_without_a_step_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no job to write: --data ucf101=SHARDS:MANIFEST is not given"):
        missing.write_slurm(planned(("1",), tmp_path, data=[]), tmp_path / "jobs")
    assert not (tmp_path / "jobs").exists()
