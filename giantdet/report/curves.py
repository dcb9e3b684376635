"""Precision over recall, and AP by class and size, from the arrays of COCO's evaluation.

Shapes: T IoU thresholds 0.50, 0.55, ... 0.95, R recalls 0, 0.01, ... 1, K classes, A areas.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from pycocotools.coco import COCO

from giantdet.config.types import Backend
from giantdet.data.truth import BOX_ONLY
from giantdet.evaluation.backends import Curves, IouType, coco_curves
from giantdet.evaluation.coco_results import CocoResults

SIZES = ("small", "medium", "large")
"""COCO's areas: below 32 x 32 pixels of the original image, below 96 x 96, and above."""


class Precision(NamedTuple):
    """COCO's precision of boxes or masks, by class in the order of ids; -1 where a class has no object."""

    names_K: list[str]
    precision_TRKA: NDArray[np.float64]  # areas: all, small, medium, large

    @property
    def recall_R(self) -> NDArray[np.float64]:
        """The recalls."""
        return np.linspace(0, 1, self.precision_TRKA.shape[1])

    def ap(self, k: int | None = None, area: int = 0, iou: float | None = None) -> float | None:
        """Return AP of one class or the mean of all, over all IoUs or at one; None without objects."""
        values = self._at(iou)[:, :, slice(None) if k is None else slice(k, k + 1), area]
        values = values[values > -1]
        return float(values.mean()) if values.size else None

    def curve(self, iou: float, k: int | None = None) -> NDArray[np.float64] | None:
        """Return the precision at each recall of a class, or the mean over classes; None without objects."""
        precision_RK = self._at(iou)[0, :, :, 0]
        present_K: NDArray[np.bool_] = np.all(precision_RK > -1, axis=0)
        if k is not None:
            return precision_RK[:, k] if present_K[k] else None
        mean_R: NDArray[np.float64] = precision_RK[:, present_K].mean(1)
        return mean_R if present_K.any() else None

    def _at(self, iou: float | None) -> NDArray[np.float64]:
        if iou is None:
            return self.precision_TRKA
        row = round((iou - 0.5) / 0.05)
        return self.precision_TRKA[row : row + 1]


def precision(
    truth: COCO, results: CocoResults, iou_type: IouType, limit: int, backend: Backend = "auto"
) -> Precision:
    """Return the precision of results by COCO's rules, `limit` detections of a class in an image."""
    curves: Curves = coco_curves(truth, results, iou_type, [limit], backend)
    names = [truth.cats[number]["name"] for number in sorted(truth.cats)]
    return Precision(names, curves.precision_TRKAM[..., -1])


def has_masks(truth: COCO) -> bool:
    """Return whether any object has a mask."""
    return any(BOX_ONLY not in record for record in truth.dataset["annotations"])
