"""What stage 1 holds in memory does not grow with the number of videos in a shard."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

from conftest import ROOT, one_thread, panned, write_video

from preprocess.manifest import Manifest

FEW, MANY = 4, 40
SLACK = 4e6  # bytes; the larger shard is several times that larger
STAGE_1 = """
import json, sys
from pathlib import Path
from preprocess import codec, pipeline
from preprocess.shards import Settings

def peak(process):
    lines = Path(f"/proc/{process}/status").read_text().splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith("VmHWM"))

peaks, close = {}, codec.Codec.close

def note_and_close(self):
    if self._child and not self._closed:
        peaks["codec"] = peak(self._child.pid)
    close(self)

codec.Codec.close = note_and_close
folder, settings = Path(sys.argv[1]), Settings(jpeg_quality=100)
assert not pipeline.run(folder / "manifest.csv", folder, folder / "shards", settings).failures
peaks["worker"] = peak("self")
peaks["shard"] = (folder / "shards/shard-00000.h5").stat().st_size
print(json.dumps(peaks))
"""


def peaks(folder: Path, video: Path, count: int) -> dict[str, int]:
    """Peak memory of worker and decoder, and the size of the one shard, for a video under so many names."""
    names = tuple(f"{k}.mp4" for k in range(count))
    folder.mkdir()
    for name in names:
        (folder / name).symlink_to(video)
    Manifest(names, ("",) * count, ("",) * count).write(folder / "manifest.csv")
    command = [sys.executable, "-c", STAGE_1, str(folder)]
    done = subprocess.run(command, cwd=ROOT, env=one_thread(), capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def test_memory_does_not_grow_with_the_number_of_videos(tmp_path: Path) -> None:
    video = write_video(tmp_path / "video.mp4", panned(26))
    few, many = (peaks(tmp_path / str(count), video, count) for count in (FEW, MANY))
    assert many["shard"] - few["shard"] > 5 * SLACK
    for process in "worker", "codec":
        assert abs(many[process] - few[process]) < SLACK, (process, few, many)
