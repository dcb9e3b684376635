"""Whether scores mean what they say, and which threshold is best, from detections that were judged.

Shapes: N detections, Q bins of scores or T thresholds.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]


class Reliability(NamedTuple):
    """The detections by bins of their score, of equal width; NaN where a bin is empty."""

    counts_Q: NDArray[np.int64]
    score_Q: Floats  # mean of each bin
    precision_Q: Floats  # part that is right

    @property
    def error(self) -> float:
        """Expected calibration error: mean distance of score and precision, weighted by detections.

        NaN without any (Guo et al. 2017, equation 3).
        """
        total = int(self.counts_Q.sum())
        distance_Q = np.nan_to_num(np.abs(self.precision_Q - self.score_Q))
        return float((distance_Q * self.counts_Q).sum() / total) if total else float("nan")


def reliability(scores_N: Floats, right_N: NDArray[np.bool_], bins: int = 10) -> Reliability:
    """Return the bins of scores in [0, 1]; a score of 1 is in the last."""
    bin_N = np.clip((scores_N * bins).astype(np.int64), 0, bins - 1)
    counts_Q = np.bincount(bin_N, minlength=bins)
    some_Q = np.where(counts_Q > 0, counts_Q, np.nan)
    return Reliability(
        counts_Q,
        np.bincount(bin_N, scores_N, bins) / some_Q,
        np.bincount(bin_N, right_N.astype(np.float64), bins) / some_Q,
    )


class Thresholds(NamedTuple):
    """Precision, recall and F1 of the detections from each threshold on, over all classes together."""

    threshold_T: Floats
    precision_T: Floats  # NaN where no detection is left
    recall_T: Floats
    f1_T: Floats

    @property
    def best(self) -> float:
        """The threshold of the highest F1."""
        return float(self.threshold_T[int(self.f1_T.argmax())])


def thresholds(scores_N: Floats, right_N: NDArray[np.bool_], objects: int) -> Thresholds:
    """Return the numbers for thresholds 0.01, 0.02, ... 0.99; `objects` is the number of true objects."""
    threshold_T = np.arange(1, 100) / 100
    order_N = np.argsort(-scores_N, kind="stable")
    right_0N = np.concatenate([[0], np.cumsum(right_N[order_N])])
    found_T = np.searchsorted(-scores_N[order_N], -threshold_T, side="right")
    right_T = right_0N[found_T].astype(np.float64)
    precision_T = right_T / np.where(found_T > 0, found_T, np.nan)
    recall_T = right_T / max(objects, 1)
    return Thresholds(threshold_T, precision_T, recall_T, 2 * right_T / np.maximum(found_T + objects, 1))
