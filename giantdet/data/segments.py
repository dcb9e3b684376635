"""The masks of COCO annotations: what of a `segmentation` can be used, and how it is meant.

A fault is `(kind, text)`, as in `records.py`. Format: https://cocodataset.org/#format-data; RLE strings as in
pycocotools' `rleFrString` (Lin et al. 2014).
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pycocotools import mask as mask_util

Fault = tuple[str, str]
Size = tuple[int, int]  # height, width

# Corners of a polygon may be outside the image, but pycocotools walks along its sides pixel by pixel: a
# coordinate of 1e8 makes it kill the process.
_MAX_COORDINATE = 100_000
# COCO's strings consist of digits "0" to "o"; those from "P" on are followed by another. For any other string
# pycocotools reads and writes out of bounds.
_RLE_STRING = re.compile("[0-o]*[0-O]")


def whole(value: Any) -> Any:
    """Return a float of an integral value as an int, and anything else unchanged: JSON's 1.0 is 1."""
    return int(value) if type(value) is float and value.is_integer() else value


def segment(segmentation: Any, size: Size) -> tuple[Any, list[Fault]]:
    """Return the usable part of an annotation's `segmentation`, and what was left out or read otherwise.

    The part is an RLE with integers, a list of polygons, or an empty list if there is none.
    """
    if segmentation is None or segmentation == []:
        return [], []
    if isinstance(segmentation, dict):
        rle = _with_integers(segmentation)
        fault = rle_fault(rle, size)
        return ([], [fault]) if fault else (rle, [])
    parts, faults = _as_parts(segmentation)
    found = [(part, polygon_fault(part)) for part in parts]
    return [part for part, fault in found if not fault], faults + [fault for _, fault in found if fault]


def _as_parts(segmentation: Any) -> tuple[list[Any], list[Fault]]:
    """Return the polygons as lists of x, y, x, y, ..., from any nesting of numbers with a single meaning."""
    if not isinstance(segmentation, list):
        return [segmentation], []
    if all(isinstance(value, int | float) for value in segmentation):
        if polygon_fault(segmentation):
            return [segmentation], []
        return [segmentation], [
            ("polygon not in a list", "its segmentation is one polygon, not a list of them")
        ]
    points = ("polygon of points", "its polygons are lists of [x, y]")
    if len(segmentation) >= 3 and all(_is_point(part) for part in segmentation):
        return [_flat(segmentation)], [points]
    nested = [isinstance(part, list) and bool(part) and all(map(_is_point, part)) for part in segmentation]
    parts = [_flat(part) if inner else part for part, inner in zip(segmentation, nested, strict=True)]
    return parts, [points] if any(nested) else []


def _is_point(value: Any) -> bool:
    return isinstance(value, list) and len(value) == 2 and all(isinstance(v, int | float) for v in value)


def _flat(points: list[Any]) -> list[Any]:
    return [value for point in points for value in point]


def polygon_fault(part: Any) -> Fault | None:
    """Return the fault of one polygon: not numbers, far away, odd length, under 3 points; or None."""
    try:
        finite = math.isfinite(sum(part))
    except (TypeError, OverflowError):
        return "bad polygon", "a polygon is not a list of numbers"
    if not finite:
        return "bad polygon", "a polygon has a coordinate that is not finite"
    if part and max(max(part), -min(part)) > _MAX_COORDINATE:
        return "bad polygon", f"a polygon has a coordinate beyond {_MAX_COORDINATE} pixels"
    if len(part) < 6 or len(part) % 2:
        return "bad polygon", f"a polygon has {len(part)} coordinates; a polygon needs at least 3 points"
    return None


def _with_integers(rle: Mapping[str, Any]) -> dict[str, Any]:
    """Return an RLE whose integers are not written as floats."""
    size, counts = rle.get("size"), rle.get("counts")
    return {
        "size": [whole(side) for side in size] if isinstance(size, list) else size,
        "counts": [whole(count) for count in counts] if isinstance(counts, list) else counts,
    }


def rle_fault(segmentation: Mapping[str, Any], size: Size) -> Fault | None:
    """Return the fault of an RLE or None."""
    counts = segmentation.get("counts")
    if segmentation.get("size") != list(size):
        return "RLE of wrong size", f"RLE size {segmentation.get('size')} is not the image's {list(size)}"
    wrong_sum = "bad RLE", f"RLE counts do not add up to {size[0]} x {size[1]} pixels"
    if isinstance(counts, list):
        if not all(type(c) is int and c >= 0 for c in counts) or sum(counts) != size[0] * size[1]:
            return wrong_sum
    elif not isinstance(counts, str) or not _RLE_STRING.fullmatch(counts):
        return "bad RLE", "RLE counts are neither a list nor a whole COCO string"
    elif not adds_up(rle_counts(counts.encode()), size):
        return wrong_sum
    return None


def rle_counts(string: bytes) -> NDArray[np.int64]:
    """Return the run lengths, zeros first, of COCO's compressed RLE string (pycocotools' `rleFrString`).

    A number is little-endian in 5-bit digits, one character each, offset 48; bit 5 says that more
    follow, bit 4 of the last is the sign; from the fourth number on it is the difference to the
    number two places before.
    """
    digits = np.frombuffer(string, np.uint8).astype(np.int64) - 48
    last = (digits & 32) == 0
    if len(digits) == 0 or not last[-1]:
        return np.zeros(0, np.int64)
    end = np.flatnonzero(last)
    start = np.concatenate([[0], end[:-1] + 1])
    length = end - start + 1
    place = 5 * np.minimum(np.arange(len(digits)) - np.repeat(start, length), 11)
    numbers = np.add.reduceat((digits & 31) << place, start)
    numbers -= np.where(digits[end] & 16, np.int64(1) << np.minimum(5 * length, 60), 0)
    numbers[1::2] = np.cumsum(numbers[1::2])
    numbers[2::2] = np.cumsum(numbers[2::2])
    return numbers


def adds_up(runs: NDArray[np.int64], size_hw: Size) -> bool:
    """Return whether these run lengths fill an image of this size."""
    return len(runs) > 0 and int(runs.min()) >= 0 and int(runs.sum()) == size_hw[0] * size_hw[1]


def segment_box(usable: Any, size: Size) -> list[float]:
    """Return the box xywh around a usable segmentation that is not empty: around its polygons or pixels."""
    if isinstance(usable, dict):
        rle = mask_util.frPyObjects(usable, *size) if isinstance(usable["counts"], list) else usable
        return [float(value) for value in mask_util.toBbox(rle)]
    xs = [float(x) for part in usable for x in part[::2]]
    ys = [float(y) for part in usable for y in part[1::2]]
    return [min(xs), min(ys), max(xs) - min(xs), max(ys) - min(ys)]
