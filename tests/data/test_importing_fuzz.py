"""import-data on broken files: any wrong value is counted, or gives one line."""

from __future__ import annotations

import copy
import json
import random
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from giantdet.data.importing.convert import convert
from giantdet.data.importing.recognise import recognise
from giantdet.data.importing.scene import Request
from giantdet.errors import GiantdetError

WRONG: list[Any] = [
    None,
    True,
    -1,
    1e300,
    10**400,
    "",
    "x",
    "nan",
    [],
    [[]],
    {},
    {"a": [1]},
    [None],
    "\0",
    [[1, "a"]],
]
LABELME = {
    "imagePath": "a.png",
    "imageHeight": 30,
    "imageWidth": 40,
    "shapes": [
        {"label": "x", "points": [[1, 1], [9, 9]], "shape_type": "rectangle", "group_id": None},
        {"label": "x", "points": [[1, 1], [9, 9], [1, 9]], "shape_type": "polygon", "group_id": 1},
        {"label": "x", "points": [[1, 1], [9, 9]], "shape_type": "mask", "mask": "iVBORw0KGgo="},
        {"label": "x", "points": [[5, 5], [9, 9]], "shape_type": "circle"},
    ],
}
VIA = {
    "a": {
        "filename": "a.png",
        "regions": [
            {
                "shape_attributes": {"name": "rect", "x": 1, "y": 1, "width": 5, "height": 5},
                "region_attributes": {"class": "x"},
            },
            {
                "shape_attributes": {"name": "polygon", "all_points_x": [1, 2, 9], "all_points_y": [1, 9, 9]},
                "region_attributes": {"class": {"x": True}},
            },
            {
                "shape_attributes": {"name": "ellipse", "cx": 9, "cy": 9, "rx": 3, "ry": 4, "theta": 1},
                "region_attributes": {"class": "x"},
            },
        ],
    }
}
_BOX = {"x": 1, "y": 1, "width": 50, "height": 50}
_POINTS = [[1, 1], [9, 1], [9, 50]]
_SIZE = {"original_width": 40, "original_height": 30}
STUDIO = [
    {
        "data": {"image": "/data/a.png"},
        "annotations": [
            {
                "result": [
                    _SIZE
                    | {
                        "id": "r",
                        "type": "rectanglelabels",
                        "value": {
                            "x": 1,
                            "y": 1,
                            "width": 50,
                            "height": 50,
                            "rotation": 5,
                            "rectanglelabels": ["x"],
                        },
                    },
                    _SIZE
                    | {
                        "type": "polygonlabels",
                        "value": {"points": [[1, 1], [9, 1], [9, 50]], "polygonlabels": ["x"]},
                    },
                    _SIZE | {"type": "brushlabels", "value": {"rle": [0, 0, 1, 2, 3], "brushlabels": ["x"]}},
                ]
            }
        ],
    }
]
COCO = {
    "images": [{"id": 1, "file_name": "a.png", "width": 40, "height": 30}],
    "annotations": [
        {"id": 1, "image_id": 1, "category_id": 1, "bbox": [1, 1, 5, 5], "segmentation": [[1, 1, 9, 1, 9, 9]]}
    ],
    "categories": [{"id": 1, "name": "x"}],
}
VOC = (
    "<annotation><filename>a.png</filename><size><width>40</width><height>30</height></size><object>"
    "<name>x</name><difficult>0</difficult><bndbox><xmin>1</xmin><ymin>1</ymin><xmax>9</xmax><ymax>9</ymax>"
    "</bndbox><polygon><x1>1</x1><y1>1</y1><x2>9</x2><y2>1</y2><x3>9</x3><y3>9</y3></polygon></object>"
    "</annotation>"
)
CVAT = (
    '<annotations><image name="a.png" width="40" height="30"><box label="x" xtl="1" ytl="1" xbr="9" ybr="9" '
    'rotation="10"/><polygon label="x" points="1,1;9,1;9,9"/><mask label="x" rle="1,2,1" left="1" top="1" '
    'width="2" height="2"/><ellipse label="x" cx="9" cy="9" rx="3" ry="4"/></image></annotations>'
)
YOLO = "0 0.5 0.5 0.5 0.5\n0 0.1 0.1 0.5 0.1 0.5 0.5\n"
OPEN_IMAGES = "ImageID,LabelName,XMin,XMax,YMin,YMax,IsGroupOf\na,/m/1,0.1,0.5,0.1,0.5,0\n"


def places(content: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Return the path of every value in a JSON's content."""
    found = [path] if path else []
    entries = (
        content.items()
        if isinstance(content, dict)
        else enumerate(content)
        if isinstance(content, list)
        else ()
    )
    for key, value in entries:
        found += places(value, (*path, key))
    return found


def broken_json(content: Any) -> Callable[[random.Random], str]:
    paths = places(content)

    def make(rng: random.Random) -> str:
        changed = copy.deepcopy(content)
        *parents, last = rng.choice(paths)
        node = changed
        for key in parents:
            node = node[key]
        node[last] = rng.choice(WRONG)
        return json.dumps(changed)

    return make


def broken_text(text: str, value: str) -> Callable[[random.Random], str]:
    """Replace one of the matches of `value`, or cut the text off."""
    spans = [match.span(1) for match in re.finditer(value, text)]
    wrong = ["", "x", "-1", "1e300", "nan", "9" * 400, "1,2", "\n", "&#9;", "0"]

    def make(rng: random.Random) -> str:
        if rng.random() < 0.1:
            return text[: rng.randrange(len(text))]
        start, end = rng.choice(spans)
        return text[:start] + rng.choice(wrong) + text[end:]

    return make


CASES: dict[str, tuple[str, Callable[[random.Random], str], int]] = {
    "labelme": ("a.json", broken_json(LABELME), 300),
    "via": ("via.json", broken_json(VIA), 300),
    "label-studio": ("export.json", broken_json(STUDIO), 300),
    "coco": ("coco.json", broken_json(COCO), 200),
    "voc": ("a.xml", broken_text(VOC, r">([^<]+)<"), 150),
    "cvat": ("cvat.xml", broken_text(CVAT, r'"([^"]*)"'), 200),
    "yolo": ("a.txt", broken_text(YOLO, r"([\d.]+)"), 100),
    "open-images": ("boxes.csv", broken_text(OPEN_IMAGES, r"([^,\n]+)"), 100),
}


@pytest.mark.parametrize("name", CASES)
def test_a_wrong_value(tmp_path: Path, name: str) -> None:
    file, make, count = CASES[name]
    Image.new("RGB", (40, 30)).save(tmp_path / "a.png")
    (tmp_path / "classes.txt").write_text("x\n")
    rng = random.Random(name)
    used = 0
    for _ in range(count):
        text = make(rng)
        (tmp_path / file).write_text(text)
        recognise(tmp_path / file)
        try:
            convert(name, Request(tmp_path), tmp_path / "out", overwrite=True)
            used += 1
        except GiantdetError as error:
            assert "\n" not in str(error), text
        except Exception as error:
            raise AssertionError(f"{name}: {type(error).__name__} {error} for {text[:2000]}") from error
        for path in (tmp_path / "out").glob("*.json"):
            path.unlink()
    assert used > 0
