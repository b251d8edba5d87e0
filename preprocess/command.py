"""How the three commands end: an error in one line, and a status that scripts can tell apart."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable

DONE, ERROR, USAGE, WITH_FAILURES, INTERRUPTED, TERMINATED = 0, 1, 2, 3, 130, 143


def ended(command: Callable[[], int], interrupted: str, errors: tuple[type[Exception], ...] = ()) -> int:
    """The status of a command: its own, or that of what stopped it, said on standard error.

    ValueError, OSError and `errors` are told in one line, without a traceback; `interrupted` follows Ctrl-C.
    """
    told: tuple[type[Exception], ...] = (ValueError, OSError, *errors)
    try:
        status = command()
        sys.stdout.flush()
        return status
    except BrokenPipeError:  # whoever read the output has seen enough (| head): end quietly, the flush at exit included
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return DONE
    except told as error:
        say(f"error: {error}")
        return ERROR
    except KeyboardInterrupt:
        say(interrupted)
        return INTERRUPTED


def say(text: str) -> None:
    """A line on standard error; under torchrun every process but the first names itself."""
    print(f"{process()}{text}", file=sys.stderr)


def process() -> str:
    """Which of several processes speaks, before what it says; nothing for the first."""
    rank = os.environ.get("RANK", "0")
    return "" if rank == "0" else f"process {rank}: "
