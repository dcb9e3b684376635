"""RoIAlign (He et al. 2017) over a feature pyramid (Lin et al. 2017), without a branch on the boxes.

The semantics are those of torchvision's and detectron2's `roi_align`, including the borders: a sampling point
outside [-1, size] counts as 0, and one beyond the outermost cell centres is moved there.

There are three paths. On CUDA, a Triton kernel (`ops/roi_align_triton.py`) pools from all levels at once. On
the CPU with a fixed number of points, every output bin is a weighted sum of 4 n^2 rows of one table of all
cells of all levels, channels last: one `embedding_bag`, whose forward took a quarter and whose backward an
eighth of torchvision's time. Otherwise torchvision's operator is called once per level, where the boxes of
other levels lie outside and give 0; it is also what the kernel is compared with.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
import torch.nn.functional as F
import torchvision
from einops import rearrange
from torch import Tensor

from giantdet.ops.boxes import box_area
from giantdet.ops.triton_kernels import INSTALLED, use_triton

if INSTALLED:
    from giantdet.ops import roi_align_triton


_gathers = True  # on CPUs, where it is faster


@contextmanager
def pooling_by_level() -> Iterator[None]:
    """Within the block, pool by torchvision's operator, which ONNX has too."""
    global _gathers
    _gathers = False
    try:
        yield
    finally:
        _gathers = True


def assign_levels(
    boxes: Tensor,
    num_levels: int,
    min_level: int = 2,
    canonical_size: float = 224,
    canonical_level: int = 4,
    epsilon: float = 1e-8,
) -> Tensor:
    """Return the pyramid level of `[..., 4]` boxes, `[...]` int64, 0 for the finest (`min_level`).

    floor(canonical_level + log2(sqrt(area) / canonical_size + epsilon)), clamped to the existing levels:
    equation 1 of Lin et al. 2017 with detectron2's epsilon (torchvision's is 1e-6, outside the logarithm;
    mmdetection's is 1e-6 for a canonical size of 56 pixels, so 1e-6 / 4 for 224).
    """
    size = box_area(boxes.detach().float()).sqrt()
    level = torch.floor(canonical_level + torch.log2(size / canonical_size + epsilon)) - min_level
    return level.nan_to_num(0.0).clamp(0, num_levels - 1).to(torch.int64)


def _axis_taps(
    start_K: Tensor, end_K: Tensor, cells_K: Tensor, bins: int, points: int, aligned: bool
) -> tuple[Tensor, Tensor]:
    """Return the cells read along one axis and their weights: two `[K, bins, 2 * points]` tensors.

    Bilinear interpolation and its border rules are separable, so a bin's taps are the outer product of those
    of its two axes. `start_K`, `end_K` are in cells, `cells_K` the level's length.
    """
    length_K = end_K - start_K
    if not aligned:
        length_K = length_K.clamp_min(1.0)
    step_K = length_K / bins
    bin_b1 = torch.arange(bins, dtype=torch.float32, device=start_K.device)[:, None]
    point_p = (torch.arange(points, dtype=torch.float32, device=start_K.device) + 0.5) / points
    at_Kbp = start_K[:, None, None] + bin_b1 * step_K[:, None, None] + point_p * step_K[:, None, None]

    cells_K11 = cells_K[:, None, None].to(torch.float32)
    inside_Kbp = (at_Kbp >= -1.0) & (at_Kbp <= cells_K11)
    # A NaN is not inside and must not become an index.
    at_Kbp = torch.where(inside_Kbp, at_Kbp, 0.0).clamp_min(0.0)
    at_Kbp = torch.minimum(at_Kbp, cells_K11 - 1)
    low_Kbp = at_Kbp.floor()
    high_Kbp = torch.minimum(low_Kbp + 1, cells_K11 - 1)
    fraction_Kbp = at_Kbp - low_Kbp
    share_Kbp = inside_Kbp.to(torch.float32) / points
    cells = torch.cat([low_Kbp, high_Kbp], dim=-1).to(torch.int64)
    return cells, torch.cat([(1 - fraction_Kbp) * share_Kbp, fraction_Kbp * share_Kbp], dim=-1)


def _gather_pool(
    levels: Sequence[Tensor], boxes_K4: Tensor, batch_K: Tensor, level_K: Tensor, strides: Sequence[float],
    output_size: int, sampling_ratio: int, aligned: bool,
) -> Tensor:  # fmt: skip
    """Pool by one `embedding_bag`, on any device; return `[K, C, o, o]`, channels last in memory."""
    table = torch.cat([rearrange(level, "b c h w -> (b h w) c").float() for level in levels])

    def by_level(values: list[float] | list[int], dtype: torch.dtype) -> Tensor:
        """Return each RoI's value by comparison; a lookup table would be copied from the host."""
        return sum(  # type: ignore[return-value]
            (level_K == i).to(dtype) * value for i, value in enumerate(values)
        )

    first_rows, rows = [], 0
    for level in levels:
        first_rows.append(rows)
        rows += level.shape[0] * level.shape[2] * level.shape[3]
    heights_K = by_level([level.shape[2] for level in levels], torch.int64)
    widths_K = by_level([level.shape[3] for level in levels], torch.int64)
    scale_K1 = by_level([1.0 / stride for stride in strides], torch.float32)[:, None]
    x0, y0, x1, y1 = (boxes_K4 * scale_K1 - (0.5 if aligned else 0.0)).unbind(-1)
    y_Kbt, y_weight_Kbt = _axis_taps(y0, y1, heights_K, output_size, sampling_ratio, aligned)
    x_Kbt, x_weight_Kbt = _axis_taps(x0, x1, widths_K, output_size, sampling_ratio, aligned)

    first_K = by_level(first_rows, torch.int64) + batch_K * heights_K * widths_K
    y_Kbt = first_K[:, None, None] + y_Kbt * widths_K[:, None, None]
    taps = (2 * sampling_ratio) ** 2
    index = (y_Kbt[:, :, None, :, None] + x_Kbt[:, None, :, None, :]).reshape(-1, taps)
    weight = (y_weight_Kbt[:, :, None, :, None] * x_weight_Kbt[:, None, :, None, :]).reshape(-1, taps)
    pooled = F.embedding_bag(index, table, per_sample_weights=weight, mode="sum")
    return rearrange(pooled, "(k i j) c -> k c i j", i=output_size, j=output_size)


def _level_pool(
    levels: Sequence[Tensor], boxes_K4: Tensor, batch_K: Tensor, level_K: Tensor, strides: Sequence[float],
    output_size: int, sampling_ratio: int, aligned: bool,
) -> Tensor:  # fmt: skip
    """Pool by torchvision's operator, once per level."""
    pooled: Tensor | None = None
    for i, (level, stride) in enumerate(zip(levels, strides, strict=True)):
        # Far outside and of size 0: such a box reads no points.
        mine_K4 = torch.where((level_K == i)[:, None], boxes_K4, -4.0 * stride)
        rois_K5 = torch.cat([batch_K[:, None].float(), mine_K4], dim=1)
        part = torchvision.ops.roi_align(
            level.float(), rois_K5, output_size, 1.0 / stride, sampling_ratio, aligned
        )
        pooled = part if pooled is None else pooled + part
    assert pooled is not None
    return pooled


def roi_align_pyramid(
    levels: Sequence[Tensor], boxes_BR4: Tensor, strides: Sequence[float], output_size: int,
    sampling_ratio: int, aligned: bool, level_epsilon: float = 1e-8, image_BR: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """Return the features of each box, pooled from its level: `[B * R, C, output_size, output_size]`.

    `levels` are `[B, C, h, w]` with `strides` (pixels, powers of two, finest first); boxes are xyxy pixels
    of the canvas. `sampling_ratio` is the number of points per bin and axis, 0 for one per cell
    (detectron2's default, slower on the CPU). `aligned` is the half-pixel offset (detectron2: True,
    torchvision: False). `level_epsilon` is that of `assign_levels`. `image_BR` is the image of each box,
    int64; None: the box's row. Computed in float32, returned in the dtype of the levels. Boxes get no
    gradient. A degenerate box gives finite values; a box with a NaN gives 0 if the number of points is fixed
    or a Triton kernel runs.
    """
    batch, rois = boxes_BR4.shape[:2]
    corner = boxes_BR4.detach().float()[..., :2]
    boxes_K4 = torch.cat([corner, torch.maximum(boxes_BR4.detach().float()[..., 2:], corner)], -1).view(-1, 4)
    if image_BR is None:
        image_BR = torch.arange(batch, device=boxes_BR4.device)[:, None].expand(batch, rois)
    batch_K = image_BR.flatten()
    finest = round(math.log2(strides[0]))
    level_K = assign_levels(boxes_K4, len(levels), min_level=finest, epsilon=level_epsilon)
    pool = _level_pool
    # The kernel's backward adds in any order. torchvision has a deterministic implementation, a slow one.
    if use_triton(boxes_BR4.device) and not torch.are_deterministic_algorithms_enabled():
        pool = roi_align_triton.pool
    elif _gathers and sampling_ratio > 0 and boxes_BR4.device.type in ("cpu", "meta"):
        pool = _gather_pool
    pooled = pool(levels, boxes_K4, batch_K, level_K, strides, output_size, sampling_ratio, aligned)
    return pooled.to(levels[0].dtype)
