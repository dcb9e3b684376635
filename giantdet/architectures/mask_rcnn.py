"""Mask R-CNN (He et al. 2017) with FPN: backbone, pyramid, RPN, box head, mask head.

Without its mask head it is Faster R-CNN (Ren et al. 2015).
Shapes: B images · N proposals · R sampled RoIs · P mask slots · D detections · C classes.
Reference: detectron2's `GeneralizedRCNN` and `StandardROIHeads`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

from torch import Tensor, nn

from giantdet.architectures.base import Architecture, mean_counts
from giantdet.architectures.class_layers import ClassLayer
from giantdet.architectures.torchvision_weights import from_torchvision, is_torchvision
from giantdet.config.architectures.common import NormPart
from giantdet.config.architectures.mask_rcnn import MaskRcnnConfig, RcnnConfig
from giantdet.config.conventions import Conventions
from giantdet.layers.blocks import recompute
from giantdet.layers.box_head import (
    BoxHead,
    BoxPredictions,
    box_losses,
    sample_rois,
    scores_and_boxes,
    select_detections,
    training_predictions,
)
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
from giantdet.structures import Batch, Detections, Outputs

DEFAULT = MaskRcnnConfig()


class Predictions(NamedTuple):
    """The predictions that are trained, with their targets."""

    rpn: RpnPredictions
    box: BoxPredictions
    mask: MaskPredictions | None


class MaskRcnn(Architecture):
    """Two-stage detector; see `Architecture` for the arguments."""

    WITHOUT_MASKS = "; set giantdet.model.mask_head.enabled to false to train on boxes"

    def __init__(self, config: RcnnConfig, image_size: tuple[int, int]) -> None:
        super().__init__(config, image_size)
        self.config = config
        channels, backbone = config.fpn.channels, self.backbone
        self.fpn = build_fpn(config.fpn, backbone.channels, backbone.strides, backbone.is_plain)
        self.rpn = Rpn(config.rpn, channels, STRIDES, image_size, self.conventions)
        self.pool = RoiPool(self.conventions.aligned_rois, self.conventions.roi_level_epsilon)
        self.box_head = BoxHead(config.box_head, channels, self.num_classes)
        self.mask_head = (
            MaskHead(config.mask_head, channels, self.num_classes) if config.mask_head.enabled else None
        )
        if config.checkpoint_heads:
            for part in (self.fpn, self.box_head, self.mask_head):
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
        """Return P2 to P6 of a batch, `[B, channels, h, w]`."""
        levels: list[Tensor] = self.fpn(self.backbone(self.normalise(batch.images_B3HW, batch.sizes_B2)))
        return levels

    def predict(self, batch: Batch) -> Predictions:
        """See `Architecture.predict`."""
        return self.predict_objects(self.pyramid(batch), batch)

    def predict_objects(self, levels: list[Tensor], batch: Batch) -> Predictions:
        """Predictions at sampled anchors, RoIs and masks."""
        targets = batch.targets
        proposals, rpn = self.rpn(levels, batch.sizes_B2, targets, batch.seeds_B)
        assert rpn is not None
        config = self.config.box_head
        rois = sample_rois(
            proposals,
            targets,
            config,
            config.iou,
            self.num_classes,
            batch.seeds_B,
            config.best_takes_object,
        )
        features = self.pool(levels, rois.boxes_BR4, config.resolution, config.sampling_ratio)
        logits, deltas = self.box_head(features)
        both_sides = self.conventions.clamps_shrinking
        box = training_predictions(logits, deltas, rois, targets, both_sides=both_sides)
        mask = None
        if self.mask_head is not None:
            mask = mask_training_predictions(
                self.mask_head, self.pool, levels, rois, targets, self.conventions
            )
        return Predictions(rpn=rpn, box=box, mask=mask)

    def answer(self, batch: Batch) -> Outputs:
        """See `Architecture.answer`."""
        return Outputs(self.detect(self.pyramid(batch), batch))

    def detect(self, levels: list[Tensor], batch: Batch) -> Detections:
        """Objects, with masks where there is a mask head."""
        proposals, _ = self.rpn(levels, batch.sizes_B2, None, batch.seeds_B)
        config = self.config.box_head
        features = self.pool(levels, proposals.boxes_BN4, config.resolution, config.sampling_ratio)
        logits, deltas = self.box_head(features)
        scores_BNC, boxes_BNC4 = scores_and_boxes(
            logits, deltas, proposals.boxes_BN4, both_sides=self.conventions.clamps_shrinking
        )
        found = select_detections(
            scores_BNC,
            boxes_BNC4,
            proposals.valid_BN,
            batch.sizes_B2,
            config,
            self.conventions.min_detection_size,
        )
        if self.mask_head is None:
            return found
        return with_masks(self.mask_head, self.pool, levels, found)

    def masks_of(self, batch: Batch, found: Detections) -> Detections:
        """See `Architecture.masks_of`."""
        assert self.mask_head is not None
        return with_masks(self.mask_head, self.pool, self.pyramid(batch), found)

    def losses(self, predictions: Predictions, batch: Batch) -> dict[str, Tensor]:
        """See `mask_rcnn_losses`."""
        return mask_rcnn_losses(predictions, self.conventions, self.config)

    def counts(self, predictions: Predictions) -> dict[str, Tensor]:
        """See `sample_counts`."""
        return sample_counts(predictions)

    def norm_parts(self) -> dict[NormPart, tuple[nn.Module, ...]]:
        """See `Architecture.norm_parts`."""
        heads = (self.rpn, self.box_head, self.mask_head)
        return {"fpn": (self.fpn,), "heads": tuple(head for head in heads if head is not None)}

    def class_layers(self) -> tuple[ClassLayer, ...]:
        """See `Architecture.class_layers`."""
        return (
            ClassLayer("box_head.classes.", after=1),
            ClassLayer("box_head.deltas.", values=4),
            ClassLayer("mask_head.masks."),
        )

    def translate(self, state: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """Return torchvision's Mask and Faster R-CNN weights under giantdet's names, and others unchanged."""
        return from_torchvision(state) if is_torchvision(state) else state


def mask_rcnn_losses(
    predictions: Predictions, conventions: Conventions, config: RcnnConfig = DEFAULT
) -> dict[str, Tensor]:
    """Return the five losses (four without a mask head), each of weight 1."""
    losses = rpn_losses(predictions.rpn, conventions, config.rpn.smooth_l1_beta)
    box_head = config.box_head
    losses |= box_losses(predictions.box, conventions.beta(box_head.smooth_l1_beta), box_head.loss)
    if predictions.mask is not None:
        losses |= mask_loss(predictions.mask)
    return losses


def sample_counts(predictions: Predictions) -> dict[str, Tensor]:
    """Return the numbers of positive anchors, positive RoIs and used mask slots, means per image."""
    masks = {"rpn_positive": predictions.rpn.positive_BR, "roi_positive": predictions.box.positive_BR}
    if predictions.mask is not None:
        masks["mask_slots_used"] = predictions.mask.valid_BP
    return mean_counts(masks)
