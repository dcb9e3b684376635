"""Multi-scale testing: what a model finds in scaled and mirrored views of an image, merged.

The default equals detectron2's `GeneralizedRCNNWithTTA`:

1. The model sees each view without knowing of the others; boxes are mapped back to the image.
2. The boxes of all views are merged by NMS within their class, at the model's own threshold, and the best
   ones are kept, as many as the model returns for one image.
3. The masks of the merged boxes are predicted in each view, mirrored back, and averaged.

Semantic maps are the mean of the views' probabilities at the image's size. Shapes: V views of a pass · D
merged detections · C classes of pixels · H, W the image.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from giantdet.architectures import Architecture
from giantdet.config.architectures import ArchitectureConfig
from giantdet.config.types import TtaConfig
from giantdet.data.transforms import Geometry
from giantdet.data.views import no_targets, passes_of, view_batch, views_of
from giantdet.engine.fusion import fuse
from giantdet.errors import ConfigError
from giantdet.ops.boxes import non_empty
from giantdet.structures import Batch, Detections, Outputs

WBF_IOU = 0.55
"""Threshold of weighted boxes fusion where none is given: the paper's value."""


def check_tta(architecture: Architecture, window_stride: int | None) -> None:
    """Raise ConfigError for a model that cannot be shown images at several scales, or not with windows."""
    if window_stride is not None:
        raise ConfigError(
            "giantdet.eval.tta (--tta) shows whole images at several scales, and "
            f"giantdet.eval.window_stride is {window_stride}: leave out one of the two"
        )
    if architecture.backbone.one_size:
        raise ConfigError(
            "giantdet.eval.tta (--tta) shows images at several sizes, and "
            f"{architecture.backbone.one_size} is built for one: leave it out"
        )


class MultiScale:
    """A model that is shown views of an image, `config.views_at_a_time` in each pass.

    Args:
        model: an architecture, or a DeepSpeed engine with one, in evaluation mode. Its canvas changes with
            the views and is set back after each image. All ranks run as many passes for an image.
        section: the model's section.
        window_stride: the model's own setting, `EvalConfig.window_stride`.

    Raises ConfigError where `check_tta` does.
    """

    def __init__(
        self,
        model: Any,
        section: ArchitectureConfig,
        config: TtaConfig,
        device: torch.device | str,
        window_stride: int | None = None,
    ) -> None:
        self.model, self.section, self.config, self.device = model, section, config, device
        self.architecture: Architecture = getattr(model, "module", model)
        check_tta(self.architecture, window_stride)
        self.multiple = math.lcm(32, *self.architecture.backbone.strides)

    @torch.no_grad()
    def __call__(self, whole: Batch) -> tuple[Outputs, Batch]:
        """Return the outputs for an image in its own pixels, and the batch that they belong to.

        `whole` is a batch of one image as it is in the file, without scaling or padding.
        """
        size_hw = (int(whole.original_sizes_B2[0, 0]), int(whole.original_sizes_B2[0, 1]))
        pixels_HW3 = whole.images_B3HW[0].permute(1, 2, 0).cpu().numpy()
        passes = [
            (views, view_batch(pixels_HW3, views, self.multiple, int(whole.image_ids_B[0])))
            for views in passes_of(views_of(size_hw, self.config), self.config.views_at_a_time)
        ]
        canvas = self.architecture.canvas
        try:
            outputs = self._merged(passes, size_hw)
        finally:
            self.architecture.set_canvas(canvas)
        in_pixels = Batch(
            images_B3HW=torch.zeros(1, 1, 1, 1, dtype=torch.uint8).expand(1, 3, *size_hw),
            sizes_B2=torch.tensor([size_hw], dtype=torch.float32),
            targets=no_targets(1),
            seeds_B=whole.seeds_B,
            image_ids_B=whole.image_ids_B,
            original_sizes_B2=torch.tensor([size_hw]),
        )
        return outputs, in_pixels

    def _merged(self, passes: list[tuple[list[Geometry], Batch]], size_hw: tuple[int, int]) -> Outputs:
        boxes: list[Tensor] = []
        scores: list[Tensor] = []
        labels: list[Tensor] = []
        sum_CHW: Tensor | None = None
        has_objects = has_masks = False
        count = sum(len(views) for views, _ in passes)
        for views, batch in passes:
            outputs = self._run(batch)
            if outputs.semantic_BCHW is not None:
                part_CHW = _probabilities(outputs.semantic_BCHW, batch, views, size_hw)
                sum_CHW = part_CHW if sum_CHW is None else sum_CHW + part_CHW
            if (found := outputs.detections) is not None:
                has_objects, has_masks = True, found.masks_BDSS is not None
                for v, view in enumerate(views):
                    valid_D = found.valid_BD[v]
                    boxes.append(to_image(found.boxes_BD4[v][valid_D].cpu(), view))
                    scores.append(found.scores_BD[v][valid_D].cpu())
                    labels.append(found.labels_BD[v][valid_D].cpu())
        semantic_1CHW = None if sum_CHW is None else (sum_CHW / count).clamp_min(1e-12).log()[None]
        if not has_objects:
            return Outputs(None, semantic_1CHW)
        merged = self._merge_boxes(torch.cat(boxes), torch.cat(scores), torch.cat(labels), size_hw, count)
        return Outputs(self._with_masks(merged, passes) if has_masks else merged, semantic_1CHW)

    def _run(self, batch: Batch, found: Detections | None = None) -> Outputs:
        height, width = batch.images_B3HW.shape[-2:]
        self.architecture.set_canvas((height, width))
        given = () if found is None else (found.to(self.device),)
        outputs: Outputs = self.model(batch.to(self.device), *given)
        return outputs

    def _merge_boxes(
        self, boxes_N4: Tensor, scores_N: Tensor, labels_N: Tensor, size_hw: tuple[int, int], members: int
    ) -> Detections:
        """Return the best boxes of all views, in as many slots as the model has."""
        slots, nms_iou = self.section.most_detections, self.section.detections_nms_iou
        assert slots is not None and nms_iou is not None
        limits_4 = torch.tensor([size_hw[1], size_hw[0]] * 2, dtype=torch.float32)
        boxes_N4 = boxes_N4.clamp_min(0).minimum(limits_4)
        own = self.config.iou
        iou = own if own is not None else WBF_IOU if self.config.merge == "wbf" else nms_iou
        fused = fuse(self.config.merge, boxes_N4, scores_N, labels_N, iou, members).first(slots)
        empty = slots - len(fused.scores_D)
        boxes_D4 = F.pad(fused.boxes_D4, (0, 0, 0, empty))
        return Detections(
            boxes_BD4=boxes_D4[None],
            scores_BD=F.pad(fused.scores_D, (0, empty))[None],
            labels_BD=F.pad(fused.labels_D, (0, empty))[None],
            valid_BD=non_empty(boxes_D4)[None],
            masks_BDSS=None,
        )

    def _with_masks(self, merged: Detections, passes: list[tuple[list[Geometry], Batch]]) -> Detections:
        """Return the merged detections with the mean of the masks that are predicted in each view."""
        masks: list[Tensor] = []
        for views, batch in passes:
            boxes_VD4 = torch.stack([to_view(merged.boxes_BD4[0], view) for view in views])
            given = Detections(
                boxes_BD4=boxes_VD4.where(merged.valid_BD[..., None], 0.0),
                scores_BD=merged.scores_BD.expand(len(views), -1),
                labels_BD=merged.labels_BD.expand(len(views), -1).contiguous(),
                valid_BD=merged.valid_BD.expand(len(views), -1),
                masks_BDSS=None,
            )
            found = self._run(batch, given).detections
            assert found is not None and found.masks_BDSS is not None
            for view, masks_DSS in zip(views, found.masks_BDSS.cpu(), strict=True):
                masks.append(masks_DSS.flip(-1) if view.flip else masks_DSS)
        return merged._replace(masks_BDSS=torch.stack(masks).mean(0)[None])


def to_image(boxes_N4: Tensor, view: Geometry) -> Tensor:
    """Return boxes of a view, xyxy in its pixels, in pixels of the image."""
    boxes_N4 = _mirrored(boxes_N4, view.size_hw[1]) if view.flip else boxes_N4
    return boxes_N4 * torch.tensor([1 / scale for scale in view.scale_yx[::-1]] * 2, dtype=torch.float32)


def to_view(boxes_N4: Tensor, view: Geometry) -> Tensor:
    """Return boxes of the image in pixels of a view."""
    boxes_N4 = boxes_N4 * torch.tensor(view.scale_yx[::-1] * 2, dtype=torch.float32)
    return _mirrored(boxes_N4, view.size_hw[1]) if view.flip else boxes_N4


def _mirrored(boxes_N4: Tensor, width: int) -> Tensor:
    x0, y0, x1, y1 = boxes_N4.unbind(1)
    return torch.stack([width - x1, y0, width - x0, y1], 1)


def _probabilities(
    logits_VChw: Tensor, batch: Batch, views: list[Geometry], size_hw: tuple[int, int]
) -> Tensor:
    """Return the sum over the views of class probabilities at the image's size, float32 `[C, H, W]`."""
    total = logits_VChw.new_zeros(logits_VChw.shape[1], *size_hw, dtype=torch.float32)
    for logits_Chw, view in zip(logits_VChw.float(), views, strict=True):
        height, width = view.size_hw
        on_canvas = _resize(logits_Chw[None], batch.images_B3HW.shape[-2:])[:, :, :height, :width]
        probabilities = _resize(on_canvas, size_hw)[0].softmax(0)
        total += probabilities.flip(-1) if view.flip else probabilities
    return total


def _resize(maps: Tensor, size_hw: Any) -> Tensor:
    return F.interpolate(maps, size=tuple(size_hw), mode="bilinear", align_corners=False)
