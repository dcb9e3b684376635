"""Region proposal network (Ren et al. 2015) over a feature pyramid, in fixed shapes.

Shapes: B images · A anchors (all levels) · N proposals · R sampled anchors · K anchors per cell.
Reference: detectron2's `RPN` and `find_top_rpn_proposals`. One deliberate difference: anchors centred in
the padding are neither trained nor proposed, because our canvas is fixed and may have more padding
than a batch that is padded to its largest image (torchvision's conventions keep them).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from giantdet.config.architectures.common import RpnConfig
from giantdet.config.conventions import Conventions
from giantdet.errors import InputError
from giantdet.layers.common import box_distance, gather_slots
from giantdet.layers.rpn_head import RpnHead, SampledRpnHead
from giantdet.ops.anchors import beyond_border, centred_in_padding, grid_anchors
from giantdet.ops.boxes import clip_boxes, decode_deltas, encode_deltas, non_empty, pairwise_iou
from giantdet.ops.matching import match
from giantdet.ops.nms import nms_mask
from giantdet.ops.sampling import sample, uniform_noise
from giantdet.structures import Targets

DELTA_WEIGHTS = (1.0, 1.0, 1.0, 1.0)
SAMPLING_SALT = 1


class Proposals(NamedTuple):
    """Class-agnostic candidates of the RPN, best first."""

    boxes_BN4: Tensor  # float32, clipped to each image
    scores_BN: Tensor  # float32 objectness logits
    valid_BN: Tensor  # bool


class RpnPredictions(NamedTuple):
    """RPN outputs at the sampled anchors, with their targets. R is `rpn.batch_per_image`."""

    objectness_BR: Tensor  # float32 logits
    deltas_BR4: Tensor  # float32
    target_deltas_BR4: Tensor  # float32
    positive_BR: Tensor  # bool
    valid_BR: Tensor  # bool


class Rpn(nn.Module):
    """Proposals from a pyramid and, in training, predictions at sampled anchors."""

    def __init__(
        self,
        config: RpnConfig,
        channels: int,
        strides: tuple[int, ...],
        image_size: tuple[int, int],
        conventions: Conventions,
    ) -> None:
        super().__init__()
        if len(config.anchor_sizes) != len(strides):
            raise InputError(
                f"rpn.anchor_sizes has {len(config.anchor_sizes)} sizes for {len(strides)} levels"
            )
        self.config, self.strides, self.image_size = config, strides, image_size
        self.conventions = conventions
        per_cell = len(config.anchor_ratios)
        two_logits = config.objectness == "softmax"
        self.head = (
            RpnHead(channels, per_cell, config.convs, two_logits)
            if config.loss_pass == "dense"
            else SampledRpnHead(channels, per_cell, two_logits)
        )

    def anchors(self, levels: list[Tensor]) -> tuple[Tensor, ...]:
        """Return the anchors of each level, float32 `[A_l, 4]` in pixels.

        They are computed in each forward pass: as buffers, DeepSpeed would cast them to bf16.
        """
        return grid_anchors(
            self.image_size,
            [(level.shape[-2], level.shape[-1]) for level in levels],
            self.strides,
            [(size,) for size in self.config.anchor_sizes],
            self.config.anchor_ratios,
            self.conventions.rounded_anchors,
            levels[0].device,
            self.conventions.anchors_by_ratio,
        )

    def forward(
        self, levels: list[Tensor], sizes_B2: Tensor, targets: Targets | None, seeds_B: Tensor
    ) -> tuple[Proposals, RpnPredictions | None]:
        anchors = self.anchors(levels)
        objectness, deltas = self.head.over_levels(levels)
        outside = [self._outside(a, sizes_B2) for a in anchors]
        proposals = select_proposals(  # constants: no gradient flows through them
            [s.detach().masked_fill(out, -torch.inf) for s, out in zip(objectness, outside, strict=True)],
            [delta.detach() for delta in deltas],
            anchors,
            sizes_B2,
            self.config.pre_nms_train if self.training else self.config.pre_nms_test,
            self.config.post_nms_train if self.training else self.config.post_nms_test,
            self.config.nms_iou,
            min_size=self.conventions.min_proposal_size,
            both_sides=self.conventions.clamps_shrinking,
        )
        if targets is None:
            return proposals, None
        anchors_A4, untrained_BA = torch.cat(anchors), torch.cat(outside, 1)
        if self.conventions.trained_padding:
            untrained_BA = centred_in_padding(anchors_A4, sizes_B2, self.conventions.trained_padding)
        if self.config.allowed_border is not None:
            untrained_BA = untrained_BA | beyond_border(anchors_A4, sizes_B2, self.config.allowed_border)
        labels = self._sample_anchors(anchors_A4, untrained_BA, targets, seeds_B)
        index_BR, target_deltas_BR4, positive_BR, valid_BR = labels
        objectness_BR, deltas_BR4 = self.head.at_anchors(levels, objectness, deltas, index_BR)
        return proposals, RpnPredictions(
            objectness_BR=objectness_BR,
            deltas_BR4=deltas_BR4,
            target_deltas_BR4=target_deltas_BR4,
            positive_BR=positive_BR,
            valid_BR=valid_BR,
        )

    def _outside(self, anchors_A4: Tensor, sizes_B2: Tensor) -> Tensor:
        """Return bool `[B, A]`, True for anchors that are neither trained nor proposed."""
        outside_BA = centred_in_padding(anchors_A4, sizes_B2)
        return torch.zeros_like(outside_BA) if self.conventions.anchors_in_padding else outside_BA

    def _sample_anchors(
        self, anchors_A4: Tensor, outside_BA: Tensor, targets: Targets, seeds_B: Tensor
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Return indices `[B, R]`, target deltas `[B, R, 4]`, and which are positive and valid, `[B, R]`."""
        config = self.config
        # Masked before matching: the best anchor of an object at the border must be one that can be sampled.
        iou_BMA = pairwise_iou(targets.boxes_BM4, anchors_A4).masked_fill_(outside_BA[:, None], 0.0)
        index_BA, label_BA = match(
            iou_BMA,
            targets.valid_BM,
            config.iou_low,
            config.iou_high,
            allow_low_quality=True,
            low_quality_iou=self.conventions.best_anchor_iou,
            takes_object=self.conventions.best_anchor_takes_object,
        )
        label_BA = label_BA.masked_fill(outside_BA, -1)
        noise_BA = uniform_noise(seeds_B, label_BA.shape[1], SAMPLING_SALT)
        index_BR, positive_BR, valid_BR = sample(
            label_BA, noise_BA, config.batch_per_image, config.positive_fraction
        )
        anchors_BR4 = anchors_A4[index_BR]
        boxes_BR4 = gather_slots(targets.boxes_BM4, index_BA.gather(1, index_BR))
        # Negatives have no target box; with the anchor itself as the target the encoding is finite.
        boxes_BR4 = torch.where(positive_BR[..., None], boxes_BR4, anchors_BR4)
        target_deltas_BR4 = encode_deltas(boxes_BR4, anchors_BR4, DELTA_WEIGHTS)
        return index_BR, target_deltas_BR4, positive_BR, valid_BR


def select_proposals(
    objectness: list[Tensor],
    deltas: list[Tensor],
    anchors: tuple[Tensor, ...],
    sizes_B2: Tensor,
    pre_nms: int,
    post_nms: int,
    nms_iou: float,
    min_size: float,
    both_sides: bool = False,
) -> Proposals:
    """Return the best `post_nms` proposals of all levels, best first (detectron2's `find_top_rpn_proposals`).

    They are selected from the best `pre_nms` anchors of each level, which are decoded, clipped to `sizes_B2`
    and filtered by NMS within the level. Each level has `objectness` `[B, A_l]` and `deltas` `[B, A_l, 4]`;
    an objectness of -inf excludes an anchor. Both sides of a proposal are larger than `min_size` pixels;
    `both_sides` is that of `decode_deltas`.
    """
    boxes, scores = [], []
    for score_BA, delta_BA4, anchors_A4 in zip(objectness, deltas, anchors, strict=True):
        score_BK, index_BK = score_BA.topk(min(pre_nms, score_BA.shape[1]))
        boxes_BK4 = decode_deltas(
            gather_slots(delta_BA4, index_BK), anchors_A4[index_BK], DELTA_WEIGHTS, both_sides
        )
        boxes_BK4 = clip_boxes(boxes_BK4, sizes_B2)
        valid_BK = non_empty(boxes_BK4, min_size) & score_BK.isfinite()
        keep_BK = nms_mask(boxes_BK4, score_BK, valid_BK, nms_iou)
        boxes.append(boxes_BK4)
        scores.append(score_BK.masked_fill(~keep_BK, -torch.inf))
    score_BN, index_BN = torch.cat(scores, 1).topk(min(post_nms, sum(s.shape[1] for s in scores)))
    valid_BN = score_BN > -torch.inf
    boxes_BN4 = gather_slots(torch.cat(boxes, 1), index_BN)
    return Proposals(
        boxes_BN4=boxes_BN4.where(valid_BN[..., None], 0.0),
        scores_BN=score_BN.where(valid_BN, 0.0),
        valid_BN=valid_BN,
    )


def rpn_losses(
    p: RpnPredictions, conventions: Conventions, smooth_l1_beta: float | None = None
) -> dict[str, Tensor]:
    """Return the objectness and box loss of the sampled anchors, scalars (detectron2 0.6, `rpn.py`).

    Sums are masked and run over all slots, so that a batch without objects has zero losses and finite
    gradients. The normaliser is local to the rank and micro-batch, as in all reference implementations.
    `smooth_l1_beta` None is that of the conventions.
    """
    beta = conventions.beta(smooth_l1_beta)
    count = _divisor(p, conventions)
    entropy_BR = F.binary_cross_entropy_with_logits(p.objectness_BR, p.positive_BR.float(), reduction="none")
    distance_BR = box_distance(p.deltas_BR4, p.target_deltas_BR4, beta)
    return {
        "loss_rpn_cls": torch.where(p.valid_BR, entropy_BR, 0.0).sum() / count,
        "loss_rpn_loc": torch.where(p.positive_BR, distance_BR, 0.0).sum() / count,
    }


def _divisor(p: RpnPredictions, conventions: Conventions) -> Tensor | int:
    """Return the number that divides the losses: of slots or of sampled anchors in the micro-batch."""
    if conventions.rpn_loss_over_all_slots:
        return p.valid_BR.numel()
    if not conventions.rpn_loss_counts_missing:
        return p.valid_BR.sum().clamp_min(1)
    negative_BR = p.valid_BR & ~p.positive_BR
    return (p.positive_BR.sum(1).clamp_min(1) + negative_BR.sum(1).clamp_min(1)).sum()
