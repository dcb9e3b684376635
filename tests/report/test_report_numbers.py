"""The report's own numbers against pycocotools, supervision, brute force, and by hand."""

from __future__ import annotations

import contextlib
import io
import itertools
import math

import numpy as np
import pytest
import supervision
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval
from scenes import CATEGORIES, scene

from giantdet.evaluation.coco import coco_scores
from giantdet.evaluation.coco_results import CocoResults
from giantdet.report.calibration import reliability, thresholds
from giantdet.report.curves import SIZES, precision
from giantdet.report.differences import ABSENT, differences
from giantdet.report.matching import ImageBoxes, confusion, image_boxes, judge, overlaps
from giantdet.report.section_images import chosen, f1
from giantdet.report.section_scores import extremes

SEEDS = range(8)


def judged_by_coco(
    truth: COCO, results: CocoResults
) -> dict[tuple[int, int], list[tuple[float, bool, bool]]]:
    """Score, right, ignored of the detections of each image and category, by COCOeval at IoU 0.5."""
    with contextlib.redirect_stdout(io.StringIO()):
        found = truth.loadRes(results.records())
        judge_ = COCOeval(truth, found, "bbox")
        judge_.params.iouThrs = np.array([0.5])
        # COCOeval knows no ignored objects but those of an area outside the range.
        for record in truth.dataset["annotations"]:
            if "giantdet_neutral" in record:
                record["area"] = -1.0
        judge_.params.areaRng, judge_.params.areaRngLbl = [[0, 1e10]], ["all"]
        judge_.evaluate()
    return {
        (part["image_id"], part["category_id"]): [
            (score, bool(match) and not ignored, bool(ignored))
            for score, match, ignored in zip(
                part["dtScores"], part["dtMatches"][0], part["dtIgnore"][0], strict=True
            )
        ]
        for part in judge_.evalImgs
        if part is not None
    }


@pytest.mark.parametrize("seed", SEEDS)
def test_right_and_ignored_as_cocoeval(seed: int) -> None:
    truth, results = scene(seed)
    expected = judged_by_coco(truth, results)
    number = {k: category for k, category in enumerate(sorted(CATEGORIES))}
    seen = 0
    for image in image_boxes(truth, results):
        found = judge(image)
        for k, category in number.items():
            of = image.labels_N == k
            mine = list(
                zip(
                    image.scores_N[of].tolist(),
                    found.right_N[of].tolist(),
                    found.ignored_N[of].tolist(),
                    strict=True,
                )
            )
            assert mine == expected.get((image.image_id, category), []), (image.image_id, category)
            seen += len(mine)
    assert seen == len(results.scores_N)


def test_the_scenes_have_what_is_tested() -> None:
    judged = [judge(image) for seed in SEEDS for image in image_boxes(*scene(seed))]
    assert sum(int(j.right_N.sum()) for j in judged) > 50
    assert sum(int(j.ignored_N.sum()) for j in judged) > 10


def test_the_limit_of_detections_is_by_class() -> None:
    truth, results = scene(1)
    full = {image.image_id: image for image in image_boxes(truth, results)}
    for image in image_boxes(truth, results, limit=2):
        for k in range(3):
            everything = full[image.image_id]
            expected = everything.scores_N[everything.labels_N == k][:2].tolist()
            assert image.scores_N[image.labels_N == k].tolist() == expected


def brute_force(image: ImageBoxes, classes: int) -> np.ndarray:
    """The one-to-one pairs that come first in the order of same class, then IoU: taken one by one."""
    counts = np.zeros((classes + 1, classes + 1), int)
    iou = overlaps(image)
    pairs = [
        (image.labels_N[n] != image.labels_G[g], -iou[n, g], n, g)
        for n, g in itertools.product(range(len(image.labels_N)), range(len(image.labels_G)))
        if iou[n, g] >= 0.5 and not image.ignored_G[g]
    ]
    taken_n: set[int] = set()
    taken_g: set[int] = set()
    for _, _, n, g in sorted(pairs):
        if n not in taken_n and g not in taken_g:
            taken_n.add(n)
            taken_g.add(g)
            counts[image.labels_G[g], image.labels_N[n]] += 1
    for g in range(len(image.labels_G)):
        if g not in taken_g and not image.ignored_G[g]:
            counts[image.labels_G[g], classes] += 1
    for n in range(len(image.labels_N)):
        same = [
            g
            for g in range(len(image.labels_G))
            if image.ignored_G[g] and image.labels_G[g] == image.labels_N[n] and iou[n, g] >= 0.5
        ]
        if n not in taken_n and not same:
            counts[classes, image.labels_N[n]] += 1
    return counts


@pytest.mark.parametrize("seed", SEEDS)
def test_confusion_by_brute_force(seed: int) -> None:
    for image in image_boxes(*scene(seed)):
        assert (confusion(image, 3) == brute_force(image, 3)).all()


def test_confusion_as_supervision() -> None:
    """Where no two detections compete for an object: supervision's order of pairs is another."""
    rng = np.random.default_rng(0)
    places = [(20 * x, 20 * y) for x in range(6) for y in range(6)]
    mine = np.zeros((4, 4), np.int64)
    predictions, targets = [], []
    for _ in range(6):
        chosen_ = rng.permutation(len(places))
        boxes = np.array([(*places[p], places[p][0] + 12, places[p][1] + 12) for p in chosen_], float)
        labels_G, labels_N = rng.integers(0, 3, 20), rng.integers(0, 3, 20)
        labels_N = np.where(rng.random(20) < 0.6, labels_G, labels_N)
        objects, found = boxes[:20], boxes[8:28] + rng.uniform(-2, 2, (20, 4))
        labels_N = np.concatenate([labels_N[8:], rng.integers(0, 3, 8)])
        scores = rng.uniform(0.3, 1, 20)
        targets.append(supervision.Detections(objects, class_id=labels_G))
        predictions.append(supervision.Detections(found, class_id=labels_N, confidence=scores))
        order = np.argsort(-scores)
        none = np.zeros(20, bool)
        image = ImageBoxes(
            1,
            *(np.concatenate([found[:, :2], found[:, 2:] - found[:, :2]], 1)[order], labels_N[order]),
            *(scores[order], order),
            *(np.concatenate([objects[:, :2], objects[:, 2:] - objects[:, :2]], 1), labels_G, none, none),
        )
        mine += confusion(image.above(0.3), 3)
    theirs = supervision.ConfusionMatrix.from_detections(
        predictions=predictions,
        targets=targets,
        classes=list(CATEGORIES.values()),
        conf_threshold=0.3,
        iou_threshold=0.5,
    )
    assert mine.sum() > 100
    assert (theirs.matrix == mine).all()


@pytest.mark.parametrize("seed", SEEDS)
def test_the_area_below_the_curves_is_ap(seed: int) -> None:
    truth, results = scene(seed, images=25)
    expected = coco_scores(truth, results, "bbox", 100, "pycocotools")
    found = precision(truth, results, "bbox", 100, "pycocotools")
    curve = found.curve(0.5)
    assert curve is not None
    assert curve.mean() == pytest.approx(expected["AP50"], abs=1e-12)
    assert found.ap() == pytest.approx(expected["AP"], abs=1e-12)
    assert found.ap(iou=0.75) == pytest.approx(expected["AP75"], abs=1e-12)
    for area, size in enumerate(SIZES, 1):
        ap = found.ap(area=area)
        assert (-1 if ap is None else ap) == pytest.approx(expected[f"AP{size[0]}"], abs=1e-12)
    for k, name in enumerate(found.names_K):
        assert found.ap(k) == pytest.approx(expected["per_class"][name])


def test_reliability_by_hand() -> None:
    """Bins [0, 0.5) and [0.5, 1]: precision 1/2 at a mean score of 0.3, and 2/3 at 0.8."""
    scores = np.array([0.2, 0.4, 0.5, 0.9, 1.0])
    bins = reliability(scores, np.array([True, False, False, True, True]), bins=2)
    assert bins.counts_Q.tolist() == [2, 3]
    assert bins.score_Q.tolist() == pytest.approx([0.3, 0.8])
    assert bins.precision_Q.tolist() == pytest.approx([1 / 2, 2 / 3])
    assert bins.error == pytest.approx(2 / 5 * 0.2 + 3 / 5 * (0.8 - 2 / 3))


def test_reliability_of_nothing() -> None:
    bins = reliability(np.zeros(0), np.zeros(0, bool))
    assert bins.counts_Q.tolist() == [0] * 10
    assert np.isnan(bins.precision_Q).all() and math.isnan(bins.error)


def test_thresholds_by_hand() -> None:
    """4 objects; from 0.6 on there are two detections, both right: precision 1, recall 1/2, F1 2/3."""
    scores, right = np.array([0.9, 0.6, 0.5, 0.2]), np.array([True, True, False, True])
    found = thresholds(scores, right, objects=4)
    at = {round(t, 2): n for n, t in enumerate(found.threshold_T.tolist())}
    assert found.precision_T[at[0.6]] == 1 and found.recall_T[at[0.6]] == 0.5
    assert found.f1_T[at[0.6]] == pytest.approx(2 / 3)
    assert found.precision_T[at[0.2]] == 0.75 and found.recall_T[at[0.2]] == 0.75  # the score itself counts
    assert found.f1_T[at[0.21]] == pytest.approx(2 * 2 / (3 + 4))
    assert found.best == 0.01  # the first of those where F1 is 3/4
    assert math.isnan(found.precision_T[at[0.95]])


def test_f1_of_an_image_by_hand() -> None:
    truth, results = scene(3, crowds=False)
    for image in image_boxes(truth, results):
        found = judge(image)
        kept = image.scores_N >= 0.5
        right = int((found.right_N & kept).sum())
        wrong, missed = int(kept.sum()) - right, len(image.labels_G) - right
        expected = right / (right + (wrong + missed) / 2) if right + wrong + missed else math.nan
        assert f1(image, found, 0.5) == pytest.approx(expected, nan_ok=True)


def test_chosen_images_are_different_ones() -> None:
    scores = {n: n / 10 for n in range(8)} | {20: math.nan, 21: 0.7}
    found = chosen(scores, lambda image: image)
    by_kind = {kind: [i for name, i in found if name == kind] for kind, _ in found}
    assert by_kind["best"] == [21, 7, 6]  # of equal scores that of larger size
    assert by_kind["worst"] == [0, 1, 2]
    assert set(by_kind["random"]) <= {3, 4, 5, 20} and len(by_kind["random"]) == 3
    assert found == chosen(dict(reversed(scores.items())), lambda image: image)


def test_extremes_of_many_classes() -> None:
    values: dict[str, list[float | None]] = {str(n): [0.0, n / 100] for n in range(30)}
    values |= {"absent": [0.0, None], "nan": [0.0, math.nan]}
    shown, note = extremes(values, most=4)
    assert list(shown) == ["29", "28", "1", "0"]
    assert note == "2 more classes have no score. The best 2 and the worst 2 of 30 classes."
    assert extremes({"b": [0.1], "a": [0.2]}) == ({"a": [0.2], "b": [0.1]}, "")


def test_differences_name_the_keys() -> None:
    before = {"a": {"b": 1, "c": [1, 2]}, "gone": "auto", "same": {"x": None}}
    now = {"a": {"b": 2, "c": [1, 2]}, "same": {"x": None}, "new": {"y": {"z": 3}}}
    assert [tuple(d) for d in differences(before, now)] == [
        ("a.b", 1, 2),
        ("new.y.z", ABSENT, 3),
        ("gone", "auto", ABSENT),
    ]
