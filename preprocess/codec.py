"""One video at a time through the codecs, in a process of its own.

C code cannot be interrupted from inside, and broken videos crash decoders. So every worker, a thread, keeps one
long-lived child, asks it for one video at a time over a pipe, and replaces it when it dies or makes no progress within
the time limit.
"""

from __future__ import annotations

import json
import os
import re
import select
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Sequence
from contextlib import ExitStack, suppress
from pathlib import Path
from queue import SimpleQueue
from typing import Any, ClassVar, Literal, TypeVar

import joblib

from preprocess.files import DISK_FULL, UNREADABLE
from preprocess.schema import Settings
from preprocess.writer import Spool

PIPE_BYTES = 1 << 16
LARGE = 1 << 30  # bytes; a disk that has room for as many is not full: what does not fit is the video's fault
MOST_SECONDS = 1e6  # of a time limit, eleven days; what the system can wait for has an end
START_SECONDS = 300.0  # to load the libraries, from a busy network disk at worst
STOPPED = "the run is being stopped"

Reader = Literal["pyav", "mvextractor"]
Task = TypeVar("Task")
Made = TypeVar("Made")


class CodecError(Exception):
    """The video cannot be stored; the message is the decoder's own, or says how the child was lost."""


class CodecLost(CodecError):
    """The child died; the video may be tried again in a new one."""


class Codec:
    """A long-lived child and its pipe. One thread at a time uses it; any thread may `close` it."""

    command: ClassVar[tuple[str, ...]] = (sys.executable, "-m", "preprocess.child")

    def __init__(self) -> None:
        self._child: subprocess.Popen[bytes] | None = None
        self._log = tempfile.TemporaryFile(prefix="context-motion-log-")
        self._closed = False
        self._lock = threading.Lock()  # between starting a child and closing

    def run(
        self, verb: str, source: Path, spool: Spool, settings: Settings, time_limit: float, **options: str
    ) -> dict[str, Any]:
        """Answer of `preprocess.child.convert` or `.flow`, in the child.

        A child that dies is replaced and the video tried once more; one that shows no sign of life for `time_limit`
        seconds is replaced, but the video would take as long again. Raises CodecError where the video cannot be
        stored, and leaves the spool as it was; OSError where it is the disk that does not give or take it.
        """
        before = spool.sizes()
        request: dict[str, Any] = {"verb": verb, "source": str(source), "settings": settings.to_json()}
        request |= {"spool": str(spool.folder), "names": list(spool.names), "options": options}
        try:
            try:
                return self._ask(request, time_limit)
            except CodecLost:  # perhaps for the memory that another video, or another process, had taken
                spool.truncate(before)
                return self._ask(request, time_limit)
        except CodecError:
            spool.truncate(before)
            raise
        except OSError as error:
            if error.errno in UNREADABLE:
                raise OSError(error.errno, error.strerror, str(source)) from error
            if error.errno in DISK_FULL and sum(spool.sizes()) - sum(before) >= LARGE:
                spool.truncate(before)
                raise CodecError(f"it takes more room than the disk has ({error.strerror})") from error
            raise

    def close(self) -> None:
        """Kill the child, and have whatever still waits for it fail."""
        with self._lock:
            self._closed = True
            if self._child:
                self._child.kill()

    def __enter__(self) -> Codec:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
        self._stop()
        self._log.close()

    def _ask(self, request: dict[str, Any], time_limit: float) -> dict[str, Any]:
        child = self._child or self._start()
        assert child.stdin
        with suppress(BrokenPipeError):  # the child is gone, which reading the answer finds
            child.stdin.write(json.dumps(request).encode() + b"\n")
            child.stdin.flush()
        answer = json.loads(self._answer(child, time_limit))
        if "system" in answer:
            raise OSError(*answer["system"])
        if "error" in answer:
            raise CodecError(answer["error"])
        return answer

    def _answer(self, child: subprocess.Popen[bytes], time_limit: float) -> bytes:
        """The child's next line. The limit begins anew with every sign of life."""
        assert child.stdout
        line = b""
        pipe = select.poll()  # select.select knows no descriptor beyond 1023
        pipe.register(child.stdout, select.POLLIN)
        while not line.endswith(b"\n"):
            if not pipe.poll(1000 * time_limit):
                self._stop()
                raise CodecError(f"no progress within {time_limit:g} s (--time-limit)")
            piece = os.read(child.stdout.fileno(), PIPE_BYTES)
            if not piece:
                if self._closed:  # it was killed for that: no fault of the video's
                    raise RuntimeError(STOPPED)
                status = child.wait()
                self._stop()
                raise CodecLost(self._last_words(status))
            line += piece
        return line

    def _start(self) -> subprocess.Popen[bytes]:
        with self._lock:
            if self._closed:
                raise RuntimeError(STOPPED)
            child = self._child = subprocess.Popen(
                [*self.command, str(os.getpid())],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=self._log,
                # The package need not be installed for the child to find it.
                env=os.environ | {"PYTHONPATH": os.pathsep.join(p for p in sys.path if p), "OMP_NUM_THREADS": "1"},
            )
        try:
            self._answer(child, START_SECONDS)
        except CodecError as error:
            # No video is to blame: one failure row for each would hide what is wrong.
            raise RuntimeError(f"the decoder process does not start: {error}") from error
        return child

    def _stop(self) -> None:
        if self._child:
            self._child.kill()
            self._child.wait()
            for pipe in (self._child.stdin, self._child.stdout):
                if pipe:
                    with suppress(BrokenPipeError):  # a request that nobody reads any more
                        pipe.close()
            self._child = None

    def _last_words(self, status: int) -> str:
        if status < 0:
            name = signal.Signals(-status).name
            hint = "; probably out of memory: lower --workers" if name == "SIGKILL" else ""
            return f"the decoder process was killed by {name}{hint}"
        self._log.seek(max(0, self._log.seek(0, os.SEEK_END) - 2000))
        lines = self._log.read().decode(errors="replace").strip().splitlines()
        return f"the decoder process ended with status {status}: {lines[-1] if lines else 'no message'}"


def check_time_limit(seconds: float) -> None:
    """ValueError where --time-limit is beyond its limits, or NaN."""
    if not 0 < seconds <= MOST_SECONDS:
        raise ValueError(f"--time-limit is {seconds:g}; it must be more than 0 and at most {MOST_SECONDS:g} seconds")


def spread(make: Callable[[Task, Codec], Made], tasks: Sequence[Task], workers: int) -> list[Made]:
    """make(task, codec) of every task, in any order, by `workers` threads that each own a codec.

    Raises what the first task that fails raises, once all threads have let go of theirs. The threads live until all
    tasks are done, as they must: a child ends with the thread that started it.
    """
    idle: SimpleQueue[Codec] = SimpleQueue()

    def work(task: Task) -> Made:
        codec = idle.get()
        try:
            return make(task, codec)
        finally:
            idle.put(codec)

    parallel = joblib.Parallel(n_jobs=workers, prefer="threads", return_as="generator_unordered", batch_size=1)
    with ExitStack() as stack:
        codecs = [stack.enter_context(Codec()) for _ in range(joblib.effective_n_jobs(workers))]
        for codec in codecs:
            idle.put(codec)
        try:
            return list(parallel(joblib.delayed(work)(task) for task in tasks))
        finally:
            for codec in codecs:
                codec.close()
            for _ in codecs:
                idle.get()


def plain(message: str, source: Path, path: str) -> str:
    """A reason that names the video as the manifest does, without memory addresses: the same bytes anywhere."""
    # OSError shows a name as Python writes it, some characters as escapes.
    text = message.replace(repr(str(source))[1:-1], path).replace(str(source), path)
    return " ".join(re.sub(r"0x[0-9a-fA-F]+", "0x…", text).split())
