"""Labels of objects on plates that avoid each other, and the legend below a picture."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw

from giantdet.engine.colors import Color, is_light
from giantdet.engine.fonts import Written, written
from giantdet.engine.outlines import Shape, paint, rectangle

Point = tuple[float, float]  # xy
Box = tuple[float, float, float, float]
_INK: Color = (30, 30, 30)
_CROWDED = 0.16  # of the picture: if labels needed more, none is written
_COVERED = 0.05  # of a label, by other labels: it is left out
_LEGEND = 0.4  # of the picture's height, at most


class Label(NamedTuple):
    """A name and a score, the colour of their plate, and the box xyxy of the object."""

    name: str
    score: str
    color: Color
    box: Box
    ends: tuple[Point, Point] | None = None  # of a mask: its highest and its lowest point


class Region(NamedTuple):
    """The label of a region, which is written at a point inside of it."""

    name: str
    color: Color
    point: Point
    score: str = ""


class Plate(NamedTuple):
    """A rectangle xyxy with a text."""

    box: Box
    color: Color
    text: Written


class Row(NamedTuple):
    """An entry of the legend: a class, and how many of its objects are in the picture."""

    name: str
    color: Color
    objects: int = 1


def text_size(picture: Image.Image) -> int:
    """Return the height of letters in pixels, which grows with the picture: it may be shown at any size."""
    return max(13, round(min(picture.size) / 42))


def write_labels(picture: Image.Image, labels: Sequence[Label | Region]) -> bool:
    """Write labels on the picture, as placed by `plates_of`, and return whether none is left out."""
    size = text_size(picture)
    plates = plates_of(picture.size, size, labels)
    grounds = [
        Shape([rectangle(plate.box, size * 0.28)], (plate.color, 0.94), (_INK, 0.3), width=0.7)
        for plate in plates
    ]
    paint(picture, grounds)
    pen = ImageDraw.Draw(picture)
    for (x0, y0, _, y1), color, text in plates:
        ink = _INK if is_light(color) else (255, 255, 255)
        corner = (x0 + _padding(size)[0] - min(0, text.box[0]), (y0 + y1) / 2 + 0.36 * size)
        pen.text(corner, text.text, fill=ink, font=text.font, anchor="ls")
    return len(plates) == len(labels)


def plates_of(picture: tuple[int, int], size: int, labels: Sequence[Label | Region]) -> list[Plate]:
    """Return plates inside a picture of (width, height) that cover little, with letters of `size`.

    The first labels come first. One that would cover others is left out, and those of objects all are if they
    would cover the picture. A name that is wider than the picture is cut, that of a region at a third of it.
    """
    pad_x, pad_y = _padding(size)
    room = picture[0] - 2 * pad_x
    texts = [
        _fitting(label.name, label.score, size, room // 3 if isinstance(label, Region) else room)
        for label in labels
    ]
    height = round(1.22 * size) + 2 * pad_y
    widths = [text.box[2] - min(0, text.box[0]) + 2 * pad_x for text in texts]
    of_objects = [width for label, width in zip(labels, widths, strict=True) if isinstance(label, Label)]
    if len(of_objects) > 1 and sum(of_objects) * height > _CROWDED * picture[0] * picture[1]:
        return []
    objects_N4 = np.array([label.box for label in labels if isinstance(label, Label)]).reshape(-1, 4)
    plates: list[Plate] = []
    for label, text, width in zip(labels, texts, widths, strict=True):
        place = _place(label, (width, height), picture, [plate.box for plate in plates], objects_N4)
        if place is not None:
            plates.append(Plate(place, label.color, text))
    return plates


def _padding(size: int) -> tuple[int, int]:
    return max(3, round(size * 0.35)), max(1, round(size * 0.14))


def _fitting(name: str, score: str, size: int, width: int) -> Written:
    """Return a name with a score behind it; the name is cut to a width."""
    shown = written(f"{name} {score}".strip(), size)
    while shown.box[2] > width and len(name) > 1:
        name = name[:-1]
        shown = written(f"{name}.. {score}".strip(), size)
    return shown


def _place(
    label: Label | Region,
    size: tuple[float, float],
    picture: tuple[int, int],
    placed: Sequence[Box],
    objects_N4: NDArray[np.floating[Any]],
) -> Box | None:
    """Return the plate of a label inside the picture, where it covers least, or None without a free place.

    What counts is, in this order: other labels, its own small object, other objects, the usual place.
    """
    width, height = size
    box = (*label.point, *label.point) if isinstance(label, Region) else label.box
    best, lowest = None, np.inf
    for n, (x, y) in enumerate(_corners(label, width, height)):
        x_in = round(min(max(x, 0), picture[0] - width))
        y_in = round(min(max(y, 0), picture[1] - height))
        plate = (x_in, y_in, x_in + width, y_in + height)
        covered = _overlap(np.array(placed).reshape(-1, 4), plate).sum() / (width * height)
        if covered > _COVERED:
            continue
        own = float(_overlap(np.array([box]), plate)[0])
        small = own / max(1.0, (box[2] - box[0]) * (box[3] - box[1]))
        objects = (_overlap(objects_N4, plate).sum() - own) / (width * height)
        moved = abs(x_in - x) / width + abs(y_in - y) / height
        cost = 4 * covered + 2 * small + 0.3 * min(objects, 3.0) + 0.08 * n + 0.3 * moved
        if cost < lowest:
            best, lowest = plate, cost
    return best


def _corners(label: Label | Region, width: float, height: float) -> list[Point]:
    """Return where the upper left corner of a plate may be, the usual place first."""
    if isinstance(label, Region):
        return [(label.point[0] - width / 2, label.point[1] - height / 2)]
    x0, y0, x1, y1 = label.box
    corners = [
        (x0, y0 - height), (x0, y0), (x1 - width, y0 - height), (x0, y1), (x1 - width, y0),
        (x1 - width, y1), (x0, y1 - height), (x1, y0), (x0 - width, y0),
    ]  # fmt: skip
    if label.ends is not None:
        # Beside the box there may be nothing of the mask.
        (x_high, y_high), (x_low, y_low) = label.ends
        corners = [(x_high - width / 2, y_high - height), (x_low - width / 2, y_low), *corners]
    return corners


def _overlap(boxes_N4: NDArray[np.floating[Any]], box: Box) -> NDArray[np.floating[Any]]:
    """Return the area that each box has in common with one."""
    low_N2 = np.maximum(boxes_N4[:, :2], box[:2])
    high_N2 = np.minimum(boxes_N4[:, 2:], box[2:])
    area: NDArray[np.floating[Any]] = np.prod(np.clip(high_N2 - low_N2, 0, None), axis=1)
    return area


def with_legend(picture: Image.Image, rows: Sequence[Row], size: int | None = None) -> Image.Image:
    """Return the picture with names and their colours below it, as many as there is room for."""
    if not rows:
        return picture
    size = size or text_size(picture)
    line, gap = round(1.7 * size), round(0.9 * size)
    lines = max(1, int(_LEGEND * picture.height) // line)
    x, row = gap, 0
    places: list[tuple[tuple[int, int], Written, Color | None]] = []
    for n, entry in enumerate(rows):
        count = f"×{entry.objects}" if entry.objects > 1 else ""
        text = _fitting(entry.name, count, size, picture.width - 4 * size)
        width = round(1.4 * size) + text.box[2]
        if x + width > picture.width - gap // 2 and x > gap:
            x, row = gap, row + 1
        if row == lines:
            places[-1] = (places[-1][0], written(f"and {len(rows) - n + 1} more", size), None)
            break
        places.append(((x, row), text, entry.color))
        x += width + gap
    used = places[-1][0][1] + 1
    whole = Image.new("RGB", (picture.width, picture.height + used * line + gap // 2), (255, 255, 255))
    whole.paste(picture)
    top = picture.height + gap // 4
    chips = []
    for (x, row), _, color in places:
        y = top + row * line + (line - size) / 2
        if color is not None:
            chips.append(Shape([rectangle((x, y, x + size, y + size), size * 0.25)], fill=(color, 1.0)))
    paint(whole, chips)
    pen = ImageDraw.Draw(whole)
    for (x, row), text, color in places:
        left = x if color is None else x + round(1.4 * size)
        middle = top + row * line + line / 2
        pen.text((left, middle + 0.36 * size), text.text, fill=_INK, font=text.font, anchor="ls")
    return whole


def with_caption(picture: Image.Image, text: str, size: int) -> Image.Image:
    """Return the picture below a caption."""
    line = round(1.9 * size)
    caption = _fitting(text, "", round(1.1 * size), picture.width - size)
    whole = Image.new("RGB", (picture.width, picture.height + line), (255, 255, 255))
    whole.paste(picture, (0, line))
    pen = ImageDraw.Draw(whole)
    pen.text(
        (round(0.4 * size), line / 2 + 0.4 * size), caption.text, (30, 30, 30), caption.font, anchor="ls"
    )
    return whole
