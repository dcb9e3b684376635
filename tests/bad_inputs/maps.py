"""Semantic and panoptic data: the architecture, and changes to the demo set and to its section."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from tiny import edit_json

from bad_inputs.cases import Case, Error, Replaced, Skipped, Works

Change = Callable[[Path, dict[str, Any]], Any]
"""A change that gets the folder of the set and the section `data.train`."""


def keys(**values: Any) -> Change:
    return lambda folder, section: section.update(values)


def classes(name: str, content: str) -> Change:
    """Write a file of classes."""

    def change(folder: Path, section: dict[str, Any]) -> None:
        (folder / name).write_text(content)
        section["classes"] = str(folder / name)

    return change


def png(kind: str, change: Callable[[Path], Any]) -> Change:
    """Change the PNG file of the first image, in the folder semantic_train or panoptic_train."""
    return lambda folder, section: change(folder / f"{kind}_train/000000.png")


def pixel(value: int) -> Callable[[Path], Any]:
    """Set one pixel to another value."""

    def change(file: Path) -> None:
        pixels = np.array(Image.open(file))
        pixels[0, 0] = value
        Image.fromarray(pixels).save(file)

    return change


def panoptic(change: Callable[[dict[str, Any]], Any]) -> Change:
    """Change the content of the panoptic JSON."""

    def changed(folder: Path, section: dict[str, Any]) -> None:
        edit_json(folder / "panoptic_train.json", change)

    return changed


def stuff_only(content: dict[str, Any]) -> None:
    for category in content["categories"]:
        category["isthing"] = 0


def things_only(content: dict[str, Any]) -> None:
    for category in content["categories"]:
        category["isthing"] = 1


def first(content: dict[str, Any]) -> Any:
    return content["annotations"][0]


def segment(**fields: Any) -> Change:
    """Add a segment that no pixel has."""
    record = {"id": 77, "category_id": 1, "bbox": [1, 1, 9, 9], "area": 81, "iscrowd": 0} | fields
    return panoptic(lambda content: first(content)["segments_info"].append(record))


def small(mode: str) -> Callable[[Path], Any]:
    return lambda file: Image.new(mode, (32, 64)).save(file)


SEMANTIC, PANOPTIC = "semantic_fpn", "panoptic_fpn"
_LABEL_7 = (
    "000000.png: label 7 is none of the 6 classes (0.0% of the pixels have none); see ignore and "
    "reduce_zero_label"
)
MAPS = [
    Case(
        "no folder of labels",
        (SEMANTIC, keys(labels="nowhere")),
        Error("giantdet.data.train.labels: folder nowhere does not exist"),
    ),
    Case(
        "no file of classes",
        (SEMANTIC, keys(classes="no.json")),
        Error("giantdet.data.train.classes: file no.json does not exist"),
    ),
    Case(
        "no classes",
        (SEMANTIC, keys(classes=[])),
        Error("...: 0 semantic classes; 1 to 255 are possible"),
    ),
    Case(
        "a file of classes that is not a list",
        (SEMANTIC, classes("c.json", '{"a": 1}')),
        Error("...c.json: it is neither a list nor an object with a list of categories"),
    ),
    Case(
        "two classes with the same label",
        (SEMANTIC, classes("c.json", '[{"name": "a", "id": 1}, {"name": "b", "id": 1}]')),
        Error("...: the label of class 'b' is also that of another class"),
    ),
    Case(
        "a name to ignore that no class has",
        (SEMANTIC, keys(ignore=["sky"])),
        Error("...semantic_train: ignore: no class is called 'sky'"),
    ),
    Case(
        "a suffix that no label has",
        (SEMANTIC, keys(label_suffix="_gt")),
        Error(
            "...semantic_train: no label map belongs to one of the 6 images in ..., e.g. 000000.jpg would "
            "need 000000_gt.png; see image_suffix and label_suffix"
        ),
    ),
    Case(
        "an image without a label map",
        (SEMANTIC, png("semantic", lambda file: file.unlink())),
        Works("the image is left out; a warning at the start gives the number of such images"),
    ),
    Case("an unknown label", (SEMANTIC, png("semantic", pixel(7))), Replaced(_LABEL_7)),
    Case(
        "a label map of another size",
        (SEMANTIC, png("semantic", small("L"))),
        Replaced("000000.jpg: the file is 64 x 64, its record says 32 x 64"),
    ),
    Case(
        "labels that are colours, for classes without colours",
        (SEMANTIC, png("semantic", lambda file: Image.new("RGB", (64, 64)).save(file))),
        Replaced("000000.png: its labels are colours, and the classes have none"),
    ),
    Case(
        "semantic maps for a model of objects",
        ("mask_rcnn", lambda folder, section: section.update(semantic_section(folder))),
        Error("mask_rcnn needs classes of objects, and the training set has none; ..."),
    ),
    Case(
        "no folder of segments",
        (PANOPTIC, keys(segments="nowhere")),
        Error("giantdet.data.train.segments: folder nowhere does not exist"),
    ),
    Case("only stuff", (PANOPTIC, panoptic(stuff_only)), Error("...have no category with isthing 1")),
    Case(
        "only things",
        (PANOPTIC, panoptic(things_only)),
        Error("panoptic_fpn needs classes of stuff, and the training set has none; ..."),
    ),
    Case(
        "no segments_info",
        (PANOPTIC, panoptic(lambda content: first(content).pop("segments_info"))),
        Skipped("no segments_info"),
    ),
    Case(
        "no file name of the PNG",
        (PANOPTIC, panoptic(lambda content: first(content).pop("file_name"))),
        Skipped("bad file name"),
    ),
    Case(
        "two annotations for one image",
        (PANOPTIC, panoptic(lambda content: content["annotations"].append(first(content)))),
        Skipped("duplicate annotation"),
    ),
    Case("an unknown category of a segment", (PANOPTIC, segment(category_id=5)), Skipped("bad segment")),
    Case("a segment with id 0", (PANOPTIC, segment(id=0, category_id=92)), Skipped("bad segment")),
    Case(
        "an object without a pixel",
        (PANOPTIC, segment()),
        Replaced("000000.png: no pixel has the id 77"),
    ),
    Case(
        "a PNG of segments that is missing",
        (PANOPTIC, png("panoptic", lambda file: file.unlink())),
        Replaced("000000.png: No such file or directory"),
    ),
    Case(
        "a PNG of segments of another size",
        (PANOPTIC, png("panoptic", small("RGB"))),
        Replaced("000000.png: it has (64, 32) pixels, its image (64, 64)"),
    ),
    Case(
        "pixels that belong to no segment",
        (PANOPTIC, png("panoptic", pixel(99))),
        Works("they are void, and a warning names one of the ids"),
    ),
]


def semantic_section(folder: Path) -> dict[str, Any]:
    return {
        "format": "semantic_png",
        "annotations": None,
        "labels": str(folder / "semantic_train"),
        "classes": str(folder / "semantic_classes.json"),
    }
