"""The objectives against equations (1) and (2), and table 1's other losses, written out in plain Python."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.functional import cross_entropy, normalize
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from train.objectives import (
    TILE_BYTES,
    Loss,
    context_matching,
    motion_prediction,
)

Vectors = Sequence[Sequence[float]]
seeds = st.integers(0, 2**32)


def cosine(a: Sequence[float], b: Sequence[float]) -> float:
    return sum(x * y for x, y in zip(a, b, strict=True)) / math.sqrt(sum(x * x for x in a) * sum(y * y for y in b))


def equation(queries: Vectors, keys: Vectors, temperature: float) -> float:
    """Equations (1) and (2): query i belongs to key i; vectors of any length; floats only."""
    total = 0.0
    for i, query in enumerate(queries):
        scores = [cosine(query, key) / temperature for key in keys]
        highest = max(scores)
        total -= scores[i] - highest - math.log(sum(math.exp(score - highest) for score in scores))
    return total / len(queries)


def found(queries: Vectors, keys: Vectors) -> float:
    """Share of the queries that lie nearest their own key."""
    nearest = [max(range(len(keys)), key=lambda k: cosine(query, keys[k])) for query in queries]
    return sum(k == i for i, k in enumerate(nearest)) / len(queries)


def equation_with_autograd(queries: Tensor, keys: Tensor, temperature: float) -> Tensor:
    """The same in torch, term by term, so that autograd differentiates the equation as it is printed."""
    terms = []
    for i, query in enumerate(queries):
        scores = [(key @ query) / (key.norm() * query.norm()) / temperature for key in keys]
        terms.append(scores[i] - torch.stack(scores).logsumexp(0))
    return -torch.stack(terms).mean()


def vectors(rows: int, width: int, seed: int, dtype: torch.dtype = torch.float64) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(rows, width, generator=generator, dtype=dtype).requires_grad_()


def context(inputs: Sequence[Tensor], temperature: float) -> Loss:
    """Equation (1) of clips and I-frames of any length, since the cosines are to be differentiated as well."""
    clips, iframes = (normalize(x, dim=1) for x in inputs)
    return context_matching(clips, iframes, temperature)


def motion(inputs: Sequence[Tensor], temperature: float, tile_bytes: int = TILE_BYTES) -> Loss:
    """Equation (2) of predicted, positives and negatives of any length."""
    predicted, positives, negatives = (normalize(x, dim=1) for x in inputs)
    return motion_prediction(predicted, positives, negatives, temperature, tile_bytes)


def plain(inputs: Sequence[Tensor], temperature: float) -> Tensor:
    """Equation (2) as it is usually computed, with the whole matrix of logits."""
    predicted, positives, negatives = (normalize(x, dim=1) for x in inputs)
    logits = predicted @ torch.cat((positives, negatives)).T / temperature
    return cross_entropy(logits, torch.arange(len(predicted)))


def assert_equal(ours: Any, expected: Any) -> None:
    torch.testing.assert_close(ours, expected, rtol=0, atol=0)


class Recorder(TorchDispatchMode):
    """What torch was asked to do: the largest tensor made, and multiplications in matrix products."""

    def __init__(self) -> None:
        super().__init__()
        self.largest, self.multiplications = 0, 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, Tensor):
                self.largest = max(self.largest, tensor.numel())
        if func._overloadpacket.__name__ in ("mm", "addmm", "addmm_"):
            a, b = args[-2:]
            self.multiplications += a.shape[0] * a.shape[1] * b.shape[1]
        return out


# Equation (1)


@settings(deadline=None, max_examples=25)
@given(batch=st.integers(1, 6), width=st.integers(2, 5), temperature=st.sampled_from([0.07, 0.1, 1.0]), seed=seeds)
def test_context_matching_is_equation_1(batch: int, width: int, temperature: float, seed: int) -> None:
    clips, iframes = vectors(batch, width, seed), vectors(batch, width, seed + 1)
    loss = context((clips, iframes), temperature)
    assert loss.value.item() == pytest.approx(
        equation(clips.tolist(), iframes.tolist(), temperature), rel=1e-9, abs=1e-11
    )
    assert loss.accuracy.item() == pytest.approx(found(clips.tolist(), iframes.tolist()))
    ours = torch.autograd.grad(loss.value, (clips, iframes))
    oracle = torch.autograd.grad(equation_with_autograd(clips, iframes, temperature), (clips, iframes))
    torch.testing.assert_close(ours, oracle, rtol=1e-9, atol=1e-11)


# Equation (2)


@settings(deadline=None, max_examples=50)
@given(
    videos=st.lists(st.booleans(), min_size=1, max_size=3),
    points=st.integers(1, 4),
    windows=st.integers(0, 2),
    width=st.integers(2, 5),
    temperature=st.sampled_from([0.05, 0.1, 1.0]),
    tile_bytes=st.integers(1, 2000),
    seed=seeds,
)
def test_motion_prediction_is_equation_2(
    videos: list[bool], points: int, windows: int, width: int, temperature: float, tile_bytes: int, seed: int
) -> None:
    """Of the videos that serve, as rows and as keys; the mean is over all."""
    count = len(videos) * points
    inputs = [vectors(n * count, width, seed + k) for k, n in enumerate((1, 1, windows))]
    predicted, positives, negatives = (normalize(x, dim=1) for x in inputs)
    serves = None if all(videos) and seed % 2 else torch.tensor(videos)
    loss = motion_prediction(predicted, positives, negatives, temperature, tile_bytes, serves=serves)
    rows = [v * points + p for v, own in enumerate(videos) if own for p in range(points)]
    beside = [v * windows * points + p for v, own in enumerate(videos) if own for p in range(windows * points)]
    queries, keys = inputs[0][rows], torch.cat((inputs[1][rows], inputs[2][beside]))
    share, expected = len(rows) / count, torch.zeros(())
    if rows:
        value = share * equation(queries.tolist(), keys.tolist(), temperature)
        assert loss.value.item() == pytest.approx(value, rel=1e-9, abs=1e-11)
        assert loss.accuracy.item() == pytest.approx(found(queries.tolist(), keys.tolist()))
        expected = share * equation_with_autograd(queries, keys, temperature)
    else:
        assert loss.value.item() == loss.accuracy.item() == 0
    assert not loss.accuracy.requires_grad
    # The factor stands for the loss scale: backward must pass it on.
    ours = torch.autograd.grad(loss.value * 3, inputs)
    none = sum(x.sum() for x in inputs) * 0
    oracle = torch.autograd.grad(expected * 3 + none, inputs)
    torch.testing.assert_close(ours, oracle, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("noise", [10.0, 0.1], ids=["early in training", "positives found"])
def test_float32_is_as_exact_as_the_plain_form(noise: float) -> None:
    positives, negatives = vectors(400, 64, 0, torch.float32), vectors(900, 64, 1, torch.float32)
    predicted = (positives + noise * vectors(400, 64, 2, torch.float32)).detach().requires_grad_()
    inputs = [predicted, positives, negatives]
    exact_inputs = [x.detach().double().requires_grad_() for x in inputs]
    exact, tiled = plain(exact_inputs, 0.1), motion(inputs, 0.1, 100_000).value
    assert tiled.dtype == torch.float32
    assert tiled.item() == pytest.approx(exact.item(), rel=1e-6, abs=1e-6)
    for ours, usual, gradient in zip(
        torch.autograd.grad(tiled, inputs),
        torch.autograd.grad(plain(inputs, 0.1), inputs),
        torch.autograd.grad(exact, exact_inputs),
        strict=True,
    ):
        assert (ours - gradient).norm() <= 2 * (usual - gradient).norm() + 1e-7 * gradient.norm()


def test_cold_temperature_neither_overflows_nor_vanishes() -> None:
    inputs = [vectors(6, 4, seed, torch.float32) for seed in (0, 1, 2)]
    loss = motion(inputs, 1e-3).value
    expected = equation(inputs[0].tolist(), inputs[1].tolist() + inputs[2].tolist(), 1e-3)
    assert expected > 100  # the positives' probabilities are far below the smallest float32
    assert loss.item() == pytest.approx(expected, rel=1e-5)
    assert all(x.isfinite().all() for x in torch.autograd.grad(loss, inputs))


def test_collapsed_embeddings_score_chance() -> None:
    same = torch.tensor([[1.0, 0.0]]).expand(6, 2)
    loss = motion_prediction(same, same, same, 0.1)
    assert loss.value.item() == pytest.approx(math.log(12), rel=1e-6)
    assert loss.accuracy.item() <= 1 / 6 + 1e-6
    assert context_matching(same, same, 0.1).accuracy.item() <= 1 / 6 + 1e-6


@pytest.mark.parametrize(
    "match", [lambda a, b, c: context_matching(a, b, 1.0), lambda a, b, c: motion_prediction(a, b, c, 1.0)]
)
def test_autocast_is_ignored_and_half_precision_raised(match: Callable[..., Loss]) -> None:
    full = [vectors(rows, 16, seed, torch.float32) for seed, rows in enumerate((10, 10, 20))]
    half = [x.detach().bfloat16().requires_grad_() for x in full]
    expected, raised = match(*full).value, match(*(x.float() for x in half)).value
    torch.testing.assert_close(expected.double(), match(*(x.double() for x in full)).value, rtol=1e-6, atol=0)
    with torch.autocast("cpu", torch.bfloat16):
        assert (full[0] @ full[1].T).dtype == torch.bfloat16
        assert_equal(match(*full).value, expected)
        loss = match(*half).value
        assert_equal(loss, raised)
    assert all(x.dtype == torch.bfloat16 for x in torch.autograd.grad(loss, half[:2]))


def test_backward_can_be_repeated() -> None:
    inputs = [vectors(5, 4, seed) for seed in (0, 1, 2)]
    loss = motion(inputs, 0.1).value
    first = torch.autograd.grad(loss, inputs, retain_graph=True)
    assert_equal(torch.autograd.grad(loss, inputs), first)


# What equation (2) costs


def test_the_matrix_of_logits_never_exists() -> None:
    inputs = [vectors(rows, 4, rows, torch.float32) for rows in (600, 600, 1200)]
    tile_bytes = 64 * 1024
    with Recorder() as tiled:
        motion(inputs, 0.1, tile_bytes).value.backward()
    assert tiled.largest <= max(tile_bytes // 4, 1800 * 4)
    with Recorder() as usual:
        plain(inputs, 0.1).backward()
    assert usual.largest == 600 * 1800  # the recorder does see such a matrix


@pytest.mark.parametrize("tile_bytes", [1000, 20_000, 2**20])
def test_products_are_those_of_the_plain_form(tile_bytes: int) -> None:
    one = 30 * 70 * 8

    def products(*needed: int) -> int:
        inputs = [x.detach().requires_grad_(i in needed) for i, x in enumerate((a, b, c))]
        with Recorder() as recorder:
            loss = motion(inputs, 0.1, tile_bytes).value
            if loss.requires_grad:
                loss.backward()
        return recorder.multiplications

    a, b, c = vectors(30, 8, 0), vectors(30, 8, 1), vectors(40, 8, 2)
    with Recorder() as usual:
        plain((a, b, c), 0.1).backward()
    assert products(0, 1, 2) == usual.multiplications == 3 * one
    assert products(0) == products(2) == 2 * one
    assert products() == one
    with Recorder() as recorder, torch.no_grad():
        motion_prediction(a, b, c, 0.1, tile_bytes)  # of leaves, which still say that they need gradients
    assert recorder.multiplications == one


# Bad input

ONES = torch.ones


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: motion_prediction(ONES(4, 3), ONES(5, 3), ONES(0, 3), 0.1), r"\(4, 3\) and \(5, 3\)"),
        (lambda: motion_prediction(ONES(4, 3), ONES(4, 2), ONES(0, 3), 0.1), r"\(4, 3\) and \(4, 2\)"),
        (lambda: motion_prediction(ONES(0, 3), ONES(0, 3), ONES(4, 3), 0.1), "one row or more"),
        (lambda: motion_prediction(ONES(2, 2, 3), ONES(2, 2, 3), ONES(0, 3), 0.1), "must be"),
        (lambda: motion_prediction(ONES(4, 3), ONES(4, 3), ONES(2, 2), 0.1), r"\(2, 2\)"),
        (lambda: motion_prediction(ONES(4, 3), ONES(4, 3), ONES(2, 2, 3), 0.1), r"\(2, 2, 3\)"),
        (lambda: motion_prediction(ONES(4, 3), ONES(4, 3), ONES(0, 3), 0.0), "positive"),
        (lambda: motion_prediction(ONES(4, 3), ONES(4, 3), ONES(0, 3), math.nan), "positive"),
        (lambda: context_matching(ONES(4, 3), ONES(2, 3), 0.1), r"\(4, 3\) and \(2, 3\)"),
        (lambda: context_matching(ONES(4, 3), ONES(4, 3), -1), "temperature is -1"),
    ],
)
def test_what_cannot_be_compared_is_refused(call: Callable[[], object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()
