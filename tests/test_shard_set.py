"""A folder of shards is one table, whole, of one origin, and the same in every process."""

from __future__ import annotations

import hashlib
import multiprocessing
import pickle
import re
import shutil
import textwrap
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
import simplejpeg
from conftest import ROOT
from test_shards import Written, assert_holds, write

from preprocess.shards import Settings, ShardSet


@pytest.fixture
def three(tmp_path: Path) -> list[Written]:
    """A set of three shards in tmp_path: two videos and a failure, one video, no video."""
    return [
        write(tmp_path, [14, 3], [("x", "y")], number=0, shards=3),
        write(tmp_path, [25], number=1, shards=3, first_row=3),
        write(tmp_path, [], [("z", "w")], number=2, shards=3, first_row=4),
    ]


def test_a_set_is_one_table(three: list[Written], tmp_path: Path) -> None:
    shards = ShardSet(tmp_path)
    assert len(shards) == 3 and shards.frames.tolist() == [14, 3, 25] and shards.label.tolist() == [-1, 0, -1]
    assert shards.paths == [v.path for w in three for v in w.videos]
    assert [(s.number, k) for s, k in map(shards.locate, range(3))] == [(0, 0), (0, 1), (1, 0)]
    assert shards.failed == [f for w in three for f in w.failures]


def test_an_unfinished_set_is_refused_naming_what_lacks(three: list[Written], tmp_path: Path) -> None:
    three[1].path.unlink()
    with pytest.raises(ValueError, match=r"lacks 1 of 3 shards \(\[1\].*run the same"):
        ShardSet(tmp_path)
    with pytest.raises(ValueError, match="holds no shards"):
        ShardSet(tmp_path / "work")


@pytest.mark.parametrize(
    "options, words",
    [
        ({"options": Settings(width=64, height=34, quantiser=5)}, "settings.quantiser: 5 there, 2 here"),
        ({"manifest": "1" * 64, "first_row": 2}, "manifests that do not follow each other"),
        ({"shards": 4}, "lacks 1 of 4 shards"),
    ],
)
def test_mixed_sets_are_refused_naming_what_differs(
    three: list[Written], tmp_path: Path, options: dict, words: str
) -> None:
    write(tmp_path, [2], number=1, **({"shards": 3, "first_row": 3} | options))
    with pytest.raises(ValueError) as caught:
        ShardSet(tmp_path)
    assert words in str(caught.value)
    assert "options" not in options or "shard-00001.h5 does not belong with shard-00000.h5" in str(caught.value)


def test_a_video_of_two_manifests_is_refused(three: list[Written], tmp_path: Path) -> None:
    """The second shard is the first again, as shuffled manifests would make it."""
    shutil.copy(three[0].path, three[1].path)
    with h5py.File(three[1].path, "r+") as f:
        f.attrs.update(shard=1, first_row=3, rows=1, manifest_sha256=b"1" * 64)
    with pytest.raises(ValueError, match="manifests that do not follow each other"):
        ShardSet(tmp_path)


def test_rows_and_classes_that_were_appended_belong_to_the_set(tmp_path: Path) -> None:
    """Labels number the classes of each shard: a class that came between them renumbers those of the set."""
    write(tmp_path, [1, 1, 1])
    write(tmp_path, [1] * 4, number=1, shards=2, first_row=3, manifest="1" * 64, classes=("climb", "Dance", "golf"))
    shards = ShardSet(tmp_path)
    assert shards.classes == ["climb", "Dance", "golf"]
    assert shards.label.tolist() == [-1, 0, 2, -1, 0, 1, -1]


def test_the_readme_reads_a_shard_with_h5py_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The block as it is printed, on a shard at the path that it names."""
    blocks = re.findall(r"(?:^    .*\n)+", (ROOT / "README.md").read_text(encoding="utf-8"), re.M)
    block = next((textwrap.dedent(b) for b in blocks if "h5py.File(" in b), None)
    if block is None:
        pytest.skip("README.md prints no reader with h5py")
    (named,) = re.findall(r'h5py\.File\("(.+?)"', block)
    written = write((tmp_path / named).parent, [14, 3])
    assert written.path == tmp_path / named
    monkeypatch.chdir(tmp_path)
    found: dict[str, Any] = {}
    exec(block, found)
    for frame, picture in zip(found["frames"], written.jpegs[0], strict=True):
        np.testing.assert_array_equal(frame, simplejpeg.decode_jpeg(picture))
    np.testing.assert_array_equal(found["motion"], written.motion[0])


def read_everything(shards: ShardSet) -> list[int]:
    """A checksum of every video, as a worker sees it."""
    sums = []
    for video in range(len(shards)):
        shard, k = shards.locate(video)
        start, end = shard.frame_offset[k : k + 2]
        pictures = b"".join(bytes(shard.frame_jpeg(f)) for f in range(start, end))
        sums.append(int(hashlib.sha256(pictures + shard.motion[start:end].tobytes()).hexdigest()[:12], 16))
    return sums


@pytest.mark.parametrize("method", ["fork", "spawn"])
@pytest.mark.parametrize("used_before", [True, False])
def test_a_set_reads_the_same_in_other_processes(
    method: str, used_before: bool, three: list[Written], tmp_path: Path
) -> None:
    shards = ShardSet(tmp_path)
    expected = read_everything(ShardSet(tmp_path))
    if used_before:
        assert read_everything(shards) == expected
    with multiprocessing.get_context(method).Pool(2) as pool:
        assert pool.map(read_everything, [shards, shards]) == [expected, expected]


def test_pickling_carries_no_data(tmp_path: Path) -> None:
    sizes = []
    for name, lengths in ("short", [2, 2]), ("long", [400, 400]):
        written = write(tmp_path / name, lengths)
        shards = ShardSet(tmp_path / name)
        read_everything(shards)
        sizes.append(len(pickle.dumps(shards)))
        assert_holds(pickle.loads(pickle.dumps(shards)).shards[0], written)
    assert abs(sizes[1] - sizes[0]) < 200 and sizes[1] < 10_000
