"""Convert masks between the image, the frame of an object and the frame of a proposal.

Ground-truth masks are small bitmaps over a window of the image (`Targets.frames_BM4`). `mask_targets` makes
the mask head's targets of them; `paste_mask` turns the head's probabilities into a mask of the image. Both
follow detectron2 (`structures/masks.py`, `layers/mask_ops.py`), or torchvision if its convention is
requested.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
import torchvision
from torch import Tensor


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


def paste_mask(
    mask_SS: Tensor,
    box_4: Tensor,
    window: tuple[int, int, int, int],
    threshold: float = 0.5,
    at_pixel_centres: bool = True,
) -> Tensor:
    """Return a window of an object's mask in the image, bool, from probabilities in the frame of its box.

    `box_4` is xyxy in pixels of the image, `window` (left, top, right, bottom) in whole pixels. detectron2
    interpolates bilinearly at pixel centres, and a pixel counts from `threshold` on; torchvision rounds the
    box to whole pixels, and a pixel counts above `threshold`. Beyond the box by one cell of the mask, nothing
    counts. Every operation is by element, so a pixel is the same in each window that has it; the order of the
    sums of a matrix product depends on its size.
    """
    side = mask_SS.shape[0]
    padded = F.pad(mask_SS.detach().float(), (1, 1, 1, 1))
    box_4 = box_4.detach().float()
    left, top, right, bottom = window
    at_pixel = _at_pixel_centres if at_pixel_centres else _at_rounded_box
    x_L, column_L = at_pixel(box_4[0], box_4[2], side, left, right)
    y_L, row_L = at_pixel(box_4[1], box_4[3], side, top, bottom)
    soft = _between(_between(padded, y_L).mT, x_L).mT
    counts = soft >= threshold if at_pixel_centres else soft > threshold
    return counts & row_L[:, None] & column_L


def _at_pixel_centres(start: Tensor, end: Tensor, side: int, first: int, last: int) -> tuple[Tensor, Tensor]:
    """Return where pixels first to last lie among a mask's padded values, and which may count: detectron2."""
    pixel_L = torch.arange(first, last, dtype=torch.float32, device=start.device) + 0.5
    extent = end - start
    at_L = (pixel_L - start) * (side / torch.where(extent > 0, extent, 1.0)) + 0.5
    return at_L.clamp(0, side + 1), (extent > 0).expand(last - first)


def _at_rounded_box(start: Tensor, end: Tensor, side: int, first: int, last: int) -> tuple[Tensor, Tensor]:
    """Return the same for torchvision (`paste_masks_in_image`).

    The padded values are resized to the box, which has grown with them and is truncated to whole pixels.
    """
    centre, half = (start + end) * 0.5, (end - start) * 0.5 * ((side + 2) / side)
    low, high = (centre - half).trunc(), (centre + half).trunc()
    pixel_L = torch.arange(first, last, dtype=torch.float32, device=start.device)
    scale = (side + 2) / (high - low + 1).clamp_min(1)
    at_L = scale * (pixel_L - low + 0.5) - 0.5
    return at_L.clamp(0, side + 1), (pixel_L >= low) & (pixel_L <= high)


def _between(values_SX: Tensor, at_L: Tensor) -> Tensor:
    """Return rows of `values_SX` at fractional positions `[L, X]`, linearly interpolated."""
    low_L = at_L.floor()
    share_L1 = (at_L - low_L)[:, None]
    index_L = low_L.long()
    above_L = (index_L + 1).clamp_max(len(values_SX) - 1)
    return values_SX[index_L] * (1 - share_L1) + values_SX[above_L] * share_L1


def paste_masks(
    masks_DSS: Tensor,
    boxes_D4: Tensor,
    height: int,
    width: int,
    threshold: float = 0.5,
    at_pixel_centres: bool = True,
) -> Tensor:
    """Return whole masks by `paste_mask`, bool `[D, height, width]`: gigabytes for a large image."""
    pasted = torch.zeros(len(masks_DSS), height, width, dtype=torch.bool, device=masks_DSS.device)
    for mask_HW, mask_SS, box_4 in zip(pasted, masks_DSS, boxes_D4, strict=True):
        mask_HW.copy_(paste_mask(mask_SS, box_4, (0, 0, width, height), threshold, at_pixel_centres))
    return pasted
