"""Mask R-CNN (He et al. 2017) with FPN: backbone, pyramid, RPN, box head, mask head.

Without its mask head it is Faster R-CNN (Ren et al. 2015).
Shapes: B images · N proposals · R sampled RoIs · P mask slots · D detections · C classes.
Reference: detectron2's `GeneralizedRCNN` and `StandardROIHeads`.
"""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor, nn

from giantdet.architectures.base import Architecture, mean_counts
from giantdet.architectures.class_layers import ClassLayer
from giantdet.config.architectures.common import NormPart
from giantdet.config.architectures.mask_rcnn import MaskRcnnConfig, RcnnConfig
from giantdet.config.conventions import Conventions
from giantdet.layers.blocks import recompute
from giantdet.layers.box_head import (
    BoxHead,
    BoxPredictions,
    SampledRois,
    box_losses,
    candidate_rois,
    random_rois,
    scores_and_boxes,
    select_detections,
    training_predictions,
)
from giantdet.layers.fpn import build_fpn
from giantdet.layers.mask_head import (
    MaskHead,
    MaskPredictions,
    mask_loss,
    mask_training_predictions,
    with_masks,
)
from giantdet.layers.ohem import hard_rois, without_graph
from giantdet.layers.roi_pool import RoiMaps, RoiPool
from giantdet.layers.rpn import Proposals, Rpn, RpnPredictions, rpn_losses
from giantdet.layers.semantic_branch import (
    NO_CLASS,
    BranchPredictions,
    SemanticBranch,
    branch_loss,
    branch_predictions,
    roi_maps,
)
from giantdet.structures import Batch, Detections, Outputs, Targets

DEFAULT = MaskRcnnConfig()


class Predictions(NamedTuple):
    """The predictions that are trained, with their targets."""

    rpn: RpnPredictions
    box: BoxPredictions
    mask: MaskPredictions | None
    semantic: BranchPredictions | None = None


class MaskRcnn(Architecture):
    """Two-stage detector; see `Architecture` for the arguments."""

    OPTIONAL_PARTS = ("mask_head",)
    WITHOUT_MASKS = (
        "; set giantdet.model.mask_head.enabled to false to train on boxes"
        " (and the source of a semantic_branch to boxes)"
    )

    def __init__(self, config: RcnnConfig, image_size: tuple[int, int]) -> None:
        super().__init__(config, image_size)
        self.config = config
        channels, backbone = config.fpn.channels, self.backbone
        self.fpn = build_fpn(config.fpn, backbone.channels, backbone.strides, backbone.is_plain)
        self.rpn = Rpn(config.rpn, channels, self.fpn.strides, image_size, self.conventions)
        self.pool = RoiPool(
            self.fpn.strides, self.conventions.aligned_rois, self.conventions.roi_level_epsilon
        )
        self.box_head = BoxHead(config.box_head, channels, self.num_classes)
        self.mask_head = (
            MaskHead(config.mask_head, channels, self.num_classes) if config.mask_head.enabled else None
        )
        self.semantic_branch = (
            SemanticBranch(config, self.num_classes, self.fpn.strides)
            if config.semantic_branch.enabled
            else None
        )
        if config.checkpoint_heads:
            for part in (self.fpn, self.box_head, self.mask_head, self.semantic_branch):
                if part is not None:
                    recompute(part)

    @property
    def targets(self) -> frozenset[str]:
        """See `Architecture.targets`."""
        masks = frozenset({"masks"} if self.mask_head is not None else ())
        branch = frozenset() if self.semantic_branch is None else self.semantic_branch.targets
        return masks | branch | {"boxes"}

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
        """Return predictions at sampled anchors, RoIs and masks."""
        targets = batch.targets
        proposals, rpn = self.rpn(levels, batch.sizes_B2, targets, batch.seeds_B)
        assert rpn is not None
        maps, semantic = branch_predictions(self.semantic_branch, levels, targets)
        rois = self.sample(maps, proposals, batch)
        box = self.box_predictions(maps, rois, targets)
        mask = None
        if self.mask_head is not None:
            mask = mask_training_predictions(self.mask_head, self.pool, maps, rois, targets, self.conventions)
        return Predictions(rpn=rpn, box=box, mask=mask, semantic=semantic)

    def sample(self, maps: RoiMaps, proposals: Proposals, batch: Batch) -> SampledRois:
        """Return the RoIs to train on, random or hard ones."""
        config, targets = self.config.box_head, batch.targets
        candidates = candidate_rois(
            proposals, targets, config.iou, self.num_classes, config.best_takes_object
        )
        if config.sampling.type == "random":
            return random_rois(candidates, config, self.num_classes, batch.seeds_B)
        with without_graph(self.box_head):
            predictions = self.box_predictions(maps, candidates, targets)
            beta = self.conventions.beta(config.smooth_l1_beta)
            return hard_rois(candidates, predictions, config, beta, self.num_classes)

    def box_predictions(self, maps: RoiMaps, rois: SampledRois, targets: Targets) -> BoxPredictions:
        """Return the box head's predictions for RoIs, with their targets."""
        config = self.config.box_head
        features = self.pool(maps, rois.boxes_BR4, config.resolution, config.sampling_ratio, rois.image_BR)
        logits, deltas = self.box_head(features)
        both_sides = self.conventions.clamps_shrinking
        return training_predictions(logits, deltas, rois, targets, both_sides=both_sides)

    def answer(self, batch: Batch) -> Outputs:
        """See `Architecture.answer`."""
        return Outputs(self.detect(self.pyramid(batch), batch))

    def detect(self, levels: list[Tensor], batch: Batch) -> Detections:
        """Return the objects, with masks where there is a mask head."""
        proposals, _ = self.rpn(levels, batch.sizes_B2, None, batch.seeds_B)
        config = self.config.box_head
        maps = roi_maps(self.semantic_branch, levels)
        features = self.pool(maps, proposals.boxes_BN4, config.resolution, config.sampling_ratio)
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
        return with_masks(self.mask_head, self.pool, maps, found)

    def masks_of(self, batch: Batch, found: Detections) -> Detections:
        """See `Architecture.masks_of`."""
        assert self.mask_head is not None
        maps = roi_maps(self.semantic_branch, self.pyramid(batch))
        return with_masks(self.mask_head, self.pool, maps, found)

    def losses(self, predictions: Predictions, batch: Batch) -> dict[str, Tensor]:
        """See `mask_rcnn_losses`."""
        return mask_rcnn_losses(predictions, self.conventions, self.config)

    def counts(self, predictions: Predictions) -> dict[str, Tensor]:
        """See `sample_counts`."""
        return sample_counts(predictions)

    def norm_parts(self) -> dict[NormPart, tuple[nn.Module, ...]]:
        """See `Architecture.norm_parts`."""
        heads = (self.rpn, self.box_head, self.mask_head, self.semantic_branch)
        return {"fpn": (self.fpn,), "heads": tuple(head for head in heads if head is not None)}

    def class_layers(self) -> tuple[ClassLayer, ...]:
        """See `Architecture.class_layers`."""
        return (
            ClassLayer("box_head.classes.", after=1),
            ClassLayer("box_head.deltas.", values=4),
            ClassLayer("mask_head.masks."),
            *branch_class_layers(self.semantic_branch),
        )


def mask_rcnn_losses(
    predictions: Predictions, conventions: Conventions, config: RcnnConfig = DEFAULT
) -> dict[str, Tensor]:
    """Return the five losses (four without a mask head), each of weight 1, and that of a semantic branch."""
    losses = rpn_losses(predictions.rpn, conventions, config.rpn.smooth_l1_beta)
    box_head = config.box_head
    losses |= box_losses(predictions.box, conventions.beta(box_head.smooth_l1_beta), box_head.loss)
    if predictions.mask is not None:
        losses |= mask_loss(predictions.mask)
    if predictions.semantic is not None:
        losses |= branch_loss(predictions.semantic, config.semantic_branch.loss_weight)
    return losses


def sample_counts(predictions: Predictions) -> dict[str, Tensor]:
    """Return mean numbers per image: positive anchors, positive RoIs, used mask slots, labelled cells."""
    masks = {"rpn_positive": predictions.rpn.positive_BR, "roi_positive": predictions.box.positive_BR}
    if predictions.mask is not None:
        masks["mask_slots_used"] = predictions.mask.valid_BP
    if predictions.semantic is not None:
        masks["labelled_cells"] = (predictions.semantic.labels_Bhw != NO_CLASS).flatten(1)
    return mean_counts(masks)


def branch_class_layers(branch: SemanticBranch | None) -> tuple[ClassLayer, ...]:
    """Return the layer of a semantic branch whose rows belong to classes."""
    if branch is None:
        return ()
    if branch.source == "maps":
        return (ClassLayer("semantic_branch.classes.", "stuff", before=1),)
    return (ClassLayer("semantic_branch.classes.", after=1),)
