"""Stage 1 on a real Dask scheduler with two worker processes, against one process."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from conftest import panned, write_video
from test_restart import TINY, TINY_FLAGS, wait_for

from preprocess import check, pipeline
from preprocess.manifest import Manifest

pytest.importorskip("distributed", reason="Dask is not installed: pip install '.[cluster]'")

ROOT = Path(__file__).resolve().parent.parent
PATIENCE = 120  # seconds for a cluster to come up on a busy machine; a bound, not a measurement


class Cluster:
    """A scheduler and the workers that joined it, of one thread each, in a folder of their own."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.file = folder, folder / "scheduler.json"
        self.processes: list[subprocess.Popen[bytes]] = []

    def start(self, *arguments: str, before: tuple[str, ...] = ()) -> subprocess.Popen[bytes]:
        command = [*before, sys.executable, "-m", *arguments, "--no-dashboard", "--scheduler-file", str(self.file)]
        self.processes.append(
            subprocess.Popen(
                command,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                env=os.environ | {"PYTHONPATH": str(ROOT)},
                cwd=self.folder,
            )
        )
        return self.processes[-1]

    def schedule(self) -> str:
        """Start the scheduler; its address."""
        self.start("distributed.cli.dask_scheduler", "--port", "0", "--host", "127.0.0.1")
        wait_for(lambda: self.file.exists() and self.file.stat().st_size, "the scheduler")
        return json.loads(self.file.read_text())["address"]

    def join(self, *, before: tuple[str, ...] = ()) -> subprocess.Popen[bytes]:
        local = ("--local-directory", str(self.folder))
        return self.start("distributed.cli.dask_worker", "--nthreads", "1", "--no-nanny", *local, before=before)

    def stop(self) -> None:
        for process in reversed(self.processes):
            process.kill()
            process.wait()


@pytest.fixture
def empty_cluster(tmp_path: Path) -> Iterator[Cluster]:
    (tmp_path / "cluster").mkdir()
    found = Cluster(tmp_path / "cluster")
    yield found
    found.stop()


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Address of a scheduler with two workers."""
    found = Cluster(tmp_path_factory.mktemp("dask"))
    address = found.schedule()
    for _ in range(2):
        found.join()
    from distributed import Client

    with Client(address, set_as_default=False) as client:
        client.wait_for_workers(2, timeout=PATIENCE)
    yield address
    found.stop()


def command(manifest: Path, videos: Path, out: Path, *flags: str) -> list[str]:
    line = [sys.executable, "-m", "preprocess", "run", str(manifest), "--videos", str(videos), "--out", str(out)]
    return [*line, "--videos-per-shard", "2", *TINY_FLAGS, *flags]


def run(manifest: Path, videos: Path, out: Path, *flags: str, cwd: Path = ROOT) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    line = command(manifest, videos, out, *flags)
    return subprocess.run(line, cwd=cwd, env=environment, capture_output=True, text=True)


def write_videos(folder: Path, count: int) -> Path:
    """So many videos in folder/videos, and their manifest."""
    names = tuple(f"{n}.mp4" for n in range(count))
    for seed, name in enumerate(names):
        write_video(folder / "videos" / name, panned(20 + seed, height=48, width=64, seed=seed))
    Manifest(names, ("",) * count, ("",) * count).write(folder / "manifest.csv")
    return folder / "manifest.csv"


def test_a_cluster_makes_the_same_bytes_and_collects_failures(cluster: str, tmp_path: Path) -> None:
    names = [f"{n}.mp4" for n in range(7)]
    for seed, name in enumerate(names):
        if seed != 3:  # one video is missing
            write_video(tmp_path / "videos" / name, panned(20 + seed, height=48, width=64, seed=seed))
    manifest = tmp_path / "manifest.csv"
    Manifest(tuple(names), tuple("abababa"), ("",) * 7).write(manifest)
    alone = run(manifest, tmp_path / "videos", tmp_path / "alone")
    spread = run(manifest, tmp_path / "videos", tmp_path / "spread", "--backend", "dask", "--scheduler", cluster)
    assert (alone.returncode, spread.returncode) == (3, 3), spread.stderr
    expected = {p.name: p.read_bytes() for p in (tmp_path / "alone").iterdir()}
    assert {p.name: p.read_bytes() for p in (tmp_path / "spread").iterdir()} == expected
    assert len(expected) == 4 * 2 + 1
    assert "3.mp4" in spread.stderr
    again = run(manifest, tmp_path / "videos", tmp_path / "spread", "--backend", "dask", "--scheduler", cluster)
    assert "0 shards made, 4 already there" in again.stdout


def test_progress_counts_the_shards_that_a_cluster_finishes(
    cluster: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(pipeline, "LOG_SECONDS", 0.0)
    manifest = write_videos(tmp_path, 3)
    pipeline.run(
        *(manifest, tmp_path / "videos", tmp_path / "shards", TINY),
        videos_per_shard=2,
        backend="dask",
        scheduler=cluster,
    )
    said = capsys.readouterr().err.splitlines()
    assert len(said) == 2 and re.fullmatch(r"3 of 3 videos, \d+ frames/s, 0 failed, 0 s left", said[-1])


def test_a_relative_folder_is_the_commands_not_the_workers(cluster: str, tmp_path: Path) -> None:
    write_videos(tmp_path, 3)
    relative = (Path("manifest.csv"), Path("videos"), Path("shards"))
    done = run(*relative, "--backend", "dask", "--scheduler", cluster, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert len(list((tmp_path / "shards").glob("shard-*.h5"))) == 2


def test_workers_that_join_later_take_over(empty_cluster: Cluster, tmp_path: Path) -> None:
    """The command is there before the scheduler and its file; the first worker stops for ever after a shard."""
    manifest, out = write_videos(tmp_path, 8), tmp_path / "shards"
    flags = ("--backend", "dask", "--scheduler", str(empty_cluster.file))
    process = subprocess.Popen(
        command(manifest, tmp_path / "videos", out, *flags), cwd=ROOT, stdout=subprocess.PIPE, text=True
    )
    wait_for(out.exists, "the command to begin")
    empty_cluster.schedule()
    first = empty_cluster.join()
    wait_for(lambda: list(out.glob("shard-*.h5")), "the first shard")
    first.send_signal(signal.SIGSTOP)
    before = len(list(out.glob("shard-*.h5")))
    assert before < 4
    empty_cluster.join()
    wait_for(lambda: len(list(out.glob("shard-*.h5"))) > before, "a shard of the later worker")
    first.kill()
    output, _ = process.communicate(timeout=PATIENCE)
    assert process.returncode == 0 and "left to" not in output and check.problems(out) == []


def test_a_shard_that_is_not_to_be_seen_is_an_error(
    empty_cluster: Cluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The worker has a disk of its own where the shards should go."""
    if subprocess.run(["unshare", "--mount", "true"], capture_output=True).returncode:
        pytest.skip("mounting is not allowed here: run the tests as root")
    manifest, out = write_videos(tmp_path, 2), tmp_path / "shards"
    out.mkdir()
    address = empty_cluster.schedule()
    mount = f'mount -t tmpfs tmpfs {out} && exec "$@"'
    empty_cluster.join(before=("unshare", "--mount", "--propagation", "private", "sh", "-c", mount, "sh"))
    monkeypatch.setattr(pipeline, "SEEN_SECONDS", 1.0)
    with pytest.raises(RuntimeError, match=r"has made .*shard-00000\.h5, which is not to be seen from here"):
        pipeline.run(manifest, tmp_path / "videos", out, TINY, backend="dask", scheduler=address)


def test_a_worker_with_other_libraries_is_an_error(tmp_path: Path) -> None:
    manifest = Manifest.read(write_videos(tmp_path, 1))
    (task,) = pipeline.plan(manifest, TINY, 2, videos=tmp_path / "videos", out=tmp_path, time_limit=60.0)
    other = replace(task, origin=replace(task.origin, versions=task.origin.versions | {"libavcodec": "1.2.3"}))
    with pytest.raises(ValueError, match=r"differs .*version of libavcodec: 1\.2\.3 there"):
        pipeline._make_alone(other)


def test_backend_and_scheduler_go_together(tmp_path: Path) -> None:
    (tmp_path / "m.csv").write_text("path,label,subset\na.mp4,,\n")
    for flags in (["--backend", "dask"], ["--scheduler", "tcp://127.0.0.1:1"]):
        done = run(tmp_path / "m.csv", tmp_path, tmp_path / "out", *flags)
        assert done.returncode == 1 and "--scheduler ADDRESS" in done.stderr
