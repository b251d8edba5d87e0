"""What recipes cost, against convolutions and products counted by hand and against a real step."""

from __future__ import annotations

from itertools import accumulate
from typing import Any

import pytest
import torch
from conftest import tiny_config
from torch.nn import functional as F
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode

from train import __main__ as command
from train import cost
from train.config import Finetuning, Networks, Objective
from train.model import build_model
from train.recipes import RECIPES

POINTS, WINDOWS, CHANNELS = 49, 4, 512


def c3d_by_hand() -> int:
    """Eight 3x3x3 convolutions on 16 frames of 112x112; (channels in, out, output positions)."""
    layers = [(3, 64, 16 * 112**2), (64, 128, 16 * 56**2), (128, 256, 8 * 28**2), (256, 256, 8 * 28**2)]
    layers += [(256, 512, 4 * 14**2), (512, 512, 4 * 14**2), (512, 512, 2 * 7**2), (512, 512, 2 * 7**2)]
    products = [2 * 27 * a * b * positions for a, b, positions in layers]
    return 3 * sum(products) - products[0]  # forward, weights, inputs; the clip itself needs no gradient


def test_a_row_meets_the_keys_of_the_batch() -> None:
    """Three products of (49, 512) with (512, 4 x 49 x B) a clip and of (1, 512) with (512, B)."""
    small, large = (cost.flops_per_clip(RECIPES[f"pretrain-{name}-c3d"].config) for name in ("ucf101", "k400"))
    assert large - small == 3 * 2 * CHANNELS * (POINTS * WINDOWS * POINTS + 1) * (512 - 64)
    still = [
        cost.flops_per_clip(RECIPES[f"pretrain-ucf101-c3d{ending}"].config) for ending in ("-released", "-current")
    ]
    assert still == [small, small]


@pytest.mark.parametrize(
    ("config", "off"),
    [
        *((tiny_config(objective=Objective(alpha), batch_size=3), 1e-6) for alpha in (0.0, 0.3, 1.0)),
        (tiny_config("small-regularised", batch_size=3), 1e-3),  # all but the classifier is counted
    ],
)
def test_a_real_step(config: Any, off: float) -> None:
    clip, motion = torch.randn(3, 3, 8, 32, 32), torch.randn(3, 2, 2, 8, 32, 32)
    model = build_model(config, 2)
    with FlopCounterMode(display=False) as counter:
        if isinstance(config, Finetuning):
            scores, points = model(clip, motion)
            loss = scores.mean()
        else:
            alpha, loss = config.objective.alpha, torch.zeros(())
            clips, iframes, points = model(clip, clip[:, :, :1] if alpha < 1 else None, motion if alpha > 0 else None)
            if clips is not None:
                loss = loss + F.cross_entropy(clips @ iframes.T, torch.arange(3))
        if points is not None:
            loss = loss + (points.predicted @ torch.cat((points.targets, points.negatives)).T).logsumexp(1).mean()
        loss.backward()
    assert cost.flops_per_clip(config) == pytest.approx(counter.get_total_flops() / 3, rel=off)


def peak_of_a_step(config: Any, recompute: bool) -> int:
    """Bytes that torch's allocator hands out and takes back in a real step on a CPU, at the most."""
    model = build_model(config, 2, recompute)
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as seen:
        clip, motion = torch.randn(4, 3, 8, 64, 64), torch.randn(4, 2, 2, 8, 64, 64)
        clips, iframes, points = model(clip, clip[:, :, :1], motion)
        (clips + iframes).sum().add(torch.cat(points).sum()).backward()
    events = sorted(seen.profiler.kineto_results.events(), key=lambda event: event.start_ns())
    return max(accumulate(event.nbytes() for event in events if event.name() == "[memory]"))


def test_memory_of_a_step() -> None:
    networks = Networks("c3d", 16, 16, 16, predictor_width=16, head_hidden=16, head_out=8)
    config = tiny_config(batch_size=4, size=64, motion_size=64, networks=networks)
    plain, recomputed = (peak_of_a_step(config, recompute) for recompute in (False, True))
    for recompute, peak in ((False, plain), (True, recomputed)):
        assert cost._peak(cost._simplest(config, 4), recompute, torch.float32)[0] == pytest.approx(peak, rel=0.1)
    assert recomputed < 0.75 * plain
    state = cost.gpu_bytes(config) - cost._peak(cost._simplest(config, 4), False)[0]
    assert state == 4 * 4 * sum(p.numel() for p in build_model(config, 2).parameters())  # AdamW, in float32


def test_whole_runs() -> None:
    config = RECIPES["scratch-hmdb51-c3d"].config  # batch 8, 120 epochs
    assert cost.total_flops(config, 3570) == 120 * 3568 * c3d_by_hand()
    assert cost.gpu_hours(config, 3570) == pytest.approx(120 * 3568 * c3d_by_hand() / (0.3 * 312e12 * 3600))
    assert cost.flops_per_clip(RECIPES["finetune-ucf101-c3d"].config) == c3d_by_hand()
    assert cost.dataset("pretrain-k400-r3d26") == ("Kinetics-400", 246_000) and cost.dataset("small-mse") is None


def test_the_peak_of_a_gpu_goes_by_its_name_and_the_precision(monkeypatch: pytest.MonkeyPatch) -> None:
    config, device = RECIPES["scratch-ucf101-c3d"].config, torch.device("cuda")
    for name, bfloat16, tf32 in (
        ("NVIDIA H100 80GB HBM3", 989e12, 494e12),
        ("NVIDIA H100 PCIe", 756e12, 378e12),
        ("NVIDIA A100-SXM4-80GB", 312e12, 156e12),
    ):
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda _, name=name: name)
        for precision, peak in (("bfloat16", bfloat16), ("float32", tf32)):
            assert cost.seconds_at_peak(config, device, precision) == pytest.approx(c3d_by_hand() / peak)
    for name in ("Tesla T4", "NVIDIA RTX A1000 Laptop GPU"):
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda _, name=name: name)
        assert cost.seconds_at_peak(config, device, "float32") is None
    assert cost.seconds_at_peak(config, torch.device("cpu"), "float32") is None


def test_the_list_has_costs(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    for name in list(RECIPES):
        if name not in ("scratch-ucf101-c3d", "small-scratch"):
            monkeypatch.delitem(RECIPES, name)
    assert command.main(["--list"]) == 0
    listed = capsys.readouterr().out
    assert "estimate" in listed and "30%" in listed
    assert "229 GFLOP a clip, 262 PFLOP on UCF101, split 1 (9,537 videos): about 0.78 GPU hours" in listed
    assert "about 0.78 GPU hours; 1.5 GB of GPU memory\n" in listed and "\n    0.51" in listed
