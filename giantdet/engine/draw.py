"""Pictures of what was found in an image: boxes with masks, or maps with a legend."""

from __future__ import annotations

import colorsys
from collections import Counter
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw

from giantdet.config.classes import Classes
from giantdet.data.panoptic import PanopticMap
from giantdet.engine.fonts import Written, written
from giantdet.engine.found import Found

Color = tuple[int, int, int]
_PALETTE: tuple[Color, ...] = (
    (230, 25, 75), (60, 180, 75), (0, 130, 200), (245, 130, 48), (145, 30, 180),
    (70, 240, 240), (240, 50, 230), (210, 245, 60), (250, 190, 212), (0, 128, 128),
)  # fmt: skip
_ROWS = 256  # painted at a time, for large pictures: floats take 12 bytes a pixel
_SMALLEST = 512  # pixels of the longer side; smaller pictures are enlarged, or labels would cover them


class Entry(NamedTuple):
    """A region of a map, as it is painted and named in the legend."""

    number: int  # in the map
    color: Color
    name: str


def color_of(number: int) -> Color:
    """Return a colour unlike those of nearby numbers: from the palette, then hues by the golden ratio."""
    if number < len(_PALETTE):
        return _PALETTE[number]
    hue, value = (number * 0.618034) % 1.0, 0.55 + 0.45 * ((number * 7) % 5) / 4
    red, green, blue = colorsys.hsv_to_rgb(hue, 0.75, value)
    return round(255 * red), round(255 * green), round(255 * blue)


def instance_color(number: int, instance: int) -> Color:
    """Return the colour of an object: that of its class, in one of three shades in turns."""
    red, green, blue = color_of(number)
    shade = (1.0, 0.75, 0.55)[instance % 3]
    return round(red * shade), round(green * shade), round(blue * shade)


def draw(image: NDArray[np.uint8], found: Found) -> Image.Image:
    """Return the image `[h, w, 3]` with what was found drawn on it.

    That is the panoptic map where there is one, else the semantic map, else boxes, masks, names and scores.
    Maps have a legend of the classes that occur, the largest first.
    """
    if found.panoptic is not None:
        return _draw_map(image, found.panoptic.ids_HW, panoptic_entries(found.panoptic, found.classes))
    if found.semantic_HW is not None:
        map_HW = found.semantic_HW.numpy()
        return _draw_map(image, map_HW, semantic_entries(map_HW, found.classes))
    return _draw_objects(image, found)


def panoptic_entries(panoptic: PanopticMap, classes: Classes) -> list[Entry]:
    """Return an entry for each segment; objects of a class have different shades of its colour."""
    categories = [*classes.objects, *classes.stuff]
    number = {category: n for n, (category, _) in enumerate(categories)}
    objects: Counter[int] = Counter()
    entries = []
    for segment in panoptic.segments:
        n = number[segment.category]
        color = instance_color(n, objects[n] if n < len(classes.objects) else 0)
        objects[n] += 1
        entries.append(Entry(segment.id, color, categories[n][1]))
    return entries


def semantic_entries(map_HW: NDArray[np.int64], classes: Classes) -> list[Entry]:
    """Return an entry for each class that occurs; classes without a name are left out."""
    return [
        Entry(n, color_of(n), classes.semantic[n][1])
        for n in np.unique(map_HW).tolist()
        if n < len(classes.semantic)
    ]


def _draw_map(
    image: NDArray[np.uint8], map_HW: NDArray[np.integer[Any]], entries: Sequence[Entry]
) -> Image.Image:
    canvas = image.copy()
    region_HW = np.zeros(image.shape[:2], np.int32)
    sizes: Counter[str] = Counter()
    counts: Counter[str] = Counter()
    colors: dict[str, Color] = {}
    for region, entry in enumerate(entries, 1):
        mask_HW = map_HW == entry.number
        _paint(canvas, mask_HW, entry.color, 0.6)
        region_HW[mask_HW] = region
        sizes[entry.name] += int(mask_HW.sum())
        counts[entry.name] += 1
        colors.setdefault(entry.name, entry.color)
    canvas[_borders(region_HW)] = 255
    picture = _enlarged(canvas)
    names = sorted(sizes, key=lambda name: -sizes[name])
    rows = [
        (f"{name[:24]} ({counts[name]})" if counts[name] > 1 else name[:24], colors[name]) for name in names
    ]
    return _with_legend(picture, rows)


def _with_legend(picture: Image.Image, rows: Sequence[tuple[str, Color]]) -> Image.Image:
    """Return the picture with as many names and their colours on its right as there is room for."""
    size = _text_size(picture)
    line = round(1.35 * size)
    rows = rows[: max(1, (picture.height - size) // line)]
    texts = [written(text, size) for text, _ in rows]
    width = 3 * size + max((text.box[2] for text in texts), default=0)
    whole = Image.new("RGB", (picture.width + width, max(picture.height, 2 * size)), (255, 255, 255))
    whole.paste(picture)
    pen = ImageDraw.Draw(whole)
    for row, ((_, color), (text, font)) in enumerate(zip(rows, texts, strict=True)):
        x, y = picture.width + size // 2, size // 4 + row * line
        pen.rectangle((x, y, x + size, y + size), fill=color, outline=(0, 0, 0))
        pen.text((x + 3 * size // 2, y + size), text, fill=(0, 0, 0), font=font, anchor="ls")
    return whole


def _text_size(picture: Image.Image) -> int:
    """Return the height of letters in pixels, which grows with the picture: it may be shown at any size."""
    return max(12, round(min(picture.size) / 45))


def _paint(canvas: NDArray[np.uint8], mask_HW: NDArray[np.bool_], color: Color, opacity: float) -> None:
    for top in range(0, len(canvas), _ROWS):
        rows, mask = canvas[top : top + _ROWS], mask_HW[top : top + _ROWS]
        mixed = (1 - opacity) * rows[mask].astype(np.float32) + opacity * np.array(color, np.float32)
        rows[mask] = mixed.astype(np.uint8)


def _borders(region_HW: NDArray[np.int32]) -> NDArray[np.bool_]:
    """Return the pixels whose right or lower neighbour belongs to another region."""
    border_HW = np.zeros(region_HW.shape, bool)
    border_HW[:, :-1] |= region_HW[:, :-1] != region_HW[:, 1:]
    border_HW[:-1] |= region_HW[:-1] != region_HW[1:]
    return border_HW


def _draw_objects(image: NDArray[np.uint8], found: Found) -> Image.Image:
    canvas = image.copy()
    objects: Counter[int] = Counter()
    colors = []
    for label in found.labels_D.tolist():
        colors.append(instance_color(label, objects[label]))
        objects[label] += 1
    for d, color in enumerate(colors if found.rles_D is not None else ()):
        # One at a time: the masks of a large image take gigabytes.
        _paint(canvas, found.mask(d).numpy(), color, 0.5)
    picture = _enlarged(canvas)
    zoom = picture.width // image.shape[1]
    pen = ImageDraw.Draw(picture)
    line = max(2, _text_size(picture) // 8)
    for box, color, name, score in zip(
        found.boxes_D4.tolist(), colors, found.names, found.scores_D.tolist(), strict=True
    ):
        x0, y0, x1, y1 = (value * zoom for value in box)
        pen.rectangle((x0, y0, max(x0, x1), max(y0, y1)), outline=color, width=line)
        _label(pen, picture.size, (x0, y0), _fitting(name, f"{score:.2f}", picture), color)
    return picture


def _fitting(name: str, score: str, picture: Image.Image) -> Written:
    """Return a label, whose name is cut where the picture is too narrow for it."""
    size = _text_size(picture)
    label, kept = written(f"{name} {score}", size), len(name)
    while label.box[2] + size > picture.width and kept > 1:
        kept -= 1
        label = written(f"{name[:kept]}.. {score}", size)
    return label


def _label(
    pen: ImageDraw.ImageDraw,
    size: tuple[int, int],
    corner: tuple[float, float],
    label: Written,
    color: Color,
) -> None:
    """Write a label on a ground of its colour: above the corner where there is room, and whole."""
    left, top, right, bottom = label.box
    margin = max(1, (bottom - top) // 6)
    width, height = right - left + 2 * margin, bottom - top + 2 * margin
    x = max(0, min(round(corner[0]), size[0] - width))
    y = round(corner[1]) - height
    y = max(0, min(y if y >= 0 else round(corner[1]), size[1] - height))
    pen.rectangle((x, y, x + width, y + height), fill=color)
    red, green, blue = color
    is_light = 0.299 * red + 0.587 * green + 0.114 * blue > 140
    pen.text(
        (x + margin - left, y + margin - top),
        label.text,
        fill=(0, 0, 0) if is_light else (255, 255, 255),
        font=label.font,
    )


def _enlarged(canvas: NDArray[np.uint8]) -> Image.Image:
    picture = Image.fromarray(canvas)
    zoom = round(_SMALLEST / max(picture.size))
    if zoom < 2:
        return picture  # without a copy: the image may be large
    return picture.resize((picture.width * zoom, picture.height * zoom), Image.Resampling.NEAREST)
