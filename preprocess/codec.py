"""One video at a time through the codecs, in a process of its own.

C code cannot be interrupted from inside, and broken videos crash decoders. So a worker keeps one long-lived child, asks
it for one video at a time over a pipe, and kills and replaces it when it dies or exceeds the time limit.
"""

from __future__ import annotations

import ctypes
import errno
import json
import os
import re
import select
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from preprocess.shards import Settings
from preprocess.writer import Spool

PR_SET_PDEATHSIG = 1
PIPE_BYTES = 1 << 16
START_SECONDS = 300.0  # to load the libraries, from a busy network disk at worst
OUR_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EMFILE, errno.ENOMEM)


class CodecError(Exception):
    """The video cannot be stored; the message is the decoder's own."""


class CodecLost(Exception):
    """The child died or had to be killed; the video may be tried again in a new one."""


def convert(
    source: str, spool: Spool, settings: Settings, alive: Callable[[], object] = lambda: None
) -> dict[str, Any]:
    """Encode and extract one video, appending its bytes to the spool; returns what the index needs, as plain values.

    `alive` is called after each frame's optical flow, which is the slow part.

    Raises ValueError or av.FFmpegError where the video cannot be stored; the spool then holds a part of it.
    """
    from preprocess import encode, extract  # only the child loads the codecs

    with tempfile.TemporaryFile(prefix="context-motion-") as unlinked:
        # The stream lies in a file without a name: whatever happens to this process, nothing is left behind.
        stream = f"/proc/self/fd/{unlinked.fileno()}"
        encoded = encode.encode(source, stream, settings)
        frame_bytes: list[int] = []
        iframe_bytes: list[int] = []
        names = ("frames", "iframes", "motion")
        with ExitStack() as files:
            frames, iframes, motion = (files.enter_context(open(spool.path(name), "ab")) for name in names)
            for group in extract.groups(stream, settings):
                frames.write(b"".join(group.frames))
                iframes.write(group.iframe)
                motion.write(group.motion.tobytes())
                frame_bytes += map(len, group.frames)
                iframe_bytes.append(len(group.iframe))
        count = len(frame_bytes)
        if settings.flow:
            flowing = _store_flow(stream, spool, settings, alive)
            if flowing != encoded.frames:
                raise ValueError(f"{encoded.frames} frames encoded, optical flow of {flowing} computed")
    if count != encoded.frames:
        raise ValueError(f"{encoded.frames} frames encoded, {count} read back")
    return {
        "fps": encoded.fps,
        "source_size": [encoded.height, encoded.width],
        "decode_errors": encoded.decode_errors,
        "frame_bytes": frame_bytes,
        "iframe_bytes": iframe_bytes,
        "iframe_frame": list(range(0, count, settings.gop)),
    }


def _store_flow(stream: str, spool: Spool, settings: Settings, alive: Callable[[], object]) -> int:
    """Append the optical flow of an encoded stream to the spool; returns of how many frames."""
    from preprocess import flow  # its library is an extra

    count = 0
    with open(spool.path("flow"), "ab") as file:
        for cells in flow.maps(stream, settings):
            file.write(cells.tobytes())
            count += 1
            alive()
    return count


def plain(message: str, source: Path, path: str) -> str:
    """A reason that names the video as the manifest does, without memory addresses: the same bytes anywhere."""
    text = message.replace(str(source), path)
    return " ".join(re.sub(r"0x[0-9a-fA-F]+", "0x…", text).split())


class Codec:
    """The long-lived child and its pipe."""

    command: ClassVar[tuple[str, ...]] = (sys.executable, "-m", "preprocess.codec")

    def __init__(self) -> None:
        self._child: subprocess.Popen[bytes] | None = None
        self._log = tempfile.TemporaryFile(prefix="context-motion-log-")

    def convert(self, source: Path, spool: Spool, settings: Settings, time_limit: float) -> dict[str, Any]:
        """As the function `convert`, in the child. Raises CodecError or CodecLost."""
        child = self._child or self._start()
        assert child.stdin
        request = {"source": str(source), "spool": str(spool.folder), "settings": settings.to_json()}
        with suppress(BrokenPipeError):  # the child is gone, which reading the answer finds
            child.stdin.write(json.dumps(request).encode() + b"\n")
            child.stdin.flush()
        answer = json.loads(self._answer(child, time_limit))
        if "system" in answer:
            raise OSError(*answer["system"])
        if "error" in answer:
            raise CodecError(answer["error"])
        for key in ("frame_bytes", "iframe_bytes", "iframe_frame"):
            answer[key] = np.array(answer[key], np.int64)
        return answer

    def _answer(self, child: subprocess.Popen[bytes], time_limit: float) -> bytes:
        """The child's next line. The limit begins anew with every sign of life."""
        assert child.stdout
        line = b""
        while not line.endswith(b"\n"):
            ready, _, _ = select.select([child.stdout], [], [], time_limit)
            if not ready:
                self.stop()
                raise CodecLost(f"no result within {time_limit:g} s (time limit a video)")
            piece = os.read(child.stdout.fileno(), PIPE_BYTES)
            if not piece:
                status = child.wait()
                self.stop()
                raise CodecLost(self._last_words(status))
            line += piece
        return line

    def stop(self) -> None:
        if self._child:
            self._child.kill()
            self._child.wait()
            for pipe in (self._child.stdin, self._child.stdout):
                if pipe:
                    pipe.close()
            self._child = None

    def __enter__(self) -> Codec:
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()
        self._log.close()

    def _start(self) -> subprocess.Popen[bytes]:
        self._child = subprocess.Popen(
            [*self.command, str(os.getpid())],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            # The package need not be installed for the child to find it.
            env=os.environ | {"PYTHONPATH": os.pathsep.join(p for p in sys.path if p), "OMP_NUM_THREADS": "1"},
        )
        try:
            self._answer(self._child, START_SECONDS)
        except CodecLost as error:
            # No video is to blame: one failure row for each would hide what is wrong.
            raise RuntimeError(f"the decoder process does not start: {error}") from error
        return self._child

    def _last_words(self, status: int) -> str:
        if status < 0:
            name = signal.Signals(-status).name
            hint = "; probably out of memory: lower --workers" if name == "SIGKILL" else ""
            return f"the decoder process was killed by {name}{hint}"
        self._log.seek(max(0, self._log.seek(0, os.SEEK_END) - 2000))
        lines = self._log.read().decode(errors="replace").strip().splitlines()
        return f"the decoder process ended with status {status}: {lines[-1] if lines else 'no message'}"


def end_with_parent(parent: int) -> None:
    """Have the system kill this process when its parent, whose process number is given, is gone."""
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:  # it went before the line above
        os.kill(os.getpid(), signal.SIGKILL)


def serve(parent: int) -> None:
    """Answer one JSON line for each JSON line of a request, until the pipe closes."""
    end_with_parent(parent)  # else it would go on writing where the next run writes
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group; the worker decides
    # Nothing a C library prints may end up in the protocol.
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)
    import av

    from preprocess import encode, extract  # noqa: F401 - loading them counts towards no video's time limit

    def alive() -> None:
        answers.write(b" ")  # which JSON allows before an answer
        answers.flush()

    answers.write(b"ready\n")
    answers.flush()
    for line in sys.stdin.buffer:
        request = json.loads(line)
        settings = Settings.from_json(request["settings"])
        try:
            answer = convert(request["source"], Spool(Path(request["spool"])), settings, alive)
        except (ValueError, OSError, av.FFmpegError) as error:
            # A full disk is not the video's fault. (FFmpeg's own errors are OSErrors too, most of them.)
            number = error.errno if isinstance(error, OSError) else None
            answer = {"system": [number, os.strerror(number)]} if number in OUR_ERRORS else {"error": str(error)}
        answers.write(json.dumps(answer).encode() + b"\n")
        answers.flush()


if __name__ == "__main__":
    serve(int(sys.argv[1]))
