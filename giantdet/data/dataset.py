"""The interface that training and evaluation use for a data set of any format."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from giantdet.config.types import DatasetConfig
from giantdet.data.coco import CocoDataset
from giantdet.data.panoptic import PanopticMap
from giantdet.errors import DataError


class ImageObjects(Protocol):
    """The objects of one image, in pixels of the original image. Crowd regions are not among them."""

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

    def rle(self, n: int) -> dict[str, Any]:
        """Return COCO's compressed RLE of object n over the whole image."""
        ...


class Dataset(Protocol):
    """Images with their classes, objects and semantic maps, by index."""

    annotations: Path
    """The file that describes the data set, for messages."""
    class_names: list[str]
    category_ids: list[int]
    """The data set's own id of each class."""
    image_ids: NDArray[np.int64]
    sizes_hw: NDArray[np.int64]  # [N, 2]
    has_masks: bool
    """Whether objects have masks, so that masks can be evaluated."""
    semantic_names: list[str]
    """Name of each class of the semantic maps, by its number; empty without maps."""
    stuff_ids: list[int]
    """The data set's own ids of the classes without objects; class 1 of the semantic maps is the first."""

    @property
    def num_classes(self) -> int: ...

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

    def semantic_map(self, i: int) -> NDArray[np.uint8] | None:
        """Return each pixel's class in image i, uint8 [h, w] with `structures.IGNORE`; None without maps."""
        ...

    def panoptic_map(self, i: int) -> PanopticMap | None:
        """The segments of image i, or None without panoptic annotations."""
        ...

    def training_indices(self, filter_empty: bool) -> NDArray[np.int64]:
        """Return the indices of the images to train on: all, or those with something to learn."""
        ...


def open_dataset(config: DatasetConfig) -> Dataset:
    """Open the data set of a section of `data`. Raises DataError if it cannot be used."""
    return CocoDataset(config.annotations, config.images)


def check_categories(dataset: Dataset, known: list[int], whose: str | Path) -> None:
    """Raise DataError if the data set has categories that are not among a model's classes."""
    if unknown := set(dataset.category_ids) - set(known):
        raise DataError(
            f"{dataset.annotations}: categories {sorted(unknown)} are not among those that {whose} "
            f"was trained on, {known}"
        )
