"""Evaluate a model on a data set with all ranks; training, `giantdet eval` and Python code use this.

Every rank runs the same number of steps (the loader adds empty slots), so that the collectives of a
partitioned model match.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import torch

from giantdet.config.conventions import Conventions
from giantdet.config.types import DataConfig
from giantdet.data.dataset import Dataset
from giantdet.data.loader import eval_loader
from giantdet.distributed import comm
from giantdet.evaluation import EVALUATORS, Scores, primary_score
from giantdet.structures import Batch, Outputs


class Evaluation(NamedTuple):
    """The result of an evaluation; `scores` and `primary` are the same on all ranks."""

    scores: Scores
    primary: float | None
    """The number that models are compared by, for example mask AP; None without any score."""
    table: str
    """The scores as text, on the main rank."""


@torch.no_grad()
def evaluate(
    model: Callable[[Batch], Outputs],
    dataset: Dataset,
    data: DataConfig,
    batch_size: int,
    device: torch.device,
    *,
    tasks: Sequence[str],
    category_ids: Sequence[int],
    conventions: Conventions,
    results: Path | None = None,
) -> Evaluation:
    """Score a model on a data set and return the scores. All ranks call it.

    Args:
        model: a model or a DeepSpeed engine, in evaluation mode.
        data: canvas and loader settings.
        batch_size: images per rank and step.
        tasks: the tasks of the model; those with ground truth in the data set are scored.
        category_ids: the data set's category ids of the model's classes, by class index.
        results: file to which the main rank writes the detections; None: they are not written.
    """
    evaluators = [
        metric(dataset, [task for task in tasks if task in metric.PRIMARY], category_ids, conventions)
        for metric in EVALUATORS
        if any(task in metric.PRIMARY for task in tasks)
    ]
    for batch in eval_loader(dataset, data, batch_size, comm.rank(), comm.world_size()):
        outputs = model(batch.to(device))
        for evaluator in evaluators:
            evaluator.add(outputs, batch)
    scores: Scores = {}
    tables: list[str] = []
    numbers: dict[str, str] = {}
    for evaluator in evaluators:
        evaluator.merge()
        numbers |= evaluator.PRIMARY
        if comm.is_main():
            found = evaluator.scores()
            scores |= found
            tables.append(evaluator.table(found))
            if results is not None:
                evaluator.save(results)
    scores = comm.broadcast_object(scores)
    return Evaluation(scores, primary_score(scores, tasks, numbers), "\n".join(tables))
