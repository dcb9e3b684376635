"""Anchors of the region proposal network (Ren et al. 2015) on the levels of a feature pyramid.

Two conventions, checked against both references: detectron2's (exact sides, the level's nominal stride) and
torchvision's (sides rounded to whole pixels, stride = image // grid, so 59 for a P6 of 7 columns on 416
pixels). The order on a level is the same in both: rows, then columns, then sizes, then ratios.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor


def base_anchors(
    sizes: Sequence[float],
    ratios: Sequence[float],
    rounded: bool = False,
    device: torch.device | str | None = None,
    by_ratio: bool = False,
) -> Tensor:
    """Return anchors around (0, 0) with the areas of squares of `sizes` pixels, `[K, 4]` float32 xyxy.

    K = sizes x ratios, in that order, or in the other one with `by_ratio`, as in mmdetection. `ratios`
    are height / width. `rounded` rounds the coordinates to whole pixels, as torchvision does.
    """
    pairs = [(size, ratio) for size in sizes for ratio in ratios]
    if by_ratio:
        pairs = [(size, ratio) for ratio in ratios for size in sizes]
    sides = [(size / math.sqrt(ratio), size * math.sqrt(ratio)) for size, ratio in pairs]
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
    sizes: Sequence[Sequence[float]],
    ratios: Sequence[float],
    rounded: bool = False,
    device: torch.device | str | None = None,
    by_ratio: bool = False,
) -> tuple[Tensor, ...]:
    """Return the anchors of every level: a `[h * w * K, 4]` float32 tensor per grid (height, width).

    `image_size` is the canvas (height, width), `strides` are the levels' nominal strides in pixels, `sizes`
    the sides of each level's anchors; `rounded` and `by_ratio` are those of `base_anchors`. Always float32:
    bf16 cannot hold the position of a pixel beyond 256. Raises ValueError if the numbers of levels differ.
    """
    if not len(grid_sizes) == len(strides) == len(sizes):
        raise ValueError(
            f"anchors need one size and one stride for each feature level: "
            f"{len(grid_sizes)} levels, {len(strides)} strides, {len(sizes)} sizes"
        )
    levels = []
    for (rows, columns), stride, size in zip(grid_sizes, strides, sizes, strict=True):
        stride_y, stride_x = stride, stride
        if rounded:
            stride_y, stride_x = image_size[0] // rows, image_size[1] // columns
        y = torch.arange(rows, dtype=torch.float32, device=device) * stride_y
        x = torch.arange(columns, dtype=torch.float32, device=device) * stride_x
        y_hw, x_hw = torch.meshgrid(y, x, indexing="ij")
        shifts_hw14 = torch.stack([x_hw, y_hw, x_hw, y_hw], dim=-1)[:, :, None]
        base_K4 = base_anchors(size, ratios, rounded=rounded, device=device, by_ratio=by_ratio)
        levels.append((shifts_hw14 + base_K4).view(-1, 4))
    return tuple(levels)


def centred_in_padding(anchors_A4: Tensor, sizes_B2: Tensor, multiple: int = 1) -> Tensor:
    """Return bool `[B, A]`: the anchor's centre is outside the image of (height, width) `sizes_B2`.

    The sides of the image are rounded up to a `multiple` of pixels.
    """
    sizes_B2 = (sizes_B2 / multiple).ceil() * multiple if multiple > 1 else sizes_B2
    center_A2 = (anchors_A4[:, :2] + anchors_A4[:, 2:]) / 2
    return (center_A2 >= sizes_B2.flip(-1)[:, None]).any(-1)


def beyond_border(anchors_A4: Tensor, sizes_B2: Tensor, allowed: float) -> Tensor:
    """Return bool `[B, A]`: the anchor reaches more than `allowed` pixels beyond the image of `sizes_B2`.

    At the bottom and right, exactly that number is too far as well, as in mmdetection.
    """
    before_A = (anchors_A4[:, :2] < -allowed).any(-1)
    after_BA = (anchors_A4[:, 2:] >= sizes_B2.flip(-1)[:, None] + allowed).any(-1)
    return before_A | after_BA
