"""COCO scores against the official numbers for cocoapi's example results, and mapping back to the image."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from pycocotools import mask as mask_util

from giantdet.config.architectures.mask_rcnn import MaskRcnnConfig
from giantdet.config.types import DataConfig
from giantdet.data.coco import CocoDataset
from giantdet.data.loader import eval_loader
from giantdet.data.streams import BOXES_AND_MASKS
from giantdet.data.truth import ground_truth
from giantdet.engine.evaluate import evaluate as evaluate_model
from giantdet.engine.predict import no_targets
from giantdet.evaluation import primary_score
from giantdet.evaluation.coco import (
    all_scores,
    coco_numbers,
    coco_scores,
    evaluate_results,
    score_table,
    to_coco,
)
from giantdet.evaluation.coco_results import CocoResults
from giantdet.structures import Batch, Detections, Outputs


@pytest.fixture
def official(shared: Path) -> Path:
    folder = shared / "data/coco_eval_fixture"
    if not folder.is_dir():
        pytest.skip("needs data/coco_eval_fixture of the developers' reference data")
    return folder


@pytest.mark.parametrize("kind", ["bbox", "segm"])
def test_official_numbers(official: Path, kind: Any) -> None:
    results = json.loads((official / f"instances_val2014_fake{kind}100_results.json").read_text())
    scores = coco_scores(ground_truth(official / "instances_val2014_100.json"), CocoResults.of(results), kind)
    expected = json.loads((official / "expected_pycocotools.json").read_text())[kind]
    values = list(expected.values()) if isinstance(expected, dict) else expected
    assert [scores[name] for name in coco_numbers()] == pytest.approx(values[:12], abs=2e-6)
    # The text shipped with cocoapi: 12 numbers for segm or bbox, each section under its own heading.
    text = (official / "val2014_fake_eval_res.txt").read_text()
    printed = [float(number) for number in re.findall(r"= (-?\d\.\d{3})\s*$", text, re.MULTILINE)]
    blocks = [printed[i : i + 12] for i in range(0, len(printed), 12)]
    assert [round(scores[name], 3) for name in coco_numbers()] in blocks
    # AP is the mean over the classes that have objects.
    classes = [ap for ap in scores["per_class"].values() if ap is not None]
    assert len(scores["per_class"]) == 80
    assert np.mean(classes) == pytest.approx(scores["AP"], abs=1e-9)


def test_no_results_score_zero(official: Path) -> None:
    scores = evaluate_results(official / "instances_val2014_100.json", [], masks=True)
    assert set(scores) == {"box", "mask"}
    assert scores["box"]["AP"] == scores["mask"]["AR100"] == 0.0
    assert "AP by class" in score_table(scores)


def _truth(path: Path) -> Path:
    """Two classes with an object, one without; a crowd."""
    annotations = [
        {"id": 1, "image_id": 7, "category_id": 3, "bbox": [10, 10, 20, 20], "area": 400, "iscrowd": 0},
        {"id": 2, "image_id": 7, "category_id": 9, "bbox": [50, 50, 30, 10], "area": 300, "iscrowd": 0},
    ]
    content = {
        "images": [{"id": 7, "file_name": "7.jpg", "height": 100, "width": 200}],
        "annotations": annotations,
        "categories": [{"id": i, "name": name} for i, name in ((3, "cat"), (5, "unicorn"), (9, "dog"))],
    }
    path.write_text(json.dumps(content))
    return path


def test_box_only_and_by_class(tmp_path: Path) -> None:
    truth = _truth(tmp_path / "truth.json")
    results = [
        {"image_id": 7, "category_id": 3, "bbox": [10, 10, 20, 20], "score": 0.9},
        # IoU 0.8 with its object: a match at the seven thresholds 0.5 to 0.8
        {"image_id": 7, "category_id": 9, "bbox": [50, 50, 24, 10], "score": 0.9},
    ]
    scores = evaluate_results(truth, results, masks=False)
    assert set(scores) == {"box"}
    by_class = scores["box"]["per_class"]
    assert by_class["cat"] == pytest.approx(1.0)
    assert by_class["dog"] == pytest.approx(0.7)
    assert by_class["unicorn"] is None, "no object: null in JSON"
    assert scores["box"]["AP"] == pytest.approx(0.85)
    assert all(name in score_table(scores) for name in ("cat", "dog", "unicorn"))


def _batch() -> Batch:
    """Image 7, 100 x 200 in its file, scaled by a half onto a canvas of 64 x 128, and an empty slot."""
    return Batch(
        images_B3HW=torch.zeros(2, 3, 64, 128, dtype=torch.uint8),
        sizes_B2=torch.tensor([[50.0, 100.0], [64.0, 128.0]]),
        targets=no_targets(2),
        seeds_B=torch.zeros(2, dtype=torch.int64),
        image_ids_B=torch.tensor([7, -1]),
        original_sizes_B2=torch.tensor([[100, 200], [64, 128]]),
    )


def test_to_coco_scales_back_and_skips_padding() -> None:
    detections = Detections(
        boxes_BD4=torch.tensor([[5.0, 5.0, 15.0, 15.0], [90.0, 40.0, 110.0, 60.0], [0, 0, 9, 9]]).repeat(
            2, 1, 1
        ),
        scores_BD=torch.tensor([[0.9, 0.5, 0.1]]).repeat(2, 1),
        labels_BD=torch.tensor([[0, 2, 1]]).repeat(2, 1),
        valid_BD=torch.tensor([[True, True, False]]).repeat(2, 1),
        masks_BDSS=torch.ones(2, 3, 28, 28),
    )
    results = to_coco(detections, _batch(), [3, 5, 9]).records()
    assert [(r["image_id"], r["category_id"]) for r in results] == [(7, 3), (7, 9)]
    assert [r["score"] for r in results] == pytest.approx([0.9, 0.5])
    assert results[0]["bbox"] == [10.0, 10.0, 20.0, 20.0]
    assert results[1]["bbox"] == [180.0, 80.0, 20.0, 20.0], "clipped to the image"
    mask = mask_util.decode(results[0]["segmentation"])
    expected = np.zeros((100, 200), np.uint8)
    expected[10:30, 10:30] = 1
    assert np.array_equal(mask, expected)
    json.dumps(results)
    without = to_coco(detections._replace(masks_BDSS=None), _batch(), [3, 5, 9]).records()
    assert [set(r) for r in without] == [{"image_id", "category_id", "bbox", "score"}] * 2


def test_perfect_masks_score_one(tmp_path: Path) -> None:
    """Through to_coco: an object at half size on the canvas is found at full size in the file."""
    truth = json.loads(_truth(tmp_path / "truth.json").read_text())
    for a in truth["annotations"]:
        x, y, w, h = a["bbox"]
        a["segmentation"] = [[x, y, x + w, y, x + w, y + h, x, y + h]]
    (tmp_path / "truth.json").write_text(json.dumps(truth))
    boxes = torch.tensor([[[5.0, 5, 15, 15], [25, 25, 40, 30]]]).repeat(2, 1, 1)
    detections = Detections(
        boxes_BD4=boxes,
        scores_BD=torch.full((2, 2), 0.8),
        labels_BD=torch.tensor([[0, 2]] * 2),
        valid_BD=torch.ones(2, 2, dtype=torch.bool),
        masks_BDSS=torch.ones(2, 2, 28, 28),
    )
    truth_of = ground_truth(tmp_path / "truth.json")
    scores = all_scores(truth_of, to_coco(detections, _batch(), [3, 5, 9]), masks=True)
    assert scores["box"]["AP"] == pytest.approx(1.0)
    assert scores["mask"]["AP"] == pytest.approx(1.0)


def test_evaluators_score_what_the_model_predicts(demo_data: Path, tmp_path: Path) -> None:
    """A model that knows the truth: masks are scored if the model has them, and give the primary number."""
    dataset = CocoDataset(demo_data / "val.json", demo_data / "val")
    config = DataConfig(size=(64, 64), short_side=64, workers=0, mask_frame=64)
    truth = {
        int(batch.image_ids_B[0]): batch.targets
        for batch in eval_loader(dataset, config, 1, targets=BOXES_AND_MASKS)
    }

    def model(batch: Batch) -> Outputs:
        t = truth[int(batch.image_ids_B[0])]
        side = 28
        whole = torch.ones(*t.valid_BM.shape, side, side)
        return Outputs(Detections(t.boxes_BM4, t.valid_BM * 0.9, t.labels_BM, t.valid_BM, whole))

    found = {}
    for tasks in (("box",), ("box", "mask")):
        found[tasks] = evaluate_model(
            model,
            dataset,
            config,
            1,
            torch.device("cpu"),
            tasks=tasks,
            model_config=MaskRcnnConfig(),
            classes=dataset.classes,
            results=tmp_path / "results.json",
        )
    assert set(found["box",].scores) == {"box"} and found["box",].primary == pytest.approx(1.0)
    both = found["box", "mask"]
    assert set(both.scores) == {"box", "mask"}
    # Boxes are right; the masks fill whole boxes, which is right only for rectangles.
    assert both.scores["box"]["AP"] == pytest.approx(1.0)
    assert both.primary == both.scores["mask"]["AP"] < 0.9
    assert "mask" in both.table and len(json.loads((tmp_path / "results.json").read_text())) > 5


def test_primary_number() -> None:
    scores = {"box": {"AP": 0.3}, "mask": {"AP": 0.2}}
    numbers = {"box": "AP", "mask": "AP"}
    assert primary_score(scores, ("box", "mask"), numbers) == 0.2
    assert primary_score({"box": {"AP": 0.3}}, ("box", "mask"), numbers) == 0.3
    assert primary_score({}, ("box", "mask"), numbers) is None
