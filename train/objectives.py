"""The objectives: context matching (equation 1), motion prediction (equation 2), their sum (equation 3), and the
regression and classification variants of motion prediction in table 1, whose targets `train.model.MotionScale` scales.

B: clips of this rank, N: motion points of a clip, C: width of the embeddings. Embeddings arrive with unit length, so
that products are the cosines of the paper. Keys come from all ranks, losses and accuracies are means over the rows of
this rank: their mean over ranks, which DistributedDataParallel takes of gradients, is that of the whole batch. Inputs
in half precision are raised to float32, and autocast is left aside; torch.set_float32_matmul_precision decides, as
everywhere in torch, whether float32 products may use TF32 or bfloat16 arithmetic (they add up in float32 regardless).
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from train.config import MotionLoss
from train.distributed import gather_with_gradient, rank

# Memory for the logits of one tile. In equation (2) at batch 512 a row has 100,352 logits, 0.4 MB in float32, and the
# whole matrix 10 GB. 64 MiB are 167 rows: enough for the products to be bound by arithmetic rather than by reading the
# keys again for every tile, and less than the keys themselves (205 MB), so that a smaller tile would save nothing.
TILE_BYTES = 64 * 2**20
FAR = -1e9  # added to a logit, leaves nothing of its exponential, and remains a number where no key is left


class Loss(NamedTuple):
    """`value`: scalar with gradient. `accuracy`: scalar without, the share of rows whose target scores highest (table
    7), None where the loss ranks nothing."""

    value: Tensor
    accuracy: Tensor | None


class Points(NamedTuple):
    """What the motion loss compares, row for row a point of the motion grid."""

    predicted: Tensor
    """(B N, C): unit length for equation (2); else values (C = 2) or logits (C = 2 bins) of dx and dy."""
    targets: Tensor
    """(B N, C); else (B N, 2), standardised values or numbers of classes."""
    negatives: Tensor | None
    """(B K N, C): points of the negative windows, equation (2) only."""


def context_matching(clips: Tensor, iframes: Tensor, temperature: float) -> Loss:
    """Equation (1): every clip finds the I-frame of its own video among the I-frames of the batch.

    clips, iframes: (B, C) of unit length, row for row from the same video. Raises ValueError on other shapes.
    """
    _check(clips, iframes, iframes[:0], temperature)
    with torch.autocast(clips.device.type, enabled=False):
        queries, keys = _at_least_float32(clips), gather_with_gradient(_at_least_float32(iframes))
        logits = (queries / temperature) @ keys.T  # (B, B of all ranks)
        target = torch.arange(len(queries), device=logits.device) + rank() * len(queries)
        return Loss(F.cross_entropy(logits, target), _accuracy(logits.argmax(1), target, logits.dtype))


def motion_prediction(
    predicted: Tensor,
    positives: Tensor,
    negatives: Tensor,
    temperature: float,
    tile_bytes: int = TILE_BYTES,
    *,
    serves: Tensor | None = None,
) -> Loss:
    """Equation (2): every predicted motion point finds its own among all motion points of the batch.

    predicted, positives: (B·N, C), row for row the same video and position; negatives: (M, C), the points of the
    negative windows (section 4.1), keys for every row like the positives, M = 0 allowed; all of unit length, and the
    same shapes on every rank. `serves`, bool (B,), leaves videos out, as rows and as keys; the mean is still over all
    B·N rows, so that a video's share does not depend on the others.

    Equal to the softmax over the whole matrix of logits, which never exists: it is computed in tiles of rows of at most
    `tile_bytes` (one row at least), gradient included. First derivatives only. Raises ValueError on other shapes.
    """
    _check(predicted, positives, negatives, temperature)
    with torch.autocast(predicted.device.type, enabled=False):
        own = torch.cat((_at_least_float32(positives), _at_least_float32(negatives)))
        queries, keys = _at_least_float32(predicted), gather_with_gradient(own)  # (B·N, C), (K, C)
        rows = columns = None
        if serves is not None:
            rows = serves.repeat_interleave(len(predicted) // len(serves))  # (B·N)
            mine = torch.cat((rows, serves.repeat_interleave(len(negatives) // len(serves))))
            columns = gather_with_gradient(torch.where(mine, 0.0, FAR).to(queries.dtype))  # (K)
        if not torch.is_grad_enabled():  # a Function is told that its inputs need gradients even where none are taken
            queries, keys = queries.detach(), keys.detach()
        value, accuracy = _TiledMatching.apply(queries, keys, rows, columns, rank() * len(own), temperature, tile_bytes)
    return Loss(value, accuracy)


def motion_loss(kind: MotionLoss, points: Points, temperature: float, serves: Tensor | None = None) -> Loss:
    """The motion loss that the objective names, of what a model found; `serves` as in `motion_prediction`."""
    if points.negatives is not None:
        return motion_prediction(points.predicted, points.targets, points.negatives, temperature, serves=serves)
    loss = motion_regression if kind == "mse" else motion_classification
    return loss(points.predicted, points.targets)


class _TiledMatching(torch.autograd.Function):
    """Cross-entropy of queries (R, C) against keys (K, C), where row r belongs to key first + r; of the rows (R,) that
    are true, where given, with columns (K,) added to each row's logits.

    The loss is a scalar, so its gradient is known up to one factor while a tile is at hand: forward takes it there, and
    backward multiplies. That makes the three products of the plain form, with nothing kept or computed twice. Nothing
    waits for the device: the rows' keys are consecutive, so slices and diagonals take the place of index look-ups.
    """

    @staticmethod
    def forward(
        ctx: Any,
        queries: Tensor,
        keys: Tensor,
        rows: Tensor | None,
        columns: Tensor | None,
        first: int,
        temperature: float,
        tile_bytes: int,
    ) -> tuple[Tensor, Tensor]:
        count = len(queries)
        height = min(count, max(1, tile_bytes // (len(keys) * keys.element_size())))
        tile = queries.new_empty(height, len(keys))
        losses = queries.new_empty(count)
        best = torch.empty(count, dtype=torch.int64, device=queries.device)
        grad_queries = torch.empty_like(queries) if ctx.needs_input_grad[0] else None
        grad_keys = torch.zeros_like(keys) if ctx.needs_input_grad[1] else None
        for start in range(0, count, height):
            stop = min(start + height, count)
            own = first + start  # column of the first row's key, so that the diagonal from there is the positives
            scaled = queries[start:stop] / temperature  # (r, C)
            logits = torch.mm(scaled, keys.T, out=tile[: stop - start])  # (r, K)
            if columns is not None:
                logits += columns
            positive = logits.diagonal(own).clone()  # (r)
            highest, best[start:stop] = logits.max(1)
            numerators = logits.sub_(highest[:, None]).exp_()  # of the softmax, in the same memory
            total = numerators.sum(1)
            losses[start:stop] = highest + total.log() - positive
            # Softmax minus one at the positive, times the sum, which is divided out of the smaller operand instead.
            # Subtracting the positives' embeddings after the products would lose digits once the positives dominate.
            numerators.diagonal(own).sub_(total)
            if rows is not None:
                numerators *= rows[start:stop, None]
            if grad_queries is not None:
                gradient = torch.mm(numerators, keys, out=grad_queries[start:stop])
                gradient.div_(total[:, None] * (temperature * count))
            if grad_keys is not None:
                grad_keys.addmm_(numerators.T, scaled.div_(total[:, None] * count))
        ctx.save_for_backward(grad_queries, grad_keys)
        right = (best == torch.arange(first, first + count, device=best.device)).to(losses.dtype)
        if rows is None:
            accuracy = right.mean()
        else:
            losses, right = losses * rows, right * rows
            accuracy = right.sum() / rows.sum().clamp(min=1)
        ctx.mark_non_differentiable(accuracy)
        return losses.mean(), accuracy

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_loss: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        # Not in place: with retain_graph the stored gradients are multiplied again.
        grad_queries, grad_keys = (None if x is None else x * grad_loss for x in ctx.saved_tensors)
        return grad_queries, grad_keys, None, None, None, None, None


def motion_targets(maps: Tensor, grid: tuple[int, int, int]) -> Tensor:
    """Motion averaged onto the grid of the predicted points, the target of table 1's two other losses.

    maps: (B, 2, T, H, W), dx and dy in tens of pixels, within [-1, 1]; grid: (T3, H3, W3), none larger than the maps.
    Returns (B·N, 2), points in the order (video, t, y, x): the rows of `predicted` in `motion_prediction`.
    """
    if maps.dim() != 5 or maps.shape[1] != 2:
        raise ValueError(f"motion maps have the shape {tuple(maps.shape)}; they must be (B, 2, T, H, W)")
    if any(points < 1 or points > size for points, size in zip(grid, maps.shape[2:], strict=True)):
        raise ValueError(f"the grid {tuple(grid)} does not fit maps of {tuple(maps.shape[2:])}; it can only be coarser")
    return F.adaptive_avg_pool3d(maps, grid).movedim(1, -1).reshape(-1, 2)


def motion_regression(predicted: Tensor, target: Tensor) -> Loss:
    """Table 1, MSE: predicted (B·N, 2) against standardised targets (B·N, 2). It ranks nothing."""
    if predicted.shape != target.shape:
        raise ValueError(f"{tuple(predicted.shape)} values for {tuple(target.shape)} targets; both must be (B·N, 2)")
    return Loss(F.mse_loss(_at_least_float32(predicted), _at_least_float32(target)), None)


def motion_classification(logits: Tensor, classes: Tensor) -> Loss:
    """Table 1, cross-entropy: logits (B·N, 2·bins), the classes of dx before those of dy, against int64 (B·N, 2).

    The mean over points and components; so is the accuracy.
    """
    if logits.dim() != 2 or logits.shape[1] < 4 or logits.shape[1] % 2 or classes.shape != (len(logits), 2):
        raise ValueError(
            f"{tuple(logits.shape)} logits for {tuple(classes.shape)} classes; they must be (B·N, 2·bins) and "
            "(B·N, 2), with 2 bins or more"
        )
    return classification(logits.reshape(classes.numel(), -1), classes.flatten())  # (B·N·2, bins), (B·N·2)


def classification(scores: Tensor, target: Tensor) -> Loss:
    """Cross-entropy of scores (B, classes) against int64 (B,)."""
    scores = _at_least_float32(scores)
    return Loss(F.cross_entropy(scores, target), _accuracy(scores.argmax(1), target, scores.dtype))


def joint(context_loss: Tensor, motion_loss: Tensor, alpha: float, scale: float) -> Tensor:
    """Equation (3) times `scale`: scale · ((1 − α)·J_I + α·J_M), with α within [0, 1]."""
    return scale * ((1 - alpha) * context_loss + alpha * motion_loss)


def _accuracy(best: Tensor, target: Tensor, dtype: torch.dtype) -> Tensor:
    # By the index of the highest score, not by comparing scores: where a network has collapsed and all scores are
    # equal, every positive would count as found.
    return (best == target).to(dtype).mean()


def _at_least_float32(x: Tensor) -> Tensor:
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x


def _check(queries: Tensor, positives: Tensor, negatives: Tensor, temperature: float) -> None:
    if queries.dim() != 2 or queries.shape != positives.shape or len(queries) == 0:
        raise ValueError(
            f"embeddings of shapes {tuple(queries.shape)} and {tuple(positives.shape)} cannot be matched row for row; "
            "both must be (rows, C), with one row or more"
        )
    if negatives.dim() != 2 or negatives.shape[1] != queries.shape[1]:
        raise ValueError(f"negatives have the shape {tuple(negatives.shape)}; they must be (M, {queries.shape[1]})")
    if not temperature > 0:
        raise ValueError(f"the temperature is {temperature}; it must be positive (the paper's authors used 0.1)")
