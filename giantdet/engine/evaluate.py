"""Evaluate a model on a data set with all ranks; training, `giantdet eval` and Python code use this.

Every rank runs the same number of steps (the loader adds empty slots), so that the collectives of a
partitioned model match.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import NamedTuple, Protocol

import numpy as np
import torch

from giantdet.config.architectures import ArchitectureConfig
from giantdet.config.classes import Classes
from giantdet.config.types import Backend, DataConfig, TtaConfig
from giantdet.data.dataset import Dataset
from giantdet.data.images import limit_pixels
from giantdet.data.loader import Loader, eval_loader
from giantdet.data.records import logger
from giantdet.distributed import comm
from giantdet.engine.tta import MultiScale
from giantdet.errors import ConfigError
from giantdet.evaluation import EVALUATORS, Scores, detection_metric, metrics_of, primary_score
from giantdet.structures import Batch, Outputs


class Evaluation(NamedTuple):
    """The result of an evaluation; `scores` and `primary` are the same on all ranks."""

    scores: Scores
    primary: float | None
    """The number that models are compared by, for example mask AP; None without any score."""
    table: str
    """The scores as text, on the main rank."""


class Observer(Protocol):
    """Something that looks at the outputs of an evaluation beside the evaluators; see `Evaluator`."""

    def add(self, outputs: Outputs, batch: Batch) -> None: ...
    def merge(self) -> None: ...


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
    max_detections: int | None = None,
    backend: Backend = "auto",
    results: Path | None = None,
    tta: TtaConfig | None = None,
    batches: Callable[[Loader], Iterable[Batch]] = iter,
    observers: Sequence[Observer] = (),
) -> Evaluation:
    """Score a model on a data set and return the scores. All ranks call it.

    Args:
        model: a model or a DeepSpeed engine, in evaluation mode.
        data: canvas and loader settings.
        batch_size: images per rank and step.
        tasks: the tasks of the model; those with ground truth in the data set are scored.
        model_config: the model's section.
        classes: the classes that the model predicts.
        window_stride, max_detections, backend, tta: see `EvalConfig`.
        results: file to which the main rank writes the detections, maps beside it; None: nothing is written.
        batches: yields the batches of the loader, and may show the progress.
        observers: get the outputs too.
    """
    check_windows(tasks, window_stride)
    limit_pixels(data.max_image_pixels)  # for the true maps, which evaluators read
    evaluators = [
        metric(
            dataset,
            [task for task in tasks if task in metric.PRIMARY],
            classes,
            model_config,
            max_detections,
            backend,
        )
        for metric in metrics_of(tasks, dataset)
    ]
    rank, world = comm.rank(), comm.world_size()
    multi_scale = None if tta is None else MultiScale(model, model_config, tta, device, window_stride)
    loader = eval_loader(
        dataset,
        data,
        batch_size if tta is None else 1,
        rank,
        world,
        window_stride=window_stride,
        unscaled=tta is not None,
    )
    for batch in batches(loader):
        if multi_scale is None:
            outputs = model(batch.to(device))
        else:
            outputs, batch = multi_scale(batch)
        for part in (*evaluators, *observers):
            part.add(outputs, batch)
    for observer in observers:
        observer.merge()
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
    if not dataset.annotated:
        where = "" if results is None else f"; the detections are in {results}"
        tables = [f"{dataset.annotations}: no annotations, so there are no scores{where}"]
    scores = comm.broadcast_object(scores)
    return Evaluation(scores, primary_score(scores, tasks, numbers), "\n".join(tables))


def warn_of_limits(dataset: Dataset, model: ArchitectureConfig, given: int | None) -> None:
    """Warn, on the main rank, if images have more objects than the model predicts or the metric scores.

    `given` is `eval.max_detections`.
    """
    predicted = model.most_detections
    if predicted is None or not comm.is_main():
        return
    metric = detection_metric(dataset)
    max_detections = given or metric.MAX_DETECTIONS
    which = " of each class" if metric.PER_CLASS else ""
    most, most_of_class, images = 0, 0, 0
    for i in range(len(dataset)):
        labels_N = dataset.objects(i).labels_N
        most = max(most, len(labels_N))
        of_class = int(np.bincount(labels_N).max()) if metric.PER_CLASS and len(labels_N) else len(labels_N)
        most_of_class, images = max(most_of_class, of_class), images + (of_class > max_detections)
    if images:
        logger.warning(
            "%s: %d images have more than %d objects%s, at most %d, but only the best %d detections%s in an "
            "image are scored: set eval.max_detections to %d",
            *(dataset.annotations, images, max_detections, " of a class" if which else "", most_of_class),
            *(max_detections, which, most_of_class),
        )
    if predicted < most:
        logger.warning(
            "%s: an image has %d objects, but the model predicts at most %d: set the `detections` of its "
            "head",
            *(dataset.annotations, most, predicted),
        )
    elif predicted < max_detections and (not metric.PER_CLASS or max_detections != metric.MAX_DETECTIONS):
        logger.warning(
            "%s is %d, but the model predicts at most %d objects in an image: set the `detections` of its "
            "head",
            "eval.max_detections" if given else f"the number of detections that {dataset.protocol} scores",
            *(max_detections, predicted),
        )
    elif predicted > max_detections:
        logger.warning(
            "the model predicts up to %d objects in an image, but only the best %d%s are scored: set "
            "eval.max_detections",
            *(predicted, max_detections, which),
        )


def check_windows(tasks: Sequence[str], window_stride: int | None) -> None:
    """Raise ConfigError if windows are wanted, and a task of the model cannot be joined from them."""
    whole = any(task in metric.PRIMARY and not metric.WINDOWS for metric in EVALUATORS for task in tasks)
    if window_stride is not None and whole:
        raise ConfigError(
            "giantdet.eval.window_stride is for models that predict only semantic maps; this one predicts "
            f"{', '.join(tasks)}, so leave it out"
        )
