"""Non-maximum suppression of many groups (images, levels, classes) at a time, as a mask.

Greedy NMS in fixed shapes: the result is a bool per box, never a list of unknown length. The CPU uses
torchvision's loop, CUDA a Triton kernel (`ops/nms_triton.py`) or, without Triton, the fixed point of

    keep = valid & ~any(earlier box that overlaps and is kept)

which, iterated from keep = valid over boxes sorted by score, is exactly greedy NMS: after n rounds all
decisions are final that depend on chains of at most n suppressions. Crowded sets of 2,000 boxes needed at
most 9 rounds; 16 are run, without synchronising with the host.
"""

from __future__ import annotations

import math

import torch
import torchvision
from torch import Tensor

from giantdet.ops.boxes import pairwise_iou
from giantdet.ops.triton_kernels import INSTALLED, use_triton

if INSTALLED:
    from giantdet.ops import nms_triton

ROUNDS = 16


def _best_first(boxes_GK4: Tensor, scores_GK: Tensor, valid_GK: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return the order by score, invalid boxes last, then boxes and validity in that order."""
    order_GK = scores_GK.masked_fill(~valid_GK, -math.inf).argsort(dim=1, descending=True, stable=True)
    boxes_GK4 = boxes_GK4.gather(1, order_GK[:, :, None].expand_as(boxes_GK4))
    return order_GK, boxes_GK4, valid_GK.gather(1, order_GK)


def nms_mask_triton(boxes_GK4: Tensor, scores_GK: Tensor, valid_GK: Tensor, iou_threshold: float) -> Tensor:
    """`nms_mask` by the Triton kernels; needs the memory of `[G, K, K]` bits."""
    order_GK, boxes_GK4, valid_GK = _best_first(boxes_GK4, scores_GK, valid_GK)
    keep_GK = nms_triton.keep_sorted(boxes_GK4, valid_GK, iou_threshold)
    return torch.zeros_like(keep_GK).scatter(1, order_GK, keep_GK)


def nms_mask_fixed_point(
    boxes_GK4: Tensor, scores_GK: Tensor, valid_GK: Tensor, iou_threshold: float, rounds: int = ROUNDS
) -> Tensor:
    """`nms_mask` in a fixed number of rounds; needs the memory of a few `[G, K, K]` tensors."""
    order_GK, boxes_GK4, valid_sorted_GK = _best_first(boxes_GK4, scores_GK, valid_GK)
    # [g, k, j]: j comes before k and overlaps it.
    blocked_GKK = (pairwise_iou(boxes_GK4, boxes_GK4) > iou_threshold).tril(-1)
    keep_GK = valid_sorted_GK
    for _ in range(rounds):
        keep_GK = valid_sorted_GK & ~(blocked_GKK & keep_GK[:, None, :]).any(dim=2)
    return torch.zeros_like(keep_GK).scatter(1, order_GK, keep_GK)


@torch.library.custom_op("giantdet::nms_mask", mutates_args=(), device_types="cpu")
def _nms_mask(boxes_GK4: Tensor, scores_GK: Tensor, valid_GK: Tensor, iou_threshold: float) -> Tensor:
    # Invalid boxes come last, where they suppress no valid box.
    scores_GK = scores_GK.masked_fill(~valid_GK, -math.inf)
    keep_GK = torch.zeros_like(valid_GK)
    for keep_K, boxes_K4, scores_K in zip(keep_GK, boxes_GK4, scores_GK, strict=True):
        keep_K[torchvision.ops.nms(boxes_K4, scores_K, iou_threshold)] = True
    return keep_GK & valid_GK


@_nms_mask.register_kernel("cuda")
def _(boxes_GK4: Tensor, scores_GK: Tensor, valid_GK: Tensor, iou_threshold: float) -> Tensor:
    nms = nms_mask_triton if use_triton(boxes_GK4.device) else nms_mask_fixed_point
    return nms(boxes_GK4, scores_GK, valid_GK, iou_threshold)


@_nms_mask.register_fake
def _(boxes_GK4: Tensor, scores_GK: Tensor, valid_GK: Tensor, iou_threshold: float) -> Tensor:
    return torch.empty_like(valid_GK)


def nms_mask(boxes_GK4: Tensor, scores_GK: Tensor, valid_GK: Tensor, iou_threshold: float) -> Tensor:
    """Return the mask of greedy NMS within each of G groups of K boxes: `keep_GK` bool, in input order.

    Boxes are xyxy in any order. A box is removed if a kept box of higher score (of equal score: an earlier
    one) overlaps it with IoU > `iou_threshold`. Invalid boxes are not kept and suppress nothing. The
    underlying operator `giantdet::nms_mask` is opaque to `torch.compile`, so that `fullgraph=True` works.
    """
    keep_GK: Tensor = _nms_mask(
        boxes_GK4.detach().float(), scores_GK.detach().float(), valid_GK, iou_threshold
    )
    return keep_GK


def class_nms_mask(
    boxes_BK4: Tensor,
    scores_BK: Tensor,
    labels_BK: Tensor,
    valid_BK: Tensor,
    num_classes: int,
    extent_B: Tensor,
    iou_threshold: float,
) -> Tensor:
    """`nms_mask` within each class of each image. Boxes lie in a square of `extent_B` pixels.

    Each class is moved to its own tile of the plane, so boxes of different classes never overlap. The tiles
    form a square, not a row: 1,203 classes in a row span 1.6 million pixels, which float32 rounds to 1/8.
    """
    tiles = math.isqrt(num_classes - 1) + 1
    tile_BK2 = torch.stack([labels_BK % tiles, labels_BK // tiles], -1) * (extent_B + 1)[:, None, None]
    return nms_mask(boxes_BK4 + tile_BK2.repeat(1, 1, 2), scores_BK, valid_BK, iou_threshold)
