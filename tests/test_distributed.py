"""Two gloo processes against one that sees the whole batch, in float64 on the CPU: parts, then a whole run."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, normalize
from torch.nn.parallel import DistributedDataParallel

from train import distributed
from train.objectives import context_matching, joint, motion_prediction

RANKS, CLIPS, POINTS, WINDOWS, WIDTH = 2, 3, 4, 2, 5  # CLIPS of a rank, POINTS of a clip, WINDOWS of negatives a clip
TEMPERATURE, ALPHA, SCALE = 0.3, 0.3, 2.0
TORCHRUN = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
SAMPLES = 3  # batch norm: of each rank
NORMS: dict[str, tuple[type[nn.Module], tuple[int, ...], dict[str, Any]]] = {
    "1d": (nn.BatchNorm1d, (), {}),
    "3d": (nn.BatchNorm3d, (2, 3, 2), {"momentum": 0.3, "eps": 1e-3}),
}


def random(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def assert_equal(ours: Any, expected: Any) -> None:
    torch.testing.assert_close(ours, expected, rtol=1e-10, atol=1e-12)


class Heads(nn.Module):
    """Stands for the networks: every embedding comes through shared weights and a batch norm."""

    def __init__(self) -> None:
        super().__init__()
        self.shared = nn.Linear(WIDTH, WIDTH, dtype=torch.float64)
        self.norm = nn.BatchNorm1d(WIDTH, dtype=torch.float64)
        self.motion = nn.Linear(WIDTH, WIDTH, dtype=torch.float64)
        with torch.no_grad():
            for seed, parameter in enumerate(self.parameters()):
                parameter.copy_(random(*parameter.shape, seed=seed))

    def forward(
        self, clips: Tensor, iframes: Tensor, predicted: Tensor, positives: Tensor, negatives: Tensor
    ) -> list[Tensor]:
        context = [self.norm(self.shared(clips)), self.shared(iframes)]
        motion = [self.shared(predicted), self.motion(positives), self.motion(negatives)]
        return [normalize(x, dim=1) for x in (*context, *motion)]


def batch(of_rank: int | None = None) -> list[Tensor]:
    """Inputs of the whole batch, or of one rank: clips, I-frames, predicted, positives, negatives."""
    parts = []
    for seed, rows in enumerate((1, 1, POINTS, POINTS, POINTS * WINDOWS)):
        whole = random(RANKS * CLIPS * rows, WIDTH, seed=100 + seed)
        parts.append(whole if of_rank is None else whole.chunk(RANKS)[of_rank])
    return parts


def norm_inputs(name: str) -> tuple[Tensor, Tensor]:
    """Samples and the weights of a loss (y · weights), of the whole batch."""
    shape = (RANKS * SAMPLES, 3, *NORMS[name][1])
    return 3 + 2 * random(*shape, seed=7), random(*shape, seed=8)


def use_norm(norm: nn.Module, x: Tensor, weights: Tensor) -> dict[str, Any]:
    """Two steps of training with gradients, and evaluation."""
    x = x.clone().requires_grad_()
    y = norm(x)
    ((norm(x * 2 + 1) * weights).sum() + (y * weights).square().sum()).backward()
    gradients = {key: parameter.grad for key, parameter in norm.named_parameters()}
    state = {key: value.clone() for key, value in norm.state_dict().items()}
    return {"y": y.detach(), "grad": x.grad, "gradients": gradients, "state": state, "eval": norm.eval()(x).detach()}


def work(rank: int, folder: Path) -> None:
    """One of the two processes: everything that the tests below look at, in one file."""
    torch.set_num_threads(1)
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(RANKS), LOCAL_RANK=str(rank))
    found: dict[str, Any] = {"device": distributed.start(torch.device("cpu"), f"file://{folder}/meeting")}
    found["rank"], found["world_size"] = distributed.rank(), distributed.world_size()
    found["anywhere"] = distributed.anywhere(torch.device("cpu"), rank == 1, False)
    found["together"] = distributed.together(lambda: 10 * rank)
    with pytest.raises(ValueError) as caught:
        distributed.together(lambda: 1 // rank if rank else int("nothing"))
    found["apart"] = str(caught.value)
    found["mean"] = distributed.mean_over_ranks(torch.tensor([rank, 10.0 + rank], requires_grad=True))

    x = random(RANKS * 3, 2, seed=20).chunk(RANKS)[rank].requires_grad_()
    gathered = distributed.gather_with_gradient(x)
    (gathered * random(RANKS * 3, 2, seed=30 + rank)).sum().backward()
    found["gathered"], found["gathered grad"] = gathered.detach(), x.grad

    heads = DistributedDataParallel(distributed.synchronise_batch_norm(Heads()))
    clips, iframes, predicted, positives, negatives = heads(*batch(rank))
    context = context_matching(clips, iframes, TEMPERATURE)
    motion = motion_prediction(predicted, positives, negatives, TEMPERATURE, tile_bytes=3000)
    joint(context.value, motion.value, ALPHA, SCALE).backward()
    found["losses"] = distributed.mean_over_ranks(torch.stack((*context, *motion)))
    found["gradients"] = {name: parameter.grad for name, parameter in heads.module.named_parameters()}

    for name, (kind, _, options) in NORMS.items():
        net = nn.Sequential(kind(3, dtype=torch.float64, **options))
        parameters, keys = list(net.parameters()), list(net.state_dict())
        distributed.synchronise_batch_norm(net)
        swapped = net[0]
        distributed.synchronise_batch_norm(net)
        found["swapped " + name] = (
            isinstance(swapped, distributed.SynchronisedBatchNorm)
            and swapped is net[0]
            and list(net.state_dict()) == keys
            and all(a is b for a, b in zip(parameters, net.parameters(), strict=True))
        )
        found[name] = use_norm(net, *(x.chunk(RANKS)[rank] for x in norm_inputs(name)))
    net, (x, weights) = net.train(), (x.chunk(RANKS)[rank] for x in norm_inputs("3d"))
    for forward in (net, torch.compile(net, backend="eager", fullgraph=True)):  # one graph: collectives break none
        y = forward(x.requires_grad_())
        found.setdefault("compiled", []).append((y.detach(), *torch.autograd.grad((y * weights).sum(), x)))
    norm = distributed.synchronise_batch_norm(nn.BatchNorm1d(1))
    found["far from zero"] = norm(3000 + random(1000, 1, seed=40 + rank).float()).detach()
    found["half"] = norm(random(10, 1, seed=50).bfloat16()).dtype
    torch.save(found, folder / f"{rank}.pt")
    distributed.stop()
    assert distributed.world_size() == 1


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    folder = tmp_path_factory.mktemp("ranks")
    torch.multiprocessing.start_processes(work, (folder,), nprocs=RANKS, start_method="spawn")
    return [torch.load(folder / f"{rank}.pt", weights_only=False) for rank in range(RANKS)]


def test_gather_keeps_the_order_and_sums_gradients(ranks: list[dict[str, Any]]) -> None:
    gradient = random(RANKS * 3, 2, seed=30) + random(RANKS * 3, 2, seed=31)
    for rank, (found, own) in enumerate(zip(ranks, gradient.chunk(RANKS), strict=True)):
        assert (found["rank"], found["world_size"], found["device"]) == (rank, RANKS, torch.device("cpu"))
        torch.testing.assert_close(found["gathered"], random(RANKS * 3, 2, seed=20), rtol=0, atol=0)
        assert_equal(found["gathered grad"], own)
        assert found["anywhere"] == [True, False] and found["together"] == [0, 10]
        assert found["apart"].startswith("process 0: invalid literal") and "process 1" not in found["apart"]
        assert found["mean"].tolist() == [0.5, 10.5] and not found["mean"].requires_grad


def test_two_ranks_optimise_what_one_process_does(ranks: list[dict[str, Any]]) -> None:
    heads = Heads()
    clips, iframes, predicted, positives, negatives = heads(*batch())
    expected, losses = [], []
    for queries, keys in ((clips, iframes), (predicted, torch.cat((positives, negatives)))):
        logits, target = queries @ keys.T / TEMPERATURE, torch.arange(len(queries))
        losses.append(cross_entropy(logits, target))
        expected += [losses[-1].detach(), (logits.argmax(1) == target).double().mean()]
    (SCALE * ((1 - ALPHA) * losses[0] + ALPHA * losses[1])).backward()
    for found in ranks:
        assert_equal(found["losses"], torch.stack(expected))
        for name, parameter in heads.named_parameters():
            assert_equal(found["gradients"][name], parameter.grad)


@pytest.mark.parametrize("name", NORMS)
def test_batch_norm_over_ranks_is_batch_norm_of_the_whole(ranks: list[dict[str, Any]], name: str) -> None:
    kind, _, options = NORMS[name]
    plain = use_norm(nn.Sequential(kind(3, dtype=torch.float64, **options)), *norm_inputs(name))
    assert all(found["swapped " + name] for found in ranks)
    for key in ("y", "grad"):
        assert_equal(torch.cat([found[name][key] for found in ranks]), plain[key])
    for key, gradient in plain["gradients"].items():
        assert_equal(sum(found[name]["gradients"][key] for found in ranks), gradient)
    for found in ranks:
        assert_equal(found[name]["state"], plain["state"])
        assert_equal(*found["compiled"])
    assert_equal(torch.cat([found[name]["eval"] for found in ranks]), plain["eval"])


def test_batch_norm_far_from_zero_and_in_half_precision(ranks: list[dict[str, Any]]) -> None:
    x = torch.cat([3000 + random(1000, 1, seed=40 + rank).float() for rank in range(RANKS)]).double()
    expected = (x - x.mean()) / (x.var(correction=0) + 1e-5).sqrt()
    y = torch.cat([found["far from zero"] for found in ranks]).double()
    torch.testing.assert_close(y, expected, rtol=0, atol=1e-3)
    assert all(found["half"] == torch.bfloat16 for found in ranks)


def test_one_process_needs_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in TORCHRUN:
        monkeypatch.delenv(name, raising=False)
    assert distributed.start(torch.device("cpu")) == torch.device("cpu")
    assert (distributed.rank(), distributed.world_size()) == (0, 1)
    x = torch.ones(2, 3, requires_grad=True)
    assert distributed.gather_with_gradient(x) is x
    assert distributed.mean_over_ranks(x).equal(x) and not distributed.mean_over_ranks(x).requires_grad
    net = nn.Sequential(nn.BatchNorm1d(3))
    assert distributed.synchronise_batch_norm(net) is net and type(net[0]) is nn.BatchNorm1d
    distributed.stop()
    plain, x = nn.BatchNorm1d(3, dtype=torch.float64), random(4, 3, seed=0)
    ours = distributed.SynchronisedBatchNorm.replacing(nn.BatchNorm1d(3, dtype=torch.float64))
    torch.testing.assert_close(ours(x), plain(x), rtol=0, atol=0)
    torch.testing.assert_close(ours.state_dict(), plain.state_dict(), rtol=0, atol=0)


@pytest.mark.parametrize(
    ("device", "environment", "message"),
    [
        ("cpu", {"WORLD_SIZE": "4"}, r"WORLD_SIZE is 4 but RANK, MASTER_ADDR, MASTER_PORT.*torchrun"),
        ("cuda", {"LOCAL_RANK": "2"}, "GPU 2, but 2 are visible"),
        ("cuda:1", {"WORLD_SIZE": "2"}, "cuda:1 would put all 2 processes on one GPU: give --device cuda"),
    ],
)
def test_a_start_that_cannot_work_is_explained(
    monkeypatch: pytest.MonkeyPatch, device: str, environment: dict[str, str], message: str
) -> None:
    for name in TORCHRUN:
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    with pytest.raises(ValueError, match=message):
        distributed.start(torch.device(device))
