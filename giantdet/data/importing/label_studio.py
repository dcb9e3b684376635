"""Label Studio's JSON export: a list of tasks, with regions in percent of the image.

A box is turned by `rotation`, clockwise about its upper left corner. A brush mask is the alpha channel of an
RGBA picture in the run-length code of thi.ng/rle-pack. The first annotation of a task that was not cancelled
is read, or that which is marked as ground truth. Format: https://labelstud.io/guide/export.
"""

from __future__ import annotations

import re
import urllib.parse
from collections.abc import Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray

from giantdet.data.importing.documents import name_in, read_json
from giantdet.data.importing.scene import (
    Notes,
    Picture,
    Request,
    Shape,
    ellipse,
    encode,
    locate,
    number,
    points,
    size_of,
    turned_box,
)
from giantdet.errors import DataError

_UPLOAD = re.compile(r"^[0-9a-f]{8}-")  # the upload's key that Label Studio puts before a file's name
_IMAGE = re.compile(r"\.(jpe?g|png|bmp|tiff?|webp|gif)($|\?)", re.IGNORECASE)
_LABELS = ("rectanglelabels", "polygonlabels", "brushlabels", "ellipselabels", "labels")
_GEOMETRY = ("x", "points", "rle")


def read_label_studio(request: Request, notes: Notes) -> Iterator[Picture]:
    """Yield the pictures of an export, or of all in a folder."""
    paths = [request.source] if request.source.is_file() else sorted(request.source.rglob("*.json"))
    found = [(path, content) for path in paths if is_label_studio(content := read_json(path))]
    if not found:
        raise DataError(
            f"{request.source} is not an export of Label Studio as JSON: a list of tasks with data"
        )
    for path, tasks in found:
        for n, task in enumerate(tasks, 1):
            where = f"{name_in(request, path)} task {task.get('id', n)}"
            name = _image(task)
            folders = [request.images] if request.images else []
            folders += [path.parent / "images", path.parent]
            plain = _UPLOAD.sub("", name.rsplit("/", 1)[-1])
            # An export with its images keeps the upload's key; the user's own folder does not have it.
            file = locate(name, folders, notes, where) or locate(plain, folders, notes, where)
            regions = _regions(task, where, notes)
            picture = Picture(file, where, name, relative=True)
            picture.size = next((size for region in regions if (size := _size(region))), None)
            picture.shapes = list(_shapes(regions, where, notes))
            if any(isinstance(region, dict) and region.get("image_rotation") for region in regions):
                notes.skip("image turned in Label Studio", where, "image_rotation is not supported")
                continue
            yield picture


def is_label_studio(content: Any) -> bool:
    """Return whether a JSON's content is a list of tasks."""
    return (
        isinstance(content, list)
        and bool(content)
        and all(isinstance(task, dict) and isinstance(task.get("data"), dict) for task in content)
    )


def _image(task: dict[str, Any]) -> str:
    """Return the file that a task's image names: a path, a URL, or one with the path in `?d=`."""
    texts = [value for value in task["data"].values() if isinstance(value, str)]
    urls = [
        text for text in texts if re.search(r"\.(jpe?g|png|bmp|tiff?|webp|gif)($|\?)", text, re.IGNORECASE)
    ]
    text = str(task["data"].get("image") or next(iter(urls or texts), ""))
    parts = urllib.parse.urlsplit(text)
    local = urllib.parse.parse_qs(parts.query).get("d")
    return local[0] if local else urllib.parse.unquote(parts.path).lstrip("/").rsplit("/", 1)[-1]


def _regions(task: dict[str, Any], where: str, notes: Notes) -> list[Any]:
    given = task.get("annotations") or task.get("completions") or []
    if not isinstance(given, list):
        return []
    kept = [entry for entry in given if isinstance(entry, dict) and not entry.get("was_cancelled")]
    if not kept:
        notes.note("task without an annotation, as background", where)
        return []
    if len(kept) > 1:
        notes.note("task with several annotations, of which one is read", where, f"it has {len(kept)}")
    chosen = next((entry for entry in kept if entry.get("ground_truth")), kept[0])
    result = chosen.get("result")
    return result if isinstance(result, list) else []


def _size(region: Any) -> tuple[int, int] | None:
    if not isinstance(region, dict):
        return None
    return size_of(region.get("original_height"), region.get("original_width"))


def _shapes(regions: list[Any], where: str, notes: Notes) -> Iterator[Shape]:
    used: set[str] = set()
    for n, region in enumerate(regions, 1):
        place = f"{where} region {n}"
        value = region.get("value") if isinstance(region, dict) else None
        if not isinstance(value, dict) or not any(key in value for key in _GEOMETRY):
            notes.skip("result that is not an object", place, str(region.get("type")) if value else "")
            continue
        if str(region.get("type")).startswith("keypoint"):
            notes.skip("keypoint, which is not an object", place)
            continue
        if (name := region.get("id")) is not None:
            if str(name) in used:  # the region and its label are two results of one id
                continue
            used.add(str(name))
        labels = _labels(value) or _labels_of_id(region.get("id"), regions)
        if len(labels) > 1:
            notes.note("region with several labels, of which the first is read", place, ", ".join(labels))
        try:
            yield _shape(value, labels[0].strip() if labels else "", place, _size(region))
        except (KeyError, ValueError) as error:
            notes.skip("bad region", place, f"no {error}" if isinstance(error, KeyError) else str(error))


def _labels(value: Any) -> list[str]:
    """Return the labels of a region's value."""
    values = value if isinstance(value, dict) else {}
    given: Any = next((values[key] for key in _LABELS if values.get(key)), [])
    return [label for label in given if isinstance(label, str)] if isinstance(given, list) else []


def _labels_of_id(name: Any, regions: list[Any]) -> list[str]:
    """Return the labels of a region that has them in another result of its id."""
    same = [r for r in regions if isinstance(r, dict) and r.get("id") == name and name is not None]
    return next((found for r in same if (found := _labels(r.get("value")))), [])


def _shape(value: dict[str, Any], name: str, where: str, size: tuple[int, int] | None) -> Shape:
    """Return the shape of a region, in parts of the image. Raises KeyError or ValueError."""
    if "rle" in value:
        if size is None:
            raise ValueError("a brush mask needs original_height and original_width")
        return Shape(name, where, rle=encode(brush_mask(value["rle"], size)))
    if "points" in value:
        return Shape(name, where, polygons=[[v / 100 for v in points(value["points"])]])
    height, width = size or (1, 1)  # angles are those of the image in pixels
    x, y, degrees = number(value["x"]) / 100, number(value["y"]) / 100, number(value.get("rotation") or 0)
    if "radiusX" in value:
        rx, ry = number(value["radiusX"]) / 100, number(value["radiusY"]) / 100
        turned = ellipse(x * width, y * height, rx * width, ry * height, degrees)
    else:
        w, h = number(value["width"]) / 100, number(value["height"]) / 100
        if not degrees:
            return Shape(name, where, box=(x, y, x + w, y + h))
        x0, y0 = x * width, y * height
        turned = turned_box(x0, y0, x0 + w * width, y0 + h * height, degrees, about=(x0, y0))
    return Shape(name, where, polygons=[[v / (height if n % 2 else width) for n, v in enumerate(turned)]])


def brush_mask(code: Any, size: tuple[int, int]) -> NDArray[np.bool_]:
    """Return the mask of a brush, from the bytes of its run-length code. Raises ValueError.

    The code is a stream of bits, high ones first: the number of values (32 bits), the bits of a value less 1
    (5), and four lengths less 1 (4 each). Runs follow: a bit that tells whether one value is repeated, two
    bits that choose a length, the number of values less 1 in as many bits, and the value, or the values.
    """
    if not isinstance(code, list) or not all(type(byte) is int and 0 <= byte < 256 for byte in code):
        raise ValueError("its rle is not a list of bytes")
    bits = np.unpackbits(np.array(code, np.uint8))
    height, width = size
    place = 0

    def take(count: int) -> int:
        nonlocal place
        place += count
        if place > len(bits):
            raise ValueError("its rle is cut off")
        value = 0
        for bit in bits[place - count : place]:
            value = 2 * value + int(bit)
        return value

    total, word = take(32), take(5) + 1
    if total != 4 * height * width or len(code) < total // 2**17:  # a run has at most 2**16 values
        raise ValueError(f"its rle has {total} values, not 4 for each of {width} x {height} pixels")
    lengths = [take(4) + 1 for _ in range(4)]
    values, done = np.zeros(total, np.uint8), 0
    while done < total:
        repeated = take(1)
        end = done + 1 + take(lengths[take(2)])
        if end > total:
            raise ValueError("its rle has too many values")
        if repeated:
            values[done:end] = min(take(word), 255)
        else:
            values[done:end] = [min(take(word), 255) for _ in range(end - done)]
        done = end
    return values[3::4].reshape(height, width) > 0
