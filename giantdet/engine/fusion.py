"""Fuse overlapping boxes of one image that several views or several models have found.

Shapes: N boxes of all members · D fused boxes. All work is on the host, in float64, class by class.

- `nms`: greedy NMS by class.
- `soft_nms`: scores decay by exp(-IoU^2 / 0.5) for each better box (Bodla et al. 2017, the Gaussian rule).
- `wbf`: weighted boxes fusion (Solovyev et al. 2021, section 3).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torchvision.ops import batched_nms

Fusion = Literal["nms", "soft_nms", "wbf"]
SIGMA = 0.5
"""Sigma of soft-NMS: the paper's value."""
LOWEST = 1e-3
"""Boxes whose score soft-NMS has brought below this are dropped, as in the authors' code."""


class Fused(NamedTuple):
    """The fused boxes, best first."""

    boxes_D4: Tensor  # float32 xyxy
    scores_D: Tensor  # float32
    labels_D: Tensor  # int64
    clusters: list[list[int]]
    """For each fused box, the numbers of the given boxes that it stands for, best first."""

    def first(self, count: int) -> Fused:
        """Return the best `count` of them."""
        return Fused(
            self.boxes_D4[:count], self.scores_D[:count], self.labels_D[:count], self.clusters[:count]
        )


def fuse(
    kind: Fusion, boxes_N4: Tensor, scores_N: Tensor, labels_N: Tensor, iou: float, members: int
) -> Fused:
    """Return the fused boxes of all `members`, models or views, that looked at an image.

    Boxes are xyxy; those of a class with an IoU above `iou` belong to one object. Soft-NMS needs no threshold
    for its scores; `iou` then only says which boxes a fused one stands for.
    """
    boxes, labels = boxes_N4.double().cpu(), labels_N.cpu()
    return _FUSIONS[kind](boxes, scores_N.double().cpu(), labels, iou, members)


def _nms(boxes_N4: Tensor, scores_N: Tensor, labels_N: Tensor, iou: float, members: int) -> Fused:
    kept_D = batched_nms(boxes_N4, scores_N, labels_N, iou)
    return _with_clusters(boxes_N4, scores_N, labels_N, kept_D, scores_N[kept_D], iou)


def _soft_nms(boxes_N4: Tensor, scores_N: Tensor, labels_N: Tensor, iou: float, members: int) -> Fused:
    boxes, labels, rest = boxes_N4.numpy(), labels_N.numpy(), scores_N.numpy().copy()
    kept, scores = [], []
    while len(rest) and (best := int(rest.argmax())) >= 0 and rest[best] >= LOWEST:
        kept.append(best)
        scores.append(float(rest[best]))
        rest[best] = -1.0
        same = (labels == labels[best]) & (rest > 0)
        rest[same] *= np.exp(-(_iou(boxes[best], boxes[same]) ** 2) / SIGMA)
    kept_D = torch.tensor(kept, dtype=torch.int64)
    scores_D = torch.tensor(scores, dtype=torch.float64)
    return _with_clusters(boxes_N4, scores_N, labels_N, kept_D, scores_D, iou)


def _with_clusters(
    boxes_N4: Tensor, scores_N: Tensor, labels_N: Tensor, kept_D: Tensor, scores_D: Tensor, iou: float
) -> Fused:
    """Return the kept boxes; each other box belongs to the first kept one of its class that overlaps it."""
    boxes, labels, kept = boxes_N4.numpy(), labels_N.numpy(), kept_D.tolist()
    free = np.ones(len(boxes), bool)
    free[kept] = False
    order = np.argsort(-scores_N.numpy(), kind="stable")
    clusters = []
    for best in kept:
        near = free & (labels == labels[best])
        near[near] = _iou(boxes[best], boxes[near]) > iou
        free &= ~near
        clusters.append([best, *order[near[order]].tolist()])
    return Fused(boxes_N4[kept_D].float(), scores_D.float(), labels_N[kept_D], clusters)


def _wbf(boxes_N4: Tensor, scores_N: Tensor, labels_N: Tensor, iou: float, members: int) -> Fused:
    """Return weighted boxes; a box joins the cluster whose fused box, so far, it overlaps most."""
    boxes, scores, labels = boxes_N4.numpy(), scores_N.numpy(), labels_N.numpy()
    fused: list[tuple[float, int, NDArray[np.float64], list[int]]] = []
    for label in np.unique(labels).tolist():
        of_class = np.flatnonzero(labels == label)
        clusters: list[list[int]] = []
        # Of each cluster: the sum of its boxes, each times its score, and the sum of scores.
        sums, weights = np.zeros((len(of_class), 4)), np.zeros((len(of_class), 1))
        for n in of_class[np.argsort(-scores[of_class], kind="stable")].tolist():
            count = len(clusters)
            overlaps = _iou(boxes[n], sums[:count] / weights[:count])
            best = int(overlaps.argmax()) if count else -1
            if best < 0 or overlaps[best] <= iou:
                best = count
                clusters.append([])
            clusters[best].append(n)
            weight = max(float(scores[n]), 1e-12)  # boxes of score 0 have a place too
            sums[best] += weight * boxes[n]
            weights[best] += weight
        for at, cluster in enumerate(clusters):
            score = float(scores[cluster].mean()) * min(len(cluster), members) / members
            fused.append((score, label, sums[at] / weights[at], cluster))
    fused.sort(key=lambda entry: -entry[0])
    return Fused(
        torch.from_numpy(np.array([box for _, _, box, _ in fused]).reshape(-1, 4)).float(),
        torch.tensor([score for score, *_ in fused]),
        torch.tensor([label for _, label, *_ in fused], dtype=torch.int64),
        [cluster for *_, cluster in fused],
    )


def _iou(box_4: NDArray[np.float64], boxes_K4: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return the IoU of a box with others; 0 where none has an area."""
    corner = np.maximum(box_4[:2], boxes_K4[:, :2])
    both = (np.minimum(box_4[2:], boxes_K4[:, 2:]) - corner).clip(0).prod(1)
    areas = (boxes_K4[:, 2:] - boxes_K4[:, :2]).prod(1) + (box_4[2:] - box_4[:2]).prod()
    iou: NDArray[np.float64] = both / np.maximum(areas - both, 1e-12)
    return iou


_FUSIONS: dict[str, Callable[[Tensor, Tensor, Tensor, float, int], Fused]] = {
    "nms": _nms,
    "soft_nms": _soft_nms,
    "wbf": _wbf,
}
