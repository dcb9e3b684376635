"""Every backend against COCOeval, and cases unknown to COCOeval: objects to ignore, or without a mask."""

from __future__ import annotations

import contextlib
import copy
import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from bad_inputs.annotations import good_content
from pycocotools import mask as mask_util
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from giantdet.config.types import Backend
from giantdet.data.truth import ground_truth
from giantdet.errors import ConfigError
from giantdet.evaluation import backends
from giantdet.evaluation.backends import BACKENDS
from giantdet.evaluation.coco import coco_numbers, coco_scores
from giantdet.evaluation.coco_results import CocoResults


def found(content: dict[str, Any]) -> list[dict[str, Any]]:
    """Return a perfect detection of each object, by its polygon or box."""
    results = []
    for record in content["annotations"]:
        x, y, w, h = record["bbox"]
        polygon = [x, y, x + w, y, x + w, y + h, x, y + h]
        result = {key: record[key] for key in ("image_id", "category_id", "bbox")}
        results.append(result | {"score": 0.9, "segmentation": rle(polygon)})
    return results


def rle(polygon: list[float]) -> Any:
    return mask_util.frPyObjects([polygon], 20, 40)[0]


@pytest.fixture(params=BACKENDS)
def backend(request: pytest.FixtureRequest) -> Any:
    if request.param != "pycocotools":
        pytest.importorskip(request.param)
    return request.param


def scored(content: dict[str, Any], results: list[dict[str, Any]], kind: Any, backend: Any) -> float:
    truth = ground_truth("a.json", content)
    return float(coco_scores(truth, CocoResults.of(results), kind, backend=backend)["AP"])


@pytest.mark.parametrize("kind", ["bbox", "segm"])
def test_an_ignored_object_is_neither_missed_nor_found(kind: str, backend: Backend) -> None:
    content = good_content()
    results = found(content)
    content["annotations"].append(content["annotations"][0] | {"id": 9, "bbox": [25, 5, 10, 8], "ignore": 1})
    content["annotations"][-1]["segmentation"] = [[25, 5, 35, 5, 35, 13, 25, 13]]
    assert scored(content, results, kind, backend) == pytest.approx(1.0), "not missed"
    best = results[0] | {"bbox": [25, 5, 10, 8], "segmentation": rle([25, 5, 35, 5, 35, 13, 25, 13])}
    assert scored(content, [best | {"score": 0.99}, *results], kind, backend) == pytest.approx(1.0), (
        "not a false positive"
    )
    content["annotations"][-1]["ignore"] = 0
    assert scored(content, results, kind, backend) < 0.9, "without the flag it is missed"


def test_an_object_without_a_mask_counts_only_for_boxes(backend: Backend) -> None:
    content = good_content()
    results = found(content)
    content["annotations"][0]["segmentation"] = [[]]
    assert (
        scored(content, results, "bbox", backend)
        == scored(content, results, "segm", backend)
        == pytest.approx(1.0)
    )
    small = results[0] | {"segmentation": rle([6, 6, 9, 6, 9, 9]), "score": 0.99}
    assert scored(content, [small, *results[1:]], "segm", backend) == pytest.approx(1.0), "no mask known"
    assert scored(content, results[1:], "segm", backend) == pytest.approx(1.0), "not missed"
    assert scored(content, results[1:], "bbox", backend) < 0.9, "missed as a box"
    elsewhere = small | {"segmentation": rle([30, 2, 38, 2, 38, 9])}
    assert scored(content, [elsewhere, *results[1:]], "segm", backend) < 0.9, "a false positive"


def random_mask(rng: np.random.Generator, box: list[float], size_hw: tuple[int, int], share: float) -> Any:
    """A noisy mask in a box, as compressed RLE; sometimes empty."""
    mask = np.zeros(size_hw, np.uint8)
    x0, y0, x1, y1 = (max(int(v), 0) for v in (box[0], box[1], box[0] + box[2], box[1] + box[3]))
    inside = mask[y0:y1, x0:x1]
    inside[:] = rng.random(inside.shape) < share * (rng.random() > 0.05)
    encoded = mask_util.encode(np.asfortranarray(mask))
    return {"size": encoded["size"], "counts": encoded["counts"].decode()}


def random_set(seed: int) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Annotations and results with everything that COCOeval treats specially, in random order.

    Crowds, areas at the limits of the ranges, inconsistent boxes, polygons beyond images, images without
    objects or results, a category without objects, equal scores, more than 10 results of a class.
    """
    rng = np.random.default_rng(seed)
    categories = rng.permutation([3, 7, 11, 90, 2]).tolist()
    ids = rng.permutation(np.array([0, 5, 17, 2**40, 2**60, *range(100, 110)])).tolist()
    images: list[dict[str, Any]] = [
        {"id": i, "file_name": f"{i}.jpg", "height": int(h), "width": int(w)}
        for i, h, w in zip(ids, *rng.integers(20, 200, (2, len(ids))), strict=True)
    ]
    objects: list[dict[str, Any]] = []
    results: list[dict[str, Any]] = []
    for image in images:
        size = image["height"], image["width"]

        def add_result(box: list[float], category: int, image: Any = image, size: Any = size) -> None:
            mask = random_mask(rng, box, size, rng.choice([0.5, 0.9, 1]))
            score = float(np.float32(round(rng.random(), 1) if rng.random() < 0.7 else rng.random()))
            keys = {"image_id": image["id"], "category_id": category, "score": score}
            results.append(keys | {"bbox": box, "segmentation": mask})

        for _ in range(rng.integers(0, 9) if rng.random() < 0.8 else 0):
            x, y = rng.uniform(0, image["width"] - 2), rng.uniform(0, image["height"] - 2)
            w, h = rng.uniform(1, image["width"] - x), rng.uniform(1, image["height"] - y)
            kind, category = rng.integers(8), categories[rng.integers(4)]
            box = [float(round(v)) for v in (x, y, w, h)] if kind == 0 else [x, y, w, h]
            area = rng.choice([1024.0, 9216, w * h, w * h / 2, 0])
            polygon = [x, y, x + 1.2 * w, y, x + w, y + h, x - 3, y + h / 2]
            masks = [polygon, [x, y, x + w / 2, y, x + w / 2, y + h / 2]] if kind == 1 else [polygon]
            mask = random_mask(rng, box, size, 0.6) if kind == 2 else masks
            if kind == 3:
                box[2] = 0.25
            crowd = int(kind == 4 or (kind == 2 and rng.random() < 0.5))
            keys = {"id": len(objects) + 1, "image_id": image["id"], "category_id": category}
            objects.append(keys | {"bbox": box, "area": float(area), "iscrowd": crowd, "segmentation": mask})
            for _ in range(rng.integers(0, 5)):
                near = (np.array(box) + rng.normal(0, 0.08, 4) * [w, h, w, h] * (rng.random() > 0.2)).clip(0)
                add_result(near.tolist(), category if rng.random() < 0.9 else categories[rng.integers(5)])
        for _ in range(rng.integers(0, 60) if rng.random() < 0.8 else 0):
            x, y = rng.uniform(0, image["width"] - 2), rng.uniform(0, image["height"] - 2)
            add_result([x, y, *rng.uniform(1, 90, 2).tolist()], categories[rng.integers(5)])
    named = [{"id": number, "name": f"class {number}"} for number in categories]
    order = rng.permutation(len(results))
    return {"images": images, "annotations": objects, "categories": named}, [results[i] for i in order]


def official(
    content: dict[str, Any], results: list[dict[str, Any]], kind: str, max_detections: int
) -> tuple[list[float], list[float | None]]:
    """Return pycocotools' own numbers, and AP by category id."""
    truth = COCO()
    truth.dataset = copy.deepcopy(content)
    left_out = "segmentation" if kind == "bbox" else "bbox"
    kept = [{k: v for k, v in copy.deepcopy(result).items() if k != left_out} for result in results]
    with contextlib.redirect_stdout(io.StringIO()):
        truth.createIndex()
        judge = COCOeval(truth, truth.loadRes(kept), kind)
        judge.params.maxDets = [1, 10, max_detections]
        judge.evaluate()
        judge.accumulate()
        judge.summarize()
    precision = judge.eval["precision"]
    by_class = [precision[:, :, k, 0, -1] for k in range(precision.shape[2])]
    numbers = judge.stats.tolist()
    if max_detections != 100:  # summarize has AP only for 100
        of_all = precision[:, :, :, 0, -1]
        numbers[0] = float(of_all[of_all > -1].mean())
    return numbers, [
        float(values[values > -1].mean()) if (values > -1).any() else None for values in by_class
    ]


@pytest.mark.parametrize("kind", ["bbox", "segm"])
@pytest.mark.parametrize("max_detections", [100, 13])
def test_all_numbers_equal_pycocotools_bit_for_bit(kind: Any, max_detections: int, backend: Backend) -> None:
    compared = 0
    for seed in range(4):
        content, results = random_set(seed)
        numbers, by_class = official(content, results, kind, max_detections)
        truth = ground_truth("a.json", content)
        scores = coco_scores(truth, CocoResults.of(results), kind, max_detections, backend)
        assert [scores[name] for name in coco_numbers(max_detections)] == numbers
        ordered = sorted(content["categories"], key=lambda category: category["id"])
        assert list(scores["per_class"].items()) == [
            (category["name"], value) for category, value in zip(ordered, by_class, strict=True)
        ]
        assert None in by_class, "a category without objects"
        compared += sum(0 < number < 1 for number in numbers)
    assert compared > 40


@pytest.mark.parametrize("kind", ["bbox", "segm"])
def test_the_official_results_have_the_official_numbers(shared: Path, kind: Any, backend: Backend) -> None:
    folder = shared / "data/coco_eval_fixture"
    content = json.loads((folder / "instances_val2014_100.json").read_text())
    results = json.loads((folder / f"instances_val2014_fake{kind}100_results.json").read_text())
    numbers, by_class = official(content, results, kind, 100)
    scores = coco_scores(ground_truth("a.json", content), CocoResults.of(results), kind, backend=backend)
    assert [scores[name] for name in coco_numbers()] == numbers
    assert list(scores["per_class"].values()) == by_class and len(by_class) == 80


@pytest.mark.parametrize("kind", ["bbox", "segm"])
def test_nothing_found_scores_zero(kind: Any, backend: Backend) -> None:
    content, _ = random_set(0)
    scores = coco_scores(ground_truth("a.json", content), CocoResults.of([]), kind, backend=backend)
    assert scores["AP"] == scores["AR100"] == 0.0
    content["annotations"] = []
    scores = coco_scores(ground_truth("a.json", content), CocoResults.of([]), kind, backend=backend)
    assert scores["AP"] == -1.0 and set(scores["per_class"].values()) == {None}


@pytest.mark.parametrize("kind", ["bbox", "segm"])
def test_nan_results_find_nothing(kind: Any, backend: Backend) -> None:
    """A diverged model gets scores too, and the same ones with every backend."""
    content, results = random_set(2)
    nothing = mask_util.encode(np.zeros((20, 40), np.uint8, order="F"))
    lost = [result | {"score": 0.0, "bbox": [0.0] * 4, "segmentation": nothing} for result in results[::3]]
    others = [result for n, result in enumerate(results) if n % 3]
    bad = [r | {"score": float("nan"), "bbox": [float("nan"), *r["bbox"][1:]]} for r in lost]
    truth = ground_truth("a.json", content)
    with_nan, with_nothing = (
        coco_scores(truth, CocoResults.of([*others, *part]), kind, backend=backend) for part in (bad, lost)
    )
    assert with_nan == with_nothing and with_nan["AP"] > 0


def test_a_backend_that_is_not_installed_is_refused_in_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backends, "_hotcoco", None)
    content, results = random_set(0)
    truth = ground_truth("a.json", content)
    with pytest.raises(ConfigError, match=r"giantdet\.eval\.backend is .*pip install .hotcoco") as error:
        coco_scores(truth, CocoResults.of(results), "bbox", backend="hotcoco")
    assert "\n" not in str(error.value)
    automatic = coco_scores(truth, CocoResults.of(results), "bbox")
    assert automatic == coco_scores(truth, CocoResults.of(results), "bbox", backend="pycocotools")


def test_a_too_old_release_counts_as_not_installed() -> None:
    assert backends._installed("numpy", "1.0") is np
    assert backends._installed("numpy", "1000") is None
    assert backends._installed("no-such-distribution", "1.0") is None


def test_results_round_trip_through_arrays() -> None:
    _, results = random_set(1)
    arrays = CocoResults.of(results)
    assert arrays.records() == [
        {key: record[key] for key in ("image_id", "category_id", "bbox", "score", "segmentation")}
        for record in results
    ]
    parts = [CocoResults.of(part) for part in (results[:7], [], results[7:])]
    assert CocoResults.joined(parts).records() == arrays.records()
    boxes = [{k: v for k, v in record.items() if k != "segmentation"} for record in results]
    assert CocoResults.of(boxes).records() == arrays.records(masks=False) and len(boxes) > 100
