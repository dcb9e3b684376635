"""COCO's box and mask scores of the detections of all ranks.

Results have the image and category ids of the data set.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from numpy.typing import NDArray
from pycocotools.coco import COCO
from torch import Tensor

from giantdet.config.architectures.common import ArchitectureConfig
from giantdet.config.classes import Classes
from giantdet.config.conventions import CONVENTIONS, Conventions
from giantdet.config.json_text import json_text
from giantdet.config.types import Backend
from giantdet.data.dataset import Dataset
from giantdet.data.records import Instances
from giantdet.data.truth import ground_truth
from giantdet.distributed import comm
from giantdet.evaluation.backends import Curves, IouType, check_backend, coco_curves
from giantdet.evaluation.coco_results import CocoResults
from giantdet.evaluation.evaluator import Scores, shown
from giantdet.evaluation.rle import Rle, Rles, encode_pasted
from giantdet.structures import Batch, Detections, Outputs

_IOUS = list(range(50, 100, 5))  # per cent
KIND = {"bbox": "box", "segm": "mask"}
DEFAULT_CONVENTIONS = CONVENTIONS["detectron2"]


Rules = Callable[[COCO, CocoResults, IouType, int, Backend], dict[str, Any]]
"""Function from a truth, results, their kind, the number of detections and the backend to numbers by name."""


class CocoEvaluator:
    """Box and mask AP; see `Evaluator`. Masks are scored if an object of the data set has one."""

    PRIMARY: ClassVar[Mapping[str, str]] = {"box": "AP", "mask": "AP"}
    WINDOWS: ClassVar[bool] = False
    PROTOCOL: ClassVar[str | None] = "coco"
    MAX_DETECTIONS: ClassVar[int] = 100
    """Number of detections that are scored where `eval.max_detections` is None."""
    PER_CLASS: ClassVar[bool] = True
    """True if that is the number per class in an image, False if it is over all classes."""

    def __init__(
        self,
        dataset: Dataset,
        tasks: Sequence[str],
        classes: Classes,
        model: ArchitectureConfig,
        max_detections: int | None = None,
        backend: Backend = "auto",
    ) -> None:
        check_backend(backend)
        self.dataset, self.category_ids, self.conventions = dataset, classes.object_ids, model.reference
        self.max_detections, self.backend = max_detections, backend
        self.masks = "mask" in tasks and dataset.has_masks
        self.parts: list[CocoResults] = []

    def add(self, outputs: Outputs, batch: Batch) -> None:
        """See `Evaluator.add`."""
        assert outputs.detections is not None
        self.parts.append(to_coco(outputs.detections, batch, self.category_ids, self.conventions))

    def merge(self) -> None:
        """See `Evaluator.merge`."""
        self.parts = comm.gather_objects(CocoResults.joined(self.parts))

    def scores(self) -> Scores:
        """See `score`."""
        found = CocoResults.joined(self.parts)
        return self.score(self.dataset, found, self.masks, self.max_detections, self.backend)

    @classmethod
    def score(
        cls,
        dataset: Dataset,
        results: CocoResults,
        masks: bool,
        max_detections: int | None = None,
        backend: Backend = "auto",
    ) -> Scores:
        """Return the numbers and AP by class of boxes and, with `masks`, of masks.

        {} without classes of objects, and for a list of images without annotations.
        """
        if not dataset.classes.objects or not dataset.annotated:
            return {}
        content = dataset.instances()
        truth, limit = ground_truth(dataset.annotations, content), max_detections or cls.MAX_DETECTIONS
        return all_scores(truth, results, masks, limit, backend, cls.rules(content))

    @classmethod
    def rules(cls, content: Instances) -> Rules:
        """Return the function that scores boxes or masks; `content` are the data set's lists."""
        return coco_scores

    def save(self, file: Path) -> None:
        """Write the detections in COCO's results format."""
        file.write_text(json_text(CocoResults.joined(self.parts).records()))

    @classmethod
    def table(cls, scores: Scores) -> str:
        """See `score_table`."""
        return score_table({kind: scores[kind] for kind in KIND.values() if kind in scores})


def to_coco(
    detections: Detections,
    batch: Batch,
    category_ids: Sequence[int],
    conventions: Conventions = DEFAULT_CONVENTIONS,
) -> CocoResults:
    """Return detections on the canvas as COCO results, in pixels of the original images."""
    # A model may have more classes than names, and classes that the data set does not have (negative ids).
    number_C = np.array([*category_ids, -1], np.int64)
    detections = detections.to("cpu")
    category_ids_BD = number_C[detections.labels_BD.clamp_max(len(category_ids)).numpy()]
    detections = detections._replace(valid_BD=detections.valid_BD & torch.from_numpy(category_ids_BD >= 0))
    parts = []
    for b, image_id in enumerate(batch.image_ids_B.tolist()):
        if image_id < 0:
            continue  # an empty slot that fills the batch
        boxes_D4, rles = in_original(detections, batch, b, conventions)
        chosen_D = detections.valid_BD[b].numpy()
        boxes = boxes_D4.double().numpy()
        boxes[:, 2:] -= boxes[:, :2]
        parts.append(
            CocoResults(
                np.full(len(boxes), image_id, np.int64),
                category_ids_BD[b][chosen_D],
                boxes,
                detections.scores_BD[b].double().numpy()[chosen_D],
                rles,
            )
        )
    return CocoResults.joined(parts)


def to_original(
    detections: Detections,
    batch: Batch,
    b: int,
    conventions: Conventions = DEFAULT_CONVENTIONS,
) -> tuple[Tensor, list[Rle] | None]:
    """Return the valid detections of image b in its original pixels: boxes `[D, 4]`, and masks or None."""
    boxes_D4, rles = in_original(detections, batch, b, conventions)
    return boxes_D4, None if rles is None else rles.records()


def in_original(
    detections: Detections, batch: Batch, b: int, conventions: Conventions
) -> tuple[Tensor, Rles | None]:
    """Return the same with the masks as arrays."""
    chosen = detections.valid_BD[b]
    height, width = (int(side) for side in batch.original_sizes_B2[b])
    size_2 = batch.sizes_B2[b].cpu()
    scale_2 = torch.tensor([width / float(size_2[1]), height / float(size_2[0])])
    boxes_D4 = detections.boxes_BD4[b][chosen].cpu() * scale_2.repeat(2)
    limits_4 = torch.tensor([width, height, width, height], dtype=torch.float32)
    boxes_D4 = boxes_D4.clamp_min(0).minimum(limits_4)
    if detections.masks_BDSS is None:
        return boxes_D4, None
    at_centres = conventions.pastes_at_pixel_centres
    return boxes_D4, encode_pasted(detections.masks_BDSS[b][chosen], boxes_D4, (height, width), at_centres)


def coco_numbers(max_detections: int = 100) -> tuple[str, ...]:
    """Return the names of COCO's numbers in its order: `AR10` is the recall with 10 detections per image.

    There are 12 where more than 10 detections are scored; with fewer, the limits above them are left out.
    """
    recalls = (f"AR{limit}" for limit in _limits(max_detections))
    return ("AP", "AP50", "AP75", "APs", "APm", "APl", *recalls, "ARs", "ARm", "ARl")


def _limits(max_detections: int) -> list[int]:
    """Return COCO's numbers of detections per image, `maxDets`, the last of which counts for all APs."""
    return [*(limit for limit in (1, 10) if limit < max_detections), max_detections]


def coco_scores(
    truth: COCO,
    results: CocoResults,
    iou_type: IouType,
    max_detections: int = 100,
    backend: Backend = "auto",
) -> dict[str, Any]:
    """Return COCO's numbers and `per_class`, AP by category name; it is None for a class without objects.

    They are computed from the `max_detections` best results of each class in an image, where COCO has 100.
    `truth` is that of `data/truth.py`; for `backend` see `EvalConfig`.
    """
    limits = _limits(max_detections)
    curves = coco_curves(truth, results, iou_type, limits, backend)
    scores: dict[str, Any] = {name: number_of(curves, limits, name) for name in coco_numbers(max_detections)}
    return scores | {"per_class": ap_by_class(truth, curves)}


def ap_by_class(truth: COCO, curves: Curves) -> dict[str, float | None]:
    """Return AP by category name; None for a category without objects."""
    values = [mean_of(curves.precision_TRKAM[:, :, k, 0, -1]) for k in range(len(truth.cats))]
    names = [truth.cats[number]["name"] for number in sorted(truth.cats)]
    return {name: None if value < 0 else value for name, value in zip(names, values, strict=True)}


def number_of(curves: Curves, limits: list[int], name: str) -> float:
    """Return one of `coco_numbers`, -1 where no object counts.

    COCOeval.summarize gives AP only for 100 detections: for any other limit its AP is -1.
    """
    kind, detail = name[:2], name[2:]
    area = " sml".index(detail) if detail in ("s", "m", "l") else 0
    limit = limits.index(int(detail)) if kind == "AR" and detail.isdigit() else -1
    if kind == "AR":
        return mean_of(curves.recall_TKAM[..., area, limit])
    iou = _IOUS.index(int(detail)) if detail.isdigit() else slice(None)
    return mean_of(curves.precision_TRKAM[iou, ..., area, limit])


def mean_of(values: NDArray[np.float64]) -> float:
    """Return the mean of the numbers that are not -1, and -1 if there are none."""
    values = values[values > -1]
    return float(values.mean()) if values.size else -1.0


def evaluate_results(
    annotations: str | Path,
    results: Sequence[Mapping[str, Any]],
    masks: bool,
    max_detections: int = 100,
    backend: Backend = "auto",
) -> Scores:
    """Return `{"box": scores, "mask": scores}` of COCO results; without `masks` only the box scores."""
    return all_scores(ground_truth(annotations), CocoResults.of(results), masks, max_detections, backend)


def all_scores(
    truth: COCO,
    results: CocoResults,
    masks: bool,
    max_detections: int = 100,
    backend: Backend = "auto",
    rules: Rules | None = None,
) -> Scores:
    """Return the same for a truth of `data/truth.py`, by COCO's rules or others."""
    rules = rules or coco_scores
    kinds: list[IouType] = ["bbox", "segm"] if masks else ["bbox"]
    return {KIND[kind]: rules(truth, results, kind, max_detections, backend) for kind in kinds}


def number_table(scores: Scores) -> str:
    """Return a text table of the numbers of boxes and masks."""
    if not scores:
        return ""
    first = next(iter(scores.values()))
    numbers = [name for name in first if name != "per_class"]
    lines = ["      " + "".join(f"{name:>7}" for name in numbers)]
    for kind, values in scores.items():
        lines.append(f"{kind:<6}" + "".join(shown(values[name]) for name in numbers))
    return "\n".join(lines)


def score_table(scores: Scores) -> str:
    """Return the same of COCO's numbers, and AP by class."""
    if not scores:
        return ""
    first = next(iter(scores.values()))
    lines = [number_table(scores)]
    width = max(map(len, first["per_class"]), default=0)
    lines.append("AP by class")
    for name in first["per_class"]:
        cells = "".join(f"  {kind}{shown(values['per_class'][name])[1:]}" for kind, values in scores.items())
        lines.append(f"  {name:<{width}}{cells}")
    return "\n".join(lines)
