"""Annotations: the bytes of the JSON, or a change to a valid one with three images of one object each."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from typing import Any

from bad_inputs.cases import Case, Error, Noted, Skipped, Works
from bad_inputs.images import SIZE

POLYGON = [5, 5, 15, 5, 15, 13, 5, 13]


def good_content() -> dict[str, Any]:
    """Return three images a.png, b.png and c.png with one object each, and two categories."""
    width, height = SIZE
    images = [
        {"id": n, "file_name": f"{c}.png", "width": width, "height": height}
        for n, c in ((1, "a"), (2, "b"), (3, "c"))
    ]
    objects = [
        {
            "id": n,
            "image_id": n,
            "category_id": 1,
            "bbox": [5, 5, 10, 8],
            "area": 80,
            "iscrowd": 0,
            "segmentation": [POLYGON],
        }
        for n in (1, 2, 3)
    ]
    categories = [{"id": 1, "name": "cell"}, {"id": 2, "name": "dust"}]
    return {"images": images, "annotations": objects, "categories": categories}


def more(**fields: Any) -> Callable[[dict[str, Any]], None]:
    """Add an object to image 1 with these fields; None removes a field."""

    def change(content: dict[str, Any]) -> None:
        record = content["annotations"][0] | {"id": 17} | fields
        content["annotations"].append({key: value for key, value in record.items() if value is not None})

    return change


def image(**fields: Any) -> Callable[[dict[str, Any]], None]:
    """Add an image with these fields."""

    def change(content: dict[str, Any]) -> None:
        content["images"].append(
            {"id": 9, "file_name": "a.png", "width": SIZE[0], "height": SIZE[1]} | fields
        )

    return change


def every(**fields: Any) -> Callable[[dict[str, Any]], None]:
    """Change these fields of all objects."""

    def change(content: dict[str, Any]) -> None:
        for record in content["annotations"]:
            record |= fields

    return change


def under_root(content: dict[str, Any]) -> None:
    """Add a category without objects that is the supercategory of the others."""
    for record in content["categories"]:
        record["supercategory"] = "things"
    content["categories"].append({"id": 0, "name": "things", "supercategory": "none"})


def added(key: str, *records: Any) -> Callable[[dict[str, Any]], None]:
    return lambda content: content[key].extend(records)


def without(key: str) -> Callable[[dict[str, Any]], None]:
    return lambda content: content.pop(key)


def emptied(key: str) -> Callable[[dict[str, Any]], None]:
    return lambda content: content[key].clear()


def objects_10000(content: dict[str, Any]) -> None:
    rng = random.Random(0)
    for n in range(9_999):
        x, y = rng.randrange(30), rng.randrange(10)
        box = {"bbox": [x, y, 4, 4], "area": 16, "segmentation": [[x, y, x + 4, y, x + 4, y + 4, x, y + 4]]}
        content["annotations"].append(content["annotations"][0] | {"id": 100 + n} | box)


KEPT = "the object is kept as a box without a mask"
_TEXT = json.dumps(good_content())
_RLE = {"size": [SIZE[1], SIZE[0]], "counts": [100, 50, 650]}
ANNOTATIONS = [
    Case(
        "0 bytes", b"", Error("annotations ... are not valid JSON: Expecting value: line 1 column 1 (char 0)")
    ),
    Case("cut off", _TEXT[:300].encode(), Error("annotations ... are not valid JSON: ...")),
    Case(
        "Latin-1",
        _TEXT.replace("cell", "\xe9").encode("latin-1"),
        Error("annotations ... are not valid JSON: 'utf-8' codec"),
    ),
    Case(
        "100,000 nested lists",
        b"[" * 100_000,
        Error("annotations ... are not valid JSON: maximum recursion"),
    ),
    Case(
        "a list at the top",
        b"[]",
        Error('annotations ... have no list "images"; a COCO instances file has ...'),
    ),
    Case(
        "no list of annotations",
        without("annotations"),
        Error('annotations ... have no list "annotations"; ...'),
    ),
    Case("no images", emptied("images"), Error("annotations ... contain no images")),
    Case("no categories", emptied("categories"), Error("annotations ... contain no categories")),
    Case(
        "no objects",
        emptied("annotations"),
        Error("no image of ... has an object; there is nothing to train on"),
    ),
    Case(
        "UTF-8 with a byte order mark",
        b"\xef\xbb\xbf" + _TEXT.encode(),
        Works("read as if the mark were not there"),
    ),
    Case("null for an image", added("images", None), Skipped("bad image id")),
    Case("an image's id as text", image(id="9"), Skipped("bad image id")),
    Case("true for an image's id", image(id=True), Skipped("bad image id")),
    Case("an image's id beyond 64 bits", image(id=2**70), Skipped("bad image id")),
    Case("two images with the same id", image(id=1), Skipped("duplicate image id")),
    Case("an image of negative width", image(width=-40), Skipped("bad image size")),
    Case("an image's size and id as 40.0", image(id=9.0, width=40.0, height=20.0), Works("40.0 is 40")),
    Case(
        "a file name only in coco_url",
        image(file_name=None, coco_url="http://images.example.org/val/a.png"),
        Noted("file name from a URL", "the last part of the URL"),
    ),
    Case(
        "a URL for a file name",
        image(file_name="https://images.example.org/a.png?size=1"),
        Noted("file name from a URL", "the last part of the URL"),
    ),
    Case("an image's width as text", image(width="40"), Skipped("bad image size")),
    Case("an image of 10**30 pixels", image(width=10**30), Skipped("bad image size")),
    Case("an image without a file name", image(file_name=None), Skipped("bad file name")),
    Case("a file name with NUL in it", image(file_name="a\0.png"), Skipped("bad file name")),
    Case("a file name of 100,000 letters", image(file_name="a" * 100_000), Skipped("bad file name")),
    Case(
        "a path that leads out of the folder by ..", image(file_name="x/../../a.png"), Skipped("path outside")
    ),
    Case("an absolute path out of the folder", image(file_name="/etc/hostname"), Skipped("path outside")),
    Case(
        "two categories with the same id",
        added("categories", {"id": 1, "name": "x"}),
        Skipped("duplicate category id"),
    ),
    Case(
        "a category's id as text", added("categories", {"id": "3", "name": "x"}), Skipped("bad category id")
    ),
    Case(
        "two categories with the same name",
        added("categories", {"id": 3, "name": "cell"}),
        Works("both are in the scores, one of them named with its id"),
    ),
    Case("a category without a name", added("categories", {"id": 3}), Works("its id is its name")),
    Case("null for an annotation", added("annotations", None), Skipped("bad annotation")),
    Case("an unknown image", more(image_id=99), Skipped("unknown image")),
    Case("an unknown category", more(category_id=7), Skipped("unknown category")),
    Case("no box beside a polygon", more(bbox=None), Noted("no box", "the box around the mask")),
    Case("neither box nor mask", more(bbox=None, segmentation=None), Skipped("bad box")),
    Case("a box of three numbers", more(bbox=[1, 2, 3]), Skipped("bad box")),
    Case("a box with NaN", more(bbox=[1, 2, float("nan"), 4]), Skipped("bad box")),
    Case("a box with text", more(bbox=[1, 2, "3", 4]), Skipped("bad box")),
    Case("a box of negative height", more(bbox=[1, 2, 3, -4]), Skipped("empty box")),
    Case("a box outside the image", more(bbox=[41, 5, 10, 8]), Skipped("box outside")),
    Case("a box that extends beyond the image", more(bbox=[35, 5, 30, 8]), Works("clipped for training")),
    Case("a polygon of 2 points", more(segmentation=[[1, 2, 3, 4]]), Noted("bad polygon", KEPT)),
    Case("a polygon of 7 numbers", more(segmentation=[[1, 2, 3, 4, 5, 6, 7]]), Noted("bad polygon", KEPT)),
    Case(
        "a polygon with NaN", more(segmentation=[[1, 2, 3, 4, 5, float("nan")]]), Noted("bad polygon", KEPT)
    ),
    Case(
        "a polygon with a corner at 1e9",
        more(segmentation=[[1, 2, 1e9, 4, 5, 6]]),
        Noted("bad polygon", KEPT),
    ),
    Case(
        "a polygon not in a list",
        more(segmentation=POLYGON),
        Noted("polygon not in a list", "read as a polygon"),
    ),
    Case(
        "a polygon of points",
        more(segmentation=[[5, 5], [15, 5], [15, 13]]),
        Noted("polygon of points", "read as a polygon"),
    ),
    Case("a list without coordinates", more(segmentation=[[]]), Noted("bad polygon", KEPT)),
    Case("four numbers for a mask", more(segmentation=[5, 5, 10, 8]), Noted("bad polygon", KEPT)),
    Case(
        "one good polygon, one bad",
        more(segmentation=[POLYGON, [1, 2]]),
        Noted("bad polygon", "the good one is the mask"),
    ),
    Case(
        "RLE with another size",
        more(segmentation=_RLE | {"size": list(SIZE)}),
        Noted("RLE of wrong size", KEPT),
    ),
    Case("RLE with too few pixels", more(segmentation=_RLE | {"counts": [700]}), Noted("bad RLE", KEPT)),
    Case(
        "an RLE string cut off inside a number",
        more(segmentation=_RLE | {"counts": "T3o"}),
        Noted("bad RLE", KEPT),
    ),
    Case(
        "an RLE string with invalid characters",
        more(segmentation=_RLE | {"counts": "T\0 z"}),
        Noted("bad RLE", KEPT),
    ),
    Case(
        "an RLE string with too few pixels",
        more(segmentation=_RLE | {"counts": "44"}),
        Noted("bad RLE", KEPT),
    ),
    *[
        Case(f"{text!r} for iscrowd", more(iscrowd=text), Noted("iscrowd as text", "not a crowd"))
        for text in ("0", "false")
    ],
    Case("'true' for iscrowd", more(iscrowd="true"), Noted("iscrowd as text", "a crowd")),
    Case("true for iscrowd", more(iscrowd=True), Works("a crowd")),
    Case("'perhaps' for iscrowd", more(iscrowd="perhaps"), Skipped("bad iscrowd")),
    Case("2 for iscrowd", more(iscrowd=2), Skipped("bad iscrowd")),
    Case("ignore 1", more(ignore=1), Works("neither trained on nor counted as missed")),
    Case("only crowds", every(iscrowd=1), Error("no image of ...: of its records 3 are crowd regions")),
    Case("only ignored objects", every(ignore=1), Error("no image of ...: of its records 3 are ignored")),
    Case(
        "boxes relative to the image",
        every(bbox=[0.125, 0.25, 0.25, 0.4]),
        Error("...: all 3 boxes lie in 0 to 1, so they are relative to the image's size..."),
    ),
    Case(
        "corners for boxes",
        every(bbox=[18, 5, 30, 18], area=156),
        Error("...: the 3 boxes are corners x1, y1, x2, y2, e.g. ..."),
    ),
    Case(
        "a root category that is the parent of all others",
        under_root,
        Noted("root category", "it is not a class"),
    ),
    Case("no id", more(id=None), Works("gets a number")),
    Case("two annotations with the same id", more(id=1), Works("both are used")),
    Case("an annotation's id beyond 64 bits", more(id=10**30), Works("gets a number")),
    Case("no area", more(area=None), Works("the mask's area is used")),
    Case("no iscrowd", more(iscrowd=None), Works("not a crowd")),
    Case(
        "a crowd without a mask",
        more(iscrowd=1, segmentation=None),
        Works("its box is ignored by the evaluation"),
    ),
    Case(
        "10,000 objects in an image",
        objects_10000,
        Works("the largest `max_objects` are kept, the others are counted as dropped_objects"),
    ),
]
