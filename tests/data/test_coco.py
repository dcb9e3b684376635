"""Packed annotations against pycocotools; image modes created here with PIL."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from pycocotools.coco import COCO

from giantdet.data.coco import CocoDataset
from giantdet.data.demo import make_demo


def write(
    folder: Path, images: list[Any], annotations: list[Any], categories: list[Any] | None = None
) -> Path:
    categories = [{"id": 5, "name": "five"}, {"id": 2, "name": "two"}] if categories is None else categories
    path = folder / "a.json"
    path.write_text(json.dumps({"images": images, "annotations": annotations, "categories": categories}))
    return path


def against_pycocotools(annotations: Path, images: Path, masks: bool) -> int:
    coco, dataset = COCO(annotations), CocoDataset(annotations, images)
    assert dataset.category_ids == sorted(coco.cats)
    assert dataset.class_names == [coco.cats[i]["name"] for i in dataset.category_ids]
    assert sorted(dataset.image_ids.tolist()) == sorted(coco.imgs)
    assert not dataset.skipped
    total = 0
    for i in range(len(dataset)):
        image_id = int(dataset.image_ids[i])
        expected = coco.loadAnns(coco.getAnnIds(imgIds=image_id, iscrowd=False))
        objects = dataset.objects(i)
        assert objects.ids_N.tolist() == [a["id"] for a in expected]
        assert [dataset.category_ids[n] for n in objects.labels_N] == [a["category_id"] for a in expected]
        boxes = np.array([a["bbox"] for a in expected], np.float64).reshape(-1, 4)
        boxes[:, 2:] += boxes[:, :2]
        np.testing.assert_allclose(objects.boxes_N4, boxes, rtol=1e-6)
        if masks:
            for mask, annotation in zip(objects.masks(), expected, strict=True):
                assert (mask == coco.annToMask(annotation)).all()
        total += len(expected)
    return total


@pytest.mark.parametrize(
    ("name", "split", "objects"),
    [("coco_panoptic200", "val", 707), ("dsb2018_nuclei", "val", 1348), ("fruits_nuts", "train", 127)],
)
def test_equals_pycocotools(shared: Path, name: str, split: str, objects: int) -> None:
    folder = shared / "data" / name
    assert (
        against_pycocotools(folder / f"annotations/instances_{split}.json", folder / "images", True)
        == objects
    )


def test_polygons_of_coco_itself(shared: Path, tmp_path: Path) -> None:
    # polygons of several parts with COCO's two decimals, which often are ties for the rasteriser
    annotations = shared / "data/coco_eval_fixture/instances_val2014_100.json"
    assert against_pycocotools(annotations, tmp_path, True) == 839 - 9


def test_boxes_without_masks_are_filled(shared: Path) -> None:
    folder = shared / "data/bccd"
    dataset = CocoDataset(folder / "annotations/instances_test.json", folder / "images")
    assert not dataset.has_masks and dataset.without_mask == 945
    objects = dataset.objects(0)
    x0, y0, x1, y1 = objects.boxes_N4[0].astype(int)
    expected = np.zeros(objects.size_hw, bool)
    expected[y0:y1, x0:x1] = True
    assert (objects.masks()[0] == expected).all()


def test_demo_is_deterministic_and_consistent(tmp_path: Path) -> None:
    make_demo(tmp_path / "a", 24, 3, size=64, seed=3)
    make_demo(tmp_path / "b", 24, 3, size=64, seed=3)
    for split in ("train", "val"):
        assert (tmp_path / f"a/{split}.json").read_bytes() == (tmp_path / f"b/{split}.json").read_bytes()
        for path in (tmp_path / f"a/{split}").iterdir():
            assert path.read_bytes() == (tmp_path / f"b/{split}" / path.name).read_bytes()
    total = against_pycocotools(tmp_path / "a/train.json", tmp_path / "a/train", True)
    content = json.loads((tmp_path / "a/train.json").read_text())
    assert {type(a["segmentation"]) for a in content["annotations"]} == {list, dict}
    assert {a["category_id"] for a in content["annotations"]} == {1, 3, 4, 7} and total > 48
    dataset = CocoDataset(tmp_path / "a/train.json", tmp_path / "a/train")
    covered = [dataset.objects(i).masks().sum(axis=0).max(initial=0) for i in range(len(dataset))]
    assert max(covered) == 1, "visible masks do not overlap"


RED, GREEN = (250, 10, 20), (10, 240, 30)


def kinds() -> dict[str, tuple[Image.Image, tuple[int, int, int], tuple[int, int, int]]]:
    """Return images by name, with their expected colours left and right."""
    rgb = Image.new("RGB", (40, 20), RED)
    rgb.paste(GREEN, (20, 0, 40, 20))
    grey = np.zeros((20, 40), np.uint8)
    grey[:, 20:] = 200
    cmyk = Image.new("CMYK", (40, 20), (0, 255, 255, 0))
    cmyk.paste((255, 0, 255, 0), (20, 0, 40, 20))
    rgba = rgb.convert("RGBA")
    rgba.putalpha(0)
    palette = Image.new("P", (40, 20), 0)
    palette.putpalette([*RED, *GREEN])
    palette.paste(1, (20, 0, 40, 20))
    light = (200, 200, 200)
    return {
        "rgb.png": (rgb, RED, GREEN),
        "grey.png": (Image.fromarray(grey), (0, 0, 0), light),
        "palette.png": (palette, RED, GREEN),
        "clear_palette.gif": (palette, RED, GREEN),
        "rgba.png": (rgba, RED, GREEN),
        "la.png": (Image.fromarray(grey).convert("LA"), (0, 0, 0), light),
        "bits.png": (Image.fromarray(grey).convert("1", dither=0), (0, 0, 0), (255, 255, 255)),
        "cmyk.tif": (cmyk, (255, 0, 0), (0, 255, 0)),
        "deep.png": (Image.fromarray(grey.astype(np.uint16) * 257), (0, 0, 0), light),
        "deep.tif": (Image.fromarray(grey.astype(np.uint16) * 257), (0, 0, 0), light),
        "deep32.tif": (Image.fromarray(grey.astype(np.int32) * 257), (0, 0, 0), light),
    }


@pytest.mark.parametrize("name", list(kinds()))
def test_image_kinds(tmp_path: Path, name: str) -> None:
    image, left, right = kinds()[name]
    image.save(tmp_path / name)
    path = write(tmp_path, [{"id": 1, "file_name": name, "width": 40, "height": 20}], [])
    pixels = CocoDataset(path, tmp_path).read_image(0)
    assert pixels.shape == (20, 40, 3) and pixels.dtype == np.uint8
    assert tuple(pixels[5, 5]) == left and tuple(pixels[5, 35]) == right


@pytest.mark.parametrize(
    ("orientation", "record_wh", "red_at"),
    [
        (1, (40, 20), "left"),
        (6, (20, 40), "top"),  # the record has the size of the rotated image: rotated clockwise
        (8, (20, 40), "bottom"),
        (6, (40, 20), "left"),  # the record has the size of the stored image: not rotated
        (3, (40, 20), "right"),  # both fit: the orientation is applied
        (6, (30, 20), None),
    ],
)
def test_exif(tmp_path: Path, orientation: int, record_wh: tuple[int, int], red_at: str | None) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    kinds()["rgb.png"][0].save(tmp_path / "x.png", exif=exif)
    record = {"id": 1, "file_name": "x.png", "width": record_wh[0], "height": record_wh[1]}
    dataset = CocoDataset(write(tmp_path, [record], []), tmp_path)
    if red_at is None:
        with pytest.raises(ValueError, match=r"x\.png: the file is 20 x 40, its record says 30 x 20"):
            dataset.read_image(0)
        return
    pixels = dataset.read_image(0)
    assert pixels.shape == (record_wh[1], record_wh[0], 3)
    sides = {"left": pixels[:, 2], "right": pixels[:, -2], "top": pixels[2], "bottom": pixels[-2]}
    assert [name for name, line in sides.items() if (line == RED).all()] == [red_at]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "cannot read the annotations"),
        ("{", "not valid JSON"),
        ("[]", 'no list "images"'),
        ('{"images": [], "categories": []}', 'no list "annotations"'),
        ('{"images": [], "annotations": []}', 'no list "categories"'),
        ('{"images": [], "annotations": [], "categories": []}', "contain no images"),
        ('{"images": [{"id": 1}], "annotations": [], "categories": []}', "contain no categories"),
        ('{"images": [{"id": 1}], "annotations": [], "categories": [{"id": 1}]}', "no usable image"),
    ],
)
def test_unusable_files(tmp_path: Path, text: str | None, message: str) -> None:
    path = tmp_path / "a.json"
    if text is not None:
        path.write_text(text)
    with pytest.raises(ValueError, match=message) as caught:
        CocoDataset(path, tmp_path)
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)


def test_missing_folder(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"image folder .* does not exist"):
        CocoDataset(write(tmp_path, [{"id": 1}], []), tmp_path / "none")
