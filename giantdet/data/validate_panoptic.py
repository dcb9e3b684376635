"""Report what is wrong with a COCO panoptic data set, by its records and pixels; see `validate.py`."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from giantdet.config.datasets import CocoPanopticDatasetConfig
from giantdet.data.coco_panoptic import (
    annotation_fault,
    is_crowd,
    read_categories,
    segment_fault,
    segments_of,
    thing_content,
)
from giantdet.data.images import named
from giantdet.data.near_files import hint
from giantdet.data.panoptic import VOID, read_panoptic_png
from giantdet.data.reading import read_records
from giantdet.data.records import Instances, category_fault, read_instances
from giantdet.data.segments import Size
from giantdet.data.summary import summarize
from giantdet.data.validate import (
    Problem,
    Report,
    class_problems,
    file_problems,
    found_problems,
    name_problems,
    object_problems,
    problem_of,
)
from giantdet.errors import DataError


def check_coco_panoptic(section: CocoPanopticDatasetConfig) -> Report:
    """Return the report of a COCO panoptic data set. All images and PNG files of segments are decoded.

    Raises `DataError` if a JSON cannot be used as a whole.
    """
    content = read_instances(section.annotations, "panoptic")
    things, stuff = read_categories(section.annotations, content)
    file = section.annotations if section.instances is None else section.instances
    records = read_records(file, thing_content(content, things, section.instances), keep_findings=True)
    # Those of things alone; `_category_problems` has all.
    records.findings = [finding for finding in records.findings or () if finding.what != "category"]
    problems = [
        *_category_problems(content),
        *name_problems((things | stuff).items(), "category"),
        *found_problems(records),
        *(p for record in records.images.values() for p in file_problems(record, Path(section.images))),
    ]
    if section.instances is not None:
        problems += object_problems(records)
    problems += class_problems(records)
    known: dict[int, Any] = {}
    for record in content["annotations"]:
        if fault := annotation_fault(record, known, records.images):
            name = record.get("image_id") if isinstance(record, dict) else None
            problems.append(problem_of(fault, "annotation of image", name))
        else:
            known[record["image_id"]] = record
    maps = _Maps(section, things, stuff)
    for image_id, size in records.sizes.items():
        problems += maps.problems(image_id, known.get(image_id), size)
    summary = summarize(records)
    if section.instances is None:  # each object is a segment, and so has a mask
        summary = replace(summary, without_mask=0)
    return Report(summary, problems)


def _category_problems(content: Instances) -> Iterator[Problem]:
    """Yield the categories that cannot be used."""
    seen: set[int] = set()
    for record in content["categories"]:
        if fault := category_fault(record, seen):
            yield problem_of(fault, "category", record.get("id") if isinstance(record, dict) else None)
        else:
            seen.add(record["id"])


class _Maps:
    """Checks the segments of one image after the other against the pixels of their PNG files."""

    def __init__(
        self, section: CocoPanopticDatasetConfig, things: dict[int, str], stuff: dict[int, str]
    ) -> None:
        self.folder, self.categories = section.segments_folder, things | stuff
        # Training reads the masks of these from the PNG files.
        self.masked = things if section.instances is None else {}
        self.files: dict[str, int] = {}

    def problems(self, image_id: int, record: Any, size: Size) -> Iterator[Problem]:
        """Yield the problems of an image's annotation, None if it has none, and of its PNG file."""
        if record is None:
            fault = ("no annotation", "no usable annotation has its segments")
            yield problem_of(fault, "image", image_id, "warning")
            return
        ids: dict[int, bool] = {}
        written: set[Any] = set()
        for segment in segments_of(record):
            name = segment.get("id")
            where = f"image {image_id}, segment"
            if type(name) is int and name in written:
                fault = ("duplicate segment id", "an earlier segment of the image has the same id")
                yield problem_of(fault, where, name, "warning")
            if type(name) is int:
                written.add(name)
            if fault_of := segment_fault(segment, self.categories):
                yield problem_of(fault_of, where, name)
            else:
                ids[segment["id"]] = segment["category_id"] in self.masked and not is_crowd(segment)
        file = record["file_name"]
        if file in self.files:
            fault = ("duplicate segments file", f"{file} is that of image {self.files[file]} too")
            yield problem_of(fault, "image", image_id, "warning")
        self.files.setdefault(file, image_id)
        yield from self._pixel_problems(image_id, self.folder / file, size, ids, written)

    def _pixel_problems(
        self, image_id: int, path: Path, size: Size, ids: dict[int, bool], written: set[Any]
    ) -> Iterator[Problem]:
        """Yield the problems of a PNG file.

        `ids` are those of usable segments, and whether training needs their masks; `written` are all.
        """
        try:
            with named(path):
                ids_HW = read_panoptic_png(path)
        except DataError as error:
            missing = not os.path.exists(path)
            kind = "missing segments file" if missing else "unreadable segments file"
            text = f"{error}{hint(self.folder, path) if missing else ''}"
            yield problem_of((kind, text), "image", image_id)
            return
        if ids_HW.shape != size:
            text = f"{path} is {ids_HW.shape[1]} x {ids_HW.shape[0]}, its image {size[1]} x {size[0]}"
            yield problem_of(("segments of another size", text), "image", image_id)
            return
        found = dict(zip(*(array.tolist() for array in np.unique(ids_HW, return_counts=True)), strict=True))
        unknown = sorted(set(found) - written - {VOID})
        if unknown:
            pixels = sum(found[number] for number in unknown)
            text = f"{path}: {pixels} pixels have ids of no segment, e.g. {unknown[0]}; they are void"
            yield problem_of(("id without a segment", text), "image", image_id, "warning")
        for number, is_needed in ids.items():
            if number not in found:
                text = f"no pixel of {path} has its id"
                where = f"image {image_id}, segment"
                level: Any = "error" if is_needed else "warning"
                yield problem_of(("segment without a pixel", text), where, number, level)
