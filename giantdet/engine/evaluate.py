"""Evaluate a model on a data set with all ranks; training, `giantdet eval` and Python code use this.

Every rank runs the same number of steps (the loader adds empty slots), so that the collectives of a
partitioned model match.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import torch

from giantdet.config.architectures import ArchitectureConfig
from giantdet.config.classes import Classes
from giantdet.config.types import DataConfig
from giantdet.data.dataset import Dataset
from giantdet.data.loader import eval_loader
from giantdet.distributed import comm
from giantdet.errors import ConfigError
from giantdet.evaluation import EVALUATORS, Evaluator, Scores, primary_score
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
    model_config: ArchitectureConfig,
    classes: Classes,
    window_stride: int | None = None,
    results: Path | None = None,
) -> Evaluation:
    """Score a model on a data set and return the scores. All ranks call it.

    Args:
        model: a model or a DeepSpeed engine, in evaluation mode.
        data: canvas and loader settings.
        batch_size: images per rank and step.
        tasks: the tasks of the model; those with ground truth in the data set are scored.
        model_config: the model's section.
        classes: the classes that the model predicts.
        window_stride: see `EvalConfig`.
        results: file to which the main rank writes the detections, maps beside it; None: nothing is written.
    """
    check_windows(tasks, window_stride)
    evaluators = [
        metric(dataset, [task for task in tasks if task in metric.PRIMARY], classes, model_config)
        for metric in metrics_of(tasks)
    ]
    rank, world = comm.rank(), comm.world_size()
    for batch in eval_loader(dataset, data, batch_size, rank, world, window_stride=window_stride):
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


def metrics_of(tasks: Sequence[str]) -> list[type[Evaluator]]:
    """Return the metrics that score some of these tasks."""
    return [metric for metric in EVALUATORS if any(task in metric.PRIMARY for task in tasks)]


def check_windows(tasks: Sequence[str], window_stride: int | None) -> None:
    """Raise ConfigError if windows are wanted, and a task of the model cannot be joined from them."""
    whole = [task for metric in metrics_of(tasks) if not metric.WINDOWS for task in metric.PRIMARY]
    if window_stride is not None and whole:
        raise ConfigError(
            "giantdet.eval.window_stride is for models that predict only semantic maps; this one predicts "
            f"{', '.join(tasks)}, so leave it out"
        )
