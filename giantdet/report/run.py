"""The folder of a run, as the sections of its report read it; what is costly is read once, when needed."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from pycocotools.coco import COCO

from giantdet.architectures import Architecture
from giantdet.config.classes import Classes
from giantdet.config.resolved import load_resolved
from giantdet.data.dataset import Dataset, meet, open_dataset
from giantdet.data.images import limit_pixels
from giantdet.data.truth import ground_truth
from giantdet.engine.metrics import read_metrics
from giantdet.errors import InputError
from giantdet.evaluation import Scores, detection_metric
from giantdet.evaluation.coco_results import CocoResults
from giantdet.report.calibration import Thresholds, thresholds
from giantdet.report.matching import ImageBoxes, Judged, image_boxes, judge
from giantdet.tools.count import meta_model

RESULTS = "results.json"


class Missing(Exception):
    """A section does not apply to a run; the text says why."""


class JudgedImages(NamedTuple):
    """All validation images with their detections, best first, and which of them are right."""

    images: list[ImageBoxes]
    judged: list[Judged]
    thresholds: Thresholds
    objects: int

    @property
    def scores_N(self) -> np.ndarray[Any, Any]:
        """The scores of all detections that are right or wrong."""
        pairs = zip(self.images, self.judged, strict=True)
        return np.concatenate([np.zeros(0), *(i.scores_N[~j.ignored_N] for i, j in pairs)])

    @property
    def right_N(self) -> np.ndarray[Any, Any]:
        """Which of them are right."""
        return np.concatenate([np.zeros(0, bool), *(j.right_N[~j.ignored_N] for j in self.judged)])


class Run:
    """The files of a run. Properties raise Missing where the run does not have what they return.

    Raises InputError for a folder without a config.json that can be read.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        if not (folder / "config.json").is_file():
            raise InputError(f"{folder}: no config.json in it; give the folder of a run, its train.output")
        self.config = load_resolved(folder / "config.json")
        limit_pixels(self.config.giantdet.data.max_image_pixels)
        self.raw: dict[str, Any] = json.loads((folder / "config.json").read_text())
        lines = read_metrics(folder / "metrics.jsonl") if (folder / "metrics.jsonl").is_file() else []
        self.logged = [line for line in lines if "images_per_second" in line]
        self.evaluated = [line for line in lines if line.get("scores")]
        """Lines of metrics.jsonl with the scores of an evaluation."""

        self._kept: dict[str, Any] = {}

    def remember(self, name: str, make: Callable[[], Any]) -> Any:
        """Return what `make` returns, which is called once for a name."""
        if name not in self._kept:
            self._kept[name] = make()
        return self._kept[name]

    @property
    def pictures(self) -> Path:
        """The folder of the PNG files."""
        return self.folder / "report"

    @cached_property
    def scores(self) -> Scores:
        """The scores of the last evaluation; {} without one."""
        return self.json_of("scores.json") or {}

    @cached_property
    def summaries(self) -> dict[str, dict[str, Any]]:
        """The numbers of the data sets by split."""
        return self.json_of("data.json") or {}

    @cached_property
    def sessions(self) -> list[dict[str, Any]]:
        """What is known of each start of the run: see `engine/environment.py`."""
        return self.json_of("environment.json") or []

    def json_of(self, name: str) -> Any:
        """Return the content of a JSON file of the folder, or None without one."""
        try:
            return json.loads((self.folder / name).read_text())
        except (OSError, ValueError):
            return None

    @cached_property
    def model(self) -> Architecture:
        """The model without its weights, which knows its tasks and targets."""
        return meta_model(self.config)

    @cached_property
    def classes(self) -> Classes:
        """The classes that the model predicts; those of the training set for a run of version 0.1."""
        config = self.config.giantdet
        return config.data.classes or config.model.predicted(self.training.classes)

    def dataset(self, split: str) -> Dataset:
        """Return a data set of the run."""
        return self.validation if split == "val" else self.training

    @cached_property
    def training(self) -> Dataset:
        """The training set."""
        return self._open("train")

    @cached_property
    def validation(self) -> Dataset:
        """The validation set, whose semantic maps are numbered as the model's classes."""
        dataset = self._open("val")
        try:
            meet(dataset, self.classes, str(self.folder))
        except InputError as error:
            raise Missing(str(error)) from None
        return dataset

    def _open(self, split: str) -> Dataset:
        section = getattr(self.config.giantdet.data, split)
        if section is None:
            raise Missing(f"the run has no data.{split}")
        try:
            return open_dataset(section)
        except (InputError, OSError) as error:
            raise Missing(f"data.{split} cannot be opened any more: {error}") from None

    @cached_property
    def truth(self) -> COCO:
        """The objects of the validation set as pycocotools has them."""
        dataset = self.validation
        if not dataset.classes.objects:
            raise Missing("the validation set has no objects with boxes")
        if not dataset.annotated:
            raise Missing(f"{dataset.annotations} has no annotations")
        return ground_truth(dataset.annotations, dataset.instances())

    @cached_property
    def results(self) -> CocoResults:
        """The detections of the last evaluation, those of images that the validation set has."""
        if "box" not in self.model.tasks:
            raise Missing("the model predicts no boxes")
        records = self.json_of(RESULTS)
        if records is None:
            raise Missing(f"there is no {RESULTS}: the run was not evaluated yet")
        results = CocoResults.of(records)
        return results.at(np.flatnonzero(np.isin(results.image_ids_N, list(self.truth.imgs))))

    @property
    def max_detections(self) -> int:
        """The number of detections of an image that are scored."""
        return self.config.giantdet.eval.max_detections or detection_metric(self.validation).MAX_DETECTIONS

    @cached_property
    def detections(self) -> JudgedImages:
        """All detections, judged by boxes at IoU 0.5."""
        if self.validation.protocol != "coco":
            name = self.validation.protocol.upper()
            raise Missing(
                f"the images of {name} are not annotated with all classes, so that it would mislead"
            )
        images = list(image_boxes(self.truth, self.results, self.max_detections))
        judged = [judge(image) for image in images]
        objects = sum(int((~image.ignored_G).sum()) for image in images)
        if not objects:
            raise Missing("the validation set has no objects")
        found = JudgedImages(images, judged, thresholds(np.zeros(0), np.zeros(0, bool), objects), objects)
        if not len(found.scores_N):
            raise Missing("the model has found nothing in the validation images")
        return found._replace(thresholds=thresholds(found.scores_N, found.right_N, objects))

    @property
    def images_per_step(self) -> int:
        """The batch size."""
        return self.config.batch.total

    @property
    def epoch_steps(self) -> float | None:
        """Optimizer steps of one epoch, or None where the size of the training set is not known."""
        summary = self.summaries.get("train")
        if summary is None:
            return None
        images = summary["images"]
        if self.config.giantdet.data.filter_empty:
            images -= summary.get("images_without_objects", 0)
        return images / self.images_per_step if images > 0 else None

    def series(self, key: str) -> tuple[list[int], list[float]]:
        """Return steps and values of a logged number; null is NaN, a gap in its curve."""
        lines = [line for line in self.logged if key in line]
        values = [math.nan if line[key] is None else float(line[key]) for line in lines]
        return [int(line["step"]) for line in lines], values
