"""The usable records of a COCO instances JSON, as training, evaluation and `validate-data` see them.

Each record is read as it is meant where that is certain: an `iscrowd` of "0", a box that is missing beside a
polygon, a file name that is only in `coco_url`. What cannot be used is left out. Both are counted by kind, so
that nothing changes silently. A record without faults is passed on as it is.
"""

from __future__ import annotations

import math
import urllib.parse
from collections import Counter
from collections.abc import Container, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from giantdet.data.records import (
    Instances,
    category_fault,
    category_name,
    image_fault,
    logger,
    object_fault,
)
from giantdet.data.segments import Fault, Size, segment, segment_box, whole
from giantdet.errors import DataError

_FLAGS = {"0": 0, "false": 0, "no": 0, "": 0, "1": 1, "true": 1, "yes": 1}
_SLACK = 1.0  # pixels a box may extend beyond the image because of rounding
_ROOT_OF = ("none", "", None)  # supercategories of an exporter's root category


class Finding(NamedTuple):
    """A finding in a record, which is left out because of it or used, but not as it is written."""

    kind: str
    text: str
    what: str
    name: Any
    left_out: bool


@dataclass
class Records:
    """The usable records by id, and what was found in the others."""

    file: str | Path
    categories: dict[int, str] = field(default_factory=dict)
    images: dict[int, dict[str, Any]] = field(default_factory=dict)
    annotations: list[dict[str, Any]] = field(default_factory=list)
    """Integer ids, a box, `iscrowd` and `ignore` of 0 or 1 or missing, and a `segmentation` that is an RLE, a
    list of polygons, or empty."""
    skipped: Counter[str] = field(default_factory=Counter)
    """Number of records that were left out, by kind."""
    noted: Counter[str] = field(default_factory=Counter)
    """Number of records that were used, but not as they are written, by kind."""
    findings: list[Finding] | None = None
    """All findings, if they are wanted."""
    examples: dict[str, str] = field(default_factory=dict)

    @property
    def sizes(self) -> dict[int, Size]:
        """Height and width of the images, by id."""
        return {number: (record["height"], record["width"]) for number, record in self.images.items()}

    def found(self, fault: Fault, what: str, record: Any, left_out: bool) -> None:
        """Count a fault of a record."""
        name = record.get("id") if isinstance(record, dict) else None
        (self.skipped if left_out else self.noted)[fault[0]] += 1
        self.examples.setdefault(fault[0], f"{what} {'?' if name is None else name}: {fault[1]}")
        if self.findings is not None:
            self.findings.append(Finding(*fault, what, name, left_out))

    def warn(self) -> None:
        """Name each kind in a warning."""
        for kind, count in self.skipped.items():
            logger.warning("%s: skipped %d (%s), e.g. %s", self.file, count, kind, self.examples[kind])
        for kind, count in self.noted.items():
            logger.warning(
                "%s: used %d, not as written (%s), e.g. %s", self.file, count, kind, self.examples[kind]
            )


def read_records(file: str | Path, content: Instances, keep_findings: bool = False) -> Records:
    """Return the usable records of a file's lists. Raises `DataError` if its boxes are not in COCO's form."""
    records = Records(file, findings=[] if keep_findings else None)
    for record in content["categories"]:
        record = with_integers(record, "id")
        if fault := category_fault(record, records.categories):
            records.found(fault, "category", record, left_out=True)
        else:
            records.categories[record["id"]] = category_name(record)
    for record in content["images"]:
        record, note = _read_image(record)
        if fault := image_fault(record, records.images):
            records.found(fault, "image", record, left_out=True)
            continue
        records.images[record["id"]] = record
        if note:
            records.found(note, "image", record, left_out=False)
    sizes = records.sizes
    for record in content.get("annotations", []):  # a list of images has none
        record, fault, notes = _read_annotation(record, sizes, records.categories)
        if fault:
            records.found(fault, "annotation", record, left_out=True)
        else:
            records.annotations.append(record)
        for note in notes:
            records.found(note, "annotation", record, left_out=False)
    _check_boxes(records, sizes)
    _drop_root(records, content["categories"])
    return records


def with_integers(record: Any, *keys: str) -> Any:
    """Return the record with integers for floats of integral values."""
    if not isinstance(record, dict):
        return record
    changed = {key: whole(record[key]) for key in keys if type(record.get(key)) is float}
    return record | changed if changed else record


def _read_image(record: Any) -> tuple[Any, Fault | None]:
    """Return an image's record with its file name, and where that was found if not in `file_name`."""
    record = with_integers(record, "id", "height", "width")
    if not isinstance(record, dict):
        return record, None
    for key in ("file_name", "coco_url", "url", "filename"):
        value = record.get(key)
        if isinstance(value, str) and value:
            break
    else:
        return record, None
    if value.startswith(("http://", "https://")):
        name = urllib.parse.unquote(urllib.parse.urlsplit(value).path).rsplit("/", 1)[-1]
        return record | {"file_name": name}, ("file name from a URL", f"{key} {value!r} is read as {name!r}")
    if key == "file_name":
        return record, None
    return record | {"file_name": value}, ("file name from another key", f"{key} is {value!r}")


def _read_annotation(
    record: Any, sizes: Mapping[int, Size], categories: Container[int]
) -> tuple[Any, Fault | None, list[Fault]]:
    """Return the annotation as it is meant, why it must be left out or None, and what is not as written."""
    record = with_integers(record, "id", "image_id", "category_id")
    notes: list[Fault] = []
    usable: Any = []
    size = None
    if isinstance(record, dict):
        try:
            size = sizes.get(record.get("image_id", -1))
        except TypeError:  # a list for an id
            size = None
    if size is not None:
        usable, notes = segment(record.get("segmentation"), size)
        if record.get("bbox") in (None, []) and usable:
            record = record | {"bbox": segment_box(usable, size)}
            notes.append(("no box", f"its box {record['bbox']} is that of its mask"))
    if fault := object_fault(record, sizes, categories):
        return record, fault, []
    flags: dict[str, int] = {}
    for key in ("iscrowd", "ignore"):
        value = record.get(key)
        if value is None or (type(value) is int and value in (0, 1)):
            continue
        flag = flag_of(value)
        if flag is None:
            return record, (f"bad {key}", f"{key} is {str(value)[:80]!r}; it is 0 or 1"), []
        flags[key] = flag
        if isinstance(value, str):
            notes.append((f"{key} as text", f"{key} {value!r} is read as {flag}"))
    if flags or usable != record.get("segmentation", usable):
        record = record | flags | {"segmentation": usable}
    return record, None, notes


def flag_of(value: Any) -> int | None:
    """Return a flag of any notation as 0 or 1, or None if its meaning is not certain."""
    if isinstance(value, str):
        return _FLAGS.get(value.strip().lower())
    return int(value) if isinstance(value, bool | int | float) and value in (0, 1) else None


def _check_boxes(records: Records, sizes: Mapping[int, Size]) -> None:
    """Raise `DataError` if all boxes are relative to the image or corners; count those that may be."""
    count = len(records.annotations)
    forms = [_box_form(record, sizes[record["image_id"]]) for record in records.annotations]
    relative = [n for n, form in enumerate(forms) if form.relative]
    if count and len(relative) == count:
        raise DataError(
            f"{records.file}: all {count} boxes lie in 0 to 1, so they are relative to the image's size. "
            "COCO's boxes are in pixels: multiply x and width by the image's width, y and height by its "
            "height"
        )
    for n in relative:
        text = f"bbox {records.annotations[n]['bbox']} lies in 0 to 1; COCO's boxes are in pixels"
        records.found(("box in 0 to 1", text), "annotation", records.annotations[n], left_out=False)
    only_corners = [n for n, form in enumerate(forms) if form.only_corners]
    all_can_be = all(form.corners for form in forms)
    if count >= 3 and all_can_be and len(only_corners) > count / 2:
        example = records.annotations[only_corners[0]]
        raise DataError(
            f"{records.file}: the {count} boxes are corners x1, y1, x2, y2, e.g. {example['bbox']} in "
            f"annotation {example.get('id')}. COCO's boxes are x, y, width, height: subtract x1 "
            "from x2 and y1 from y2"
        )
    likely = len(only_corners) > count / 2 or (all_can_be and len(only_corners) > count / 10)
    for n in only_corners if likely else ():
        box = records.annotations[n]["bbox"]
        text = f"bbox {box} fits the image as corners x1, y1, x2, y2, and not as x, y, width, height"
        records.found(("box of corners?", text), "annotation", records.annotations[n], left_out=False)


class _BoxForm(NamedTuple):
    """In which other forms than x, y, width, height in pixels a box may be written."""

    relative: bool
    corners: bool
    only_corners: bool
    """True if the box does not fit the image or its `area` as x, y, width, height."""


def _box_form(record: Mapping[str, Any], size: Size) -> _BoxForm:
    x, y, w, h = record["bbox"]
    height, width = size
    relative = x >= 0 and y >= 0 and x + w <= 1.001 and y + h <= 1.001 and min(height, width) > 2
    corners = 0 <= x < w <= width + _SLACK and 0 <= y < h <= height + _SLACK
    leaves = x + w > width + _SLACK or y + h > height + _SLACK
    area = record.get("area")
    # The mask's area is smaller than both, unless the object is a rectangle.
    measured = isinstance(area, int | float) and (x > 0 or y > 0)
    of_corners = measured and math.isclose(area or 0, (w - x) * (h - y), rel_tol=1e-3)
    return _BoxForm(relative, corners, corners and (leaves or of_corners))


def _drop_root(records: Records, categories: list[Any]) -> None:
    """Leave out the category that an exporter adds above the others: all name it as their supercategory.

    It must have no object and no supercategory of its own, so that it cannot be a class.
    """
    given = {whole(c["id"]): c for c in reversed(categories) if isinstance(c, dict) and _known(c, records)}
    used = {record["category_id"] for record in records.annotations}
    for number, record in given.items():
        others = [other.get("supercategory") for key, other in given.items() if key != number]
        is_root = bool(others) and all(name == record.get("name") for name in others)
        if is_root and record.get("name") and number not in used and record.get("supercategory") in _ROOT_OF:
            del records.categories[number]
            text = f"{record['name']!r} has no object and is above all other categories; it is not a class"
            records.found(("root category", text), "category", record, left_out=False)
            return


def _known(category: dict[str, Any], records: Records) -> bool:
    number = whole(category.get("id"))
    return type(number) is int and number in records.categories
