"""A file is written whole or not at all."""

from __future__ import annotations

import os
import resource
from pathlib import Path

import pytest

from preprocess.files import replacing, write_text


def test_the_new_takes_the_place_of_the_old_at_the_end(tmp_path: Path) -> None:
    path = tmp_path / "new" / "a.txt"
    write_text(path, "é\r\n\n")
    assert path.read_bytes() == b"\xc3\xa9\r\n\n"
    with replacing(path) as partial:
        partial.write_text("new\n")
        assert path.read_bytes() == b"\xc3\xa9\r\n\n" and partial.parent == path.parent
    assert path.read_text() == "new\n" and os.listdir(path.parent) == ["a.txt"]


def test_what_could_not_be_written_leaves_what_was_there(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    write_text(path, "old\n")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, hard))
    try:
        with pytest.raises(OSError, match=r"a\.txt could not be written \(File too large\); what lay there before"):
            write_text(path, "new" * 5000)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    with pytest.raises(KeyboardInterrupt), replacing(path) as partial:
        partial.write_text("ne")
        raise KeyboardInterrupt
    assert path.read_text() == "old\n" and os.listdir(tmp_path) == ["a.txt"]


def test_two_writers_at_once_both_write_it_whole(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    with replacing(path) as one:
        one.write_text("one")
        with replacing(path) as two:
            two.write_text("the second, which began later and ends sooner")
        assert path.read_text().startswith("the second")
    assert path.read_text() == "one" and os.listdir(tmp_path) == ["a.txt"]


def test_only_files_are_replaced(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path, tmp_path / "pipe", Path("/dev/null")):
        with pytest.raises(ValueError, match="is there, and no file that could be replaced"):
            write_text(path, "text")
    assert os.listdir(tmp_path) == ["pipe"]
