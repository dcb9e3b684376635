"""Classes of data sets and models are matched by name."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from giantdet.config.classes import Classes
from giantdet.config.datasets import SemanticPngDatasetConfig
from giantdet.data.coco import CocoDataset
from giantdet.data.coco_panoptic import CocoPanopticDataset
from giantdet.data.dataset import meet
from giantdet.data.demo import CATEGORIES, STUFF
from giantdet.data.semantic_png import SemanticPngDataset
from giantdet.errors import DataError

SHAPES = tuple(CATEGORIES.items())
THINGS = (0, "things")


@pytest.fixture
def shapes(demo_data: Path) -> CocoDataset:
    return CocoDataset(demo_data / "val.json", demo_data / "val")


def test_the_same_classes(shapes: CocoDataset, caplog: pytest.LogCaptureFixture) -> None:
    known = Classes(objects=(*SHAPES, (9, "hexagon")))
    assert meet(shapes, known, "x").objects == known.objects
    assert not caplog.text


def test_other_ids_are_matched_and_reported(shapes: CocoDataset, caplog: pytest.LogCaptureFixture) -> None:
    known = Classes(objects=((1, "star"), (2, "hexagon"), (3, "rectangle"), (4, "circle"), (7, "triangle")))
    with caplog.at_level(logging.WARNING, "giantdet"):
        found = meet(shapes, known, "x")
    assert found.objects == ((7, "star"), (-1, "hexagon"), (3, "rectangle"), (1, "circle"), (4, "triangle"))
    assert "star 7 for 1, circle 1 for 4, triangle 4 for 7" in caplog.text and "rectangle" not in caplog.text


@pytest.mark.parametrize("ids", [(1, 3, 4, 7), (10, 11, 12, 13)])
def test_a_missing_name(shapes: CocoDataset, ids: tuple[int, ...]) -> None:
    names = ("circle", "square", "triangle", "star")
    with pytest.raises(DataError, match=r"category 'rectangle' \(id 3\) is not among .* circle, square"):
        meet(shapes, Classes(objects=tuple(zip(ids, names, strict=True))), "x")


def test_names_that_occur_twice(demo_data: Path, tmp_path: Path) -> None:
    content: dict[str, Any] = json.loads((demo_data / "val.json").read_text())
    for category in content["categories"][:2]:
        category["name"] = "round"
    (tmp_path / "val.json").write_text(json.dumps(content))
    dataset = CocoDataset(tmp_path / "val.json", demo_data / "val")
    assert meet(dataset, dataset.classes, "x") == dataset.classes, "ids distinguish them"
    other = Classes(objects=tuple((number + 1, name) for number, name in dataset.classes.objects))
    with pytest.raises(DataError, match="occur twice"):
        meet(dataset, other, "x")


def test_nothing_in_common(shapes: CocoDataset) -> None:
    with pytest.raises(DataError, match="nothing in it that the model of x predicts"):
        meet(shapes, Classes(semantic=((0, "sky"),)), "x")


def test_semantic_maps_are_numbered_by_name(demo_data: Path) -> None:
    config = SemanticPngDatasetConfig(
        format="semantic_png",
        images=str(demo_data / "val"),
        labels=str(demo_data / "semantic_val"),
        classes=str(demo_data / "semantic_classes.json"),
    )
    dataset = SemanticPngDataset(config)
    names = [name for _, name in dataset.classes.semantic]
    before = [dataset.semantic_map(i) for i in range(len(dataset))]
    order = [3, 5, 0, 1, 4, 2]
    known = Classes(semantic=(*((i, names[n]) for i, n in enumerate(order)), (6, "sea")))
    found = meet(dataset, known, "x").semantic
    assert [name for _, name in found] == [*(names[n] for n in order), "sea"]
    for i, old in enumerate(before):
        new = dataset.semantic_map(i)
        for number, n in enumerate(order):
            assert np.array_equal(new == number, old == n)


def test_semantic_classes_of_one_name_are_distinguished_by_id(tmp_path: Path) -> None:
    """Two of ADE20K's classes are a "screen"; data with the same ids keep both."""
    for folder in ("images", "labels"):
        (tmp_path / folder).mkdir()
        Image.fromarray(np.array([[0, 1, 2, 255]], np.uint8)).save(tmp_path / folder / "a.png")
    config = SemanticPngDatasetConfig(
        format="semantic_png",
        images=str(tmp_path / "images"),
        labels=str(tmp_path / "labels"),
        classes=("screen", "wall", "screen"),
    )
    dataset = SemanticPngDataset(config)
    known = Classes(semantic=((5, "sea"), *dataset.classes.semantic))
    meet(dataset, known, "x")
    assert dataset.semantic_map(0).tolist() == [[1, 2, 3, 255]]


def test_stuff_is_numbered_by_name(demo_data: Path) -> None:
    dataset = CocoPanopticDataset(
        demo_data / "panoptic_val.json", demo_data / "val", demo_data / "panoptic_val"
    )
    before = [dataset.semantic_map(i) for i in range(len(dataset))]
    (first, dark), (second, light) = STUFF.items()
    semantic = (THINGS, (1, "sea"), (2, light), (3, dark))
    found = meet(dataset, Classes(objects=SHAPES, semantic=semantic), "x")
    assert found.semantic == (THINGS, (-1, "sea"), (second, light), (first, dark))
    for i, old in enumerate(before):
        new = dataset.semantic_map(i)
        assert np.array_equal(new, np.array([0, 3, 2, *[255] * 253], np.uint8)[old])
