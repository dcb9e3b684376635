"""The readers of data sets. A new format is a file, a line here and a section in config/datasets.py."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from giantdet.config.datasets import (
    CocoDatasetConfig,
    CocoPanopticDatasetConfig,
    DatasetConfig,
    JoinedDatasetConfig,
)
from giantdet.data.coco import CocoDataset
from giantdet.data.coco_panoptic import CocoPanopticDataset
from giantdet.data.dataset import Dataset
from giantdet.data.joined import JoinedDataset
from giantdet.data.semantic_png import SemanticPngDataset


def _coco(config: CocoDatasetConfig) -> Dataset:
    return CocoDataset(config.annotations, config.images)


def _coco_panoptic(config: CocoPanopticDatasetConfig) -> Dataset:
    return CocoPanopticDataset(config.annotations, config.images, config.segments_folder, config.instances)


def _joined(config: JoinedDatasetConfig) -> Dataset:
    return JoinedDataset([open_dataset(part) for part in config.parts])


READERS: dict[str, Callable[[Any], Dataset]] = {
    "coco": _coco,
    "coco_panoptic": _coco_panoptic,
    "semantic_png": SemanticPngDataset,
    "joined": _joined,
}
"""How a data set of each format is opened; config/datasets.py has their sections."""


def open_dataset(config: DatasetConfig) -> Dataset:
    """Open the data set of a section of `data`. Raises DataError if it cannot be used."""
    return READERS[config.format](config)
