"""The interface that training and evaluation use for a data set of any format."""

from __future__ import annotations

import itertools
import os
from collections.abc import Callable, Container
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from giantdet.config.classes import Category, Classes
from giantdet.config.datasets import (
    CocoDatasetConfig,
    CocoPanopticDatasetConfig,
    DatasetConfigs,
    LvisDatasetConfig,
    sections,
)
from giantdet.data.coco import CocoDataset
from giantdet.data.coco_panoptic import CocoPanopticDataset
from giantdet.data.joined import JoinedDataset, check_kinds
from giantdet.data.lvis import LvisDataset, check_lvis
from giantdet.data.near_files import hint
from giantdet.data.panoptic import PanopticMap
from giantdet.data.records import Instances, logger
from giantdet.data.semantic_png import SemanticPngDataset
from giantdet.data.summary import Summary
from giantdet.data.validate import Report, check_coco
from giantdet.data.validate_panoptic import check_coco_panoptic
from giantdet.data.validate_semantic import check_semantic_png
from giantdet.errors import DataError


class ImageObjects(Protocol):
    """The objects of one image, in pixels of the original image; no crowd regions and no ignored objects."""

    @property
    def boxes_N4(self) -> NDArray[np.float32]:
        """Boxes xyxy, clipped to the image."""
        ...

    @property
    def labels_N(self) -> NDArray[np.int64]:
        """Class indices."""
        ...

    @property
    def ids_N(self) -> NDArray[np.int64]:
        """The data set's own ids of the objects, for messages."""
        ...

    @property
    def size_hw(self) -> tuple[int, int]:
        """(height, width) of the image."""
        ...

    def __len__(self) -> int: ...

    def has_mask(self, n: int) -> bool:
        """Return whether object n has a mask; otherwise only its box is known."""
        ...

    def rle(self, n: int) -> dict[str, Any]:
        """Return COCO's compressed RLE of object n over the whole image."""
        ...


class Dataset(Protocol):
    """Images with their classes, objects and semantic maps, by index."""

    annotations: Path
    """The file or folder that describes the data set, for messages."""

    @property
    def protocol(self) -> str:
        """The rules by which detections are scored: "coco" or "lvis"; see `Evaluator.PROTOCOL`."""
        ...

    classes: Classes
    """Classes of objects and of semantic maps; either may be empty."""
    root: Path
    """The folder of the images."""
    image_ids: NDArray[np.int64]
    sizes_hw: NDArray[np.int64]  # [N, 2]
    has_masks: bool
    """Whether any object has a mask, so that masks can be trained and evaluated."""
    annotated: bool
    """Whether there is a ground truth. A list of images alone gives results without scores."""

    def __len__(self) -> int:
        """Return the number of images, with or without objects."""
        ...

    def path(self, i: int) -> Path:
        """Return the file of image i."""
        ...

    def read_image(self, i: int) -> NDArray[np.uint8]:
        """Return image i, RGB uint8 [h, w, 3]. Raises DataError if it cannot be read."""
        ...

    def objects(self, i: int) -> ImageObjects:
        """Return the objects of image i."""
        ...

    def ignored(self, i: int) -> list[dict[str, Any]]:
        """Return COCO's compressed RLEs of the regions of image i that are neither objects nor background.

        These are crowd regions, ignored objects, and the void pixels of panoptic maps.
        """
        ...

    def semantic_map(self, i: int) -> NDArray[np.uint8] | None:
        """Return each pixel's class in image i, uint8 [h, w] with `structures.IGNORE`; None without maps.

        Raises DataError if it cannot be read.
        """
        ...

    def panoptic_map(self, i: int) -> PanopticMap | None:
        """Return the segments of image i, or None without panoptic annotations. Raises DataError as above."""
        ...

    def number_as(self, semantic: tuple[Category, ...]) -> None:
        """Number the classes of semantic maps as in this list from now on, by name.

        All names of the data set are in the list.
        """
        ...

    def training_indices(self, filter_empty: bool) -> NDArray[np.int64]:
        """Return the indices of the images to train on: all, or those with something to learn."""
        ...

    def summary(self) -> Summary:
        """Return the numbers of images, objects and labels."""
        ...

    def instances(self) -> Instances:
        """Return all records, also of crowd regions, as in a COCO instances JSON: the truth of its scores."""
        ...


def _coco(config: CocoDatasetConfig) -> Dataset:
    return CocoDataset(config.annotations, config.images)


def _lvis(config: LvisDatasetConfig) -> Dataset:
    return LvisDataset(config.annotations, config.images)


def _coco_panoptic(config: CocoPanopticDatasetConfig) -> Dataset:
    return CocoPanopticDataset(config.annotations, config.images, config.segments_folder, config.instances)


_CHECKED_FILES = 50
READERS: dict[str, Callable[[Any], Dataset]] = {
    "coco": _coco,
    "lvis": _lvis,
    "coco_panoptic": _coco_panoptic,
    "semantic_png": SemanticPngDataset,
}
"""The function that opens a data set of each format; config/datasets.py has the sections."""
CHECKS: dict[str, Callable[[Any], Report]] = {
    "coco": check_coco,
    "lvis": check_lvis,
    "coco_panoptic": check_coco_panoptic,
    "semantic_png": check_semantic_png,
}
"""The function that checks a data set of each format for `giantdet validate-data`. It raises DataError if the
data set cannot be used as a whole."""


def open_dataset(config: DatasetConfigs) -> Dataset:
    """Open the data set of a section of `data`, or of a list of sections, whose first has the classes.

    Raises DataError if one cannot be used, or has other classes or kinds of targets than the first.
    """
    first, *others = parts = [READERS[section.format](section) for _, section in sections(config)]
    if not others:
        return first
    for part in parts:
        check_files(part)  # a wrong folder of one part would be hidden by the images of the others
    check_kinds(parts)
    matched = [first.classes, *(meet(part, first.classes, first.annotations) for part in others)]
    return JoinedDataset(parts, matched)


def check_files(dataset: Dataset) -> None:
    """Raise DataError if none of a few images, from all parts of the data set, has a file."""
    chosen = np.linspace(0, len(dataset) - 1, min(len(dataset), _CHECKED_FILES)).astype(int)
    if not any(os.path.exists(dataset.path(int(i))) for i in chosen):
        path = dataset.path(0)
        raise DataError(
            f"{dataset.annotations}: none of its images exists, e.g. {path}{hint(dataset.root, path)}"
        )


def nothing_to_train(dataset: Dataset) -> DataError:
    """Return the error of a data set without objects, which says what its annotations are instead."""
    found = dataset.summary()
    kinds = {"crowd regions (iscrowd 1)": found.crowds, "ignored objects (ignore 1)": found.ignored}
    kinds["left out"] = sum(found.left_out.values())
    others = ", ".join(f"{count} are {kind}" for kind, count in kinds.items() if count)
    return DataError(
        f"no image of {dataset.annotations} has an object; there is nothing to train on"
        + (f": of its records {others}" if others else "")
    )


def check_targets(dataset: Dataset, targets: Container[str], without_masks: str) -> None:
    """Raise DataError if the data set has none of the objects or masks that a model is trained on.

    `without_masks` tells how to train without masks.
    """
    if "boxes" in targets and not dataset.summary().objects:
        raise nothing_to_train(dataset)
    if "masks" in targets and not dataset.has_masks:
        raise DataError(
            f"{dataset.annotations}: no object has a mask, but the model is trained on masks{without_masks}"
        )


def meet(dataset: Dataset, known: Classes, whose: str | Path) -> Classes:
    """Match a data set with known classes, those of a model or of another data set, by name.

    Returns the known classes with the data set's own ids; classes that the data set does not have get ids
    that are none of its. Semantic maps are numbered as in `known` from now on. Different ids are named in a
    warning. `whose` names where the known classes are from. Raises DataError for a name that is none of
    theirs, and where nothing can be scored.
    """
    objects = _by_name(dataset.classes.objects, known.objects, f"{dataset.annotations}: category", whose)
    semantic = _by_name(
        dataset.classes.semantic, known.semantic, f"{dataset.annotations}: semantic class", whose
    )
    if not objects and not semantic:
        raise DataError(f"{dataset.annotations}: there is nothing in it that the model of {whose} predicts")
    if semantic:
        dataset.number_as(known.semantic)
    return Classes(objects=objects or known.objects, semantic=semantic or known.semantic)


def _by_name(
    theirs: tuple[Category, ...], ours: tuple[Category, ...], what: str, whose: str | Path
) -> tuple[Category, ...]:
    """Return `ours` with their ids; empty if one of them is empty, as nothing of this kind is scored then."""
    if not theirs or not ours:
        return ()
    for number, name in theirs:
        if name not in {known for _, known in ours}:
            raise DataError(
                f"{what} {name!r} (id {number}) is not among the classes of {whose}: "
                f"{', '.join(known for _, known in ours)}"
            )
    if set(theirs) <= set(ours):
        return ours  # also where a name occurs twice
    names = [name for _, name in theirs]
    if len(set(names)) < len(names) or len({name for _, name in ours}) < len(ours):
        raise DataError(f"{what} names occur twice, and ids differ from those of {whose}: make names unique")
    ids = {name: number for number, name in theirs}
    free = itertools.count(-1, -1)
    matched = tuple((ids[name] if name in ids else next(free), name) for _, name in ours)
    pairs = [f"{name} {ids[name]} for {old}" for old, name in ours if name in ids and ids[name] != old]
    logger.warning(
        "%s ids differ from those of %s, and are matched by name: %s", what, whose, ", ".join(pairs)
    )
    return matched
