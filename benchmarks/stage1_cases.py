"""What `benchmarks.stage1` runs in processes of their own: three ways through the clips, and ours phase by phase."""

from __future__ import annotations

import functools
import subprocess
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from fractions import Fraction
from itertools import islice
from pathlib import Path
from types import ModuleType
from typing import Any

import av
import numpy as np
from av.video.frame import PictureType
from av.video.reformatter import VideoReformatter

WIDTH, HEIGHT, GOP, QUANTISER, BATCH = 340, 256, 12, 2, 48
LIMIT_PHASES = ("decode the source", "scale to 340x256", "encode", "decode it, vectors exported")
OUR_PHASES = (
    *("vectors to grids", "scale to 228x172, full range", "JPEGs", "append to the spool"),
    *("shard: copy and flush", "shard: read back and verify", "shard: SHA-256"),
)


def run_case(way: str, scratch: Path, workers: int) -> dict[str, Any]:
    """One way over scratch/videos, or the phases of ours; how many frames, and what else was found."""
    videos = sorted((scratch / "videos").iterdir())
    if way == "phases":
        return run_phases(scratch, [str(v) for v in videos])
    if way == "ours":
        return run_ours(scratch, len(videos) // workers, workers)
    one = run_limit if way == "limit" else run_usual
    with tempfile.TemporaryDirectory(dir=scratch) as out:
        return {"frames": sum(one(str(v), Path(out)) for v in videos)}


def run_limit(video: str, out: Path) -> int:
    """Nothing but the codecs, set as ours are: what any re-encoding with motion vectors has to do."""
    packets = limit_packets(video)
    decoder = av.CodecContext.create("mpeg4", "r")
    decoder.thread_count, decoder.options = 1, {"flags2": "+export_mvs"}
    frames = 0
    while batch := [*islice(packets, BATCH)]:
        frames += sum(len(decoder.decode(packet)) for packet in batch)
    return frames


def limit_packets(video: str) -> Iterator[av.Packet]:
    """The encoded stream of a video."""
    encoder = av.CodecContext.create("mpeg4", "w")
    encoder.width, encoder.height, encoder.pix_fmt = WIDTH, HEIGHT, "yuv420p"
    encoder.time_base, encoder.framerate = Fraction(1, 25), 25
    encoder.thread_count, encoder.gop_size, encoder.max_b_frames = 1, GOP, 0
    encoder.options = {"flags": "+qscale+bitexact", "qmin": str(QUANTISER), "qmax": str(QUANTISER)}
    scaler = VideoReformatter()
    with av.open(video, metadata_errors="ignore") as source:
        source.streams.video[0].codec_context.thread_count = 1
        for number, frame in enumerate(source.decode(video=0)):
            picture = scaler.reformat(frame, WIDTH, HEIGHT, "yuv420p", threads=1)
            picture.pts, picture.time_base, picture.pict_type = number, Fraction(1, 25), PictureType.NONE
            yield from encoder.encode(picture)
        yield from encoder.encode()


def run_usual(video: str, out: Path) -> int:
    """The command line that CoViAR's preparation runs, then what an extraction script does with mvextractor."""
    import cv2
    from mvextractor.videocap import VideoCap

    stream = out / "stream.mp4"
    command = ["ffmpeg", "-v", "error", "-y", "-i", video, "-vf", f"scale={WIDTH}:{HEIGHT},setsar=1:1"]
    command += ["-q:v", "1", "-c:v", "mpeg4", "-f", "rawvideo", str(stream)]
    subprocess.run(command, check=True, stdin=subprocess.DEVNULL)
    folder = Path(tempfile.mkdtemp(dir=out))
    capture = VideoCap()
    if not capture.open(str(stream)):
        raise RuntimeError(f"mvextractor cannot open what ffmpeg made of {video}")
    frames = 0
    while True:
        ok, frame, vectors, _ = capture.read()
        if not ok:
            capture.release()
            return frames
        cv2.imwrite(str(folder / f"frame-{frames}.jpg"), frame)
        np.save(folder / f"mvs-{frames}.npy", vectors)
        frames += 1


def run_ours(scratch: Path, videos_per_shard: int, workers: int) -> dict[str, int]:
    """The whole of stage 1. Equal shards, so that no worker waits for another at the end."""
    from preprocess import pipeline
    from preprocess.codec import Codec
    from preprocess.manifest import Manifest
    from preprocess.schema import Settings

    settings = Settings()
    assert (settings.width, settings.height, settings.gop, settings.quantiser) == (WIDTH, HEIGHT, GOP, QUANTISER)
    names = tuple(sorted(v.name for v in (scratch / "videos").iterdir()))
    Manifest(names, ("",) * len(names), ("",) * len(names)).write(scratch / "manifest.csv")
    peaks = [0]
    close = Codec.close

    def note_and_close(codec: Codec) -> None:
        if codec._child and not codec._closed:
            peaks.append(peak(codec._child.pid))
        close(codec)

    Codec.close = note_and_close  # type: ignore[method-assign]  # of one worker, whose thread is the main one
    summary = pipeline.run(
        scratch / "manifest.csv",
        scratch / "videos",
        scratch / "shards",
        settings,
        workers=workers,
        videos_per_shard=videos_per_shard,
    )
    if summary.failures:
        raise RuntimeError(f"{len(summary.failures)} clips failed, the first with: {summary.failures[0].reason}")
    return {
        "frames": summary.frames,
        "size": sum(p.stat().st_size for p in (scratch / "shards").glob("*.h5")),
        "worker_peak": peak("self"),
        "codec_peak": max(peaks),
    }


def peak(process: int | str) -> int:
    """Most memory that was ever resident in a process, bytes. (getrusage would count what it was forked from.) Zero of
    one that has just ended."""
    status = Path(f"/proc/{process}/status").read_text()
    return next((int(line.split()[1]) * 1024 for line in status.splitlines() if line.startswith("VmHWM")), 0)


class Stopwatch:
    """CPU time of this process, each moment booked to the innermost phase that runs, less what the clock takes."""

    def __init__(self) -> None:
        self._seconds: dict[str, float] = defaultdict(float)
        self._running = ["rest"]
        self._since = time.process_time()
        self._calls: dict[tuple[str, str], int] = defaultdict(int)

    def _book(self) -> None:
        now = time.process_time()
        self._seconds[self._running[-1]] += now - self._since
        self._since = now

    def call(self, phase: str, function: Callable[..., Any], *arguments: Any, **options: Any) -> Any:
        self._book()
        self._calls[self._running[-1], phase] += 1
        self._running.append(phase)
        try:
            return function(*arguments, **options)
        finally:
            self._book()
            self._running.pop()

    def seconds(self) -> dict[str, float]:
        """What each phase took. A phase that does nothing tells what the clock takes of it and of the one around it."""
        idle, count = Stopwatch(), 20_000
        for _ in range(count):
            idle.call("inner", int)
        inner, outer = (idle._seconds[name] / count for name in ("inner", "rest"))
        spent = dict(self._seconds)
        for (around, phase), calls in self._calls.items():
            spent[around] -= calls * outer
            spent[phase] -= calls * inner
        return spent

    def watch(self, module: ModuleType, name: str, phase: str) -> None:
        """Book what a function of a module takes; of one that yields, what each item takes."""
        real = getattr(module, name)

        @functools.wraps(real)
        def watched(*arguments: Any, **options: Any) -> Any:
            result = self.call(phase, real, *arguments, **options)
            return self._items(phase, result) if isinstance(result, Iterator) else result

        setattr(module, name, watched)

    def _items(self, phase: str, items: Iterator[Any]) -> Iterator[Any]:
        end = object()
        while (item := self.call(phase, next, items, end)) is not end:
            yield item


def run_phases(scratch: Path, videos: list[str]) -> dict[str, Any]:
    """What child and parent do, in this one process, and the seconds of CPU time of each phase."""
    from preprocess import child, encode, extract, writer

    watch = Stopwatch()
    for module, name, phase in (
        *((encode, "_decode", LIMIT_PHASES[0]), (encode, "_stretch", LIMIT_PHASES[1])),
        *((encode, "packets", LIMIT_PHASES[2]), (extract, "decoded", LIMIT_PHASES[3])),
        *((extract, "grids", OUR_PHASES[0]), (extract, "shrink", OUR_PHASES[1]), (extract, "compress", OUR_PHASES[2])),
        *((child, "convert", OUR_PHASES[3]), (writer, "write_shard", OUR_PHASES[4])),
        *(
            (writer, "Shard", OUR_PHASES[5]),
            (writer, "content_problems", OUR_PHASES[5]),
            (writer, "file_sha256", OUR_PHASES[6]),
        ),
    ):
        watch.watch(module, name, phase)
    return {"frames": store(scratch, videos, writer.Spool.names), "phases": watch.seconds()}


def store(scratch: Path, videos: list[str], names: tuple[str, ...]) -> int:
    """A shard of some videos made in this one process, with what is named in the spool; how many frames."""
    from preprocess import child, writer
    from preprocess.schema import Origin, Settings

    settings, spool = Settings(), writer.Spool(scratch / "work", names)
    spool.folder.mkdir(parents=True)
    spool.truncate((0,) * len(spool.names))
    stored = []
    for row, video in enumerate(videos):
        answer = child.convert(video, spool, settings, lambda: None)
        arrays = {k: np.array(v, np.int64) if isinstance(v, list) else v for k, v in answer.items()}
        stored.append(writer.Video(row, video, -1, **arrays))
    origin = Origin(settings, "0" * 64, (), {}, 1)
    writer.write_shard(scratch, 0, origin, 0, len(videos), stored, [], spool)
    return sum(len(v.frame_bytes) for v in stored)
