"""Semantic maps as a folder of images and a folder of label PNGs: ADE20K, Cityscapes, CamVid, COCO-Stuff."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from giantdet.config.classes import Category, Classes
from giantdet.config.datasets import SemanticPngDatasetConfig
from giantdet.data.images import image_endings, named, read_image
from giantdet.data.labels import LabelTable, read_classes
from giantdet.data.records import Instances, logger
from giantdet.data.summary import Summary
from giantdet.errors import DataError


@dataclass(frozen=True)
class NoObjects:
    """The objects of an image: none."""

    size_hw: tuple[int, int]
    boxes_N4: NDArray[np.float32] = field(default_factory=lambda: np.zeros((0, 4), np.float32))
    labels_N: NDArray[np.int64] = field(default_factory=lambda: np.zeros(0, np.int64))
    ids_N: NDArray[np.int64] = field(default_factory=lambda: np.zeros(0, np.int64))

    def __len__(self) -> int:
        return 0

    def has_mask(self, n: int) -> bool:
        """Return False."""
        return False

    def rle(self, n: int) -> dict[str, Any]:
        """Raise IndexError."""
        raise IndexError(f"object {n} of none")


class SemanticPngDataset:
    """Images and label maps of the same names; see `SemanticPngDatasetConfig` for the keys.

    Image ids are positions in the sorted list of files. Images without a label map are left out and counted
    in a warning. Raises `DataError` where nothing is left.
    """

    protocol: ClassVar[str] = "coco"

    def __init__(self, config: SemanticPngDatasetConfig) -> None:
        self.annotations, self.images = Path(config.labels), Path(config.images)
        self.table = read_table(config)
        self.classes = Classes(semantic=self.table.categories)
        self.has_masks, self.annotated = False, True
        self.root = self.images
        found = find_pairs(config)
        self.pairs = found.pairs
        if found.without:
            logger.warning(
                "%s: left out %d of %d images without a label map, e.g. %s (no %s)",
                *(self.annotations, len(found.without), len(found.images)),
                *found.without[0],
            )
        self.image_ids = np.arange(len(self.pairs))
        self.sizes_hw = np.array([_size(self.annotations / label) for _, label in self.pairs], np.int64)

    def __len__(self) -> int:
        return len(self.pairs)

    def path(self, i: int) -> Path:
        """See `Dataset.path`."""
        return self.images / self.pairs[i][0]

    def read_image(self, i: int) -> NDArray[np.uint8]:
        """See `Dataset.read_image`. The size is that of the label map."""
        return read_image(self.path(i), (int(self.sizes_hw[i, 0]), int(self.sizes_hw[i, 1])))

    def semantic_map(self, i: int) -> NDArray[np.uint8]:
        """See `Dataset.semantic_map`."""
        path = self.annotations / self.pairs[i][1]
        pixels = read_labels(path)
        with named(path):
            return self.table.of(pixels)

    def number_as(self, semantic: tuple[Category, ...]) -> None:
        """See `Dataset.number_as`."""
        self.table.number_as(semantic)

    def panoptic_map(self, i: int) -> None:
        """Return None: there are no segments."""

    def objects(self, i: int) -> NoObjects:
        """Return no objects."""
        return NoObjects((int(self.sizes_hw[i, 0]), int(self.sizes_hw[i, 1])))

    def ignored(self, i: int) -> list[dict[str, Any]]:
        """Return nothing: there are no objects."""
        return []

    def training_indices(self, filter_empty: bool) -> NDArray[np.int64]:
        """Return the indices of all images."""
        return np.arange(len(self))

    def summary(self) -> Summary:
        """See `Dataset.summary`; there are no objects."""
        return Summary(images=len(self))

    def instances(self) -> Instances:
        """See `Dataset.instances`; there are none."""
        return {"images": [], "annotations": [], "categories": []}


def read_table(config: SemanticPngDatasetConfig) -> LabelTable:
    """Return the classes of a section. Raises DataError, which names the folder of labels."""
    try:
        return LabelTable(read_classes(config.classes), config.ignore, config.reduce_zero_label)
    except DataError as error:
        raise DataError(f"{config.labels}: {error}") from error


class Pairs(NamedTuple):
    """The files of a data set, as paths relative to the two folders."""

    images: list[str]
    pairs: list[tuple[str, str]]
    """Images and their label maps."""
    without: list[tuple[str, str]]
    """Images without a label map, and the name that it would have."""
    unused: list[str]
    """Label maps without an image."""


def find_pairs(config: SemanticPngDatasetConfig) -> Pairs:
    """Return which label map belongs to each image. Raises DataError if none does."""
    labels = {name for name in _files(Path(config.labels)) if name.lower().endswith(".png")}
    images = [name for name in _files(Path(config.images)) if Path(name).suffix.lower() in image_endings()]
    pairs: list[tuple[str, str]] = []
    without: list[tuple[str, str]] = []
    for image in images:
        stem = os.path.splitext(image)[0]
        if not stem.endswith(config.image_suffix):
            continue
        label = f"{stem.removesuffix(config.image_suffix)}{config.label_suffix}.png"
        (pairs if label in labels else without).append((image, label))
    if not pairs:
        example = f", e.g. {without[0][0]} would need {without[0][1]}" if without else ""
        raise DataError(
            f"{config.labels}: no label map belongs to one of the {len(images)} images in "
            f"{config.images}{example}; see image_suffix and label_suffix"
        )
    used = {label for _, label in pairs}
    named_so = [name for name in labels if os.path.splitext(name)[0].endswith(config.label_suffix)]
    return Pairs(images, pairs, without, sorted(set(named_so) - used))


def read_labels(path: Path) -> NDArray[Any]:
    """Return a PNG of labels as numbers `[h, w]` or colours `[h, w, 3]`. Raises DataError."""
    with named(path), Image.open(path) as file:
        if file.mode in ("RGB", "RGBA"):
            return np.asarray(file.convert("RGB"))
        # The numbers of a palette image, not its colours.
        return np.asarray(file if file.mode not in ("1", "LA") else file.convert("L"))


def _files(folder: Path) -> list[str]:
    """Return the paths of all files in a folder and its subfolders, relative to it, sorted."""
    found = []
    for parent, _, names in os.walk(folder, followlinks=True):
        found += [os.path.relpath(os.path.join(parent, name), folder) for name in names]
    return sorted(found)


def _size(path: Path) -> tuple[int, int]:
    """Return (height, width) of a PNG, from its header. Raises DataError."""
    with named(path), Image.open(path) as file:
        return file.height, file.width
