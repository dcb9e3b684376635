"""Convert masks from the frame of an object to the frame of a proposal.

Ground-truth masks are small bitmaps over a window of the image (`Targets.frames_BM4`). `mask_targets` makes
the mask head's targets of them, as detectron2 does (`structures/masks.py`), or torchvision if its convention
is requested. The way back from the head's probabilities to the image is `evaluation/pasting.py`.
"""

from __future__ import annotations

import torch
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
