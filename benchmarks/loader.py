"""python -m benchmarks.loader --shards SHARDS --videos FOLDER

Takes about three minutes on an idle CPU core (--quick: ten seconds) and ends with four Markdown tables:

1. clips per second and core, a clip being a sample of pretraining (16 frames at stride 4, an I-frame, four motion
   windows), against what else one could do to get its 16 frames;
2. the same from 10 to 10,000 videos, with the memory of the index: shards under more and more names (hard links), so
   that everything grows but the disk; files are in the page cache, the speed of a disk is no part of any figure;
3. private memory of four loader workers over one epoch;
4. augmentation of a batch against a training step of C3D, on --device.

The ways of the first table, in turns (bound ours h5py ... bound ours h5py ...), each on the very same draws:

bound        libjpeg-turbo decoding the sample's 17 JPEGs from memory into arrays that are there already, nothing else
ours         PretrainSet's samples: draws, look-up, decoding, motion windows; a turn is a batch, as a loader asks for it
h5py         the same sample where every read is an ordinary call of h5py; the file opened once, or for every sample
PyAV, torchcodec  the 16 frames alone from the source video: open, seek, decode, resize to the stored frame's size; one
             thread. torchcodec once with the scan for exact seeks that is its default, once without; PyAV once more for
             the whole sample, with the I-frame and the source's motion vectors of the four windows

Times are CPU time of the whole process, figures medians over the turns, ratios medians of each turn's. Videos whose
source has more than 288 lines are a table of their own: decoding them is slower and would flatter the ratio. Without
--shards a small set is made of real clips near the repository, else of embedded scenes.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import time
import tracemalloc
from collections import defaultdict
from contextlib import ExitStack, redirect_stdout
from dataclasses import replace
from pathlib import Path
from statistics import median

import numpy as np
import torch
from torch.utils.data import DataLoader, default_collate

from benchmarks.common import CLIPS, clock, endless, open_shards
from benchmarks.ways import missing, readers, recorded
from preprocess.shards import ShardSet
from preprocess.writer import Spool, Video, write_shard
from train.config import Config
from train.data import EpochSampler, PretrainSet
from train.device import channels_last
from train.loader import make_loader
from train.networks import build_video_network
from train.optimiser import make_optimiser
from train.recipes import RECIPES
from train.tasks import prepare

LINES = 288  # of the sources of data sets such as UCF101 and HMDB51, at most
CUT = 96  # frames kept of a video when the set is made to grow
GROWTH = ((10, 1), (128, 1), (128, 8), (128, 79), (10, 1000))  # videos a shard, shards
CONTENTS = 10  # different videos in those
BATCH, WORKERS = 16, 4


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[1])
    parser.add_argument("--shards", type=Path, help="folder of shards; default a small set made of --videos")
    parser.add_argument("--videos", type=Path, help=f"folder of the source videos; default {CLIPS}")
    parser.add_argument("--turns", type=int, default=15)
    parser.add_argument("--clips", type=int, default=16, help="clips a turn")
    parser.add_argument("--device", default="cpu", help="of the augmentation: cpu or cuda")
    parser.add_argument("--batch", type=int, default=2, help="of the augmentation")
    parser.add_argument("--quick", action="store_true", help="two turns, little data: whether it runs, not how fast")
    options = parser.parse_args()
    growth, epoch, size = GROWTH, 1280, 112
    if options.quick:
        options.turns, options.clips, options.batch = 2, 3, 1
        growth, epoch, size = ((4, 1), (4, 20)), 80, 32
    with tempfile.TemporaryDirectory(prefix="context-motion-") as folder:
        with redirect_stdout(sys.stderr):
            shards, videos = open_shards(options.shards, options.videos, Path(folder))
        data = PretrainSet(shards, None, Config())
        lines = np.array([shard.source_size[i, 0] for shard, i in map(shards.locate, data.video.tolist())])
        for name, chosen in (("at most", lines <= LINES), ("more than", lines > LINES)):
            if chosen.any():
                speed(data, np.flatnonzero(chosen), videos, options.turns, options.clips, f"{name} {LINES} lines")
        sets = grow(data, Path(folder), growth)
        flatness(sets, options.turns, options.clips)
        memory(next(s for s in sets if len(s) >= epoch), epoch)
        augmentation(data, options.device, options.batch, size, max(options.turns // 5, 2))


# 1. Speed


def speed(data: PretrainSet, rows: np.ndarray, videos: Path | None, turns: int, count: int, what: str) -> None:
    """The first table, of the videos in `rows` of the data set."""
    ways = readers(data, videos)
    seconds: dict[str, list[float]] = defaultdict(list)
    differences = []
    for turn in range(turns + 1):
        order = np.random.default_rng(turn).permutation(rows)
        keys = [(turn, int(i)) for i in np.resize(order, count)]
        with recorded(data) as clips:
            expected = [data[key]["clip"] for key in keys]
        if not turn:  # warms up, and shows that the others decode the same frames
            for name, way in ways.items():
                pairs = zip(expected, way(keys, clips))
                differences.append(
                    f"{name} {max(float(np.abs(e - g.astype(np.float32)).mean()) for e, g in pairs):.1f}"
                )
            continue
        for name, way in ways.items():
            begin = time.process_time()
            for _ in way(keys, clips):
                pass
            seconds[name].append(time.process_time() - begin)
    decoders = [n for n in seconds if n.startswith(("PyAV", "torchcodec"))]
    print(f"Clips a CPU-second; {len(rows)} videos, sources of {what}; {turns} turns of {count} clips\n")
    print("| way | clips / s | ms a clip | ours against it |\n|---|---:|---:|---:|")
    for name in seconds:
        rate = median(count / s for s in seconds[name])
        ratio = median(s / o for s, o in zip(seconds[name], seconds["ours"]))
        print(f"| {name} | {rate:.1f} | {1e3 / rate:.2f} | {ratio:.2f} |")
    for name, reason in missing(videos).items():
        print(f"| {name} | {reason} | | |")
    if decoders:
        fastest = (min(turn) for turn in zip(*(seconds[d] for d in decoders)))
        print(f"| faster decoder | | | {median(f / o for f, o in zip(fastest, seconds['ours'])):.2f} |")
    print(f"\nLargest mean difference of a clip from ours, of 255: {', '.join(differences)}.\n", flush=True)


# 2. Flatness


def grow(data: PretrainSet, folder: Path, growth: tuple[tuple[int, int], ...]) -> list[PretrainSet]:
    """Shard sets of the beginnings of the first few videos, over and over: one real shard under many names."""
    sets = []
    templates = {
        videos: template_shard(data, folder / f"template-{videos}", videos) for videos in {v for v, _ in growth}
    }
    for videos, links in growth:
        place = folder / f"{videos}-{links}"
        place.mkdir()
        for k in range(links):
            os.link(templates[videos], place / f"shard-{k:05d}.h5")
        sets.append(PretrainSet(ShardSet(place), None, Config()))
    return sets


def template_shard(data: PretrainSet, folder: Path, count: int) -> Path:
    """Write the only shard of a set of its own: `count` videos, which repeat after the first few."""
    spool = Spool(folder / "spool")
    spool.folder.mkdir(parents=True)
    rows = []
    with ExitStack() as stack:
        frames, iframes, motion = (stack.enter_context(open(spool.path(name), "wb")) for name in Spool.names)
        for row in range(count):
            shard, i = data.shards.locate(int(data.video[row % min(CONTENTS, len(data))]))
            first, end = shard.frame_offset[i : i + 2].tolist()
            end = min(end, first + CUT)
            low, high = shard.iframe_frame.searchsorted([first, end]).tolist()
            of_frames = shard["frames/jpeg_offset"][first : end + 1]
            of_iframes = shard["iframes/jpeg_offset"][low : high + 1]
            frames.write(shard["frames/jpeg"][of_frames[0] : of_frames[-1]].tobytes())
            iframes.write(shard["iframes/jpeg"][of_iframes[0] : of_iframes[-1]].tobytes())
            motion.write(shard.motion[first:end].tobytes())
            numbers = shard.iframe_frame[low:high] - first
            rows.append(Video(row, f"{row}", -1, 25.0, (0, 0), np.diff(of_frames), np.diff(of_iframes), numbers))
    origin = replace(data.shards.origin, shards=1)
    return write_shard(folder, 0, origin, 0, count, rows, [], spool)


def flatness(sets: list[PretrainSet], turns: int, count: int) -> None:
    """The second table. Every set takes its samples from the same few contents, anywhere in all its shards."""
    cost = []
    for data in sets:
        tracemalloc.start()
        begin = time.process_time()
        again = PretrainSet(ShardSet(data.shards.folder), None, Config())
        seconds = time.process_time() - begin
        cost.append((tracemalloc.get_traced_memory()[0], seconds))
        tracemalloc.stop()
        del again
    rates: list[list[float]] = [[] for _ in sets]
    for turn in range(turns):
        rng = np.random.default_rng(turn)
        for data, rate in zip(sets, rates):
            a_shard = len(data.shards.shards[0])
            contents = min(CONTENTS, a_shard)
            places = (
                rng.integers(len(data) // contents - 1, size=count) if len(data) > contents else np.zeros(count, int)
            )
            within = places * contents % max(a_shard - a_shard % contents, 1)
            rows = rng.integers(len(data.shards.shards), size=count) * a_shard + within + np.arange(count) % contents
            begin = time.process_time()
            data.__getitems__([(turn, row) for row in rows.tolist()])
            rate.append(count / (time.process_time() - begin))
    print("The same data set as it grows, clips a CPU-second\n")
    print("| videos | shards | clips / s | against the first | to open, CPU s | index, kB | bytes a video |")
    print("|" + "---:|" * 7)
    for data, rate, (size, seconds) in zip(sets, rates, cost):
        relative = median(r / f for r, f in zip(rate, rates[0]))
        print(
            f"| {len(data):,} | {len(data.shards.shards):,} | {median(rate):.1f} | {relative:.2f} | {seconds:.2f} | "
            f"{size / 1e3:.0f} | {size / len(data):.0f} |"
        )
    print(flush=True)


# 3. Memory


def memory(data: PretrainSet, videos: int) -> None:
    """The third table: what only a worker itself holds, early in an epoch and at its end."""
    data.video, data.label = data.video[:videos], data.label[:videos]
    sampler = EpochSampler(len(data), BATCH)
    loader = DataLoader(data, batch_sampler=sampler, num_workers=WORKERS)
    moments = {sampler.steps * share // 4: share / 4 for share in (1, 2, 3, 4)}
    table: list[str] = []
    batches = iter(loader)
    for step, _ in enumerate(batches, 1):
        if step in moments:
            workers = batches._workers  # type: ignore[attr-defined]
            values = [private_memory(w.pid) for w in workers]
            written, mapped = ([f"{v[k] / 1e6:.1f}" for v in values] for k in (0, 1))
            table.append(f"| {moments[step]:.0%} | {', '.join(written)} | {', '.join(mapped)} |")
    print(f"Private memory of {WORKERS} workers, MB each, over an epoch of {len(data):,} videos\n")
    print("| of the epoch | written | mapped from shards, no other has it |\n|---:|---:|---:|")
    print("\n".join(table) + "\n", flush=True)


def private_memory(pid: int) -> tuple[int, int]:
    """Bytes of a process that no other shares (USS): written ones, and clean ones that can be dropped at any time."""
    fields = (line.split() for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()[1:])
    sizes = {f[0]: 1024 * int(f[1]) for f in fields}
    return sizes["Private_Dirty:"], sizes["Private_Clean:"]


def throughput(data: PretrainSet, workers: int, batch: int, seconds: float) -> float:
    """Clips a second by the clock, of so many workers together, once what they had ready is used up."""
    batches = iter(make_loader(data, workers, torch.device("cpu"), batch_sampler=endless(len(data), batch)))
    for _ in range(1 + 2 * workers):
        next(batches)
    count, begin = 0, time.perf_counter()
    while count == 0 or time.perf_counter() - begin < seconds:
        next(batches)
        count += 1
    return count * batch / (time.perf_counter() - begin)


# 4. Augmentation


def augmentation(data: PretrainSet, device: str, batch_size: int, size: int, turns: int) -> None:
    """The last table: cropping and colouring all that a step needs, against C3D alone, forward, backward and update."""
    config = RECIPES["pretrain-ucf101-c3d"].config.changed({"size": size, "motion_size": size})
    network = build_video_network("c3d", config.networks.width).to(device).train()
    channels_last(network)
    optimiser = make_optimiser(config.optimiser, network)
    ways: dict[str, list[float]] = defaultdict(list)
    precision = torch.bfloat16 if device != "cpu" else torch.float32
    for turn in range(turns + 1):
        rows = np.random.default_rng(turn).integers(len(data), size=batch_size).tolist()
        host = default_collate([data[turn, row] for row in rows])
        batch = {k: v.to(device) for k, v in host.items()}
        places = {"augmentation": batch}
        if device != "cpu":
            places["augmentation, colours' numbers kept on the host"] = batch | {
                k: v for k, v in host.items() if k.endswith("photo")
            }
        for name, arguments in places.items():
            begin = clock(device)
            clip, _, _ = prepare(arguments, config, data.shards.settings, with_iframe=True, with_motion=True)
            ways[name].append(clock(device) - begin)
        begin = clock(device)
        with torch.autocast(torch.device(device).type, precision, enabled=precision == torch.bfloat16):
            value = network.forward_pretrain(clip).float().square().mean()
        optimiser.zero_grad(set_to_none=True)
        value.backward()
        optimiser.step()
        ways["step of C3D"].append(clock(device) - begin)
    print(
        f"Milliseconds a sample on {device}, batch {batch_size}, {config.sampling.frames} frames of {size} x {size}\n"
    )
    print("| what | ms | share of the step |\n|---|---:|---:|")
    steps = ways["step of C3D"][1:]  # the first warmed up
    for name, seconds in ways.items():
        share = median(s / t for s, t in zip(seconds[1:], steps))
        print(f"| {name} | {1e3 * median(seconds[1:]) / batch_size:.1f} | 1 / {1 / share:.0f} |")


if __name__ == "__main__":
    main()
