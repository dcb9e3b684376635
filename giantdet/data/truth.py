"""The ground truth of an evaluation: the records of a COCO instances JSON that pycocotools can use.

pycocotools does not check a file: a record without an id, area or box ends the process after hours of
training, and an RLE that does not add up makes it hang. So this module takes the records of `reading.py`, as
`CocoDataset` does, and fills in what is missing. For a file without faults the scores are those of
pycocotools.
"""

from __future__ import annotations

import contextlib
import io
from pathlib import Path
from typing import Any

from pycocotools import mask as mask_util
from pycocotools.coco import COCO

from giantdet.data.reading import read_records
from giantdet.data.records import Instances, is_number, logger, read_instances
from giantdet.data.segments import Size

NEUTRAL = "giantdet_neutral"
"""Key of objects that are neither found nor missed: pycocotools itself overwrites their `ignore`."""
BOX_ONLY = "giantdet_box_only"
"""Key of objects without a mask, whose `segmentation` is their box."""


def ground_truth(annotations: str | Path, content: Instances | None = None) -> COCO:
    """Return the usable images, categories and annotations of a file, including crowd regions.

    `content` are the lists of the file; None: they are read from it.

    Annotations are renumbered from 1, as pycocotools keeps only the last annotation with an id and treats id
    0 as none; a missing `area` is computed from the mask or box, a missing segmentation is the box. Objects
    to ignore have the key `NEUTRAL`, those without a mask `BOX_ONLY`. Categories of the same name get their
    ids appended. A warning counts what is left out. Raises `DataError`.
    """
    content = read_instances(annotations) if content is None else content
    records = read_records(annotations, content)
    categories: dict[int, str] = {}
    for number, name in records.categories.items():
        categories[number] = f"{name} ({number})" if name in categories.values() else name
    sizes = records.sizes
    usable = [
        _complete(record, sizes[record["image_id"]], number)
        for number, record in enumerate(records.annotations, 1)
    ]
    if left_out := len(content["annotations"]) - len(usable):
        kinds = ", ".join(f"{kind} {count}" for kind, count in records.skipped.items())
        logger.warning("%s: evaluated without %d annotations (%s)", annotations, left_out, kinds)
    truth = COCO()
    truth.dataset = {
        "images": list(records.images.values()),
        "annotations": usable,
        "categories": [{"id": number, "name": name} for number, name in categories.items()],
    }
    with contextlib.redirect_stdout(io.StringIO()):
        truth.createIndex()
    return truth


def _complete(record: dict[str, Any], size: Size, number: int) -> dict[str, Any]:
    """Return the annotation with all fields pycocotools needs and id `number`."""
    mask = record.get("segmentation") or []
    x, y, w, h = record["bbox"]
    if isinstance(mask, dict) and isinstance(mask["counts"], list):
        mask = mask_util.frPyObjects(mask, *size)
    area = record.get("area")
    if not is_number(area):
        rle = mask_util.merge(mask_util.frPyObjects(mask, *size)) if isinstance(mask, list) and mask else mask
        area = float(mask_util.area(rle)) if rle else w * h
    filled_in = {"id": number, "area": area, "iscrowd": int(record.get("iscrowd") or 0)}
    if record.get("ignore"):
        filled_in[NEUTRAL] = 1
    if not mask:
        filled_in[BOX_ONLY] = 1
    box = [[x, y, x + w, y, x + w, y + h, x, y + h]]
    return record | filled_in | {"segmentation": mask or box}
