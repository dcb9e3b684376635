"""Masks as COCO's compressed RLE, encoded from windows of the image.

COCO counts pixels column by column, and the counts of no mask, mask, no mask, ... alternate. A bitmap of the
whole image is never made: 100 of them take 18 GB in an image of 13,000 x 13,000 pixels.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from pycocotools import mask as mask_util
from torch import Tensor

from giantdet.ops.masks import paste_mask

Rle = dict[str, Any]
"""`size` is [height, width], `counts` a str, for JSON."""
_PASTED_PIXELS = 1 << 21  # at a time; float32 temporaries of them take 8 MB each


def encode_pasted(mask_SS: Tensor, box_4: Tensor, size_hw: tuple[int, int], at_pixel_centres: bool) -> Rle:
    """Return the RLE of an object's mask, pasted as in `ops/masks.py` into an image of `size_hw`.

    `mask_SS` are probabilities in the frame of the box, `box_4` xyxy pixels of the image; both on the CPU.
    Only the surroundings of the box are pasted, a strip of columns at a time.
    """
    left, top, right, bottom = _window(box_4.tolist(), mask_SS.shape[0], size_hw)
    columns = max(1, _PASTED_PIXELS // max(1, bottom - top))
    parts = [np.zeros(0, np.int64)]
    for first in range(left, right, columns):
        window = (first, top, min(first + columns, right), bottom)
        strip = paste_mask(mask_SS, box_4, window, at_pixel_centres=at_pixel_centres)
        parts.append(_changes(strip.numpy(), top, first, size_hw[0]))
    return encoded(np.concatenate(parts), size_hw)


def _window(box: list[float], side: int, size_hw: tuple[int, int]) -> tuple[int, int, int, int]:
    """Return the pixels in which the mask of a box may count: up to a cell and a pixel beyond it."""
    if not all(map(math.isfinite, box)):
        return 0, 0, 0, 0
    ends: list[int] = []
    for low, high, length in ((box[0], box[2], size_hw[1]), (box[1], box[3], size_hw[0])):
        margin = max(0.0, high - low) / side + 1
        ends.append(min(max(math.floor(low - margin), 0), length))
        ends.append(max(min(math.ceil(high + margin), length), ends[-1]))
    return ends[0], ends[2], ends[1], ends[3]


def _changes(mask_hw: NDArray[np.bool_], top: int, left: int, height: int) -> NDArray[np.int64]:
    """Return where the runs in a window of an image begin and end, for `encoded`; each column has its own."""
    columns = np.pad(mask_hw.T, ((0, 0), (1, 1)))
    column, row = np.nonzero(columns[:, 1:] != columns[:, :-1])
    return (left + column) * height + top + row


def encoded(changes: NDArray[np.int64], size_hw: tuple[int, int]) -> Rle:
    """Return the RLE of a mask from the pixels at which its runs begin and end, in turns.

    Pixels are numbered column by column. A run that ends where the next one begins is one with it.
    """
    pixels = size_hw[0] * size_hw[1]
    same = np.flatnonzero(changes[1:] == changes[:-1])
    changes = np.delete(changes, np.concatenate([same, same + 1]))
    counts = np.diff(changes, prepend=0, append=pixels)
    if len(changes) and changes[-1] == pixels:  # COCO has no last count of 0
        counts = counts[:-1]
    rle = mask_util.frPyObjects({"size": list(size_hw), "counts": counts.tolist()}, *size_hw)
    return {"size": rle["size"], "counts": rle["counts"].decode("ascii")}


def decode_mask(rle: Mapping[str, Any]) -> Tensor:
    """Return a mask as a bool bitmap `[h, w]`."""
    return torch.from_numpy(np.ascontiguousarray(mask_util.decode(rle))).bool()
