"""The metrics. A new one is one line here."""

from __future__ import annotations

from giantdet.evaluation.coco import CocoEvaluator
from giantdet.evaluation.evaluator import Evaluator, Scores, primary_score
from giantdet.evaluation.panoptic import PanopticEvaluator
from giantdet.evaluation.semantic import SemanticEvaluator

__all__ = ["EVALUATORS", "Evaluator", "Scores", "primary_score"]

EVALUATORS: tuple[type[Evaluator], ...] = (CocoEvaluator, SemanticEvaluator, PanopticEvaluator)
"""Each scores those of a model's tasks that are in its `PRIMARY`."""
