"""Held-out videos while a run trains: by the numbers that others make of its weights, and without any trace in it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import tiny_config
from evaluating import CPU
from running import RUNTIME, Tiny, assert_same_run, lines, run_again, start
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from test_resample import pillow

from eval import pretext
from eval.results import Data
from preprocess.manifest import Manifest
from preprocess.shards import ShardSet
from train import checkpoint, heldout
from train.data import ClipSet
from train.draws import Sampling
from train.heldout import HeldOut, epochs_between, hold_out
from train.metrics import dense
from train.model import build_model
from train.trained import load_run

WATCHED = replace(RUNTIME, watch_epochs=2, watch="tensorboard")
KEYS = {"heldout_context_accuracy", "heldout_motion_accuracy", "heldout_recall"}


@pytest.fixture(scope="module")
def watched(tiny: Tiny, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run of `undisturbed`, which looks at held-out videos after its second epoch and after the last, the third."""
    out = tmp_path_factory.mktemp("watched") / "run"
    measure = HeldOut.measure

    def without_draws(*arguments: Any) -> dict[str, float]:
        before = torch.get_rng_state()
        found = measure(*arguments)
        assert torch.equal(torch.get_rng_state(), before)
        return found

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(HeldOut, "measure", without_draws)
        start(tiny, out, runtime=WATCHED, watched=True)
    return out


def test_looking_changes_nothing_of_what_is_learned(watched: Path, undisturbed: Path) -> None:
    first, second = (checkpoint.load(out / "checkpoint.pt") for out in (watched, undisturbed))
    for part in ("model", "optimiser"):  # running statistics with them
        torch.testing.assert_close(first[part], second[part], rtol=0, atol=0)
    looked = {line["step"]: KEYS & set(line) for line in lines(watched)}
    assert {step for step, found in looked.items() if found == KEYS} == {12, 18} and set() in looked.values()
    assert [{k: v for k, v in line.items() if k not in KEYS} for line in lines(watched)] == lines(undisturbed)


@pytest.mark.parametrize("at", [9, 13])
def test_an_interrupted_run_looks_as_an_undisturbed_one(
    tiny: Tiny, watched: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, at: int
) -> None:
    def interrupt(_: torch.Tensor) -> None:
        raise KeyboardInterrupt

    run_again(monkeypatch, at, interrupt)
    with pytest.raises(KeyboardInterrupt):
        start(tiny, tmp_path, runtime=replace(WATCHED, loader_workers=1), watched=True)
    start(tiny, tmp_path, runtime=WATCHED, watched=True)
    assert_same_run(tmp_path, watched)


def test_the_numbers_are_those_of_the_last_weights(tiny: Tiny, watched: Path) -> None:
    """Pretext tasks as eval measures them; neighbours from clips that Pillow crops, features averaged by hand."""
    last, run, data = lines(watched)[-1], load_run(watched), Data.open(*tiny)
    for name, value in pretext.measure(run, data, CPU).metrics.items():
        assert 100 * last[f"heldout_{name.replace(' ', '_')}"] == pytest.approx(value)
    features: dict[str, list[tuple[str, np.ndarray]]] = {"test": [], "train": []}
    network = run.model.video.eval()
    for subset, found in features.items():
        clips = ClipSet(data.shards, data.manifest.subset(subset), run.config.sampling, clips=1)
        for sample in (clips[i] for i in range(len(clips))):
            side = 7 / 8 * 144  # of the encoded frame, 176 x 144
            box = (0.5 - side / 176 / 2, 0.5 - 7 / 16, 0.5 + side / 176 / 2, 0.5 + 7 / 16)
            planes = sample["clips"][0].transpose(3, 0, 1, 2).astype(np.float32)  # (3, T, h, w)
            clip = np.array([[pillow(plane, box, False, 32) for plane in colour] for colour in planes]) / 255
            normal = [(c - m) / s for c, m, s in zip(clip, (0.485, 0.456, 0.406), (0.229, 0.224, 0.225))]
            with torch.no_grad():
                maps = network.forward_pretrain(torch.from_numpy(np.stack(normal)).float()[None])[0].numpy()
            vector = maps.reshape(len(maps), -1).sum(1)
            found.append((data.shards.classes[sample["label"]], vector / np.sqrt((vector**2).sum())))
    hits = []
    for label, vector in features["test"]:
        hits.append(max(features["train"], key=lambda each: float(vector @ each[1]))[0] == label)
    assert last["heldout_recall"] == pytest.approx(np.mean(hits)) and 0 < np.mean(hits) < 1


def test_the_screen_and_tensorboard_show_them(watched: Path) -> None:
    said = {"context_loss": 1.5, "context_accuracy": 0.75, "heldout_context_accuracy": 0.5, "motion_loss": 2.0}
    rest = {"heldout_recall": 0.25, "epoch": 2.0, "lr": 0.1, "clips_per_second": 9.0, "waiting": 0.0}
    assert "context 1.50 (75 %, held out 50 %), motion 2.00, held out R@1 25 %, lr" in dense(said | rest)
    events = EventAccumulator(str(watched / "tensorboard"))
    events.Reload()
    tags = ("accuracy/heldout_context", "accuracy/heldout_motion", "heldout_recall")
    for tag, name in zip(tags, sorted(KEYS), strict=True):
        expected = [(line["step"], pytest.approx(line[name])) for line in lines(watched) if name in line]
        assert [(e.step, e.value) for e in events.Scalars(tag)] == expected


@pytest.mark.parametrize(
    ("clips", "videos", "epochs", "expected"),
    [
        (768, 9537, 120, 1),  # UCF101: 256 steps' worth of looking at 9,537, 2.7 %
        (258, 288, 60, 10),  # the scenes: a third of 258 is 86, and 3 % of 17,280 are 518, so six times
        (768, 12, 3, 3),  # at the end in any case
        (768, 240_000, 120, 1),
    ],
)
def test_looking_takes_three_percent_at_most(clips: int, videos: int, epochs: int, expected: int) -> None:
    assert epochs_between(clips, videos, epochs) == expected


def apart(tiny: Tiny, held_out: Manifest | None, **changes: Any) -> HeldOut | None:
    config, runtime = changes.pop("config", tiny_config()), replace(RUNTIME, **changes)
    return hold_out(config, runtime, ShardSet(tiny[0]), Manifest.read(tiny[1]).subset("train"), held_out, 12)


def test_it_is_off_where_there_is_nothing_to_look_at(tiny: Tiny) -> None:
    rows = Manifest.read(tiny[1])
    test = rows.subset("test")
    assert apart(tiny, test) is not None
    assert apart(tiny, None) is None and apart(tiny, test, watch_epochs=0) is None
    assert apart(tiny, test, config=tiny_config("small-scratch")) is None
    assert apart(tiny, rows.subset("train")) is None  # videos that it trains on
    assert apart(tiny, Manifest(("gone.mp4", "x.mp4"), ("", ""), ("test", "test"))) is None  # in no shard
    assert apart(tiny, Manifest(test.paths[:1], test.labels[:1], ("test",))) is None
    long = tiny_config(sampling=Sampling(frames=8, stride=6, motion_frames=33))
    assert apart(tiny, test, config=long) is None  # 8 frames, 2 and 33 maps are more than 40


def test_what_is_looked_at(tiny: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    """At most so many, spread over the rows; all of a batch; nothing that is trained on; no recall without label."""
    monkeypatch.setattr(heldout, "VIDEOS", 4)
    rows = Manifest.read(tiny[1])
    test, train = rows.subset("test"), rows.subset("train")
    found = apart(tiny, rows, watch_epochs=1)
    assert found is not None and found.every == 1
    paths = [found.clips.shards.paths[v] for v in found.clips.video]
    assert (found.queries, found.sampler.global_batch, found.clips.clips) == (4, 2, 1)
    assert paths == [test.paths[i] for i in (0, 2, 5, 7)] + [train.paths[i] for i in (0, 4, 7, 11)]
    large = apart(tiny, test, config=tiny_config(batch_size=6))
    assert large is not None and (large.queries, large.sampler.steps) == (6, 1)
    assert [e for e in range(1, 9) if replace(large, every=2).due(e)] == [2, 3, 4, 6, 8]
    for epochs, queries, every in ((3, 2, 3), (60, 3, 9), (3000, 4, 12)):  # affordable: 3, 64 and 3,240 clips
        short = apart(tiny, test, config=tiny_config(epochs=epochs))
        assert short is not None and (short.queries, short.every) == (queries, every)
    assert "6 held-out videos are looked at every 3 epochs and at the end, beside 6 training videos" in str(large)
    found.clips.label = np.full(8, -1)
    looked = found.measure(build_model(tiny_config(), 4), RUNTIME, torch.device("cpu"))
    assert list(looked) == ["heldout_context_accuracy", "heldout_motion_accuracy"]


def test_neighbours_are_told_apart_in_float32(tiny: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    """In bfloat16 all cosines above 0.998 are 1."""
    monkeypatch.setattr(heldout, "VIDEOS", 4)
    found = apart(tiny, Manifest.read(tiny[1]).subset("test"), watch_epochs=1)
    assert found is not None
    angles = torch.tensor([0.0, 0.0, 0.0, 0.0, 0.04, 0.03, 0.02, 0.01])  # four queries, then four candidates
    monkeypatch.setattr(heldout, "pooled", lambda _: torch.stack((angles.cos(), angles.sin()), 1))
    found.clips.label = np.array([1, 1, 1, 1, 0, 0, 0, 1])
    looked = found.measure(build_model(tiny_config(), 4), replace(RUNTIME, precision="bfloat16"), torch.device("cpu"))
    assert looked["heldout_recall"] == 1
