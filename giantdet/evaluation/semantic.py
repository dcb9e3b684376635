"""Scores of semantic maps: IoU by class, its mean, pixel accuracy; from the confusion matrix of all images.

Shapes: C classes · h, w the logits' map · H, W the original image. Logits are resized as detectron2's
`sem_seg_postprocess` does: to the canvas, cropped to the image, to the image's original size.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from giantdet.config.architectures.common import ArchitectureConfig
from giantdet.config.classes import Classes, unique_names
from giantdet.config.json_text import json_text
from giantdet.config.types import Backend
from giantdet.data.dataset import Dataset
from giantdet.distributed import comm
from giantdet.errors import DataError
from giantdet.evaluation.evaluator import Scores, shown
from giantdet.evaluation.examples import Examples
from giantdet.evaluation.truth import Truth
from giantdet.structures import IGNORE, Batch, Outputs

SEMANTIC_NUMBERS = ("mIoU", "mACC", "pACC")
_LOGITS_BYTES = 2**28  # resized at a time; 150 classes of an image of 4,000 x 3,000 pixels are 7 GB


class SemanticEvaluator:
    """mIoU; see `Evaluator`. Images without a semantic map are not scored."""

    PRIMARY: ClassVar[Mapping[str, str]] = {"semantic": "mIoU"}
    WINDOWS: ClassVar[bool] = True
    PROTOCOL: ClassVar[str | None] = None

    def __init__(
        self,
        dataset: Dataset,
        tasks: Sequence[str],
        classes: Classes,
        model: ArchitectureConfig,
        max_detections: int | None = None,
        backend: Backend = "auto",
    ) -> None:
        self.names = unique_names(classes.semantic)
        self.truth, self.maps, self.examples = Truth(dataset, "semantic"), SemanticMaps(), Examples()
        # The last column counts the pixels of images that could not be read.
        self.confusion_CX = torch.zeros(len(self.names), len(self.names) + 1, dtype=torch.int64)

    def add(self, outputs: Outputs, batch: Batch) -> None:
        """See `Evaluator.add`."""
        assert outputs.semantic_BCHW is not None
        for image_id, found_HW in self.maps.add(outputs.semantic_BCHW, batch):
            if (truth := self.truth.of(image_id)) is not None:
                counts_CX = self._count(image_id, torch.from_numpy(truth), found_HW)
                self.examples.add(image_id, float(_iou(counts_CX).nanmean()), found_HW)

    def _count(self, image_id: int, truth_HW: Tensor, found_HW: Tensor) -> Tensor:
        name = f"the semantic map of {self.truth.path(image_id)}"
        if truth_HW.shape != found_HW.shape:
            raise DataError(f"{name} has {tuple(truth_HW.shape)} pixels, its image {tuple(found_HW.shape)}")
        try:
            # A model may have more classes than names: those mean nothing.
            found_HW = found_HW.clamp_max(len(self.names))
            counts_CX = confusion(truth_HW, found_HW, len(self.names))
        except ValueError as error:
            raise DataError(f"{name}: {error}") from None
        self.confusion_CX += counts_CX
        return counts_CX

    def merge(self) -> None:
        """See `Evaluator.merge`. The pixels of images that could not be read are of no class."""
        for image_id, truth in self.truth.missed():
            truth_HW = torch.from_numpy(truth)
            self._count(image_id, truth_HW, torch.full(truth_HW.shape, len(self.names)))
        comm.sum_on_cpus_(self.confusion_CX)
        self.examples.merge()

    def scores(self) -> Scores:
        """Return mIoU, mACC, pACC and IoU by class; {} where no image has a semantic map."""
        if not self.confusion_CX.any():
            return {}
        return {"semantic": semantic_scores(self.confusion_CX, self.names)}

    def save(self, file: Path) -> None:
        """Write the confusion matrix, rows the true classes, beside `file` as NAME_semantic.json.

        The maps of some images are written to the folder NAME_semantic; `examples` in the JSON lists them.
        """
        folder = file.with_name(f"{file.stem}_semantic")
        content = {"classes": [*self.names, "none"], "confusion": self.confusion_CX.tolist()}
        content["examples"] = self.examples.save(folder)
        folder.with_suffix(".json").write_text(json_text(content))

    def table(self, scores: Scores) -> str:
        """Return the numbers and IoU by class as text."""
        return semantic_table(scores["semantic"]) if "semantic" in scores else ""


class SemanticMaps:
    """Collects logits until an image is complete, and returns its class map.

    Logits of windows are resized to their pixels, and averaged where windows overlap (mmsegmentation's
    `slide_inference`). The windows of an image must follow each other.
    """

    def __init__(self) -> None:
        self.image_id = -1

    def add(self, logits_BChw: Tensor, batch: Batch) -> Iterator[tuple[int, Tensor]]:
        """Yield (image id, int64 `[H, W]` classes at the image's original size) of all complete images."""
        for b, image_id in enumerate(batch.image_ids_B.tolist()):
            if image_id < 0:
                continue
            if batch.windows_B6 is None:
                yield image_id, whole_image_classes(logits_BChw, batch, b)
            elif (found_HW := self._add_window(logits_BChw[b : b + 1], batch, b)) is not None:
                yield image_id, found_HW

    def _add_window(self, logits_1Chw: Tensor, batch: Batch, b: int) -> Tensor | None:
        assert batch.windows_B6 is not None
        top, left, height, width, number, count = batch.windows_B6[b].tolist()
        rows, columns = (round(float(side)) for side in batch.sizes_B2[b])
        if number == 0:
            self.image_id = int(batch.image_ids_B[b])
            self.sum_CHW = logits_1Chw.new_zeros(logits_1Chw.shape[1], height, width, dtype=torch.float32)
            self.times_HW = logits_1Chw.new_zeros(height, width, dtype=torch.float32)
        if self.image_id != int(batch.image_ids_B[b]):  # its first window could not be read
            return None
        part_CHW = _resize(logits_1Chw.float(), batch.images_B3HW.shape[-2:])[0, :, :rows, :columns]
        self.sum_CHW[:, top : top + rows, left : left + columns] += part_CHW
        self.times_HW[top : top + rows, left : left + columns] += 1
        if number < count - 1:
            return None
        mean_CHW, original_hw = self.sum_CHW / self.times_HW, _original(batch, b)
        return _best(mean_CHW, original_hw, lambda part_1CHW: _resize(part_1CHW, original_hw))


def whole_image_classes(logits_BChw: Tensor, batch: Batch, b: int) -> Tensor:
    """Return the best class of each pixel of image b at its original size, int64 `[H, W]` on the CPU."""
    canvas_hw, original_hw = batch.images_B3HW.shape[-2:], _original(batch, b)
    height, width = (round(float(side)) for side in batch.sizes_B2[b])

    def resized(part_1Chw: Tensor) -> Tensor:
        return _resize(_resize(part_1Chw, canvas_hw)[:, :, :height, :width], original_hw)

    return _best(
        logits_BChw[b].float(), (canvas_hw[0] + original_hw[0], canvas_hw[1] + original_hw[1]), resized
    )


def _original(batch: Batch, b: int) -> tuple[int, int]:
    return int(batch.original_sizes_B2[b, 0]), int(batch.original_sizes_B2[b, 1])


def _best(logits_Chw: Tensor, size_hw: Sequence[int], resized: Callable[[Tensor], Tensor]) -> Tensor:
    """Return the class of the highest resized logit at each pixel; as many classes at a time as fit."""
    few = max(1, _LOGITS_BYTES // (4 * size_hw[0] * size_hw[1]))
    best_HW, class_HW = torch.zeros(0), torch.zeros(0)
    for first in range(0, len(logits_Chw), few):
        top_HW, index_HW = resized(logits_Chw[None, first : first + few])[0].max(0)
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
    """Return the number of pixels by true (row) and found (column) class, int64 `[C, C + 1]`.

    Pixels that are `IGNORE` do not count. Column C is for pixels for which no class was found.
    Raises ValueError where the truth has a class that is not in [0, C).
    """
    truth, found = truth_HW.flatten().long(), found_HW.flatten().long()
    known = truth != IGNORE
    truth, found = truth[known], found[known]
    if len(truth) and int(truth.max()) >= classes:
        raise ValueError(f"class {int(truth.max())} is none of the model's {classes}, numbered from 0")
    size = (classes, classes + 1)
    return torch.bincount(truth * size[1] + found, minlength=size[0] * size[1]).view(size)


def semantic_scores(confusion_CX: Tensor, names: Sequence[str]) -> dict[str, Any]:
    """Return mIoU, mACC, pACC and `per_class` IoU by name, in [0, 1].

    As in detectron2's `SemSegEvaluator`, means are over the classes that occur in the truth; the IoU of the
    others is None. mmsegmentation counts a class that is found but nowhere true as 0.
    """
    counts_CX = confusion_CX.double()
    true_C, both_C = counts_CX.sum(1), counts_CX.diagonal()
    occurs_C = true_C > 0
    accuracy_C = torch.where(occurs_C, both_C / true_C, torch.nan)
    iou_C = _iou(confusion_CX)
    return {
        "mIoU": float(iou_C.nanmean()),
        "mACC": float(accuracy_C.nanmean()),
        "pACC": float(both_C.sum() / counts_CX.sum()),
        "per_class": {
            name: iou if occurs else None
            for name, iou, occurs in zip(names, iou_C.tolist(), occurs_C.tolist(), strict=True)
        },
    }


def _iou(confusion_CX: Tensor) -> Tensor:
    """Return the IoU of each class, `[C]` float64; NaN for a class that is not in the truth."""
    counts_CX = confusion_CX.double()
    true_C, both_C = counts_CX.sum(1), counts_CX.diagonal()
    found_C = counts_CX.sum(0)[: len(true_C)]
    return torch.where(true_C > 0, both_C / (true_C + found_C - both_C), torch.nan)


def semantic_table(scores: Mapping[str, Any]) -> str:
    """Return the numbers, and IoU by class, as text."""
    lines = [
        "          " + "".join(f"{name:>7}" for name in SEMANTIC_NUMBERS),
        "semantic  " + "".join(shown(scores[name]) for name in SEMANTIC_NUMBERS),
        "IoU by class",
    ]
    width = max(map(len, scores["per_class"]), default=0)
    lines += [f"  {name:<{width}}{shown(iou)}" for name, iou in scores["per_class"].items()]
    return "\n".join(lines)
