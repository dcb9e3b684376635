"""Box head: classification and box regression of regions of interest (Fast R-CNN, Girshick 2015).

Shapes: B images · R RoIs · C classes, index C is background · N proposals · D detections · G boxes per RoI,
one for each class, or 1 for all of them.
Reference: detectron2's `FastRCNNConvFCHead` and `FastRCNNOutputLayers`.
"""

from __future__ import annotations

import itertools
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from giantdet.config.architectures.common import BaseBoxHeadConfig, BoxLoss
from giantdet.layers.common import ConvBlock, box_distance, gather_slots, normal_, xavier_linear
from giantdet.layers.rpn import Proposals
from giantdet.ops.boxes import (
    Weights,
    clip_boxes,
    decode_deltas,
    encode_deltas,
    iou_loss,
    non_empty,
    pairwise_iou,
)
from giantdet.ops.matching import match
from giantdet.ops.nms import class_nms_mask
from giantdet.ops.sampling import sample, uniform_noise
from giantdet.structures import Detections, Targets

DELTA_WEIGHTS: Weights = (10.0, 10.0, 5.0, 5.0)
SAMPLING_SALT = 2
# Candidates (proposal, class) that enter NMS. A candidate can only suppress candidates of lower scores, so
# this limit changes the result only where fewer than `detections` of the best 2,000 survive.
CANDIDATES = 2000


class BoxPredictions(NamedTuple):
    """Box head outputs at the sampled RoIs. Class index C is background."""

    logits_BRC1: Tensor  # float32, C + 1 classes
    deltas_BR4: Tensor  # float32, of the RoI's target class
    target_deltas_BR4: Tensor  # float32
    labels_BR: Tensor  # int64 in [0, C], C is background
    positive_BR: Tensor  # bool
    valid_BR: Tensor  # bool
    boxes_BR4: Tensor  # float32, deltas_BR4 decoded, not clipped
    target_boxes_BR4: Tensor  # float32, meaningless where not positive


class BoxHead(nn.Module):
    """RoI features `[K, channels, 7, 7]` to class logits `[K, C + 1]` and deltas `[K, G, 4]`, float32.

    With `class_agnostic` a RoI has one box (G is 1), otherwise one per class (G is C).
    """

    def __init__(
        self, config: BaseBoxHeadConfig, channels: int, num_classes: int, class_agnostic: bool = False
    ) -> None:
        super().__init__()
        self.convs = nn.Sequential(
            *(
                ConvBlock(channels, channels, 3, config.norm, relu=True, init="msra")
                for _ in range(config.convs)
            )
        )
        sizes = [channels * config.resolution**2, *[config.width] * config.fcs]
        self.fcs = nn.ModuleList(xavier_linear(a, b) for a, b in itertools.pairwise(sizes))
        self.classes = nn.Linear(config.width, num_classes + 1)
        self.deltas = nn.Linear(config.width, 4 if class_agnostic else num_classes * 4)
        normal_(self.classes, std=0.01)
        normal_(self.deltas, std=0.001)

    def forward(self, features: Tensor) -> tuple[Tensor, Tensor]:
        hidden = self.convs(features).flatten(1)
        for fc in self.fcs:
            hidden = F.relu(fc(hidden))
        return self.classes(hidden).float(), self.deltas(hidden).unflatten(1, (-1, 4)).float()


class SampledRois(NamedTuple):
    """RoIs that the heads are trained on; positives come first."""

    boxes_BR4: Tensor
    labels_BR: Tensor  # int64 in [0, C], C is background
    index_BR: Tensor  # int64, the matched ground-truth slot
    positive_BR: Tensor
    valid_BR: Tensor
    is_object_BR: Tensor  # bool: the RoI is a ground-truth box itself, not a proposal
    image_BR: Tensor  # int64, the RoI's image: the row, unless OHEM chose from the whole micro-batch


def row_images(slots_BR: Tensor) -> Tensor:
    """Return the row's number in each slot, int64 `[B, R]`: RoIs that stay with their image."""
    rows_B = torch.arange(slots_BR.shape[0], device=slots_BR.device)
    return rows_B[:, None].expand(slots_BR.shape)


def candidate_rois(
    proposals: Proposals, targets: Targets, iou: float, num_classes: int, best_takes_object: bool = False
) -> SampledRois:
    """Return all proposals and then the ground-truth boxes, `[B, N + M]`, with the objects that they match.

    A RoI predicts the object that it overlaps most; with `best_takes_object`, the best proposal of an object
    predicts that object.
    """
    boxes_BN4 = torch.cat([proposals.boxes_BN4, targets.boxes_BM4], 1)
    valid_BN = torch.cat([proposals.valid_BN, targets.valid_BM], 1)
    iou_BMN = pairwise_iou(targets.boxes_BM4, boxes_BN4)
    index_BN, label_BN = match(iou_BMN, targets.valid_BM, iou, iou, allow_low_quality=False)
    count = proposals.valid_BN.shape[1]
    if best_takes_object:
        # Among the proposals alone: the best box of an object is always its own.
        taken_BN, _ = match(
            iou_BMN[..., :count],
            targets.valid_BM,
            iou,
            iou,
            allow_low_quality=True,
            low_quality_iou=iou,
            takes_object=True,
        )
        index_BN = torch.cat([taken_BN, index_BN[:, count:]], 1)
    positive_BN = (label_BN == 1) & valid_BN
    is_object_N = torch.arange(valid_BN.shape[1], device=valid_BN.device) >= count
    return SampledRois(
        boxes_BR4=boxes_BN4,
        labels_BR=targets.labels_BM.gather(1, index_BN).where(positive_BN, num_classes),
        index_BR=index_BN,
        positive_BR=positive_BN,
        valid_BR=valid_BN,
        is_object_BR=is_object_N.expand(valid_BN.shape),
        image_BR=row_images(valid_BN),
    )


def sample_rois(
    candidates: SampledRois, key_BN: Tensor, config: BaseBoxHeadConfig, num_classes: int
) -> SampledRois:
    """Choose `batch_per_image` RoIs of each image, those of the largest keys (at least 0) first.

    At most the share `positive_fraction` of them, 0.25 by default, is positive.
    """
    label_BN = candidates.positive_BR.to(torch.int8).masked_fill(~candidates.valid_BR, -1)
    index_BR, positive_BR, valid_BR = sample(
        label_BN, key_BN, config.batch_per_image, config.positive_fraction
    )
    chosen = SampledRois._make(gather_slots(field, index_BR) for field in candidates)
    return chosen._replace(
        labels_BR=chosen.labels_BR.where(positive_BR, num_classes),
        positive_BR=positive_BR,
        valid_BR=valid_BR,
    )


def random_rois(
    candidates: SampledRois, config: BaseBoxHeadConfig, num_classes: int, seeds_B: Tensor
) -> SampledRois:
    """Choose RoIs at random, the same ones for the same seeds; see `sample_rois`."""
    noise_BN = uniform_noise(seeds_B, candidates.valid_BR.shape[1], SAMPLING_SALT)
    return sample_rois(candidates, noise_BN, config, num_classes)


def match_rois(
    boxes_BR4: Tensor, valid_BR: Tensor, image_BR: Tensor, targets: Targets, iou: float, num_classes: int
) -> SampledRois:
    """All RoIs, in their order, with the objects that they match: the later stages of a cascade."""
    # Each RoI is compared with the objects of its own image, which need not be that of its row.
    iou_BRM = pairwise_iou(targets.boxes_BM4[image_BR], boxes_BR4[:, :, None]).squeeze(-1)
    found_X1, label_X1 = match(
        iou_BRM.flatten(0, 1)[..., None],
        targets.valid_BM[image_BR].flatten(0, 1),
        iou,
        iou,
        allow_low_quality=False,
    )
    index_BR = found_X1.reshape(valid_BR.shape)
    positive_BR = (label_X1.reshape(valid_BR.shape) == 1) & valid_BR
    return SampledRois(
        boxes_BR4=boxes_BR4,
        labels_BR=targets.labels_BM[image_BR, index_BR].where(positive_BR, num_classes),
        index_BR=index_BR,
        positive_BR=positive_BR,
        valid_BR=valid_BR,
        is_object_BR=torch.zeros_like(valid_BR),
        image_BR=image_BR,
    )


def training_predictions(
    logits: Tensor,
    deltas: Tensor,
    rois: SampledRois,
    targets: Targets,
    weights: Weights = DELTA_WEIGHTS,
    both_sides: bool = False,
) -> BoxPredictions:
    """Pair the head's outputs, logits `[B*R, C + 1]` and deltas `[B*R, C, 4]`, with their targets.

    `both_sides` is that of `decode_deltas`.
    """
    shape = rois.labels_BR.shape
    # Background RoIs have no target class; they take the deltas of class 0, which the loss leaves out. A
    # class-agnostic box is at 0.
    class_BR = rois.labels_BR.where(rois.positive_BR, 0).clamp_max(deltas.shape[1] - 1)
    deltas_BR4 = (
        deltas.reshape(*shape, -1, 4).gather(2, class_BR[..., None, None].expand(*shape, 1, 4)).squeeze(2)
    )
    boxes_BR4 = targets.boxes_BM4[rois.image_BR, rois.index_BR]
    # An invalid RoI may be an empty box, and a negative one has no target. For both, the RoI and its target
    # are a unit box, so that the encoding is finite.
    unit = F.pad(boxes_BR4.new_ones(2), (2, 0))  # (0, 0, 1, 1), made on the device: a copy would synchronise
    positive_BR1 = rois.positive_BR[..., None]
    target_deltas_BR4 = encode_deltas(
        boxes_BR4.where(positive_BR1, unit), rois.boxes_BR4.where(positive_BR1, unit), weights
    )
    return BoxPredictions(
        logits_BRC1=logits.reshape(*shape, -1),
        deltas_BR4=deltas_BR4,
        target_deltas_BR4=target_deltas_BR4,
        labels_BR=rois.labels_BR,
        positive_BR=rois.positive_BR,
        valid_BR=rois.valid_BR,
        boxes_BR4=decode_deltas(deltas_BR4, rois.boxes_BR4, weights, both_sides),
        target_boxes_BR4=boxes_BR4,
    )


def scores_and_boxes(
    logits: Tensor,
    deltas: Tensor,
    rois_BN4: Tensor,
    weights: Weights = DELTA_WEIGHTS,
    both_sides: bool = False,
) -> tuple[Tensor, Tensor]:
    """Return the head's outputs `[B*N, ...]` as softmax scores `[B, N, C]` and boxes `[B, N, G, 4]`."""
    shape = rois_BN4.shape[:2]
    scores_BNC = logits.softmax(-1)[:, :-1].reshape(*shape, -1)
    return scores_BNC, decode_deltas(deltas.reshape(*shape, -1, 4), rois_BN4[:, :, None], weights, both_sides)


def select_detections(
    scores_BNC: Tensor,
    boxes_BNG4: Tensor,
    valid_BN: Tensor,
    sizes_B2: Tensor,
    config: BaseBoxHeadConfig,
    min_size: float,
) -> Detections:
    """Return the best `detections` of each image, with scores above a threshold, after NMS by class.

    Boxes are clipped to `sizes_B2` (height, width); both sides must be larger than `min_size` pixels.
    """
    num_classes = scores_BNC.shape[2]
    boxes_BX4 = clip_boxes(boxes_BNG4.expand(-1, -1, num_classes, 4).flatten(1, 2), sizes_B2)
    candidate_BX = (
        (scores_BNC > config.score_threshold) & valid_BN[..., None] & scores_BNC.isfinite()
    ).flatten(1) & non_empty(boxes_BX4, min_size)
    score_BX = scores_BNC.flatten(1).where(candidate_BX, -1.0)
    score_BK, index_BK = score_BX.topk(min(CANDIDATES, score_BX.shape[1]))
    boxes_BK4 = gather_slots(boxes_BX4, index_BK)
    label_BK = index_BK % num_classes
    keep_BK = class_nms_mask(
        boxes_BK4, score_BK, label_BK, score_BK > 0, num_classes, sizes_B2.amax(1), config.nms_iou
    )
    score_BD, best_BD = score_BK.where(keep_BK, -1.0).topk(min(config.detections, score_BK.shape[1]))
    valid_BD = score_BD > 0
    return Detections(
        boxes_BD4=gather_slots(boxes_BK4, best_BD).where(valid_BD[..., None], 0.0),
        scores_BD=score_BD.where(valid_BD, 0.0),
        labels_BD=label_BK.gather(1, best_BD).where(valid_BD, 0),
        valid_BD=valid_BD,
        masks_BDSS=None,
    )


def roi_losses(
    p: BoxPredictions, smooth_l1_beta: float, kind: BoxLoss = "smooth_l1"
) -> tuple[Tensor, Tensor]:
    """Return the classification and the box loss of each RoI, float32 `[B, R]`; 0 in unused slots."""
    entropy_BR = F.cross_entropy(p.logits_BRC1.flatten(0, 1), p.labels_BR.flatten(), reduction="none")
    if kind == "smooth_l1":
        distance_BR = box_distance(p.deltas_BR4, p.target_deltas_BR4, smooth_l1_beta)
    else:
        # What is not positive may hold anything: it compares a unit box with itself.
        positive_BR1 = p.positive_BR[..., None]
        unit = F.pad(p.boxes_BR4.new_ones(2), (2, 0))
        distance_BR = iou_loss(
            p.boxes_BR4.where(positive_BR1, unit), p.target_boxes_BR4.where(positive_BR1, unit), kind
        )
    return (
        torch.where(p.valid_BR, entropy_BR.reshape(p.labels_BR.shape), 0.0),
        torch.where(p.positive_BR, distance_BR, 0.0),
    )


def box_losses(p: BoxPredictions, smooth_l1_beta: float, kind: BoxLoss = "smooth_l1") -> dict[str, Tensor]:
    """Return the classification and box loss of the sampled RoIs (`fast_rcnn.py` of detectron2 0.6).

    Both sums are divided by the number of sampled RoIs, background included.
    """
    count = p.valid_BR.sum().clamp_min(1)
    entropy_BR, distance_BR = roi_losses(p, smooth_l1_beta, kind)
    return {"loss_cls": entropy_BR.sum() / count, "loss_box_reg": distance_BR.sum() / count}
