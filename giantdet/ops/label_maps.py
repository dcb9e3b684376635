"""Semantic maps made of objects: the class of the smallest object at each cell of a grid.

Shapes: B images · M ground-truth slots · S side of a mask frame · h, w cells of the grid.
"""

from __future__ import annotations

import torch
from torch import Tensor

from giantdet.ops.boxes import box_area


def cell_centres(maps_BHW: Tensor, stride: int) -> Tensor:
    """Return what maps of the canvas have at the centres of the cells of a grid: `[B, H, W]` to `[B, h, w]`.

    The stride is even, so a centre is a corner of four pixels; the lower right one is read.
    """
    return maps_BHW[:, stride // 2 :: stride, stride // 2 :: stride]


def paint_objects(
    boxes_BM4: Tensor, labels_BM: Tensor, valid_BM: Tensor, masks_BMSS: Tensor, frames_BM4: Tensor,
    grid_hw: tuple[int, int], stride: int, background: int,
) -> Tensor:  # fmt: skip
    """Return the class of each cell, int64 `[B, h, w]`: that of the smallest object at its centre.

    An object is where its mask covers at least half of the frame's cell, or, without a mask (a frame of no
    extent, or S = 0), where its box is. Its size is its box's area; of equals, the first is on top. Cells
    without an object are `background`.
    """
    (height, width), slots = grid_hw, valid_BM.shape[1]
    y_h, x_w = (
        (torch.arange(count, dtype=torch.float32, device=boxes_BM4.device) + 0.5) * stride
        for count in grid_hw
    )
    x0, y0, x1, y1 = (side[..., None] for side in boxes_BM4.unbind(-1))
    rows_BMh, columns_BMw = (y_h >= y0) & (y_h < y1), (x_w >= x0) & (x_w < x1)
    covered_BMhw = rows_BMh[..., None] & columns_BMw[:, :, None]
    side = masks_BMSS.shape[-1]
    if side:
        row_BMh, in_rows_BMh = _frame_cells(y_h, frames_BM4[..., 1], frames_BM4[..., 3], side)
        column_BMw, in_columns_BMw = _frame_cells(x_w, frames_BM4[..., 0], frames_BM4[..., 2], side)
        # The frame is axis-parallel: first the rows that the grid reads, then the columns.
        values = masks_BMSS.gather(2, row_BMh[..., None].expand(-1, -1, -1, side))
        values = values.gather(3, column_BMw[:, :, None].expand(-1, -1, height, -1))
        masked_BMhw = (values >= 128) & in_rows_BMh[..., None] & in_columns_BMw[:, :, None]
        has_mask_BM = frames_BM4[..., 2] > frames_BM4[..., 0]
        covered_BMhw = torch.where(has_mask_BM[..., None, None], masked_BMhw, covered_BMhw)
    covered_BMhw = covered_BMhw & valid_BM[..., None, None]

    order_BM = box_area(boxes_BM4).argsort(dim=1, stable=True)
    rank_BM = order_BM.argsort(1).to(torch.int16)  # the inverse permutation, in as few bytes as it fits
    best_Bhw = torch.where(covered_BMhw, rank_BM[..., None, None], slots).amin(1).to(torch.int64)
    ranked_BM = labels_BM.gather(1, order_BM)
    nothing_B1 = torch.full_like(ranked_BM[:, :1], background)
    labels_BX = torch.cat([ranked_BM, nothing_B1], 1).gather(1, best_Bhw.flatten(1))
    return labels_BX.reshape(-1, height, width)


def _frame_cells(at_L: Tensor, start_BM: Tensor, end_BM: Tensor, side: int) -> tuple[Tensor, Tensor]:
    """Return the cell of each object's frame at positions along an axis, `[B, M, L]`, and if it is in it."""
    cell_BM = (end_BM - start_BM) / side
    cell_BM = torch.where(cell_BM > 0, cell_BM, 1.0)
    index_BML = ((at_L - start_BM[..., None]) / cell_BM[..., None]).floor()
    inside_BML = (index_BML >= 0) & (index_BML < side)
    return index_BML.clamp(0, side - 1).to(torch.int64), inside_BML
