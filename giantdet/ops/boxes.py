"""Arithmetic on xyxy boxes: area, IoU, clipping, and the regression deltas of the heads.

Deltas are those of R-CNN (Girshick et al. 2014, appendix C) with detectron2's weights and clamp
(`detectron2/modeling/box_regression.py`). Boxes are in pixels, and the width of a box is x1 - x0,
without the "+ 1" of older code. Functions are total: a degenerate box gives 0 or a finite number, not NaN.
"""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor

# dw and dh are clamped at this, the logarithm of the largest growth of a proposal, as in detectron2.
MAX_LOG_SCALE = math.log(1000.0 / 16)
# Shorter sides (pixels) are encoded as this; only slots without a box have them.
MIN_SIDE = 1e-3

Weights = tuple[float, float, float, float]


def box_area(boxes: Tensor) -> Tensor:
    """Return the area of `[..., 4]` boxes in square pixels, `[...]`; 0 if a side is not positive."""
    return (boxes[..., 2] - boxes[..., 0]).clamp_min(0) * (boxes[..., 3] - boxes[..., 1]).clamp_min(0)


def pairwise_iou(a: Tensor, b: Tensor) -> Tensor:
    """Return the IoU `[..., M, N]` of `[..., M, 4]` and `[..., N, 4]` boxes, without gradient.

    0 for a degenerate box. Computed in place and column by column, because with a hundred objects and a
    quarter of a million anchors each temporary takes 100 MB per image.
    """
    a, b = a.detach(), b.detach()
    ax0, ay0, ax1, ay1 = (column[..., :, None] for column in a.movedim(-1, 0).contiguous().unbind(0))
    bx0, by0, bx1, by1 = (column[..., None, :] for column in b.movedim(-1, 0).contiguous().unbind(0))
    overlap = torch.minimum(ax1, bx1).sub_(torch.maximum(ax0, bx0)).clamp_(min=0)
    overlap.mul_(torch.minimum(ay1, by1).sub_(torch.maximum(ay0, by0)).clamp_(min=0))
    union = (box_area(a)[..., :, None] + box_area(b)[..., None, :]).sub_(overlap)
    # 0 / 0 gives 0; a real union is far larger than this.
    return overlap.div_(union.clamp_(min=1e-12))


def clip_boxes(boxes_BN4: Tensor, sizes_B2: Tensor) -> Tensor:
    """Return boxes clipped to `[0, width] x [0, height]` of their image; `sizes_B2` is (height, width)."""
    limits_B14 = sizes_B2.to(boxes_BN4.dtype).flip(-1).repeat(1, 2)[:, None]
    return torch.minimum(boxes_BN4.clamp_min(0), limits_B14)


def non_empty(boxes: Tensor, min_size: float = 0.0) -> Tensor:
    """Return whether both sides of `[..., 4]` boxes exceed `min_size` pixels (detectron2's test)."""
    return ((boxes[..., 2] - boxes[..., 0]) > min_size) & ((boxes[..., 3] - boxes[..., 1]) > min_size)


def _center_size(boxes: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    width, height = boxes[..., 2] - boxes[..., 0], boxes[..., 3] - boxes[..., 1]
    return boxes[..., 0] + 0.5 * width, boxes[..., 1] + 0.5 * height, width, height


def encode_deltas(boxes: Tensor, anchors: Tensor, weights: Weights) -> Tensor:
    """Return the deltas (dx, dy, dw, dh) from `anchors` to `boxes`, both `[..., 4]`; float32.

    dx = wx (x - xa) / wa and dw = ww log(w / wa), where x is the centre and w the width. Also finite for
    degenerate boxes and anchors, whose sides are taken as `MIN_SIDE`.
    """
    x, y, width, height = _center_size(boxes.float())
    xa, ya, wa, ha = _center_size(anchors.float())
    wa, ha = wa.clamp_min(MIN_SIDE), ha.clamp_min(MIN_SIDE)
    wx, wy, ww, wh = weights
    return torch.stack(
        [
            wx * (x - xa) / wa,
            wy * (y - ya) / ha,
            ww * torch.log(width.clamp_min(MIN_SIDE) / wa),
            wh * torch.log(height.clamp_min(MIN_SIDE) / ha),
        ],
        dim=-1,
    )


def decode_deltas(deltas: Tensor, anchors: Tensor, weights: Weights, both_sides: bool = False) -> Tensor:
    """Return the boxes of `deltas` applied to `anchors`, `[..., 4]` each (they broadcast); float32.

    dw and dh are clamped from above at log(1000 / 16), as in detectron2; with `both_sides` also from below at
    its negative, as in mmdetection.
    """
    lowest = -MAX_LOG_SCALE if both_sides else -math.inf
    xa, ya, wa, ha = _center_size(anchors.float())
    dx, dy, dw, dh = (d / w for d, w in zip(deltas.float().unbind(-1), weights, strict=True))
    x, y = dx * wa + xa, dy * ha + ya
    half_width = 0.5 * wa * torch.exp(dw.clamp(lowest, MAX_LOG_SCALE))
    half_height = 0.5 * ha * torch.exp(dh.clamp(lowest, MAX_LOG_SCALE))
    return torch.stack([x - half_width, y - half_height, x + half_width, y + half_height], dim=-1)


def iou_loss(boxes: Tensor, targets: Tensor, kind: Literal["giou", "diou", "ciou"]) -> Tensor:
    """Return the GIoU, DIoU or CIoU loss of boxes against targets, both `[..., 4]`: `[...]`, with gradient.

    GIoU (Rezatofighi et al. 2019) is 1 - IoU + the share of the enclosing box outside the union; DIoU (Zheng
    et al. 2020) is 1 - IoU + the squared distance of the centres over that of the enclosing box's corners;
    CIoU adds alpha v, where v compares the aspect ratios. The values of `torchvision.ops`
    (`generalized_box_iou_loss` and its siblings), which select by a mask and so wait for the device.
    Degenerate boxes give finite values and gradients.
    """
    eps = 1e-7
    x0, y0, x1, y1 = boxes.unbind(-1)
    tx0, ty0, tx1, ty1 = targets.unbind(-1)
    width, height, target_width, target_height = x1 - x0, y1 - y0, tx1 - tx0, ty1 - ty0
    overlap = (torch.minimum(x1, tx1) - torch.maximum(x0, tx0)).clamp_min(0)
    overlap = overlap * (torch.minimum(y1, ty1) - torch.maximum(y0, ty0)).clamp_min(0)
    union = width * height + target_width * target_height - overlap
    iou = overlap / (union + eps)
    outer_width = torch.maximum(x1, tx1) - torch.minimum(x0, tx0)
    outer_height = torch.maximum(y1, ty1) - torch.minimum(y0, ty0)
    if kind == "giou":
        outer = outer_width * outer_height
        return 1 - iou + (outer - union) / (outer + eps)
    distance = ((x0 + x1 - tx0 - tx1) / 2) ** 2 + ((y0 + y1 - ty0 - ty1) / 2) ** 2
    loss = 1 - iou + distance / (outer_width**2 + outer_height**2 + eps)
    if kind == "diou":
        return loss
    # atan2 is atan of the ratio, without the division by a height of 0.
    angle = torch.atan2(width, height.clamp_min(eps))
    v = 4 / math.pi**2 * (torch.atan2(target_width, target_height.clamp_min(eps)) - angle) ** 2
    alpha = (v / (1 - iou + v + eps)).detach()
    return loss + alpha * v
