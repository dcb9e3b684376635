"""Cascade Mask R-CNN (Cai and Vasconcelos 2018): Mask R-CNN whose box head is three, each at a higher IoU.

Each stage refines the boxes of the one before. Without its mask head it is Cascade R-CNN.
Shapes: B images · N proposals · R sampled RoIs · P mask slots · D detections · C classes.
Reference: detectron2's `CascadeROIHeads`. RoIs are sampled once, for the first stage; the others take all
slots, and match the boxes that the stage before made of them again. The mask head trains on the first
stage's RoIs. At inference the softmax scores of the stages are averaged, and the boxes are the last stage's.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from giantdet.architectures.base import Architecture, mean_counts
from giantdet.config.architectures.cascade_mask_rcnn import CascadeMaskRcnnConfig
from giantdet.config.architectures.common import BoxLoss, NormPart
from giantdet.config.conventions import Conventions
from giantdet.layers.blocks import recompute
from giantdet.layers.box_head import (
    BoxHead,
    BoxPredictions,
    SampledRois,
    box_losses,
    match_rois,
    sample_rois,
    scores_and_boxes,
    select_detections,
    training_predictions,
)
from giantdet.layers.common import scale_gradient
from giantdet.layers.fpn import STRIDES, build_fpn
from giantdet.layers.mask_head import (
    MaskHead,
    MaskPredictions,
    mask_loss,
    mask_training_predictions,
    with_masks,
)
from giantdet.layers.roi_pool import RoiPool
from giantdet.layers.rpn import Rpn, RpnPredictions, rpn_losses
from giantdet.ops.boxes import clip_boxes, non_empty
from giantdet.structures import Batch, Outputs, Targets


class Predictions(NamedTuple):
    """What is trained, with its targets."""

    rpn: RpnPredictions
    stages: tuple[BoxPredictions, ...]
    mask: MaskPredictions | None


class CascadeMaskRcnn(Architecture):
    """Two-stage detector with a cascade of box heads; see `Architecture` for the arguments."""

    CLASS_LAYERS = (
        "box_head.0.classes.",
        "box_head.1.classes.",
        "box_head.2.classes.",
        "mask_head.masks.",
    )

    def __init__(self, config: CascadeMaskRcnnConfig, image_size: tuple[int, int]) -> None:
        super().__init__(config, image_size)
        self.config = config
        channels, backbone = config.fpn.channels, self.backbone
        self.fpn = build_fpn(config.fpn, backbone.channels, backbone.strides, backbone.is_plain)
        self.rpn = Rpn(config.rpn, channels, STRIDES, image_size, self.conventions)
        self.pool = RoiPool(self.conventions.aligned_rois)
        self.box_head = nn.ModuleList(
            BoxHead(config.box_head, channels, self.num_classes, class_agnostic=True)
            for _ in config.box_head.ious
        )
        self.mask_head = (
            MaskHead(config.mask_head, channels, self.num_classes) if config.mask_head.enabled else None
        )
        if config.checkpoint_heads:
            for part in (self.fpn, *self.box_head, self.mask_head):
                if part is not None:
                    recompute(part)

    @property
    def targets(self) -> frozenset[str]:
        """See `Architecture.targets`."""
        return frozenset({"boxes", "masks"} if self.mask_head is not None else {"boxes"})

    @property
    def tasks(self) -> tuple[str, ...]:
        """See `Architecture.tasks`."""
        return ("box", "mask") if self.mask_head is not None else ("box",)

    def pyramid(self, batch: Batch) -> list[Tensor]:
        """P2 to P6 of a batch."""
        levels: list[Tensor] = self.fpn(self.backbone(self.normalise(batch.images_B3HW, batch.sizes_B2)))
        return levels

    def stage(self, number: int, levels: list[Tensor], boxes_BR4: Tensor) -> tuple[Tensor, Tensor]:
        """Logits `[B*R, C + 1]` and deltas `[B*R, 1, 4]` of a box head.

        The features' gradient is divided by the number of stages, which all send theirs into the pyramid.
        """
        config = self.config.box_head
        features = self.pool(levels, boxes_BR4, config.resolution, config.sampling_ratio)
        logits, deltas = self.box_head[number](scale_gradient(features, 1 / len(self.box_head)))
        return logits, deltas

    def predict(self, batch: Batch) -> Predictions:
        """Predictions at sampled anchors, RoIs of each stage and masks; see `Architecture.predict`."""
        levels, targets = self.pyramid(batch), batch.targets
        proposals, rpn = self.rpn(levels, batch.sizes_B2, targets, batch.seeds_B)
        assert rpn is not None
        config = self.config.box_head
        sampled = sample_rois(proposals, targets, config, config.ious[0], self.num_classes, batch.seeds_B)
        stages = self.train_stages(levels, sampled, targets, batch.sizes_B2)
        mask = None
        if self.mask_head is not None:
            mask = mask_training_predictions(
                self.mask_head, self.pool, levels, sampled, targets, self.conventions
            )
        return Predictions(rpn=rpn, stages=stages, mask=mask)

    def train_stages(
        self, levels: list[Tensor], rois: SampledRois, targets: Targets, sizes_B2: Tensor
    ) -> tuple[BoxPredictions, ...]:
        """Each stage's predictions on its RoIs; `rois` are the first one's."""
        config = self.config.box_head
        stages: list[BoxPredictions] = []
        for number, (iou, weights) in enumerate(zip(config.ious, config.delta_weights, strict=True)):
            if stages:
                boxes_BR4, valid_BR = refined_rois(stages[-1].boxes_BR4, rois.valid_BR, sizes_B2)
                rois = match_rois(boxes_BR4, valid_BR, targets, iou, self.num_classes)
            logits, deltas = self.stage(number, levels, rois.boxes_BR4)
            stages.append(training_predictions(logits, deltas, rois, targets, weights))
        return tuple(stages)

    def answer(self, batch: Batch) -> Outputs:
        """Detections with masks; see `Architecture.answer`."""
        levels = self.pyramid(batch)
        proposals, _ = self.rpn(levels, batch.sizes_B2, None, batch.seeds_B)
        config = self.config.box_head
        boxes_BN4, valid_BN = proposals.boxes_BN4, proposals.valid_BN
        scores: list[Tensor] = []
        for number, weights in enumerate(config.delta_weights):
            logits, deltas = self.stage(number, levels, boxes_BN4)
            scores_BNC, boxes_BN14 = scores_and_boxes(logits, deltas, boxes_BN4, weights)
            scores.append(scores_BNC)
            boxes_BN4, valid_BN = refined_rois(boxes_BN14.squeeze(2), valid_BN, batch.sizes_B2)
        found = select_detections(
            torch.stack(scores).mean(0),
            boxes_BN4[:, :, None],
            valid_BN,
            batch.sizes_B2,
            config,
            self.conventions.min_detection_size,
        )
        if self.mask_head is not None:
            found = with_masks(self.mask_head, self.pool, levels, found)
        return Outputs(found)

    def losses(self, predictions: Predictions, batch: Batch) -> dict[str, Tensor]:
        """See `cascade_losses`."""
        return cascade_losses(predictions, self.conventions, self.config.box_head.loss)

    def counts(self, predictions: Predictions) -> dict[str, Tensor]:
        """Positive anchors, positive RoIs of each stage and mask slots in use."""
        masks = {"rpn_positive": predictions.rpn.positive_BR}
        for number, stage in enumerate(predictions.stages):
            masks[f"roi_positive_stage{number}"] = stage.positive_BR
        if predictions.mask is not None:
            masks["mask_slots_used"] = predictions.mask.valid_BP
        return mean_counts(masks)

    def norm_parts(self) -> dict[NormPart, tuple[nn.Module, ...]]:
        """See `Architecture.norm_parts`."""
        heads = (self.rpn, self.box_head, self.mask_head)
        return {"fpn": (self.fpn,), "heads": tuple(head for head in heads if head is not None)}


def refined_rois(boxes_BR4: Tensor, valid_BR: Tensor, sizes_B2: Tensor) -> tuple[Tensor, Tensor]:
    """A stage's boxes as RoIs of the next one: clipped, without gradient, invalid where no area is left."""
    boxes_BR4 = clip_boxes(boxes_BR4.detach(), sizes_B2)
    valid_BR = valid_BR & non_empty(boxes_BR4)
    return boxes_BR4.where(valid_BR[..., None], 0.0), valid_BR


def cascade_losses(
    predictions: Predictions, conventions: Conventions, box_loss: BoxLoss = "smooth_l1"
) -> dict[str, Tensor]:
    """The RPN's losses, two of each stage (`loss_cls_stage0`, ...) and the masks', each of weight 1."""
    losses = rpn_losses(predictions.rpn, conventions)
    for number, stage in enumerate(predictions.stages):
        found = box_losses(stage, conventions.smooth_l1_beta, box_loss)
        losses |= {f"{name}_stage{number}": loss for name, loss in found.items()}
    if predictions.mask is not None:
        losses |= mask_loss(predictions.mask)
    return losses
