"""The ground truth of an evaluation: the records of a COCO instances JSON that pycocotools can use.

pycocotools does not check a file: a record without an id, area or box ends the process after hours of
training, and an RLE that does not add up makes it hang. So this module leaves out what `CocoDataset` skips,
and fills in what is missing. For a file without faults the scores are those of pycocotools.
"""

from __future__ import annotations

import contextlib
import io
from collections import Counter
from pathlib import Path
from typing import Any

from pycocotools import mask as mask_util
from pycocotools.coco import COCO

from giantdet.data.masks import adds_up, rle_counts
from giantdet.data.records import (
    Fault,
    Instances,
    Size,
    category_fault,
    category_name,
    image_fault,
    is_number,
    logger,
    object_fault,
    read_instances,
    segment,
)


def ground_truth(annotations: str | Path, content: Instances | None = None) -> COCO:
    """Return the usable images, categories and annotations of a file, including crowd regions.

    `content` are the lists of the file; None: they are read from it.

    Annotations are renumbered from 1, as pycocotools keeps only the last annotation of an id and treats id 0
    as none; a missing `area` is computed from the mask or box, a missing segmentation is the box. Categories
    of the same name get their ids appended. A warning counts what is left out. Raises `DataError`.
    """
    content = read_instances(annotations) if content is None else content
    categories: dict[int, str] = {}
    for record in content["categories"]:
        if not category_fault(record, categories):
            name = category_name(record)
            categories[record["id"]] = f"{name} ({record['id']})" if name in categories.values() else name
    images: dict[int, dict[str, Any]] = {}
    sizes: dict[int, Size] = {}
    for record in content["images"]:
        if not image_fault(record, images):
            images[record["id"]] = record
            sizes[record["id"]] = record["height"], record["width"]
    usable: list[dict[str, Any]] = []
    left_out: Counter[str] = Counter()
    for record in content["annotations"]:
        fault = object_fault(record, sizes, categories)
        if fault is None:
            record, fault = _complete(record, sizes[record["image_id"]], len(usable) + 1)
        if fault:
            left_out[fault[0]] += 1
        else:
            usable.append(record)
    if left_out:
        kinds = ", ".join(f"{kind} {count}" for kind, count in left_out.items())
        logger.warning("%s: evaluated without %d annotations (%s)", annotations, left_out.total(), kinds)
    truth = COCO()
    truth.dataset = {
        "images": list(images.values()),
        "annotations": usable,
        "categories": [{"id": number, "name": name} for number, name in categories.items()],
    }
    with contextlib.redirect_stdout(io.StringIO()):
        truth.createIndex()
    return truth


def _complete(record: dict[str, Any], size: Size, number: int) -> tuple[dict[str, Any], Fault | None]:
    """Return the annotation with all fields pycocotools needs and id `number`, and a fault or None."""
    mask, faults = segment(record.get("segmentation"), size)
    if mask is None:
        return record, faults[0]
    x, y, w, h = record["bbox"]
    if isinstance(mask, dict):
        if not isinstance(mask["counts"], str):
            mask = mask_util.frPyObjects(mask, *size)
        elif not adds_up(rle_counts(mask["counts"].encode()), size):
            return record, ("bad RLE", f"RLE counts do not add up to {size[0]} x {size[1]} pixels")
    area = record.get("area")
    if not is_number(area):
        rle = mask_util.merge(mask_util.frPyObjects(mask, *size)) if isinstance(mask, list) and mask else mask
        area = float(mask_util.area(rle)) if rle else w * h
    filled_in = {"id": number, "area": area, "iscrowd": int(bool(record.get("iscrowd")))}
    box = [[x, y, x + w, y, x + w, y + h, x, y + h]]
    return record | filled_in | {"segmentation": mask or box}, None
