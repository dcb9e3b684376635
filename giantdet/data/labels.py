"""Lists of semantic classes as data sets ship them, and the class of each label.

Sources: ADE20K (`objectInfo150.txt`), Cityscapes (`trainId`), CamVid (`label_colors.txt`), COCO.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from giantdet.config.classes import Category, positions
from giantdet.errors import DataError
from giantdet.structures import IGNORE

Color = tuple[int, int, int]
_UNKNOWN = -1  # a label that is neither a class nor ignored
_CODE = np.array([1, 256, 256**2])  # of colours


class LabelClass(NamedTuple):
    """One class of a list; `label` is the number that stands for it in PNG files."""

    label: int
    name: str
    color: Color | None = None


def read_classes(source: str | tuple[str, ...]) -> list[LabelClass]:
    """Return the classes of a list of names, or of a file of them. Raises DataError.

    A JSON file holds a list, or an object with a list `categories`. The label of an entry is its `train_id`
    or `trainId`, its `id`, or its position. A text file has one name per line, with or without `R G B` before
    it; or it is ADE20K's table, whose first line begins with `Idx`.
    """
    if not isinstance(source, str):
        return [LabelClass(label, name) for label, name in enumerate(source)]
    path = Path(source)
    try:
        text = path.read_text(encoding="utf-8-sig")
        found = list(_from_json(json.loads(text)) if path.suffix == ".json" else _from_lines(text))
    except OSError as error:
        raise DataError(f"cannot read the classes {path}: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise DataError(f"the classes {path}: {error}") from error
    if not found:
        raise DataError(f"the classes {path}: there are none")
    return found


def _from_json(content: Any) -> Iterator[LabelClass]:
    entries = content.get("categories") if isinstance(content, dict) else content
    if not isinstance(entries, list):
        raise ValueError("it is neither a list nor an object with a list of categories")
    for position, entry in enumerate(entries):
        if isinstance(entry, str):
            yield LabelClass(position, entry)
            continue
        if not isinstance(entry, dict) or not isinstance(entry.get("name"), str):
            raise ValueError(f"entry {position} is neither a name nor an object with a name")
        label = next((entry[k] for k in ("train_id", "trainId", "id") if k in entry), position)
        if type(label) is not int:
            raise ValueError(f"{entry['name']}: its label must be an integer, got {label!r}")
        yield LabelClass(label, entry["name"], _color(entry.get("color"), entry["name"]))


def _color(value: Any, name: str) -> Color | None:
    if value is None:
        return None
    if not isinstance(value, list) or len(value) != 3 or not all(_is_byte(part) for part in value):
        raise ValueError(f"{name}: color must be [R, G, B] with values from 0 to 255, got {value!r}")
    return (value[0], value[1], value[2])


def _is_byte(value: Any) -> bool:
    return type(value) is int and 0 <= value <= 255


def _from_lines(text: str) -> Iterator[LabelClass]:
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    if lines and lines[0].split()[0] == "Idx":  # ADE20K: columns by tabs, several names by commas in the last
        for label, line in enumerate(lines[1:]):
            yield LabelClass(label, line.split("\t")[-1].split(",")[0].strip())
        return
    for label, line in enumerate(lines):
        words = line.split(maxsplit=3)
        if len(words) == 4 and all(word.isdecimal() and int(word) <= 255 for word in words[:3]):
            yield LabelClass(label, words[3], (int(words[0]), int(words[1]), int(words[2])))
        else:
            yield LabelClass(label, line)


class LabelTable:
    """Maps labels, numbers or colours, to classes.

    Args:
        classes: of the data set; those with a negative label, or one that is ignored, are not trained.
        ignore: labels as numbers in the files, and classes by name, that are not trained.
        reduce_zero_label: 0 is ignored, and every class has its label plus 1.

    Raises DataError where two classes have the same label or color, or no class has an ignored name.
    """

    def __init__(
        self, classes: list[LabelClass], ignore: tuple[int | str, ...], reduce_zero_label: bool
    ) -> None:
        names = {entry.name for entry in classes}
        if unknown := [name for name in ignore if isinstance(name, str) and name not in names]:
            raise DataError(f"ignore: no class is called {unknown[0]!r}")
        shift = int(reduce_zero_label)
        left_out = [
            entry
            for entry in classes
            if entry.name in ignore or entry.label + shift in ignore or entry.label < 0
        ]
        self.classes = [entry for entry in classes if entry not in left_out]
        if not self.classes or len(self.classes) > IGNORE:
            raise DataError(f"{len(self.classes)} semantic classes; 1 to {IGNORE} are possible")
        labels = dict.fromkeys([0] if reduce_zero_label else [], IGNORE)
        labels |= {label: IGNORE for label in ignore if isinstance(label, int)}
        labels |= {entry.label + shift: IGNORE for entry in left_out}
        colors = {_code(entry.color): IGNORE for entry in left_out if entry.color is not None}
        for number, entry in enumerate(self.classes):
            _claim(labels, entry.label + shift, number, f"the label of class {entry.name!r}")
            if entry.color is not None:
                _claim(colors, _code(entry.color), number, f"the color of class {entry.name!r}")
        self.by_label, self.by_color = _Lookup(labels), _Lookup(colors)

    @property
    def categories(self) -> tuple[Category, ...]:
        """(label, name) of each class."""
        return tuple((entry.label, entry.name) for entry in self.classes)

    def number_as(self, semantic: tuple[Category, ...]) -> None:
        """Number the classes by their positions in `semantic`, which has all of them."""
        new = np.full(IGNORE + 1, IGNORE)
        new[: len(self.classes)] = positions(self.categories, semantic)
        for lookup in (self.by_label, self.by_color):
            lookup.numbers = new[lookup.own]

    def of(self, pixels: NDArray[Any]) -> NDArray[np.uint8]:
        """Return the classes of a map of numbers `[h, w]` or colours `[h, w, 3]`. Raises DataError."""
        return self.of_colors(pixels) if pixels.ndim == 3 else self.of_labels(pixels)

    def of_labels(self, labels_HW: NDArray[Any]) -> NDArray[np.uint8]:
        """Return the classes of a map of numbers, uint8 `[h, w]`. Raises DataError for an unknown label."""
        return self._known(self.by_label(labels_HW.astype(np.int64)), labels_HW)

    def of_colors(self, rgb_HW3: NDArray[np.uint8]) -> NDArray[np.uint8]:
        """Return the classes of a map of colours, uint8 `[h, w]`. Raises DataError for an unknown colour."""
        if not len(self.by_color.keys):
            raise DataError("its labels are colours, and the classes have none")
        return self._known(self.by_color(rgb_HW3.astype(np.int64) @ _CODE), rgb_HW3)

    def _known(self, numbers_HW: NDArray[np.int64], labels: NDArray[Any]) -> NDArray[np.uint8]:
        unknown_HW = numbers_HW == _UNKNOWN
        if unknown_HW.any():
            raise DataError(
                f"label {labels[unknown_HW][0].tolist()} is none of the {len(self.classes)} classes "
                f"({unknown_HW.mean():.1%} of the pixels have none); see ignore and reduce_zero_label"
            )
        return numbers_HW.astype(np.uint8)


class _Lookup:
    """Numbers by key, for whole arrays of keys; `_UNKNOWN` for others."""

    def __init__(self, numbers: Mapping[int, int]) -> None:
        self.keys = np.array(sorted(numbers), np.int64)
        self.own = np.array([numbers[key] for key in sorted(numbers)], np.int64)
        self.numbers = self.own  # renumbering starts from `own`, so that it can be repeated

    def __call__(self, keys: NDArray[np.int64]) -> NDArray[np.int64]:
        at = np.searchsorted(self.keys, keys).clip(max=len(self.keys) - 1)
        return np.where(self.keys[at] == keys, self.numbers[at], _UNKNOWN)


def _code(color: Color) -> int:
    return int(np.array(color) @ _CODE)


def _claim(taken: dict[int, int], key: int, number: int, what: str) -> None:
    if key in taken:
        raise DataError(f"{what} is also {'ignored' if taken[key] == IGNORE else 'that of another class'}")
    taken[key] = number
