"""Checks of single COCO records, shared by reading (`coco.py` skips and counts) and `validate.py` (reports).

A fault is `(kind, text)`: the kind is what faults are counted by, the text says what is wrong with
this record. Format: https://cocodataset.org/#format-data.
"""

from __future__ import annotations

import json
import logging
import math
import os
from collections.abc import Container, Mapping
from pathlib import Path
from typing import Any

logger = logging.getLogger("giantdet")

Fault = tuple[str, str]
Size = tuple[int, int]  # height, width
_KEYS = ("images", "annotations", "categories")


class DataError(ValueError):
    """A data set or a file of it cannot be used; one line that names it."""


def read_instances(path: str | Path) -> dict[str, list[dict[str, Any]]]:
    """The three lists of a COCO instances JSON, or `DataError`. Non-objects in the lists stay in."""
    try:
        content = json.loads(Path(path).read_bytes())
    except OSError as error:
        raise DataError(f"cannot read the annotations {path}: {error.strerror}") from error
    except ValueError as error:  # also a wrong encoding
        raise DataError(f"annotations {path} are not valid JSON: {error}") from error
    for key in _KEYS:
        if not isinstance(content, dict) or not isinstance(content.get(key), list):
            raise DataError(
                f'annotations {path} have no list "{key}"; '
                "a COCO instances file has images, annotations and categories"
            )
    if not content["images"]:
        raise DataError(f"annotations {path} name no images")
    if not content["categories"]:
        raise DataError(f"annotations {path} name no categories")
    return {key: content[key] for key in _KEYS}


def is_id(value: Any) -> bool:
    """An id is an integer (not a bool) that fits 64 bits and is not negative: -1 marks empty slots."""
    return type(value) is int and 0 <= value < 2**63


def escapes(file_name: str) -> bool:
    """True if the name leads out of the image folder."""
    return os.path.isabs(file_name) or os.path.normpath(file_name).split(os.sep)[0] == os.pardir


def category_fault(record: Any, seen: Container[int]) -> Fault | None:
    if not isinstance(record, dict) or not is_id(record.get("id")):
        return "bad category id", f"{str(record)[:80]} has no id that is an integer of at least 0"
    if record["id"] in seen:
        return "duplicate category id", "an earlier category has the same id"
    return None


def image_fault(record: Any, seen: Container[int]) -> Fault | None:
    if not isinstance(record, dict) or not is_id(record.get("id")):
        return "bad image id", f"{str(record)[:80]} has no id that is an integer of at least 0"
    if record["id"] in seen:
        return "duplicate image id", "an earlier image has the same id"
    height, width = record.get("height"), record.get("width")
    if type(height) is not int or type(width) is not int or height < 1 or width < 1:
        return "bad image size", f"height {height!r} and width {width!r} must be positive integers"
    name = record.get("file_name")
    if not isinstance(name, str) or not name or "\0" in name:
        return "bad file name", f"file_name is {name!r}"
    if escapes(name):
        return "path outside", f"file_name {name!r} leads out of the image folder"
    return None


def object_fault(record: Any, sizes: Mapping[int, Size], categories: Container[int]) -> Fault | None:
    """What makes an annotation unusable as a box: ids and the box. Overhanging boxes are usable (clipped)."""
    if not isinstance(record, dict):
        return "bad annotation", f"{str(record)[:80]} is not an object"
    image_id: Any = record.get("image_id")
    if not is_id(image_id) or image_id not in sizes:
        return "unknown image", f"image_id {image_id!r} is not among the usable images"
    category_id = record.get("category_id")
    if not is_id(category_id) or category_id not in categories:
        return "unknown category", f"category_id {category_id!r} is not among the categories"
    try:
        x, y, w, h = record["bbox"]
        finite = math.isfinite(x + y + w + h)
    except (KeyError, TypeError, ValueError, OverflowError):
        return "bad box", f"bbox {record.get('bbox')!r} is not four numbers"
    if not finite:
        return "bad box", f"bbox {record['bbox']} is not finite"
    if w <= 0 or h <= 0:
        return "empty box", f"bbox {record['bbox']} has no area"
    height, width = sizes[image_id]
    if x >= width or y >= height or x + w <= 0 or y + h <= 0:
        return "box outside", f"bbox {record['bbox']} lies outside the {width} x {height} image"
    return None


def polygon_fault(part: Any) -> Fault | None:
    """Faults of one polygon of a `segmentation` list: fewer than 3 points, odd length, not numbers."""
    try:
        finite = math.isfinite(sum(part))
    except (TypeError, OverflowError):
        return "bad polygon", "a polygon is not a list of numbers"
    if not finite:
        return "bad polygon", "a polygon has a coordinate that is not finite"
    if len(part) < 6 or len(part) % 2:
        return "bad polygon", f"a polygon has {len(part)} coordinates; 3 points are the least"
    return None


def rle_fault(segmentation: Mapping[str, Any], size: Size) -> Fault | None:
    """Faults of an RLE's frame. Whether a compressed string holds the right sum shows when it is decoded."""
    counts = segmentation.get("counts")
    if segmentation.get("size") != list(size):
        return "RLE of wrong size", f"RLE size {segmentation.get('size')} is not the image's {list(size)}"
    if isinstance(counts, list):
        if not all(type(c) is int and c >= 0 for c in counts) or sum(counts) != size[0] * size[1]:
            return "bad RLE", f"RLE counts do not add up to {size[0]} x {size[1]} pixels"
    elif not isinstance(counts, str) or not counts or not counts.isascii():
        return "bad RLE", "RLE counts are neither a list nor a COCO string"
    return None
