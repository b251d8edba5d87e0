"""Files that are written whole or not at all, and the errors that are the disk's fault."""

from __future__ import annotations

import errno
import os
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

LEFT = ".*.partial"
DISK_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
UNREADABLE = (errno.EIO, errno.ESTALE, errno.ETIMEDOUT, errno.EREMOTEIO, errno.ENOTCONN, errno.EHOSTDOWN)


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A path beside `path` to write to; once it is written, and on the disk, it takes the place of `path`.

    Where writing fails, what lay at `path` before is kept and nothing is left beside it. Raises OSError naming `path`,
    and ValueError where `path` is something else than a file. A process that is killed leaves `LEFT` behind.
    """
    if path.exists() and not path.is_file():
        raise ValueError(f"{path} is there, and no file that could be replaced: give the path of a file")
    partial = path.with_name(f".{path.name}.{uuid.uuid4().hex}.partial")  # two processes, of any machines, never meet
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield partial
        with open(partial, "rb") as f:
            os.fsync(f.fileno())
        os.replace(partial, path)
    except OSError as error:
        raise OSError(
            f"{path} could not be written ({error.strerror or error}); what lay there before is kept. Make room, or "
            "choose another place"
        ) from error
    finally:
        partial.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """A text file, UTF-8, with the line ends that the text has."""
    with replacing(path) as partial:
        partial.write_text(text, encoding="utf-8", newline="")
