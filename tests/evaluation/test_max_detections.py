"""More than COCO's 100 detections per class and image, and data without ground truth."""

from __future__ import annotations

import contextlib
import io
import json
import logging
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from giantdet.config.architectures.mask_rcnn import MaskRcnnConfig
from giantdet.config.architectures.retinanet import RetinaNetConfig
from giantdet.config.architectures.semantic_fpn import SemanticFpnConfig
from giantdet.data.coco import CocoDataset
from giantdet.data.truth import ground_truth
from giantdet.engine.evaluate import warn_of_limits
from giantdet.evaluation.coco import coco_numbers, coco_scores, evaluate_results, score_table
from giantdet.evaluation.coco_results import CocoResults


def crowded(folder: Path, objects: int) -> Path:
    """An image with this number of objects of one class, side by side, and one of another class."""
    boxes = [[8 * (n % 40), 8 * (n // 40), 6, 6] for n in range(objects + 1)]
    annotations = [
        {"id": n + 1, "image_id": 1, "category_id": 1 + (n == objects), "bbox": box, "area": 36, "iscrowd": 0}
        for n, box in enumerate(boxes)
    ]
    content = {
        "images": [{"id": 1, "file_name": "a.png", "width": 320, "height": 320}],
        "categories": [{"id": 1, "name": "cell"}, {"id": 2, "name": "dust"}],
        "annotations": annotations,
    }
    (folder / "truth.json").write_text(json.dumps(content))
    return folder / "truth.json"


def perfect(truth: Path) -> list[dict[str, Any]]:
    records = json.loads(truth.read_text())["annotations"]
    keys = ("image_id", "category_id", "bbox")
    return [{key: record[key] for key in keys} | {"score": 0.9} for record in records]


@pytest.mark.parametrize("kind", ["bbox", "segm"])
def test_with_cocos_limit_the_numbers_equal_pycocotools_bit_for_bit(shared: Path, kind: Any) -> None:
    folder = shared / "data/coco_eval_fixture"
    results = json.loads((folder / f"instances_val2014_fake{kind}100_results.json").read_text())
    truth = ground_truth(folder / "instances_val2014_100.json")
    scores = coco_scores(truth, CocoResults.of(results), kind)
    with contextlib.redirect_stdout(io.StringIO()):
        official = COCO(str(folder / "instances_val2014_100.json"))
        kept = [{k: v for k, v in r.items() if k != "bbox" or kind == "bbox"} for r in results]
        judge = COCOeval(official, official.loadRes(kept), kind)
        judge.evaluate()
        judge.accumulate()
        judge.summarize()
    assert [scores[name] for name in coco_numbers()] == judge.stats.tolist()


@pytest.mark.parametrize(("limit", "recall"), [(100, 100 / 300), (200, 200 / 300), (300, 1.0), (1000, 1.0)])
def test_a_perfect_detector_is_perfect_once_the_limit_holds_all_objects(
    tmp_path: Path, limit: int, recall: float
) -> None:
    truth = crowded(tmp_path, 300)
    scores = evaluate_results(truth, perfect(truth), masks=False, max_detections=limit)["box"]
    assert scores[f"AR{limit}"] == pytest.approx((recall + 1) / 2)
    # AP of a class whose detections are all right: the share of the 101 recall levels that is reached.
    reached = np.mean(np.linspace(0, 1, 101) <= recall + 1e-9)
    assert scores["per_class"] == {"cell": pytest.approx(reached), "dust": pytest.approx(1.0)}
    assert scores["AP"] == pytest.approx((reached + 1) / 2) == scores["APs"]
    assert scores["APl"] == -1.0, "no large object: COCO's own value"
    assert set(scores) == {*coco_numbers(limit), "per_class"}
    assert f"AR{limit}" in score_table({"box": scores})


def test_limits_below_cocos_are_named() -> None:
    assert coco_numbers()[6:9] == ("AR1", "AR10", "AR100")
    assert coco_numbers(10)[6:8] == ("AR1", "AR10") and len(coco_numbers(10)) == 11
    assert coco_numbers(1)[6:7] == ("AR1",) and len(coco_numbers(1)) == 10


@pytest.mark.parametrize(
    ("objects", "predicted", "limit", "words"),
    [
        (300, 1000, 100, "1 images have more than 100 objects of a class, at most 300"),
        (300, 100, 300, "has 301 objects, but the model predicts at most 100"),
        (50, 100, 300, "eval.max_detections is 300, but the model predicts at most 100"),
        (50, 300, 100, "predicts up to 300 objects in an image, but only the best 100"),
        (50, 100, 100, ""),
        (99, 100, 100, ""),
    ],
)
@pytest.mark.parametrize("model", ["mask_rcnn", "retinanet"])
def test_limits_that_hide_objects_give_a_warning(
    tmp_path: Path, caplog: Any, objects: int, predicted: int, limit: int, words: str, model: str
) -> None:
    dataset = CocoDataset(crowded(tmp_path, objects), tmp_path)
    config = (
        MaskRcnnConfig.model_validate({"box_head": {"detections": predicted}})
        if model == "mask_rcnn"
        else RetinaNetConfig.model_validate({"type": "retinanet", "head": {"detections": predicted}})
    )
    with caplog.at_level(logging.WARNING, logger="giantdet"):
        warn_of_limits(dataset, config, limit)
    assert words in caplog.text and bool(caplog.records) == bool(words)


def test_a_model_without_objects_has_no_limit(tmp_path: Path, caplog: Any) -> None:
    warn_of_limits(
        CocoDataset(crowded(tmp_path, 300), tmp_path),
        SemanticFpnConfig.model_validate({"type": "semantic_fpn"}),
        100,
    )
    assert not caplog.records
