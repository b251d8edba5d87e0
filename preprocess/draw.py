"""Motion and residuals as pictures. Only numpy, and matplotlib for arrows, so that every stage can use it.

Motion is (dx, dy), the displacement of the content from the previous frame to this one, +x right, +y down, in pixels of
the encoded frame, one vector a 16x16 block. Block (r, c) covers encoded pixels [16c, 16c + 16) x [16r, 16r + 16); the
grid may overhang the frame (22 blocks are 352 pixels for a frame of 340), and the overhang is not drawn.

Colours follow the Middlebury optical-flow evaluation (Baker et al., "A Database and Evaluation Methodology for Optical
Flow"): the hue says the direction (right red, down yellow, left azure, up violet), the saturation the magnitude; no
motion is white. Their wheel gives the hues unequal arcs, so that equally different directions look equally different.
One difference: magnitudes beyond the limit keep the full colour, instead of a darker one.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

if TYPE_CHECKING:
    from matplotlib.figure import Figure

BLOCK = 16  # pixels of the encoded frame, each way
SMALLEST = 0.5  # pixels; shorter vectors are at the precision of the search and only clutter the picture

INTRA_GREY = (168, 168, 168)
HATCH_GREY = (112, 112, 112)
ARROW_FILL, ARROW_OUTLINE = "#ffe228", "black"
QUIVER: dict[str, Any] = {"angles": "xy", "scale_units": "xy", "scale": 1, "units": "dots"}
QUIVER |= {"headwidth": 4, "headlength": 4, "headaxislength": 4}
DPI = 100  # of every page; only its lines and letters depend on it

# Lengths of the six arcs of the Middlebury wheel: red-yellow, yellow-green, green-cyan, cyan-blue, blue-magenta,
# magenta-red. Between two of these six colours one channel moves linearly, which is what a hue does.
_ARC_ENDS = np.cumsum([0, 15, 6, 4, 11, 13, 6])

Image = npt.NDArray[np.uint8]
Floats = npt.NDArray[np.floating]
Mask = npt.NDArray[np.bool_]


def colour_wheel(motion: npt.ArrayLike, limit: float, intra: Mask | None = None) -> Image:
    """Colours of motion vectors, in the Middlebury convention (see the module).

    motion: (..., 2) pixels. limit: the magnitude in pixels that gets the full colour; longer vectors get it too.
    intra: (...) true where a block has no vector; those become INTRA_GREY, which no vector can become.
    Returns uint8 RGB (..., 3). ValueError where a shape makes no sense.
    """
    vectors = _vectors(motion)
    turn = np.arctan2(vectors[..., 1], vectors[..., 0]) / (2 * np.pi) % 1.0
    hue = np.interp(turn * _ARC_ENDS[-1], _ARC_ENDS, np.arange(7))  # in sixths: 0 red, 1 yellow, 2 green, ...
    saturation = np.minimum(np.hypot(vectors[..., 0], vectors[..., 1]) / limit, 1.0)
    # A pure hue has each channel full for two sixths either side of its own, and a ramp of one sixth at both ends.
    away = np.abs((hue[..., None] - np.array([0.0, 2.0, 4.0]) + 3.0) % 6.0 - 3.0)
    pure = np.clip(2.0 - away, 0.0, 1.0)
    colours = np.rint(255 * (1.0 - saturation[..., None] * (1.0 - pure))).astype(np.uint8)
    if intra is not None:
        if intra.shape != vectors.shape[:-1]:
            raise ValueError(f"intra has shape {intra.shape}, but the motion has {vectors.shape[:-1]} blocks")
        colours[intra] = INTRA_GREY
    return colours


def wheel_legend(size: int) -> Image:
    """The wheel as a disc on white, uint8 (size, size, 3): a vector from the centre has the colour it ends on."""
    radius = size / 2
    offset = (np.arange(size) + 0.5 - radius) / radius
    vectors = np.stack(np.meshgrid(offset, offset, indexing="xy"), axis=-1)
    legend = colour_wheel(vectors, 1.0)
    legend[np.hypot(vectors[..., 0], vectors[..., 1]) > 1.0] = 255
    return legend


def colour_view(
    motion: npt.ArrayLike, limit: float, encoded: tuple[int, int], size: tuple[int, int], intra: Mask | None = None
) -> Image:
    """A motion grid in colours, seen over the same area as the frame, so that the two can be laid side by side.

    motion: (rows, cols, 2) pixels. encoded, size: (width, height) of the encoded frame and of the picture.
    intra: (rows, cols), true where a block has no vector; such blocks are hatched grey.
    Returns uint8 RGB (height, width, 3).
    """
    return _spread(colour_wheel(_grid(motion, encoded), limit, intra), encoded, size, intra)


def energy_view(
    energy: npt.ArrayLike, limit: float, encoded: tuple[int, int], size: tuple[int, int], intra: Mask
) -> Image:
    """The energy of residuals as greys, as `colour_view` shows motion: white none, black `limit` or more.

    energy: (rows, cols) grey levels a pixel. Blocks of `intra` (rows, cols), which have none, are hatched grey.
    """
    grey = np.rint(255 * (1 - np.minimum(np.asarray(energy) / limit, 1))).astype(np.uint8)
    grey[intra] = INTRA_GREY[0]
    return _spread(grey[..., None].repeat(3, axis=-1), encoded, size, intra)


def _spread(colours: Image, encoded: tuple[int, int], size: tuple[int, int], intra: Mask | None) -> Image:
    """Colours of blocks (rows, cols, 3) over the area of the frame; those of `intra` are hatched."""
    (width, height), (encoded_width, encoded_height) = size, encoded
    col = ((np.arange(width) + 0.5) * encoded_width / width / BLOCK).astype(np.intp)
    row = ((np.arange(height) + 0.5) * encoded_height / height / BLOCK).astype(np.intp)
    view = colours[row[:, None], col[None, :]]
    if intra is not None:
        stripe = (np.arange(width)[None, :] + np.arange(height)[:, None]) % 6 < 2
        view[stripe & intra[row[:, None], col[None, :]]] = HATCH_GREY
    return view


def arrows(frame: Image, motion: npt.ArrayLike, encoded: tuple[int, int], gain: float = 1.0) -> Image:
    """A frame with an arrow for each block's motion: from the block's centre, `gain` times as long as the motion.

    frame: uint8 (H, W, 3), any size. motion: (rows, cols, 2) pixels of the encoded frame, zero where there is none.
    encoded: (width, height) of the encoded frame. Vectors below half a pixel are not drawn. The arrows are light with
    a dark rim, so that they show on any background. Returns a new uint8 (H, W, 3). Needs matplotlib.
    """
    vectors = _grid(motion, encoded)
    if frame.ndim != 3 or frame.shape[2] != 3 or frame.dtype != np.uint8:
        raise ValueError(f"the frame is {frame.dtype} {frame.shape}: uint8 (height, width, 3) is needed")
    height, width = frame.shape[:2]
    scale = np.array([width / encoded[0], height / encoded[1]])
    rows, cols = vectors.shape[:2]
    centre = np.stack(np.meshgrid(np.arange(cols), np.arange(rows), indexing="xy"), axis=-1) * BLOCK + BLOCK / 2
    drawn = (np.hypot(vectors[..., 0], vectors[..., 1]) >= SMALLEST) & (centre < encoded).all(axis=-1)
    layer = _quiver(centre[drawn] * scale, gain * vectors[drawn] * scale, width, height)  # (H, W, 4)
    cover = layer[..., 3:] / 255
    return np.rint(frame + cover * (layer[..., :3] - frame.astype(np.float64))).astype(np.uint8)


def _quiver(tails: Floats, spans: Floats, width: int, height: int) -> Image:
    """Arrows alone, on a transparent layer of so many pixels: RGBA (height, width, 4). tails, spans: (n, 2) pixels."""
    figure = new_figure(width, height, facecolor="none")
    axes = figure.add_axes((0, 0, 1, 1), xlim=(0, width), ylim=(height, 0))
    axes.axis("off")
    shaft = max(1.2, 0.004 * width)  # pixels; the head is four times as wide and long
    for rim, colour in ((max(1.0, 0.003 * width), ARROW_OUTLINE), (0.0, ARROW_FILL)):  # pixels, either side
        line: dict[str, Any] = {"facecolor": colour, "edgecolor": colour, "linewidth": 2 * rim * 72 / DPI}
        axes.quiver(*tails.T, *spans.T, width=shaft, **line, **QUIVER)
    return pixels(figure)


def new_figure(width: int, height: int, **options: Any) -> Figure:
    """An empty page of this many pixels, apart from pyplot's global state. ValueError where matplotlib is missing."""
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ValueError("pictures need matplotlib: pip install matplotlib") from error
    figure = Figure(figsize=((width + 0.01) / DPI, (height + 0.01) / DPI), dpi=DPI, **options)  # it rounds down
    FigureCanvasAgg(figure)
    return figure


def pixels(figure: Figure) -> Image:
    """A page as drawn: RGBA (height, width, 4)."""
    canvas: Any = figure.canvas
    canvas.draw()
    return np.asarray(canvas.buffer_rgba())


def enlarge(image: Image, factor: int) -> Image:
    """Each pixel of an image, uint8 (H, W, ...), as a square of factor x factor pixels."""
    return image.repeat(factor, axis=0).repeat(factor, axis=1)


def _vectors(motion: npt.ArrayLike) -> Floats:
    vectors = np.asarray(motion, dtype=np.float64)
    if vectors.ndim < 1 or vectors.shape[-1] != 2:
        raise ValueError(f"the motion has shape {vectors.shape}: its last axis must hold dx and dy")
    return vectors


def _grid(motion: npt.ArrayLike, encoded: tuple[int, int]) -> Floats:
    vectors = _vectors(motion)
    needed = (-(-encoded[1] // BLOCK), -(-encoded[0] // BLOCK), 2)
    if vectors.shape != needed:
        raise ValueError(
            f"the motion has shape {vectors.shape}, but a frame of {encoded[0]}x{encoded[1]} has a grid of {needed}"
        )
    return vectors
