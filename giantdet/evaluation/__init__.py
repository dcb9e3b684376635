"""The metrics of evaluations. A new metric is one line here."""

from __future__ import annotations

from giantdet.evaluation.coco import CocoEvaluator
from giantdet.evaluation.evaluator import Evaluator, Scores, primary_score
from giantdet.evaluation.panoptic import PanopticEvaluator
from giantdet.evaluation.semantic import SemanticEvaluator

__all__ = ["EVALUATORS", "Evaluator", "Scores", "primary_score"]

EVALUATORS: tuple[type[Evaluator], ...] = (CocoEvaluator, SemanticEvaluator, PanopticEvaluator)
"""All metrics; each scores the tasks of a model that are in its `PRIMARY`."""
