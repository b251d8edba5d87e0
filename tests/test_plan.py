"""What tables still miss: in which order, once each, carried out however often it is killed, or given to SLURM."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conftest import ROOT, one_thread
from test_tables import fixtures

from eval import __main__ as command
from eval import execute, plan
from eval.cells import NINE
from eval.plan import Data, Job, Training
from train import __main__ as training
from train import cost, loop, runs, trained
from train.recipes import RECIPES

Tiny = tuple[Path, Path]
MANIFESTS = ROOT / "data_manifests"
UCF101 = Data("ucf101", Path("shards/ucf101"), MANIFESTS / "ucf101_split1.csv")
HMDB51 = Data("hmdb51", Path("shards/hmdb51"), MANIFESTS / "hmdb51_split1.csv")


@pytest.fixture(autouse=True)
def quick_estimates(monkeypatch: pytest.MonkeyPatch) -> None:
    """A stand-in for the slow count of operations: an hour for a million clips, and mean squared error is cheap."""
    monkeypatch.setattr(cost, "gpu_hours", lambda config, videos: config.epochs * videos / 1e6)
    monkeypatch.setattr(cost, "flops_per_clip", lambda config: 1e9 if "mse" in config.to_json() else 4e9)


def planned(tables: tuple[str, ...], folder: Path, **options: Any) -> list[Job]:
    usual: dict[str, Any] = {"seeds": [0], "data": [UCF101, HMDB51], "found": []}
    return plan.make(tables, folder=folder, **(usual | options))


def names(jobs: list[Job]) -> list[str]:
    return [job.name for job in jobs]


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
    jobs = planned(NINE, tmp_path)
    assert len(set(names(jobs))) == len(jobs)
    trained = [j.command[1] for j in jobs if j.command[0] == "train"]
    # By hand: C3D on UCF101 and seven variants, two more backbones there, three on Kinetics; on each of two data sets
    # three from scratch, three regularised and six fine-tuned.
    assert len(trained) == 8 + 2 + 3 + 2 * (3 + 3 + 6)
    assert sum(name.startswith("finetune") for name in trained) == 12 and trained.count("pretrain-ucf101-c3d") == 1
    evaluated = [j.command[1] for j in jobs if j.command[0] == "eval"]
    # Retrieval: ten pretrained networks on two data sets, two more networks of one, five epochs. Pretext: six epochs.
    # Classification: 24 runs, and five earlier epochs of three.
    assert (evaluated.count("retrieve"), evaluated.count("pretext")) == (10 * 2 + 4 + 5, 6)
    assert evaluated.count("classify") == 24 + 15
    before: set[str] = set()
    for job in jobs:
        assert set(job.needs) <= before
        before.add(job.name)
        run = job.command[job.command.index("--run") + 1] if "--run" in job.command else None
        if run:
            assert job.needs == (Path(run).name,)


def test_commands_say_everything_that_a_job_is(tmp_path: Path) -> None:
    jobs = {j.name: j for j in planned(("5", "7", "3"), tmp_path, seeds=[4], training=["--precision", "bfloat16"])}
    shards, table = str(UCF101.shards), str(UCF101.manifest)
    c3d = str(tmp_path / "pretrain-ucf101-c3d-s4")
    assert jobs["pretrain-ucf101-c3d-s4"].command == (
        "train", "pretrain-ucf101-c3d", "--shards", shards, "--manifest", table, "--out", c3d, "--seed", "4",
        "--keep-epochs", "1", "5", "10", "20", "50", "--precision", "bfloat16",
    )  # fmt: skip
    assert jobs["pretrain-ucf101-c3d-s4 retrieve hmdb51 motion last"].command == (
        "eval", "retrieve", "--run", c3d, "--shards", str(HMDB51.shards), "--manifest", str(HMDB51.manifest),
        "--weights", "last", "--network", "motion",
    )  # fmt: skip
    pretext = jobs["pretrain-ucf101-c3d-s4 pretext hmdb51 video epoch-0005"].command
    assert pretext[:2] == ("eval", "pretext") and pretext[-2:] == ("--weights", "epoch-0005")
    name = "finetune-ucf101-r2plus1d26-from-pretrain-ucf101-r2plus1d26-s4"
    assert jobs[name].needs == ("pretrain-ucf101-r2plus1d26-s4",)
    place = jobs[name].command.index("--pretrained") + 1
    assert jobs[name].command[place] == str(tmp_path / "pretrain-ucf101-r2plus1d26-s4")
    assert jobs[name].command[place - 6 : place - 1] == ("1", "5", "10", "20", "50")


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
    jobs = {j.name: j for j in planned(("2", "7"), tmp_path, seeds=[4], training=["--precision", "bfloat16"])}
    command_line = jobs[name].command
    assert training.run(list(command_line[1:])) == 0
    ((config, runtime, shards, table, out, origin),) = asked
    assert config == RECIPES[command_line[1]].config.changed({"seed": 4})
    assert runtime.precision == "bfloat16" and set(table.subsets) == {"train"} and origin.recipe == command_line[1]
    assert (shards, out) == ((HMDB51 if "hmdb51" in name else UCF101).shards, tmp_path / name)
    assert runtime.keep_epochs == (() if "hmdb51" in name else (1, 5, 10, 20, 50))
    assert origin.pretrained == (tmp_path / "pretrain-ucf101-r2plus1d26-s4" if "from" in name else None)


def test_what_has_a_row_is_not_planned(tmp_path: Path) -> None:
    found = fixtures()
    assert names(planned(("1", "5", "9"), tmp_path, found=found)) == []
    assert names(planned(("1",), tmp_path, found=found, seeds=[0, 2])) == []
    assert len(planned(("1",), tmp_path, found=found, seeds=[0, 3])) == 5 * 3
    missing = names(planned(("2",), tmp_path, found=found, data=[UCF101, HMDB51]))
    assert all("k400" in name for name in missing) and len(missing) == 3 + 2 * 3


def test_a_row_without_the_metric_is_not_made_again(tmp_path: Path) -> None:
    found = [row | {"metrics": {"both R@1": 3.0}} for row in fixtures()]
    assert names(planned(("1",), tmp_path, found=found)) == []


def test_what_is_not_at_hand_is_said_down_the_line(tmp_path: Path) -> None:
    jobs = {j.name: j for j in planned(("2",), tmp_path)}
    lacking = {name: job.lacks for name, job in jobs.items() if job.lacks}
    assert lacking and all("k400" in n for n in lacking) and len(lacking) == sum("k400" in n for n in jobs)
    assert set(lacking.values()) == {"--data k400=SHARDS:MANIFEST is not given"}
    jobs = {j.name: j for j in planned(("1",), tmp_path, data=[UCF101])}
    assert sum(bool(j.lacks) for j in jobs.values()) == 5


def test_runs_that_are_there_are_used(tmp_path: Path) -> None:
    c3d, mse = Training("pretrain-ucf101-c3d", "", 0), Training("pretrain-ucf101-c3d-mse", "", 0)
    put_run(tmp_path / "mine", c3d, 120.0)
    half = put_run(tmp_path / mse.name, mse, 90.0)
    (half / "metrics.jsonl").write_text(
        '{"step": 1, "clips_per_second": 400}\n{"step": 2, "clips_per_second": 600}\n{"s'
    )
    jobs = {j.name: j for j in planned(("1",), tmp_path)}
    assert c3d.name not in jobs and jobs[f"{c3d.name} retrieve ucf101 video last"].command[3] == str(tmp_path / "mine")
    assert jobs[mse.name].measured and not jobs["pretrain-ucf101-c3d-convgru-s0"].measured
    assert jobs[mse.name].hours == pytest.approx(30 * 9537 / 500 / 3600)
    current = jobs["pretrain-ucf101-c3d-current-s0"]  # the same networks, four times as much work a clip
    assert current.measured and current.hours == pytest.approx(120 * 9537 / (500 / 4) / 3600)
    assert jobs["pretrain-ucf101-c3d-convgru-s0"].hours == pytest.approx(120 * 9537 / 1e6)
    # Ten clips of 9537 + 3783 videos, at a third of what a clip costs in training.
    assert jobs[f"{mse.name} retrieve ucf101 video last"].hours == pytest.approx(13320 * 10 / 3 / 500 / 3600)


def test_runs_that_are_others_are_not_used(tmp_path: Path) -> None:
    c3d = Training("pretrain-ucf101-c3d", "", 0)
    put_run(tmp_path / "a", c3d, 120.0, trained_on="ucf101_split2")
    put_run(tmp_path / "b", c3d, 120.0, config_sha256="another")
    put_run(tmp_path / "c", c3d, 120.0, subset="all")
    put_run(tmp_path / "d", Training("pretrain-ucf101-c3d", "", 1), 120.0)
    (tmp_path / "e").mkdir()
    (tmp_path / "e" / "run.json").write_text("{")
    jobs = {j.name: j for j in planned(("5",), tmp_path)}
    assert not jobs[c3d.name].lacks
    put_run(tmp_path / c3d.name, c3d, 120.0, config_sha256="another")
    jobs = {j.name: j for j in planned(("5",), tmp_path)}
    assert all("holds a run with other settings or data: move it away" in j.lacks for j in jobs.values())


def test_an_epoch_that_was_not_kept_is_said(tmp_path: Path) -> None:
    run = put_run(tmp_path / "run", Training("pretrain-ucf101-c3d", "", 0), 120.0)
    (run / "epoch-0005.pt").touch()
    lacks = {j.name.split()[-1]: j.lacks for j in planned(("7",), tmp_path) if "retrieve" in j.name}
    assert not lacks["epoch-0005"] and not lacks["last"]
    assert "was trained without --keep-epochs 1 5 10 20 50: move it away" in lacks["epoch-0001"]


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
        Data.parse(text)
    assert Data.parse("k400=a:b/c:d.csv") == Data("k400", Path("a:b/c"), Path("d.csv"))


def test_the_list_counts_what_can_run(tmp_path: Path) -> None:
    jobs = planned(("1",), tmp_path, data=[UCF101])
    lines = execute.describe(jobs).splitlines()
    assert len(lines) == 16 and "python -m train pretrain-ucf101-c3d-current --shards" in lines[0]
    assert lines[1].endswith("# after 1") and "# cannot run: --data hmdb51=" in lines[2]
    assert lines[-1].startswith("5 trainings and 10 evaluations are missing, 10 of these can run: 0.0 hours by clips")
    assert execute.describe([]) == "nothing is missing"


# ---- carrying it out


@pytest.fixture
def script(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Job]:
    """Jobs whose command is a line of Python."""
    monkeypatch.setattr(execute, "PYTHON", (sys.executable, "-c"))

    def job(name: str, code: str, needs: tuple[str, ...] = (), lacks: str = "") -> Job:
        return Job(name, (code, str(tmp_path)), 0.0, False, needs, lacks)

    return job


TOUCH = "import sys, pathlib; (pathlib.Path(sys.argv[1]) / {0!r}).touch()"


def test_a_failure_leaves_out_what_needs_it_and_nothing_else(
    script: Callable[..., Job], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    jobs = [
        script("bad", "raise SystemExit(7)"),
        script("after bad", TOUCH.format("x"), ("bad",)),
        script("later", TOUCH.format("y"), ("after bad",)),
        script("other", TOUCH.format("z")),
        script("without", TOUCH.format("w"), lacks="no data"),
    ]
    assert execute.run(lambda: jobs, tmp_path / "runs") == 3
    assert {p.name for p in tmp_path.iterdir()} == {"runs", "z"}
    assert capsys.readouterr().err.splitlines() == [
        "not done: bad: it ended with status 7",
        "not done: after bad: bad failed",
        "not done: later: after bad failed",
        "not done: without: no data",
    ]
    assert execute.run(lambda: jobs[3:4], tmp_path / "runs") == 0


def test_interrupted_and_terminated_jobs_end_the_plan(script: Callable[..., Job], tmp_path: Path) -> None:
    last = script("last", TOUCH.format("x"))
    with pytest.raises(KeyboardInterrupt):
        execute.run(lambda: [script("a", "raise SystemExit(130)"), last], tmp_path / "runs")
    saving = "import os, signal, sys, time, pathlib\n"
    saving += f"signal.signal(signal.SIGTERM, lambda *_: [{TOUCH.format('saved').split('; ')[1]}, sys.exit(143)])\n"
    saving += "os.kill(os.getppid(), signal.SIGTERM)\ntime.sleep(60)"
    assert execute.run(lambda: [script("b", saving), last], tmp_path / "runs") == 143
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
        program = [
            sys.executable,
            str(ROOT / "tests" / "tiny_program.py"),
            "eval",
            "tables",
            "--run",
            "--only",
            "scenes",
        ]
        program += ["--data", f"scenes={tiny[0]}:{tiny[1]}", "--runs", str(folder), "--out", str(folder / "tables")]
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
    networks = [(n, w) for n in ("iframe", "motion", "video") for w in ("initial", "last")]
    assert sorted((r["kind"], r["recipe"], r["pretraining"], r["network"], r["weights"]) for r in found) == [
        ("classification", "scenes-finetune", "scenes", "video", "last"),
        *(("retrieval", "scenes", "", *of) for of in networks),
    ]
    tables = [(f / "tables" / "tables.csv").read_text().splitlines() for f in (tmp_path / "calm", folder)]
    without = [[",".join(line.split(",")[:-2]) for line in t if line.startswith("scenes on split")] for t in tables]
    assert without[0] == without[1] and len(without[0]) == 19 and "not run" not in "".join(without[0])


# ---- SLURM


def test_slurm_arrays_run_every_job_after_what_it_needs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "some where"
    data = [f"ucf101={UCF101.shards}:{UCF101.manifest}", f"hmdb51={HMDB51.shards}:{HMDB51.manifest}"]
    arguments = ["--only", "2", "--runs", str(tmp_path / "none"), "--slurm", str(folder), "--data", *data]
    monkeypatch.setattr(sys, "argv", ["python -m eval", "tables", *arguments])
    monkeypatch.setattr(execute, "PYTHON", ("echo", "job"))
    assert command.main() == 0
    assert "submit.sh, which queues 3 arrays of 9, 12, 6" in capsys.readouterr().out
    # A scheduler that runs each task of an array at once, and says what it was asked.
    scheduler = tmp_path / "bin" / "sbatch"
    scheduler.parent.mkdir()
    scheduler.write_text(
        "#!/bin/bash\n"
        f"echo \"$@\" >> '{tmp_path}/asked'\n"
        'script="${@: -1}"; last=$(sed -n "s/^#SBATCH --array=1-//p" "$script")\n'
        'for n in $(seq "$last"); do SLURM_ARRAY_TASK_ID=$n bash "$script"; done >> '
        f"'{tmp_path}/ran' && echo 17\n"
    )
    scheduler.chmod(0o755)
    environment = os.environ | {"PATH": f"{scheduler.parent}{os.pathsep}{os.environ['PATH']}"}
    done = subprocess.run([folder / "submit.sh"], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "asked").read_text().splitlines() == [
        "--parsable level-1.sbatch",
        "--parsable --dependency=afterany:17 level-2.sbatch",
        "--parsable --dependency=afterany:17 level-3.sbatch",
    ]
    ran = (tmp_path / "ran").read_text().splitlines()
    expected = [" ".join(["job", *j.command]) for j in planned(("2",), tmp_path / "none") if not j.lacks]
    assert sorted(ran) == sorted(expected)
    order = [line.split("--out ")[-1].split()[0] for line in ran]
    for line in ran:
        for flag in ("--run ", "--pretrained "):
            if flag in line:
                assert order.index(line.split(flag)[1].split()[0]) < ran.index(line)


def test_slurm_without_a_job_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no job to write: --data ucf101=SHARDS:MANIFEST is not given"):
        execute.slurm(planned(("1",), tmp_path, data=[]), tmp_path / "jobs")
    assert not (tmp_path / "jobs").exists()
