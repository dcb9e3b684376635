"""LVIS annotations (Gupta et al. 2019), whose images are annotated for some of their categories only.

The JSON is COCO's instances JSON with two lists of category ids in each image and a `frequency` in each
category. An image is named by `coco_url` alone; its file name keeps the folder of COCO's split, since the
images of LVIS's splits are from train2017 and val2017 both.

Format: https://www.lvisdataset.org/dataset, and the authors' lvis-api 0.5.3.
"""

from __future__ import annotations

import urllib.parse
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

from giantdet.config.datasets import LvisDatasetConfig
from giantdet.data.coco import CocoDataset
from giantdet.data.records import Instances, read_instances
from giantdet.data.validate import Report, check_instances
from giantdet.errors import DataError

NEGATIVE, NOT_EXHAUSTIVE = "neg_category_ids", "not_exhaustive_category_ids"
"""Lists of an image: the categories that it has no object of, and those of which some are not annotated."""
FREQUENCIES = ("r", "c", "f")
"""Values of a category's `frequency`: rare (in 1 to 10 training images), common (to 100), frequent."""


class LvisDataset(CocoDataset):
    """An LVIS JSON, and the folder that has COCO's train2017 and val2017. See `CocoDataset`."""

    protocol: ClassVar[str] = "lvis"

    def instances(self) -> Instances:
        """See `Dataset.instances`. Raises DataError for a file without LVIS's lists and frequencies."""
        return read_lvis(self.annotations)


def read_lvis(file: str | Path) -> Instances:
    """Return the lists of an LVIS JSON, with file names. Raises DataError where a key of LVIS is missing."""
    content = read_instances(file, "LVIS instances", images_only=True)
    if "annotations" in content:
        for record in content["images"]:
            for key in (NEGATIVE, NOT_EXHAUSTIVE):
                if isinstance(record, dict) and not _is_list_of_ids(record.get(key)):
                    raise _not_lvis(file, f"image {record.get('id')} has no list {key} of category ids")
        for record in content["categories"]:
            if isinstance(record, dict) and record.get("frequency") not in FREQUENCIES:
                raise _not_lvis(file, f'category {record.get("id")} has no frequency of "r", "c" or "f"')
    return {**content, "images": [_with_name(record) for record in content["images"]]}


def frequencies_of(content: Instances) -> dict[int, str]:
    """Return the frequency of each category by its id; of an id that occurs twice the first counts."""
    records = [r for r in reversed(content["categories"]) if isinstance(r, dict)]
    return {r["id"]: r["frequency"] for r in records if isinstance(r.get("id"), int | float)}


def check_lvis(section: LvisDatasetConfig) -> Report:
    """Return the report of an LVIS JSON. Raises `DataError` if it cannot be used as a whole."""
    return check_instances(section.annotations, section.images, read_lvis(section.annotations))


def _not_lvis(file: str | Path, what: str) -> DataError:
    return DataError(f'{file}: {what}, so it is not in LVIS\'s format; "format": "coco" reads COCO\'s')


def _is_list_of_ids(value: Any) -> bool:
    return isinstance(value, list) and all(type(number) is int for number in value)


def _with_name(record: Any) -> Any:
    """Return an image's record; without a `file_name` it gets the last folder and the name of its URL."""
    url = record.get("coco_url") if isinstance(record, Mapping) else None
    if not isinstance(url, str) or record.get("file_name"):
        return record
    path = urllib.parse.unquote(urllib.parse.urlsplit(url).path)
    return {**record, "file_name": "/".join(path.strip("/").split("/")[-2:])}
