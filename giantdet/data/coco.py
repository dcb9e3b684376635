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
from PIL import Image, ImageOps
from pycocotools import mask as mask_util

from giantdet.data.panoptic import PanopticMap
from giantdet.data.records import (
    Fault,
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
_ORIENTATION = 0x0112  # EXIF tag


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
        images: folder that the `file_name`s are relative to.

    Records that cannot be used are skipped, counted by kind in `skipped` and named in one warning per kind;
    `giantdet validate-data` lists them all. Raises `DataError` (a `ValueError`) if the whole file cannot be
    used: no such file, invalid JSON, a missing list, no image, no category.
    """

    def __init__(self, annotations: str | Path, images: str | Path) -> None:
        self.annotations, self.root = Path(annotations), Path(images)
        self.semantic_names: list[str] = []
        self.stuff_ids: list[int] = []
        if not self.root.is_dir():
            raise DataError(f"the image folder {images} does not exist")
        self.skipped: Counter[str] = Counter()
        self._examples: dict[str, str] = {}
        gc_was_on = gc.isenabled()
        gc.disable()  # the collector would walk a million new dicts again and again
        try:
            content = read_instances(annotations)
            self._read_categories(content["categories"])
            self._read_images(content["images"])
            self._read_objects(content["annotations"])
        finally:
            if gc_was_on:
                gc.enable()
        for kind, count in self.skipped.items():
            logger.warning("%s: skipped %d (%s), e.g. %s", annotations, count, kind, self._examples[kind])

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
    def num_classes(self) -> int:
        """Number of usable categories."""
        return len(self.category_ids)

    @property
    def nonempty(self) -> NDArray[np.int64]:
        """The indices of the images that have an object."""
        return np.flatnonzero(np.diff(self.object_start))

    def training_indices(self, filter_empty: bool) -> NDArray[np.int64]:
        """Return the indices of the images to train on: all, or those that have an object."""
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

    def path(self, i: int) -> Path:
        return self.root / str(self.file_names[i])

    def read_image(self, i: int) -> NDArray[np.uint8]:
        """Return image i as RGB uint8 [h, w, 3], in the size of its record.

        EXIF rotation is applied if the record's size is that of the rotated image (as label tools and
        browsers show it), and ignored if only the stored size fits (as in COCO itself). If both fit, for a
        square or a half turn, it is applied, as in detectron2. Alpha is dropped, the colours under it are
        kept; grey, palette and CMYK images become RGB; 16-bit grey is scaled to 8 bits.
        Raises `DataError`, which names the file, if it cannot be read or has another size.
        """
        path, size = self.path(i), (int(self.sizes_hw[i, 0]), int(self.sizes_hw[i, 1]))
        try:
            with Image.open(path) as file:
                return np.array(to_rgb(orient(file, size)))
        except DataError as error:
            raise DataError(f"{path}: {error}") from error
        except OSError as error:
            raise DataError(f"{path}: {error.strerror or error}") from error
        except MemoryError:
            raise
        except Exception as error:  # PIL's plugins raise any exception on broken files
            raise DataError(f"{path}: {type(error).__name__} {error}") from error


def orient(image: Image.Image, size_hw: tuple[int, int]) -> Image.Image:
    """Return `image`, rotated by EXIF if that gives `size_hw`, else as it is; otherwise `DataError`."""
    stored = (image.height, image.width)
    orientation = image.getexif().get(_ORIENTATION, 1)
    rotated = stored[::-1] if orientation in (5, 6, 7, 8) else stored
    if rotated == size_hw:
        return ImageOps.exif_transpose(image) if orientation in range(2, 9) else image
    if stored == size_hw:
        return image
    raise DataError(f"the file is {rotated[1]} x {rotated[0]}, its record says {size_hw[1]} x {size_hw[0]}")


def to_rgb(image: Image.Image) -> Image.Image:
    """Convert any PIL mode to RGB; see `CocoDataset.read_image`."""
    if image.mode.startswith("I"):  # I;16, I;16B, and I, the modes of 16-bit PNG and TIFF files
        wide = np.clip(np.asarray(image, dtype=np.int64), 0, 65535)
        image = Image.fromarray(((wide + 128) // 257).astype(np.uint8))
    return image if image.mode == "RGB" else image.convert("RGB")
