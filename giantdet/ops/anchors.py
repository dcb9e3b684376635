"""Anchors of the region proposal network (Ren et al. 2015) on the levels of a feature pyramid.

Two conventions, checked against both references: `detectron2` (exact sides, the level's nominal stride)
and `torchvision` (sides rounded to whole pixels, stride = image // grid, so 59 for a P6 of 7 columns on 416
pixels). Order on a level in both: rows, then columns, then ratios.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor


def base_anchors(
    size: float, ratios: Sequence[float], rounded: bool = False, device: torch.device | str | None = None
) -> Tensor:
    """Anchors around (0, 0) with the area of a square of `size` pixels, `[K, 4]` float32 xyxy, K = ratios.

    `ratios` are height / width. `rounded` rounds the coordinates to whole pixels, torchvision's way.
    """
    sides = [(size / math.sqrt(ratio), size * math.sqrt(ratio)) for ratio in ratios]
    coordinates = [c / 2 for w, h in sides for c in (-w, -h, w, h)]
    if rounded:
        coordinates = [float(round(c)) for c in coordinates]
    # `torch.full` rather than `torch.tensor`: no copy from the host, which would synchronise a GPU.
    columns = [torch.full((), c, dtype=torch.float32, device=device) for c in coordinates]
    return torch.stack(columns).view(-1, 4)


def grid_anchors(
    image_size: tuple[int, int],
    grid_sizes: Sequence[tuple[int, int]],
    strides: Sequence[int],
    sizes: Sequence[float],
    ratios: Sequence[float],
    convention: Literal["detectron2", "torchvision"] = "detectron2",
    device: torch.device | str | None = None,
) -> tuple[Tensor, ...]:
    """Anchors of every level: one `[h * w * K, 4]` float32 tensor for each grid (height, width).

    `image_size` is the canvas (height, width) and `strides` the levels' nominal strides, in pixels. float32
    whatever the default dtype is: bf16 cannot hold the position of a pixel beyond 256. Raises ValueError if
    the levels' numbers differ.
    """
    if not len(grid_sizes) == len(strides) == len(sizes):
        raise ValueError(
            f"anchors need one size and one stride for each feature level: "
            f"{len(grid_sizes)} levels, {len(strides)} strides, {len(sizes)} sizes"
        )
    levels = []
    for (rows, columns), stride, size in zip(grid_sizes, strides, sizes, strict=True):
        stride_y, stride_x = stride, stride
        if convention == "torchvision":
            stride_y, stride_x = image_size[0] // rows, image_size[1] // columns
        y = torch.arange(rows, dtype=torch.float32, device=device) * stride_y
        x = torch.arange(columns, dtype=torch.float32, device=device) * stride_x
        y_hw, x_hw = torch.meshgrid(y, x, indexing="ij")
        shifts_hw14 = torch.stack([x_hw, y_hw, x_hw, y_hw], dim=-1)[:, :, None]
        base_K4 = base_anchors(size, ratios, rounded=convention == "torchvision", device=device)
        levels.append((shifts_hw14 + base_K4).view(-1, 4))
    return tuple(levels)
