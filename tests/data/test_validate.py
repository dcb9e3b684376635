"""A table of bad records: each is reported with its id, and training works without them."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from pycocotools import mask as mask_util

from giantdet.data.coco import CocoDataset
from giantdet.data.validate import format_report, validate

IMAGE = {"id": 1, "file_name": "a.png", "width": 40, "height": 20}
GOOD = {"id": 1, "image_id": 1, "category_id": 1, "bbox": [5, 5, 10, 8], "area": 80, "iscrowd": 0}
POLYGON = [5, 5, 15, 5, 15, 13, 5, 13]
CORRUPT = mask_util.encode(np.asfortranarray(np.eye(20, 40, dtype=np.uint8)))["counts"].decode()[:-3]


def make(folder: Path, images: list[Any], annotations: list[Any], categories: list[Any]) -> Path:
    pixels = np.random.default_rng(0).integers(0, 255, (20, 40, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(folder / "a.png")
    whole = (folder / "a.png").read_bytes()
    (folder / "cut.png").write_bytes(whole[: len(whole) // 2])
    Image.fromarray(pixels).save(folder / "cut.jpg")
    (folder / "cut.jpg").write_bytes((folder / "cut.jpg").read_bytes()[:-300])
    (folder / "text.png").write_text("hello")
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(pixels).save(folder / "turned.png", exif=exif)
    path = folder / "a.json"
    path.write_text(json.dumps({"images": images, "annotations": annotations, "categories": categories}))
    return path


# kind, the annotation's changes, is it an error, is it left out of training
ONLY_REPORTED = {
    "box beyond the image",
    "empty mask",
    "crowd without RLE",
    "no area",
    "no iscrowd",
    "bad annotation id",
    "duplicate annotation id",
}

OBJECTS = [
    ("unknown image", {"image_id": 99}, "error", True),
    ("unknown image", {"image_id": "1"}, "error", True),
    ("unknown category", {"category_id": 7}, "error", True),
    ("bad box", {"bbox": [1, 2, 3]}, "error", True),
    ("bad box", {"bbox": None, "segmentation": None}, "error", True),
    ("no box", {"bbox": None}, "warning", False),
    ("no box", {"bbox": []}, "warning", False),
    ("bad box", {"bbox": [1, 2, "3", 4]}, "error", True),
    ("bad box", {"bbox": [1, 2, float("nan"), 4]}, "error", True),
    ("bad box", {"bbox": [1, 2, float("inf"), 4]}, "error", True),
    ("empty box", {"bbox": [1, 2, 0, 4]}, "error", True),
    ("empty box", {"bbox": [1, 2, 5, -4]}, "error", True),
    ("box outside", {"bbox": [40, 2, 5, 4]}, "error", True),
    ("box outside", {"bbox": [2, -9, 5, 9]}, "error", True),
    ("box beyond the image", {"bbox": [30, 2, 15, 4], "segmentation": None}, "warning", False),
    ("bad polygon", {"segmentation": [[1, 2, 3, 4]]}, "warning", False),
    ("bad polygon", {"segmentation": [[1, 2, 3, 4, 5, 6, 7]]}, "warning", False),
    ("bad polygon", {"segmentation": [["a"]]}, "warning", False),
    ("bad polygon", {"segmentation": 3}, "warning", False),
    ("bad polygon", {"segmentation": [POLYGON, [1, 2, 3, 4]]}, "warning", False),
    ("RLE of wrong size", {"segmentation": {"size": [40, 20], "counts": [800]}}, "warning", False),
    ("bad RLE", {"segmentation": {"size": [20, 40], "counts": [700]}}, "warning", False),
    ("bad RLE", {"segmentation": {"size": [20, 40], "counts": None}}, "warning", False),
    ("bad RLE", {"segmentation": {"size": [20, 40], "counts": CORRUPT}}, "warning", False),
    ("polygon not in a list", {"segmentation": POLYGON}, "warning", False),
    ("polygon of points", {"segmentation": [[5, 5], [15, 5], [15, 13], [5, 13]]}, "warning", False),
    ("polygon of points", {"segmentation": [[[5, 5], [15, 5], [15, 13], [5, 13]]]}, "warning", False),
    ("bad iscrowd", {"iscrowd": "maybe"}, "error", True),
    ("bad iscrowd", {"iscrowd": 2}, "error", True),
    ("bad ignore", {"ignore": [1]}, "error", True),
    ("iscrowd as text", {"iscrowd": "0"}, "warning", False),
    ("iscrowd as text", {"iscrowd": "False"}, "warning", False),
    ("ignore as text", {"ignore": "true"}, "warning", True),
    ("empty mask", {"segmentation": {"size": [20, 40], "counts": [800]}}, "warning", False),
    ("box and mask differ", {"segmentation": [[25, 5, 35, 5, 35, 13]]}, "info", False),
    ("crowd without RLE", {"iscrowd": 1, "segmentation": [POLYGON]}, "warning", True),
    ("no area", {"area": None}, "warning", False),
    ("no iscrowd", {"iscrowd": None}, "warning", False),
    ("bad annotation id", {"id": "x"}, "warning", False),
    ("duplicate annotation id", {"id": 1}, "warning", False),
]


@pytest.mark.parametrize(("kind", "change", "level", "left_out"), OBJECTS)
def test_bad_object(tmp_path: Path, kind: str, change: dict[str, Any], level: str, left_out: bool) -> None:
    bad = GOOD | {"id": 17, "segmentation": [POLYGON]} | change
    path = make(tmp_path, [IMAGE], [GOOD | {"segmentation": [POLYGON]}, bad], [{"id": 1, "name": "x"}])
    # The bad object has the good one's box.
    problems = [p for p in validate(path, tmp_path) if p.kind != "annotated twice?"]
    if problems[-1].kind == "objects without a mask":  # of the file: the other object has a mask
        assert (
            problems.pop().text.startswith("1 of 2 objects") and CocoDataset(path, tmp_path).without_mask == 1
        )
    assert [(p.kind, p.id, p.level) for p in problems] == [(kind, bad["id"], level)]
    assert f"annotation {bad['id']}: " in problems[0].text and "\n" not in problems[0].text
    assert kind in format_report(problems)
    dataset = CocoDataset(path, tmp_path)
    assert len(dataset.objects(0)) == (1 if left_out else 2)
    assert dict(dataset.skipped) == ({kind: 1} if level == "error" else {})
    noted = level == "warning" and kind not in ONLY_REPORTED
    assert dict(dataset.noted) == ({kind: 1} if noted else {})


def test_objects_that_are_annotated_twice(tmp_path: Path) -> None:
    """9 of 10 columns in common are IoU 0.9; crowd regions and other classes may lie on an object."""
    objects = [
        GOOD | {"id": 1, "bbox": [5, 5, 10, 8]},
        GOOD | {"id": 2, "bbox": [5, 5, 9, 8]},
        GOOD | {"id": 3, "bbox": [5, 5, 8, 8], "category_id": 2},
        GOOD | {"id": 4, "bbox": [5, 5, 10, 8], "ignore": 1},
        GOOD | {"id": 5, "bbox": [6, 5, 7, 8]},
    ]
    path = make(tmp_path, [IMAGE], objects, [{"id": 1, "name": "x"}, {"id": 2, "name": "y"}])
    (problem,) = [p for p in validate(path, tmp_path) if p.kind == "annotated twice?"]
    assert problem.level == "warning"
    assert problem.text == "annotation 2: IoU 0.90 with 1, of the same class"


IMAGES = [
    ("duplicate image id", {"id": 1}, "error"),
    ("bad image id", {"id": "2"}, "error"),
    ("bad image id", {"id": -1}, "error"),
    ("bad image size", {"width": 0}, "error"),
    ("bad image size", {"height": None}, "error"),
    ("bad file name", {"file_name": None}, "error"),
    ("path outside", {"file_name": "../a.png"}, "error"),
    ("path outside", {"file_name": "b/../../a.png"}, "error"),
    ("path outside", {"file_name": "/a.png"}, "error"),
    ("missing file", {"file_name": "none.png"}, "error"),
    ("unreadable file", {"file_name": "text.png"}, "error"),
    ("unreadable file", {"file_name": "cut.png"}, "error"),
    ("unreadable file", {"file_name": "cut.jpg"}, "error"),
    ("size mismatch", {"width": 41}, "error"),
    ("EXIF rotation", {"file_name": "turned.png"}, "warning"),
    ("EXIF rotation", {"file_name": "turned.png", "width": 20, "height": 40}, "warning"),
    ("no objects", {}, "info"),
]


@pytest.mark.parametrize(("kind", "change", "level"), IMAGES)
def test_bad_image(tmp_path: Path, kind: str, change: dict[str, Any], level: str) -> None:
    bad = IMAGE | {"id": 2} | change
    path = make(tmp_path, [IMAGE, bad], [GOOD], [{"id": 1, "name": "x"}])
    found = [
        (p.kind, p.id, p.level) for p in validate(path, tmp_path) if p.kind != "no objects" or kind == p.kind
    ]
    assert found == [(kind, bad["id"], level)]
    dataset = CocoDataset(path, tmp_path)
    in_json = kind in (
        "duplicate image id",
        "bad image id",
        "bad image size",
        "bad file name",
        "path outside",
    )
    assert len(dataset) == (1 if in_json else 2)
    assert dict(dataset.skipped) == ({kind: 1} if in_json else {})
    if not in_json and level == "error":
        with pytest.raises(ValueError, match=str(bad["file_name"])):
            dataset.read_image(1)


def test_bad_categories_and_garbage(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    categories = [{"id": 1, "name": "x"}, {"id": 1, "name": "y"}, {"name": "z"}]
    path = make(tmp_path, [IMAGE, 5], [GOOD, None], categories)
    kinds = ["duplicate category id", "bad category id", "bad image id", "bad annotation"]
    assert [p.kind for p in validate(path, tmp_path)] == kinds
    with caplog.at_level(logging.WARNING, logger="giantdet"):
        dataset = CocoDataset(path, tmp_path)
    assert dict(dataset.skipped) == dict.fromkeys(kinds, 1) and len(caplog.records) == 4
    assert dataset.class_names == ["x"] and len(dataset.objects(0)) == 1


def test_a_good_set_has_no_problem(shared: Path) -> None:
    folder = shared / "data/fruits_nuts"
    problems = validate(folder / "annotations/instances_val.json", folder / "images")
    assert problems == [] and format_report(problems) == "no problems found"
