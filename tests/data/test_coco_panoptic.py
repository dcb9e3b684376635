"""COCO panoptic data sets compared with an independent decoding of their files; bad records."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from pq import read_ids
from pycocotools import mask as mask_util
from pycocotools.coco import COCO
from tiny import edit_json

from giantdet.data.coco_panoptic import CocoPanopticDataset
from giantdet.data.demo import make_demo
from giantdet.data.truth import ground_truth
from giantdet.errors import DataError
from giantdet.structures import IGNORE

SETS = {"coco_panoptic200": ("images", range(0, 100, 9)), "panopticapi_sample2": ("images", range(2))}
INSTANCES = "instances_val.json"


def open_shared(shared: Path, name: str, instances: bool = False) -> CocoPanopticDataset:
    annotations = shared / "data" / name / "annotations"
    file = annotations / "panoptic_val.json"
    own = str(annotations / INSTANCES) if instances else None
    return CocoPanopticDataset(file, shared / "data" / name / SETS[name][0], file.with_suffix(""), own)


@pytest.mark.parametrize("name", SETS)
def test_maps_equal_those_of_the_files(shared: Path, name: str) -> None:
    dataset = open_shared(shared, name)
    content = json.loads(dataset.annotations.read_text())
    records = {record["image_id"]: record for record in content["annotations"]}
    assert not dataset.skipped and len(dataset) == len(records)
    crowds = 0
    for i in SETS[name][1]:
        ids, segments = dataset.panoptic_map(i)
        record = records[int(dataset.image_ids[i])]
        assert (ids == read_ids(dataset.segments / record["file_name"])).all()
        assert [(s.id, s.category, int(s.is_crowd)) for s in segments] == [
            (info["id"], info["category_id"], info["iscrowd"]) for info in record["segments_info"]
        ]
        assert ids.shape == dataset.read_image(i).shape[:2]
        crowds += sum(segment.is_crowd for segment in segments)
    assert crowds > 0, "no crowd among these images: crowds are not tested"


def test_semantic_maps(shared: Path) -> None:
    """Equal to PNG files of all 133 categories: things are 0, stuff is numbered from 1, void is IGNORE."""
    dataset, annotations = (
        open_shared(shared, "coco_panoptic200"),
        shared / "data/coco_panoptic200/annotations",
    )
    classes = json.loads((annotations / "semantic_classes.json").read_text())
    stuff = [entry for entry in classes if not entry["isthing"]]
    assert dataset.classes.semantic == ((0, "things"), *((entry["id"], entry["name"]) for entry in stuff))
    assert len(dataset.classes.objects) == 80 and len(stuff) == 53
    table = np.full(256, IGNORE)
    for entry in classes:
        table[entry["train_id"]] = 0 if entry["isthing"] else 1 + stuff.index(entry)
    for i in SETS["coco_panoptic200"][1]:
        labels = np.array(Image.open(annotations / "semantic_val" / f"{dataset.path(i).stem}.png"))
        assert (dataset.semantic_map(i) == table[labels]).all()


@pytest.mark.parametrize("own_instances", [False, True])
def test_objects(shared: Path, own_instances: bool) -> None:
    """In this data set the segments of things equal the objects of the instances file."""
    dataset = open_shared(shared, "coco_panoptic200", own_instances)
    coco = COCO(str(shared / "data/coco_panoptic200/annotations" / INSTANCES))
    assert dataset.has_masks
    for i in SETS["coco_panoptic200"][1]:
        objects = dataset.objects(i)
        expected = coco.loadAnns(coco.getAnnIds(imgIds=int(dataset.image_ids[i]), iscrowd=False))
        assert [dataset.category_ids[n] for n in objects.labels_N] == [a["category_id"] for a in expected]
        boxes = np.array([a["bbox"] for a in expected], float).reshape(-1, 4)
        assert (objects.boxes_N4 == np.concatenate([boxes[:, :2], boxes[:, :2] + boxes[:, 2:]], 1)).all()
        for n, annotation in enumerate(expected):
            assert (mask_util.decode(objects.rle(n)) == coco.annToMask(annotation)).all()


def test_ground_truth_for_evaluation(shared: Path) -> None:
    """All objects of panopticapi's sample, including crowds, with masks."""
    dataset = open_shared(shared, "panopticapi_sample2")
    truth = ground_truth(dataset.annotations, dataset.instances())
    content = json.loads(dataset.annotations.read_text())
    things = {category["id"] for category in content["categories"] if category["isthing"]}
    expected = {
        (record["image_id"], info["id"]): info
        for record in content["annotations"]
        for info in record["segments_info"]
        if info["category_id"] in things
    }
    assert len(truth.anns) == len(expected) > 20
    assert sum(a["iscrowd"] for a in truth.anns.values()) == sum(s["iscrowd"] for s in expected.values()) > 0
    for record in content["annotations"]:
        ids = read_ids(dataset.segments / record["file_name"])
        found = truth.loadAnns(truth.getAnnIds(imgIds=record["image_id"]))
        own = [info for info in record["segments_info"] if info["category_id"] in things]
        for annotation, info in zip(found, own, strict=True):
            assert annotation["category_id"] == info["category_id"]
            assert (truth.annToMask(annotation) == (ids == info["id"])).all()


# Bad records


@pytest.fixture
def demo(tmp_path: Path) -> Path:
    make_demo(tmp_path, train_images=4, val_images=1, size=64)
    return tmp_path


def opened(demo: Path, change: Callable[[dict[str, Any]], Any] = lambda content: None) -> CocoPanopticDataset:
    file = demo / "panoptic_train.json"
    edit_json(file, change)
    return CocoPanopticDataset(file, demo / "train", demo / "panoptic_train")


def first(content: dict[str, Any]) -> dict[str, Any]:
    """The annotation of the first image."""
    found: dict[str, Any] = content["annotations"][0]
    return found


def new_segment(**fields: Any) -> Callable[[dict[str, Any]], Any]:
    segment = {"id": 77, "category_id": 1, "bbox": [1, 1, 9, 9], "area": 81, "iscrowd": 0} | fields
    return lambda content: first(content)["segments_info"].append(segment)


SKIPPED: dict[str, tuple[Callable[[dict[str, Any]], Any], str]] = {
    "no segments_info": (lambda content: first(content).pop("segments_info"), "no segments_info"),
    "segments_info is null": (lambda c: first(c).update(segments_info=None), "no segments_info"),
    "no file name": (lambda content: first(content).pop("file_name"), "bad file name"),
    "a path outside": (lambda content: first(content).update(file_name="../0.png"), "bad file name"),
    "no image of the id": (lambda content: first(content).update(image_id=99), "unknown image"),
    "an id that is a list": (lambda content: first(content).update(image_id=[1]), "bad annotation"),
    "two of one image": (lambda c: c["annotations"].append({**first(c)}), "duplicate annotation"),
    "id 0, which is void": (new_segment(id=0, category_id=92), "bad segment"),
    "an unknown category": (new_segment(category_id=5), "bad segment"),
    "a category as text": (new_segment(category_id="1"), "bad segment"),
    "no segment": (lambda content: first(content)["segments_info"].append(None), "bad segment"),
}


@pytest.mark.parametrize("what", SKIPPED)
def test_records_that_cannot_be_used_are_counted(
    demo: Path, what: str, caplog: pytest.LogCaptureFixture
) -> None:
    change, kind = SKIPPED[what]
    with caplog.at_level(logging.WARNING, logger="giantdet"):
        dataset = opened(demo, change)
    assert dict(dataset.skipped) == {kind: 1} and f"skipped 1 ({kind})" in caplog.text
    assert len(dataset) == 4
    # The annotation of the whole image is dropped, or only one segment.
    lost = kind not in ("bad segment", "duplicate annotation")
    assert dataset.training_indices(True).tolist() == ([1, 2, 3] if lost else [0, 1, 2, 3])
    assert len(dataset.objects(0)) == 0 if lost else len(dataset.objects(0)) > 0
    if lost:
        with pytest.raises(DataError, match=r"image 1 has no PNG file of segments"):
            dataset.semantic_map(0)


def broken_png(file: Path) -> None:
    """Corrupt the file from the middle on: PIL opens it and fails later."""
    content = bytearray(file.read_bytes())
    content[len(content) // 2 :] = b"\0" * (len(content) - len(content) // 2)
    file.write_bytes(content)


FILES: dict[str, tuple[Callable[[Path], Any], str]] = {
    "missing": (lambda file: file.unlink(), "000000.png: No such file or directory"),
    "empty": (lambda file: file.write_bytes(b""), "000000.png: cannot identify image file"),
    "broken": (broken_png, "000000.png: "),
    "of another size": (
        lambda file: Image.new("RGB", (32, 64)).save(file),
        r"000000.png: it has \(64, 32\) pixels, its image \(64, 64\)",
    ),
}


@pytest.mark.parametrize("what", FILES)
def test_files_that_cannot_be_used(demo: Path, what: str, caplog: pytest.LogCaptureFixture) -> None:
    """Every map and mask raises an error; the image's objects are not scored, and named once."""
    change, message = FILES[what]
    dataset = opened(demo)
    change(demo / "panoptic_train/000000.png")
    for read in (dataset.semantic_map, dataset.panoptic_map, lambda i: dataset.objects(i).rle(0)):
        with pytest.raises(DataError, match=message):
            read(0)
    with caplog.at_level(logging.WARNING, logger="giantdet"):
        truth = ground_truth(dataset.annotations, dataset.instances())
    assert caplog.text.count("not scored: ") == 1 and "000000.png" in caplog.text
    ignored = truth.loadAnns(truth.getAnnIds(imgIds=1))
    assert len(ignored) > 0 and all(annotation["iscrowd"] for annotation in ignored)
    assert not any(truth.anns[n]["iscrowd"] for n in truth.getAnnIds(imgIds=[2, 3, 4]))


def test_a_segment_without_pixels(demo: Path, caplog: pytest.LogCaptureFixture) -> None:
    """The segment's object cannot be trained on or scored; the other objects and the maps can."""
    dataset = opened(demo, new_segment())
    whole = dataset.semantic_map(0)
    objects = dataset.objects(0)
    assert objects.ids_N[-1] == 77
    with pytest.raises(DataError, match=r"000000\.png: no pixel has the id 77"):
        objects.rle(len(objects) - 1)
    assert mask_util.area(objects.rle(0)) > 0 and (whole != IGNORE).any()
    truth = ground_truth(dataset.annotations, dataset.instances())
    assert "no pixel has the id 77" in caplog.text
    assert [a["iscrowd"] for a in truth.loadAnns(truth.getAnnIds(imgIds=1))][-2:] == [0, 1]


def test_pixels_of_no_segment_are_void(demo: Path, caplog: pytest.LogCaptureFixture) -> None:
    def forget(content: dict[str, Any]) -> None:
        first(content)["segments_info"].pop(0)

    intact = opened(demo).panoptic_map(0)
    dataset = opened(demo, forget)
    lost = intact.segments[0].id
    for _ in range(2):
        ids, segments = dataset.panoptic_map(0)
    assert [s.id for s in segments] == [s.id for s in intact.segments[1:]]
    assert (ids == np.where(intact.ids_HW == lost, 0, intact.ids_HW)).all()
    assert (dataset.semantic_map(0)[intact.ids_HW == lost] == IGNORE).all()
    share = 100 * (intact.ids_HW == lost).mean()
    assert caplog.text.count(f"the id {lost} ({share:.1f}% of the pixels) belongs to no segment") == 1


def test_crowds_are_in_the_maps_but_are_not_objects(demo: Path) -> None:
    def crowd(content: dict[str, Any]) -> None:
        first(content)["segments_info"][0]["iscrowd"] = 1

    whole = opened(demo)
    objects, expected = len(whole.objects(0)), whole.semantic_map(0)
    dataset = opened(demo, crowd)
    assert len(dataset.objects(0)) == objects - 1 and (dataset.semantic_map(0) == expected).all()
    assert dataset.panoptic_map(0).segments[0].is_crowd
    truth = ground_truth(dataset.annotations, dataset.instances())
    assert sum(annotation["iscrowd"] for annotation in truth.anns.values()) == 1


def test_only_stuff(demo: Path) -> None:
    def stuff(content: dict[str, Any]) -> None:
        for category in content["categories"]:
            category["isthing"] = 0

    with pytest.raises(DataError, match=r"panoptic_train\.json have no category with isthing 1"):
        opened(demo, stuff)


def test_only_things(demo: Path) -> None:
    """A category without `isthing` is a thing."""

    def things(content: dict[str, Any]) -> None:
        for category in content["categories"]:
            category.pop("isthing")

    dataset = opened(demo, things)
    assert dataset.classes.semantic == ((0, "things"),) and len(dataset.classes.objects) == 6
    assert set(np.unique(dataset.semantic_map(0))) <= {0, IGNORE}
