"""Report what is wrong with a data set, record by record, before a long run. Changes no files.

Records with an error are left out; those with a warning or an info are used. Not checked: whether `area` is
that of the mask, and whether labels are correct.

This file has what the checks of all formats share, and the check of COCO instances. The others are in
`validate_panoptic.py` and `validate_semantic.py`; the table `CHECKS` in `dataset.py` has all.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
from PIL import Image
from pycocotools import mask as mask_util

from giantdet.config.datasets import CocoDatasetConfig
from giantdet.data.images import has_frames, orient
from giantdet.data.near_files import hint
from giantdet.data.pixels import to_rgb
from giantdet.data.reading import Records, read_records
from giantdet.data.records import Instances, is_number, read_instances
from giantdet.data.segments import Fault, Size
from giantdet.data.summary import Summary, summarize
from giantdet.errors import DataError

_OVERHANG = 1.0  # pixels a box may extend beyond the image because of rounding
_TWICE_IOU = 0.85  # of the boxes of two objects of one class
_BOX_MASK_SLACK = 2.0  # allowed pixels between the sides of a box and of its mask


Level = Literal["error", "warning", "info"]


class Problem(NamedTuple):
    """One problem. `id` is that of the image, annotation or category that the text names, or None."""

    kind: str
    id: Any
    text: str
    level: Level = "error"

    @property
    def is_error(self) -> bool:
        return self.level == "error"


class Report(NamedTuple):
    """The summary of a data set, and its problems."""

    summary: Summary
    problems: list[Problem]

    @property
    def has_errors(self) -> bool:
        """Whether any problem is an error."""
        return any(problem.is_error for problem in self.problems)


def validate(annotations: str | Path, images: str | Path) -> list[Problem]:
    """Return all problems of a COCO instances JSON and its image folder. All images are decoded.

    Raises `DataError` if the JSON as a whole cannot be used.
    """
    return check_coco(CocoDatasetConfig(annotations=str(annotations), images=str(images))).problems


def check_coco(section: CocoDatasetConfig) -> Report:
    """Return the report of a COCO instances JSON. Raises `DataError` if it cannot be used as a whole."""
    content = read_instances(section.annotations, images_only=True)
    return check_instances(section.annotations, section.images, content)


def check_instances(annotations: str, images: str, content: Instances) -> Report:
    """Return the report of the lists of a COCO instances JSON. Raises `DataError` as above."""
    records = read_records(annotations, content, keep_findings=True)
    problems = [
        *found_problems(records),
        *name_problems(records.categories.items(), "category"),
        *(p for record in records.images.values() for p in file_problems(record, Path(images))),
    ]
    if "annotations" in content:
        problems += [*object_problems(records), *twice_problems(records), *class_problems(records)]
    else:
        text = 'there is no list "annotations"; a list of images can be evaluated, but not trained on'
        problems.append(Problem("no annotations", None, text, "warning"))
    return Report(summarize(records), problems)


def format_report(problems: list[Problem], examples: int = 5) -> str:
    """Return the kinds with their counts, errors first, each with its first `examples` records."""
    if not problems:
        return "no problems found"
    order = {"error": 0, "warning": 1, "info": 2}
    kinds = Counter((p.level, p.kind) for p in problems)
    lines = []
    for (level, kind), count in sorted(kinds.items(), key=lambda item: (order[item[0][0]], item[0][1])):
        lines.append(f"{level}: {kind}: {count}")
        texts = [p.text for p in problems if (p.level, p.kind) == (level, kind)]
        lines += [f"    {text}" for text in texts[:examples]]
        if count > examples:
            lines.append(f"    ... and {count - examples} more")
    return "\n".join(lines)


def found_problems(records: Records) -> Iterator[Problem]:
    """Yield what reading has found, of records that were read with their findings."""
    for finding in records.findings or ():
        level: Level = "error" if finding.left_out else "warning"
        text = f"{finding.what} {finding.name}: {finding.text}"
        yield Problem(finding.kind, finding.name, text, level)


def name_problems(categories: Iterable[tuple[int, str]], what: str) -> Iterator[Problem]:
    """Yield the names that an earlier category has too; `what` is "category" or another word for it."""
    names: set[str] = set()
    for number, name in categories:
        if name in names:
            fault = (f"duplicate {what} name", f"an earlier {what} has the name {name!r}, too")
            yield problem_of(fault, what, number, "warning")
        names.add(name)


def class_problems(records: Records) -> Iterator[Problem]:
    """Yield the problems of whole classes, whole images or the whole file, for a file with objects."""
    crowds = sum(bool(record.get("iscrowd")) for record in records.annotations)
    if crowds and crowds == len(records.annotations):
        text = f"all {crowds} annotations are crowd regions; if they are objects, set iscrowd to 0"
        yield Problem("only crowds", None, text, "warning")
    objects = [r for r in records.annotations if not r.get("iscrowd") and not r.get("ignore")]
    bare = sum(not record.get("segmentation") for record in objects)
    if 0 < bare < len(objects):
        text = f"{bare} of {len(objects)} objects have no mask; they are trained and scored as boxes only"
        yield Problem("objects without a mask", None, text, "warning")
    used = {record["category_id"] for record in records.annotations}
    for number, name in records.categories.items():
        if used and number not in used:
            text = f"category {number}: no annotation has the class {name!r}"
            yield Problem("class without objects", number, text, "info")
    with_objects = {record["image_id"] for record in records.annotations}
    for image_id in records.images:
        if image_id not in with_objects:
            yield problem_of(("no objects", "it has no usable object"), "image", image_id, "info")


def problem_of(fault: Fault, what: str, name: Any, level: Level = "error") -> Problem:
    """Return a fault of the image, annotation or category of this name or id as a problem."""
    return Problem(fault[0], name, f"{what} {name}: {fault[1]}", level)


def file_problems(record: dict[str, Any], folder: Path) -> Iterator[Problem]:
    """Yield the problems of an image file, which is decoded.

    `record` is that of a COCO JSON. Without `height` and `width` any size is right.
    """
    path = folder / record["file_name"]

    def found(kind: str, text: str, level: Level = "error") -> Problem:
        return problem_of((kind, f"{path}{text}"), "image", record["id"], level)

    try:
        with Image.open(path) as file:
            stored = (file.height, file.width)
            size = (record.get("height", stored[0]), record.get("width", stored[1]))
            turned = file.getexif().get(0x0112, 1) not in (0, 1)
            oriented = orient(file, size)
            oriented.load()  # decode the whole file, to find a truncated one
            try:
                to_rgb(oriented)
            except DataError as error:
                yield found("unreadable pixels", f": {error}")
            several = has_frames(file)
    except FileNotFoundError:
        yield found("missing file", f" does not exist{hint(folder, path)}")
    except DataError as error:
        yield found("size mismatch", f": {error}")
    except Exception as error:  # PIL's plugins raise any exception on broken files
        yield found("unreadable file", f": {type(error).__name__} {error}")
    else:
        if several:
            yield found("several frames", " has several frames, only the first is read", "warning")
        if turned:
            rotated = oriented is not file
            how = "is applied" if rotated else f"is ignored: only the stored {stored[1]} x {stored[0]} fits"
            yield found("EXIF rotation", f" has an EXIF rotation, which {how}", "warning")


def object_problems(records: Records) -> Iterator[Problem]:
    """Yield the problems of the annotations, one by one."""
    sizes = records.sizes
    seen: set[Any] = set()
    for record in records.annotations:
        yield from _object_problems(record, sizes[record["image_id"]], seen)


def twice_problems(records: Records) -> Iterator[Problem]:
    """Yield the objects that nearly have the box of an earlier one of their class."""
    groups: dict[tuple[int, int], list[dict[str, Any]]] = {}
    for record in records.annotations:
        if not record.get("iscrowd") and not record.get("ignore"):
            groups.setdefault((record["image_id"], record["category_id"]), []).append(record)
    for group in groups.values():
        if len(group) < 2:
            continue
        boxes_N4 = np.array([record["bbox"] for record in group], np.float64)
        iou_NN = np.triu(mask_util.iou(boxes_N4, boxes_N4, np.zeros(len(group), np.uint8)), k=1)
        for second in np.flatnonzero((iou_NN > _TWICE_IOU).any(axis=0)):
            first = int(iou_NN[:, second].argmax())
            text = f"IoU {iou_NN[first, second]:.2f} with {group[first].get('id')}, of the same class"
            yield problem_of(("annotated twice?", text), "annotation", group[second].get("id"), "warning")


def _object_problems(record: dict[str, Any], size: Size, seen: set[Any]) -> Iterator[Problem]:
    """Yield the problems of an annotation whose ids and box can be used."""

    def found(kind: str, text: str, level: Level = "error") -> Problem:
        return problem_of((kind, text), "annotation", record.get("id"), level)

    name = record.get("id")
    if type(name) is not int:
        yield found(
            "bad annotation id",
            f"id {name!r} is not an integer; pycocotools cannot evaluate it",
            "warning",
        )
    elif name in seen:
        yield found(
            "duplicate annotation id", "pycocotools keeps only the last annotation with an id", "warning"
        )
    else:
        seen.add(name)
    for key in ("area", "iscrowd"):
        if not is_number(record.get(key)):
            yield found(
                f"no {key}", f"{key} is {record.get(key)!r}; pycocotools needs it to evaluate", "warning"
            )
    x, y, w, h = record["bbox"]
    if x < -_OVERHANG or y < -_OVERHANG or x + w > size[1] + _OVERHANG or y + h > size[0] + _OVERHANG:
        yield found(
            "box beyond the image",
            f"bbox {record['bbox']} extends beyond the {size[1]} x {size[0]} image; it is clipped",
            "warning",
        )
    segmentation = record.get("segmentation")
    if record.get("iscrowd") and not isinstance(segmentation, dict):
        yield found("crowd without RLE", "a crowd region's segmentation should be RLE", "warning")
    if not segmentation:
        return
    if isinstance(segmentation, dict):
        rle = segmentation
        if isinstance(rle["counts"], list):
            rle = mask_util.frPyObjects(rle, *size)
    else:
        parts = [np.asarray(part, np.float64) for part in segmentation]
        rle = mask_util.merge(mask_util.frPyObjects(parts, *size))
    if mask_util.area(rle) == 0:
        yield found("empty mask", "its mask has no pixel inside the image", "warning")
        return
    mx, my, mw, mh = (float(v) for v in mask_util.toBbox(rle))
    box = np.clip([x, y, x + w, y + h], 0, [size[1], size[0], size[1], size[0]])
    if np.abs(box - [mx, my, mx + mw, my + mh]).max() > _BOX_MASK_SLACK:
        text = f"bbox {record['bbox']} is not around its mask, whose box is {[mx, my, mw, mh]}"
        yield found("box and mask differ", text, "info")
