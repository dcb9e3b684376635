"""Regions that are neither objects nor background: crowds, ignored objects and void pixels."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from pycocotools import mask as mask_util

from giantdet.config.types import DataConfig
from giantdet.data.coco import CocoDataset
from giantdet.data.coco_panoptic import CocoPanopticDataset
from giantdet.data.demo import make_demo
from giantdet.data.joined import JoinedDataset
from giantdet.data.loader import eval_loader, train_loader
from giantdet.structures import IGNORE

HEIGHT, WIDTH = 40, 60


@pytest.fixture
def crowded(tmp_path: Path) -> tuple[CocoDataset, list[np.ndarray[Any, Any]]]:
    """Two images: one with an object, three kinds of crowds and an ignored object; one with an object."""
    masks = [np.zeros((HEIGHT, WIDTH), bool) for _ in range(2)]
    masks[0][5:15, 10:30] = masks[0][20:30, 2:12] = masks[0][30:38, 40:58] = masks[0][2:6, 50:56] = True
    drawn = np.zeros((HEIGHT, WIDTH), np.uint8)
    drawn[5:15, 10:30] = 1
    runs = np.concatenate([[0], drawn.T.flatten(), [0]]).astype(int)
    edges = np.flatnonzero(np.diff(runs)).tolist()
    counts = np.diff([0, *edges, HEIGHT * WIDTH]).tolist()
    rle = {"size": [HEIGHT, WIDTH], "counts": counts}
    common = {"image_id": 1, "category_id": 1}
    annotations = [
        {"bbox": [20, 20, 10, 10], **common, "segmentation": [[20, 20, 30, 20, 30, 30, 20, 30]]},
        {
            "bbox": [10, 5, 20, 10],
            **common,
            "iscrowd": 1,
            "segmentation": rle,
        },
        {"bbox": [2, 20, 10, 10], **common, "iscrowd": 1, "segmentation": [[2, 20, 12, 20, 12, 30, 2, 30]]},
        {"bbox": [40, 30, 18, 8], **common, "iscrowd": 1},
        {"bbox": [50, 2, 6, 4], **common, "ignore": 1},
        {"bbox": [1, 1, 9, 9], **common, "image_id": 2},
    ]
    assert np.array_equal(mask_util.decode(mask_util.frPyObjects(rle, HEIGHT, WIDTH)), drawn)
    content = {
        "images": [{"id": i, "file_name": f"{i}.png", "height": HEIGHT, "width": WIDTH} for i in (1, 2)],
        "categories": [{"id": 1, "name": "thing"}],
        "annotations": [{"id": n, "area": 1.0, "iscrowd": 0} | a for n, a in enumerate(annotations, 1)],
    }
    for i in (1, 2):
        Image.fromarray(np.zeros((HEIGHT, WIDTH, 3), np.uint8)).save(tmp_path / f"{i}.png")
    (tmp_path / "crowds.json").write_text(json.dumps(content))
    return CocoDataset(tmp_path / "crowds.json", tmp_path), masks


def union(rles: list[dict[str, Any]], shape: tuple[int, int]) -> np.ndarray[Any, Any]:
    found = np.zeros(shape, bool)
    for rle in rles:
        found |= mask_util.decode(rle).astype(bool)
    return found


def test_crowds_and_ignored_objects(crowded: Any) -> None:
    dataset, masks = crowded
    for i, mask in enumerate(masks):
        assert len(dataset.objects(i)) == 1
        assert np.array_equal(union(dataset.ignored(i), (HEIGHT, WIDTH)), mask)
    joined = JoinedDataset([dataset, dataset], [dataset.classes, dataset.classes])
    assert [len(joined.ignored(i)) for i in range(4)] == [4, 0, 4, 0]


def test_loader_delivers_the_map(crowded: Any) -> None:
    """The map at its size and mirrored, with the padding; without this target there is no map."""
    dataset, masks = crowded
    base = {"size": (64, 96), "short_side": HEIGHT, "max_objects": 2, "workers": 0}
    for flip in (0.0, 1.0):
        config = DataConfig.model_validate({**base, "augment": {"flip": flip}})
        batch = next(train_loader(dataset, config, 2, seed=1, targets=frozenset({"boxes", "ignored"})))
        for b, image_id in enumerate(batch.image_ids_B.tolist()):
            expected = np.full((64, 96), IGNORE, np.uint8)
            mask = masks[image_id - 1]
            expected[:HEIGHT, :WIDTH] = np.where(mask[:, ::-1] if flip else mask, IGNORE, 0)
            assert np.array_equal(batch.targets.semantic_BHW[b].numpy(), expected)
    batch = next(eval_loader(dataset, config, 3, targets=frozenset({"boxes", "ignored"})))
    assert batch.targets.semantic_BHW.shape == (3, 64, 96)
    assert next(train_loader(dataset, config, 2)).targets.semantic_BHW.numel() == 0


def test_panoptic_crowds_and_void(tmp_path: Path) -> None:
    make_demo(tmp_path, train_images=3, val_images=1, size=64)
    file = tmp_path / "panoptic_train.json"
    content = json.loads(file.read_text())
    things = {c["id"] for c in content["categories"] if c["isthing"]}
    crowd = next(s for s in content["annotations"][0]["segments_info"] if s["category_id"] in things)
    crowd["iscrowd"] = 1
    gone = content["annotations"][1]["segments_info"].pop()
    file.write_text(json.dumps(content))
    dataset = CocoPanopticDataset(file, tmp_path / "train", tmp_path / "panoptic_train")
    for i, ids in ((0, {crowd["id"]}), (1, {gone["id"]}), (2, set[int]())):
        pixels = np.asarray(Image.open(dataset.segments / str(dataset.segment_files[i])), np.int64)
        mask = np.isin(pixels @ [1, 256, 65536], [0, *ids])
        assert np.array_equal(union(dataset.ignored(i), (64, 64)), mask)
        assert mask.any() or not ids
