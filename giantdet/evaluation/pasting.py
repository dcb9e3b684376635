"""Where masks begin and end in the columns of an image, without a bitmap.

A mask's probabilities lie in the frame of its box. They are interpolated bilinearly, as in detectron2
(`layers/mask_ops.py`) and torchvision (`paste_masks_in_image`), surrounded by zeros. Along a column of pixels
the interpolation is linear from one row of probabilities to the next, so the pixels where it crosses the
threshold follow from the values at these rows alone: 30 of them instead of all pixels of the box. All masks
are computed at once. The result equals the bitmaps of both, except for pixels whose probability is within
rounding of the threshold.

Shapes: D masks · S x S probabilities · K = S + 2 with the zeros around · X columns of pixels of all masks ·
N crossings.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]

_THRESHOLD = np.float32(0.5)
_COLUMNS = 1 << 13  # at a time; the values of a mask's rows in them take 1 MB


class _Axis(NamedTuple):
    """Positions of the image's pixels among the K values: (pixel + 0.5 - start) * cells / extent + shift."""

    start_D: Floats
    extent_D: Floats
    cells: int
    shift: float
    valid_D: NDArray[np.bool_]

    @classmethod
    def of(cls, low_D: Floats, high_D: Floats, side: int, at_pixel_centres: bool) -> _Axis:
        """Return the axis of detectron2's convention, or of torchvision's.

        torchvision resizes the K values to the box, which has grown with them and is truncated to whole
        pixels. A box without extent has no mask.
        """
        if at_pixel_centres:
            return cls(low_D, high_D - low_D, side, 0.5, high_D > low_D)
        centre_D = (low_D + high_D) * 0.5
        half_D = (high_D - low_D) * 0.5 * ((side + 2) / side)
        first_D, last_D = np.trunc(centre_D - half_D), np.trunc(centre_D + half_D)
        return cls(first_D, last_D - first_D + 1, side + 2, -0.5, last_D >= first_D)

    def pixels(self, length: int) -> tuple[Ints, Ints]:
        """Return the first pixel of each mask in an image of this length, and how many there are."""
        cell_D = np.where(self.valid_D, self.extent_D, 0) / self.cells
        low_D = self.start_D - cell_D - 1
        high_D = self.start_D + cell_D * (self.cells + 1) + 1
        first_D = np.floor(low_D).clip(0, length).astype(np.int64)
        last_D = np.ceil(high_D).clip(0, length).astype(np.int64)
        return first_D, np.where(self.valid_D, np.maximum(last_D - first_D, 0), 0)


def crossings(
    masks_DSS: NDArray[np.float32], boxes_D4: NDArray[np.float32], size_hw: tuple[int, int], centres: bool
) -> tuple[Ints, Ints]:
    """Return the pixels at which masks begin and end, in turns, in an image of `size_hw`, and their masks.

    Both are `[N]`, ordered by mask and pixel; pixels are numbered column by column, as COCO's RLE counts
    them. `masks_DSS` are probabilities in the frames of the boxes, `boxes_D4` xyxy pixels of the image; a box
    that is not finite has no mask. With `centres` (detectron2) values are interpolated at pixel centres and a
    pixel counts from 1/2 on; without (torchvision) the box is truncated to whole pixels, and it counts above
    1/2.
    """
    side, height = masks_DSS.shape[-1], size_hw[0]
    finite_D = np.isfinite(boxes_D4.sum(1))
    boxes_4D = np.where(finite_D[:, None], boxes_D4, 0).astype(np.float64).T
    x, y = (_Axis.of(boxes_4D[i], boxes_4D[i + 2], side, centres) for i in (0, 1))
    x = x._replace(valid_D=x.valid_D & y.valid_D & finite_D)
    left_D, columns_D = x.pixels(size_hw[1])
    mask_X = np.repeat(np.arange(len(boxes_D4)), columns_D)
    before_D = left_D - (np.cumsum(columns_D) - columns_D)  # of all columns to those of the image
    row_X, share_X = _places(x, before_D, columns_D, side)
    row_X += mask_X * (side + 2)
    values_RK, steps_RK = _by_column(masks_DSS)
    columns, places, ends = [], [], []
    for first in range(0, max(1, len(row_X)), _COLUMNS):  # once without columns, for arrays of length 0
        part = slice(first, first + _COLUMNS)
        values_XK = steps_RK.take(row_X[part], 0)
        values_XK *= share_X[part, None]
        values_XK += values_RK.take(row_X[part], 0)
        column, place, end = _along(values_XK, centres)
        columns.append(column + first)
        places.append(place)
        ends.append(end)
    column_N, place_N, ends_N = np.concatenate(columns), np.concatenate(places), np.concatenate(ends)
    mask_N = mask_X[column_N]
    place_N -= y.shift
    place_N *= (y.extent_D / y.cells)[mask_N]
    place_N += (y.start_D - 0.5)[mask_N]
    row_N = np.ceil(place_N)
    # A pixel whose value is the threshold belongs to the mask in one convention, and not in the other.
    row_N += (row_N == place_N) & (ends_N == centres)
    pixel_N = (column_N + before_D[mask_N]) * height + row_N.clip(0, height).astype(np.int64)
    return pixel_N, mask_N


def _places(axis: _Axis, before_D: Ints, columns_D: Ints, side: int) -> tuple[Ints, NDArray[np.float32]]:
    """Return the index of the value before each column of pixels, and how far it is to the next one."""
    scale_D = axis.cells / np.where(axis.valid_D, axis.extent_D, 1)
    offset_D = (before_D + 0.5 - axis.start_D) * scale_D + axis.shift
    at_X = np.arange(columns_D.sum()) * np.repeat(scale_D, columns_D)
    at_X += np.repeat(offset_D, columns_D)
    np.clip(at_X, 0, side + 1, out=at_X)
    index_X = at_X.astype(np.int64)
    return index_X, (at_X - index_X).astype(np.float32)


def _by_column(masks_DSS: NDArray[np.float32]) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Return the masks' columns with zeros around, `[D * K, K]`, and the steps from each to the next."""
    count, side = masks_DSS.shape[0], masks_DSS.shape[-1]
    values = np.zeros((count, side + 2, side + 2), np.float32)
    inner = values[:, 1:-1, 1:-1]
    np.fmax(masks_DSS.transpose(0, 2, 1), 0, out=inner)  # NaN becomes 0
    np.fmin(inner, 1, out=inner)
    steps = np.zeros_like(values)
    np.subtract(values[:, 1:], values[:, :-1], out=steps[:, :-1])
    return values.reshape(-1, side + 2), steps.reshape(-1, side + 2)


def _along(values_XK: NDArray[np.float32], centres: bool) -> tuple[Ints, Floats, NDArray[np.bool_]]:
    """Return the column of each crossing, its place among the K values, and whether the mask ends there."""
    values = values_XK.ravel()  # outermost values are 0, so no crossing is between two columns
    inside = values >= _THRESHOLD if centres else values > _THRESHOLD
    at_N = np.flatnonzero(inside[1:] != inside[:-1])
    before_N = values[at_N]
    share_N = (_THRESHOLD - before_N) / (values[at_N + 1] - before_N)
    column_N = at_N // values_XK.shape[1]
    return column_N, at_N - column_N * values_XK.shape[1] + share_N.astype(np.float64), inside[at_N]
