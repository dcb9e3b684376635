"""CVAT XML 1.1 "for images": one file of all images, with shapes in pixels.

A mask's `rle` counts pixels of its window row by row, from background. `rotation` is in degrees, clockwise
about the centre. Format: https://docs.cvat.ai/docs/manual/advanced/xml_format/.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any
from xml.etree.ElementTree import Element

import numpy as np

from giantdet.data.importing.documents import read_xml, roots
from giantdet.data.importing.scene import (
    Notes,
    Picture,
    Request,
    Shape,
    ellipse,
    encode,
    in_window,
    locate,
    number,
    size_of,
    split_name,
    turned_box,
)

_BOX = ("xtl", "ytl", "xbr", "ybr")
_NO_OBJECTS = ("polyline", "points", "tag", "cuboid", "skeleton")


def read_cvat(request: Request, notes: Notes) -> Iterator[Picture]:
    """Yield the pictures of annotations.xml, or of all XML files in a folder."""
    for path, where, root in roots(request, ".xml", notes, read_xml):
        if root.tag != "annotations":
            notes.skip("not a CVAT file", where, f"its root is <{root.tag}>, not <annotations>")
            continue
        for label in root.iterfind("meta//labels/label/name"):
            notes.list_class((label.text or "").strip())
        for track in root.iterfind("track"):
            text = "export the task as CVAT for images 1.1"
            notes.skip("track of a video", f"{where} track {track.get('id')}", text)
        for element in root.iterfind("image"):
            name = element.get("name", "")
            place = f"{where} {name}"
            folders = [request.images] if request.images else []
            file = locate(name, [*folders, path.parent / "images", path.parent], notes, place)
            picture = Picture(file, place, name, split=split_name(element.get("subset")))
            picture.size = _size(element)
            picture.shapes = list(_shapes(element, place, picture.size, notes))
            yield picture


def _size(element: Element) -> tuple[int, int] | None:
    return size_of(element.get("height"), element.get("width"))


def _shapes(image: Element, where: str, size: tuple[int, int] | None, notes: Notes) -> Iterator[Shape]:
    for n, element in enumerate(image, 1):
        place = f"{where} shape {n}"
        if element.tag in _NO_OBJECTS:
            notes.skip(f"{element.tag}, which is not an object", place)
            continue
        try:
            yield _shape(element, element.get("label", "").strip(), place, size)
        except (ValueError, OverflowError) as error:
            notes.skip("bad shape", place, str(error))


def _shape(element: Element, name: str, where: str, size: tuple[int, int] | None) -> Shape:
    """Return the shape of an element. Raises ValueError."""
    degrees = number(element.get("rotation", "0"))
    if element.tag == "box":
        x0, y0, x1, y1 = (number(element.get(key)) for key in _BOX)
        if degrees:
            corners = turned_box(x0, y0, x1, y1, degrees, about=((x0 + x1) / 2, (y0 + y1) / 2))
            return Shape(name, where, polygons=[corners])
        return Shape(name, where, box=(x0, y0, x1, y1))
    if element.tag == "polygon":
        pairs = [pair.split(",") for pair in element.get("points", "").split(";")]
        if any(len(pair) != 2 for pair in pairs):
            raise ValueError(f"points {element.get('points', '')[:40]!r} are not x,y;x,y;...")
        return Shape(name, where, polygons=[[number(value) for pair in pairs for value in pair]])
    if element.tag == "ellipse":
        cx, cy, rx, ry = (number(element.get(key)) for key in ("cx", "cy", "rx", "ry"))
        return Shape(name, where, polygons=[ellipse(cx, cy, rx, ry, degrees)])
    if element.tag == "mask":
        return Shape(name, where, rle=_mask(element, size))
    raise ValueError(f"<{element.tag}> is not known")


def _mask(element: Element, size: tuple[int, int] | None) -> dict[str, Any]:
    if size is None:
        raise ValueError("a mask needs the image's width and height")
    left, top, width, height = (int(number(element.get(key))) for key in ("left", "top", "width", "height"))
    counts = np.array([int(number(word)) for word in element.get("rle", "").split(",")], np.int64)
    if width < 1 or height < 1 or (counts < 0).any() or counts.sum() != width * height:
        raise ValueError(f"its rle does not fill its window of {width} x {height}")
    window = np.repeat(np.arange(len(counts)) % 2 == 1, counts).reshape(height, width)
    return encode(in_window(window, left, top, size))
