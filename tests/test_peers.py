"""Other tasks to compare with: what they draw, what they ask, and that nothing else of a run is theirs."""

from __future__ import annotations

from dataclasses import fields, replace
from itertools import pairwise, permutations
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import tiny_config
from evaluating import CPU
from hypothesis import given
from hypothesis import strategies as st
from running import RUNTIME, Tiny, assert_same_run, lines, run_again
from torch.utils.data import default_collate

from eval import pretext, retrieve
from eval.results import Data
from preprocess.manifest import Manifest
from preprocess.shards import ShardSet
from train import tasks
from train.config import Comparison, Config, Peer
from train.data import decode_frames
from train.draws import Sampling
from train.loop import train
from train.model import build_model
from train.origin import Origin
from train.peers import PEERS, ClipContrast, ClipOrder, Pace, make_peer
from train.peers.clips import ClipTuples
from train.peers.order import OrderHead
from train.recipes import RECIPES
from train.tasks import make_task, serves
from train.trained import load_run

samplings = st.builds(Sampling, frames=st.integers(2, 16), stride=st.integers(1, 4))


def comparison(name: str, sampling: Sampling | None = None, **peer: Any) -> Comparison:
    return Comparison(sampling=sampling or Sampling(8, 2), peer=Peer(name=name, **peer))  # type: ignore[arg-type]


def test_a_peer_differs_from_the_recipe_beside_it_in_the_task_alone() -> None:
    for base in ("pretrain-ucf101-c3d", "scenes", "ucf20"):
        for name in PEERS:
            mine, ours = RECIPES[f"{base}-{name}"].config, RECIPES[base].config
            assert isinstance(mine, Comparison) and mine.peer == Peer(name=name)  # type: ignore[arg-type]
            assert all(getattr(mine, f.name) == getattr(ours, f.name) for f in fields(Config))


@pytest.mark.parametrize(
    ("peer", "complaint"),
    [
        ({"name": "speed"}, "peer is 'speed'; choose one of order, pace, contrast"),
        ({"clips": 6}, "clips is 6, which have 720 orders; choose 2 to 5"),
        ({"paces": 1}, "paces is 1"),
        ({"temperature": 0.0}, "temperature is 0"),
    ],
)
def test_what_no_task_can_be(peer: dict[str, Any], complaint: str) -> None:
    with pytest.raises(ValueError, match=complaint):
        Peer(**peer)


# ---- what is drawn


@given(samplings, st.integers(2, 4), st.integers(0, 9), st.integers(0, 200), st.integers(0, 99))
def test_ordered_clips_lie_apart_and_their_class_says_how_they_were_shuffled(
    sampling: Sampling, clips: int, gap: int, spare: int, seed: int
) -> None:
    peer = ClipOrder(comparison("order", sampling, clips=clips, gap=gap))
    frames = peer.needed + spare
    starts, stride, target = peer.draw(np.random.default_rng(seed), frames)
    span = (sampling.frames - 1) * stride + 1
    in_order = sorted(starts.tolist())
    assert [b - a for a, b in pairwise(in_order)] == [span + gap] * (clips - 1)
    assert in_order[0] >= 0 and in_order[-1] + span <= frames and 1 <= stride <= sampling.stride
    longer = clips * ((sampling.frames - 1) * (stride + 1) + 1) + (clips - 1) * gap
    assert stride == sampling.stride or longer > frames
    assert [in_order[i] for i in list(permutations(range(clips)))[target]] == starts.tolist()


@given(samplings, st.integers(2, 6), st.integers(0, 200), st.integers(0, 99))
def test_pace_is_the_stride_and_every_pace_fits(sampling: Sampling, paces: int, spare: int, seed: int) -> None:
    peer = Pace(comparison("pace", sampling, paces=paces))
    frames = peer.needed + spare
    (start,), stride, target = peer.draw(np.random.default_rng(seed), frames)
    assert stride == target + 1 <= paces and 0 <= start <= frames - (sampling.frames - 1) * stride - 1


@given(samplings, st.integers(0, 200), st.integers(0, 99))
def test_contrasted_clips_lie_within_the_video(sampling: Sampling, spare: int, seed: int) -> None:
    peer = ClipContrast(comparison("contrast", sampling))
    frames = peer.needed + spare
    starts, stride, _ = peer.draw(np.random.default_rng(seed), frames)
    assert len(starts) == 2 and min(starts) >= 0
    assert max(starts) + (sampling.frames - 1) * stride < frames and 1 <= stride <= sampling.stride


@pytest.mark.parametrize("name", PEERS)
def test_every_class_and_start_is_drawn_as_often(name: str) -> None:
    peer = make_peer(comparison(name))
    rng, frames = np.random.default_rng(0), 80
    drawn = [peer.draw(rng, frames) for _ in range(3000)]
    targets, starts = [d[2] for d in drawn], [int(d[0].min()) for d in drawn]
    classes = {"order": 6, "pace": 4, "contrast": 1}[name]
    assert np.bincount(targets, minlength=classes).min() > 0.8 * 3000 / classes
    room = frames - max(int(d[0].max()) + 7 * d[1] + 1 - int(d[0].min()) for d in drawn)
    assert min(starts) == 0 and max(starts) >= room


@pytest.mark.parametrize("name", PEERS)
def test_clips_are_the_frames_that_were_drawn_each_with_views_of_its_own(tiny: Tiny, name: str) -> None:
    shards, config = ShardSet(tiny[0]), comparison(name)
    data = ClipTuples(shards, None, config)
    assert (len(data), data.dropped) == (20, 0)
    sample, peer = data[3, 5], make_peer(config)
    starts, stride, target = peer.draw(np.random.Generator(np.random.PCG64([0, 3, 1 + 5])), 40)
    shard, row = shards.locate(int(data.video[5]))
    for clip, start in zip(sample["clip"], starts, strict=True):
        wanted = shard.frame_offset[row] + start + stride * np.arange(8)
        np.testing.assert_array_equal(clip, decode_frames(shard, wanted))
    assert sample["target"] == target
    for key in ("clip_box", "clip_flip", "clip_photo", "clip_still_removed"):
        assert len(sample[key]) == len(starts)
    if len(starts) > 1:
        assert not np.array_equal(sample["clip_box"][0], sample["clip_box"][1])


def test_clips_are_mirrored_together_only_where_what_moves_must_tell_their_order(tiny: Tiny) -> None:
    for name in PEERS:
        data = ClipTuples(ShardSet(tiny[0]), None, comparison(name))
        flips = np.stack([data[epoch, 5]["clip_flip"] for epoch in range(60)])
        assert flips.shape == (60, data.peer.clips)
        assert all(0.2 < share < 0.8 for share in flips.mean(0))
        assert (flips == flips[:, :1]).all() == (name != "contrast")


def test_videos_too_short_are_left_out(tiny: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    shards = ShardSet(tiny[0])
    frames = shards.frames.copy()
    frames[[2, 7]] = 39
    monkeypatch.setattr(shards, "frames", frames)
    config = comparison("order")
    task = make_task(config, shards, None)
    assert task.left_out == "2 too short" and not {2, 7} & set(task.data.video.tolist()) and len(task.data) == 18
    assert serves(config, 40) and not serves(config, 39)
    monkeypatch.setattr(shards, "frames", np.full(20, 39))
    with pytest.raises(ValueError, match="none of 20 videos has the 40 frames that order needs; choose fewer frames"):
        make_task(config, shards, None)


# ---- what is asked


def test_the_order_head_sees_every_pair() -> None:
    torch.manual_seed(0)
    head = OrderHead(5, 3, 7, 6).double().eval()
    features = torch.randn(4, 3, 5, dtype=torch.float64)
    f, pair, order = features.numpy(), head.pair, head.order
    weight, bias = pair.weight.detach().numpy(), pair.bias.detach().numpy()
    hidden = [
        np.maximum(np.concatenate((f[:, i], f[:, j]), 1) @ weight.T + bias, 0) for i, j in ((0, 1), (0, 2), (1, 2))
    ]
    wanted = np.concatenate(hidden, 1) @ order.weight.detach().numpy().T + order.bias.detach().numpy()
    np.testing.assert_allclose(head(features).detach().numpy(), wanted)
    assert not torch.equal(head.train()(features), head(features))  # dropout


def test_contrast_against_its_definition() -> None:
    rng = np.random.default_rng(0)
    z = rng.normal(size=(6, 2, 8))
    z /= np.linalg.norm(z, axis=-1, keepdims=True)
    loss, right = 0.0, 0
    for own, other in ((0, 1), (1, 0)):
        for i in range(6):
            scores = np.array([z[i, own] @ z[j, other] / 0.1 for j in range(6)])
            loss -= np.log(np.exp(scores[i]) / np.exp(scores).sum()) / 12
            right += scores.argmax() == i
    peer = make_peer(comparison("contrast"))
    found = peer.loss(torch.from_numpy(z), torch.zeros(6, dtype=torch.long))
    assert found.value.item() == pytest.approx(loss) and found.accuracy is not None
    assert found.accuracy.item() == pytest.approx(right / 12)


@pytest.mark.parametrize("name", PEERS)
def test_what_is_found_of_a_video_does_not_depend_on_those_beside_it(tiny: Tiny, name: str) -> None:
    shards, config = ShardSet(tiny[0]), tiny_config(f"scenes-{name}")
    task = make_task(config, shards, None)
    torch.manual_seed(0)
    model = build_model(config, 4).eval()
    samples = [task.data[0, i] for i in range(3)]
    together = model(task.inputs(default_collate(samples))[0])
    for i, sample in enumerate(samples):
        alone = model(task.inputs(default_collate([sample]))[0])
        torch.testing.assert_close(together[i : i + 1], alone)


# ---- a run


def start(tiny: Tiny, out: Path, config: Config, watch: int = 0) -> None:
    rows = Manifest.read(tiny[1])
    runtime = replace(RUNTIME, watch_epochs=watch)
    train(config, runtime, tiny[0], rows.subset("train"), out, Origin("x", "split", "train"), rows.subset("test"))


@pytest.mark.parametrize("name", PEERS)
def test_a_run_goes_on_as_one_that_nothing_stopped_and_is_measured_like_ours(
    tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    config = replace(tiny_config(f"scenes-{name}"), epochs=2)
    start(tiny, tmp_path / "whole", config, watch=1)
    seen = lines(tmp_path / "whole")[-1]
    assert {f"{name}_loss", f"{name}_accuracy", f"heldout_{name}_accuracy", "heldout_recall"} <= set(seen)

    def interrupt(_: torch.Tensor) -> None:
        raise KeyboardInterrupt

    run_again(monkeypatch, 5, interrupt, tasks.ComparisonTask)
    with pytest.raises(KeyboardInterrupt):
        start(tiny, tmp_path / "stopped", config, watch=1)
    monkeypatch.undo()
    start(tiny, tmp_path / "stopped", config, watch=1)
    assert_same_run(tmp_path / "stopped", tmp_path / "whole")
    run, data = load_run(tmp_path / "whole"), Data.open(*tiny)
    assert pretext.measure(run, data, CPU).metrics.keys() == {f"{name} accuracy"}
    assert retrieve.measure(run, data, machine=CPU).recalls.keys() == {"context", "motion", "both"}
    with pytest.raises(ValueError, match="has no M-Network"):
        retrieve.measure(run, data, "motion", CPU)
