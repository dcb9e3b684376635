"""Tiles of a very large image: where they are, which detections a neighbour sees better, masks in the image.

Shapes: D detections · H, W the image · h, w a tile. All coordinates are pixels of the original image.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from giantdet.data.segments import rle_counts
from giantdet.errors import InputError
from giantdet.evaluation.rle import Rle, encoded

BORDER = 2  # pixels: boxes of objects that a border cuts end up to this far from it


class Tile(NamedTuple):
    """A window of the image, and the edges of its neighbours inside it.

    `inner_left` is the right edge of the tile on the left, `inner_right` the left edge of the tile on the
    right, in pixels of the image; None at the image's own borders. The same for rows.
    """

    top: int
    left: int
    bottom: int
    right: int
    inner_top: int | None
    inner_left: int | None
    inner_bottom: int | None
    inner_right: int | None


def tiles_of(size_hw: tuple[int, int], side: int, overlap: float) -> list[Tile]:
    """Return the tiles of `side` x `side` pixels that cover an image (height, width), row by row.

    Neighbours share `overlap` of their side; the last row and column share more, as they are shifted inwards
    to be of full size. A tile is smaller only where the image is. Raises InputError, a ValueError, for a side
    below 1 or an overlap outside of [0, 1).
    """
    if side < 1:
        raise InputError(f"a tile must have a side of at least 1 pixel, got {side}")
    if not 0 <= overlap < 1:
        raise InputError(
            f"the overlap of tiles must be at least 0 and less than 1 of their side, got {overlap:g}"
        )
    return [
        Tile(top, left, bottom, right, inner_top, inner_left, inner_bottom, inner_right)
        for top, bottom, inner_top, inner_bottom in _spans(size_hw[0], side, overlap)
        for left, right, inner_left, inner_right in _spans(size_hw[1], side, overlap)
    ]


def _spans(length: int, side: int, overlap: float) -> list[tuple[int, int, int | None, int | None]]:
    """Return start, end, end of the one before and start of the next, of the tiles along one axis."""
    step = max(1, side - round(side * overlap))
    starts = [*range(0, max(length - side, 0), step), max(length - side, 0)]
    ends = [min(start + side, length) for start in starts]
    return list(zip(starts, ends, [None, *ends[:-1]], [*starts[1:], None], strict=True))


def kept_in_tile(boxes_D4: Tensor, tile: Tile) -> Tensor:
    """Return which detections of a tile to keep, bool `[D]`; boxes are xyxy in pixels of the image.

    One that touches a border with a neighbour, within `BORDER` pixels, is dropped if it lies in the overlap,
    more than `BORDER` pixels from the overlap's other end: the neighbour sees more of that object. An object
    that is larger than the overlap may be cut by both tiles, and both detections are kept.
    """
    x0, y0, x1, y1 = boxes_D4.unbind(1)
    keep_D = torch.ones(len(boxes_D4), dtype=torch.bool)
    for low, high, start, end, before, after in (
        (x0, x1, tile.left, tile.right, tile.inner_left, tile.inner_right),
        (y0, y1, tile.top, tile.bottom, tile.inner_top, tile.inner_bottom),
    ):
        if before is not None:
            keep_D &= (low > start + BORDER) | (high >= before - BORDER)
        if after is not None:
            keep_D &= (high < end - BORDER) | (low <= after + BORDER)
    return keep_D


def shifted_rle(rle: Mapping[str, Any], corner_yx: tuple[int, int], size_hw: tuple[int, int]) -> Rle:
    """Return the RLE of a tile's mask in the image of `size_hw`, the tile's corner at `corner_yx`.

    Equal to pycocotools' encoding of the bitmap pasted into the image, which is never made.
    """
    (h, w), (top, left), height = rle["size"], corner_yx, size_hw[0]
    turns = np.cumsum(np.array(rle_counts(rle["counts"].encode()), np.int64))  # where the value changes
    # Runs end at the columns of the tile: the next column continues elsewhere in the image.
    edges = np.unique(np.concatenate([turns, np.arange(w + 1) * h]))
    inside = np.searchsorted(turns, edges[:-1], side="right") % 2 == 1
    starts, lengths = edges[:-1][inside], np.diff(edges)[inside]
    starts = (starts // h + left) * height + starts % h + top
    bounds = np.stack([starts, starts + lengths], axis=1).ravel()
    return encoded(bounds, size_hw)
