"""The report: one file that needs no other, every number linked to its rows, and seen by a real browser."""

from __future__ import annotations

import base64
import io
import json
import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from evaluating import Tiny, evaluate, example
from PIL import Image
from test_retrieval import finding
from test_tables import fixtures, formula, stored

from eval import neighbours, results
from eval.publish import claim, collect, page, plots, tables
from eval.publish.cells import FAMILIES, NINE, cells, published
from eval.results import Data
from preprocess.shards import ShardSet
from train import runs
from train.recipes import RECIPES

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
def report(tiny: Tiny, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A page of every table, three curves, a confusion, a gallery, previews, and a row that is left out."""
    folder = tmp_path_factory.mktemp("report")
    confused = {"classes": NAMES, "confusion": COUNTS, "kind": "classification", "metrics": {"top-1": 84.6}}
    place = {"dataset": "ucf5", "trained_on": "ucf5", "subset": "train"}
    results.write(folder / "runs" / "b", example("small-scratch", **confused, **place))
    bad = results.write(folder / "runs" / "c", example())
    bad.write_text(bad.read_text().replace("25.5", "99.5"))
    for name, changes in ("scenes-s0", {}), ("scenes-s1", {"seed": 1}), ("tried", {"batch_size": 8}):
        run = folder / "runs" / name
        run.mkdir(parents=True)
        config = json.loads(RECIPES["scenes"].config.changed(changes).to_json())
        (run / "run.json").write_text(
            json.dumps(ABOUT | {"recipe": "scenes", "trained_on": "scenes", "config": config})
        )
        lines = [{"epoch": e, "context_accuracy": e / 60, "motion_accuracy": e / 90} for e in range(1, 61)]
        lines[19]["heldout_motion_accuracy"], lines[59]["heldout_motion_accuracy"] = 0.1, 0.3
        lines[59]["heldout_recall"] = 0.5  # a single point makes no line
        (run / "metrics.jsonl").write_text("".join(f"{json.dumps(x)}\n" for x in lines) + '{"epoch": 61, "con')
    altered = {"motion R@1": 77.2, "motion R@1 frozen": 14.4, "opposite R@1 reversed": 60.8}
    scenes = {"dataset": "scenes", "trained_on": "scenes", "subset": "train"}
    results.write(folder / "runs" / "a", example(kind="diagnosis", metrics=altered, **scenes))
    kept, refused = collect.check(stored(folder / "runs", fixtures((*NINE, *FAMILIES))))
    data = Data.open(*tiny)
    found = {"untrained": finding(data), "trained": finding(data)}
    text = page.page(tables.build(kept), kept, refused, folder / "runs", data, found)
    (folder / "report.html").write_text(text, encoding="utf-8")
    return folder / "report.html"


def test_the_page_needs_nothing_but_itself(report: Path) -> None:
    text = report.read_text(encoding="utf-8")
    found = Parsed(text)
    kinds = [source.partition(";base64,")[0] for source in found.sources]
    assert {kind: kinds.count(kind) for kind in kinds} == {
        "data:image/svg+xml": 5 + 2 + 1,  # plots, curves of a recipe and of a changed one, a confusion
        "data:image/webp": 4 * 7 + 4 * 4,  # queries and their neighbours, videos taken apart
    }
    assert all(href.startswith("#") or href == "data:," for href, _ in found.links)
    assert not re.search(r"https?:|@import|url\(|<script|<iframe", text)
    assert len(text) < 3_000_000  # noise, the worst there is to compress


def test_curves_of_training_and_held_out_videos(report: Path) -> None:
    (name, folders, svg), changed = plots.training_curves(report.parent / "runs")
    assert (name, folders) == ("scenes on scenes", ["scenes-s0", "scenes-s1"])  # seeds over one another
    assert changed[:2] == ("scenes on scenes, batch_size 8", ["tried"])  # and no other settings
    said = [text for text in ("context", "motion", "motion, held out", "R@1, held out") if f">{text}<" in svg]
    assert said == ["context", "motion", "motion, held out"]
    assert all(svg.count(f">{text}<") == 1 for text in said)  # two runs, one legend


def test_curves_show_what_kept_epochs_retrieve(report: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    runs_of, drawn = report.parent / "runs", []
    monkeypatch.setattr(plots, "chart", lambda title, series, *_: drawn.append(series))

    def row(run: str, epoch: int, recall: float, when: str = "2026-11", **other: str) -> dict[str, Any]:
        about = {"kind": "retrieval", "network": "video", "dataset": "scenes", "epoch": epoch, "when": when, **other}
        return about | {"file": str(runs_of / run / "results/a.json"), "metrics": {"both R@1": recall, "both R@5": 99}}

    kept = [row("scenes-s0", 5, 30.0), row("scenes-s0", 0, 10.0), row("scenes-s0", 2, 20.0)]
    again = [row("scenes-s0", 5, 40.0, when="2026-12"), row("scenes-s0", 5, 35.0, when="2026-10")]
    others = [row("scenes-s0", 4, 1.0, network="motion"), row("scenes-s0", 4, 2.0, kind="knn")]
    before_and_after = [row("scenes-s1", 0, 10.0), row("scenes-s1", 9, 50.0)]
    rows = [*kept, *again, *others, *before_and_after, {**row("scenes-s0", 4, 3.0), "file": "results.csv"}]
    list(plots.training_curves(runs_of, rows))
    found = [s for series in drawn for s in series if s.style == "o-"]
    assert [(s.name, [*s.points]) for s in found] == [("both R@1 on scenes", [(0, 10, 0), (2, 20, 0), (5, 40, 0)])]


def test_the_page_says_whether_its_program_was_changed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runs, "git_commit", lambda: "ab" * 20 + "+")
    assert f"report</code>, {'ab' * 20}+.</footer>" in page.page([], [], [], tmp_path)


def test_every_number_leads_to_its_rows(report: Path) -> None:
    text = report.read_text(encoding="utf-8")
    found = Parsed(text)
    assert len(found.ids) == len(set(found.ids))
    assert not {href for href, _ in found.links if href.startswith("#")} - {f"#{i}" for i in found.ids}
    # Each seed's link has its number as a tooltip; the row that it leads to says the same.
    said = dict(re.findall(r'<details id="row-(\w+)".*?<dt>metrics</dt><dd>(.*?)</dd>', text))
    seeds = re.findall(r'<a href="#row-(\w+)" title="([\d.]+)">', text)
    assert len(seeds) > 300 and all(re.search(rf" {re.escape(number)}(,|$)", said[row]) for row, number in seeds)
    printed = [value for href, value in found.links if href == "#paper"]
    assert len(printed) == sum(1 for p in published() if re.fullmatch(r"\d+\.\d", p.value))


def test_every_part_is_there(report: Path) -> None:
    text = report.read_text(encoding="utf-8")
    names = {cell.table for cell in cells()}
    assert text.count('<table class="numbers">') == len(names) + 1  # small has one more, on ucf5
    assert names > {*NINE} and all(f'id="table-{name}"' in text for name in names)
    assert re.findall(r'<img class="chart".*?alt="(.*?)"', text) == [
        "plot of table 3", "plot of table 7", "plot of table scenes", "plot of table small", "plot of table ucf20",
        "training of scenes on scenes",
        "training of scenes on scenes, batch_size 8", "confusion of small-scratch on ucf5",
    ]  # fmt: skip
    assert "its name is not the hash of what it holds" in text.split('id="left-out"')[1]
    assert "not run" in text and "<p>split: protocol.</p>" in text and "<code>14.mp4</code>" in text
    # The labels of the tiny videos: a/right, b/right, a/left, b/left, and again; a query of each finds the first three.
    finds = [re.findall(r"border-color:(.*?)\">.*?<figcaption>(.*?)<", find) for find in text.split('class="find"')[1:]]
    assert [find[:3] for find in finds] == [find[3:] for find in finds]
    found, half, missed = neighbours.FOUND, neighbours.HALF, neighbours.MISSED
    assert finds[0][:3] == [(half, "½ a/right"), (missed, "✗ b/right"), (found, "✓ a/left")]


def bars(text: str) -> list[tuple[str, str, float]]:
    """(network, the row that it leads to, height) of every bar of the first screen."""
    found = re.findall(r'<a class="([\w-]+)" href="#row-(\w+)" title="[^"]*" style="--value:([\d.]+);', text)
    return [(network, row, float(height)) for network, row, height in found]


def test_the_first_screen_claims_what_ran(report: Path) -> None:
    text = report.read_text(encoding="utf-8")
    first, _, rest = text.partition('<section id="tables">')
    drawn, wanted = bars(first), []
    for part in ("context", "motion", "both"):
        for network, epoch in {"untrained": 0, "scenes-context": 60, "scenes-motion": 60, "scenes": 60}.items():
            what = (f"{part} R@1", "retrieval", network if epoch else "scenes", "", "video", "scenes", epoch)
            wanted.append((network, pytest.approx(np.mean([formula(seed, *what) for seed in range(3)]), abs=0.051)))
    assert [(network, height) for network, _, height in drawn] == wanted
    assert not bars(rest) and all(f'id="row-{row}"' in rest for _, row, _ in drawn)
    said = re.sub("<.*?>", "", first)
    assert "Mean ± deviation of 3 seeds." in said
    assert "77 % of its neighbours move" in said and "14 % where" in said and "61 % move the opposite way" in said


def test_the_first_screen_claims_nothing_that_did_not_run() -> None:
    metrics = {f"{part} R@1": 50.0 for part in ("context", "motion", "both")}
    place: dict[str, Any] = {"dataset": "scenes", "trained_on": "scenes", "subset": "train", "metrics": metrics}
    chances = {"chance": dict.fromkeys(metrics, 16.7)}
    after = example(**place, file="", id="after", **chances)
    assert bars(claim.screen(tables.build([after]), [after])) == []
    before = example(**place, file="", id="before", epoch=0.0, weights="initial")
    text = claim.screen(tables.build([after, before]), [after, before])
    assert bars(text) == [("untrained", "before", 50.0), ("scenes", "after", 50.0)] * 3
    assert text.count('<i style="--value:16.7">') == 3 and "One seed; dashes: by chance." in text
    assert "frozen" not in text


def test_a_familys_table_begins_with_chance(tmp_path: Path) -> None:
    place: dict[str, Any] = {"dataset": "scenes", "trained_on": "scenes", "subset": "train", "file": "", "id": "row"}
    row = example(**place, metrics={"motion R@1": 50.0}, chance={"motion R@1": 16.7})
    text = page.page(tables.build([row], ["scenes"]), [row], [], tmp_path)
    assert "<tbody><tr><th>chance</th><td></td><td>16.7</td><td></td></tr><tr><th>untrained" in text


def test_the_pictures_of_a_clip_are_its_frames(tiny: Tiny) -> None:
    frames, rate = neighbours.moving(ShardSet(tiny[0]), 13)
    picture = decoded(page.animation(frames, rate))
    assert (picture.n_frames, picture.size) == (16, (112, 92))  # type: ignore[attr-defined]
    for number, frame in enumerate(frames):
        picture.seek(number)
        assert np.abs(np.asarray(picture.convert("RGB"), float) - frame).mean() < 12
    assert picture.info["duration"] == 80
    still = decoded(page.animation([np.full((172, 456, 3), 9, np.uint8)], 1))
    assert (still.n_frames, still.size) == (1, (228, 86))  # type: ignore[attr-defined]


def decoded(source: str) -> Image.Image:
    return Image.open(io.BytesIO(base64.b64decode(source.partition(",")[2])))


# ---- in a browser

SEEN = """
<script>addEventListener("load", async () => {
  // Not decode(): the browser's virtual time does not wait for it.
  const loaded = i => i.complete ? 0 : new Promise(done => { i.onload = i.onerror = done; });
  await Promise.all([...document.images].map(i => { i.loading = "eager"; return loaded(i); }));
  const box = e => e.getBoundingClientRect();
  document.title = "SEEN" + JSON.stringify({
    tables: [...document.querySelectorAll("table.numbers")].filter(t => box(t).height > 60).length,
    charts: [...document.querySelectorAll("img.chart")].filter(i => i.naturalWidth > 200 && box(i).width > 200).length,
    pictures: [...document.querySelectorAll("figure img")].filter(i => i.naturalWidth > 50).length,
    dead: [...document.querySelectorAll("a[href^='#']")].filter(a => !document.querySelector(a.hash)).length,
    overflow: document.documentElement.scrollWidth - document.documentElement.clientWidth,
    bars: [...document.querySelectorAll(".bars a")].filter(a => Math.abs(
      box(a).height / box(a.parentNode).height - getComputedStyle(a).getPropertyValue("--value") / 100) < 0.02).length,
    first: box(document.querySelector(".claim"))[innerWidth > 800 ? "bottom" : "top"] <= innerHeight,
    requests: performance.getEntriesByType("resource").filter(r => !r.name.startsWith("data:")).length,
  });
})</script>
"""


@pytest.mark.parametrize("width", [1280, 390])
def test_a_browser_shows_all_of_it(report: Path, tmp_path: Path, width: int) -> None:
    browser = next((b for b in ("chromium", "chromium-browser", "google-chrome") if shutil.which(b)), None)
    if browser is None:
        pytest.skip("no chromium or google-chrome on the path: apt-get install chromium")
    opened = tmp_path / "opened.html"
    opened.write_text(report.read_text(encoding="utf-8") + SEEN, encoding="utf-8")
    flags = ["--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path / 'profile'}"]
    flags += ["--proxy-server=127.0.0.1:9", f"--window-size={width},900", "--virtual-time-budget=20000", "--dump-dom"]
    done = subprocess.run([browser, *flags, opened.as_uri()], capture_output=True, text=True, timeout=120)
    said = re.search(r"<title>SEEN(.*?)</title>", done.stdout)
    assert said, done.stderr[-2000:]
    assert json.loads(said[1].replace("&quot;", '"')) == {
        "tables": len({cell.table for cell in cells()}) + 1,
        "charts": 8,
        "pictures": 4 * 7 + 4 * 4,
        "dead": 0,
        "overflow": 0,
        "bars": 3 * 4,
        "first": True,
        "requests": 0,
    }


# ---- the command


def test_the_command_writes_a_page_from_rows_and_shards(
    tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    results.write(tmp_path / "runs" / "a", example(dataset="scenes", trained_on="scenes", subset="train"))
    out = tmp_path / "new" / "report.html"
    options = ["--runs", tmp_path / "runs", "--out", out]
    assert evaluate(monkeypatch, "report", *options, "--shards", tiny[0], "--manifest", tiny[1]) == 0
    text = out.read_text(encoding="utf-8")
    assert '<section id="motion">' in text and '<section id="retrieval">' not in text and ">25.5</a>" in text
    assert evaluate(monkeypatch, "report", *options, "--shards", tiny[0]) == 1
    assert "need both --shards and --manifest" in capsys.readouterr().err
    elsewhere = Path(__file__).parents[1] / "data_manifests" / "ucf20.csv"
    assert evaluate(monkeypatch, "report", *options, "--shards", tiny[0], "--manifest", elsewhere) == 1
    assert "paths of the manifest are in no shard" in capsys.readouterr().err
