"""What motion compensation left to be transmitted: the energy of every macroblock's residual, exact, by numpy alone.

MPEG-4 Part 2 has no filter in its loop. So a decoded macroblock less its prediction, which is the frame before moved by
the block's vector, is what the stream transmitted for it (but for pixels that were cut off at 0 and 255). The
prediction is that of ISO/IEC 14496-2, section 7.6: half pixels are means of two or four neighbours, rounded as the
frame's rounding control says, and what lies outside repeats the edge of the *coded* frame, which is whole macroblocks.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from typing import Any

import av
import numpy as np

from preprocess.schema import INTRA, MACROBLOCK, NO_RESIDUAL, QUARTERS

ROW = f"V{MACROBLOCK}"  # a row of a block as one item: copied many times faster than pixel by pixel


def padded_luma(frame: av.VideoFrame, grid: tuple[int, int]) -> np.ndarray:
    """Luma of a decoded frame of rows x cols macroblocks, with one more of repeated edge on each side.

    uint8 (16 rows + 32, 16 cols + 32). Of a frame of 340x256 it takes all 352 columns, and of one of 120x90 all 96
    lines: FFmpeg's decoders write whole macroblocks, whatever of them the frame is said to have.
    """
    plane, edge = frame.planes[0], MACROBLOCK
    height, width = (MACROBLOCK * blocks for blocks in grid)
    assert plane.line_size >= width
    memory: Any = (ctypes.c_ubyte * (height * plane.line_size)).from_address(plane.buffer_ptr)
    padded = np.empty((height + 2 * edge, width + 2 * edge), np.uint8)  # np.pad takes three times as long
    padded[edge:-edge, edge:-edge] = np.ndarray((height, width), np.uint8, memory, strides=(plane.line_size, 1))
    padded[edge:-edge, :edge] = padded[edge:-edge, edge : edge + 1]
    padded[edge:-edge, -edge:] = padded[edge:-edge, -edge - 1 : -edge]
    padded[:edge], padded[-edge:] = padded[edge], padded[-edge - 1]
    return padded


def energies(lumas: Sequence[np.ndarray], motion: np.ndarray) -> np.ndarray:
    """Sum of the residual's absolute values over each macroblock of a group of pictures: uint16 (n, rows, cols).

    lumas: of its n frames, from `padded_luma`; motion: int16 (n, rows, cols, 2), as `preprocess.schema` defines it.
    `NO_RESIDUAL` where a block has no vector, and so no prediction.
    """
    rows, cols = motion.shape[1:3]
    pitch = lumas[0].shape[1]  # bytes a line; places in a frame are counted in bytes from its first
    inter = motion[..., 0] != INTRA
    home = MACROBLOCK * np.stack(np.meshgrid(np.arange(cols), np.arange(rows)), axis=-1)  # (rows, cols, 2): x, y
    # Half pixels from the coded frame's corner to where each block's content came from.
    source = 2 * home - np.where(inter[..., None], motion, 0) // (QUARTERS // 2)
    # Further out than the edge is repeated there is but more of the same.
    whole = (source >> 1).clip(-MACROBLOCK, MACROBLOCK * np.array([cols, rows]) - 1)
    start, here = ((place + MACROBLOCK) @ (1, pitch) for place in (whole, home))
    right, down = np.moveaxis(source & 1, -1, 0)
    half = (right | down) > 0
    # The mean of four pixels; where only one coordinate is half a pixel off, two of them are taken twice, which gives
    # what the standard says of the mean of two.
    corners = start[:, None] + np.stack([0 * right, right, pitch * down, right + pitch * down], axis=1)
    found = np.full(motion.shape[:3], NO_RESIDUAL, np.uint16)
    for t in range(1, len(lumas)):
        predicted, now = _blocks(lumas[t - 1], start[t]), _blocks(lumas[t], here)
        four = _blocks(lumas[t - 1], corners[t][:, half[t]]).sum(0, dtype=np.uint16)
        four += 2 - t % 2  # FFmpeg's encoder sets the rounding control for the first P-frame, not the second, and so on
        predicted[half[t]] = four >> 2
        difference = np.maximum(now, predicted) - np.minimum(now, predicted)
        found[t] = difference.sum(-1, dtype=np.uint16)
    found[~inter] = NO_RESIDUAL
    return found


def _blocks(luma: np.ndarray, start: np.ndarray) -> np.ndarray:
    """The blocks of a padded frame that begin at these places: uint8 (..., 256)."""
    pitch = luma.shape[1]
    places = luma.size - (MACROBLOCK - 1) * (pitch + 1)
    return np.ndarray((places, MACROBLOCK), ROW, luma, strides=(1, pitch))[start].view(np.uint8)
