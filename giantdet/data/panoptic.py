"""Panoptic maps: each pixel belongs to one segment or to none, as in COCO's panoptic PNGs.

Format: https://cocodataset.org/#format-data, section 4; a pixel's id is R + 256 G + 256^2 B, and 0 is void.
"""

from __future__ import annotations

from io import BytesIO
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image

VOID = 0
"""Id of pixels that belong to no segment."""


class Segment(NamedTuple):
    """One object, or all of a stuff class."""

    id: int  # in the map
    category: int  # the data set's id of the class, or the number of a class; see the function that makes it
    is_crowd: bool = False


class PanopticMap(NamedTuple):
    """The segments of one image."""

    ids_HW: NDArray[np.int32]
    segments: list[Segment]


def read_panoptic_png(source: str | Path | BytesIO) -> NDArray[np.int32]:
    """Return the id of each pixel, [H, W]."""
    with Image.open(source) as image:
        pixels_HW3 = np.asarray(image.convert("RGB"), np.int32)
    return pixels_HW3 @ np.array([1, 256, 256**2], np.int32)


def panoptic_png(ids_HW: NDArray[np.int32]) -> bytes:
    """Return the content of a PNG file of these ids."""
    pixels_HW3 = np.stack([ids_HW >> shift & 255 for shift in (0, 8, 16)], -1).astype(np.uint8)
    file = BytesIO()
    Image.fromarray(pixels_HW3).save(file, "PNG")
    return file.getvalue()
