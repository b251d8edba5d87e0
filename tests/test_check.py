"""What `check` finds: a flipped bit anywhere in a shard, and wrong content under a right checksum."""

from __future__ import annotations

import hashlib
from pathlib import Path

import h5py
import numpy as np
import pytest
from test_shards import DATASETS, in_header, put, write

from preprocess import check


def flip(path: Path, place: int, bit: int) -> None:
    data = bytearray(path.read_bytes())
    data[place] ^= 1 << bit
    path.write_bytes(data)


def assert_found(path: Path, place: int, bit: int) -> None:
    """Flip a bit, have `check` find it and name the file, and put it back."""
    whole = path.read_bytes()
    flip(path, place, bit)
    assert any(path.name in problem for problem in check.problems(path.parent)), (place, bit)
    path.write_bytes(whole)


def renew_checksum(path: Path) -> None:
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    path.with_name(path.name + ".sha256").write_text(f"{digest}  {path.name}\n")


@pytest.fixture
def sound(tmp_path: Path) -> Path:
    path = write(tmp_path, [14, 3], [("a", "b")]).path
    assert check.problems(tmp_path) == []
    return path


def flip_in_datasets_and_at_random(path: Path, count: int) -> None:
    with h5py.File(path, "r") as f:
        places = [f[n].id.get_offset() + f[n].size * f[n].dtype.itemsize // 2 for n in DATASETS]
    for n, place in enumerate(places):
        assert_found(path, place, n % 8)
    rng = np.random.default_rng(count)
    size = path.stat().st_size
    for k in range(count):  # every other one where HDF5 keeps its own records and the attributes
        place = int(rng.integers(0, size if k % 2 else min(size, 4096)))
        assert_found(path, place, int(rng.integers(8)))
    assert check.problems(path.parent) == []


def test_check_finds_flipped_bits(sound: Path) -> None:
    flip_in_datasets_and_at_random(sound, 10)


@pytest.mark.soak
def test_check_finds_many_flipped_bits(sound: Path) -> None:
    flip_in_datasets_and_at_random(sound, 100)


def test_check_finds_a_missing_a_changed_and_a_foreign_checksum(sound: Path) -> None:
    sidecar = sound.with_name(sound.name + ".sha256")
    line = sidecar.read_text()
    other = [b"", b"0" + line[1:].encode(), b"\xff" + line[1:].encode()]
    for content, words in *((bad, "checksum differs") for bad in other), (None, "missing"):
        sidecar.unlink()
        if content is not None:
            sidecar.write_bytes(content)
        assert any(words in p for p in check.problems(sound.parent))
        sidecar.write_text(line)
    assert check.problems(sound.parent) == []


def test_check_survives_any_byte_of_the_metadata(sound: Path) -> None:
    """Damage may surface anywhere in HDF5; every outcome is a sentence, none an exception."""
    whole = sound.read_bytes()
    for place in range(0, 4096, 41):
        flip(sound, place, place % 8)
        assert check.file_problems(sound)
        sound.write_bytes(whole)


CONTENT = {
    "rows": (lambda f: put(f, "videos/row", 0, 7), "do not make up"),
    "an I-frame elsewhere": (lambda f: put(f, "iframes/frame", 1, 11), "not exactly every 12"),
    "vectors on an I-frame": (lambda f: put(f, "motion", 12, 3), "I-frame carries motion"),
    "a frame that is no JPEG": (lambda f: put(f, "frames/jpeg", 0, 0), "JPEG header of frame 0"),
    "an I-frame cut short": (lambda f: put(f, "iframes/jpeg", -1, 0), "iframe 2 does not end as a JPEG"),
    "a frame of another size": (lambda f: in_header(f, 6, 99), "frame 0 is 99x32 420, not 16x32 420"),
    "a frame whose header is damaged": (lambda f: in_header(f, 1, 0), "JPEG header of frame 0"),
    "an empty video": (lambda f: put(f, "videos/frame_offset", 1, 17), "no frame"),
    "an empty picture": (lambda f: put(f, "frames/jpeg_offset", 1, 0), "JPEG header of frame 0"),
}


@pytest.mark.parametrize("case", CONTENT)
def test_check_finds_wrong_content_under_a_right_checksum(case: str, sound: Path) -> None:
    mutate, words = CONTENT[case]
    with h5py.File(sound, "r+") as f:
        mutate(f)
    renew_checksum(sound)
    problems = check.problems(sound.parent)
    assert any(words in p for p in problems) and not any("checksum" in p for p in problems)
