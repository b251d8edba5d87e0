"""The report: one file that needs no other, every number linked to its rows, and seen by a real browser."""

from __future__ import annotations

import base64
import io
import json
import re
import shutil
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
import simplejpeg
from PIL import Image
from test_rows import example
from test_tables import fixtures, stored

from eval import __main__ as command
from eval import moving, report, rows, tables
from eval.cells import FAMILIES, NINE, published
from eval.gallery import FOUND, HALF, MISSED
from eval.retrieve import Retrieval
from preprocess.shards import ShardSet
from train import runs

Tiny = tuple[Path, Path]
NAMES = ["Biking", "Diving", "YoYo"]
COUNTS = [[5, 0, 0], [1, 2, 1], [0, 0, 4]]
ABOUT = {name: kind() for name, kind in runs.KEYS.items()}


class Parsed(HTMLParser):
    """Identifiers, links and sources of a page, and the text of every element that has an id or a link."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.ids: list[str] = []
        self.links: list[tuple[str, str]] = []
        self.sources: list[str] = []
        self.tags: dict[str, int] = {}
        self.inside: str | None = None
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        found = dict(attrs)
        self.tags[tag] = self.tags.get(tag, 0) + 1
        if "id" in found:
            self.ids.append(found["id"] or "")
        if "src" in found:
            self.sources.append(found["src"] or "")
        if "href" in found:
            self.inside = found["href"] or ""
            self.links.append((self.inside, ""))

    def handle_data(self, data: str) -> None:
        if self.inside is not None:
            self.links[-1] = (self.inside, self.links[-1][1] + data)

    def handle_endtag(self, tag: str) -> None:
        if tag in ("a", "link"):
            self.inside = None


@pytest.fixture(scope="module")
def pictures(tiny: Tiny) -> tuple[list[moving.Found], list[moving.Preview]]:
    shards = ShardSet(tiny[0])
    order = np.arange(8)[:, None] % 4 + np.arange(4)
    found = Retrieval(np.arange(12, 20), np.arange(12), order, {})
    return moving.neighbours(shards, {"untrained": found, "trained": found}), moving.previews(shards, np.arange(12, 20))


@pytest.fixture(scope="module")
def page(pictures: tuple[list, list], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A page of every table, two curves, a confusion, a gallery, previews, and a row that is left out."""
    folder = tmp_path_factory.mktemp("report")
    confused = {"classes": NAMES, "confusion": COUNTS, "kind": "classification", "metrics": {"top-1": 84.6}}
    place = {"dataset": "ucf5", "trained_on": "ucf5", "subset": "train"}
    rows.write(folder / "runs" / "b", example("small-scratch", **confused, **place))
    bad = rows.write(folder / "runs" / "c", example())
    bad.write_text(bad.read_text().replace("25.5", "99.5"))
    for name in ("scenes-s0", "scenes-s1"):
        run = folder / "runs" / name
        run.mkdir(parents=True)
        (run / "run.json").write_text(json.dumps(ABOUT | {"recipe": "scenes", "trained_on": "scenes"}))
        lines = [{"epoch": e, "context_accuracy": e / 60, "motion_accuracy": e / 90} for e in range(1, 61)]
        (run / "metrics.jsonl").write_text("".join(f"{json.dumps(x)}\n" for x in lines) + '{"epoch": 61, "con')
    kept, refused = rows.check(stored(folder / "runs", fixtures((*NINE, *FAMILIES))))
    text = report.page(tables.build(kept), kept, refused, folder / "runs", *pictures, "about the gallery")
    (folder / "report.html").write_text(text, encoding="utf-8")
    return folder / "report.html"


def test_the_page_needs_nothing_but_itself(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    found = Parsed(text)
    assert all(source.startswith("data:image/webp;base64,") for source in found.sources)
    assert all(href.startswith("#") or href == "data:," for href, _ in found.links)
    assert not re.search(r"https?:|@import|url\(|<script|<iframe", text)
    assert len(text) < 3_000_000  # noise, the worst there is to compress


def test_every_number_leads_to_its_rows(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    found = Parsed(text)
    assert len(found.ids) == len(set(found.ids))
    assert not {href for href, _ in found.links if href.startswith("#")} - {f"#{i}" for i in found.ids}
    # Each seed's link has its number as a tooltip; the row that it leads to says the same.
    said = dict(re.findall(r'<details id="row-(\w+)".*?<dt>metrics</dt><dd>(.*?)</dd>', text))
    seeds = re.findall(r'<a href="#row-(\w+)" title="([\d.]+)">', text)
    assert len(seeds) > 300 and all(re.search(rf" {re.escape(number)}(,|$)", said[row]) for row, number in seeds)
    printed = [value for href, value in found.links if href == "#paper"]
    assert len(printed) == sum(1 for p in published() if re.fullmatch(r"\d+\.\d", p.value))


def test_every_part_is_there(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    assert text.count('<table class="numbers">') == 12  # the nine, scenes, small, and small on ucf5
    assert all(f'id="table-{name}"' in text for name in (*NINE, *FAMILIES))
    charts = re.findall(r'<svg class="chart".*?aria-label="(.*?)"', text)
    assert [c.split(".")[0] for c in charts] == [
        "Table 3", "Table 7", "How alpha moves what is learned (scenes)", "Training of scenes on scenes",
    ]  # fmt: skip
    assert "its name is not the hash of what it holds" in text.split('id="left-out"')[1]
    assert "not run" in text and "about the gallery" in text and text.count("<figure>") == 4 * 7 + 4 * 4


def test_a_confusion_is_drawn_as_counted() -> None:
    drawn = report.confusion(NAMES, COUNTS)
    boxes = re.findall(r'<rect class="cell" x="(\d+)" y="(\d+)".*?fill-opacity="([\d.]+)"><title>(.*?)</title>', drawn)
    left = 14 + 6 * len("Biking")
    assert boxes == [
        (str(left), "8", "0.90", "Biking taken for Biking: 5 of 5"),
        (str(left), "32", f"{0.08 + 0.82 / 4:.2f}", "Diving taken for Biking: 1 of 4"),
        (str(left + 24), "32", "0.49", "Diving taken for Diving: 2 of 4"),
        (str(left + 48), "32", f"{0.08 + 0.82 / 4:.2f}", "Diving taken for YoYo: 1 of 4"),
        (str(left + 48), "56", "0.90", "YoYo taken for YoYo: 4 of 4"),
    ]
    many = report.confusion([f"c{n}" for n in range(101)], np.eye(101, dtype=int).tolist())
    assert many.count('<rect class="cell"') == 101 and "<text" not in many


# ---- moving pictures


def decoded(source: str) -> Image.Image:
    return Image.open(io.BytesIO(base64.b64decode(source.partition(",")[2])))


def test_a_clip_is_the_middle_of_its_video(tiny: Tiny) -> None:
    shards = ShardSet(tiny[0])
    frames, rate = moving.clip(shards, 13)
    shard, index = shards.locate(13)
    first = int(shard.frame_offset[index])  # 40 frames at 25 a second: 31 of them from the fifth on, every other one
    expected = [simplejpeg.decode_jpeg(shard.frame_jpeg(first + 4 + 2 * n), colorspace="RGB") for n in range(16)]
    np.testing.assert_array_equal(frames, expected)
    assert rate == 12.5
    picture = decoded(moving.animation(frames, rate))
    assert (picture.n_frames, picture.size) == (16, (112, 92))  # type: ignore[attr-defined]
    shown = []
    for number, frame in enumerate(expected):
        picture.seek(number)
        shown.append(np.abs(np.asarray(picture.convert("RGB"), float) - frame).mean())
    assert max(shown) < 12 and picture.info["duration"] == 80
    assert decoded(moving.animation(frames[:1], 1)).n_frames == 1  # type: ignore[attr-defined]


def test_motion_has_the_colour_of_its_direction(tiny: Tiny) -> None:
    shards = ShardSet(tiny[0])
    channels = {}
    for video in (12, 14):  # labelled a/right and a/left
        frames, _ = moving.clip(shards, video, "motion")
        channels[shards.classes[shards.label[video]]] = np.mean([f[20:70, 20:90].mean((0, 1)) for f in frames], 0)
    right, left = channels["a/right"], channels["a/left"]
    assert right[0] > right[1] + 30 and right[0] > right[2] + 30  # red
    assert left[2] > left[0] + 30  # towards azure
    assert len(moving.clip(shards, 12, "arrows")[0]) == 16


def test_neighbours_are_framed_by_what_they_share(pictures: tuple[list, list]) -> None:
    finds, previews = pictures
    assert [f.query.label for f in finds] == ["a/left", "a/right", "b/left", "b/right"]
    assert set(finds[0].neighbours) == {"untrained", "trained"}
    for found in finds:
        for clip in found.neighbours["trained"]:
            same = [a == b for a, b in zip(found.query.label.split("/"), clip.label[2:].split("/"))]
            assert clip.label[0] == "✗½✓"[sum(same)]
            assert clip.verdict == [MISSED, HALF, FOUND][sum(same)]
    assert [len(p.pictures) for p in previews] == [4] * 4 and previews[0].path == "14.mp4"


# ---- in a browser

SEEN = """
<script>addEventListener("load", async () => {
  // Not decode(): the browser's virtual time does not wait for it.
  const loaded = i => i.complete ? 0 : new Promise(done => { i.onload = i.onerror = done; });
  await Promise.all([...document.images].map(i => { i.loading = "eager"; return loaded(i); }));
  const box = e => e.getBoundingClientRect();
  document.title = "SEEN" + JSON.stringify({
    tables: [...document.querySelectorAll("table.numbers")].filter(t => box(t).height > 60).length,
    plots: [...document.querySelectorAll("svg.chart polyline")].filter(p => box(p).width > 100).length,
    confusions: document.querySelectorAll("svg.confusion rect.cell").length,
    pictures: [...document.images].filter(i => i.naturalWidth > 50).length,
    dead: [...document.querySelectorAll("a[href^='#']")].filter(a => !document.querySelector(a.hash)).length,
    overflow: document.documentElement.scrollWidth - document.documentElement.clientWidth,
    requests: performance.getEntriesByType("resource").filter(r => !r.name.startsWith("data:")).length,
    colour: getComputedStyle(document.querySelector(".chart .k0")).stroke,
  });
})</script>
"""


@pytest.mark.parametrize("width", [1280, 390])
def test_a_browser_shows_all_of_it(page: Path, tmp_path: Path, width: int) -> None:
    browser = next((b for b in ("chromium", "chromium-browser", "google-chrome") if shutil.which(b)), None)
    if browser is None:
        pytest.skip("no chromium or google-chrome on the path")
    opened = tmp_path / "opened.html"
    opened.write_text(page.read_text(encoding="utf-8") + SEEN, encoding="utf-8")
    flags = ["--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path / 'profile'}"]
    flags += ["--proxy-server=127.0.0.1:9", f"--window-size={width},900", "--virtual-time-budget=20000", "--dump-dom"]
    done = subprocess.run([browser, *flags, opened.as_uri()], capture_output=True, text=True, timeout=120)
    said = re.search(r"<title>SEEN(.*?)</title>", done.stdout)
    assert said, done.stderr[-2000:]
    assert json.loads(said[1].replace("&quot;", '"')) == {
        "tables": 12,
        "plots": 6 + 6 + 3 + 4,
        "confusions": 5,
        "pictures": 4 * 7 + 4 * 4,
        "dead": 0,
        "overflow": 0,
        "requests": 0,
        "colour": "rgb(37, 99, 235)",
    }


# ---- the command


def run_report(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> int:
    monkeypatch.setattr(sys, "argv", ["python -m eval", "report", *map(str, arguments)])
    return command.main()


def test_the_command_writes_a_page_from_rows_and_shards(
    tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    rows.write(tmp_path / "runs" / "a", example(dataset="scenes", trained_on="scenes", subset="train"))
    out = tmp_path / "new" / "report.html"
    options = ["--runs", tmp_path / "runs", "--out", out]
    assert run_report(monkeypatch, *options, "--shards", tiny[0], "--manifest", tiny[1]) == 0
    text = out.read_text(encoding="utf-8")
    assert '<section id="motion">' in text and '<section id="retrieval">' not in text and ">25.5</a>" in text
    assert run_report(monkeypatch, *options, "--shards", tiny[0]) == 1
    assert "need both --shards and --manifest" in capsys.readouterr().err
