"""Assign to each anchor or proposal the object that it should predict, by IoU.

Faster R-CNN's rule as in detectron2's `Matcher`, for a padded batch.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor


def match(
    iou_BMN: Tensor,
    valid_BM: Tensor,
    low: float,
    high: float,
    allow_low_quality: bool,
    low_quality_iou: float = 0.0,
    takes_object: bool = False,
) -> tuple[Tensor, Tensor]:
    """Match N candidates to M object slots: `(index_BN int64, label_BN int8)`.

    index: the valid object of largest IoU (the first if equal). label: 1 (positive) from `high` up, 0
    (negative) below `low`, -1 (ignored) between. With `allow_low_quality`, every object's own best
    candidates, ties included, are positive as well, if their IoU is at least `low_quality_iou`. Their index
    stays that of *their* best object, as in detectron2 and torchvision; with `takes_object` it becomes that
    of the object whose best they are, the last of several, as in mmdetection. An image without objects gets
    index 0 and label 0 throughout.

    One deviation: an object that no candidate overlaps (best IoU 0) makes no candidate positive. In
    detectron2 and torchvision it makes *all* candidates positive that do not overlap it.
    """
    iou_BMN = iou_BMN.detach().masked_fill(~valid_BM[:, :, None], -1.0)
    best_BN, index_BN = iou_BMN.max(dim=1)
    label_BN = (best_BN >= high).to(torch.int8) - ((best_BN >= low) & (best_BN < high)).to(torch.int8)
    if allow_low_quality:
        best_BM = iou_BMN.amax(dim=2)
        best_BM = best_BM.masked_fill((best_BM <= 0) | (best_BM < low_quality_iou), math.inf)
        is_best_BMN = iou_BMN == best_BM[:, :, None]
        label_BN = label_BN.masked_fill(is_best_BMN.any(dim=1), 1)
        if takes_object:
            number_M1 = torch.arange(1, iou_BMN.shape[1] + 1, device=iou_BMN.device)[:, None]
            taken_BN = (is_best_BMN * number_M1).amax(dim=1)  # 0: none
            index_BN = torch.where(taken_BN > 0, taken_BN - 1, index_BN)
    return index_BN, label_BN
