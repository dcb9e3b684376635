"""Smooth shapes on pictures: outlines of masks as polygons, painted with anti-aliased edges.

Polygons are made by contourpy and painted by Agg, both parts of matplotlib. Agg needs 4 bytes a pixel, so a
large picture is painted in tiles.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import contourpy
import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageFilter

from giantdet.engine.colors import Color

_TILE = 2048  # pixels of a side; Agg itself has a limit of 2^16
_LONGEST = 1024  # pixels of a mask's side that are looked at: larger masks are reduced
_BLUR = 0.8  # pixels; removes the steps of a mask, and moves its border by less than one pixel


class Shape(NamedTuple):
    """Closed polygons with holes, in pixels of the picture, and how they are painted."""

    rings: Sequence[NDArray[np.floating[Any]]]  # each [n, 2], xy; holes run in the other direction
    fill: tuple[Color, float] | None = None  # with its opacity
    line: tuple[Color, float] | None = None  # with its opacity
    width: float = 1.0  # of the line

    @property
    def box(self) -> tuple[float, float, float, float]:
        """The box xyxy that it is painted in."""
        points_N2 = np.concatenate(self.rings)
        (x0, y0), (x1, y1) = points_N2.min(0), points_N2.max(0)
        return x0 - self.width, y0 - self.width, x1 + self.width, y1 + self.width


def outlines(mask_hw: NDArray[Any], corner_xy: tuple[int, int], zoom: float) -> list[NDArray[Any]]:
    """Return the outlines of a mask as polygons, in pixels of a picture that is enlarged by `zoom`.

    `mask_hw`, bool or 0 and 1, is the window of a mask with its upper left corner at `corner_xy` of the
    image. There are no polygons for a mask without pixels.
    """
    if not mask_hw.any():
        return []
    window = Image.fromarray(np.multiply(mask_hw, np.uint8(255), order="C"))
    factor = max(1, -(-max(window.size) // _LONGEST))
    if factor > 1:
        window = window.reduce(factor)
    padded = Image.new("L", (window.width + 6, window.height + 6))
    padded.paste(window, (3, 3))
    stepped, smooth = np.asarray(padded), np.asarray(padded.filter(ImageFilter.GaussianBlur(_BLUR)))
    if ((stepped > 127) & (smooth > 127)).sum() < 0.8 * (stepped > 127).sum():
        smooth = stepped  # the blur would remove a mask of a few pixels, or a thin one
    filled: Any = contourpy.contour_generator(z=smooth.astype(np.float32)).filled(127.5, 256.0)
    rings = []
    for points, ends in zip(*filled, strict=True):
        # The value of a pixel is that of its centre.
        scaled = ((points - 2.5) * factor + np.array(corner_xy)) * zoom
        rings += np.split(scaled, ends[1:-1].astype(int))
    return rings


def rectangle(box: Sequence[float], radius: float = 0.0) -> NDArray[np.float64]:
    """Return a rectangle xyxy with rounded corners as a polygon."""
    x0, y0, x1, y1 = box
    radius = max(0.0, min(radius, (x1 - x0) / 2, (y1 - y0) / 2))
    if radius == 0:
        return np.array([(x0, y0), (x1, y0), (x1, y1), (x0, y1), (x0, y0)])
    angles = np.linspace(0, np.pi / 2, 6)
    corners = [(x1 - radius, y1 - radius), (x0 + radius, y1 - radius)]
    corners += [(x0 + radius, y0 + radius), (x1 - radius, y0 + radius)]
    arcs = [
        np.stack([x + radius * np.cos(angles + turn), y + radius * np.sin(angles + turn)], 1)
        for (x, y), turn in zip(corners, np.arange(4) * np.pi / 2, strict=True)
    ]
    return np.concatenate([*arcs, arcs[0][:1]])


def paint(picture: Image.Image, shapes: Sequence[Shape]) -> None:
    """Paint shapes on an RGB picture, the first one lowest."""
    boxes_N4 = np.array([shape.box for shape in shapes]).reshape(-1, 4)
    for top in range(0, picture.height, _TILE):
        for left in range(0, picture.width, _TILE):
            right, bottom = min(left + _TILE, picture.width), min(top + _TILE, picture.height)
            x0, y0, x1, y1 = boxes_N4.T
            inside_N = (x0 < right) & (x1 > left) & (y0 < bottom) & (y1 > top)
            here = [shapes[n] for n in np.flatnonzero(inside_N).tolist()]
            if here:
                _paint_tile(picture, (left, top, right, bottom), here)


def _paint_tile(picture: Image.Image, tile: tuple[int, int, int, int], shapes: Sequence[Shape]) -> None:
    from matplotlib.backends import backend_agg
    from matplotlib.path import Path
    from matplotlib.transforms import Affine2D

    left, top, right, bottom = tile
    agg: Any = backend_agg  # without types
    renderer = agg.RendererAgg(right - left, bottom - top, 72.0)  # at 72 dpi a point is a pixel
    pixels_HW4 = np.asarray(renderer.buffer_rgba())
    pixels_HW4[..., :3] = np.asarray(picture.crop(tile))
    pixels_HW4[..., 3] = 255
    # Agg's y axis points upwards.
    to_tile: Any = Affine2D().translate(-left, -top).scale(1, -1).translate(0, bottom - top)
    for shape in shapes:
        path = Path.make_compound_path(*(Path(ring, closed=True) for ring in shape.rings))
        context = renderer.new_gc()
        context.set_joinstyle("round")
        color, opacity = shape.line or ((0, 0, 0), 0.0)
        context.set_linewidth(shape.width if shape.line is not None else 0.0)
        context.set_foreground(_rgba(color, opacity), isRGBA=True)
        renderer.draw_path(context, path, to_tile, None if shape.fill is None else _rgba(*shape.fill))
    picture.paste(Image.fromarray(pixels_HW4[..., :3]), (left, top))


def _rgba(color: Color, opacity: float) -> tuple[float, float, float, float]:
    red, green, blue = color
    return red / 255, green / 255, blue / 255, opacity
