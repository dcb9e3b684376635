"""LVIS's federated box and mask scores, with AP of rare, common and frequent categories.

LVIS has too many categories to annotate all of them in every image (Gupta et al. 2019, section 3 and
https://www.lvisdataset.org/dataset). What is known of an image is in its record:

- The categories of its objects are present, those of `neg_category_ids` are absent. Detections of any other
  category are not scored.
- Of those in `not_exhaustive_category_ids` not all objects are annotated: a detection that matches none of
  them is not a false positive.
- The 300 best detections of an image count, over all categories.

All else is as in COCO's scores, so the same programs compute them (`federated`). The reference is lvis-api
0.5.3 of LVIS's authors.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray
from pycocotools import mask as mask_util
from pycocotools.coco import COCO

from giantdet.config.types import Backend
from giantdet.data.lvis import FREQUENCIES, NEGATIVE, NOT_EXHAUSTIVE, frequencies_of
from giantdet.data.records import Instances
from giantdet.evaluation.backends import IouType, Numbers, coco_curves
from giantdet.evaluation.coco import KIND, CocoEvaluator, Rules, ap_by_class, mean_of, number_of, number_table
from giantdet.evaluation.coco_results import CocoResults
from giantdet.evaluation.evaluator import Scores

_FAR = 2.0**24
"""Pixels: boxes of other programs may extend beyond the image."""


class LvisEvaluator(CocoEvaluator):
    """Box and mask AP by LVIS's rules; see `Evaluator`."""

    PROTOCOL: ClassVar[str | None] = "lvis"
    MAX_DETECTIONS: ClassVar[int] = 300
    PER_CLASS: ClassVar[bool] = False

    @classmethod
    def rules(cls, content: Instances) -> Rules:
        """See `lvis_scores`."""
        frequencies = frequencies_of(content)
        return lambda truth, *rest: lvis_scores(truth, frequencies, *rest)

    @classmethod
    def table(cls, scores: Scores) -> str:
        """Return the numbers as text, without a line for each of a thousand categories."""
        return number_table({kind: scores[kind] for kind in KIND.values() if kind in scores})


def lvis_scores(
    truth: COCO,
    frequencies: Mapping[int, str],
    results: CocoResults,
    iou_type: IouType,
    max_detections: int = 300,
    backend: Backend = "auto",
) -> dict[str, Any]:
    """Return LVIS's numbers and `per_class`, AP by category name; -1 and None where no object counts.

    `truth` is that of `data/truth.py` with LVIS's lists in its images, `frequencies` are "r", "c" or "f" by
    category id. `AR300` is LVIS's AR@300; at most `max_detections` of an image count, over all categories.
    """
    truth, results = federated(truth, results, iou_type, max_detections)
    limits = [max_detections]
    curves = coco_curves(truth, results, iou_type, limits, backend)
    scores: dict[str, Any] = {
        name: number_of(curves, limits, name) for name in ("AP", "AP50", "AP75", "APs", "APm", "APl")
    }
    group_K = np.array([frequencies[number] for number in sorted(truth.cats)])
    for group in FREQUENCIES:
        scores[f"AP{group}"] = mean_of(curves.precision_TRKAM[:, :, group_K == group, 0, -1])
    recalls = (f"AR{max_detections}", "ARs", "ARm", "ARl")
    scores |= {name: number_of(curves, limits, name) for name in recalls}
    return scores | {"per_class": ap_by_class(truth, curves)}


def federated(
    truth: COCO, results: CocoResults, iou_type: IouType, max_detections: int
) -> tuple[COCO, CocoResults]:
    """Return a truth and results whose COCO scores are the LVIS scores of these.

    Results are left out by LVIS's first and third rule. For the second, an image gets a crowd region of its
    whole size for each category that is not annotated exhaustively. COCO's rules match a detection with
    objects first, and one that is left with a crowd region, which makes it neither right nor wrong.
    Detections without area are left out, as lvis-api does.
    """
    images, categories = Numbers(truth.imgs), Numbers(truth.cats)

    def pairs(image_ids: Any, category_ids: Any) -> NDArray[np.int64]:
        """Return one number for each image and category; none of a category that the truth does not have."""
        category = categories.of(np.asarray(category_ids, np.int64))
        number = images.of(np.asarray(image_ids, np.int64)) * (len(categories.ids) + 1) + category
        return np.where(category > 0, number, -1)

    def listed(key: str) -> NDArray[np.int64]:
        rows = [(number, category) for number, record in truth.imgs.items() for category in record[key]]
        return np.array(rows, np.int64).reshape(-1, 2)

    negative, open_ = listed(NEGATIVE), listed(NOT_EXHAUSTIVE)
    objects = truth.dataset["annotations"]
    present = pairs([r["image_id"] for r in objects], [r["category_id"] for r in objects])
    known = np.concatenate([present, pairs(negative[:, 0], negative[:, 1])])

    results = _best(results, max_detections)
    pair_N = pairs(results.image_ids_N, results.category_ids_N)
    if iou_type == "segm" and results.rles is not None:
        empty_N = results.rles.areas_N == 0
    else:
        empty_N = ~(results.boxes_N4[:, 2:] > 0).all(1)  # also where it is NaN
    chosen_N = np.isin(pair_N, known) & (pair_N >= 0) & ~empty_N
    judged = COCO()
    judged.dataset = truth.dataset | {"annotations": objects + _regions(truth, open_, len(objects))}
    judged.imgs, judged.cats = truth.imgs, truth.cats
    return judged, results.at(np.flatnonzero(chosen_N))


def _best(results: CocoResults, limit: int) -> CocoResults:
    """Return the best detections of each image in their order; of equal scores the first."""
    order_N = np.lexsort((-np.nan_to_num(results.scores_N), results.image_ids_N))  # stable
    sorted_N = results.image_ids_N[order_N]
    rank_N = np.arange(len(order_N)) - np.searchsorted(sorted_N, sorted_N)
    return results.at(np.sort(order_N[rank_N < limit]))


def _regions(truth: COCO, pairs_N2: NDArray[np.int64], count: int) -> list[dict[str, Any]]:
    """Return a crowd region of the whole image for each image and category; ids follow those of objects."""
    regions = []
    for number, (image, category) in enumerate(pairs_N2.tolist(), count + 1):
        if category in truth.cats:
            height, width = truth.imgs[image]["height"], truth.imgs[image]["width"]
            whole = {"size": [height, width], "counts": [0, height * width]}
            regions.append(
                {
                    "id": number,
                    "image_id": image,
                    "category_id": category,
                    "bbox": [-_FAR, -_FAR, 2 * _FAR, 2 * _FAR],
                    "area": height * width,
                    "iscrowd": 1,
                    "segmentation": mask_util.frPyObjects(whole, height, width),
                }
            )
    return regions
