"""Cascade Mask R-CNN (Cai and Vasconcelos 2018): Mask R-CNN whose box head is three, each at a higher IoU.

Each stage refines the boxes of the one before. Without its mask head it is Cascade R-CNN.
Shapes: B images · N proposals · R sampled RoIs · P mask slots · D detections · C classes.
References: detectron2's `CascadeROIHeads`, and mmdetection's `CascadeRoIHead` where its `Conventions` differ.
In the former, RoIs are sampled once, for the first stage, at random or by OHEM; the others take all slots,
and match the boxes that the stage before made of them again. The mask head trains on the first stage's RoIs.
In the latter each stage samples, and has a mask head of its own. At inference the scores of the stages are
averaged, and the boxes are the last stage's.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from giantdet.architectures.base import Architecture, mean_counts
from giantdet.architectures.class_layers import ClassLayer
from giantdet.architectures.mask_rcnn import branch_class_layers
from giantdet.config.architectures.cascade_mask_rcnn import CascadeMaskRcnnConfig
from giantdet.config.architectures.common import NormPart
from giantdet.config.conventions import Conventions
from giantdet.layers.blocks import recompute
from giantdet.layers.box_head import (
    BoxHead,
    BoxPredictions,
    SampledRois,
    box_losses,
    candidate_rois,
    match_rois,
    random_rois,
    scores_and_boxes,
    select_detections,
    training_predictions,
)
from giantdet.layers.common import scale_gradient
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
from giantdet.ops.boxes import clip_boxes, non_empty
from giantdet.structures import Batch, Detections, Outputs, Targets


class Predictions(NamedTuple):
    """The predictions that are trained, with their targets."""

    rpn: RpnPredictions
    stages: tuple[BoxPredictions, ...]
    masks: tuple[MaskPredictions, ...]  # one for each mask head
    semantic: BranchPredictions | None = None


class CascadeMaskRcnn(Architecture):
    """Two-stage detector with a cascade of box heads; see `Architecture` for the arguments."""

    OPTIONAL_PARTS = ("mask_head",)
    WITHOUT_MASKS = (
        "; set giantdet.model.mask_head.enabled to false to train on boxes"
        " (and the source of a semantic_branch to boxes)"
    )

    def __init__(self, config: CascadeMaskRcnnConfig, image_size: tuple[int, int]) -> None:
        super().__init__(config, image_size)
        self.config = config
        channels, backbone = config.fpn.channels, self.backbone
        self.fpn = build_fpn(config.fpn, backbone.channels, backbone.strides, backbone.is_plain)
        self.rpn = Rpn(config.rpn, channels, self.fpn.strides, image_size, self.conventions)
        self.pool = RoiPool(
            self.fpn.strides, self.conventions.aligned_rois, self.conventions.roi_level_epsilon
        )
        self.box_head = nn.ModuleList(
            BoxHead(config.box_head, channels, self.num_classes, class_agnostic=True)
            for _ in config.box_head.ious
        )
        self.mask_head: nn.Module | None = None
        if config.mask_head.enabled and self.conventions.cascade_mask_heads:
            self.mask_head = nn.ModuleList(
                MaskHead(config.mask_head, channels, self.num_classes) for _ in config.box_head.ious
            )
        elif config.mask_head.enabled:
            self.mask_head = MaskHead(config.mask_head, channels, self.num_classes)
        self.delta_weights = config.box_head.delta_weights or self.conventions.cascade_delta_weights
        self.loss_weights = config.box_head.loss_weights or self.conventions.cascade_loss_weights
        self.semantic_branch = (
            SemanticBranch(config, self.num_classes, self.fpn.strides)
            if config.semantic_branch.enabled
            else None
        )
        if config.checkpoint_heads:
            for part in (self.fpn, *self.box_head, *self.mask_heads(), self.semantic_branch):
                if part is not None:
                    recompute(part)

    def mask_heads(self) -> list[MaskHead]:
        """Return the mask heads: one for all stages, one for each, or none."""
        return [module for module in self.modules() if isinstance(module, MaskHead)]

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
        """Return P2 to P6 of a batch."""
        levels: list[Tensor] = self.fpn(self.backbone(self.normalise(batch.images_B3HW, batch.sizes_B2)))
        return levels

    def stage(
        self, number: int, maps: RoiMaps, boxes_BR4: Tensor, image_BR: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Return the logits `[B*R, C + 1]` and deltas `[B*R, 1, 4]` of a box head."""
        config = self.config.box_head
        features = self.pool(maps, boxes_BR4, config.resolution, config.sampling_ratio, image_BR)
        if self.conventions.cascade_scales_gradients:  # all stages send theirs into the pyramid
            features = scale_gradient(features, 1 / len(self.box_head))
        logits, deltas = self.box_head[number](features)
        return logits, deltas

    def predict(self, batch: Batch) -> Predictions:
        """Return predictions at sampled anchors, RoIs of each stage and masks; see `Architecture.predict`."""
        levels, targets = self.pyramid(batch), batch.targets
        proposals, rpn = self.rpn(levels, batch.sizes_B2, targets, batch.seeds_B)
        assert rpn is not None
        maps, semantic = branch_predictions(self.semantic_branch, levels, targets)
        rois, stages = self.train_stages(maps, proposals, batch)
        masks = tuple(
            mask_training_predictions(head, self.pool, maps, of_stage, targets, self.conventions)
            for head, of_stage in zip(self.mask_heads(), rois, strict=False)
        )
        return Predictions(rpn=rpn, stages=stages, masks=masks, semantic=semantic)

    def train_stages(
        self, maps: RoiMaps, proposals: Proposals, batch: Batch
    ) -> tuple[list[SampledRois], tuple[BoxPredictions, ...]]:
        """Return the RoIs of each stage, and the predictions for them."""
        config, targets = self.config.box_head, batch.targets
        rois: list[SampledRois] = []
        stages: list[BoxPredictions] = []
        for number, iou in enumerate(config.ious):
            if not rois or self.conventions.cascade_samples_each_stage:
                found = self.sample(number, maps, proposals, batch)
            else:
                found = match_rois(
                    proposals.boxes_BN4,
                    proposals.valid_BN,
                    rois[-1].image_BR,
                    targets,
                    iou,
                    self.num_classes,
                )
            rois.append(found)
            stages.append(self.stage_predictions(number, maps, found, targets))
            # Stages that sample add the ground-truth boxes again; refined ones would be duplicates.
            kept_BR = found.valid_BR
            if self.conventions.cascade_samples_each_stage:
                kept_BR = kept_BR & ~found.is_object_BR
            boxes_BR4, valid_BR = refined_rois(stages[-1].boxes_BR4, kept_BR, batch.sizes_B2, found.image_BR)
            proposals = Proposals(boxes_BR4, torch.zeros_like(valid_BR, dtype=torch.float32), valid_BR)
        return rois, tuple(stages)

    def sample(self, number: int, maps: RoiMaps, proposals: Proposals, batch: Batch) -> SampledRois:
        """Return the RoIs of a stage, random or hard ones, from the proposals and the objects."""
        config, targets = self.config.box_head, batch.targets
        candidates = candidate_rois(proposals, targets, config.ious[number], self.num_classes)
        if config.sampling.type == "random":
            # A seed for each stage, so that they do not draw the same numbers.
            seeds_B = batch.seeds_B if number == 0 else batch.seeds_B ^ (number << 40)
            return random_rois(candidates, config, self.num_classes, seeds_B)
        with without_graph(self.box_head[number]):
            predictions = self.stage_predictions(number, maps, candidates, targets)
            beta = self.conventions.beta(config.smooth_l1_beta)
            return hard_rois(candidates, predictions, config, beta, self.num_classes)

    def stage_predictions(
        self, number: int, maps: RoiMaps, rois: SampledRois, targets: Targets
    ) -> BoxPredictions:
        """Return a stage's predictions for RoIs, with their targets."""
        logits, deltas = self.stage(number, maps, rois.boxes_BR4, rois.image_BR)
        weights, both_sides = self.delta_weights[number], self.conventions.clamps_shrinking
        return training_predictions(logits, deltas, rois, targets, weights, both_sides)

    def answer(self, batch: Batch) -> Outputs:
        """Return detections with masks; see `Architecture.answer`."""
        levels = self.pyramid(batch)
        proposals, _ = self.rpn(levels, batch.sizes_B2, None, batch.seeds_B)
        maps = roi_maps(self.semantic_branch, levels)
        boxes_BN4, valid_BN = proposals.boxes_BN4, proposals.valid_BN
        answers: list[tuple[Tensor, Tensor]] = []
        for number, weights in enumerate(self.delta_weights):
            logits, deltas = self.stage(number, maps, boxes_BN4)
            scores_BNC, boxes_BN14 = scores_and_boxes(
                logits, deltas, boxes_BN4, weights, self.conventions.clamps_shrinking
            )
            answers.append((logits, scores_BNC))
            boxes_BN4, valid_BN = refined_rois(boxes_BN14.squeeze(2), valid_BN, batch.sizes_B2)
        found = select_detections(
            self._mean_scores(answers),
            boxes_BN4[:, :, None],
            valid_BN,
            batch.sizes_B2,
            self.config.box_head,
            self.conventions.min_detection_size,
        )
        return Outputs(self._with_masks(maps, found))

    def masks_of(self, batch: Batch, found: Detections) -> Detections:
        """See `Architecture.masks_of`."""
        return self._with_masks(roi_maps(self.semantic_branch, self.pyramid(batch)), found)

    def _with_masks(self, maps: RoiMaps, found: Detections) -> Detections:
        """Return the detections with the mean of the mask heads' probabilities, if there is a mask head."""
        masks = [with_masks(head, self.pool, maps, found).masks_BDSS for head in self.mask_heads()]
        probabilities = [mask for mask in masks if mask is not None]
        return found._replace(masks_BDSS=torch.stack(probabilities).mean(0)) if probabilities else found

    def _mean_scores(self, answers: list[tuple[Tensor, Tensor]]) -> Tensor:
        """Return the mean of the stages' scores `[B, N, C]`, from their logits `[B*N, C + 1]` and scores."""
        if not self.conventions.cascade_averages_logits:
            return torch.stack([scores_BNC for _, scores_BNC in answers]).mean(0)
        mean = torch.stack([logits for logits, _ in answers]).mean(0)
        return mean.softmax(-1)[:, :-1].reshape(answers[0][1].shape)

    def losses(self, predictions: Predictions, batch: Batch) -> dict[str, Tensor]:
        """See `cascade_losses`."""
        return cascade_losses(predictions, self.conventions, self.config, self.loss_weights)

    def counts(self, predictions: Predictions) -> dict[str, Tensor]:
        """Return numbers of positive anchors, positive RoIs by stage, used mask slots and labelled cells."""
        masks = {"rpn_positive": predictions.rpn.positive_BR}
        for number, stage in enumerate(predictions.stages):
            masks[f"roi_positive_stage{number}"] = stage.positive_BR
        if predictions.masks:
            masks["mask_slots_used"] = torch.cat([mask.valid_BP for mask in predictions.masks], 1)
        if predictions.semantic is not None:
            masks["labelled_cells"] = (predictions.semantic.labels_Bhw != NO_CLASS).flatten(1)
        return mean_counts(masks)

    def norm_parts(self) -> dict[NormPart, tuple[nn.Module, ...]]:
        """See `Architecture.norm_parts`."""
        heads = (self.rpn, self.box_head, self.mask_head, self.semantic_branch)
        return {"fpn": (self.fpn,), "heads": tuple(head for head in heads if head is not None)}

    def class_layers(self) -> tuple[ClassLayer, ...]:
        """See `Architecture.class_layers`."""
        stages = range(len(self.box_head))
        masks = ["mask_head.masks.", *(f"mask_head.{number}.masks." for number in stages)]
        return (
            *(ClassLayer(f"box_head.{number}.classes.", after=1) for number in stages),
            *(ClassLayer(prefix) for prefix in masks),
            *branch_class_layers(self.semantic_branch),
        )


def refined_rois(
    boxes_BR4: Tensor, valid_BR: Tensor, sizes_B2: Tensor, image_BR: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Return a stage's boxes as RoIs of the next one: clipped, without gradient, invalid without an area.

    `image_BR` is the image of each box; None: the row.
    """
    boxes_BR4 = boxes_BR4.detach()
    if image_BR is None:
        boxes_BR4 = clip_boxes(boxes_BR4, sizes_B2)
    else:
        boxes_X14 = clip_boxes(boxes_BR4.flatten(0, 1)[:, None], sizes_B2[image_BR.flatten()])
        boxes_BR4 = boxes_X14.reshape(boxes_BR4.shape)
    valid_BR = valid_BR & non_empty(boxes_BR4)
    return boxes_BR4.where(valid_BR[..., None], 0.0), valid_BR


def cascade_losses(
    predictions: Predictions,
    conventions: Conventions,
    config: CascadeMaskRcnnConfig,
    weights: tuple[float, float, float],
) -> dict[str, Tensor]:
    """Return the RPN's losses, those of each stage (`loss_cls_stage0`, ...), weighted, and the masks'.

    The mask losses of several mask heads are named and weighted by stage, too. A semantic branch adds one.
    """
    losses = rpn_losses(predictions.rpn, conventions, config.rpn.smooth_l1_beta)
    beta = conventions.beta(config.box_head.smooth_l1_beta)
    for number, (stage, weight) in enumerate(zip(predictions.stages, weights, strict=True)):
        found = box_losses(stage, beta, config.box_head.loss)
        losses |= {f"{name}_stage{number}": weight * loss for name, loss in found.items()}
    if predictions.semantic is not None:
        losses |= branch_loss(predictions.semantic, config.semantic_branch.loss_weight)
    if len(predictions.masks) == 1:
        return losses | mask_loss(predictions.masks[0])
    for number, (mask, weight) in enumerate(zip(predictions.masks, weights, strict=False)):
        losses |= {f"{name}_stage{number}": weight * loss for name, loss in mask_loss(mask).items()}
    return losses
