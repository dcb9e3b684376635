"""Check single COCO records; `reading.py` reads a whole file with these functions.

A fault is `(kind, text)`: faults are counted by kind, the text says what is wrong with this record.
Format: https://cocodataset.org/#format-data.
"""

from __future__ import annotations

import json
import logging
import math
import os
from collections.abc import Container, Mapping
from pathlib import Path
from typing import Any

from giantdet.data.importing.recognise import hint
from giantdet.data.segments import Fault, Size
from giantdet.errors import DataError

logger = logging.getLogger("giantdet")

_KEYS = ("images", "annotations", "categories")
_MAX_NAME = 4096  # Linux's PATH_MAX; file names are in one array, where each takes the space of the longest


Instances = Mapping[str, list[dict[str, Any]]]
"""The lists `images`, `annotations` and `categories` of a COCO instances JSON."""


def read_instances(path: str | Path, kind: str = "instances", images_only: bool = False) -> Instances:
    """Return the three lists of a COCO instances or panoptic JSON, with bad records, or raise `DataError`.

    `images_only`: there may be no list of annotations, as in COCO's image_info_test-dev2017.json.
    """
    try:
        content = json.loads(Path(path).read_bytes())
    except OSError as error:
        raise DataError(f"cannot read the annotations {path}: {error.strerror}{hint(path)}") from error
    except (ValueError, RecursionError) as error:  # also a wrong encoding; deeply nested lists
        raise DataError(f"annotations {path} are not valid JSON: {error}{hint(path)}") from error
    unlabelled = isinstance(content, dict) and bool(content.get("images")) and "annotations" not in content
    for key in ("images", "categories") if images_only and unlabelled else _KEYS:
        if not isinstance(content, dict) or not isinstance(content.get(key), list):
            raise DataError(
                f'annotations {path} have no list "{key}"; '
                f"a COCO {kind} file has images, annotations and categories{hint(path)}"
            )
    if not content["images"]:
        raise DataError(f"annotations {path} contain no images")
    if not content["categories"]:
        raise DataError(f"annotations {path} contain no categories")
    return {key: content[key] for key in _KEYS if key in content}


def is_id(value: Any) -> bool:
    """Return whether the value is an id: a non-negative 64-bit integer, not a bool; -1 marks empty slots."""
    return type(value) is int and 0 <= value < 2**63


def is_number(value: Any) -> bool:
    """Return whether the value is a number from 0 that a float holds; a bool is, as in pycocotools."""
    return isinstance(value, int | float) and 0 <= value < 2**53


def escapes(file_name: str) -> bool:
    """Return whether the name leads out of the image folder.

    Only the name is checked: symbolic links, of the folder or of a file in it, are followed wherever they
    lead. Data sets often consist of links, made by the owner of the disk; a name comes with a JSON.
    """
    return os.path.isabs(file_name) or os.path.normpath(file_name).split(os.sep)[0] == os.pardir


def category_fault(record: Any, seen: Container[int]) -> Fault | None:
    if not isinstance(record, dict) or not is_id(record.get("id")):
        return "bad category id", f"{str(record)[:80]} has no id that is an integer of at least 0"
    if record["id"] in seen:
        return "duplicate category id", "an earlier category has the same id"
    return None


def category_name(record: Mapping[str, Any]) -> str:
    """Return a category's name, or its id if it has none."""
    return str(record["id"] if record.get("name") is None else record["name"])


def image_fault(record: Any, seen: Container[int]) -> Fault | None:
    if not isinstance(record, dict) or not is_id(record.get("id")):
        return "bad image id", f"{str(record)[:80]} has no id that is an integer of at least 0"
    if record["id"] in seen:
        return "duplicate image id", "an earlier image has the same id"
    height, width = record.get("height"), record.get("width")
    if type(height) is not int or type(width) is not int or height < 1 or width < 1:
        return "bad image size", f"height {height!r} and width {width!r} must be positive integers"
    if height * width >= 2**32:  # pycocotools counts pixels in 32 bits
        return "bad image size", f"an image of {str(width)[:20]} x {str(height)[:20]} pixels is too large"
    name = record.get("file_name")
    if not isinstance(name, str) or not 0 < len(name) <= _MAX_NAME or "\0" in name:
        return "bad file name", f"file_name is {str(name)[:80]!r}"
    if escapes(name):
        return "path outside", f"file_name {name!r} leads out of the image folder"
    return None


def object_fault(record: Any, sizes: Mapping[int, Size], categories: Container[int]) -> Fault | None:
    """Return why an annotation is unusable as a box (ids, box) or None. Overhanging boxes are clipped."""
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
