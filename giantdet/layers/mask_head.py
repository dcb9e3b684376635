"""Mask head: prediction of an object's mask inside its box (Mask R-CNN, He et al. 2017, figure 4 right).

Shapes: B images · P mask slots · D detections · K RoIs · C classes · S = 2 x `resolution`.
Reference: detectron2's `MaskRCNNConvUpsampleHead`.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from giantdet.config.architectures.common import MaskHeadConfig
from giantdet.config.conventions import Conventions
from giantdet.layers.box_head import SampledRois
from giantdet.layers.common import ConvBlock, normal_
from giantdet.layers.roi_pool import RoiMaps, RoiPool
from giantdet.ops.masks import mask_targets
from giantdet.structures import Detections, Targets


class MaskPredictions(NamedTuple):
    """Mask head outputs of the target class at the first P sampled positives."""

    logits_BPSS: Tensor  # float32, S is the head's resolution (28)
    targets_BPSS: Tensor  # float32 in [0, 1]
    valid_BP: Tensor  # bool


class MaskHead(nn.Module):
    """RoI features `[K, channels, 14, 14]` and their classes `[K]` to mask logits `[K, 28, 28]`, float32."""

    def __init__(self, config: MaskHeadConfig, channels: int, num_classes: int) -> None:
        super().__init__()
        self.config = config
        inputs = [channels, *[config.width] * (config.convs - 1)]
        self.convs = nn.Sequential(
            *(ConvBlock(c, config.width, 3, config.norm, relu=True, init="msra") for c in inputs)
        )
        self.upsample = nn.ConvTranspose2d(config.width, config.width, kernel_size=2, stride=2)
        nn.init.kaiming_normal_(self.upsample.weight, mode="fan_out", nonlinearity="relu")
        assert self.upsample.bias is not None
        nn.init.zeros_(self.upsample.bias)
        self.masks = nn.Conv2d(config.width, num_classes, 1)
        normal_(self.masks, std=0.001)

    def forward(self, features: Tensor, label: Tensor) -> Tensor:
        logits: Tensor = self.masks(F.relu(self.upsample(self.convs(features))))
        side = logits.shape[-1]
        return logits.gather(1, label[:, None, None, None].expand(-1, 1, side, side)).squeeze(1).float()


def mask_training_predictions(
    head: MaskHead,
    pool: RoiPool,
    maps: RoiMaps,
    rois: SampledRois,
    targets: Targets,
    conventions: Conventions,
) -> MaskPredictions:
    """Masks of the first P RoIs: positives come first, in the order of sampling (random, or hardest first).

    Objects without a mask are unused.
    """
    config = head.config
    slots = min(config.slots, rois.positive_BR.shape[1])
    index_BP, image_BP = rois.index_BR[:, :slots], rois.image_BR[:, :slots]
    has_mask_BM = targets.frames_BM4[..., 2] > targets.frames_BM4[..., 0]
    valid_BP = rois.positive_BR[:, :slots] & has_mask_BM[image_BP, index_BP]
    # Adaptive sampling takes a point a cell: an unused slot's box of any size would cost time.
    boxes_BP4 = rois.boxes_BR4[:, :slots].where(valid_BP[..., None], 0.0)
    label_BP = rois.labels_BR[:, :slots].where(valid_BP, 0)
    features = pool(maps, boxes_BP4, config.resolution, config.sampling_ratio, image_BP)
    logits = head(features, label_BP.flatten())
    side = logits.shape[-1]
    # The objects of the micro-batch in one row, since a slot's object may be in another image than its row.
    object_BP = image_BP * has_mask_BM.shape[1] + index_BP
    goals_1KSS = mask_targets(
        targets.masks_BMSS.flatten(0, 1)[None],
        targets.frames_BM4.flatten(0, 1)[None],
        object_BP.flatten()[None],
        boxes_BP4.flatten(0, 1)[None],
        side,
        aligned=conventions.aligned_rois,
        binarize=conventions.binary_mask_targets,
    )
    return MaskPredictions(
        logits_BPSS=logits.reshape(*valid_BP.shape, side, side),
        targets_BPSS=goals_1KSS.reshape(*valid_BP.shape, side, side),
        valid_BP=valid_BP,
    )


def with_masks(head: MaskHead, pool: RoiPool, maps: RoiMaps, found: Detections) -> Detections:
    """The detections with mask probabilities of their classes."""
    config = head.config
    features = pool(maps, found.boxes_BD4, config.resolution, config.sampling_ratio)
    masks = head(features, found.labels_BD.flatten()).sigmoid()
    return found._replace(masks_BDSS=masks.reshape(*found.labels_BD.shape, *masks.shape[-2:]))


def mask_loss(p: MaskPredictions) -> dict[str, Tensor]:
    """Return the mean binary cross-entropy over the pixels of valid slots (detectron2's `mask_head.py`)."""
    entropy_BPSS = F.binary_cross_entropy_with_logits(p.logits_BPSS, p.targets_BPSS, reduction="none")
    entropy_BP = entropy_BPSS.mean((-2, -1))
    return {"loss_mask": torch.where(p.valid_BP, entropy_BP, 0.0).sum() / p.valid_BP.sum().clamp_min(1)}
