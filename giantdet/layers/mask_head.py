"""Mask head: prediction of an object's mask inside its box (Mask R-CNN, He et al. 2017, figure 4 right).

Shapes: B images · P mask slots · D detections · K RoIs · N classes · C channels · S = 2 x `resolution`.
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
from giantdet.ops.shapes import used_slots
from giantdet.structures import Detections, Targets


class MaskPredictions(NamedTuple):
    """Mask head outputs of the target class at the first P sampled positives."""

    logits_BPSS: Tensor  # float32, S is the head's resolution (28)
    targets_BPSS: Tensor  # float32 in [0, 1]
    valid_BP: Tensor  # bool


class MaskPredictor(nn.Conv2d):
    """A 1x1 convolution to a mask per class, of which only that of the given class is computed.

    Features `[K, C, S, S]` and classes `[K]` to logits `[K, S, S]`. detectron2 and torchvision compute all
    classes and select one, which costs N times the time and memory.
    """

    def __init__(self, channels: int, num_classes: int) -> None:
        super().__init__(channels, num_classes, 1)
        normal_(self, std=0.001)

    def forward(self, features: Tensor, label: Tensor) -> Tensor:  # type: ignore[override]
        assert self.bias is not None
        # As a product: its backward pass adds the gradients of a class in float32, and in a fixed order.
        classes = torch.arange(self.out_channels, device=label.device)
        chosen_KN = (label[:, None] == classes).to(features.dtype)
        weight_KC, bias_K1 = chosen_KN @ self.weight.flatten(1), chosen_KN @ self.bias[:, None]
        logits_K1X = torch.baddbmm(bias_K1[:, None], weight_KC[:, None], features.flatten(2))
        return logits_K1X.view(-1, *features.shape[2:])


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
        self.masks = MaskPredictor(config.width, num_classes)

    def forward(self, features: Tensor, label: Tensor) -> Tensor:
        logits: Tensor = self.masks(F.relu(self.upsample(self.convs(features))), label)
        return logits.float()


def mask_training_predictions(
    head: MaskHead,
    pool: RoiPool,
    maps: RoiMaps,
    rois: SampledRois,
    targets: Targets,
    conventions: Conventions,
) -> MaskPredictions:
    """Return the masks of the first P RoIs: positives come first, in the order of sampling.

    That order is random, or hardest first. Objects without a mask are unused. Where shapes may vary, unused
    slots are not computed, and hold zeros.
    """
    config = head.config
    slots = min(config.slots, rois.positive_BR.shape[1])
    index_BP, image_BP = rois.index_BR[:, :slots], rois.image_BR[:, :slots]
    has_mask_BM = targets.frames_BM4[..., 2] > targets.frames_BM4[..., 0]
    valid_BP = rois.positive_BR[:, :slots] & has_mask_BM[image_BP, index_BP]
    # The slots of the micro-batch in one row, and its objects in another: a slot's object may be in another
    # image than its row.
    valid_1K = valid_BP.flatten()[None]
    # Adaptive sampling takes one point per cell: an unused slot's box of any size would cost time.
    boxes_1K4 = rois.boxes_BR4[:, :slots].flatten(0, 1)[None].where(valid_1K[..., None], 0.0)
    label_1K = rois.labels_BR[:, :slots].flatten()[None].where(valid_1K, 0)
    image_1K = image_BP.flatten()[None]
    object_1K = image_1K * has_mask_BM.shape[1] + index_BP.flatten()
    # A batch norm's statistics are over all slots, here as on a GPU.
    used_K = None if config.norm == "batch" else used_slots(valid_1K[0])
    if used_K is not None:
        boxes_1K4, label_1K, image_1K, object_1K = (
            field[:, used_K] for field in (boxes_1K4, label_1K, image_1K, object_1K)
        )
    logits_KSS = head(
        pool(maps, boxes_1K4, config.resolution, config.sampling_ratio, image_1K), label_1K.flatten()
    )
    goals_KSS = mask_targets(
        targets.masks_BMSS.flatten(0, 1)[None],
        targets.frames_BM4.flatten(0, 1)[None],
        object_1K,
        boxes_1K4,
        logits_KSS.shape[-1],
        aligned=conventions.aligned_rois,
        binarize=conventions.binary_mask_targets,
    )[0]

    def in_slots(values_KSS: Tensor) -> Tensor:
        if used_K is not None:
            values_KSS = values_KSS.new_zeros(valid_1K.shape[1], *values_KSS.shape[1:]).index_copy(
                0, used_K, values_KSS
            )
        return values_KSS.reshape(*valid_BP.shape, *values_KSS.shape[1:])

    return MaskPredictions(
        logits_BPSS=in_slots(logits_KSS), targets_BPSS=in_slots(goals_KSS), valid_BP=valid_BP
    )


def with_masks(head: MaskHead, pool: RoiPool, maps: RoiMaps, found: Detections) -> Detections:
    """Return the detections with mask probabilities of their classes."""
    config = head.config
    features = pool(maps, found.boxes_BD4, config.resolution, config.sampling_ratio)
    masks = head(features, found.labels_BD.flatten()).sigmoid()
    return found._replace(masks_BDSS=masks.reshape(*found.labels_BD.shape, *masks.shape[-2:]))


def mask_loss(p: MaskPredictions) -> dict[str, Tensor]:
    """Return the mean binary cross-entropy over the pixels of valid slots (detectron2's `mask_head.py`)."""
    entropy_BPSS = F.binary_cross_entropy_with_logits(p.logits_BPSS, p.targets_BPSS, reduction="none")
    entropy_BP = entropy_BPSS.mean((-2, -1))
    return {"loss_mask": torch.where(p.valid_BP, entropy_BP, 0.0).sum() / p.valid_BP.sum().clamp_min(1)}
