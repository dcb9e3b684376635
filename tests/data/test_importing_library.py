"""import-data against supervision, which reads and writes VOC, YOLO and labelme independently."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import supervision as sv
from numpy.typing import NDArray
from PIL import Image

from giantdet.data.coco import CocoDataset
from giantdet.data.importing.convert import convert
from giantdet.data.importing.scene import Request

CLASSES = ["cat", "dog", "bird"]
SIZES = [(64, 48), (50, 70)]  # width, height


@pytest.fixture
def library_set(tmp_path: Path) -> sv.DetectionDataset:
    """Two images with boxes at whole pixels, in and around the corners."""
    rng = np.random.default_rng(3)
    annotations, paths = {}, []
    for n, (width, height) in enumerate(SIZES):
        path = tmp_path / f"images/{n}.png"
        path.parent.mkdir(exist_ok=True)
        Image.fromarray(rng.integers(0, 255, (height, width, 3), np.uint8)).save(path)
        x, y = rng.integers(0, width - 20, 5), rng.integers(0, height - 20, 5)
        boxes = np.stack([x, y, x + rng.integers(2, 20, 5), y + rng.integers(2, 20, 5)], 1).astype(float)
        boxes = np.concatenate([boxes, [[0, 0, width, height]]])
        labels = rng.integers(0, 3, len(boxes))
        annotations[str(path)] = sv.Detections(xyxy=boxes, class_id=labels)
        paths.append(str(path))
    return sv.DetectionDataset(CLASSES, paths, annotations)


def imported(name: str, source: Path, images: Path | None = None) -> CocoDataset:
    result = convert(name, Request(source, images), source.parent / f"out_{name}")
    return CocoDataset(result.files["train"], result.images)


def boxes_of(data: CocoDataset, file: str) -> NDArray[np.float64]:
    """Class position in CLASSES and box of each object, sorted."""
    i = list(data.file_names).index(file)
    objects = data.objects(i)
    labels = [CLASSES.index(data.class_names[label]) for label in objects.labels_N]
    return in_order(np.column_stack([labels, objects.boxes_N4]))


def in_order(rows: NDArray[np.float64]) -> NDArray[np.float64]:
    return rows[np.lexsort(rows.T)]


def library_boxes(data: sv.DetectionDataset, file: str) -> NDArray[np.float64]:
    path = next(path for path in data.image_paths if Path(path).name == file)
    found = data.annotations[path]
    labels = [CLASSES.index(data.classes[label]) for label in found.class_id]
    return in_order(np.column_stack([labels, found.xyxy]))


def test_voc_that_supervision_writes(tmp_path: Path, library_set: sv.DetectionDataset) -> None:
    """Written, read by both, and equal to what was written."""
    library_set.as_pascal_voc(annotations_directory_path=str(tmp_path / "voc"))
    ours = imported("voc", tmp_path / "voc", tmp_path / "images")
    theirs = sv.DetectionDataset.from_pascal_voc(str(tmp_path / "images"), str(tmp_path / "voc"))
    for file in ("0.png", "1.png"):
        assert np.array_equal(boxes_of(ours, file), library_boxes(library_set, file))
        assert np.array_equal(boxes_of(ours, file), library_boxes(theirs, file))


def test_yolo_that_supervision_writes(tmp_path: Path, library_set: sv.DetectionDataset) -> None:
    """Five digits of a share of the image are less than a hundredth of a pixel here."""
    labels, config = tmp_path / "labels", tmp_path / "data.yaml"
    library_set.as_yolo(annotations_directory_path=str(labels), data_yaml_path=str(config))
    ours = imported("yolo", config)
    theirs = sv.DetectionDataset.from_yolo(str(tmp_path / "images"), str(labels), str(config))
    assert ours.class_names == CLASSES
    for file in ("0.png", "1.png"):
        assert np.allclose(boxes_of(ours, file), library_boxes(library_set, file), atol=0.01)
        # supervision lets a box of the whole image leave it by as little.
        assert np.allclose(boxes_of(ours, file), library_boxes(theirs, file), atol=0.01)


def test_polygons_as_supervision_reads_them(tmp_path: Path) -> None:
    """Its masks are drawn by other rules: they may differ along the outline alone."""
    width, height = 64, 48
    (tmp_path / "images").mkdir()
    (tmp_path / "labels").mkdir()
    Image.new("RGB", (width, height)).save(tmp_path / "images/0.png")
    polygon = np.array([[8, 8], [40, 10], [50, 40], [20, 44]])
    text = " ".join(f"{v:.6f}" for v in (polygon / [width, height]).reshape(-1))
    (tmp_path / "labels/0.txt").write_text(f"1 {text}\n")
    (tmp_path / "data.yaml").write_text(json.dumps({"names": CLASSES, "nc": 3}))
    ours = imported("yolo", tmp_path / "data.yaml").objects(0)
    theirs = sv.DetectionDataset.from_yolo(
        str(tmp_path / "images"), str(tmp_path / "labels"), str(tmp_path / "data.yaml")
    ).annotations[str(tmp_path / "images/0.png")]
    assert np.allclose(ours.boxes_N4, [[8, 8, 50, 44]], atol=1e-3)
    mine, other = ours.masks()[0], theirs.mask[0]
    outline = 2 * (32 + 32 + 30 + 40)
    assert (mine != other).sum() < outline and mine.sum() > 1000
    assert (mine & other).sum() / (mine | other).sum() > 0.9


def test_labelme_that_supervision_reads(tmp_path: Path) -> None:
    (tmp_path / "images").mkdir()
    Image.new("RGB", (64, 48)).save(tmp_path / "images/0.png")
    shapes = [
        {"label": "dog", "points": [[30, 40], [10, 5]], "shape_type": "rectangle", "group_id": None},
        {"label": "cat", "points": [[1, 2], [11, 3], [9, 20]], "shape_type": "polygon", "group_id": None},
    ]
    content = {"imagePath": "../images/0.png", "imageWidth": 64, "imageHeight": 48, "shapes": shapes}
    (tmp_path / "labels").mkdir()
    (tmp_path / "labels/0.json").write_text(json.dumps(content | {"version": "5", "flags": {}}))
    ours = imported("labelme", tmp_path / "labels")
    theirs = sv.DetectionDataset.from_labelme(str(tmp_path / "images"), str(tmp_path / "labels"))
    assert np.allclose(boxes_of(ours, "0.png"), library_boxes(theirs, "0.png"))
