"""Predictors and heads against references written out step by step."""

from __future__ import annotations

import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_networks import bilinear, small_transformer, wake
from torch import nn

from train.networks.heads import MLPHead
from train.networks.predictor import Attention, ConvGRUPredictor

# ------------------------------------------------------------------------------------------------------ transformer


def weights(module: nn.Module) -> dict[str, np.ndarray]:
    return {name: value.detach().double().numpy() for name, value in module.state_dict().items()}


def attend(w: dict[str, np.ndarray], name: str, q: np.ndarray, k: np.ndarray, v: np.ndarray) -> np.ndarray:
    """Attention of one sample, (Q, D), (K, D), (K, D) -> (Q, D), one head and one query at a time."""
    q = q @ w[f"{name}query.weight"].T + w[f"{name}query.bias"]
    k = k @ w[f"{name}key.weight"].T
    v = v @ w[f"{name}value.weight"].T + w[f"{name}value.bias"]
    size = q.shape[1] // 8
    mixed = np.zeros_like(q)
    for head in range(8):
        part = slice(head * size, (head + 1) * size)
        for i in range(len(q)):
            shares = [np.exp(sum(q[i, part] * k[j, part]) / np.sqrt(size)) for j in range(len(k))]
            for j in range(len(k)):
                mixed[i, part] += shares[j] / sum(shares) * v[j, part]
    return mixed @ w[f"{name}out.weight"].T + w[f"{name}out.bias"]


def normalise(w: dict[str, np.ndarray], name: str, x: np.ndarray) -> np.ndarray:
    centred = x - x.mean(1, keepdims=True)
    scaled = centred / np.sqrt((centred**2).mean(1, keepdims=True) + 1e-5)
    return scaled * w[f"{name}.weight"] + w[f"{name}.bias"]


def feed(w: dict[str, np.ndarray], name: str, x: np.ndarray) -> np.ndarray:
    hidden = np.maximum(x @ w[f"{name}.0.weight"].T + w[f"{name}.0.bias"], 0)
    return hidden @ w[f"{name}.3.weight"].T + w[f"{name}.3.bias"]


def test_transformer_equals_a_reference() -> None:
    network = small_transformer().eval()
    x = torch.randn(2, 5, 2, 2, 3, dtype=torch.float64)
    with torch.no_grad():
        out = network(x).numpy()
    assert out.shape == (2, 3, 2, 1, 2)
    w = weights(network)
    in_pos, out_pos = w["in_positions"], w["out_positions"]
    for b in range(2):
        tokens = np.array([x[b, :, t, i, j].numpy() for t in range(2) for i in range(2) for j in range(3)])
        memory = tokens @ w["linear_in.weight"].T + w["linear_in.bias"]
        for n in range(2):
            layer = f"encoder.{n}."
            placed = memory + in_pos
            memory = normalise(w, layer + "norm1", memory + attend(w, layer + "attention.", placed, placed, memory))
            memory = normalise(w, layer + "norm2", memory + feed(w, layer + "feed_forward", memory))
        y = w["queries"]
        for n in range(4):
            layer = f"decoder.{n}."
            y = normalise(w, layer + "norm1", y + attend(w, layer + "self_attention.", y + out_pos, y + out_pos, y))
            crossed = attend(w, layer + "cross_attention.", y + out_pos, memory + in_pos, memory)
            y = normalise(w, layer + "norm2", y + crossed)
            y = normalise(w, layer + "norm3", y + feed(w, layer + "feed_forward", y))
        y = y @ w["linear_out.weight"].T + w["linear_out.bias"]
        for t in range(2):
            for j in range(2):
                np.testing.assert_allclose(out[b, :, t, 0, j], y[t * 2 + j], atol=1e-10)


def test_dropout_acts_in_training_only() -> None:
    network = small_transformer()
    x = torch.randn(1, 5, 2, 2, 3, dtype=torch.float64)
    with torch.no_grad():
        assert not torch.allclose(network(x), network(x))
        network.eval()
        assert torch.equal(network(x), network(x))
        attention = Attention(8)  # it drops attention weights, too
        tokens = torch.randn(1, 6, 8)
        assert not torch.allclose(attention(tokens, tokens, tokens), attention(tokens, tokens, tokens))
        assert torch.equal(*(attention.eval()(tokens, tokens, tokens) for _ in range(2)))


# --------------------------------------------------------------------------------------------------------- ConvGRU


def convolve(x: np.ndarray, weight: np.ndarray, bias: np.ndarray) -> np.ndarray:
    """(C, H, W) with (O, C, k, k) -> (O, H, W), zeros around, one offset of the kernel at a time."""
    reach = weight.shape[2] // 2
    padded = np.pad(x, ((0, 0), (reach, reach), (reach, reach)))
    out = np.zeros((len(weight), *x.shape[1:])) + bias[:, None, None]
    for dy in range(weight.shape[2]):
        for dx in range(weight.shape[3]):
            shifted = padded[:, dy : dy + x.shape[1], dx : dx + x.shape[2]]
            out += np.einsum("oc,chw->ohw", weight[:, :, dy, dx], shifted)
    return out


def gru_step(w: dict[str, np.ndarray], x: np.ndarray, state: np.ndarray) -> np.ndarray:
    width = len(x)
    gates = 1 / (1 + np.exp(-convolve(np.concatenate((x, state)), w["cell.gates.weight"], w["cell.gates.bias"])))
    update, reset = gates[:width], gates[width:]
    mixed = np.concatenate((x, reset * state))
    candidate = np.tanh(convolve(mixed, w["cell.candidate.weight"], w["cell.candidate.bias"]))
    return state + update * (candidate - state)


@settings(max_examples=12, deadline=None)
@given(
    in_grid=st.tuples(st.integers(1, 3), st.integers(1, 4), st.integers(1, 4)),
    out_grid=st.tuples(st.integers(1, 3), st.integers(1, 5), st.integers(1, 5)),
    out_channels=st.sampled_from([4, 6]),
)
def test_conv_gru_equals_its_steps(
    in_grid: tuple[int, int, int], out_grid: tuple[int, int, int], out_channels: int
) -> None:
    torch.manual_seed(0)
    network = ConvGRUPredictor(5, out_channels, in_grid, out_grid, width=4).double()
    for parameter in network.parameters():
        parameter.data += 0.3 * torch.randn_like(parameter)
    x = torch.randn(2, 5, *in_grid, dtype=torch.float64)
    with torch.no_grad():
        out = network(x).numpy()
    assert out.shape == (2, out_channels, *out_grid)
    w = weights(network)
    for b in range(2):
        state = np.zeros((4, *in_grid[1:]))
        for t in range(in_grid[0]):
            state = gru_step(w, convolve(x[b, :, t].numpy(), w["conv_in.weight"], w["conv_in.bias"]), state)
        for t in range(out_grid[0]):
            hidden = np.maximum(convolve(state, w["predict.0.weight"], w["predict.0.bias"]), 0)
            predicted = convolve(hidden, w["predict.2.weight"], w["predict.2.bias"])
            state = gru_step(w, predicted, state)
            resampled = np.stack([bilinear(channel, *out_grid[1:]) for channel in predicted])
            if out_channels != 4:
                resampled = convolve(resampled, w["conv_out.weight"], w["conv_out.bias"])
            np.testing.assert_allclose(out[b, :, t], resampled, atol=1e-10)


# ----------------------------------------------------------------------------------------------------------- heads


def test_head_equals_a_reference_and_has_unit_length() -> None:
    torch.manual_seed(0)
    head = wake(MLPHead(5, 7, 6)).double()
    x = torch.randn(9, 5, dtype=torch.float64)
    with torch.no_grad():
        out = head(x).numpy()
    w = weights(head)
    hidden = x.numpy() @ w["linear1.weight"].T
    hidden = (hidden - hidden.mean(0)) / np.sqrt(hidden.var(0) + 1e-5) * w["norm1.weight"] + w["norm1.bias"]
    last = np.maximum(hidden, 0) @ w["linear2.weight"].T
    last = (last - last.mean(0)) / np.sqrt(last.var(0) + 1e-5) * w["norm2.weight"] + w["norm2.bias"]
    np.testing.assert_allclose(out, last / np.sqrt((last**2).sum(1, keepdims=True)), atol=1e-12)


def test_head_ends_in_float32_under_autocast() -> None:
    torch.manual_seed(0)
    head = MLPHead(64, 96, 80)
    x = torch.randn(32, 64)
    with torch.no_grad():
        exact = head(x)
        with torch.autocast("cpu", torch.bfloat16):
            out = head(x)
    assert out.dtype == exact.dtype == torch.float32
    torch.testing.assert_close(out.norm(dim=1), torch.ones(32), atol=1e-6, rtol=0)
    torch.testing.assert_close(out, exact, atol=0.02, rtol=0)
    assert not torch.equal(out, exact)  # autocast did act on the layers before
