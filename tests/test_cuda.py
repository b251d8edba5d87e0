"""What only a GPU can show; `make gpu` runs it, beside a whole step against the CPU's."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from running import RUNTIME, Tiny, lines, start
from torch import Tensor

from train import cost
from train.device import channels_last
from train.model import build_model
from train.networks.resnet import r3d10
from train.objectives import motion_prediction
from train.recipes import RECIPES

pytestmark = pytest.mark.cuda


@pytest.fixture(autouse=True)
def _exact() -> None:
    torch.set_float32_matmul_precision("highest")
    torch.backends.cudnn.allow_tf32 = False


def test_equation_2_in_many_tiles() -> None:
    """Against float64 on the CPU: value, accuracy and gradients."""
    torch.manual_seed(0)
    embeddings = [torch.nn.functional.normalize(torch.randn(n, 64, dtype=torch.float64), dim=1) for n in (98, 98, 294)]
    found = {}
    for device, dtype in (("cpu", torch.float64), ("cuda", torch.float32)):
        inputs = [x.to(device, dtype).requires_grad_() for x in embeddings]
        loss = motion_prediction(*inputs, 0.1, tile_bytes=4 * 392 * 5)  # type: ignore[misc]
        gradients = torch.autograd.grad(loss.value, inputs)
        found[device] = [x.detach().double().cpu() for x in (*loss, *gradients)]
    torch.testing.assert_close(found["cuda"], found["cpu"], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("batch", [2, 96])
def test_a_stem_of_more_elements_than_32_bits_count(batch: int) -> None:
    """The M-Network's, whose maps are 25.7 million elements a clip, as it trains: a batch of copies of one clip has the
    statistics, the maps and the gradients of each."""
    if torch.cuda.mem_get_info()[0] < batch * 0.5e9:
        pytest.skip("needs a GPU with 48 GB")
    torch.manual_seed(0)
    stem, clip = r3d10(2, stem_stride=1).stem.cuda(), torch.randn(4, 2, 8, 112, 112).cuda()
    channels_last(stem)
    weights = torch.randn(4, 64, 8, 56, 56).cuda()

    def of(slices: int) -> tuple[Tensor, Tensor]:
        stem.zero_grad()
        maps = []
        for part in clip.repeat(batch, 1, 1, 1, 1).chunk(slices):
            with torch.autocast("cuda", torch.bfloat16):
                out = stem(part).unflatten(0, (-1, 4))
            (out * weights).sum().backward()
            maps.append(out.detach())
        return torch.cat(maps), stem[0].weight.grad.clone()

    (maps, gradient), (expected, slope) = of(1), of(batch)
    assert (maps - expected).abs().max() <= 0.02 * expected.abs().max()
    assert (gradient - slope).norm() <= 0.02 * slope.norm()


@pytest.mark.parametrize("recompute", [False, True])
def test_memory_is_as_estimated(recompute: bool) -> None:
    config = RECIPES["pretrain-ucf101-c3d"].config.changed({"batch_size": 16})
    model = build_model(config, 1, recompute).cuda()
    channels_last(model)
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    clip, motion = torch.randn(16, 3, 16, 112, 112).cuda(), torch.randn(16, 4, 2, 8, 112, 112).cuda()
    with torch.autocast("cuda", torch.bfloat16):
        clips, iframes, points = model(clip, clip[:, :, :1], motion)
    (clips + iframes).sum().add(torch.cat(points).sum()).backward()
    found = torch.cuda.max_memory_allocated() - before
    parameters = sum(p.numel() for p in model.parameters())
    assert found == pytest.approx(cost.gpu_bytes(config, recompute) - 8 * parameters, rel=0.25)


@pytest.mark.parametrize("changes", [{"precision": "float32"}, {"recompute": True}])
def test_a_run(tiny: Tiny, undisturbed: Path, tmp_path: Path, changes: dict[str, Any]) -> None:
    """Begins as on the CPU, in bfloat16 too, but for the motion loss, of a tenth of which what dropout draws decides; a
    finished one is left as it is."""
    runtime = replace(RUNTIME, device="cuda", loader_workers=1, **changes)
    last = start(tiny, tmp_path, runtime=runtime)
    assert last["step"] == 18 and start(tiny, tmp_path, runtime=runtime) == last
    assert lines(tmp_path)[0]["context_loss"] == pytest.approx(lines(undisturbed)[0]["context_loss"], rel=0.01)
