"""One video at a time through the codecs: what a `preprocess.codec.Codec` asks of its process.

python -m preprocess.child PARENT    # the process that asks; requests and answers are lines of JSON
"""

from __future__ import annotations

import ctypes
import errno
import json
import os
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

import av

from preprocess import encode, extract
from preprocess.files import DISK_FULL, UNREADABLE
from preprocess.schema import Settings
from preprocess.writer import Spool

if TYPE_CHECKING:
    from preprocess.codec import Reader

PR_SET_PDEATHSIG = 1
OUR_ERRORS = (*DISK_FULL, *UNREADABLE, errno.EROFS, errno.EMFILE, errno.ENFILE, errno.ENOMEM)


def convert(
    source: str, spool: Spool, settings: Settings, alive: Callable[[], object], reader: Reader = "pyav"
) -> dict[str, Any]:
    """Encode and extract one video, appending its bytes to the spool; returns what the index needs, as plain values.

    Residuals are computed where the spool takes them. `alive` is called for each group of pictures, when it is encoded
    and when it is read. Raises ValueError or av.FFmpegError where the video cannot be stored; the spool then holds a
    part of it.
    """

    def encoded() -> Iterator[Any]:
        for number, packet in enumerate(encode.packets(source, settings, video)):
            if number % settings.gop == 0:
                alive()
            yield packet

    video = encode.Source()
    stream = None if reader == "pyav" else spool.path("encoded.m4v")
    frame_bytes: list[int] = []
    iframe_bytes: list[int] = []
    with ExitStack() as files:
        spooled = [files.enter_context(open(spool.path(name), "ab")) for name in spool.names]
        for group in extract.groups(encoded(), settings, stream, "residual" in spool.names):
            pieces = b"".join(group.frames), group.iframe, group.motion.tobytes(), group.residual.tobytes()
            for file, piece in zip(spooled, pieces):
                file.write(piece)
            frame_bytes += map(len, group.frames)
            iframe_bytes.append(len(group.iframe))
            alive()
    if stream:
        stream.unlink()
    count = len(frame_bytes)
    if count != video.frames:
        raise ValueError(f"{video.frames} frames encoded, {count} read back")
    return {
        "fps": video.fps,
        "source_size": [video.height, video.width],
        "decode_errors": video.damage,
        "times": video.variable_times(),
        "frame_bytes": frame_bytes,
        "iframe_bytes": iframe_bytes,
        "iframe_frame": list(range(0, count, settings.gop)),
    }


def flow(source: str, spool: Spool, settings: Settings, alive: Callable[[], object]) -> dict[str, Any]:
    """Append the optical flow of one video to the spool; returns of how many frames. Errors as `convert`.

    `alive` is called after each frame, which takes half a second.
    """
    from preprocess.flow import maps  # its library is an extra

    pictures = (picture for picture, _ in extract.decoded(encode.packets(source, settings, encode.Source())))
    count = 0
    with open(spool.path("flow"), "ab") as file:
        for cells in maps(pictures, settings):
            file.write(cells.tobytes())
            count += 1
            alive()
    return {"frames": count}


def serve(parent: int) -> None:
    """Answer one JSON line for each JSON line of a request, until the pipe closes."""
    end_with_parent(parent)  # else it would go on writing where the next run writes
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group; the parent decides
    # Nothing a C library prints may end up in the protocol.
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)

    def alive() -> None:
        answers.write(b" ")  # which JSON allows before an answer
        answers.flush()

    verbs = {"convert": convert, "flow": flow}
    answers.write(b"ready\n")
    answers.flush()
    for line in sys.stdin.buffer:
        request = json.loads(line)
        spool = Spool(Path(request["spool"]), tuple(request["names"]))
        settings = Settings.from_json(request["settings"])
        try:
            answer = verbs[request["verb"]](request["source"], spool, settings, alive, **request["options"])
        except MemoryError as error:  # FFmpeg's as well
            answer = {"error": f"it takes more memory than there is ({error})"}
        except (ValueError, OSError, av.FFmpegError) as error:
            # A disk that is full or cannot be read is not the video's fault. FFmpeg's own errors are OSErrors too, most
            # of them, but say nothing of the disk: it does not read the file itself.
            number = error.errno if isinstance(error, OSError) and not isinstance(error, av.FFmpegError) else None
            answer = {"system": [number, os.strerror(number)]} if number in OUR_ERRORS else {"error": str(error)}
        answers.write(json.dumps(answer).encode() + b"\n")
        answers.flush()


def end_with_parent(parent: int) -> None:
    """Have the system kill this process when the thread that started it ends, the last of them with the parent."""
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:  # it went before the line above
        os.kill(os.getpid(), signal.SIGKILL)


if __name__ == "__main__":
    serve(int(sys.argv[1]))
