"""The canvas that suits a data set, from the sizes of its images."""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

STRIDE = 64  # of P6; every recipe's canvas is a multiple of it
LEAST_SIDE = 256  # pixels; smaller images are enlarged to it


class Canvas(NamedTuple):
    """The canvas of a data set and how its images come onto it."""

    size: list[int]
    """Height and width in pixels."""
    short_side: int
    scale: float
    """Median factor of the images."""
    why: str


def canvas(sizes_hw: NDArray[np.integer], most_short: int, most_long: int) -> Canvas:
    """Return the canvas of images of these sizes: theirs, from `LEAST_SIDE` to the recipe's two sides.

    90% of the images fill the short side; the canvas is a square if some are wide and some are tall.
    """
    heights, widths = sizes_hw.T.astype(float)
    shorts, longs = np.minimum(heights, widths), np.maximum(heights, widths)
    ratios = longs / shorts
    wanted = max(round(float(np.median(shorts)) / 32) * 32, LEAST_SIDE)
    room = int(most_long / float(np.median(ratios))) // 32 * 32
    short = max(32, min(wanted, most_short, room))
    ratio = float(np.quantile(ratios, 0.9))
    side, long = (min(math.ceil(value / STRIDE) * STRIDE, most_long) for value in (short, short * ratio))
    wide = float((widths >= heights).mean())
    shape = "wide" if wide >= 0.95 else "tall" if wide <= 0.05 else "wide and tall"
    size = {"wide": [side, long], "tall": [long, side]}.get(shape, [long, long])
    scales = np.minimum(short / shorts, np.minimum(size[0] / heights, size[1] / widths))
    why = (
        f"the images' median is {np.median(widths):.0f} x {np.median(heights):.0f}, they are {shape}, 90% "
        f"have a ratio of sides up to {ratio:.2f}; multiples of {STRIDE}, at most {most_long}"
    )
    return Canvas(size, short, float(np.median(scales)), why)
