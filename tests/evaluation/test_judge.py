"""Objects to ignore and objects without a mask in COCO's scores; without them the scores are COCOeval's."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from bad_inputs.annotations import good_content
from pycocotools import mask as mask_util
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from giantdet.data.truth import ground_truth
from giantdet.evaluation.coco import coco_scores
from giantdet.evaluation.judge import CocoJudge


def found(content: dict[str, Any]) -> list[dict[str, Any]]:
    """A perfect detection of each object, by its polygon or box."""
    results = []
    for record in content["annotations"]:
        x, y, w, h = record["bbox"]
        polygon = [x, y, x + w, y, x + w, y + h, x, y + h]
        result = {key: record[key] for key in ("image_id", "category_id", "bbox")}
        results.append(result | {"score": 0.9, "segmentation": rle(polygon)})
    return results


def rle(polygon: list[float]) -> Any:
    return mask_util.frPyObjects([polygon], 20, 40)[0]


def scored(content: dict[str, Any], results: list[dict[str, Any]], kind: Any) -> float:
    return float(coco_scores(ground_truth("a.json", content), results, kind)["AP"])


@pytest.mark.parametrize("kind", ["bbox", "segm"])
def test_an_ignored_object_is_neither_missed_nor_found(kind: str) -> None:
    content = good_content()
    results = found(content)
    content["annotations"].append(content["annotations"][0] | {"id": 9, "bbox": [25, 5, 10, 8], "ignore": 1})
    content["annotations"][-1]["segmentation"] = [[25, 5, 35, 5, 35, 13, 25, 13]]
    assert scored(content, results, kind) == pytest.approx(1.0), "not missed"
    best = results[0] | {"bbox": [25, 5, 10, 8], "segmentation": rle([25, 5, 35, 5, 35, 13, 25, 13])}
    assert scored(content, [best | {"score": 0.99}, *results], kind) == pytest.approx(1.0), (
        "not a false positive"
    )
    content["annotations"][-1]["ignore"] = 0
    assert scored(content, results, kind) < 0.9, "without the flag it is missed"


def test_an_object_without_a_mask_counts_for_boxes_alone() -> None:
    content = good_content()
    results = found(content)
    content["annotations"][0]["segmentation"] = [[]]
    assert scored(content, results, "bbox") == scored(content, results, "segm") == pytest.approx(1.0)
    small = results[0] | {"segmentation": rle([6, 6, 9, 6, 9, 9]), "score": 0.99}
    assert scored(content, [small, *results[1:]], "segm") == pytest.approx(1.0), "its mask is not known"
    assert scored(content, results[1:], "segm") == pytest.approx(1.0), "not missed"
    assert scored(content, results[1:], "bbox") < 0.9, "missed as a box"
    elsewhere = small | {"segmentation": rle([30, 2, 38, 2, 38, 9])}
    assert scored(content, [elsewhere, *results[1:]], "segm") < 0.9, "a false positive outside its box"


@pytest.mark.parametrize("kind", ["bbox", "segm"])
def test_without_such_objects_it_is_cocoeval(shared: Path, kind: str) -> None:
    truth = COCO(shared / "data/coco_eval_fixture/instances_val2014_100.json")
    results = []
    rng = np.random.default_rng(0)
    for annotation in list(truth.anns.values())[:200]:
        moved = (np.array(annotation["bbox"]) + rng.uniform(0, 5, 4)).tolist()
        shape = {"bbox": moved} if kind == "bbox" else {"segmentation": truth.annToRLE(annotation)}
        keys = {key: annotation[key] for key in ("image_id", "category_id")}
        results.append(keys | shape | {"score": float(rng.uniform())})
    stats = []
    for judge in (COCOeval, CocoJudge):
        one = judge(truth, truth.loadRes(copy.deepcopy(results)), kind)
        one.evaluate()
        one.accumulate()
        one.summarize()
        stats.append(one.stats)
    assert (stats[0] == stats[1]).all() and stats[0][0] > 0
