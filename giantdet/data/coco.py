"""COCO instance annotations in packed arrays, and their images.

The JSON is read once and kept as a few numpy arrays (boxes, labels, polygon coordinates, RLE bytes),
so that forked loader workers share it: Python objects would be copied page by page as their
reference counts change. Polygons stay float64, so that masks equal pycocotools' bit for bit.

Format: https://cocodataset.org/#format-data; masks by pycocotools (Lin et al. 2014).
"""

from __future__ import annotations

import gc
import os
from array import array
from collections import Counter
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray
from pycocotools import mask as mask_util

from giantdet.config.classes import Category, Classes
from giantdet.data.images import read_image
from giantdet.data.near_files import hint
from giantdet.data.packed import Pack, cached
from giantdet.data.panoptic import PanopticMap
from giantdet.data.reading import Records, read_records
from giantdet.data.records import Instances, is_id, logger, read_instances
from giantdet.data.summary import Summary, summarize
from giantdet.errors import DataError

_BOX_ONLY, _POLYGONS, _RLE = 0, 1, 2
_VALUES = (
    *("has_list", "annotated", "has_masks", "without_mask", "crowd_objects", "skipped", "noted"),
    *("_examples", "_usable"),
)
"""Values that are kept in addition to arrays, categories and the summary."""


@dataclass(frozen=True)
class Objects:
    """The objects of one image, in pixels of the original image; no crowd regions and no ignored objects."""

    boxes_N4: NDArray[np.float32]  # xyxy, clipped to the image
    labels_N: NDArray[np.int64]  # 0 to C - 1, in the order of `category_ids`
    ids_N: NDArray[np.int64]  # annotation ids
    size_hw: tuple[int, int]
    first: int  # row of the first object in the data set's arrays
    dataset: CocoDataset

    def __len__(self) -> int:
        return len(self.labels_N)

    def has_mask(self, n: int) -> bool:
        """See `ImageObjects.has_mask`."""
        return bool(self.dataset.segment_kind[self.first + n] != _BOX_ONLY)

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
        annotations: COCO instances JSON. `has_masks` is False if all objects are boxes without a mask.
            Without annotations it is a list of images (`annotated` is False).
        images: folder that the `file_name`s are relative to.
        content: the lists of the JSON; None: they are read from `annotations`.

    Records that cannot be used are skipped and counted by kind in `skipped`; those that are used, but not as
    they are written, are counted in `noted`. One warning per kind names them, and `giantdet validate-data`
    lists them all. Raises `DataError` (a `ValueError`) if the whole file cannot be
    used: no such file, invalid JSON, a missing list, no image, no category.
    """

    protocol: ClassVar[str] = "coco"

    def __init__(self, annotations: str | Path, images: str | Path, content: Instances | None = None) -> None:
        self.annotations, self.root = Path(annotations), Path(images)
        if not self.root.is_dir():
            raise DataError(f"the image folder {images} does not exist")
        if content is not None:
            self._read(content)
        else:
            with cached(self.annotations, self.protocol) as cache:
                if cache.found is None:
                    self._read(None)
                self._unpack(cache.found or cache.store(self._packed()))
        Records(annotations, skipped=self.skipped, noted=self.noted, examples=self._examples).warn()
        if 0 < self.without_mask < len(self.labels_K):
            logger.warning(
                "%s: %d of %d objects have no mask; they are trained and scored as boxes only",
                annotations,
                self.without_mask,
                len(self.labels_K),
            )
        if self.crowd_objects and self.crowd_objects == self._usable:
            logger.warning(
                "%s: all %d annotations are crowd regions (iscrowd 1), which are neither trained on nor "
                "counted as missed; if they are objects, set iscrowd to 0",
                annotations,
                self.crowd_objects,
            )

    def _read(self, content: Instances | None) -> None:
        """Read the lists, or the file; everything but the classes becomes arrays."""
        gc_was_on = gc.isenabled()
        gc.disable()  # the collector would walk a million new dicts again and again
        try:
            if content is None:
                content = self.instances()
            self.has_list = "annotations" in content
            self.annotated = bool(content.get("annotations"))
            records = read_records(self.annotations, content)
            for record in records.images.values() if self.protocol == "coco" else ():
                if "neg_category_ids" in record:
                    text = 'neg_category_ids is not used; "format": "lvis" reads it'
                    records.found(("lists of LVIS", text), "image", record, left_out=False)
            self.skipped, self.noted, self._examples = records.skipped, records.noted, records.examples
            self._usable = len(records.annotations)
            if not records.categories:
                raise DataError(f"annotations {self.annotations} have no usable category")
            self._set_categories(records.categories)
            self._read_images(records.images)
            self._read_objects(records.annotations)
            self._summary = summarize(records)
        finally:
            if gc_was_on:
                gc.enable()

    def _packed(self) -> Pack:
        values = {name: getattr(self, name) for name in _VALUES}
        values["categories"] = list(zip(self.category_ids, self.class_names, strict=True))
        values["_summary"] = asdict(self._summary)
        return Pack(values, {name: v for name, v in vars(self).items() if isinstance(v, np.ndarray)})

    def _unpack(self, pack: Pack) -> None:
        """Take over what `_packed` returned, in this process or another."""
        for name in _VALUES:
            setattr(self, name, pack.values[name])
        self.skipped, self.noted = Counter(self.skipped), Counter(self.noted)
        self._set_categories(dict(pack.values["categories"]))
        self._summary = Summary(**pack.values["_summary"] | {"images_by_part": ()})
        for name, values in pack.arrays.items():
            setattr(self, name, values)

    def _set_categories(self, names: dict[int, str]) -> None:
        self.category_ids = sorted(names)
        self.class_names = [names[i] for i in self.category_ids]
        self.classes = Classes(objects=tuple(zip(self.category_ids, self.class_names, strict=True)))

    def _read_images(self, records: dict[int, dict[str, Any]]) -> None:
        if not records:
            example = next(iter(self._examples.values()))
            raise DataError(f"annotations {self.annotations} have no usable image, e.g. {example}")
        self.image_ids = np.array(list(records), np.int64)
        self.file_names = np.array([record["file_name"] for record in records.values()])
        self.sizes_hw = np.array([(r["height"], r["width"]) for r in records.values()], np.int64)

    def _read_objects(self, records: list[dict[str, Any]]) -> None:
        sizes = {int(i): (int(h), int(w)) for i, (h, w) in zip(self.image_ids, self.sizes_hw, strict=True)}
        index = {i: n for n, i in enumerate(sizes)}
        label = {category: n for n, category in enumerate(self.category_ids)}
        self.crowd_objects = sum(bool(record.get("iscrowd")) for record in records)
        usable = [record for record in records if not record.get("iscrowd") and not record.get("ignore")]
        usable.sort(key=lambda record: index[record["image_id"]])  # stable: the file's order within an image

        boxes, images, labels, ids = array("d"), array("q"), array("q"), array("q")
        kinds, segments, part_start = array("b"), array("q"), array("q", [0])
        coordinates, rle = array("d"), bytearray()
        for record in usable:
            size = sizes[record["image_id"]]
            kind, data = _packed(record.get("segmentation") or [], size)
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
        self.has_masks = self.without_mask < len(self.labels_K)
        self._pack_ignored([r for r in records if r.get("iscrowd") or r.get("ignore")], sizes, index)

    def _pack_ignored(
        self, records: list[dict[str, Any]], sizes: dict[int, tuple[int, int]], index: dict[int, int]
    ) -> None:
        """Keep the masks of crowd regions and ignored objects as RLE strings, in the images' order."""
        records = sorted(records, key=lambda record: index[record["image_id"]])
        strings = [_rle_string(record, sizes[record["image_id"]]) for record in records]
        self.ignored_bytes = np.frombuffer(b"".join(strings), np.uint8)
        self.ignored_ends = np.cumsum([0, *map(len, strings)])
        images = np.array([index[record["image_id"]] for record in records], np.int64)
        self.ignored_start = np.searchsorted(images, np.arange(len(sizes) + 1))

    def __len__(self) -> int:
        """Return the number of images, with or without objects."""
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

    def ignored(self, i: int) -> list[dict[str, Any]]:
        """See `Dataset.ignored`."""
        size = [int(side) for side in self.sizes_hw[i]]
        rows = range(int(self.ignored_start[i]), int(self.ignored_start[i + 1]))
        parts = [self.ignored_bytes[self.ignored_ends[k] : self.ignored_ends[k + 1]] for k in rows]
        return [{"size": size, "counts": part.tobytes()} for part in parts]

    def summary(self) -> Summary:
        """See `Dataset.summary`."""
        return self._summary

    def semantic_map(self, i: int) -> NDArray[np.uint8] | None:
        """Return None: an instances JSON has no semantic maps."""
        return None

    def panoptic_map(self, i: int) -> PanopticMap | None:
        """Return None: an instances JSON has no segments."""
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
        path = self.path(i)
        try:
            return read_image(path, (int(self.sizes_hw[i, 0]), int(self.sizes_hw[i, 1])))
        except DataError as error:
            if os.path.lexists(path):
                raise
            raise DataError(f"{error}{hint(self.root, path)}") from error


def _packed(segmentation: Any, size: tuple[int, int]) -> tuple[int, Any]:
    """Return the kind and packed form of a segmentation that `read_records` returned."""
    if isinstance(segmentation, dict):
        counts = segmentation["counts"]
        if isinstance(counts, list):
            return _RLE, mask_util.frPyObjects(segmentation, *size)["counts"]
        return _RLE, counts.encode()
    return (_POLYGONS if segmentation else _BOX_ONLY), segmentation


def _rle_string(record: dict[str, Any], size: tuple[int, int]) -> bytes:
    """Return the compressed RLE of a record; without a segmentation, that of its filled box."""
    kind, data = _packed(record.get("segmentation") or [], size)
    if kind == _RLE:
        string: bytes = data
    else:
        x, y, w, h = record["bbox"]
        parts = data or [[x, y, x + w, y, x + w, y + h, x, y + h]]
        string = mask_util.merge(mask_util.frPyObjects(parts, *size))["counts"]
    return string
