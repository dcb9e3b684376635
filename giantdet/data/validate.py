"""Report what is wrong with a data set, record by record, before a long run. Changes no files.

Records with an error are left out; those with a warning or an info are used. Not checked: whether `area` is
that of the mask, and whether labels are correct.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
from PIL import Image
from pycocotools import mask as mask_util

from giantdet.data.images import has_frames, orient
from giantdet.data.near_files import hint
from giantdet.data.pixels import to_rgb
from giantdet.data.reading import Finding, Records, read_records
from giantdet.data.records import is_number, read_instances
from giantdet.data.segments import Fault, Size
from giantdet.errors import DataError

_OVERHANG = 1.0  # pixels a box may extend beyond the image because of rounding
_BOX_MASK_SLACK = 2.0  # allowed pixels between the sides of a box and of its mask


class Problem(NamedTuple):
    """One problem. `id` is that of the image, annotation or category that the text names, or None."""

    kind: str
    id: Any
    text: str
    level: Literal["error", "warning", "info"] = "error"

    @property
    def is_error(self) -> bool:
        return self.level == "error"


def validate(annotations: str | Path, images: str | Path, read_files: bool = True) -> list[Problem]:
    """Return all problems of a COCO instances JSON and its image folder; decode the images if `read_files`.

    Raises `DataError` if the JSON as a whole cannot be used.
    """
    return check(
        read_records(annotations, read_instances(annotations), keep_findings=True), images, read_files
    )


def check(records: Records, images: str | Path, read_files: bool = True) -> list[Problem]:
    """Return the same of records that were read with their findings."""
    problems = [_found(finding) for finding in records.findings or ()]
    names: set[str] = set()
    for number, name in records.categories.items():
        if name in names:
            fault = ("duplicate category name", f"an earlier category is called {name!r}, too")
            problems.append(_problem(fault, "category", {"id": number}, "warning"))
        names.add(name)
    for record in records.images.values() if read_files else ():
        problems += _file_problems(record, Path(images))
    sizes = records.sizes
    seen: set[Any] = set()
    with_objects: set[int] = set()
    for record in records.annotations:
        with_objects.add(record["image_id"])
        problems += _object_problems(record, sizes[record["image_id"]], seen)
    problems += _class_problems(records)
    for image_id in sizes:
        if image_id not in with_objects:
            problems.append(
                Problem("no objects", image_id, f"image {image_id}: it has no usable object", "info")
            )
    return problems


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


def _found(finding: Finding) -> Problem:
    level: Literal["error", "warning"] = "error" if finding.left_out else "warning"
    return Problem(finding.kind, finding.name, f"{finding.what} {finding.name}: {finding.text}", level)


def _class_problems(records: Records) -> Iterator[Problem]:
    """Yield what concerns whole classes or the whole file, of a file with objects."""
    crowds = sum(bool(record.get("iscrowd")) for record in records.annotations)
    if crowds and crowds == len(records.annotations):
        text = f"all {crowds} annotations are crowd regions; if they are objects, set iscrowd to 0"
        yield Problem("only crowds", None, text, "warning")
    objects = [r for r in records.annotations if not r.get("iscrowd") and not r.get("ignore")]
    bare = sum(not record.get("segmentation") for record in objects)
    if 0 < bare < len(objects):
        text = f"{bare} of {len(objects)} objects have no mask; they are trained and scored as boxes alone"
        yield Problem("objects without a mask", None, text, "warning")
    used = {record["category_id"] for record in records.annotations}
    for number, name in records.categories.items():
        if used and number not in used:
            text = f"category {number}: no annotation is of the class {name!r}"
            yield Problem("class without objects", number, text, "info")


def _problem(
    fault: Fault, what: str, record: Any, level: Literal["error", "warning", "info"] = "error"
) -> Problem:
    name = record.get("id") if isinstance(record, dict) else None
    return Problem(fault[0], name, f"{what} {name}: {fault[1]}", level)


def _file_problems(record: dict[str, Any], folder: Path) -> Iterator[Problem]:
    path = folder / record["file_name"]
    size = (record["height"], record["width"])
    try:
        with Image.open(path) as file:
            stored = (file.height, file.width)
            turned = file.getexif().get(0x0112, 1) not in (0, 1)
            oriented = orient(file, size)
            oriented.load()  # decode the whole file, to find a truncated one
            try:
                to_rgb(oriented)
            except DataError as error:
                yield _problem(("unreadable pixels", f"{path}: {error}"), "image", record)
            several = has_frames(file)
    except FileNotFoundError:
        yield _problem(("missing file", f"{path} does not exist{hint(folder, path)}"), "image", record)
    except DataError as error:
        yield _problem(("size mismatch", f"{path}: {error}"), "image", record)
    except Exception as error:  # PIL's plugins raise any exception on broken files
        yield _problem(("unreadable file", f"{path}: {type(error).__name__} {error}"), "image", record)
    else:
        if several:
            text = f"{path} has several frames, of which the first is read"
            yield _problem(("several frames", text), "image", record, "warning")
        if turned:
            rotated = oriented is not file
            how = "is applied" if rotated else f"is ignored: only the stored {stored[1]} x {stored[0]} fits"
            yield _problem(
                ("EXIF rotation", f"{path} has an EXIF rotation, which {how}"), "image", record, "warning"
            )


def _object_problems(record: dict[str, Any], size: Size, seen: set[Any]) -> Iterator[Problem]:
    """Yield the problems of an annotation whose ids and box can be used."""

    def found(kind: str, text: str, level: Literal["error", "warning", "info"] = "error") -> Problem:
        return _problem((kind, text), "annotation", record, level)

    name = record.get("id")
    if type(name) is not int:
        yield found(
            "bad annotation id",
            f"id {name!r} is not an integer; pycocotools cannot evaluate it",
            "warning",
        )
    elif name in seen:
        yield found(
            "duplicate annotation id", "pycocotools keeps only the last annotation of an id", "warning"
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
            "box overhangs",
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
