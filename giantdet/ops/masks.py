"""Convert masks between the image, the frame of an object and the frame of a proposal.

Ground-truth masks are small bitmaps over a window of the image (`Targets.frames_BM4`). `mask_targets` makes
the mask head's targets of them; `paste_mask` turns the head's probabilities into a mask of the image. Both
follow detectron2 (`structures/masks.py`, `layers/mask_ops.py`), or torchvision if its convention is
requested.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
import torchvision
from numpy.typing import NDArray
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
    mask_SS: NDArray[np.float32],
    box: Sequence[float],
    window: tuple[int, int, int, int],
    threshold: float = 0.5,
    at_pixel_centres: bool = True,
) -> NDArray[np.bool_]:
    """Return a window of an object's mask in the image, bool `[columns, rows]`: transposed, as RLE counts it.

    `mask_SS` are probabilities in the frame of the box, `box` is xyxy in pixels of the image, `window` (left,
    top, right, bottom) in whole pixels. detectron2 interpolates bilinearly at pixel centres, and a pixel
    counts from `threshold` on; torchvision rounds the box to whole pixels, and a pixel counts above
    `threshold`. Beyond the box by one cell of the mask, nothing counts. Every operation is by element, so a
    pixel is the same in each window that has it. In NumPy, whose calls cost less than PyTorch's: most masks
    are small.
    """
    side = mask_SS.shape[0]
    padded = np.zeros((side + 2, side + 2), np.float32)
    padded[1:-1, 1:-1] = mask_SS
    (x0, y0, x1, y1), (left, top, right, bottom) = np.asarray(box, np.float32), window
    at_pixel = _at_pixel_centres if at_pixel_centres else _at_rounded_box
    x_L, column_L = at_pixel(x0, x1, side, left, right)
    y_L, row_L = at_pixel(y0, y1, side, top, bottom)
    soft = _between(np.ascontiguousarray(_between(padded, y_L).T), x_L)
    counts: NDArray[np.bool_] = soft >= threshold if at_pixel_centres else soft > threshold
    if not column_L.all():
        counts &= column_L[:, None]
    if not row_L.all():
        counts &= row_L
    return counts


Positions = tuple[NDArray[np.float32], NDArray[np.bool_]]
"""Where pixels lie among a mask's padded values, and which of them may count."""


def _at_pixel_centres(start: np.float32, end: np.float32, side: int, first: int, last: int) -> Positions:
    """Return the positions of pixels first to last in detectron2's convention."""
    pixel_L = np.arange(first, last, dtype=np.float32) + np.float32(0.5)
    extent = end - start
    at_L = (pixel_L - start) * (np.float32(side) / extent if extent > 0 else np.float32(side))
    at_L += np.float32(0.5)
    return _clipped(at_L, side), np.full(last - first, extent > 0)


def _at_rounded_box(start: np.float32, end: np.float32, side: int, first: int, last: int) -> Positions:
    """Return the same for torchvision (`paste_masks_in_image`).

    The padded values are resized to the box, which has grown with them and is truncated to whole pixels.
    """
    centre = (start + end) * np.float32(0.5)
    half = (end - start) * np.float32(0.5) * np.float32((side + 2) / side)
    low, high = np.trunc(centre - half), np.trunc(centre + half)
    pixel_L = np.arange(first, last, dtype=np.float32)
    scale = np.float32(side + 2) / max(high - low + 1, np.float32(1))
    at_L = scale * (pixel_L - low + np.float32(0.5)) - np.float32(0.5)
    return _clipped(at_L, side), (pixel_L >= low) & (pixel_L <= high)


def _clipped(at_L: NDArray[np.float32], side: int) -> NDArray[np.float32]:
    np.maximum(at_L, np.float32(0), out=at_L)
    return np.minimum(at_L, np.float32(side + 1), out=at_L)


def _between(values_SX: NDArray[np.float32], at_L: NDArray[np.float32]) -> NDArray[np.float32]:
    """Return rows of `values_SX` at fractional positions `[L, X]`, linearly interpolated."""
    index_L = at_L.astype(np.int64)
    share_L1 = (at_L - index_L.astype(np.float32))[:, None]
    below_LX = values_SX.take(index_L, 0)
    below_LX *= 1 - share_L1
    index_L += 1
    above_LX = values_SX.take(index_L, 0, mode="clip")
    above_LX *= share_L1
    below_LX += above_LX
    return below_LX


def paste_masks(
    masks_DSS: Tensor,
    boxes_D4: Tensor,
    height: int,
    width: int,
    threshold: float = 0.5,
    at_pixel_centres: bool = True,
) -> Tensor:
    """Return masks of the image by `paste_mask`, bool `[D, height, width]` on the CPU."""
    pasted = torch.zeros(len(masks_DSS), height, width, dtype=torch.bool)
    masks, boxes = (np.asarray(t.detach().to("cpu", torch.float32)) for t in (masks_DSS, boxes_D4))
    for mask_HW, mask_SS, box in zip(pasted, masks, boxes, strict=True):
        window = (0, 0, width, height)
        mask_HW.copy_(torch.from_numpy(paste_mask(mask_SS, box, window, threshold, at_pixel_centres)).T)
    return pasted
