"""Report what is wrong with folders of images and label PNGs, file by file; see `validate.py`."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from giantdet.config.datasets import SemanticPngDatasetConfig
from giantdet.data.labels import LabelTable
from giantdet.data.semantic_png import find_pairs, read_labels, read_table
from giantdet.data.summary import Summary
from giantdet.data.validate import Level, Problem, Report, file_problems, name_problems, problem_of
from giantdet.errors import DataError
from giantdet.structures import IGNORE


def check_semantic_png(section: SemanticPngDatasetConfig) -> Report:
    """Return the report of a data set of label PNGs. All images and label maps are decoded.

    Raises `DataError` if the classes cannot be used, or no label map belongs to an image.
    """
    table, found = read_table(section), find_pairs(section)
    problems = list(name_problems(table.categories, "class"))
    # No errors: a folder of images may be that of several splits.
    for image, label in found.without:
        problems.append(_of(image, "no label map", f"there is no {label}; it is left out", "warning"))
    for label in found.unused:
        fault = ("label map without an image", "no image belongs to it")
        problems.append(problem_of(fault, "label map", label, "warning"))
    pixels_C = np.zeros(IGNORE + 1, np.int64)
    earlier: dict[str, str] = {}
    for image, label in found.pairs:
        if label in earlier:
            text = f"{label} is the label map of {earlier[label]} too"
            problems.append(_of(image, "duplicate label map", text, "warning"))
        earlier.setdefault(label, image)
        problems += _pair_problems(section, table, image, label, pixels_C)
    for (number, name), pixels in zip(table.categories, pixels_C.tolist(), strict=False):
        if not pixels:
            text = f"class {number}: no pixel has the class {name!r}"
            problems.append(Problem("class without pixels", number, text, "info"))
    return Report(Summary(images=len(found.pairs)), problems)


def _pair_problems(
    section: SemanticPngDatasetConfig, table: LabelTable, image: str, label: str, pixels_C: NDArray[np.int64]
) -> Iterator[Problem]:
    """Yield the problems of an image and its label map, and count the pixels of each class."""
    record = {"id": image, "file_name": image}
    path = Path(section.labels) / label
    try:
        labels = read_labels(path)
    except DataError as error:
        kind = "unreadable label map" if os.path.exists(path) else "missing label map"
        yield _of(image, kind, str(error))
        yield from file_problems(record, Path(section.images))
        return
    size = {"height": labels.shape[0], "width": labels.shape[1]}
    yield from file_problems(record | size, Path(section.images))
    try:
        classes_HW = table.of(labels)
    except DataError as error:
        yield _of(image, "unknown label", f"{path}: {error}")
        return
    pixels_C += np.bincount(classes_HW.ravel(), minlength=len(pixels_C))
    if (classes_HW == IGNORE).all():
        yield _of(image, "no labels", f"{path}: no pixel has a class", "info")


def _of(image: str, kind: str, text: str, level: Level = "error") -> Problem:
    return problem_of((kind, text), "image", image, level)
