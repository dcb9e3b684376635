"""labelme: one JSON file an image, with shapes in pixels.

Shapes with the same label and `group_id` are parts of one object. A circle is given by its centre and a point
on it; a mask is a PNG in base64 whose corner is the first of two points. Lines and points are not objects.
Format: https://github.com/wkentaro/labelme (labelme/utils/shape.py, labelme/_label_file.py).
"""

from __future__ import annotations

import base64
import io
import math
from collections.abc import Iterator
from typing import Any

import numpy as np
from PIL import Image

from giantdet.data.importing.documents import read_json, roots
from giantdet.data.importing.scene import (
    Notes,
    Picture,
    Points,
    Request,
    Shape,
    ellipse,
    encode,
    in_window,
    locate,
    points,
    size_of,
)


def read_labelme(request: Request, notes: Notes) -> Iterator[Picture]:
    """Yield the pictures of a folder of JSON files, or of one file."""
    for path, where, content in roots(request, ".json", notes, read_json):
        if not isinstance(content, dict) or not isinstance(content.get("shapes"), list):
            notes.skip("not a labelme file", where, 'it has no list "shapes"')
            continue
        name = str(content.get("imagePath") or path.stem)
        folders = [request.images] if request.images else []
        file = locate(name, [*folders, path.parent], notes, where)
        if file is None and content.get("imageData"):
            name += ", which is in the JSON alone: write it with labelme_export_json"
        size = _size(content)
        picture = Picture(file, where, name, size=size)
        picture.shapes = list(_shapes(content["shapes"], where, size, notes))
        yield picture


def _size(content: dict[str, Any]) -> tuple[int, int] | None:
    return size_of(content.get("imageHeight"), content.get("imageWidth"))


def _shapes(records: list[Any], where: str, size: tuple[int, int] | None, notes: Notes) -> Iterator[Shape]:
    groups: dict[tuple[str, str], Shape] = {}
    for n, record in enumerate(records, 1):
        place = f"{where} shape {n}"
        try:
            if not isinstance(record, dict):
                raise ValueError("it is not an object")
            shape = _shape(record, place, size)
        except ValueError as error:
            notes.skip("bad shape", place, str(error))
            continue
        if shape is None:
            notes.skip(f"{record.get('shape_type')} shape, which is not an object", place)
            continue
        key = (shape.name, str(record.get("group_id")))
        known = groups.get(key) if record.get("group_id") is not None else None
        if known is not None and known.polygons and shape.polygons:
            known.polygons += shape.polygons
            notes.note("shapes of one group_id, joined to one object", place)
            continue
        groups[key] = shape
        yield shape  # parts that follow are added to it, as all are read before it is used


def _shape(record: dict[str, Any], where: str, size: tuple[int, int] | None) -> Shape | None:
    """Return the shape of a record, or None if it is no object. Raises ValueError."""
    name = str(record.get("label") or "").strip()
    kind = record.get("shape_type") or "polygon"
    if kind in ("line", "linestrip", "point", "points"):
        return None
    values = points(record.get("points"))
    if kind in ("polygon", "oriented_rectangle"):
        return Shape(name, where, polygons=[values])
    if len(values) != 4:
        raise ValueError(f"a {kind} needs 2 points, not {len(values) // 2}")
    x0, y0, x1, y1 = values
    if kind == "rectangle":
        return Shape(name, where, box=(min(x0, x1), min(y0, y1), max(x0, x1), max(y0, y1)))
    if kind == "circle":
        radius = math.hypot(x1 - x0, y1 - y0)
        return Shape(name, where, polygons=[ellipse(x0, y0, radius, radius)])
    if kind == "mask":
        return Shape(name, where, rle=_mask(record.get("mask"), values, size))
    raise ValueError(f"the shape_type {kind!r} is not known")


def _mask(png: Any, corner: Points, size: tuple[int, int] | None) -> dict[str, Any]:
    if size is None:
        raise ValueError("a mask needs imageHeight and imageWidth")
    try:
        with Image.open(io.BytesIO(base64.b64decode(png))) as image:
            window = np.array(image.convert("L")) > 0
    except Exception as error:  # PIL's plugins raise any exception on broken files
        raise ValueError(f"its mask is not a PNG in base64: {error}") from error
    return encode(in_window(window, int(corner[0]), int(corner[1]), size))
