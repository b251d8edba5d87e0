"""The shard format: what is written is what is read, and what is damaged or foreign is refused or found."""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import h5py
import numpy as np
import pytest
import simplejpeg
from hypothesis import given, settings
from hypothesis import strategies as st

from preprocess import check
from preprocess.shards import INTRA, Failure, Origin, Settings, Shard, ShardSet
from preprocess.writer import Spool, Video, write_shard

TINY = Settings(width=64, height=34, frame_width=32, frame_height=16)  # a grid of 3 x 4, which overhangs the height
ROWS, COLS = 3, 4

# The contract, written out once more: type and number of dimensions of every dataset.
DATASETS = {
    "videos/row": ("<i8", 1),
    "videos/path": ("|u1", 1),
    "videos/path_offset": ("<i8", 1),
    "videos/label": ("<i4", 1),
    "videos/fps": ("<f8", 1),
    "videos/source_size": ("<i4", 2),
    "videos/frame_offset": ("<i8", 1),
    "videos/decode_errors": ("<i4", 1),
    "frames/jpeg": ("|u1", 1),
    "frames/jpeg_offset": ("<i8", 1),
    "iframes/jpeg": ("|u1", 1),
    "iframes/jpeg_offset": ("<i8", 1),
    "iframes/frame": ("<i8", 1),
    "motion": ("<i2", 4),
    "failed/row": ("<i8", 1),
    "failed/path": ("|u1", 1),
    "failed/path_offset": ("<i8", 1),
    "failed/reason": ("|u1", 1),
    "failed/reason_offset": ("<i8", 1),
}
ATTRIBUTES = {
    *("format", "version", "settings", "settings_sha256", "manifest_sha256", "classes", "versions"),
    *("shard", "shards", "first_row", "rows"),
}


def jpeg(rng: np.random.Generator, height: int, width: int) -> bytes:
    return simplejpeg.encode_jpeg(rng.integers(0, 256, (height, width, 3), np.uint8), 50, colorsubsampling="420")


class Written(NamedTuple):
    """A shard and what went into it, video by video."""

    path: Path
    videos: list[Video]
    failures: list[Failure]
    jpegs: list[list[bytes]]
    iframes: list[list[bytes]]
    motion: list[np.ndarray]


def write(
    folder: Path,
    lengths: list[int],
    failed: list[tuple[str, str]] | None = None,
    *,
    number: int = 0,
    shards: int = 1,
    options: Settings = TINY,
    manifest: str = "0" * 64,
    classes: tuple[str, ...] = ("climb", "golf"),
    first_row: int = 0,
) -> Written:
    """A shard of noise: videos of these many frames, then failures."""
    rng = np.random.default_rng(sum(lengths) + number)
    work = folder / f"work{number}"
    work.mkdir(parents=True)
    spool = Spool(work)
    spool.truncate((0,) * len(spool.names))
    written = Written(folder / f"shard-{number:05d}.h5", [], [], [], [], [])
    for k, length in enumerate(lengths):
        pictures = [jpeg(rng, options.frame_height, options.frame_width) for _ in range(length)]
        intra = [jpeg(rng, options.height, options.width) for _ in range(0, length, options.gop)]
        motion = rng.integers(-60, 60, (length, ROWS, COLS, 2), np.int16)
        motion[:: options.gop] = INTRA
        stored = {"frames": b"".join(pictures), "iframes": b"".join(intra), "motion": motion.tobytes()}
        for name, data in stored.items():
            with open(spool.path(name), "ab") as f:
                f.write(data)
        video = Video(
            row=first_row + k,
            path=f"klasse/vidéo {number}.{k}\udcff.avi",
            label=k % 3 - 1,
            fps=25 + k / 3,
            source_size=(240 + k, 320),
            frame_bytes=np.array([len(p) for p in pictures]),
            iframe_bytes=np.array([len(p) for p in intra]),
            iframe_frame=np.arange(0, length, options.gop),
            decode_errors=k,
        )
        for column, value in zip(written[1:], (video, None, pictures, intra, motion)):
            if value is not None:
                column.append(value)
    written.failures.extend(Failure(first_row + len(lengths) + k, *f) for k, f in enumerate(failed or []))
    rows = len(lengths) + len(written.failures)
    origin = Origin(options, manifest, classes, {"codec": "1.2"}, shards)
    write_shard(folder, number, origin, first_row, rows, written.videos, written.failures, spool)
    shutil.rmtree(work)
    return written


def assert_holds(shard: Shard, written: Written) -> None:
    """Every column of the shard against what went in."""
    assert len(shard) == len(written.videos)
    assert shard.paths == [v.path for v in written.videos]
    assert shard.failed == written.failures
    assert shard.row.tolist() == [v.row for v in written.videos]
    assert shard.label.tolist() == [v.label for v in written.videos]
    assert shard.fps.tolist() == [v.fps for v in written.videos]
    assert shard.source_size.tolist() == [list(v.source_size) for v in written.videos]
    assert shard.decode_errors.tolist() == [v.decode_errors for v in written.videos]
    frame = iframe = 0
    for k, (pictures, intra, motion) in enumerate(zip(written.jpegs, written.iframes, written.motion)):
        assert shard.frame_offset[k] == frame
        np.testing.assert_array_equal(shard.motion[frame : frame + len(pictures)], motion)
        for t, picture in enumerate(pictures):
            assert bytes(shard.frame_jpeg(frame + t)) == picture
        for t, picture in enumerate(intra):
            assert bytes(shard.iframe_jpeg(iframe + t)) == picture
            assert shard.iframe_frame[iframe + t] == frame + t * 12
        frame, iframe = frame + len(pictures), iframe + len(intra)
    assert shard.frame_offset[-1] == frame == len(shard.motion) and iframe == len(shard.iframe_frame)


text = st.text(st.characters(codec="utf-8"), max_size=30)


@given(st.lists(st.integers(1, 40), max_size=5), st.lists(st.tuples(text, text), max_size=3))
@settings(deadline=None, max_examples=15)
def test_round_trip(
    tmp_path_factory: pytest.TempPathFactory, lengths: list[int], failed: list[tuple[str, str]]
) -> None:
    written = write(tmp_path_factory.mktemp("shard"), lengths, failed)
    shard = Shard(written.path)
    assert check.content_problems(shard) == []
    assert_holds(shard, written)
    assert shard.origin == Origin(TINY, "0" * 64, ("climb", "golf"), {"codec": "1.2"}, 1)


def test_the_file_has_the_layout_the_table_says(tmp_path: Path) -> None:
    path = write(tmp_path, [14, 1], [("a", "b")]).path
    found: dict[str, tuple[str, int]] = {}
    with h5py.File(path, "r") as f:
        f.visititems(lambda n, d: found.update({n: (d.dtype.str, d.ndim)}) if isinstance(d, h5py.Dataset) else None)
        assert set(f.attrs) == ATTRIBUTES
        for name in DATASETS:
            assert f[name].chunks is None and f[name].compression is None and f[name].id.get_offset() % 8 == 0
        assert f["motion"].shape == (15, ROWS, COLS, 2)
    assert found == DATASETS
    line = (tmp_path / "shard-00000.h5.sha256").read_text()
    assert line == f"{hashlib.sha256(path.read_bytes()).hexdigest()}  shard-00000.h5\n"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["shard-00000.h5", "shard-00000.h5.sha256"]


def test_columns_are_views_of_the_file_and_read_only(tmp_path: Path) -> None:
    shard = Shard(write(tmp_path, [14]).path)
    for name in DATASETS:
        assert not shard[name].flags.owndata or not shard[name].size
    with pytest.raises(ValueError, match="read-only"):
        shard.motion[0] = 0


def test_equal_input_gives_equal_bytes(tmp_path: Path) -> None:
    paths = [write(tmp_path / name, [14, 3], [("a", "b")]).path for name in "ab"]
    assert paths[0].read_bytes() == paths[1].read_bytes()


def replace(name: str, **options: object) -> Callable[[h5py.File], None]:
    """Store a dataset again in another way; `change` makes its new content."""

    def mutate(f: h5py.File) -> None:
        content = f[name][()]
        change = options.pop("change", None)
        content = change(content) if callable(change) else content
        del f[name]
        f.create_dataset(name, data=content, **options)

    return mutate


def link(name: str, target: h5py.SoftLink | h5py.ExternalLink) -> Callable[[h5py.File], None]:
    def mutate(f: h5py.File) -> None:
        del f[name]
        f[name] = target

    return mutate


def external(f: h5py.File) -> None:
    shape = f["motion"].shape
    del f["motion"]
    f.create_dataset("motion", shape, "int16", external=[("/etc/hostname", 0, h5py.h5f.UNLIMITED)])


def virtual(f: h5py.File) -> None:
    shape = f["motion"].shape
    del f["motion"]
    layout = h5py.VirtualLayout(shape, "int16")
    layout[:] = h5py.VirtualSource("other.h5", "motion", shape)
    f.create_virtual_dataset("motion", layout)


def attribute(name: str, value: object) -> Callable[[h5py.File], None]:
    def mutate(f: h5py.File) -> None:
        del f.attrs[name]
        if value is not None:
            f.attrs[name] = value

    return mutate


def set_item(name: str, index: int, value: int) -> Callable[[h5py.File], None]:
    def mutate(f: h5py.File) -> None:
        f[name][index] = value

    return mutate


def in_header(offset: int, value: int) -> Callable[[h5py.File], None]:
    """A byte of the first frame's start-of-frame segment: FF C0, length (2), precision, height (2), width (2)."""

    def mutate(f: h5py.File) -> None:
        start = f["frames/jpeg"][:].tobytes().index(b"\xff\xc0")
        f["frames/jpeg"][start + offset] = value

    return mutate


def delete(name: str) -> Callable[[h5py.File], None]:
    def mutate(f: h5py.File) -> None:
        del f[name]

    return mutate


FOREIGN = {
    "another format": (attribute("format", b"photos"), "not a context-motion-shard"),
    "no format": (attribute("format", None), "not a context-motion-shard"),
    "an older version": (attribute("version", np.int64(0)), "format version 0, this program reads 1"),
    "a newer version": (attribute("version", np.int64(2)), "format version 2"),
    "no settings": (attribute("settings", None), "settings"),
    "settings of another program": (attribute("settings", b'{"width": 340}'), "height"),
    "settings that are no settings": (attribute("settings", b"[1]"), "shard-00000"),
    "settings against their hash": (attribute("settings_sha256", b"0" * 64), "own hash"),
    "classes that are no list": (attribute("classes", b"{"), "shard-00000"),
    "a count that is no number": (attribute("rows", b"many"), "shard-00000"),
    "a soft link": (link("motion", h5py.SoftLink("/frames/jpeg")), "motion is missing or a link"),
    "an external link": (link("motion", h5py.ExternalLink("/etc/x.h5", "/motion")), "motion is missing or a link"),
    "a linked group": (link("videos", h5py.SoftLink("/frames")), "videos is missing or a link"),
    "external storage": (external, "motion is not stored contiguously inside"),
    "a virtual dataset": (virtual, "motion is not stored contiguously inside"),
    "a missing dataset": (delete("videos/fps"), "videos/fps is missing"),
    "a group for a dataset": (lambda f: (delete("motion")(f), f.create_group("motion"))[0], "motion is not a dataset"),
    "chunks": (replace("motion", chunks=True), "motion is not stored contiguously"),
    "compression": (replace("frames/jpeg", compression="gzip"), "frames/jpeg is not stored contiguously"),
    "another type": (replace("videos/label", dtype="int64"), "videos/label is not a dataset of type int32"),
    "big endian": (replace("motion", dtype=">i2"), "motion is not a dataset of type int16"),
    "too few videos": (replace("videos/fps", change=lambda x: x[:1]), "videos/fps has shape"),
    "too few frames": (replace("motion", change=lambda x: x[:-1]), "motion has shape"),
    "another grid": (replace("motion", change=lambda x: x[:, :2]), "motion has shape"),
    "offsets out of the file": (set_item("frames/jpeg_offset", -1, 10**12), "frames/jpeg_offset does not run"),
    "offsets out of a dataset": (set_item("videos/path_offset", -1, 10**6), "videos/path_offset does not run"),
    "offsets that step back": (set_item("iframes/jpeg_offset", 1, 5000), "iframes/jpeg_offset does not run"),
    "offsets not from 0": (set_item("videos/frame_offset", 0, 1), "videos/frame_offset does not run"),
    "negative offsets": (set_item("failed/reason_offset", 0, -1), "failed/reason_offset does not run"),
    "I-frames outside": (set_item("iframes/frame", -1, 999), "iframes/frame points outside"),
}


@pytest.mark.parametrize("case", FOREIGN)
def test_foreign_and_damaged_shards_are_refused_by_name(case: str, tmp_path: Path) -> None:
    mutate, words = FOREIGN[case]
    path = write(tmp_path, [14, 3], [("a", "b")]).path
    Shard(path)
    with h5py.File(path, "r+") as f:
        mutate(f)
    with pytest.raises(ValueError) as caught:
        shard = Shard(path)
        for name in DATASETS:  # offsets are looked at when they are first read
            shard[name]
    assert "shard-00000.h5" in str(caught.value) and words in str(caught.value)
    assert any(words in problem for problem in check.file_problems(path))


@pytest.mark.parametrize("kind", ["empty", "text", "missing", "directory"])
def test_what_is_no_hdf5_file_is_refused(kind: str, tmp_path: Path) -> None:
    path = tmp_path / "shard-00000.h5"
    if kind == "directory":
        path.mkdir()
    elif kind != "missing":
        path.write_text("" if kind == "empty" else "hello " * 1000)
    with pytest.raises(ValueError, match=r"shard-00000\.h5 cannot be read as a shard"):
        Shard(path)


def test_a_truncated_shard_is_refused_wherever_it_is_cut(tmp_path: Path) -> None:
    path = write(tmp_path, [14, 3], [("a", "b")]).path
    whole = path.read_bytes()
    for keep in [*range(0, len(whole), len(whole) // 40), len(whole) - 1]:
        path.write_bytes(whole[:keep])
        with pytest.raises(ValueError, match=r"shard-00000\.h5"):
            Shard(path)


def test_a_dataset_beyond_the_end_is_named(tmp_path: Path) -> None:
    path = write(tmp_path, [14, 3], [("a", "b")]).path
    # Written in HDF5's oldest way, which has no checksums over its own records.
    old = tmp_path / "old.h5"
    with h5py.File(path, "r") as f, h5py.File(old, "w", libver=("earliest", "v108")) as copy:
        copy.attrs.update(f.attrs)
        for name in DATASETS:
            copy.create_dataset(name, data=f[name][()])
        start = copy["motion"].id.get_offset()
    Shard(old)
    whole = old.read_bytes()
    header = start.to_bytes(8, "little")
    assert whole.count(header) == 1
    old.write_bytes(whole.replace(header, (len(whole) - 8).to_bytes(8, "little")))
    with pytest.raises(ValueError, match=r"old\.h5: motion (lies outside|cannot be opened: .*invalid)"):
        Shard(old)


def test_zero_length_datasets_are_read_without_mapping(tmp_path: Path) -> None:
    written = write(tmp_path / "failures", [], [("a.avi", "why"), ("b.avi", "not")])
    shard = Shard(written.path)
    assert len(shard) == 0 and shard.failed == written.failures and shard.motion.shape == (0, ROWS, COLS, 2)
    assert check.content_problems(shard) == [] and shard["frames/jpeg"].size == 0
    assert Shard(write(tmp_path / "videos", [3]).path).failed == []
    both = ShardSet(tmp_path / "failures")
    assert len(both) == 0 and both.paths == [] and both.frames.tolist() == [] and len(both.failed) == 2
    assert "videos    0" in check.describe(tmp_path / "failures")


def test_the_writer_refuses_a_spool_that_does_not_match_its_index(tmp_path: Path) -> None:
    spool = Spool(tmp_path / "work")
    spool.folder.mkdir()
    spool.truncate((0,) * len(spool.names))
    video = Video(0, "a", 0, 25.0, (4, 4), np.array([4]), np.array([4]), np.array([0]))
    with pytest.raises(OSError, match="has 0 bytes where its index counts 4"):
        write_shard(tmp_path, 0, Origin(TINY, "", (), {}, 1), 0, 1, [video], [], spool)
    assert [p.name for p in tmp_path.iterdir()] == ["work"]


@pytest.mark.parametrize(
    "name, value", [("width", 15), ("width", 341), ("quantiser", 1), ("quantiser", 32), ("gop", 0), ("jpeg_quality", 0)]
)
def test_settings_refuse_what_no_encoder_takes(name: str, value: int) -> None:
    with pytest.raises(ValueError, match=f"{name} is {value}"):
        Settings(**{name: value})


def test_settings_survive_json() -> None:
    other = Settings(width=176, height=144, gop=6)
    assert Settings.from_json(other.to_json()) == other != Settings() and other.sha256() != Settings().sha256()
    assert other.grid == (9, 11) and Settings().grid == (16, 22)
