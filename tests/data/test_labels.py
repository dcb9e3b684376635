"""Lists of classes in the formats in which data sets ship, and the class of each label."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from giantdet.config.classes import unique_names
from giantdet.data.labels import LabelClass, LabelTable, read_classes
from giantdet.errors import DataError
from giantdet.structures import IGNORE

# The first rows of ADE20K's file.
OBJECT_INFO = """Idx	Ratio	Train	Val	Stuff	Name
1	0.1576	11664	1172	1	wall
2	0.1072	6046	612	1	building, edifice
3	0.0878	8265	796	1	sky
15	0.0202	6678	641	0	door;double door
"""
FORMS: dict[str, tuple[str, str, list[LabelClass]]] = {
    "names by line": (
        "names.txt",
        "sky\n\n  tall building \ntree\n",
        [LabelClass(0, "sky"), LabelClass(1, "tall building"), LabelClass(2, "tree")],
    ),
    "a list of names": ("names.json", '["sky", "tree"]', [LabelClass(0, "sky"), LabelClass(1, "tree")]),
    "COCO-Stuff": (
        "stuff.json",
        json.dumps({"categories": [{"id": 92, "name": "banner"}, {"id": 95, "name": "bridge"}]}),
        [LabelClass(92, "banner"), LabelClass(95, "bridge")],
    ),
    "Cityscapes": (
        "cityscapes.json",
        json.dumps(
            [
                {"name": "road", "id": 7, "trainId": 0, "color": [128, 64, 128]},
                {"name": "parking", "id": 9, "trainId": 255, "color": [250, 170, 160]},
                {"name": "license plate", "id": -1, "trainId": -1, "color": [0, 0, 142]},
            ]
        ),
        [
            LabelClass(0, "road", (128, 64, 128)),
            LabelClass(255, "parking", (250, 170, 160)),
            LabelClass(-1, "license plate", (0, 0, 142)),
        ],
    ),
    "train_id before id": ("c.json", '[{"name": "a", "id": 5, "train_id": 2}]', [LabelClass(2, "a")]),
    "CamVid": (
        "label_colors.txt",
        "64 128 64\tAnimal\n192 0 128\t\tArchway\n0 128 64 Bicyclist on road\n",
        [
            LabelClass(0, "Animal", (64, 128, 64)),
            LabelClass(1, "Archway", (192, 0, 128)),
            LabelClass(2, "Bicyclist on road", (0, 128, 64)),
        ],
    ),
    "ADE20K": (
        "objectInfo150.txt",
        OBJECT_INFO,
        [
            LabelClass(0, "wall"),
            LabelClass(1, "building"),
            LabelClass(2, "sky"),
            LabelClass(3, "door;double door"),
        ],
    ),
    "a name of numbers": (
        "n.txt",
        "1 2 3\n300 1 1 far\n",
        [LabelClass(0, "1 2 3"), LabelClass(1, "300 1 1 far")],
    ),
    "a byte order mark": ("bom.txt", "\ufeffsky\ntree\n", [LabelClass(0, "sky"), LabelClass(1, "tree")]),
}


@pytest.mark.parametrize("form", FORMS)
def test_forms(form: str, tmp_path: Path) -> None:
    name, text, expected = FORMS[form]
    (tmp_path / name).write_text(text)
    assert read_classes(str(tmp_path / name)) == expected


def test_names_in_the_section() -> None:
    assert read_classes(("sky", "tree")) == [LabelClass(0, "sky"), LabelClass(1, "tree")]


UNUSABLE: dict[str, tuple[str, bytes | None, str]] = {
    "no such file": ("c.json", None, "cannot read the classes .*c.json: No such file"),
    "not JSON": ("c.json", b"[1, ", "c.json: Expecting value"),
    "Latin-1": ("c.txt", "caf\xe9".encode("latin-1"), "c.txt: 'utf-8' codec"),
    "deep lists": ("c.json", b"[" * 100_000, "c.json: maximum recursion"),
    "a number": ("c.json", b"5", "neither a list nor an object with a list of categories"),
    "no name": ("c.json", b'["a", {"id": 1}]', "entry 1 is neither a name nor an object with a name"),
    "a label as text": ("c.json", b'[{"name": "a", "id": "1"}]', "a: its label must be an integer, got '1'"),
    "true for a label": (
        "c.json",
        b'[{"name": "a", "id": true}]',
        "a: its label must be an integer, got True",
    ),
    "a color of two": (
        "c.json",
        b'[{"name": "a", "color": [1, 2]}]',
        r"a: color must be \[R, G, B\] with values from 0 to 255",
    ),
    "a color of 256": ("c.json", b'[{"name": "a", "color": [1, 2, 256]}]', "a: color must be"),
    "nothing": ("c.txt", b" \n\n", "c.txt: there are none"),
    "no list": ("c.json", b"[]", "c.json: there are none"),
}


@pytest.mark.parametrize("what", UNUSABLE)
def test_unusable_files(what: str, tmp_path: Path) -> None:
    name, content, message = UNUSABLE[what]
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=message) as raised:
        read_classes(str(tmp_path / name))
    assert "\n" not in str(raised.value)


def table(
    classes: Any, ignore: tuple[int | str, ...] = (255,), reduce_zero_label: bool = False
) -> LabelTable:
    return LabelTable([LabelClass(*entry) for entry in classes], ignore, reduce_zero_label)


RGB = [(0, "sky", (1, 2, 3)), (1, "tree", (3, 2, 1)), (2, "void", (0, 0, 0))]
TABLES: dict[str, tuple[LabelTable, dict[int, int], tuple[int, ...]]] = {
    # A table, the class of each label, and labels that are not in the table.
    "in order": (table(enumerate("abc")), {0: 0, 1: 1, 2: 2, 255: IGNORE}, (3, 254, 256, 65_535)),
    "gaps": (table([(92, "a"), (95, "b"), (7, "c")]), {92: 0, 95: 1, 7: 2, 255: IGNORE}, (0, 1, 93, 96)),
    "reduced": (
        table(enumerate("ab"), (255,), True),
        {0: IGNORE, 1: 0, 2: 1, 255: IGNORE},
        (3, 254),
    ),
    "not trained by name": (table(enumerate("abc"), ("b", 9)), {0: 0, 1: IGNORE, 2: 1, 9: IGNORE}, (3, 255)),
    "not trained by label": (table([(0, "a"), (255, "b"), (-1, "c")]), {0: 0, 255: IGNORE}, (1, 254)),
    "16 bits": (table([(1000, "a"), (26_001, "b")]), {1000: 0, 26_001: 1, 255: IGNORE}, (0, 1001, 65_535)),
}


@pytest.mark.parametrize("name", TABLES)
def test_labels(name: str) -> None:
    made, known, unknown = TABLES[name]
    labels = np.array([list(known)] * 2, np.uint16)
    found = made.of_labels(labels)
    assert found.dtype == np.uint8 and found.tolist() == [list(known.values())] * 2
    for label in unknown:
        count = len(made.classes)
        message = (
            rf"label {label} is none of the {count} classes \(50.0% .*; see ignore and reduce_zero_label"
        )
        with pytest.raises(DataError, match=message):
            made.of_labels(np.array([[next(iter(known)), label]], np.uint16))


def test_colors() -> None:
    made = table(RGB, ("void",))
    rgb = np.array([[(1, 2, 3), (3, 2, 1), (0, 0, 0), (1, 2, 3)]], np.uint8)
    assert made.of_colors(rgb).tolist() == [[0, 1, IGNORE, 0]]
    assert made.categories == ((0, "sky"), (1, "tree"))
    rgb[0, 1] = (3, 2, 2)
    with pytest.raises(DataError, match=r"label \[3, 2, 2\] is none of the 2 classes \(25.0% of the pixels"):
        made.of_colors(rgb)
    with pytest.raises(DataError, match="its labels are colours, and the classes have none"):
        table(enumerate("ab")).of_colors(rgb)


def test_classes_of_one_name() -> None:
    """Two of ADE20K's 150 classes are a "screen"; both get scores under the class name."""
    made = table([(0, "screen"), (4, "tree"), (7, "screen")])
    assert made.categories == ((0, "screen"), (4, "tree"), (7, "screen"))
    assert unique_names(made.categories) == ["screen", "tree", "screen (7)"]


@pytest.mark.parametrize(
    ("classes", "ignore", "message"),
    [
        ([(0, "a"), (0, "b")], (255,), "the label of class 'b' is also that of another class"),
        (
            [(0, "a", (1, 1, 1)), (1, "b", (1, 1, 1))],
            (),
            "the color of class 'b' is also that of another class",
        ),
        ([(0, "a", (1, 1, 1)), (1, "b", (1, 1, 1))], ("a",), "the color of class 'b' is also ignored"),
        ([(0, "a"), (1, "b")], ("c",), "ignore: no class is called 'c'"),
        ([(0, "a")], ("a",), "0 semantic classes; 1 to 255 are possible"),
        ([(n, str(n)) for n in range(256)], (), "256 semantic classes; 1 to"),
    ],
)
def test_invalid_tables(classes: Any, ignore: tuple[int | str, ...], message: str) -> None:
    with pytest.raises(DataError, match=message):
        table(classes, ignore)
