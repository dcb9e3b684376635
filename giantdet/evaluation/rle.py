"""Masks as COCO's compressed RLE, all masks of an image at once.

COCO counts pixels column by column, and the counts of no mask, mask, no mask, ... alternate. A bitmap of the
whole image is never made: 100 of them take 18 GB in an image of 13,000 x 13,000 pixels. The encoding is that
of pycocotools (`rleToString`), byte for byte.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from pycocotools import mask as mask_util
from torch import Tensor

from giantdet.evaluation.pasting import Ints, crossings

Rle = dict[str, Any]
"""`size` is [height, width], `counts` a str, for JSON."""


class Rles(NamedTuple):
    """The RLEs of N masks as arrays, which ranks send to each other."""

    text: NDArray[np.uint8]  # their counts, one after the other
    lengths_N: Ints  # in bytes
    sizes_N2: Ints  # height, width of the image
    areas_N: Ints  # pixels

    @classmethod
    def of(cls, rles: Sequence[Mapping[str, Any]]) -> Rles:
        """Return the arrays of compressed RLEs, whose counts are str or bytes."""
        texts = [c.encode() if isinstance(c := rle["counts"], str) else c for rle in rles]
        return cls(
            np.frombuffer(b"".join(texts), np.uint8),
            np.array([len(text) for text in texts], np.int64),
            np.array([rle["size"] for rle in rles], np.int64).reshape(-1, 2),
            np.array([mask_util.area(rle) for rle in rles], np.int64),
        )

    @classmethod
    def joined(cls, parts: Sequence[Rles]) -> Rles:
        """Return the RLEs of all parts, one after the other."""
        return cls(*map(np.concatenate, zip(*(parts or [cls.of([])]), strict=True)))

    def at(self, rows_K: Ints) -> Rles:
        """Return the RLEs of these rows."""
        counts = list(self.counts())
        text = b"".join(counts[row] for row in rows_K.tolist())
        rows = self.lengths_N[rows_K], self.sizes_N2[rows_K], self.areas_N[rows_K]
        return Rles(np.frombuffer(text, np.uint8), *rows)

    def counts(self) -> Iterator[bytes]:
        """Yield the compressed counts of each mask."""
        text, end = self.text.tobytes(), 0
        for length in self.lengths_N.tolist():
            yield text[end : end + length]
            end += length

    def records(self) -> list[Rle]:
        """Return the RLEs in COCO's format."""
        return [
            {"size": size, "counts": counts.decode("ascii")}
            for size, counts in zip(self.sizes_N2.tolist(), self.counts(), strict=True)
        ]


def encode_pasted(
    masks_DSS: Tensor, boxes_D4: Tensor, size_hw: tuple[int, int], at_pixel_centres: bool
) -> Rles:
    """Return the RLEs of objects' masks in an image of `size_hw`; see `crossings` in `pasting.py`.

    `masks_DSS` are probabilities in the frames of the boxes, `boxes_D4` xyxy pixels of the image.
    """
    masks, boxes = (tensor.detach().cpu().float().numpy() for tensor in (masks_DSS, boxes_D4))
    return _encoded(*crossings(masks, boxes, size_hw, at_pixel_centres), len(masks), size_hw)


def encode_window(mask_hw: NDArray[np.bool_], corner_yx: tuple[int, int], size_hw: tuple[int, int]) -> Rle:
    """Return the RLE of a window's mask in an image of `size_hw`; nothing counts outside of the window."""
    height, (rows, columns) = size_hw[0], mask_hw.shape
    padded = np.zeros((columns, rows + 2), bool)
    padded[:, 1:-1] = mask_hw.T
    at = np.flatnonzero(padded[:, 1:] != padded[:, :-1])  # in columns of rows + 1 places
    changes = at + at // (rows + 1) * (height - rows - 1) + (corner_yx[1] * height + corner_yx[0])
    return encoded(changes, size_hw)


def encoded(changes: Ints, size_hw: tuple[int, int]) -> Rle:
    """Return the RLE of a mask from the pixels at which its runs begin and end, in turns.

    Pixels are numbered column by column. A run that ends where the next one begins is one with it.
    """
    return _encoded(changes, np.zeros(len(changes), np.int64), 1, size_hw).records()[0]


def _encoded(changes_N: Ints, mask_N: Ints, masks: int, size_hw: tuple[int, int]) -> Rles:
    """Return the RLEs of `masks` masks from the pixels at which their runs begin and end, mask by mask."""
    pixels = size_hw[0] * size_hw[1]
    # Numbered through all masks; the end of an image is another place than the first pixel of the next.
    place_N = changes_N + mask_N * (pixels + 1)
    # Rounding must not bring an end before its beginning.
    np.maximum.accumulate(place_N, out=place_N)
    first_N = np.flatnonzero(np.diff(place_N, prepend=-1))
    # Changes at the same place cancel in pairs.
    kept_N = first_N[np.diff(first_N, append=len(place_N)) % 2 == 1]
    place_N, mask_N = place_N[kept_N], mask_N[kept_N]

    changes_D = np.bincount(mask_N, minlength=masks)
    ends_D = np.cumsum(changes_D)
    # Each mask's changes between its first place and its last: differences are the counts.
    start_D = np.arange(masks) * (pixels + 1)
    counts_C = np.diff(np.insert(place_N, ends_D, start_D + pixels), prepend=0)
    first_D = ends_D - changes_D + np.arange(masks)  # of the counts
    counts_C[first_D[1:]] -= 1
    index_C = np.arange(len(counts_C)) - np.repeat(first_D, changes_D + 1)
    areas_D = np.bincount(
        np.repeat(np.arange(masks), changes_D + 1), weights=counts_C * (index_C % 2), minlength=masks
    )
    # COCO has no last count of 0, except for an image without pixels.
    kept_C = (counts_C > 0) | (index_C == 0)
    number_C = counts_C.copy()
    number_C[2:] -= np.where(index_C[2:] > 2, counts_C[:-2], 0)
    text, lengths_C = _digits(number_C[kept_C])
    lengths_D = np.bincount(
        np.repeat(np.arange(masks), changes_D + 1)[kept_C], weights=lengths_C, minlength=masks
    )
    return Rles(
        text,
        lengths_D.astype(np.int64),
        np.tile(np.array(size_hw, np.int64), (masks, 1)),
        areas_D.astype(np.int64),
    )


def _digits(number_C: Ints) -> tuple[NDArray[np.uint8], Ints]:
    """Return numbers in COCO's text, and the length of each: the inverse of `rle_counts` in `segments.py`.

    Digits of 5 bits, the lowest first, 48 added; 32 says that more follow, and the highest bit of the last
    one is the sign.
    """
    bits_C = np.frexp((number_C ^ (number_C >> 63)).astype(np.float64))[1]  # without the sign
    length_C = bits_C.astype(np.int64) // 5 + 1
    start_C = np.cumsum(length_C) - length_C
    text = np.empty(int(length_C.sum()), np.uint8)
    left_C, rest_C = length_C, number_C
    for place in range(int(length_C.max(initial=0))):
        if place:
            more = np.flatnonzero(left_C > 1)
            left_C, rest_C, start_C = left_C[more] - 1, rest_C[more] >> 5, start_C[more] + 1
        text[start_C] = (rest_C & 31) + np.where(left_C > 1, 80, 48)
    return text, length_C


def decode_mask(rle: Mapping[str, Any]) -> Tensor:
    """Return a mask as a bool bitmap `[h, w]`."""
    return torch.from_numpy(np.ascontiguousarray(mask_util.decode(rle))).bool()
