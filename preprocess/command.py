"""How the three commands begin and end: which verb, an error in one line, a status that scripts can tell apart."""

from __future__ import annotations

import difflib
import math
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, get_type_hints

from preprocess import __version__

if TYPE_CHECKING:
    from sys import UnraisableHookArgs

DONE, ERROR, USAGE, WITH_FAILURES, INTERRUPTED, TERMINATED = 0, 1, 2, 3, 130, 143


def verb(verbs: Mapping[str, Callable[..., int | None]], argv: Sequence[str], prog: str, about: str) -> int:
    """Run the one of `verbs` that the arguments of a command name, with the rest of them as its flags; its status.

    Its own flags alone are read, so that errors speak of these. Wrong flags leave with SystemExit, as --help does.
    """
    import tyro  # not for those who only `say`

    choices = f"choose from {', '.join(verbs)}"
    if not argv:
        return wrong(f"the verb is missing; {choices}")
    name, given = argv[0], [argument.partition("=")[0] for argument in argv[1:]]
    if name in ("-h", "--help") or name.startswith("--tyro"):  # the latter completes commands in a shell
        tyro.extras.subcommand_cli_from_dict(dict(verbs), prog=prog, description=about, args=argv)
    if name == "--version":
        print(f"context-motion {__version__}")
        return DONE
    if name not in verbs:
        return unknown("verb", name, verbs, choices)
    hints = get_type_hints(verbs[name], include_extras=True).items()
    unnamed = [word for word, hint in hints if tyro.conf.Positional in getattr(hint, "__metadata__", ())]
    for flag in (f"--{form}" for word in unnamed for form in (word, word.removesuffix("s"))):
        if flag in given:
            return wrong(f"{flag} is no flag: write {prog} {name} {' '.join(unnamed).upper()} …, without it")
    return tyro.cli(verbs[name], prog=f"{prog} {name}", args=argv[1:]) or DONE


def unknown(kind: str, name: str, known: Iterable[str], choices: str) -> int:
    """Say that no verb, or what `kind` says, has this name, and which have one like it; the status of that."""
    close = difflib.get_close_matches(name, known)
    meant = f"did you mean {' or '.join(close)}?" if close else choices
    if name.startswith("-"):
        return wrong(f"the {kind} comes first, before {name}; {choices}")
    return wrong(f"there is no {kind} {name!r}; {meant}")


def wrong(text: str) -> int:
    """Say in what the arguments are wrong; the status of that."""
    say(f"error: {text}")
    return USAGE


def ended(command: Callable[[], int], interrupted: str, errors: tuple[type[Exception], ...] = ()) -> int:
    """The status of a command: its own, or that of what stopped it, said on standard error.

    ValueError, OSError and `errors` are told in one line, without a traceback; `interrupted` follows Ctrl-C.
    """
    told: tuple[type[Exception], ...] = (ValueError, OSError, *errors)
    before, sys.unraisablehook = sys.unraisablehook, insist
    try:
        status = command()
        sys.stdout.flush()
        return status
    except BrokenPipeError:
        unheard()
        return DONE
    except told as error:
        say(f"error: {error}")
        return ERROR
    except KeyboardInterrupt:
        say(interrupted)
        return INTERRUPTED
    finally:
        sys.unraisablehook = before


def insist(dropped: UnraisableHookArgs) -> None:
    """Python drops what a signal raises inside a destructor, or a weak reference's callback: raise it again soon."""
    reason = dropped.exc_value
    here = threading.current_thread() is threading.main_thread()
    if not (here and isinstance(reason, (KeyboardInterrupt, SystemExit))):
        sys.__unraisablehook__(dropped)
        return

    def again(*_: object) -> None:
        raise reason

    signal.signal(signal.SIGALRM, again)
    signal.setitimer(signal.ITIMER_REAL, 0.1)


def unheard() -> None:
    """Whoever read the output has seen enough (| head): what follows, the flush at exit included, goes nowhere."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def at_least(name: str, value: float, least: int) -> None:
    """ValueError where a setting is below its limit, infinite or NaN."""
    if not least <= value < math.inf:  # NaN is not
        raise ValueError(f"{name} is {value}; choose {least} or more")


def say(text: str) -> None:
    """A line on standard error; under torchrun every process but the first names itself."""
    print(f"{process()}{text}", file=sys.stderr)


def process() -> str:
    """Which of several processes speaks, before what it says; nothing for the first."""
    rank = os.environ.get("RANK", "0")
    return "" if rank == "0" else f"process {rank}: "
