"""What every reader of another format yields: pictures with their shapes, and notes of what was not usable.

Coordinates are those of the source, already without its conventions: x to the right and y down from the
corner of the image, continuous, so that a box of one pixel has sides of 1.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pycocotools import mask as mask_util

from giantdet.data.images import image_endings
from giantdet.data.near_files import near_file
from giantdet.data.segments import Size
from giantdet.errors import DataError

Points = list[float]
"""x, y, x, y, ..."""
_EXAMPLES = 3
_LONGEST_NAME = 255  # bytes, on Linux; a longer one is an error of the system
_MOST_PIXELS = 2**29
_SPLITS = {"training": "train", "valid": "val", "validation": "val", "testing": "test"}
_CORNERS = 72  # of a polygon that stands for an ellipse


@dataclass
class Shape:
    """One object: a box, polygons or a mask."""

    name: str
    where: str
    """The file, and the line or number in it, for messages."""
    box: tuple[float, float, float, float] | None = None
    """x0, y0, x1, y1; None: around the segmentation."""
    polygons: list[Points] = field(default_factory=list)
    rle: dict[str, Any] | None = None
    """COCO's RLE over the whole image."""
    crowd: bool = False
    """A group of objects: COCO's iscrowd."""
    ignore: bool = False
    """Neither trained on nor counted as missed."""


@dataclass
class Picture:
    """One image with its shapes."""

    file: Path | None
    """None: there is no such file; `where` and `name` tell which."""
    where: str
    name: str = ""
    shapes: list[Shape] = field(default_factory=list)
    size: Size | None = None
    """Height and width that the source states; None: those of the file as a viewer shows it."""
    relative: bool = False
    """Coordinates are in 0 to 1 of the width and height, not in pixels."""
    split: str | None = None


@dataclass(frozen=True)
class Request:
    """What the user asked for."""

    source: Path
    images: Path | None = None
    """Folder of the images; None: where the format has them."""
    classes: tuple[str, ...] | None = None
    attribute: str | None = None
    """VIA: the region attribute that names the class."""
    difficult: str = "ignore"
    """VOC: "ignore", or "object": trained and scored as the others."""
    zero_based: bool = False
    """VOC: pixels are counted from 0."""

    @property
    def folder(self) -> Path:
        """The source, or the folder that it is in."""
        return self.source if self.source.is_dir() else self.source.parent

    @property
    def only_class(self) -> str:
        """The class of objects that have none in the source."""
        return self.classes[0] if self.classes and len(self.classes) == 1 else "object"


@dataclass
class Notes:
    """What was left out, and what was read otherwise than written, by kind and with examples."""

    left_out: Counter[str] = field(default_factory=Counter)
    mapped: Counter[str] = field(default_factory=Counter)
    examples: dict[str, list[str]] = field(default_factory=dict)
    classes: list[str] = field(default_factory=list)
    """The classes that the source lists, in its order."""

    def skip(self, kind: str, where: str, text: str = "") -> None:
        """Count something that is left out."""
        self._add(self.left_out, kind, where, text)

    def note(self, kind: str, where: str, text: str = "") -> None:
        """Count something that is read otherwise than written."""
        self._add(self.mapped, kind, where, text)

    def _add(self, counts: Counter[str], kind: str, where: str, text: str) -> None:
        counts[kind] += 1
        if counts[kind] <= _EXAMPLES:
            self.examples.setdefault(kind, []).append(f"{where}: {text}" if text else where)

    def list_class(self, name: str) -> None:
        """Add a class to the source's list, once."""
        if name not in self.classes:
            self.classes.append(name)

    def lines(self) -> Iterator[str]:
        """Yield each kind with its count and examples."""
        for title, counts in (("left out", self.left_out), ("read otherwise than written", self.mapped)):
            for kind, count in counts.most_common():
                yield f"{title}: {kind}: {count}"
                yield from (f"    {text}" for text in self.examples[kind])
                if count > _EXAMPLES:
                    yield f"    ... and {count - _EXAMPLES} more"


def split_name(name: str | None) -> str | None:
    """Return the name of a split as files are named: train, val, test; None for none."""
    lower = (name or "").strip().lower()
    return _SPLITS.get(lower, lower) if lower not in ("", "default") else None


def is_image(path: Path) -> bool:
    """Return whether a file has the ending of an image and is not hidden."""
    return path.suffix.lower() in image_endings() and not path.name.startswith(".")


def images_in(folder: Path) -> list[Path]:
    """Return the image files in a folder and its sub-folders, in order of their names."""
    return sorted(path for path in folder.rglob("*") if is_image(path) and path.is_file())


def locate(name: str, folders: Iterable[Path], notes: Notes, where: str) -> Path | None:
    """Return the image file that a source calls `name`, or None.

    A file under a similar name, in a sub-folder or a neighbouring folder is found too, and noted.
    """
    plain = name.replace("\\", "/")
    if "\0" in plain or max(map(len, plain.split("/"))) > _LONGEST_NAME:
        return None
    places = list(dict.fromkeys(folders))
    for folder in places:
        if plain and (folder / plain).is_file():
            return folder / plain
    for folder in places:
        near = near_file(folder, plain) if plain else None
        if near is not None and is_image(near):
            if near.name != plain.rsplit("/", 1)[-1]:
                notes.note("image under another name", where, f"{name} is read as {near}")
            return near
    return None


def number(text: Any) -> float:
    """Return a finite number from JSON, XML or text. Raises ValueError."""
    if isinstance(text, bool) or text is None:
        raise ValueError(f"{text!r} is not a number")
    try:
        value = float(text)
    except OverflowError:
        raise ValueError("a number is too large") from None
    except TypeError:
        raise ValueError(f"{text!r} is not a number") from None
    if not math.isfinite(value):
        raise ValueError(f"{text!r} is not finite")
    return value


def size_of(height: Any, width: Any) -> Size | None:
    """Return the size that a source states, or None if it states none: some tools write 0."""
    try:
        size = int(number(height)), int(number(width))
    except ValueError:
        return None
    return size if min(size) > 0 and max(size) < 2**31 else None


def points(values: Any) -> Points:
    """Return x, y, x, y, ... of a list of [x, y]. Raises ValueError."""
    if not isinstance(values, list) or not all(isinstance(v, list | tuple) and len(v) == 2 for v in values):
        raise ValueError("its points are not a list of [x, y]")
    return [number(value) for point in values for value in point]


def ellipse(cx: float, cy: float, rx: float, ry: float, degrees: float = 0.0) -> Points:
    """Return a polygon for an ellipse that is turned clockwise, as seen, about its centre."""
    angles = np.linspace(0, 2 * np.pi, _CORNERS, endpoint=False)
    return _turned(np.stack([rx * np.cos(angles), ry * np.sin(angles)], axis=1), (cx, cy), degrees)


def turned_box(
    x0: float, y0: float, x1: float, y1: float, degrees: float, about: tuple[float, float]
) -> Points:
    """Return the corners of a box that is turned clockwise, as seen, about a point."""
    corners = np.array([[x0, y0], [x1, y0], [x1, y1], [x0, y1]]) - about
    return _turned(corners, about, degrees)


def _turned(xy_N2: NDArray[np.float64], centre: tuple[float, float], degrees: float) -> Points:
    angle = np.deg2rad(degrees)
    rotation = np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
    return [float(v) for v in (xy_N2 @ rotation.T + centre).reshape(-1)]


def encode(mask_HW: NDArray[np.bool_]) -> dict[str, Any]:
    """Return COCO's compressed RLE of a mask, for JSON."""
    rle = mask_util.encode(np.asfortranarray(mask_HW, np.uint8))
    return {"size": [int(side) for side in rle["size"]], "counts": rle["counts"].decode()}


def compressed(rle: dict[str, Any]) -> dict[str, Any]:
    """Return COCO's RLE with its counts as a string, for JSON."""
    if isinstance(rle["counts"], str):
        return rle
    return {"size": rle["size"], "counts": mask_util.frPyObjects(rle, *rle["size"])["counts"].decode()}


def in_window(window_hw: NDArray[np.bool_], left: int, top: int, size: Size) -> NDArray[np.bool_]:
    """Return a mask over the whole image of one in a window. Raises ValueError if it leaves the image."""
    height, width = window_hw.shape
    if size[0] * size[1] > _MOST_PIXELS:
        raise ValueError(f"an image of {size[1]:.3g} x {size[0]:.3g} pixels is too large")
    if left < 0 or top < 0 or left + width > size[1] or top + height > size[0]:
        place = f"{width} x {height} at {left}, {top}"
        raise ValueError(f"its mask of {place} leaves the {size[1]} x {size[0]} image")
    mask = np.zeros(size, bool)
    mask[top : top + height, left : left + width] = window_hw
    return mask


def read_text(path: Path) -> str:
    """Return a text file in UTF-8, with or without a byte order mark. Raises DataError."""
    try:
        return path.read_text(encoding="utf-8-sig")
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is not text in UTF-8: {error}") from error
