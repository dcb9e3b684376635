"""The metrics of evaluations. A new metric is one line here."""

from __future__ import annotations

from collections.abc import Sequence

from giantdet.data.dataset import Dataset
from giantdet.evaluation.coco import CocoEvaluator
from giantdet.evaluation.evaluator import NOTHING_TO_SCORE, Evaluator, Scores, primary_score
from giantdet.evaluation.lvis import LvisEvaluator
from giantdet.evaluation.panoptic import PanopticEvaluator
from giantdet.evaluation.semantic import SemanticEvaluator

__all__ = [
    "EVALUATORS",
    "NOTHING_TO_SCORE",
    "Evaluator",
    "Scores",
    "detection_metric",
    "metrics_of",
    "primary_score",
]

DETECTION: tuple[type[CocoEvaluator], ...] = (CocoEvaluator, LvisEvaluator)
"""The metrics of boxes and masks, one for each protocol of data sets."""
EVALUATORS: tuple[type[Evaluator], ...] = (*DETECTION, SemanticEvaluator, PanopticEvaluator)
"""All metrics; each scores the tasks of its `PRIMARY` on the data sets of its `PROTOCOL`."""


def metrics_of(tasks: Sequence[str], dataset: Dataset) -> list[type[Evaluator]]:
    """Return the metrics that score some of these tasks on this data set."""
    return [
        metric
        for metric in EVALUATORS
        if metric.PROTOCOL in (None, dataset.protocol) and any(task in metric.PRIMARY for task in tasks)
    ]


def detection_metric(dataset: Dataset) -> type[CocoEvaluator]:
    """Return the metric of boxes and masks on this data set."""
    return next(metric for metric in DETECTION if dataset.protocol == metric.PROTOCOL)
