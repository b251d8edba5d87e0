"""What a cluster's file systems do to stage 1: too few descriptors, NFS, no locks, disks of one's own."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import h5py
import numpy as np
from conftest import ROOT, one_thread
from test_shards import write

from preprocess.manifest import Manifest

SHARDS, DESCRIPTORS = 2079, 1024  # of Kinetics-400; what a process may have open unless told otherwise

READ = """
import os, resource, sys
from pathlib import Path
resource.setrlimit(resource.RLIMIT_NOFILE, (int(sys.argv[1]),) * 2)
from preprocess.shards import ShardSet
shards = ShardSet(sys.argv[2])
before = len(os.listdir("/proc/self/fd"))
for shard in shards.shards:
    assert bytes(shard.frame_jpeg(30)[:2]) == b"\\xff\\xd8" and shard.motion[30].any()
assert len(os.listdir("/proc/self/fd")) == before < 64
print(len(shards))
"""

TRAIN = """
sys.path.insert(0, "tests")
from conftest import tiny_config
from preprocess.manifest import Manifest
from train.config import Runtime
from train.loop import train
rows = Manifest.read(sys.argv[3])
line = train(tiny_config(batch_size=120, epochs=1), Runtime("cpu", 0), Path(sys.argv[2]), rows, Path(sys.argv[4]))
print(line["step"])
"""


def test_a_set_of_more_shards_than_open_files_is_read_and_trained_from(tmp_path: Path) -> None:
    template, names = write(tmp_path / "template", [40], shards=SHARDS).path, []
    (tmp_path / "shards").mkdir()
    for number in range(SHARDS):
        path = tmp_path / "shards" / f"shard-{number:05d}.h5"
        shutil.copyfile(template, path)
        with h5py.File(path, "r+") as f:
            for attribute in b"shard", b"first_row":
                h5py.h5a.open(f.id, attribute).write(np.array(number))
            place = f["videos/path"].id.get_offset(), f["videos/path"].size
        with open(path, "r+b") as f:
            f.seek(place[0])
            f.write(f"{number:0{place[1]}d}".encode())
        path.with_name(path.name + ".sha256").write_text(f"{number:064d}  {path.name}\n")
        names.append(f"{number:0{place[1]}d}")
    served = tuple(names[-1080:])
    Manifest(served, ("",) * len(served), ("",) * len(served)).write(tmp_path / "rows.csv")
    arguments = [str(DESCRIPTORS), str(tmp_path / "shards"), str(tmp_path / "rows.csv"), str(tmp_path / "run")]
    command = [sys.executable, "-c", READ + TRAIN, *arguments]
    done = subprocess.run(command, cwd=ROOT, env=one_thread(), capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    assert (done.stdout.split()[0], done.stdout.split()[-1]) == (str(SHARDS), "9")
