"""COCO's box and mask scores of the detections of all ranks, computed by pycocotools.

Results have the image and category ids of the data set.
"""

from __future__ import annotations

import contextlib
import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np
import torch
from pycocotools.coco import COCO
from torch import Tensor

from giantdet.config.architectures.common import ArchitectureConfig
from giantdet.config.classes import Classes
from giantdet.config.conventions import CONVENTIONS, Conventions
from giantdet.config.json_text import json_text
from giantdet.data.dataset import Dataset
from giantdet.data.truth import ground_truth
from giantdet.distributed import comm
from giantdet.evaluation.evaluator import Scores, shown
from giantdet.evaluation.judge import CocoJudge
from giantdet.evaluation.rle import Rle, encode_pasted
from giantdet.structures import Batch, Detections, Outputs

IouType = Literal["bbox", "segm"]
_SIZES = {"s": "small", "m": "medium", "l": "large"}
KIND = {"bbox": "box", "segm": "mask"}
DEFAULT_CONVENTIONS = CONVENTIONS["detectron2"]


class CocoEvaluator:
    """Box and mask AP; see `Evaluator`. Masks are scored if an object of the data set has one."""

    PRIMARY: ClassVar[Mapping[str, str]] = {"box": "AP", "mask": "AP"}
    WINDOWS: ClassVar[bool] = False

    def __init__(
        self,
        dataset: Dataset,
        tasks: Sequence[str],
        classes: Classes,
        model: ArchitectureConfig,
        max_detections: int = 100,
    ) -> None:
        self.dataset, self.category_ids, self.conventions = dataset, classes.object_ids, model.reference
        self.max_detections = max_detections
        self.masks = "mask" in tasks and dataset.has_masks
        self.results: list[dict[str, Any]] = []

    def add(self, outputs: Outputs, batch: Batch) -> None:
        """See `Evaluator.add`."""
        assert outputs.detections is not None
        self.results += to_coco(outputs.detections, batch, self.category_ids, self.conventions)

    def merge(self) -> None:
        """See `Evaluator.merge`."""
        self.results = [result for part in comm.gather_objects(self.results) for result in part]

    def scores(self) -> Scores:
        """Return the COCO numbers and AP by class, of boxes and masks.

        {} without classes of objects, and for a list of images without annotations.
        """
        if not self.dataset.classes.objects or not self.dataset.annotated:
            return {}
        truth = ground_truth(self.dataset.annotations, self.dataset.instances())
        return all_scores(truth, self.results, self.masks, self.max_detections)

    def save(self, file: Path) -> None:
        """Write the detections in COCO's results format."""
        file.write_text(json_text(self.results))

    def table(self, scores: Scores) -> str:
        """See `score_table`."""
        return score_table({kind: scores[kind] for kind in KIND.values() if kind in scores})


def to_coco(
    detections: Detections,
    batch: Batch,
    category_ids: Sequence[int],
    conventions: Conventions = DEFAULT_CONVENTIONS,
) -> list[dict[str, Any]]:
    """Return detections on the canvas as COCO results, in pixels of the original images."""
    results: list[dict[str, Any]] = []
    # A model may have more classes than names, and classes that the data set does not have (negative ids).
    known_C = torch.tensor([*(number >= 0 for number in category_ids), False])
    labels_BD = detections.labels_BD.cpu().clamp_max(len(category_ids))
    known_BD = known_C[labels_BD].to(detections.valid_BD.device)
    detections = detections._replace(valid_BD=detections.valid_BD & known_BD)
    for b, image_id in enumerate(batch.image_ids_B.tolist()):
        if image_id < 0:
            continue  # an empty slot that fills the batch
        boxes_D4, rles = to_original(detections, batch, b, conventions)
        chosen = detections.valid_BD[b]
        scores, labels = detections.scores_BD[b][chosen].tolist(), detections.labels_BD[b][chosen].tolist()
        for d, (box, score, label) in enumerate(zip(boxes_D4.tolist(), scores, labels, strict=True)):
            x0, y0, x1, y1 = box
            result = {
                "image_id": image_id,
                "category_id": category_ids[label],
                "bbox": [x0, y0, x1 - x0, y1 - y0],
                "score": score,
            }
            if rles is not None:
                result["segmentation"] = rles[d]
            results.append(result)
    return results


def to_original(
    detections: Detections,
    batch: Batch,
    b: int,
    conventions: Conventions = DEFAULT_CONVENTIONS,
) -> tuple[Tensor, list[Rle] | None]:
    """Return the valid detections of image b in its original pixels: boxes `[D, 4]`, and masks or None."""
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
    masks_DSS = detections.masks_BDSS[b][chosen]
    return boxes_D4, encode_pasted(masks_DSS, boxes_D4, (height, width), at_centres).records()


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
    truth: COCO, results: list[dict[str, Any]], iou_type: IouType, max_detections: int = 100
) -> dict[str, Any]:
    """Return COCO's numbers and `per_class`, AP by category name; it is None for a class without objects.

    They are computed by `CocoJudge` from the `max_detections` best results of each class in an image, where
    COCO has 100. `truth` is that of `data/truth.py`.
    """
    with contextlib.redirect_stdout(io.StringIO()):
        # pycocotools takes the area of a result from its box if there is one. Mask AP's size ranges are those
        # of mask areas, so the boxes are removed.
        kept = [{k: v for k, v in r.items() if k != "bbox" or iou_type == "bbox"} for r in results]
        found = truth.loadRes(kept) if kept else _no_results(truth)
        judge = CocoJudge(truth, found, iou_type)
        judge.params.maxDets = _limits(max_detections)
        judge.evaluate()
        judge.accumulate()
    scores: dict[str, Any] = {name: _number(judge, name) for name in coco_numbers(max_detections)}
    precision_TRKAM = judge.eval["precision"]  # IoU thresholds, recalls, classes, areas, detection limits
    scores["per_class"] = {}
    for k, category in enumerate(truth.loadCats(judge.params.catIds)):
        values = precision_TRKAM[:, :, k, 0, -1]
        values = values[values > -1]
        scores["per_class"][category["name"]] = float(values.mean()) if values.size else None
    return scores


def _number(judge: CocoJudge, name: str) -> float:
    """Return one of `coco_numbers`, -1 where no object counts.

    COCOeval.summarize gives AP only for 100 detections: for any other limit its AP is -1.
    """
    kind, detail = name[:2], name[2:]
    areas, limits = judge.params.areaRngLbl, judge.params.maxDets
    area = areas.index(_SIZES.get(detail, "all"))
    limit = limits.index(int(detail)) if kind == "AR" and detail.isdigit() else -1
    values = judge.eval["precision" if kind == "AP" else "recall"]
    if kind == "AP" and detail.isdigit():
        values = values[np.where(judge.params.iouThrs == int(detail) / 100)[0]]
    values = values[..., area, limit]
    values = values[values > -1]
    return float(values.mean()) if values.size else -1.0


def _no_results(truth: COCO) -> COCO:
    empty = COCO()
    empty.dataset = {
        "images": truth.dataset["images"],
        "categories": truth.dataset["categories"],
        "annotations": [],
    }
    empty.createIndex()
    return empty


def evaluate_results(
    annotations: str | Path, results: list[dict[str, Any]], masks: bool, max_detections: int = 100
) -> Scores:
    """Return `{"box": scores, "mask": scores}` of COCO results; without `masks` only the box scores."""
    return all_scores(ground_truth(annotations), results, masks, max_detections)


def all_scores(truth: COCO, results: list[dict[str, Any]], masks: bool, max_detections: int = 100) -> Scores:
    """Return the same for a truth of `data/truth.py`."""
    kinds: list[IouType] = ["bbox", "segm"] if masks else ["bbox"]
    return {KIND[kind]: coco_scores(truth, results, kind, max_detections) for kind in kinds}


def score_table(scores: Scores) -> str:
    """Return a text table of COCO's numbers of boxes and masks, and of AP by class."""
    if not scores:
        return ""
    first = next(iter(scores.values()))
    numbers = [name for name in first if name != "per_class"]
    lines = ["      " + "".join(f"{name:>7}" for name in numbers)]
    for kind, values in scores.items():
        lines.append(f"{kind:<6}" + "".join(shown(values[name]) for name in numbers))
    width = max(map(len, first["per_class"]), default=0)
    lines.append("AP by class")
    for name in first["per_class"]:
        cells = "".join(f"  {kind}{shown(values['per_class'][name])[1:]}" for kind, values in scores.items())
        lines.append(f"  {name:<{width}}{cells}")
    return "\n".join(lines)
