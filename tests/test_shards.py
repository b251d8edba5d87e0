"""The shard format: what is written is what is read, what is damaged or foreign is refused, a folder is one table."""

from __future__ import annotations

import hashlib
import multiprocessing
import pickle
import re
import shutil
import textwrap
from pathlib import Path
from typing import Any, NamedTuple

import h5py
import numpy as np
import pytest
import simplejpeg
from conftest import ROOT
from hypothesis import given, settings
from hypothesis import strategies as st

from preprocess import check, shards
from preprocess.schema import INTRA, Failure, Origin, Settings
from preprocess.shards import Shard, ShardSet, open_shard
from preprocess.writer import Spool, Video, write_shard

TINY = Settings(width=64, height=34, frame_width=32, frame_height=16)  # a grid of 3 x 4, which overhangs the height
ROWS, COLS = 3, 4

# The contract, written out once more: type and number of dimensions of every dataset.
DATASETS = {
    **dict.fromkeys(("videos/row", "failed/row", "iframes/frame"), ("<i8", 1)),
    **dict.fromkeys(("videos/path", "frames/jpeg", "iframes/jpeg", "failed/path", "failed/reason"), ("|u1", 1)),
    **dict.fromkeys(("videos/path_offset", "videos/frame_offset", "frames/jpeg_offset"), ("<i8", 1)),
    **dict.fromkeys(("iframes/jpeg_offset", "failed/path_offset", "failed/reason_offset"), ("<i8", 1)),
    **dict.fromkeys(("videos/label", "videos/decode_errors"), ("<i4", 1)),
    "videos/fps": ("<f8", 1),
    "videos/source_size": ("<i4", 2),
    "motion": ("<i2", 4),
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
    spool = Spool(folder / f"work{number}")
    spool.folder.mkdir(parents=True)
    made = Written(folder / f"shard-{number:05d}.h5", [], [], [], [], [])
    for k, length in enumerate(lengths):
        pictures = [jpeg(rng, options.frame_height, options.frame_width) for _ in range(length)]
        intra = [jpeg(rng, options.height, options.width) for _ in range(0, length, options.gop)]
        motion = rng.integers(-60, 60, (length, ROWS, COLS, 2), np.int16)
        motion[:: options.gop] = INTRA
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
        made.videos.append(video)
        made.jpegs.append(pictures)
        made.iframes.append(intra)
        made.motion.append(motion)
    spool.path("frames").write_bytes(b"".join(b"".join(pictures) for pictures in made.jpegs))
    spool.path("iframes").write_bytes(b"".join(b"".join(pictures) for pictures in made.iframes))
    spool.path("motion").write_bytes(b"".join(motion.tobytes() for motion in made.motion))
    made.failures.extend(Failure(first_row + len(lengths) + k, *f) for k, f in enumerate(failed or []))
    rows = len(lengths) + len(made.failures)
    origin = Origin(options, manifest, classes, {"codec": "1.2"}, shards)
    write_shard(folder, number, origin, first_row, rows, made.videos, made.failures, spool)
    shutil.rmtree(spool.folder)
    return made


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


@given(st.lists(st.integers(1, 26), max_size=4), st.lists(st.tuples(text, text), max_size=3))
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
    shard = Shard(path)
    assert not any(shard[name].flags.owndata for name in DATASETS), "columns are views of the file"
    with pytest.raises(ValueError, match="read-only"):
        shard.motion[0] = 0


def make_anew(f: h5py.File, name: str, data: np.ndarray | None = None, **options: object) -> None:
    """Store a dataset again, with other data or in another way."""
    data = f[name][()] if data is None else data
    del f[name]
    f.create_dataset(name, data=data, **options)


def link(f: h5py.File, name: str, target: str) -> None:
    del f[name]
    f[name] = h5py.SoftLink(target)


def put(f: h5py.File, name: str, index: int, value: int) -> None:
    f[name][index] = value


def in_header(f: h5py.File, offset: int, value: int) -> None:
    """A byte of the first frame's start-of-frame segment: FF C0, length (2), precision, height (2), width (2)."""
    put(f, "frames/jpeg", f["frames/jpeg"][:].tobytes().index(b"\xff\xc0") + offset, value)


FOREIGN = {
    "another format": (lambda f: f.attrs.create("format", b"photos"), "not a context-motion-shard"),
    "an older version": (lambda f: f.attrs.create("version", np.int64(0)), "format version 0, this program reads 1"),
    "a newer version": (lambda f: f.attrs.create("version", np.int64(2)), "format version 2"),
    "no settings": (lambda f: f.attrs.pop("settings"), "settings"),
    "settings of another program": (lambda f: f.attrs.create("settings", b'{"width": 340}'), "height"),
    "settings against their hash": (lambda f: f.attrs.create("settings_sha256", b"0" * 64), "own hash"),
    "classes that are no list": (lambda f: f.attrs.create("classes", b"{"), "shard-00000"),
    "a count that is no number": (lambda f: f.attrs.create("rows", b"many"), "shard-00000"),
    "a soft link": (lambda f: link(f, "motion", "/frames/jpeg"), "motion is missing or a link"),
    "a linked group": (lambda f: link(f, "videos", "/frames"), "videos is missing or a link"),
    "a missing dataset": (lambda f: f.pop("videos/fps"), "videos/fps is missing"),
    "a group for a dataset": (lambda f: (f.pop("motion"), f.create_group("motion")), "motion is not a dataset"),
    "chunks": (lambda f: make_anew(f, "motion", chunks=True), "motion is not stored contiguously"),
    "another type": (lambda f: make_anew(f, "videos/label", dtype="int64"), "videos/label is not a dataset of type"),
    "big endian": (lambda f: make_anew(f, "motion", dtype=">i2"), "motion is not a dataset of type int16"),
    "too few videos": (lambda f: make_anew(f, "videos/fps", f["videos/fps"][:1]), "videos/fps has shape"),
    "another grid": (lambda f: make_anew(f, "motion", f["motion"][:, :2]), "motion has shape"),
    "offsets out of the file": (lambda f: put(f, "frames/jpeg_offset", -1, 10**12), "frames/jpeg_offset does not run"),
    "offsets that step back": (lambda f: put(f, "iframes/jpeg_offset", 1, 5000), "iframes/jpeg_offset does not run"),
    "offsets not from 0": (lambda f: put(f, "videos/frame_offset", 0, 1), "videos/frame_offset does not run"),
    "negative offsets": (lambda f: put(f, "failed/reason_offset", 0, -1), "failed/reason_offset does not run"),
    "I-frames outside": (lambda f: put(f, "iframes/frame", -1, 999), "iframes/frame points outside"),
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


def test_what_is_no_whole_hdf5_file_is_refused(tmp_path: Path) -> None:
    path = write(tmp_path, [14, 3], [("a", "b")]).path
    whole = path.read_bytes()
    for content in [b"hello " * 1000, *(whole[:keep] for keep in [*range(0, len(whole), len(whole) // 20), -1])]:
        path.write_bytes(content)
        with pytest.raises(ValueError, match=r"shard-00000\.h5 cannot be read as a shard"):
            Shard(path)
    for absent in tmp_path / "none.h5", tmp_path:
        with pytest.raises(ValueError, match=f"{absent.name} cannot be read as a shard"):
            Shard(absent)


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


# ---- a folder of shards


@pytest.fixture
def three(tmp_path: Path) -> list[Written]:
    """A set of three shards in tmp_path: two videos and a failure, one video, no video."""
    return [
        write(tmp_path, [14, 3], [("x", "y")], number=0, shards=3),
        write(tmp_path, [25], number=1, shards=3, first_row=3),
        write(tmp_path, [], [("z", "w")], number=2, shards=3, first_row=4),
    ]


def test_a_set_is_one_table(three: list[Written], tmp_path: Path) -> None:
    shards = ShardSet(tmp_path)
    assert len(shards) == 3 and shards.frames.tolist() == [14, 3, 25] and shards.label.tolist() == [-1, 0, -1]
    assert shards.paths == [v.path for w in three for v in w.videos]
    assert [(s.number, k) for s, k in map(shards.locate, range(3))] == [(0, 0), (0, 1), (1, 0)]
    assert shards.failed == [f for w in three for f in w.failures]


def test_an_unfinished_set_is_refused_naming_what_lacks(three: list[Written], tmp_path: Path) -> None:
    three[1].path.unlink()
    with pytest.raises(ValueError, match=r"lacks 1 of 3 shards \(\[1\].*run the same"):
        ShardSet(tmp_path)
    with pytest.raises(ValueError, match="holds no shards"):
        ShardSet(tmp_path / "work")


@pytest.mark.parametrize(
    "options, words",
    [
        ({"options": Settings(width=64, height=34, quantiser=5)}, "settings.quantiser: 5 there, 2 here"),
        ({"manifest": "1" * 64, "first_row": 2}, "manifests that do not follow each other"),
        ({"shards": 4}, "lacks 1 of 4 shards"),
    ],
)
def test_mixed_sets_are_refused_naming_what_differs(
    three: list[Written], tmp_path: Path, options: dict, words: str
) -> None:
    write(tmp_path, [2], number=1, **({"shards": 3, "first_row": 3} | options))
    with pytest.raises(ValueError) as caught:
        ShardSet(tmp_path)
    assert words in str(caught.value)
    assert "options" not in options or "shard-00001.h5 does not belong with shard-00000.h5" in str(caught.value)


def test_a_video_of_two_manifests_is_refused(three: list[Written], tmp_path: Path) -> None:
    """The second shard is the first again, as shuffled manifests would make it."""
    shutil.copy(three[0].path, three[1].path)
    with h5py.File(three[1].path, "r+") as f:
        f.attrs.update(shard=1, first_row=3, rows=1, manifest_sha256=b"1" * 64)
    with pytest.raises(ValueError, match="manifests that do not follow each other"):
        ShardSet(tmp_path)


def test_rows_and_classes_that_were_appended_belong_to_the_set(tmp_path: Path) -> None:
    """Labels number the classes of each shard: a class that came between them renumbers those of the set."""
    write(tmp_path, [1, 1, 1])
    write(tmp_path, [1] * 4, number=1, shards=2, first_row=3, manifest="1" * 64, classes=("climb", "Dance", "golf"))
    shards = ShardSet(tmp_path)
    assert shards.classes == ["climb", "Dance", "golf"]
    assert shards.label.tolist() == [-1, 0, 2, -1, 0, 1, -1]


def read_everything(shards: ShardSet) -> list[int]:
    """A checksum of every video, as a worker sees it."""
    sums = []
    for video in range(len(shards)):
        shard, k = shards.locate(video)
        start, end = shard.frame_offset[k : k + 2]
        pictures = b"".join(bytes(shard.frame_jpeg(f)) for f in range(start, end))
        sums.append(int(hashlib.sha256(pictures + shard.motion[start:end].tobytes()).hexdigest()[:12], 16))
    return sums


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_a_set_in_use_reads_the_same_in_other_processes(method: str, three: list[Written], tmp_path: Path) -> None:
    shards = ShardSet(tmp_path)
    expected = read_everything(shards)
    with multiprocessing.get_context(method).Pool(2) as pool:
        assert pool.map(read_everything, [shards, shards]) == [expected, expected]


def test_a_shard_that_was_replaced_is_not_read_as_what_it_was(tmp_path: Path) -> None:
    write(tmp_path / "before", [5, 3], [("gone.avi", "gone")])
    write(tmp_path / "after", [5, 3, 4])
    place = tmp_path / "before/shard-00000.h5"
    shards = pickle.loads(pickle.dumps(ShardSet(tmp_path / "before")))  # as a worker gets it, which maps it anew
    (tmp_path / "after/shard-00000.h5").replace(place)
    with pytest.raises(FileNotFoundError, match="was replaced since it was opened"):
        read_everything(shards)


def test_what_is_opened_to_be_read_later_stays_what_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = write(tmp_path / "before", [5, 3], [("gone.avi", "gone")])
    after = write(tmp_path / "after", [5, 3, 4])
    opened, read = open_shard(before.path), shards._map
    monkeypatch.setattr(shards, "_map", lambda path: read(after.path.replace(path)))  # between opening and mapping it
    assert open_shard(before.path) is None
    assert opened is not None
    assert_holds(opened, before)


def test_pickling_carries_no_data(tmp_path: Path) -> None:
    sizes = []
    for name, lengths in ("short", [2, 2]), ("long", [200, 200]):
        write(tmp_path / name, lengths)
        shards = ShardSet(tmp_path / name)
        read_everything(shards)
        sizes.append(len(pickle.dumps(shards)))
    assert abs(sizes[1] - sizes[0]) < 200 and sizes[1] < 10_000


def test_the_readme_reads_a_shard_with_h5py_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The block as it is printed, on a shard at the path that it names."""
    blocks = re.findall(r"(?:^    .*\n)+", (ROOT / "README.md").read_text(encoding="utf-8"), re.M)
    (block,) = (textwrap.dedent(b) for b in blocks if "h5py.File(" in b)
    (named,) = re.findall(r'h5py\.File\("(.+?)"', block)
    written = write((tmp_path / named).parent, [14, 3])
    assert written.path == tmp_path / named
    monkeypatch.chdir(tmp_path)
    found: dict[str, Any] = {}
    exec(block, found)
    for frame, picture in zip(found["frames"], written.jpegs[0], strict=True):
        np.testing.assert_array_equal(frame, simplejpeg.decode_jpeg(picture))
    np.testing.assert_array_equal(found["motion"], written.motion[0])
