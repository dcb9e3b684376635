"""The programs that match detections with objects and accumulate COCO's precision and recall.

pycocotools (Lin et al. 2014) is the reference. hotcoco, an extra, computes the same numbers to the last bit
and is many times as fast. A new one is a function, and a line in `BACKENDS`.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.metadata
import io
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray
from packaging.version import Version
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from giantdet.config.types import Backend
from giantdet.data.truth import BOX_ONLY, NEUTRAL
from giantdet.errors import ConfigError
from giantdet.evaluation.coco_results import CocoResults

IouType = Literal["bbox", "segm"]


def _installed(name: str, oldest: str) -> Any:
    """Return an optional module, or None if it is not installed or older."""
    try:
        recent = Version(importlib.metadata.version(name)) >= Version(oldest)
    except importlib.metadata.PackageNotFoundError:
        return None
    return importlib.import_module(name) if recent else None


_hotcoco = _installed("hotcoco", "1.3")  # the first whose numbers tests have compared


class Curves(NamedTuple):
    """COCOeval's `eval`: T IoU thresholds, R recalls, K categories by id, A areas, M limits of detections.

    -1 where no object counts. Areas are all, small, medium, large.
    """

    precision_TRKAM: NDArray[np.float64]
    recall_TKAM: NDArray[np.float64]


def check_backend(backend: Backend) -> None:
    """Raise ConfigError if the requested backend is not installed."""
    if backend == "hotcoco" and _hotcoco is None:
        raise ConfigError(
            'giantdet.eval.backend is "hotcoco", which is not installed, or older than 1.3: '
            'pip install "hotcoco>=1.3", or use "auto"'
        )


def coco_curves(
    truth: COCO, results: CocoResults, iou_type: IouType, limits: Sequence[int], backend: Backend
) -> Curves:
    """Return the precision and recall of results for a truth of `data/truth.py`.

    `limits` are the detections per image and category that count, in ascending order. "auto" is the fastest
    backend that is installed. All results are of images of the truth; those of other categories are ignored.
    A score that is NaN counts as 0, a box with NaN matches nothing: COCOeval would match it with anything.
    """
    check_backend(backend)
    results = results._replace(
        scores_N=np.where(np.isnan(results.scores_N), 0, results.scores_N),
        boxes_N4=np.where(np.isnan(results.boxes_N4).any(1, keepdims=True), 0, results.boxes_N4),
    )
    if backend == "auto":
        backend = "pycocotools" if _hotcoco is None else "hotcoco"
    return BACKENDS[backend](truth, results, iou_type, list(limits))


def _objects(truth: COCO, iou_type: IouType) -> list[dict[str, Any]]:
    """Return the annotations as COCOeval is to see them, which knows only crowds and ranges of areas.

    - An object with `NEUTRAL` is neither found nor missed, and a detection of it is not a false positive, as
      for objects outside a range of areas: its area is outside all ranges. COCOeval overwrites `ignore`.
    - An object without a mask counts for boxes as any other. For masks it is a crowd region of its box's
      size: it is not missed, and detections inside its box are not false positives.
    """
    objects = []
    for annotation in truth.dataset["annotations"]:
        changes: dict[str, Any] = {"area": -1.0} if NEUTRAL in annotation else {}
        if iou_type == "segm" and BOX_ONLY in annotation:
            changes["iscrowd"] = 1
        objects.append(annotation | changes)
    return objects


def _with_pycocotools(truth: COCO, results: CocoResults, iou_type: IouType, limits: list[int]) -> Curves:
    """Run COCOeval for each category, on the images that have something of it.

    It visits and keeps each pair of a category and an image: 24 million in LVIS's validation set, nearly all
    of them empty, for about 17 GB.
    """
    objects: dict[int, list[dict[str, Any]]] = {category: [] for category in sorted(truth.cats)}
    found: dict[int, list[dict[str, Any]]] = {category: [] for category in objects}
    for record in _objects(truth, iou_type):
        objects[record["category_id"]].append(record)
    # pycocotools takes the area of a result from its box if there is one. Mask AP's areas are those of
    # masks, so the boxes are left out.
    for record in results.records(boxes=iou_type == "bbox", masks=iou_type == "segm"):
        found.get(record["category_id"], []).append(record)
    parts = [_of_category(truth, k, objects[k], found[k], iou_type, limits) for k in objects]
    return Curves(
        np.concatenate([part.precision_TRKAM for part in parts], 2),
        np.concatenate([part.recall_TKAM for part in parts], 1),
    )


def _of_category(
    truth: COCO,
    category: int,
    objects: list[dict[str, Any]],
    results: list[dict[str, Any]],
    iou_type: IouType,
    limits: list[int],
) -> Curves:
    """Return the curves of one category, whose objects and results these are."""
    judged, found = COCO(), COCO()
    images = {record["image_id"] for record in (*objects, *results)} if objects else set()
    judged.dataset = {
        "images": [truth.imgs[number] for number in images],
        "annotations": objects,
        "categories": [truth.cats[category]],
    }
    with contextlib.redirect_stdout(io.StringIO()):
        judged.createIndex()
        if objects and results:
            found = judged.loadRes(results)
        else:  # it cannot load none
            found.dataset = judged.dataset | {"annotations": []}
            found.createIndex()
        judge = COCOeval(judged, found, iou_type)
        judge.params.maxDets = limits
        judge.evaluate()
        judge.accumulate()
    return Curves(judge.eval["precision"], judge.eval["recall"])


def _with_hotcoco(truth: COCO, results: CocoResults, iou_type: IouType, limits: list[int]) -> Curves:
    # Ids become numbers from 1 on, in their order: results are an array of floats, which large ids exceed.
    images, categories = Numbers(truth.imgs), Numbers(truth.cats)
    image_N, category_N = images.of(results.image_ids_N), categories.of(results.category_ids_N)
    assert image_N.all(), "results of images that the truth does not have"
    objects = _objects(truth, iou_type)
    image_of, category_of = (
        numbers.of(np.array([record[key] for record in objects], np.int64)).tolist()
        for numbers, key in ((images, "image_id"), (categories, "category_id"))
    )
    judged = _hotcoco.COCO(
        {
            "images": [
                {"id": n, "height": truth.imgs[number]["height"], "width": truth.imgs[number]["width"]}
                for n, number in enumerate(images.ids.tolist(), 1)
            ],
            "annotations": [
                {key: record[key] for key in ("id", "bbox", "area", "iscrowd", "segmentation")}
                | {"image_id": image, "category_id": category}
                for record, image, category in zip(objects, image_of, category_of, strict=True)
            ],
            "categories": [{"id": n, "name": str(n)} for n in range(1, len(categories.ids) + 1)],
        }
    )
    rows_N7 = np.column_stack([image_N, results.boxes_N4, results.scores_N, category_N])
    if iou_type == "bbox":
        found = judged.load_res(rows_N7)
    else:
        assert results.rles is not None
        rles = [
            {"size": size, "counts": counts}
            for size, counts in zip(results.rles.sizes_N2.tolist(), results.rles.counts(), strict=True)
        ]
        found = judged.load_res(rows_N7, segmentation=rles)
        found.update_anns(ids=np.arange(1, len(rles) + 1), area=results.rles.areas_N.astype(np.float64))
    judge = _hotcoco.COCOeval(judged, found, iou_type)
    judge.params.max_dets = limits
    judge.evaluate()
    judge.accumulate()
    return Curves(*(np.asarray(judge.eval[name]) for name in ("precision", "recall")))


class Numbers:
    """Numbers for ids, from 1 on and in their order; 0 for an id that is not there."""

    def __init__(self, ids: Iterable[int]) -> None:
        self.ids = np.array(sorted(ids), np.int64)

    def of(self, ids_N: NDArray[np.int64]) -> NDArray[np.int64]:
        place_N = np.searchsorted(self.ids, ids_N)
        same_N = np.append(self.ids, 0)[place_N] == ids_N
        return np.where(same_N & (place_N < len(self.ids)), place_N + 1, 0)


BACKENDS: dict[str, Callable[[COCO, CocoResults, IouType, list[int]], Curves]] = {
    "pycocotools": _with_pycocotools,
    "hotcoco": _with_hotcoco,
}
