"""Pictures of what was found in an image: objects with masks and labels, or maps with a legend."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageFilter
from pycocotools import mask as mask_util

from giantdet.config.classes import Classes
from giantdet.data.panoptic import PanopticMap
from giantdet.engine.colors import Color, color_of, muted_color_of
from giantdet.engine.labels import (
    Box,
    Label,
    Point,
    Region,
    Row,
    text_size,
    with_caption,
    with_legend,
    write_labels,
)
from giantdet.engine.outlines import Shape, outlines, paint, rectangle

if TYPE_CHECKING:
    from giantdet.engine.found import Found  # which draws itself

_SMALLEST = 512  # pixels of the longer side; smaller pictures are enlarged, or labels would cover them
_WHITE: Color = (255, 255, 255)


class Entry(NamedTuple):
    """A region of a map, as it is painted and named in the legend."""

    number: int  # in the map
    color: Color
    name: str


def draw(image: NDArray[np.uint8], found: Found, *, scores: bool = True) -> Image.Image:
    """Return the image `[h, w, 3]` with what was found drawn on it.

    That is the panoptic map where there is one, else the semantic map, else masks or boxes, names and, with
    `scores`, scores. Below it is a legend of the classes, the largest first, for maps and where there is no
    room for the name of each object. An image of less than 512 pixels is enlarged.
    """
    picture, rows = _drawn(image, found, scores)
    return with_legend(picture, rows)


def compare(
    image: NDArray[np.uint8],
    truth: Found,
    found: Found,
    captions: tuple[str, str] = ("Ground truth", "Prediction"),
) -> Image.Image:
    """Return the ground truth, without scores, beside what was found, under captions and over one legend."""
    (left, rows), (right, more) = _drawn(image, truth, False), _drawn(image, found, True)
    size, gap = text_size(left), round(min(left.size) / 50)
    left, right = with_caption(left, captions[0], size), with_caption(right, captions[1], size)
    both = Image.new("RGB", (left.width + gap + right.width, left.height), _WHITE)
    both.paste(left)
    both.paste(right, (left.width + gap, 0))
    colors = {row.name: row.color for row in [*rows, *more]}
    return with_legend(both, [Row(name, color) for name, color in colors.items()], size)


def _drawn(image: NDArray[np.uint8], found: Found, scores: bool) -> tuple[Image.Image, list[Row]]:
    """Return the picture and the rows of its legend."""
    if found.panoptic is not None:
        return _draw_map(image, found.panoptic.ids_HW, panoptic_entries(found.panoptic, found.classes))
    if found.semantic_HW is not None:
        map_HW = found.semantic_HW.numpy()
        return _draw_map(image, map_HW, semantic_entries(map_HW, found.classes))
    return _draw_objects(image, found, scores)


def panoptic_entries(panoptic: PanopticMap, classes: Classes) -> list[Entry]:
    """Return an entry for each segment; objects of a class have different shades of its colour."""
    categories = [*classes.objects, *classes.stuff]
    number = {category: n for n, (category, _) in enumerate(categories)}
    objects: Counter[int] = Counter()
    entries = []
    for segment in panoptic.segments:
        n = number[segment.category]
        color = color_of(n, objects[n]) if n < len(classes.objects) else muted_color_of(n)
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
) -> tuple[Image.Image, list[Row]]:
    picture, zoom = _enlarged(image)
    width = line_width(picture)
    fills, lines, labels = [], [], []
    sizes: Counter[str] = Counter()
    counts: Counter[str] = Counter()
    colors: dict[str, Color] = {}
    for entry in entries:
        mask_HW = map_HW == entry.number
        area = int(mask_HW.sum())
        if area == 0:
            continue
        rings, window, corner = _rings(mask_HW, zoom)
        sizes[entry.name] += area
        counts[entry.name] += 1
        colors.setdefault(entry.name, entry.color)
        fills.append(Shape(rings, fill=(entry.color, 0.55)))
        lines.append(Shape(rings, line=(_WHITE, 0.9), width=0.6 * width))
        x, y = _middle(window)
        middle = ((corner[0] + x) * zoom, (corner[1] + y) * zoom)
        labels.append((area, Region(entry.name, entry.color, middle)))
    paint(picture, [*fills, *lines])
    rows = [Row(name, colors[name], counts[name]) for name, _ in sizes.most_common()]
    large = [label for area, label in sorted(labels, key=lambda a: -a[0]) if area > 0.01 * map_HW.size]
    write_labels(picture, large)
    return picture, rows


def _draw_objects(image: NDArray[np.uint8], found: Found, scores: bool) -> tuple[Image.Image, list[Row]]:
    picture, zoom = _enlarged(image)
    width = line_width(picture)
    shapes, labels = [], []
    counts: Counter[int] = Counter()
    names: dict[int, str] = {}
    for d, (label, name) in enumerate(zip(found.labels_D.tolist(), found.names, strict=True)):
        color = color_of(label, counts[label])
        counts[label] += 1
        names[label] = name
        x0, y0, x1, y1 = (value * zoom for value in found.boxes_D4[d].tolist())
        box = (x0, y0, max(x0, x1), max(y0, y1))
        rings = [] if found.rles_D is None else _rings_of(found.rles_D[d], zoom)
        if rings:
            shapes.append((_area(box), Shape(rings, (color, _opacity(box, picture)), (color, 1.0), width)))
        else:
            shapes.append((_area(box), Shape([rectangle(box)], None, (color, 1.0), width)))
        score = f"{found.scores_D[d]:.2f}" if scores else ""
        labels.append(Label(name, score, color, box, _ends(rings) if rings else None))
    # The largest lowest: small objects stay visible.
    paint(picture, [shape for _, shape in sorted(shapes, key=lambda pair: -pair[0])])
    if write_labels(picture, labels):
        return picture, []
    return picture, [Row(names[n], color_of(n), count) for n, count in counts.most_common()]


def line_width(picture: Image.Image) -> float:
    """Return the width of outlines in pixels."""
    return max(1.8, min(picture.size) / 270)


def _area(box: Box) -> float:
    return (box[2] - box[0]) * (box[3] - box[1])


def _opacity(box: Box, picture: Image.Image) -> float:
    """Return the opacity of a mask: a large one would give the picture its colour."""
    return 0.45 - 0.2 * math.sqrt(min(1.0, _area(box) / (picture.width * picture.height)))


def _ends(rings: Sequence[NDArray[Any]]) -> tuple[Point, Point]:
    """Return the highest and the lowest point of polygons; the middle one, where there are several."""
    points_N2 = np.concatenate(rings)
    ends = []
    for y in (points_N2[:, 1].min(), points_N2[:, 1].max()):
        x = float(np.median(points_N2[np.abs(points_N2[:, 1] - y) < 1, 0]))
        ends.append((x, float(y)))
    return ends[0], ends[1]


def _rings_of(rle: dict[str, Any], zoom: float) -> list[NDArray[Any]]:
    x, y, w, h = map(int, mask_util.toBbox(rle))
    # One mask at a time: those of a large image take gigabytes.
    window = mask_util.decode(rle)[y : y + h, x : x + w]
    return outlines(window, (x, y), zoom)


def _rings(mask_HW: NDArray[np.bool_], zoom: float) -> Any:
    rows, columns = np.flatnonzero(mask_HW.any(1)), np.flatnonzero(mask_HW.any(0))
    corner = int(columns[0]), int(rows[0])
    window = mask_HW[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
    return outlines(window, corner, zoom), window, corner


def _middle(window: NDArray[np.bool_]) -> tuple[float, float]:
    """Return the place xy of a mask's window that is farthest from its border, roughly."""
    mask = Image.fromarray(window.astype(np.uint8) * np.uint8(255))
    factor = max(1, -(-max(mask.size) // 96))
    small = mask.reduce(factor)
    padded = Image.new("L", (small.width + 16, small.height + 16))
    padded.paste(small, (8, 8))
    thick = np.asarray(padded.filter(ImageFilter.GaussianBlur(8)))
    y, x = np.unravel_index(int(thick.argmax()), thick.shape)
    return (float(x) - 7.5) * factor, (float(y) - 7.5) * factor


def _enlarged(image: NDArray[np.uint8]) -> tuple[Image.Image, int]:
    """Return a picture of the image, enlarged where it is small, and by how much."""
    picture = Image.fromarray(image)
    zoom = max(1, round(_SMALLEST / max(picture.size)))
    if zoom > 1:
        picture = picture.resize((picture.width * zoom, picture.height * zoom), Image.Resampling.LANCZOS)
    return picture, zoom
