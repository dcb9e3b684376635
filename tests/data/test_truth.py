"""Ground truth of an evaluation: a good file is read as by pycocotools, of others what is usable."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from pycocotools import mask as mask_util
from pycocotools.coco import COCO

from giantdet.data.truth import BOX_ONLY, ground_truth
from giantdet.evaluation.coco import coco_scores
from giantdet.evaluation.coco_results import CocoResults


def write(path: Path, content: Any) -> Path:
    path.write_text(json.dumps(content))
    return path


def test_a_valid_file_is_read_as_by_pycocotools(demo_data: Path, caplog: pytest.LogCaptureFixture) -> None:
    theirs, ours = COCO(demo_data / "train.json"), ground_truth(demo_data / "train.json")
    assert ours.imgs == theirs.imgs and sorted(ours.cats) == sorted(theirs.cats)
    assert len(ours.anns) == len(theirs.anns) > 20 and not caplog.text
    for mine, other in zip(ours.anns.values(), theirs.anns.values(), strict=True):
        assert {k: v for k, v in mine.items() if k not in ("id", "segmentation")} == {
            k: v for k, v in other.items() if k not in ("id", "segmentation")
        }
        assert (ours.annToMask(mine) == theirs.annToMask(other)).all()


def test_a_missing_area_is_computed_from_the_mask(demo_data: Path, tmp_path: Path) -> None:
    content = json.loads((demo_data / "train.json").read_text())
    for record in content["annotations"]:
        del record["area"], record["iscrowd"]
    content["annotations"][0]["segmentation"] = None
    truth = ground_truth(write(tmp_path / "bare.json", content))
    first, *others = truth.anns.values()
    assert first["area"] == first["bbox"][2] * first["bbox"][3]
    assert len(others) > 20 and all(record["iscrowd"] == 0 for record in others)
    assert [record["area"] for record in others] == [truth.annToMask(record).sum() for record in others]


@pytest.mark.parametrize("ids", [[0, 1], [5, 5], ["a", None], [10**30, -1]])
def test_every_object_can_be_matched_whatever_its_id(ids: list[Any], tmp_path: Path) -> None:
    """pycocotools treats id 0 as no match, and counts an object twice if two share an id."""
    boxes = [[1, 1, 10, 10], [20, 5, 12, 9]]
    content = {
        "images": [{"id": 1, "file_name": "a.png", "width": 40, "height": 20}],
        "categories": [{"id": 1, "name": "cell"}],
        "annotations": [
            {"id": id, "image_id": 1, "category_id": 1, "bbox": box, "area": 100, "iscrowd": 0}
            for id, box in zip(ids, boxes, strict=True)
        ],
    }
    results = [{"image_id": 1, "category_id": 1, "bbox": box, "score": 0.9} for box in boxes]
    scores = coco_scores(ground_truth(write(tmp_path / "a.json", content)), CocoResults.of(results), "bbox")
    assert scores["AP"] == scores["AR100"] == pytest.approx(1.0)


def test_an_object_with_an_inconsistent_rle_is_a_box(
    demo_data: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """pycocotools loops forever when it evaluates such an RLE."""
    content = json.loads((demo_data / "train.json").read_text())
    rle = mask_util.encode(np.asfortranarray(np.eye(64, dtype=np.uint8)))
    content["annotations"][3]["segmentation"] = {
        "size": [64, 64],
        "counts": rle["counts"].decode()[:-4] + "0",
    }
    with caplog.at_level(logging.WARNING, logger="giantdet"):
        truth = ground_truth(write(tmp_path / "cut.json", content))
    assert len(truth.anns) == len(content["annotations"]) and BOX_ONLY in truth.anns[4]
    assert not caplog.text, "CocoDataset has reported it"
