"""COCO instance annotations in packed arrays, and their images.

The JSON is read once and kept as a few numpy arrays (boxes, labels, polygon coordinates, RLE bytes),
so that forked loader workers share it: Python objects would be copied page by page as their
reference counts change. Polygons stay float64, so that masks equal pycocotools' bit for bit.

Format: https://cocodataset.org/#format-data; masks by pycocotools (Lin et al. 2014).
"""

from __future__ import annotations

import gc
from array import array
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pycocotools import mask as mask_util

from giantdet.config.classes import Category, Classes
from giantdet.data.images import read_image
from giantdet.data.panoptic import PanopticMap
from giantdet.data.records import (
    Fault,
    Instances,
    category_fault,
    category_name,
    image_fault,
    is_id,
    logger,
    object_fault,
    read_instances,
    segment,
)
from giantdet.errors import DataError

_BOX_ONLY, _POLYGONS, _RLE = 0, 1, 2


@dataclass(frozen=True)
class Objects:
    """The objects of one image, in pixels of the original image. Crowd regions are not among them."""

    boxes_N4: NDArray[np.float32]  # xyxy, clipped to the image
    labels_N: NDArray[np.int64]  # 0 to C - 1, in the order of `category_ids`
    ids_N: NDArray[np.int64]  # annotation ids
    size_hw: tuple[int, int]
    first: int  # row of the first object in the data set's arrays
    dataset: CocoDataset

    def __len__(self) -> int:
        return len(self.labels_N)

    def rle(self, n: int) -> dict[str, Any]:
        """Return object n's compressed RLE over the whole image; without a segmentation, its filled box."""
        data, row = self.dataset, self.first + n
        height, width = self.size_hw
        kind, (start, end) = data.segment_kind[row], data.segments_K2[row]
        if kind == _RLE:
            return {"size": [height, width], "counts": data.rle_bytes[start:end].tobytes()}
        if kind == _BOX_ONLY:
            x0, y0, x1, y1 = self.boxes_N4[n].astype(np.float64)
            parts = [np.array([x0, y0, x1, y0, x1, y1, x0, y1])]
        else:
            parts = [data.coordinates[data.part_start[p] : data.part_start[p + 1]] for p in range(start, end)]
        merged: dict[str, Any] = mask_util.merge(mask_util.frPyObjects(parts, height, width))
        return merged

    def masks(self) -> NDArray[np.bool_]:
        """Return all masks at full size, bool [N, h, w], decoded by pycocotools: for tests and drawings."""
        masks = [mask_util.decode(self.rle(n)).astype(bool) for n in range(len(self))]
        return np.stack(masks) if masks else np.zeros((0, *self.size_hw), bool)


class CocoDataset:
    """A COCO instances JSON and its image folder.

    Args:
        annotations: COCO instances JSON; objects without `segmentation` are boxes (`has_masks` is False).
            Without annotations it is a list of images (`annotated` is False).
        images: folder that the `file_name`s are relative to.
        content: the lists of the JSON; None: they are read from `annotations`.

    Records that cannot be used are skipped, counted by kind in `skipped` and named in one warning per kind;
    `giantdet validate-data` lists them all. Raises `DataError` (a `ValueError`) if the whole file cannot be
    used: no such file, invalid JSON, a missing list, no image, no category.
    """

    def __init__(self, annotations: str | Path, images: str | Path, content: Instances | None = None) -> None:
        self.annotations, self.root = Path(annotations), Path(images)
        if not self.root.is_dir():
            raise DataError(f"the image folder {images} does not exist")
        self.skipped: Counter[str] = Counter()
        self._examples: dict[str, str] = {}
        gc_was_on = gc.isenabled()
        gc.disable()  # the collector would walk a million new dicts again and again
        try:
            if content is None:
                content = read_instances(annotations, images_only=True)
            self.has_list = "annotations" in content
            self.annotated = bool(content.get("annotations"))
            self._read_categories(content["categories"])
            self._read_images(content["images"])
            self._read_objects(content.get("annotations", []))
        finally:
            if gc_was_on:
                gc.enable()
        self._report_skipped()

    def _report_skipped(self) -> None:
        for kind, count in self.skipped.items():
            logger.warning(
                "%s: skipped %d (%s), e.g. %s", self.annotations, count, kind, self._examples[kind]
            )

    def _skip(self, fault: Fault, what: str, record: Any) -> None:
        kind, text = fault
        self.skipped[kind] += 1
        name = record.get("id") if isinstance(record, dict) else "?"
        self._examples.setdefault(kind, f"{what} {name}: {text}")

    def _read_categories(self, records: list[Any]) -> None:
        names: dict[int, str] = {}
        for record in records:
            if fault := category_fault(record, names):
                self._skip(fault, "category", record)
            else:
                names[record["id"]] = category_name(record)
        self.category_ids = sorted(names)
        self.class_names = [names[i] for i in self.category_ids]
        if not names:
            raise DataError(f"annotations {self.annotations} have no usable category")
        self.classes = Classes(objects=tuple(zip(self.category_ids, self.class_names, strict=True)))

    def _read_images(self, records: list[Any]) -> None:
        good: dict[int, tuple[str, int, int]] = {}
        for record in records:
            if fault := image_fault(record, good):
                self._skip(fault, "image", record)
            else:
                good[record["id"]] = (record["file_name"], record["height"], record["width"])
        if not good:
            example = next(iter(self._examples.values()))
            raise DataError(f"annotations {self.annotations} have no usable image, e.g. {example}")
        self.image_ids = np.array(list(good), np.int64)
        self.file_names = np.array([name for name, _, _ in good.values()])
        self.sizes_hw = np.array([hw for _, *hw in good.values()], np.int64)

    def _read_objects(self, records: list[Any]) -> None:
        sizes = {int(i): (int(h), int(w)) for i, (h, w) in zip(self.image_ids, self.sizes_hw, strict=True)}
        index = {i: n for n, i in enumerate(sizes)}
        label = {category: n for n, category in enumerate(self.category_ids)}
        usable: list[Any] = []
        self.crowd_objects = 0
        for record in records:
            if fault := object_fault(record, sizes, label):
                self._skip(fault, "annotation", record)
            elif record.get("iscrowd"):
                self.crowd_objects += 1
            else:
                usable.append(record)
        usable.sort(key=lambda record: index[record["image_id"]])  # stable: the file's order within an image

        boxes, images, labels, ids = array("d"), array("q"), array("q"), array("q")
        kinds, segments, part_start = array("b"), array("q"), array("q", [0])
        coordinates, rle = array("d"), bytearray()
        for record in usable:
            size = sizes[record["image_id"]]
            kind, data = self._segment(record, size)
            if kind is None:
                continue
            if kind == _RLE:
                segments.extend((len(rle), len(rle) + len(data)))
                rle += data
            else:
                segments.extend((len(part_start) - 1, len(part_start) - 1 + len(data)))
                for part in data:
                    coordinates.extend(part)
                    part_start.append(len(coordinates))
            x, y, w, h = record["bbox"]
            boxes.extend((max(x, 0), max(y, 0), min(x + w, size[1]), min(y + h, size[0])))
            images.append(index[record["image_id"]])
            labels.append(label[record["category_id"]])
            ids.append(record["id"] if is_id(record.get("id")) else -1)
            kinds.append(kind)
        self.boxes_K4 = np.array(boxes, np.float32).reshape(-1, 4)
        self.labels_K, self.ids_K = np.array(labels, np.int64), np.array(ids, np.int64)
        self.segment_kind = np.array(kinds, np.int8)
        # start and end: of bytes in rle_bytes, or of polygons in part_start, by segment_kind
        self.segments_K2 = np.array(segments, np.int64).reshape(-1, 2)
        self.part_start, self.coordinates = np.array(part_start, np.int64), np.array(coordinates)
        self.rle_bytes = np.frombuffer(bytes(rle), np.uint8)
        counts = np.bincount(np.array(images, np.int64), minlength=len(sizes))
        self.object_start = np.concatenate([[0], np.cumsum(counts)])
        self.without_mask = int((self.segment_kind == _BOX_ONLY).sum())
        self.has_masks = self.without_mask == 0 and len(self.labels_K) > 0

    def _segment(self, record: Any, size: tuple[int, int]) -> tuple[int | None, Any]:
        """Return the kind and packed form of a segmentation; kind None if the object must be skipped."""
        usable, faults = segment(record.get("segmentation"), size)
        for fault in faults:
            self._skip(fault, "annotation", record)
        if usable is None:
            return None, None
        if isinstance(usable, dict):
            counts = usable["counts"]
            if isinstance(counts, list):
                return _RLE, mask_util.frPyObjects(usable, *size)["counts"]
            return _RLE, counts.encode()
        return (_POLYGONS if usable else _BOX_ONLY), usable

    def __len__(self) -> int:
        """Number of images, with or without objects."""
        return len(self.image_ids)

    @property
    def nonempty(self) -> NDArray[np.int64]:
        """The indices of the images that have an object."""
        return np.flatnonzero(np.diff(self.object_start))

    def training_indices(self, filter_empty: bool) -> NDArray[np.int64]:
        """Return the indices of the images to train on: all, or those that have an object."""
        if not self.has_list:
            raise DataError(
                f'annotations {self.annotations} have no list "annotations"; a list of images can be '
                "evaluated, but not trained on"
            )
        return self.nonempty if filter_empty else np.arange(len(self))

    def objects(self, i: int) -> Objects:
        """Return the objects of image i, in the file's order."""
        rows = slice(int(self.object_start[i]), int(self.object_start[i + 1]))
        size = (int(self.sizes_hw[i, 0]), int(self.sizes_hw[i, 1]))
        return Objects(
            self.boxes_K4[rows], self.labels_K[rows], self.ids_K[rows], size, first=rows.start, dataset=self
        )

    def semantic_map(self, i: int) -> NDArray[np.uint8] | None:
        """Return None: an instances JSON has no semantic maps."""
        return None

    def panoptic_map(self, i: int) -> PanopticMap | None:
        """None: an instances JSON has no segments."""
        return None

    def number_as(self, semantic: tuple[Category, ...]) -> None:
        """See `Dataset.number_as`; there are no semantic maps."""

    def instances(self) -> Instances:
        """See `Dataset.instances`."""
        return read_instances(self.annotations, images_only=True)

    def path(self, i: int) -> Path:
        return self.root / str(self.file_names[i])

    def read_image(self, i: int) -> NDArray[np.uint8]:
        """See `Dataset.read_image`."""
        return read_image(self.path(i), (int(self.sizes_hw[i, 0]), int(self.sizes_hw[i, 1])))
