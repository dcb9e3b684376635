"""COCO panoptic annotations: a JSON of segments, a folder of PNG files of their ids, and the images.

Format: https://cocodataset.org/#format-data, section 4. The semantic maps are those of detectron2's Panoptic
FPN (`prepare_panoptic_fpn.py`): 0 for all things, crowd regions too, stuff from 1, `IGNORE` for void.
"""

from __future__ import annotations

from array import array
from collections.abc import Container
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pycocotools import mask as mask_util

from giantdet.config.classes import Category, Classes, positions
from giantdet.data.coco import CocoDataset, Objects
from giantdet.data.images import named
from giantdet.data.panoptic import VOID, PanopticMap, Segment, read_panoptic_png
from giantdet.data.reading import flag_of, with_integers
from giantdet.data.records import (
    Instances,
    category_fault,
    category_name,
    escapes,
    is_id,
    logger,
    read_instances,
)
from giantdet.data.segments import Fault
from giantdet.errors import DataError
from giantdet.structures import IGNORE

THINGS: Category = (0, "things")


@dataclass(frozen=True)
class SegmentObjects(Objects):
    """Objects whose masks are segments of a panoptic PNG, which is read when the first mask is needed."""

    dataset: CocoPanopticDataset
    i: int = 0

    @cached_property
    def _map(self) -> PanopticMap:
        return self.dataset.panoptic_map(self.i)

    def has_mask(self, n: int) -> bool:
        """Return True: each object is a segment."""
        return True

    def rle(self, n: int) -> dict[str, Any]:
        """Return object n's compressed RLE over the whole image. Raises DataError if the PNG lacks its id."""
        return self.dataset.segment_rle(self._map, int(self.ids_N[n]), self.i)


class CocoPanopticDataset(CocoDataset):
    """A COCO panoptic JSON with its PNG files and images.

    Args:
        annotations: COCO panoptic JSON.
        images: folder that the `file_name`s of the images are relative to.
        segments: folder of the PNG files.
        instances: COCO instances JSON of the objects of the same images; None: the segments of things.

    Records that cannot be used are skipped and counted as in `CocoDataset`. Raises `DataError` if the whole
    file cannot be used.
    """

    def __init__(
        self, annotations: str | Path, images: str | Path, segments: Path, instances: str | None = None
    ) -> None:
        content = read_instances(annotations, "panoptic")
        self.segments, self.instances_file = segments, instances
        things, stuff = read_categories(annotations, content)
        super().__init__(annotations, images, thing_content(content, things, instances))
        self.classes = Classes(objects=self.classes.objects, semantic=(THINGS, *stuff.items()))
        self.annotated = bool(content["annotations"])
        self.number = dict.fromkeys(things, 0) | {category: n for n, category in enumerate(stuff, 1)}
        self.skipped.clear()  # the objects' are reported
        self.warned = False
        self._pack(content["annotations"])
        self._report_skipped()
        if instances is None:
            self.has_masks, self.without_mask = len(self.labels_K) > 0, 0
            self._summary = replace(self._summary, without_mask=0)

    def _pack(self, records: list[Any]) -> None:
        """Keep the segments of each image in arrays, which forked workers share."""
        by_image: dict[int, Any] = {}
        known = set(self.image_ids.tolist())
        for record in records:
            if fault := annotation_fault(record, by_image, known):
                name = record.get("image_id") if isinstance(record, dict) else "?"
                self._skip(fault, "annotation of image", {"id": name})
            else:
                by_image[record["image_id"]] = record
        names: list[str] = []
        ids, categories, crowds, start = array("q"), array("q"), array("b"), array("q", [0])
        for image_id in self.image_ids.tolist():
            record = by_image.get(image_id)
            names.append(record["file_name"] if record else "")
            for segment in segments_of(record):
                if fault := segment_fault(segment, self.number):
                    self._skip(fault, f"image {image_id}, segment", segment)
                    continue
                ids.append(segment["id"])
                categories.append(segment["category_id"])
                crowds.append(is_crowd(segment) or 0)
            start.append(len(ids))
        self.segment_files = np.array(names)
        self.segment_ids, self.segment_categories = np.array(ids, np.int64), np.array(categories, np.int64)
        self.segment_crowds, self.segment_start = np.array(crowds, bool), np.array(start, np.int64)
        self._last: tuple[int, PanopticMap] | None = None

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

    def training_indices(self, filter_empty: bool) -> NDArray[np.int64]:
        """Return the indices of the images to train on: all, or those that have a segment."""
        return np.flatnonzero(np.diff(self.segment_start)) if filter_empty else np.arange(len(self))

    def objects(self, i: int) -> Objects:
        """Return the objects of image i."""
        found = super().objects(i)
        if self.instances_file is not None:
            return found
        return SegmentObjects(
            found.boxes_N4, found.labels_N, found.ids_N, found.size_hw, found.first, dataset=self, i=i
        )

    def ignored(self, i: int) -> list[dict[str, Any]]:
        """See `Dataset.ignored`; without a file of objects, those of the PNG file."""
        if self.instances_file is not None:
            return super().ignored(i)
        ids_HW, segments = self.panoptic_map(i)
        ids = [VOID, *(segment.id for segment in segments if segment.is_crowd)]
        mask_HW = np.isin(ids_HW, ids)
        return [mask_util.encode(np.asfortranarray(mask_HW.view(np.uint8)))] if mask_HW.any() else []

    def panoptic_map(self, i: int) -> PanopticMap:
        """See `Dataset.panoptic_map`. The last one is kept: a sample needs it for masks and for classes.

        Pixels of ids without a segment are void, and a warning names one.
        """
        if self._last is None or self._last[0] != i:
            self._last = i, self._read_map(i)
        return self._last[1]

    def _read_map(self, i: int) -> PanopticMap:
        rows = slice(int(self.segment_start[i]), int(self.segment_start[i + 1]))
        segments = [
            Segment(*values)
            for values in zip(
                self.segment_ids[rows].tolist(),
                self.segment_categories[rows].tolist(),
                self.segment_crowds[rows].tolist(),
                strict=True,
            )
        ]
        path = self.segments / str(self.segment_files[i])
        if not self.segment_files[i]:
            raise DataError(f"{self.annotations}: image {self.image_ids[i]} has no PNG file of segments")
        with named(path):
            ids_HW = read_panoptic_png(path)
        if ids_HW.shape != tuple(self.sizes_hw[i]):
            raise DataError(
                f"{path}: it has {ids_HW.shape} pixels, its image {tuple(self.sizes_hw[i].tolist())}"
            )
        ids = np.array(sorted([VOID, *(segment.id for segment in segments)]))
        unknown_HW = ids[np.searchsorted(ids, ids_HW).clip(max=len(ids) - 1)] != ids_HW
        if unknown_HW.any():
            if not self.warned:
                text = "%s: the id %d (%.1f%% of the pixels) belongs to no segment; such pixels are void"
                logger.warning(text, path, ids_HW[unknown_HW][0], 100 * unknown_HW.mean())
            self.warned = True
            ids_HW = np.where(unknown_HW, np.int32(VOID), ids_HW)
        return PanopticMap(ids_HW, segments)

    def semantic_map(self, i: int) -> NDArray[np.uint8]:
        """See `Dataset.semantic_map`; void pixels are `IGNORE`."""
        ids_HW, segments = self.panoptic_map(i)
        known = sorted(segments)
        numbers = np.array([IGNORE, *(self.number[segment.category] for segment in known)], np.uint8)
        found: NDArray[np.uint8] = numbers[np.searchsorted([VOID, *(s.id for s in known)], ids_HW)]
        return found

    def number_as(self, semantic: tuple[Category, ...]) -> None:
        """See `Dataset.number_as`."""
        for (category, _), number in zip(
            self.classes.stuff, positions(self.classes.stuff, semantic), strict=True
        ):
            self.number[category] = number

    def segment_rle(self, panoptic: PanopticMap, segment: int, i: int) -> dict[str, Any]:
        """Return the compressed RLE of a segment of image i. Raises DataError if it has no pixel."""
        mask_HW = panoptic.ids_HW == segment
        if not mask_HW.any():
            raise DataError(f"{self.segments / str(self.segment_files[i])}: no pixel has the id {segment}")
        rle: dict[str, Any] = mask_util.encode(np.asfortranarray(mask_HW.view(np.uint8)))
        return rle

    def instances(self) -> Instances:
        """See `Dataset.instances`; without a file of objects, their masks are read from all PNG files.

        Objects whose mask cannot be read are crowds, which are neither found nor missed.
        """
        content = read_instances(self.annotations, "panoptic")
        records = [
            _without_super(record) for record in content["categories"] if self.number.get(_id(record)) == 0
        ]
        return {"images": content["images"], "categories": records, "annotations": self._annotations(content)}

    def _annotations(self, content: Instances) -> list[dict[str, Any]]:
        if self.instances_file is not None:
            return _read_objects(self.instances_file)
        index = {image_id: i for i, image_id in enumerate(self.image_ids.tolist())}
        maps: dict[int, PanopticMap] = {}
        annotations = _object_records(content, {c for c, number in self.number.items() if number == 0})
        broken: set[int] = set()
        for record in annotations:
            i = index.get(record["image_id"])
            if i is None:
                continue
            try:
                if i not in maps and i not in broken:
                    maps = {i: self.panoptic_map(i)}  # records of an image follow each other
                if i in maps:
                    rle = self.segment_rle(maps[i], record["id"], i)
                    record["segmentation"] = {**rle, "counts": rle["counts"].decode("ascii")}
                    continue
            except DataError as error:
                logger.warning("not scored: %s", error)
                broken |= {i} - maps.keys()
            record["iscrowd"] = 1
        return annotations


def _id(record: Any) -> Any:
    """Return the id of a record, or None if it has none that can be used."""
    found = record.get("id") if isinstance(record, dict) else None
    return found if is_id(found) else None


def _without_super(category: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in category.items() if key != "supercategory"}


def read_categories(annotations: str | Path, content: Instances) -> tuple[dict[int, str], dict[int, str]]:
    """Return the names of things and of stuff by id, in the order of ids. Without `isthing` it is a thing.

    Raises DataError without things, and for more classes of stuff than a map can have.
    """
    things: dict[int, str] = {}
    stuff: dict[int, str] = {}
    for record in content["categories"]:
        if not category_fault(record, things | stuff):
            (stuff if record.get("isthing", 1) == 0 else things)[record["id"]] = category_name(record)
    if not things:
        raise DataError(f"annotations {annotations} have no category with isthing 1")
    if len(stuff) >= IGNORE:
        raise DataError(
            f"annotations {annotations}: {len(stuff)} categories of stuff, at most 254 are possible"
        )
    return dict(sorted(things.items())), dict(sorted(stuff.items()))


def thing_content(content: Instances, things: Container[int], instances: str | None) -> Instances:
    """Return the lists of an instances JSON of the things: from a file of them, or from their segments.

    The categories are those of the panoptic JSON, so that objects and segments agree on their ids. They have
    no supercategories: a class of the PNG files stays one without objects, too.
    """
    objects = _object_records(content, things) if instances is None else _read_objects(instances)
    records = [_without_super(record) for record in content["categories"] if _id(record) in things]
    return {"images": content["images"], "categories": records, "annotations": objects}


def annotation_fault(record: Any, seen: Container[int], images: Container[int] | None = None) -> Fault | None:
    """Return why the annotation of an image cannot be used, or None.

    `seen` are the images of earlier annotations, `images` those that can be used, if they are known.
    """
    if not isinstance(record, dict) or not is_id(record.get("image_id")):
        return "bad annotation", f"{str(record)[:80]} has no image_id that is an integer of at least 0"
    if record["image_id"] in seen:
        return "duplicate annotation", "an earlier annotation is of the same image"
    if not isinstance(record.get("segments_info"), list):
        return (
            "no segments_info",
            f"segments_info must be a list, got {str(record.get('segments_info'))[:80]}",
        )
    name = record.get("file_name")
    if not isinstance(name, str) or not name or escapes(name):
        return "bad file name", f"file_name of the PNG file of segments is {str(name)[:80]!r}"
    if images is not None and record["image_id"] not in images:
        return "unknown image", "its image_id is not among the usable images"
    return None


def segments_of(record: Any) -> list[dict[str, Any]]:
    """Return the segments of an annotation; those that are no JSON objects are empty ones."""
    found = record.get("segments_info") if isinstance(record, dict) else None
    segments = found if isinstance(found, list) else []
    return [with_integers(s, "id", "category_id") if isinstance(s, dict) else {} for s in segments]


def is_crowd(segment: dict[str, Any]) -> int | None:
    """Return 1 for a crowd region, 0 for others, and None if that is not certain."""
    return flag_of(segment.get("iscrowd") or 0)


def segment_fault(segment: dict[str, Any], categories: Container[int]) -> Fault | None:
    """Return why a segment cannot be used, or None."""
    category = segment.get("category_id")
    if _id(segment) and is_id(category) and category in categories and is_crowd(segment) is not None:
        return None
    return "bad segment", "it needs an id above 0, a category of the file, iscrowd 0 or 1"


def _object_records(content: Instances, things: Container[int]) -> list[dict[str, Any]]:
    """Return the segments of things as annotations of an instances JSON, without masks."""
    found: list[dict[str, Any]] = []
    seen: set[int] = set()
    for record in content["annotations"]:
        if annotation_fault(record, seen) is None:
            seen.add(record["image_id"])
            for segment in segments_of(record):
                category = segment.get("category_id")
                if is_id(category) and category in things:
                    fields = {key: value for key, value in segment.items() if key != "segmentation"}
                    found.append(fields | {"image_id": record["image_id"]})
    return found


def _read_objects(instances: str) -> list[dict[str, Any]]:
    return list(read_instances(instances)["annotations"])
