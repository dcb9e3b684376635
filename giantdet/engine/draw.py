"""Pictures of what was found in an image: boxes with masks, or maps with a legend."""

from __future__ import annotations

import colorsys
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw

from giantdet.config.classes import Classes
from giantdet.data.panoptic import PanopticMap
from giantdet.engine.predict import Found

Color = tuple[int, int, int]
_PALETTE: tuple[Color, ...] = (
    (230, 25, 75), (60, 180, 75), (0, 130, 200), (245, 130, 48), (145, 30, 180),
    (70, 240, 240), (240, 50, 230), (210, 245, 60), (250, 190, 212), (0, 128, 128),
)  # fmt: skip
_SMALLEST = 512  # pixels of the longer side; smaller pictures are enlarged, or labels would cover them
_LEGEND_WIDTH, _LINE = 190, 16


class Entry(NamedTuple):
    """A region of a map, as it is painted and named in the legend."""

    mask_HW: NDArray[np.bool_]
    color: Color
    name: str


def color_of(number: int) -> Color:
    """Return a colour unlike those of nearby numbers: from the palette, then hues by the golden ratio."""
    if number < len(_PALETTE):
        return _PALETTE[number]
    hue, value = (number * 0.618034) % 1.0, 0.55 + 0.45 * ((number * 7) % 5) / 4
    red, green, blue = colorsys.hsv_to_rgb(hue, 0.75, value)
    return round(255 * red), round(255 * green), round(255 * blue)


def draw(image: NDArray[np.uint8], found: Found) -> Image.Image:
    """Return the image `[h, w, 3]` with what was found drawn on it.

    That is the panoptic map where there is one, else the semantic map, else boxes, masks, names and scores.
    Maps have a legend of the classes that occur, the largest first.
    """
    if found.panoptic is not None:
        return _draw_map(image, panoptic_entries(found.panoptic, found.classes))
    if found.semantic_HW is not None:
        return _draw_map(image, semantic_entries(found.semantic_HW.numpy(), found.classes))
    return _draw_objects(image, found)


def panoptic_entries(panoptic: PanopticMap, classes: Classes) -> list[Entry]:
    """Return an entry for each segment; objects of a class have different shades of its colour."""
    categories = [*classes.objects, *classes.stuff]
    number = {category: n for n, (category, _) in enumerate(categories)}
    objects: dict[int, int] = {}
    entries = []
    for segment in panoptic.segments:
        n = number[segment.category]
        shade = 1.0
        if n < len(classes.objects):
            shade = (1.0, 0.75, 0.55)[objects.get(n, 0) % 3]
            objects[n] = objects.get(n, 0) + 1
        red, green, blue = color_of(n)
        color = (round(red * shade), round(green * shade), round(blue * shade))
        entries.append(Entry(panoptic.ids_HW == segment.id, color, categories[n][1]))
    return entries


def semantic_entries(map_HW: NDArray[np.int64], classes: Classes) -> list[Entry]:
    """Return an entry for each class that occurs; classes without a name are left out."""
    return [
        Entry(map_HW == n, color_of(n), classes.semantic[n][1])
        for n in np.unique(map_HW).tolist()
        if n < len(classes.semantic)
    ]


def _draw_map(image: NDArray[np.uint8], entries: Sequence[Entry]) -> Image.Image:
    canvas = image.astype(np.float32)
    for entry in entries:
        canvas[entry.mask_HW] = 0.4 * canvas[entry.mask_HW] + 0.6 * np.array(entry.color, np.float32)
    canvas[_borders(image.shape[:2], entries)] = 255.0
    picture = _enlarged(canvas)
    sizes: dict[str, int] = {}
    colors: dict[str, Color] = {}
    counts: dict[str, int] = {}
    for entry in entries:
        sizes[entry.name] = sizes.get(entry.name, 0) + int(entry.mask_HW.sum())
        counts[entry.name] = counts.get(entry.name, 0) + 1
        colors.setdefault(entry.name, entry.color)
    names = sorted(sizes, key=lambda name: -sizes[name])
    whole = Image.new("RGB", (picture.width + _LEGEND_WIDTH, max(picture.height, 24)), (255, 255, 255))
    whole.paste(picture)
    pen = ImageDraw.Draw(whole)
    lines = max(1, (whole.height - 8) // _LINE)
    for line, name in enumerate(names[:lines]):
        x, y = picture.width + 8, 4 + line * _LINE
        pen.rectangle((x, y + 2, x + 11, y + 13), fill=colors[name], outline=(0, 0, 0))
        many = f" ({counts[name]})" if counts[name] > 1 else ""
        pen.text((x + 18, y + 1), f"{name[:24]}{many}", fill=(0, 0, 0))
    return whole


def _borders(size_hw: tuple[int, ...], entries: Sequence[Entry]) -> NDArray[np.bool_]:
    """Return the pixels whose right or lower neighbour belongs to another region."""
    region_HW = np.zeros(size_hw, np.int32)
    for number, entry in enumerate(entries, 1):
        region_HW[entry.mask_HW] = number
    border_HW = np.zeros(size_hw, bool)
    border_HW[:, :-1] |= region_HW[:, :-1] != region_HW[:, 1:]
    border_HW[:-1] |= region_HW[:-1] != region_HW[1:]
    return border_HW


def _draw_objects(image: NDArray[np.uint8], found: Found) -> Image.Image:
    canvas = image.astype(np.float32)
    labels = found.labels_D.tolist()
    if found.masks_DHW is not None:
        for mask_HW, label in zip(found.masks_DHW.numpy(), labels, strict=True):
            canvas[mask_HW] = 0.5 * canvas[mask_HW] + 0.5 * np.array(color_of(label), np.float32)
    picture = _enlarged(canvas)
    zoom = picture.width // image.shape[1]
    pen = ImageDraw.Draw(picture)
    for box, label, name, score in zip(
        found.boxes_D4.tolist(), labels, found.names, found.scores_D.tolist(), strict=True
    ):
        color = color_of(label)
        x0, y0, x1, y1 = (value * zoom for value in box)
        pen.rectangle((x0, y0, max(x0, x1), max(y0, y1)), outline=color, width=2)
        pen.text((x0 + 3, y0 + 1), f"{name} {score:.2f}", fill=color, stroke_width=1, stroke_fill=(0, 0, 0))
    return picture


def _enlarged(canvas: NDArray[np.float32]) -> Image.Image:
    picture = Image.fromarray(canvas.clip(0, 255).astype(np.uint8))
    zoom = max(1, round(_SMALLEST / max(picture.size)))
    return picture.resize((picture.width * zoom, picture.height * zoom), Image.Resampling.NEAREST)
