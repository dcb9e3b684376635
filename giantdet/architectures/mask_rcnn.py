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
from giantdet.architectures.torchvision_weights import from_torchvision, is_torchvision
from giantdet.config.architectures.common import NormPart
from giantdet.config.architectures.mask_rcnn import MaskRcnnConfig
from giantdet.config.conventions import Conventions
from giantdet.layers.blocks import recompute
from giantdet.layers.box_head import (
    BoxHead,
    BoxPredictions,
    SampledRois,
    box_losses,
    sample_rois,
    select_detections,
    training_predictions,
)
from giantdet.layers.fpn import LEVELS, build_fpn
from giantdet.layers.mask_head import MaskHead, MaskPredictions, mask_loss
from giantdet.layers.rpn import Rpn, RpnPredictions, rpn_losses
from giantdet.ops.masks import mask_targets
from giantdet.ops.roi_align import roi_align_pyramid
from giantdet.structures import Batch, Outputs, Targets

STRIDES = tuple(4 * 2**level for level in range(LEVELS))
# Only the RPN uses the coarsest level; RoI features are read from P2 to P5.
ROI_LEVELS = LEVELS - 1


class Predictions(NamedTuple):
    """The predictions that are trained, with their targets."""

    rpn: RpnPredictions
    box: BoxPredictions
    mask: MaskPredictions | None


class MaskRcnn(Architecture):
    """Two-stage detector; see `Architecture` for the arguments."""

    CLASS_LAYERS = ("box_head.classes.", "box_head.deltas.", "mask_head.masks.")

    def __init__(self, config: MaskRcnnConfig, image_size: tuple[int, int]) -> None:
        super().__init__(config, image_size)
        self.config = config
        channels, backbone = config.fpn.channels, self.backbone
        self.fpn = build_fpn(config.fpn, backbone.channels, backbone.strides, backbone.is_plain)
        self.rpn = Rpn(config.rpn, channels, STRIDES, image_size, self.conventions)
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
        """Return predictions at sampled anchors, RoIs and mask slots; see `Architecture.predict`."""
        levels, targets = self.pyramid(batch), batch.targets
        proposals, rpn = self.rpn(levels, batch.sizes_B2, targets, batch.seeds_B)
        assert rpn is not None
        rois = sample_rois(proposals, targets, self.config.box_head, self.num_classes, batch.seeds_B)
        box_config = self.config.box_head
        features = self.pool(levels, rois.boxes_BR4, box_config.resolution, box_config.sampling_ratio)
        logits, deltas = self.box_head(features)
        box = training_predictions(logits, deltas, rois, targets)
        mask = self.mask_training_predictions(levels, rois, targets) if self.mask_head is not None else None
        return Predictions(rpn=rpn, box=box, mask=mask)

    def mask_training_predictions(
        self, levels: list[Tensor], rois: SampledRois, targets: Targets
    ) -> MaskPredictions:
        """Return the mask predictions of the first P RoIs. Positives come first, in random order."""
        assert self.mask_head is not None
        config = self.config.mask_head
        slots = min(config.slots, rois.positive_BR.shape[1])
        valid_BP, index_BP = rois.positive_BR[:, :slots], rois.index_BR[:, :slots]
        # Adaptive sampling takes one point per cell, so the boxes of unused slots are emptied to save time.
        boxes_BP4 = rois.boxes_BR4[:, :slots].where(valid_BP[..., None], 0.0)
        label_BP = rois.labels_BR[:, :slots].where(valid_BP, 0)
        features = self.pool(levels, boxes_BP4, config.resolution, config.sampling_ratio)
        logits = self.mask_head(features, label_BP.flatten())
        side = logits.shape[-1]
        goals_BPSS = mask_targets(
            targets.masks_BMSS,
            targets.frames_BM4,
            index_BP,
            boxes_BP4,
            side,
            aligned=self.conventions.aligned_rois,
            binarize=self.conventions.binary_mask_targets,
        )
        return MaskPredictions(
            logits_BPSS=logits.reshape(*valid_BP.shape, side, side),
            targets_BPSS=goals_BPSS,
            valid_BP=valid_BP,
        )

    def answer(self, batch: Batch) -> Outputs:
        """Return detections, with masks if there is a mask head; see `Architecture.answer`."""
        levels = self.pyramid(batch)
        proposals, _ = self.rpn(levels, batch.sizes_B2, None, batch.seeds_B)
        config = self.config.box_head
        features = self.pool(levels, proposals.boxes_BN4, config.resolution, config.sampling_ratio)
        logits, deltas = self.box_head(features)
        found = select_detections(
            logits, deltas, proposals, batch.sizes_B2, config, self.conventions.min_detection_size
        )
        if self.mask_head is None:
            return Outputs(found)
        mask_config = self.config.mask_head
        features = self.pool(levels, found.boxes_BD4, mask_config.resolution, mask_config.sampling_ratio)
        masks = self.mask_head(features, found.labels_BD.flatten()).sigmoid()
        masks_BDSS = masks.reshape(*found.labels_BD.shape, *masks.shape[-2:])
        return Outputs(found._replace(masks_BDSS=masks_BDSS))

    def pool(self, levels: list[Tensor], boxes_BR4: Tensor, resolution: int, sampling_ratio: int) -> Tensor:
        """Return RoI features `[B*R, C, resolution, resolution]`, by RoIAlign over P2 to P5."""
        return roi_align_pyramid(
            levels[:ROI_LEVELS],
            boxes_BR4,
            STRIDES[:ROI_LEVELS],
            resolution,
            sampling_ratio,
            aligned=self.conventions.aligned_rois,
        )

    def losses(self, predictions: Predictions, batch: Batch) -> dict[str, Tensor]:
        """See `mask_rcnn_losses`."""
        return mask_rcnn_losses(predictions, self.conventions)

    def counts(self, predictions: Predictions) -> dict[str, Tensor]:
        """See `sample_counts`."""
        return sample_counts(predictions)

    def norm_parts(self) -> dict[NormPart, tuple[nn.Module, ...]]:
        """See `Architecture.norm_parts`."""
        heads = (self.rpn, self.box_head, self.mask_head)
        return {"fpn": (self.fpn,), "heads": tuple(head for head in heads if head is not None)}

    def translate(self, state: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """Return torchvision's Mask and Faster R-CNN weights under giantdet's names, and others unchanged."""
        return from_torchvision(state) if is_torchvision(state) else state


def mask_rcnn_losses(predictions: Predictions, conventions: Conventions) -> dict[str, Tensor]:
    """Return the five losses (four without a mask head), scalars, each of weight 1."""
    losses = rpn_losses(predictions.rpn, conventions)
    losses |= box_losses(predictions.box, conventions.smooth_l1_beta)
    if predictions.mask is not None:
        losses |= mask_loss(predictions.mask)
    return losses


def sample_counts(predictions: Predictions) -> dict[str, Tensor]:
    """Return the numbers of positive anchors, positive RoIs and used mask slots, means per image."""
    masks = {"rpn_positive": predictions.rpn.positive_BR, "roi_positive": predictions.box.positive_BR}
    if predictions.mask is not None:
        masks["mask_slots_used"] = predictions.mask.valid_BP
    return mean_counts(masks)
