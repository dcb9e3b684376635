"""Vertical flips: training samples equal those of data that were mirrored by hand, in their files."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from pycocotools import mask as mask_util

from giantdet.config.types import AugmentConfig, DataConfig
from giantdet.data.dataset import open_dataset
from giantdet.data.demo import make_demo
from giantdet.data.samples import Sample
from giantdet.data.streams import TrainStream
from giantdet.data.transforms import draw_geometry

SIZE, IMAGES = 64, 6
TARGETS = {
    "coco": frozenset({"boxes", "masks", "ignored"}),
    "coco_panoptic": frozenset({"boxes", "masks", "semantic"}),
    "semantic_png": frozenset({"semantic"}),
}


def text(rle: dict[str, Any]) -> dict[str, Any]:
    return {"size": [SIZE, SIZE], "counts": rle["counts"].decode()}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """The demo set in three formats, with more objects and without loss in its images; the same mirrored."""
    folder = tmp_path_factory.mktemp("flips")
    original, mirrored = folder / "original", folder / "mirrored"
    make_demo(original, IMAGES, 0, size=SIZE)
    for path in (original / "train").glob("*.jpg"):
        Image.open(path).save(path.with_suffix(".png"))
        path.unlink()
    for name in ("train.json", "panoptic_train.json"):
        content = json.loads((original / name).read_text().replace(".jpg", ".png"))
        if name == "train.json":
            add_objects(content)
        (original / name).write_text(json.dumps(content))
    shutil.copytree(original, mirrored)
    for path in mirrored.glob("*/*.png"):
        Image.open(path).transpose(Image.Transpose.FLIP_TOP_BOTTOM).save(path)
    for name in ("train.json", "panoptic_train.json"):
        content = json.loads((mirrored / name).read_text())
        for annotation in content["annotations"]:
            for owner in annotation.get("segments_info", [annotation]):
                x, y, width, height = owner["bbox"]
                owner["bbox"] = [x, SIZE - y - height, width, height]
            if "segmentation" in annotation:
                annotation["segmentation"] = upside_down(annotation["segmentation"])
        (mirrored / name).write_text(json.dumps(content))
    return original, mirrored


def add_objects(content: dict[str, Any]) -> None:
    """Add to each image a polygon and a crowd region, and turn the others' polygons into RLEs.

    The polygon has corners at whole pixels: only then is the mirror image of its pixels exactly that of it.
    """
    for annotation in content["annotations"]:
        if isinstance(annotation["segmentation"], list):
            rle = mask_util.frPyObjects(annotation["segmentation"], SIZE, SIZE)[0]
            annotation["segmentation"] = text(rle)
    for n, image in enumerate(content["images"]):
        x, y = 3 + n, 20 + 2 * n
        corners = [x, y, x + 12, y, x + 12, y + 5, x + 5, y + 5, x + 5, y + 17, x, y + 17]  # an L
        crowd = np.zeros((SIZE, SIZE), np.uint8, order="F")
        crowd[2:9, 30 + n : 50] = 1
        new = (
            {"bbox": [x, y, 12, 17], "segmentation": [corners], "iscrowd": 0},
            {"bbox": [30 + n, 2, 20 - n, 7], "segmentation": text(mask_util.encode(crowd)), "iscrowd": 1},
        )
        for number, fields in enumerate(new, 1000 + 2 * n):
            common = {"id": number, "image_id": image["id"], "category_id": 1, "area": 140}
            content["annotations"].append(common | fields)


def upside_down(segmentation: Any) -> Any:
    if isinstance(segmentation, list):
        return [[SIZE - v if n % 2 else v for n, v in enumerate(polygon)] for polygon in segmentation]
    return text(mask_util.encode(np.asfortranarray(mask_util.decode(segmentation)[::-1])))


def samples(folder: Path, name: str, augment: dict[str, Any]) -> list[Sample]:
    section = {
        "coco": {"annotations": str(folder / "train.json")},
        "coco_panoptic": {
            "annotations": str(folder / "panoptic_train.json"),
            "segments": str(folder / "panoptic_train"),
        },
        "semantic_png": {
            "labels": str(folder / "semantic_train"),
            "classes": str(folder / "semantic_classes.json"),
        },
    }[name]
    train = {"format": name, "images": str(folder / "train"), **section}
    given = {"size": SIZE, "short_side": SIZE, "mask_frame": 40, "augment": augment, "train": train}
    config = DataConfig.model_validate(given)
    stream = TrainStream(open_dataset(config.train), config, 0, TARGETS[name])
    return [stream[k] for k in range(2 * IMAGES)]


# Other augmentation; share of a map's changed pixels that may be wrong, because nearest neighbours have ties.
AUGMENT = {
    "alone": ({"flip": 0.0}, 0.0),
    "with a horizontal flip": ({"flip": 1.0}, 0.0),
    "with a crop": ({"flip": 0.5, "jitter": [2.0, 2.0]}, 0.0),
    "with a scale and a crop": ({"flip": 0.5, "jitter": [0.6, 1.8]}, 0.01),
}


@pytest.mark.parametrize("name", TARGETS)
@pytest.mark.parametrize("case", AUGMENT)
def test_flipped_samples_equal_those_of_flipped_data(
    folders: tuple[Path, Path], case: str, name: str
) -> None:
    augment, ties = AUGMENT[case]
    original, mirrored = folders
    found = samples(original, name, augment | {"vertical_flip": 1.0})
    objects, changed, wrong = 0, 0, 0
    for ours, theirs, unflipped in zip(
        found, samples(mirrored, name, augment), samples(original, name, augment), strict=True
    ):
        assert ours.image_id == theirs.image_id and ours.image_hw3.shape == theirs.image_hw3.shape
        # Pillow scales windows before the flip, torch whole images after it.
        assert np.abs(ours.image_hw3.astype(int) - theirs.image_hw3).max() <= 1
        assert (ours.labels_N == theirs.labels_N).all()
        assert (ours.boxes_N4 == theirs.boxes_N4).all(), "64 is a power of two: nothing is rounded"
        assert (ours.frames_N4 == theirs.frames_N4).all()
        assert np.abs(ours.masks_NSS.astype(int) - theirs.masks_NSS).max(initial=0) <= 1
        assert (ours.image_hw3 != unflipped.image_hw3).mean() > 0.5, "it would pass without a flip"
        changed += int((ours.semantic_HW != unflipped.semantic_HW).sum())
        wrong += int((ours.semantic_HW != theirs.semantic_HW).sum())
        objects += len(ours.labels_N)
    assert changed > 500 and wrong <= ties * changed
    assert objects > 2 * IMAGES or "boxes" not in TARGETS[name]


def test_without_vertical_flips_no_number_is_drawn_for_them() -> None:
    """What is drawn later, balanced crops and colours, stays as it was before there were vertical flips."""
    for chance, draws in ((0.0, 0), (0.3, 1)):
        found, expected = np.random.default_rng(3), np.random.default_rng(3)
        config = DataConfig(augment=AugmentConfig(jitter=(1.5, 2.0), vertical_flip=chance))
        geometry = draw_geometry(found, (60, 80), config, training=True)
        expected.uniform(1.5, 2.0)
        for resized, crop in zip(geometry.resized_hw, geometry.size_hw, strict=True):
            expected.integers(resized - crop + 1)
        expected.random(1 + draws)
        assert found.random() == expected.random()


def test_share_of_flips() -> None:
    rng, config = np.random.default_rng(0), DataConfig(augment=AugmentConfig(vertical_flip=0.3))
    drawn = [draw_geometry(rng, (60, 80), config, training=True).flip_yx for _ in range(1000)]
    assert np.mean(drawn, axis=0) == pytest.approx([0.3, 0.5], abs=0.05)
    assert len(set(drawn)) == 4, "the two are independent"
    assert not draw_geometry(rng, (60, 80), config, training=False).flip_y
