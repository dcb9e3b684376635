"""Match detections with objects: by COCO's rule for scores, and across classes for the confusion matrix.

Shapes: N detections and G objects of an image, K classes. Boxes are left, top, width, height in pixels.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from pycocotools import mask as mask_util
from pycocotools.coco import COCO

from giantdet.data.truth import NEUTRAL
from giantdet.evaluation.coco_results import CocoResults

IOU = 0.5
"""A detection finds an object if their boxes overlap at least this much."""

Bools = NDArray[np.bool_]
Ints = NDArray[np.int64]
Floats = NDArray[np.float64]


class ImageBoxes(NamedTuple):
    """The detections of an image, best first, and its objects; classes are numbers in [0, K)."""

    image_id: int
    boxes_N4: Floats
    labels_N: Ints
    scores_N: Floats
    rows_N: Ints  # of the results
    boxes_G4: Floats
    labels_G: Ints
    crowd_G: Bools
    ignored_G: Bools  # crowds too: neither found nor missed

    def above(self, threshold: float) -> ImageBoxes:
        """Return the same with the detections of at least this score."""
        keep = int((self.scores_N >= threshold).sum())  # they are the first
        return self._replace(
            boxes_N4=self.boxes_N4[:keep],
            labels_N=self.labels_N[:keep],
            scores_N=self.scores_N[:keep],
            rows_N=self.rows_N[:keep],
        )


def image_boxes(truth: COCO, results: CocoResults, limit: int = 100) -> Iterator[ImageBoxes]:
    """Yield each image of a truth of `data/truth.py` with at most `limit` detections of each class.

    Results of other images and other categories are left out, as COCOeval does; a NaN score counts as 0.
    """
    number = {category: k for k, category in enumerate(sorted(truth.cats))}
    scores_N = np.nan_to_num(results.scores_N)
    order_N = np.lexsort((-scores_N, results.image_ids_N))
    ids_N = results.image_ids_N[order_N]
    for image_id in sorted(truth.imgs):
        start, end = np.searchsorted(ids_N, [image_id, image_id + 1])
        rows = order_N[start:end]
        labels = np.array([number.get(c, -1) for c in results.category_ids_N[rows].tolist()], np.int64)
        rows, labels = rows[labels >= 0], labels[labels >= 0]
        if len(rows) > limit:
            best = np.zeros(len(rows), bool)
            for label in np.unique(labels):
                best[np.flatnonzero(labels == label)[:limit]] = True
            rows, labels = rows[best], labels[best]
        objects = truth.imgToAnns.get(image_id, [])
        crowd_G = np.array([bool(o["iscrowd"]) for o in objects], bool)
        yield ImageBoxes(
            image_id,
            np.nan_to_num(results.boxes_N4[rows]),
            labels,
            scores_N[rows],
            rows,
            np.array([o["bbox"] for o in objects], np.float64).reshape(-1, 4),
            np.array([number[o["category_id"]] for o in objects], np.int64),
            crowd_G,
            crowd_G | np.array([NEUTRAL in o for o in objects], bool),
        )


def overlaps(image: ImageBoxes) -> Floats:
    """Return the IoU of each detection and object, [N, G]; with a crowd, the part of the detection in it."""
    if not len(image.boxes_N4) or not len(image.boxes_G4):
        return np.zeros((len(image.boxes_N4), len(image.boxes_G4)))
    found: Floats = mask_util.iou(image.boxes_N4, image.boxes_G4, image.crowd_G.astype(np.uint8).tolist())
    return found


class Judged(NamedTuple):
    """Which detections of an image are right; those that are ignored are neither right nor wrong."""

    right_N: Bools
    ignored_N: Bools


def judge(image: ImageBoxes, iou: float = IOU) -> Judged:
    """Match by COCO's rule: within a class, by falling score, each with the free object of the highest IoU.

    An object that is to be ignored is taken only where no other overlaps enough; crowds take any number.
    This is `COCOeval.evaluateImg` at one IoU.
    """
    iou_NG = np.where(image.labels_N[:, None] == image.labels_G, overlaps(image), -1.0)
    right_N, ignored_N = np.zeros(len(iou_NG), bool), np.zeros(len(iou_NG), bool)
    free_G = np.ones(len(image.labels_G), bool)
    # COCOeval's limit is min(iou, 1 - 1e-10), and of two equal IoUs it takes the later object.
    for n, iou_G in enumerate(iou_NG):
        for candidates_G in (~image.ignored_G, image.ignored_G):
            usable_G = candidates_G & (free_G | image.crowd_G) & (iou_G >= min(iou, 1 - 1e-10))
            if usable_G.any():
                best = len(iou_G) - 1 - int(np.where(usable_G, iou_G, -1.0)[::-1].argmax())
                free_G[best] = False
                right_N[n], ignored_N[n] = not image.ignored_G[best], image.ignored_G[best]
                break
    return Judged(right_N, ignored_N)


def confusion(image: ImageBoxes, classes: int, iou: float = IOU) -> Ints:
    """Return the counts of an image by true (row) and found (column) class, [K + 1, K + 1]; K is background.

    Pairs of any classes that overlap enough are matched one to one: those of one class first, then by IoU.
    Objects to ignore are left out, and so are unmatched detections that overlap one of their class.
    """
    counts_KK = np.zeros((classes + 1, classes + 1), np.int64)
    iou_NG = overlaps(image)
    same_NG = image.labels_N[:, None] == image.labels_G
    pairs = np.argwhere((iou_NG >= iou) & ~image.ignored_G)
    order = np.lexsort((-iou_NG[tuple(pairs.T)], ~same_NG[tuple(pairs.T)]))
    free_N, free_G = np.ones(len(iou_NG), bool), ~image.ignored_G
    for n, g in pairs[order].tolist():
        if free_N[n] and free_G[g]:
            free_N[n] = free_G[g] = False
            counts_KK[image.labels_G[g], image.labels_N[n]] += 1
    covered_N = ((iou_NG >= iou) & same_NG & image.ignored_G).any(1)
    counts_KK[:classes, classes] = np.bincount(image.labels_G[free_G], minlength=classes)
    counts_KK[classes, :classes] = np.bincount(image.labels_N[free_N & ~covered_N], minlength=classes)
    return counts_KK
