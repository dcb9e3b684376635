"""Scores of semantic maps: IoU by class, its mean, pixel accuracy; from the confusion matrix of all images.

Shapes: C classes · h, w the logits' map · H, W the original image. Logits are resized as detectron2's
`sem_seg_postprocess` does: to the canvas, cropped to the image, to the image's original size.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from giantdet.config.conventions import Conventions
from giantdet.data.dataset import Dataset
from giantdet.distributed import comm
from giantdet.errors import DataError
from giantdet.evaluation.evaluator import Scores
from giantdet.structures import IGNORE, Batch, Outputs

SEMANTIC_NUMBERS = ("mIoU", "mACC", "pACC")
_LOGITS_BYTES = 2**28  # at a time; 150 classes of an image of 4,000 x 3,000 pixels are 7 GB


class SemanticEvaluator:
    """mIoU; see `Evaluator`. Images without a semantic map are not scored."""

    PRIMARY: ClassVar[Mapping[str, str]] = {"semantic": "mIoU"}

    def __init__(
        self, dataset: Dataset, tasks: Sequence[str], category_ids: Sequence[int], conventions: Conventions
    ) -> None:
        self.dataset = dataset
        self.index = {int(image_id): i for i, image_id in enumerate(dataset.image_ids)}
        self.confusion_CC = torch.zeros(0, 0, dtype=torch.int64)  # C is known from the first batch on

    def add(self, outputs: Outputs, batch: Batch) -> None:
        """See `Evaluator.add`."""
        assert outputs.semantic_BCHW is not None
        classes = outputs.semantic_BCHW.shape[1]
        if len(self.confusion_CC) == 0:
            self.confusion_CC = torch.zeros(classes, classes, dtype=torch.int64)
        for b, image_id in enumerate(batch.image_ids_B.tolist()):
            truth = self.dataset.semantic_map(self.index[image_id]) if image_id >= 0 else None
            if truth is None:
                continue
            truth_HW, found_HW = torch.from_numpy(truth), semantic_classes(outputs.semantic_BCHW, batch, b)
            name = f"the semantic map of {self.dataset.path(self.index[image_id])}"
            if truth_HW.shape != found_HW.shape:
                raise DataError(
                    f"{name} has {tuple(truth_HW.shape)} pixels, its image {tuple(found_HW.shape)}"
                )
            try:
                self.confusion_CC += confusion(truth_HW, found_HW, classes)
            except ValueError as error:
                raise DataError(f"{name}: {error}") from None

    def merge(self) -> None:
        """See `Evaluator.merge`."""
        comm.sum_on_cpus_(self.confusion_CC)

    def scores(self) -> Scores:
        """mIoU, mACC, pACC and IoU by class; {} where no image has a semantic map."""
        if not self.confusion_CC.any():
            return {}
        return {"semantic": semantic_scores(self.confusion_CC, self._names())}

    def save(self, file: Path) -> None:
        """The confusion matrix, rows the true classes, beside `file` as NAME_semantic.json."""
        content = {"classes": self._names(), "confusion": self.confusion_CC.tolist()}
        file.with_name(f"{file.stem}_semantic.json").write_text(json.dumps(content))

    def table(self, scores: Scores) -> str:
        """The numbers and IoU by class as text."""
        return semantic_table(scores["semantic"]) if "semantic" in scores else ""

    def _names(self) -> list[str]:
        """Of the classes, by number; the number itself where the data set has no name."""
        names = self.dataset.semantic_names
        return [names[c] if c < len(names) else str(c) for c in range(len(self.confusion_CC))]


def semantic_classes(logits_BChw: Tensor, batch: Batch, b: int) -> Tensor:
    """The best class of each pixel of image b at its original size, int64 `[H, W]` on the CPU."""
    canvas_hw = batch.images_B3HW.shape[-2:]
    height, width = (round(float(side)) for side in batch.sizes_B2[b])
    original_hw = (int(batch.original_sizes_B2[b, 0]), int(batch.original_sizes_B2[b, 1]))
    pixels = canvas_hw[0] * canvas_hw[1] + original_hw[0] * original_hw[1]
    few = max(1, _LOGITS_BYTES // (4 * pixels))
    best_HW, class_HW = torch.zeros(0), torch.zeros(0)
    for first in range(0, logits_BChw.shape[1], few):
        part = _resize(logits_BChw[b : b + 1, first : first + few].float(), canvas_hw)
        part = _resize(part[:, :, :height, :width], original_hw)
        top_HW, index_HW = part[0].max(0)
        if first == 0:
            best_HW, class_HW = top_HW, index_HW
        else:
            better_HW = top_HW > best_HW
            best_HW = torch.where(better_HW, top_HW, best_HW)
            class_HW = torch.where(better_HW, first + index_HW, class_HW)
    return class_HW.cpu()


def _resize(maps: Tensor, size_hw: Sequence[int]) -> Tensor:
    return F.interpolate(maps, size=tuple(size_hw), mode="bilinear", align_corners=False)


def confusion(truth_HW: Tensor, found_HW: Tensor, classes: int) -> Tensor:
    """Pixels by true (row) and found (column) class, int64 `[C, C]`; pixels that are `IGNORE` do not count.

    Raises ValueError where the truth has a class that is not in [0, C).
    """
    truth, found = truth_HW.flatten().long(), found_HW.flatten().long()
    known = truth != IGNORE
    truth, found = truth[known], found[known]
    if len(truth) and int(truth.max()) >= classes:
        raise ValueError(f"class {int(truth.max())} is none of the model's {classes}, numbered from 0")
    return torch.bincount(truth * classes + found, minlength=classes**2).view(classes, classes)


def semantic_scores(confusion_CC: Tensor, names: Sequence[str]) -> dict[str, Any]:
    """mIoU, mACC, pACC and `per_class` IoU by name, in [0, 1].

    As in detectron2's `SemSegEvaluator`, means are over the classes that occur in the truth; the IoU of the
    others is NaN. mmsegmentation counts a class that is found but nowhere true as 0.
    """
    counts_CC = confusion_CC.double()
    both_C, true_C, found_C = counts_CC.diag(), counts_CC.sum(1), counts_CC.sum(0)
    occurs_C = true_C > 0
    accuracy_C = torch.where(occurs_C, both_C / true_C, torch.nan)
    iou_C = torch.where(occurs_C, both_C / (true_C + found_C - both_C), torch.nan)
    return {
        "mIoU": float(iou_C.nanmean()),
        "mACC": float(accuracy_C.nanmean()),
        "pACC": float(both_C.sum() / counts_CC.sum()),
        "per_class": dict(zip(names, iou_C.tolist(), strict=True)),
    }


def semantic_table(scores: Mapping[str, Any]) -> str:
    """The numbers, and IoU by class, as text."""
    lines = [
        "          " + "".join(f"{name:>7}" for name in SEMANTIC_NUMBERS),
        "semantic  " + "".join(f"{scores[name]:>7.3f}" for name in SEMANTIC_NUMBERS),
        "IoU by class",
    ]
    width = max(map(len, scores["per_class"]), default=0)
    lines += [f"  {name:<{width}}  {iou:.3f}" for name, iou in scores["per_class"].items()]
    return "\n".join(lines)
