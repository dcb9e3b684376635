"""Convert masks between the image, the frame of an object and the frame of a proposal.

Ground-truth masks are small bitmaps over a window of the image (`Targets.frames_BM4`). `mask_targets` makes
the mask head's targets of them; `paste_masks` turns the head's probabilities into masks of the image. Both
follow detectron2 (`structures/masks.py`, `layers/mask_ops.py`), or torchvision if its convention is
requested.
"""

from __future__ import annotations

import torch
import torchvision
from torch import Tensor
from torchvision.models.detection.roi_heads import paste_masks_in_image

# Pixels of masks pasted at a time; a float32 temporary of them takes 64 MB.
_CHUNK_PIXELS = 1 << 24


def mask_targets(
    masks_BMSS: Tensor, frames_BM4: Tensor, index_BP: Tensor, boxes_BP4: Tensor, size: int, aligned: bool,
    binarize: bool,
) -> Tensor:  # fmt: skip
    """Return the mask head's target for each proposal: `[B, P, size, size]` float32 in [0, 1].

    Args:
        masks_BMSS: uint8 coverage (0 to 255) of S x S cells.
        frames_BM4: xyxy pixels, the window that the cells tile; outside of it the mask is empty.
        index_BP: the object of each proposal.
        boxes_BP4: the proposals, xyxy pixels.
        size: side of the target, 28 in Mask R-CNN.
        aligned, binarize: True for detectron2 (`BitMasks.crop_and_resize`: at least half covered), False
            for torchvision (`project_masks_on_boxes`: soft, no half-pixel offset).

    This is RoIAlign of the bitmap with adaptive sampling, the proposal expressed in cells. With cells of one
    pixel it equals the reference on full bitmaps if the outermost cells are a margin: empty, or at the
    image's edge a copy of the edge (RoIAlign extends a map's last cell by one cell). Slots without an object
    (frame of size 0, empty bitmap) give 0.
    """
    batch, slots = masks_BMSS.shape[:2]
    side = masks_BMSS.shape[-1]
    row_BP = index_BP + torch.arange(batch, device=index_BP.device)[:, None] * slots
    row_K = row_BP.flatten()
    masks_K1SS = masks_BMSS.flatten(0, 1)[row_K][:, None].to(torch.float32) / 255
    frames_K4 = frames_BM4.flatten(0, 1)[row_K]
    boxes_K4 = boxes_BP4.detach().float().flatten(0, 1)

    cell_K2 = (frames_K4[:, 2:] - frames_K4[:, :2]) / side
    cell_K2 = torch.where(cell_K2 > 0, cell_K2, 1.0)
    corner_K2 = (boxes_K4[:, :2] - frames_K4[:, :2]) / cell_K2
    end_K2 = torch.maximum((boxes_K4[:, 2:] - frames_K4[:, :2]) / cell_K2, corner_K2)
    which_K1 = torch.arange(row_K.shape[0], dtype=torch.float32, device=row_K.device)[:, None]
    rois_K5 = torch.cat([which_K1, corner_K2, end_K2], dim=1)
    targets: Tensor = torchvision.ops.roi_align(masks_K1SS, rois_K5, size, 1.0, 0, aligned)
    targets_BPSS = targets.view(batch, -1, size, size)
    return (targets_BPSS >= 0.5).to(torch.float32) if binarize else targets_BPSS


def _interpolation(start_D: Tensor, end_D: Tensor, side: int, length: int) -> Tensor:
    """Return weights `[D, length, side]` that resample `side` values to [start, end] of `length` pixels.

    Linear between the centres of values and pixels, falling to 0 over half a value at the ends, as
    `grid_sample` along one axis with zero padding and `align_corners=False`. A box without extent gives 0.
    """
    pixel = torch.arange(length, dtype=torch.float32, device=start_D.device) + 0.5
    extent_D = end_D - start_D
    scale_D = side / torch.where(extent_D > 0, extent_D, 1.0)
    at_DL = (pixel - start_D[:, None]) * scale_D[:, None] - 0.5
    value = torch.arange(side, dtype=torch.float32, device=start_D.device)
    weights = (1 - (at_DL[:, :, None] - value).abs()).clamp_min(0)
    return weights * (extent_D > 0)[:, None, None]


def paste_masks(
    masks_DSS: Tensor,
    boxes_D4: Tensor,
    height: int,
    width: int,
    threshold: float = 0.5,
    at_pixel_centres: bool = True,
) -> Tensor:
    """Return masks of the image, `[D, height, width]` bool, from probabilities in the frames of boxes.

    `masks_DSS` are probabilities, `boxes_D4` xyxy pixels of the image. detectron2 interpolates bilinearly at
    pixel centres, and a pixel counts from `threshold` on; torchvision rounds boxes to whole pixels, and a
    pixel counts above `threshold`. Works on a few masks at a time, to need little memory beyond the result.
    """
    masks_DSS, boxes_D4 = masks_DSS.detach().float(), boxes_D4.detach().float()
    pasted = torch.zeros(len(masks_DSS), height, width, dtype=torch.bool, device=masks_DSS.device)
    chunk = max(1, _CHUNK_PIXELS // max(height * width, 1))
    for first in range(0, len(masks_DSS), chunk):
        masks, boxes = masks_DSS[first : first + chunk], boxes_D4[first : first + chunk]
        if not at_pixel_centres:
            # torchvision fails on a box outside of the image: move the box and drop its mask.
            outside = (boxes[:, 2:] <= 0).any(1) | (boxes[:, 0] >= width) | (boxes[:, 1] >= height)
            boxes = boxes.masked_fill(outside[:, None], 0.0)
            soft = paste_masks_in_image(masks[:, None], boxes, (height, width))[:, 0]
            pasted[first : first + chunk] = (soft > threshold) & ~outside[:, None, None]
        else:
            # The interpolation is separable: two small matrix products instead of a grid of points.
            rows = _interpolation(boxes[:, 1], boxes[:, 3], masks.shape[1], height)
            columns = _interpolation(boxes[:, 0], boxes[:, 2], masks.shape[2], width)
            pasted[first : first + chunk] = rows @ masks @ columns.mT >= threshold
    return pasted
