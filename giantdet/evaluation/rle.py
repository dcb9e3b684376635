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
_NOTHING = np.zeros(0, np.int64)
_PASTED_PIXELS = 1 << 21  # at a time; float32 temporaries of them take 8 MB each


def encode_pasted(
    masks_DSS: Tensor, boxes_D4: Tensor, size_hw: tuple[int, int], at_pixel_centres: bool
) -> list[Rle]:
    """Return the RLEs of objects' masks, pasted as in `ops/masks.py` into an image of `size_hw`.

    `masks_DSS` are probabilities in the frames of the boxes, `boxes_D4` xyxy pixels of the image. Only the
    surroundings of a box are pasted, a strip of columns at a time.
    """
    masks, boxes = (tensor.detach().cpu().float().numpy() for tensor in (masks_DSS, boxes_D4))
    return [
        _encode_pasted(mask_SS, box, size_hw, at_pixel_centres)
        for mask_SS, box in zip(masks, boxes.tolist(), strict=True)
    ]


def _encode_pasted(
    mask_SS: NDArray[np.float32], box: list[float], size_hw: tuple[int, int], at_pixel_centres: bool
) -> Rle:
    # Interpolation halves the outermost values at the border of the box: beyond it, none reaches 1/2.
    cells = math.inf if at_pixel_centres else mask_SS.shape[0]
    left, top, right, bottom = _window(box, cells, size_hw)
    columns = max(1, _PASTED_PIXELS // max(1, bottom - top))
    parts = []
    for first in range(left, right, columns):
        window = (first, top, min(first + columns, right), bottom)
        strip = paste_mask(mask_SS, box, window, at_pixel_centres=at_pixel_centres)
        parts.append(_changes(strip, top, first, size_hw[0]))
    return encoded(parts[0] if len(parts) == 1 else np.concatenate([_NOTHING, *parts]), size_hw)


def _window(box: list[float], cells: float, size_hw: tuple[int, int]) -> tuple[int, int, int, int]:
    """Return the pixels of a box of `cells` x `cells` values, and of a cell and a pixel beyond it."""
    if not all(map(math.isfinite, box)):
        return 0, 0, 0, 0
    ends: list[int] = []
    for low, high, length in ((box[0], box[2], size_hw[1]), (box[1], box[3], size_hw[0])):
        margin = max(0.0, high - low) / cells + 1
        ends.append(min(max(math.floor(low - margin), 0), length))
        ends.append(max(min(math.ceil(high + margin), length), ends[-1]))
    return ends[0], ends[2], ends[1], ends[3]


def _changes(columns: NDArray[np.bool_], top: int, left: int, height: int) -> NDArray[np.int64]:
    """Return where the runs in a window of an image begin and end, for `encoded`; each column has its own."""
    rows = columns.shape[1]
    padded = np.zeros((len(columns), rows + 2), bool)
    padded[:, 1:-1] = columns
    at = np.flatnonzero(padded[:, 1:] != padded[:, :-1])  # in columns of rows + 1 places
    column = at // (rows + 1)
    changes: NDArray[np.int64] = at + column * (height - rows - 1) + (left * height + top)
    return changes


def encode_window(mask_hw: NDArray[np.bool_], corner_yx: tuple[int, int], size_hw: tuple[int, int]) -> Rle:
    """Return the RLE of a window's mask in an image of `size_hw`; nothing counts outside of the window."""
    return encoded(_changes(mask_hw.T, *corner_yx, size_hw[0]), size_hw)


def encoded(changes: NDArray[np.int64], size_hw: tuple[int, int]) -> Rle:
    """Return the RLE of a mask from the pixels at which its runs begin and end, in turns.

    Pixels are numbered column by column. A run that ends where the next one begins is one with it.
    """
    pixels = size_hw[0] * size_hw[1]
    same = changes[1:] == changes[:-1]
    if same.any():
        kept = np.ones(len(changes), bool)
        kept[1:] &= ~same
        kept[:-1] &= ~same
        changes = changes[kept]
    counts = np.empty(len(changes) + 1, np.int64)
    counts[:-1], counts[-1] = changes, pixels
    counts[1:] -= changes
    if counts[-1] == 0 and len(changes):  # COCO has no last count of 0
        counts = counts[:-1]
    rle = mask_util.frPyObjects({"size": list(size_hw), "counts": counts.tolist()}, *size_hw)
    return {"size": rle["size"], "counts": rle["counts"].decode("ascii")}


def decode_mask(rle: Mapping[str, Any]) -> Tensor:
    """Return a mask as a bool bitmap `[h, w]`."""
    return torch.from_numpy(np.ascontiguousarray(mask_util.decode(rle))).bool()
