"""Stage 1 against oracles that share no code with it: other readers, known motion, known colours."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from fractions import Fraction
from itertools import islice
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
import simplejpeg
from conftest import ROOT, make_shards, one_thread, panned, write_video
from mvextractor.videocap import VideoCap
from PIL import Image

from preprocess import child, encode, extract
from preprocess.manifest import Manifest
from preprocess.schema import INTRA, Settings
from preprocess.shards import ShardSet
from preprocess.writer import Spool

SMALL = Settings(width=128, height=96, frame_width=96, frame_height=64)
CLIPS = ("RATRACE", "v_SoccerJuggling", "WUzgd7C1pWA")  # of HMDB51, UCF101 and Kinetics
COMPARED_FRAMES = 30


def alive() -> None:
    """Nobody asks."""


def encoded(source: Path, settings: Settings) -> list[av.Packet]:
    return list(encode.packets(str(source), settings, encode.Source()))


def stream_of(packets: list[av.Packet], path: Path, settings: Settings) -> Path:
    """The packets as a file that other readers take."""
    with av.open(str(path), "w", format="m4v") as output:
        stream = output.add_stream("mpeg4", rate=25)
        stream.width, stream.height = settings.width, settings.height
        for packet in packets:
            packet.stream = stream
            output.mux(packet)
    return path


def naive_grid(vectors: np.ndarray, rows: int, cols: int) -> np.ndarray:
    """The motion grid from mvextractor's columns, vector by vector, in plain arithmetic: where content went."""
    cells = np.full((rows, cols, 2), INTRA, np.int64)
    for _, _, _, _, _, dst_x, dst_y, motion_x, motion_y, scale in vectors.tolist():
        # The record points back to the reference, in units of 1/scale pixel; dst is the centre of a 16x16 block.
        column, row = (dst_x - 8) / 16, (dst_y - 8) / 16
        assert column == int(column) and row == int(row)
        cells[int(row), int(column)] = [4 * Fraction(-motion, scale) for motion in (motion_x, motion_y)]
    return cells


def compare_motion(source: Path, folder: Path, settings: Settings) -> int:
    """Hold stage 1 against mvextractor; returns how many vectors were compared."""
    packets = [*islice(encode.packets(str(source), settings, encode.Source()), COMPARED_FRAMES)]
    grids = np.concatenate([group.motion for group in extract.groups(packets, settings)])  # (T, rows, cols, 2)
    assert len(grids) == len(packets) and grids.dtype == np.int16
    stream = stream_of(packets, folder / "encoded.m4v", settings)
    capture = VideoCap()
    capture.set_decode_frames(False)
    assert capture.open(str(stream))
    compared = 0
    for frame, grid in enumerate(grids):
        ok, _, vectors, kind = capture.read()
        assert ok and kind == ("P" if frame % settings.gop else "I")
        np.testing.assert_array_equal(grid, naive_grid(vectors, *settings.grid))
        compared += len(vectors)
    return compared


@pytest.mark.parametrize("name", CLIPS)
def test_motion_equals_what_another_reader_finds_on_real_clips(
    name: str, real_clips: list[Path], tmp_path: Path
) -> None:
    clip = next(c for c in real_clips if c.name.startswith(name))
    assert compare_motion(clip, tmp_path, Settings()) > 4000


def test_motion_equals_what_another_reader_finds_on_a_moving_sprite(tmp_path: Path) -> None:
    frames = np.repeat(panned(1, height=112, width=176), 40, axis=0)
    sprite = panned(1, height=32, width=32, seed=1)[0]
    for t, frame in enumerate(frames):
        frame[30 + t : 62 + t, 2 * t : 2 * t + 32] = sprite
    source = write_video(tmp_path / "sprite.mp4", frames)
    assert compare_motion(source, tmp_path, Settings(width=176, height=112)) > 1000


def test_a_panned_texture_yields_exactly_its_motion(panned_shards: ShardSet) -> None:
    for video in range(len(panned_shards)):
        shard, index = panned_shards.locate(video)
        start, end = shard.frame_offset[index : index + 2]
        motion = np.delete(shard.motion[start:end], np.s_[::12], axis=0)  # P-frames
        assert len(motion) == end - start - -(-(end - start) // 12)
        interior = motion[:, 1:-1, 1:-2]  # the border shows content that was not in the frame before
        assert (interior == (12, -8)).all()


# ---- what the encoder was told, read back from the bits of the stream (ISO/IEC 14496-2)


def vop(packet: av.Packet) -> tuple[str, int]:
    """Type ("I", "P") and quantiser of the picture in a packet, whose clock counts 25 a second."""
    data = bytes(packet)
    bits = iter("".join(f"{byte:08b}" for byte in data[data.index(b"\0\0\1\xb6") + 4 :]))

    def take(count: int) -> int:
        return int("0" + "".join(islice(bits, count)), 2)

    kind = "IPBS"[take(2)]
    while take(1):  # modulo_time_base
        pass
    assert take(1) == 1  # marker
    take(5)  # vop_time_increment, 0 to 24
    assert take(2) == 3  # marker, vop_coded
    take(kind == "P")  # vop_rounding_type
    take(3)  # intra_dc_vlc_thr
    return kind, take(5)


@pytest.mark.parametrize("quantiser", [2, 31])
def test_every_picture_has_the_quantiser_that_was_asked_for(quantiser: int, tmp_path: Path) -> None:
    source = write_video(tmp_path / "a.mp4", panned(26, height=96, width=128))
    found = [vop(p) for p in encoded(source, replace(SMALL, quantiser=quantiser))]
    assert found == [("P" if t % 12 else "I", quantiser) for t in range(26)]


def test_hard_cuts_insert_no_iframes(tmp_path: Path) -> None:
    scenes = [panned(1, height=96, width=128, seed=s)[0] // (1 + s % 3) for s in range(10)]
    source = write_video(tmp_path / "cuts.mp4", np.repeat(scenes, 5, axis=0))
    kinds = [vop(p)[0] for p in encoded(source, SMALL)]
    assert [t for t, kind in enumerate(kinds) if kind == "I"] == [0, 12, 24, 36, 48]
    # The same encoder told a bit rate instead of a quantiser: what our settings prevent.
    usual = av.CodecContext.create("mpeg4", "w")
    usual.width, usual.height, usual.pix_fmt = 128, 96, "yuv420p"
    usual.time_base, usual.gop_size, usual.max_b_frames, usual.bit_rate = Fraction(1, 25), 12, 0, 4_000_000
    packets = []
    with av.open(str(source)) as container:
        for frame in container.decode(video=0):
            frame.pict_type = av.video.frame.PictureType.NONE
            packets += usual.encode(frame)
    kinds = [vop(p)[0] for p in [*packets, *usual.encode()]]
    assert {5, 10, 15, 20, 25, 30, 35, 40, 45} <= {t for t, kind in enumerate(kinds) if kind == "I"}


@pytest.mark.parametrize("quality", [50, 90])
def test_pictures_have_the_jpeg_quality_that_was_asked_for(quality: int, tmp_path: Path) -> None:
    source = write_video(tmp_path / "a.mp4", panned(2, height=96, width=128))
    (group,) = extract.groups(encoded(source, SMALL), replace(SMALL, jpeg_quality=quality))
    reference = io.BytesIO()
    Image.new("RGB", (16, 16)).save(reference, "JPEG", quality=quality)
    with Image.open(reference) as expected:
        for data in (group.iframe, *group.frames):
            with Image.open(io.BytesIO(data)) as picture:
                assert picture.quantization == expected.quantization


def psnr(a: np.ndarray, b: np.ndarray) -> float:
    return float(10 * np.log10(255**2 / np.square(a.astype(float) - b).mean()))


def test_stored_frames_look_like_the_source(real_shards: ShardSet, real_clips: list[Path]) -> None:
    assert not real_shards.failed and len(real_shards) == len(real_clips)
    for clip, video in zip(real_clips, range(len(real_shards))):
        shard, index = real_shards.locate(video)
        start, count = shard.frame_offset[index], int(np.diff(shard.frame_offset)[index])
        with av.open(str(clip), metadata_errors="ignore") as container:
            for t, frame in enumerate(container.decode(video=0)):
                if t not in (0, 5, 12, 30):
                    continue
                source = frame.to_ndarray(format="rgb24", width=228, height=172)
                ours = simplejpeg.decode_jpeg(bytes(shard.frame_jpeg(start + t)))
                assert ours.shape == source.shape
                assert psnr(ours, source) > 30, (clip.name, t)
                if t + 10 < count:  # the right frame, not a neighbour, wherever the two differ
                    other = simplejpeg.decode_jpeg(bytes(shard.frame_jpeg(start + t + 10)))
                    assert psnr(ours, source) > psnr(other, source) or psnr(ours, other) > 40
                if t % 12 == 0:
                    k = int(np.flatnonzero(shard.iframe_frame == start + t)[0])
                    whole = simplejpeg.decode_jpeg(bytes(shard.iframe_jpeg(k)))
                    assert psnr(whole, frame.to_ndarray(format="rgb24", width=340, height=256)) > 30


BARS = np.array([(180, 180, 180), (180, 180, 16), (16, 180, 180), (16, 180, 16), (180, 16, 180), (180, 16, 16),
                 (16, 16, 180), (16, 16, 16), (235, 120, 60), (255, 255, 255)])  # fmt: skip


def bars_yuv(matrix: int, full: bool, height: int, width: int) -> np.ndarray:
    """Colour bars as planes (3, height, width), by the textbook equations with each standard's weights."""
    kr, kb = {601: (0.299, 0.114), 709: (0.2126, 0.0722), 240: (0.212, 0.087), 2020: (0.2627, 0.0593)}[matrix]
    r, g, b = BARS.T / 255
    y = kr * r + (1 - kr - kb) * g + kb * b
    cb, cr = (b - y) / (2 * (1 - kb)), (r - y) / (2 * (1 - kr))
    scale_y, scale_c, base = (255, 255, 0) if full else (219, 224, 16)
    planes = np.stack([base + scale_y * y, 128 + scale_c * cb, 128 + scale_c * cr]).round().clip(0, 255)
    columns = np.arange(width) * len(BARS) // width
    return np.repeat(planes[:, None, columns], height, axis=1).astype(np.uint8)


COLOURS = {
    "bt709 limited": (709, 1, False, 1, 240),
    "bt709 full": (709, 1, True, 2, 240),
    "bt601 limited": (601, 6, False, 1, 240),
    "bt601 full": (601, 5, True, 2, 240),
    "bt2020 limited": (2020, 9, False, 1, 240),
    "bt2020 full": (2020, 9, True, 2, 240),
    "smpte 240m limited": (240, 7, False, 1, 240),
    "smpte 240m full": (240, 7, True, 2, 240),
    "untagged small is bt601": (601, 2, False, 0, 240),
    "untagged tall is bt709": (709, 2, False, 0, 720),
    "tagged bt601 though tall": (601, 6, False, 1, 720),
}


@pytest.mark.parametrize("case", COLOURS)
def test_colours_come_out_right(case: str, tmp_path: Path) -> None:
    matrix, space, full, colour_range, height = COLOURS[case]
    width = height * 4 // 3
    planes = bars_yuv(matrix, full, height, width)
    with av.open(str(tmp_path / "bars.mkv"), "w") as container:
        stream = container.add_stream("libx264", rate=25, options={"qp": "0", "preset": "ultrafast"})
        stream.width, stream.height, stream.pix_fmt = width, height, "yuv444p"
        stream.codec_context.colorspace, stream.codec_context.color_range = space, colour_range
        frame = av.VideoFrame.from_ndarray(planes, "yuv444p")
        frame.colorspace, frame.color_range = space, colour_range
        frame.pts, frame.time_base = 0, Fraction(1, 25)
        container.mux(stream.encode(frame))
        container.mux(stream.encode())
    assert_bars(tmp_path / "bars.mkv", tmp_path)


@pytest.mark.parametrize("codec_name, pix_fmt", [("ffv1", "bgr0"), ("libx264rgb", "bgr24")])
def test_rgb_sources_keep_their_colours(codec_name: str, pix_fmt: str, tmp_path: Path) -> None:
    columns = np.arange(320) * len(BARS) // 320
    frames = np.repeat(BARS[columns][None, None].astype(np.uint8), 240, axis=1)
    assert_bars(write_video(tmp_path / "bars.mkv", frames, codec_name, {"qp": "0"}, pix_fmt=pix_fmt), tmp_path)


def assert_bars(source: Path, folder: Path) -> None:
    """Both kinds of stored picture show BARS within a few levels."""
    answer = child.convert(str(source), Spool(folder), Settings(), alive)
    for kind, shape in ("frames", (172, 228)), ("iframes", (256, 340)):
        data = (folder / kind).read_bytes()[: answer[f"{kind.removesuffix('s')}_bytes"][0]]
        picture = simplejpeg.decode_jpeg(data).astype(int)
        assert picture.shape == (*shape, 3)
        centres = (2 * np.arange(len(BARS)) + 1) * shape[1] // (2 * len(BARS))
        np.testing.assert_allclose(picture[shape[0] // 2, centres], BARS, atol=6)


def files(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def test_the_same_bytes_whatever_workers_and_root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    names = [f"deep/{n}.mp4" for n in range(3)] + ["deep/words.mp4", "missing.mp4", "odd: name.mkv"]
    for seed, name in enumerate(n for n in names if "words" not in n and "missing" not in n):
        write_video(tmp_path / "a" / name, panned(14 + seed, height=48, width=64, seed=seed))
    (tmp_path / "a/deep/words.mp4").write_text("not a video")
    (tmp_path / "b").mkdir()
    (tmp_path / "b/root").symlink_to(tmp_path / "a")
    options = {"settings": SMALL, "videos_per_shard": 2}
    make_shards(tmp_path / "one", tmp_path / "a", names, list("ababab"), **options)
    expected = files(tmp_path / "one/shards")
    assert sorted(expected) == ["failures.csv"] + [
        f"shard-0000{n}.h5{end}" for n in range(3) for end in ("", ".sha256")
    ]
    monkeypatch.chdir(tmp_path / "b/root")
    two = make_shards(tmp_path / "two", Path("."), names, list("ababab"), workers=2, **options)
    assert files(tmp_path / "two/shards") == expected
    assert two.paths == [n for n in names if "words" not in n and "missing" not in n]
    assert [f.path for f in two.failed] == ["deep/words.mp4", "missing.mp4"]
    assert not any(str(tmp_path).encode() in data for data in expected.values())


def threads() -> int:
    return len(os.listdir("/proc/self/task"))


@pytest.mark.skipif(len(os.sched_getaffinity(0)) < 2, reason="one core: there are no extra threads to prevent")
def test_neither_encoding_nor_reading_starts_threads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = write_video(tmp_path / "a.mp4", panned(5, height=144, width=176))
    before, seen = threads(), []
    for module, name in (encode, "_stretch"), (extract, "grids"):
        real = getattr(module, name)
        monkeypatch.setattr(module, name, lambda *a, real=real: (real(*a), seen.append(threads()))[0])
    child.convert(str(source), Spool(tmp_path), SMALL, alive)
    assert seen == [before] * 6  # five frames scaled, one group read


@pytest.mark.parametrize("reader", ["pyav", "mvextractor"])
def test_every_group_of_pictures_is_a_sign_of_life(
    reader: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = write_video(tmp_path / "a.mp4", panned(60, height=48, width=64))
    done, seen, real = [0], [0], {"encode": encode.packets, "read": extract.grids}

    def encoding(*arguments: Any) -> Iterator[av.Packet]:
        for packet in real["encode"](*arguments):
            done[0] += 1
            yield packet

    def reading(records: list[bytes], settings: Settings) -> np.ndarray:
        done[0] += len(records)
        return real["read"](records, settings)

    monkeypatch.setattr(encode, "packets", encoding)
    monkeypatch.setattr(extract, "grids", reading)
    child.convert(str(source), Spool(tmp_path), SMALL, lambda: seen.append(done[0]), reader)
    assert max(np.diff(seen)) <= 2 * SMALL.gop and seen[-1] == 2 * 60


def test_a_broken_group_of_pictures_is_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = write_video(tmp_path / "a.mp4", panned(14, height=96, width=128))
    whole, real = extract.decoded, encode.packets
    monkeypatch.setattr(extract, "decoded", lambda packets: list(whole(packets))[:-1])
    with pytest.raises(ValueError, match="14 frames encoded, 13 read back"):
        child.convert(str(source), Spool(tmp_path), SMALL, alive)
    monkeypatch.undo()
    for gop, frame in (5, 5), (13, 12):  # an I-frame too early, one too late
        monkeypatch.setattr(encode, "packets", lambda a, s, b, gop=gop: real(a, replace(s, gop=gop), b))
        with pytest.raises(ValueError, match=f"frame {frame} of the encoded stream breaks the group of 12"):
            child.convert(str(source), Spool(tmp_path), SMALL, alive)


VECTOR = {"source": -1, "w": 16, "h": 16, "dst_x": 24, "dst_y": 24, "motion_scale": 2}


@pytest.mark.parametrize(
    "field, value, words",
    [
        *(("source", -2, "half-pixel, 16x16"), ("w", 8, "half-pixel, 16x16"), ("h", 8, "half-pixel, 16x16")),
        *(("motion_scale", 4, "half-pixel, 16x16"), ("dst_x", 136, "invalid entry"), ("dst_y", -8, "invalid entry")),
    ],
)
def test_vectors_our_encoder_does_not_make_are_refused(field: str, value: int, words: str) -> None:
    vector = np.zeros(1, extract.RECORD)
    for name, usual in VECTOR.items():
        vector[name] = usual
    assert (extract.grids([b"", vector.tobytes()], SMALL)[1, 1, 1] == 0).all()
    with pytest.raises(ValueError, match="two vectors"):
        extract.grids([2 * vector.tobytes()], SMALL)
    vector[field] = value
    with pytest.raises(ValueError, match=words):
        extract.grids([vector.tobytes()], SMALL)


# ---- what it holds in memory

FEW, MANY = 4, 30
SLACK = 4e6  # bytes; the larger shard is several times that larger
STAGE_1 = """
import json, sys
from pathlib import Path
from preprocess import codec, pipeline
from preprocess.schema import Settings

def peak(process):
    lines = Path(f"/proc/{process}/status").read_text().splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith("VmHWM"))

peaks, close = {}, codec.Codec.close

def note_and_close(self):
    if self._child and not self._closed:
        peaks["codec"] = peak(self._child.pid)
    close(self)

codec.Codec.close = note_and_close
folder, settings = Path(sys.argv[1]), Settings(jpeg_quality=100)
assert not pipeline.run(folder / "manifest.csv", folder, folder / "shards", settings).failures
peaks["worker"] = peak("self")
peaks["shard"] = (folder / "shards/shard-00000.h5").stat().st_size
print(json.dumps(peaks))
"""


def peaks(folder: Path, video: Path, count: int) -> dict[str, int]:
    """Peak memory of worker and decoder, and the size of the one shard, for a video under so many names."""
    names = tuple(f"{k}.mp4" for k in range(count))
    folder.mkdir()
    for name in names:
        (folder / name).symlink_to(video)
    Manifest(names, ("",) * count, ("",) * count).write(folder / "manifest.csv")
    command = [sys.executable, "-c", STAGE_1, str(folder)]
    done = subprocess.run(command, cwd=ROOT, env=one_thread(), capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def test_memory_does_not_grow_with_the_number_of_videos(tmp_path: Path) -> None:
    video = write_video(tmp_path / "video.mp4", panned(26))
    few, many = (peaks(tmp_path / str(count), video, count) for count in (FEW, MANY))
    assert many["shard"] - few["shard"] > 5 * SLACK
    for process in "worker", "codec":
        assert abs(many[process] - few[process]) < SLACK, (process, few, many)
