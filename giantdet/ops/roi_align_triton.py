"""RoIAlign of a whole pyramid as one CUDA kernel forward and one backward, in Triton.

Bilinear interpolation reads, per point, four cells of all channels. With channels last in memory these are
four contiguous vectors, and a warp reads one with 16 bytes per thread; torchvision's kernel reads contiguous
maps, whose neighbouring channels are a map apart. Each RoI reads its own level, so that there is one launch
for all levels, and maps are converted to float32 in registers, not in memory.

Backward, RoIs that overlap add to the same cells. Without atomics each cell would have to search for its
RoIs, so the sums over RoIs use them; the sums within a RoI do not. Bilinear weights are separable: along each
axis, a point at p has the weight max(0, 1 - |c - p|) for the cell at c. So each cell of a RoI gathers its sum
over all points and adds it once: 400 additions for a RoI of 20 x 20 cells, where one for each point and
corner (torchvision's kernel) makes 784 for 7 x 7 bins of 2 x 2 points and 3,136 for 14 x 14. The sums over
RoIs are in float32; their order, and with it their last bits, change from run to run.

Both operators are opaque to `torch.compile`, allocate with `torch.empty` and `torch.zeros` only and never
wait for the device, so a CUDA graph can capture them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

# Tile sizes, for 7 x 7 and 14 x 14 bins of 256 channels.
FORWARD = {"BLOCK_BINS": 4, "num_warps": 2}
BACKWARD = {"BLOCK_CELLS": 8, "SPLIT": 4, "num_warps": 1}
MAX_BLOCK_CHANNELS = 256


@triton.jit
def _of_level(level, values):
    """Return `values[level]` of a tuple."""
    value = values[0]
    for i in tl.static_range(1, len(values)):
        value = tl.where(level == i, values[i], value)
    return value


@triton.jit
def _bins(start, end, scale, POOLED: tl.constexpr, SAMPLING: tl.constexpr, ALIGNED: tl.constexpr):
    """Return a box along one axis: where it starts, the length of a bin (cells) and its number of points."""
    start = start * scale
    end = end * scale
    if ALIGNED:
        start -= 0.5
        end -= 0.5
    length = end - start
    # NaN and Inf read nothing, as a box far outside of the map.
    finite = (length >= 0) & (length < float("inf"))
    start = tl.where(finite, start, -8.0)
    length = tl.where(finite, length, 0.0)
    if not ALIGNED:
        length = tl.maximum(length, 1.0)
    size = tl.div_rn(length, POOLED * 1.0)
    # The limit keeps the product of two numbers of points within int32.
    points = SAMPLING if SAMPLING > 0 else tl.minimum(tl.ceil(size), 32768.0).to(tl.int32)
    return start, size, points


@triton.jit
def _position(start, size, points, bin, point):
    """Return where a point lies along an axis, in cells."""
    return start + bin * size + (point + 0.5) * size / points


@triton.jit
def _corners(at, cells):
    """Return the two cells that a point reads along an axis, the second's weight, and if it reads any."""
    inside = (at >= -1.0) & (at <= cells)
    at = tl.where(inside, at, 0.0)
    at = tl.minimum(tl.maximum(at, 0.0), cells - 1.0)
    low = at.to(tl.int32)
    return low, tl.minimum(low + 1, cells - 1), at - low, inside


@triton.jit
def _forward(
    pooled, maps, heights, widths, scales, boxes_K4, batch_K, level_K,
    CHANNELS: tl.constexpr, POOLED: tl.constexpr, SAMPLING: tl.constexpr, ALIGNED: tl.constexpr,
    BLOCK_BINS: tl.constexpr, BLOCK_CHANNELS: tl.constexpr,
):  # fmt: skip
    """Pool `BLOCK_BINS` bins of one RoI, `BLOCK_CHANNELS` channels of each."""
    blocks: tl.constexpr = (POOLED * POOLED + BLOCK_BINS - 1) // BLOCK_BINS
    roi = tl.program_id(0) // blocks
    bins = tl.program_id(0) % blocks * BLOCK_BINS + tl.arange(0, BLOCK_BINS)
    channels = tl.program_id(1) * BLOCK_CHANNELS + tl.arange(0, BLOCK_CHANNELS)[None, :]
    row = bins // POOLED
    column = bins % POOLED
    exists = (bins < POOLED * POOLED)[:, None] & (channels < CHANNELS)

    level = tl.load(level_K + roi)
    height = _of_level(level, heights)
    width = _of_level(level, widths)
    scale = _of_level(level, scales)
    box = boxes_K4 + roi * 4
    x0, size_x, points_x = _bins(tl.load(box), tl.load(box + 2), scale, POOLED, SAMPLING, ALIGNED)
    y0, size_y, points_y = _bins(tl.load(box + 1), tl.load(box + 3), scale, POOLED, SAMPLING, ALIGNED)
    # A batch of maps may exceed int32, one map does not.
    image = _of_level(level, maps) + tl.load(batch_K + roi).to(tl.int64) * height * width * CHANNELS

    total = tl.zeros([BLOCK_BINS, BLOCK_CHANNELS], tl.float32)
    for point in tl.range(0, points_y * points_x, loop_unroll_factor=4):
        y = _position(y0, size_y, points_y, row, point // points_x)
        x = _position(x0, size_x, points_x, column, point % points_x)
        y_low, y_high, y_share, y_inside = _corners(y, height)
        x_low, x_high, x_share, x_inside = _corners(x, width)
        read = exists & (y_inside & x_inside)[:, None]
        low = image + (y_low * width * CHANNELS)[:, None] + channels
        high = image + (y_high * width * CHANNELS)[:, None] + channels
        left = (x_low * CHANNELS)[:, None]
        right = (x_high * CHANNELS)[:, None]
        total += ((1 - y_share) * (1 - x_share))[:, None] * tl.load(low + left, read, 0.0).to(tl.float32)
        total += ((1 - y_share) * x_share)[:, None] * tl.load(low + right, read, 0.0).to(tl.float32)
        total += (y_share * (1 - x_share))[:, None] * tl.load(high + left, read, 0.0).to(tl.float32)
        total += (y_share * x_share)[:, None] * tl.load(high + right, read, 0.0).to(tl.float32)
    total /= tl.maximum(points_y * points_x, 1)
    to = pooled + roi.to(tl.int64) * (POOLED * POOLED * CHANNELS) + bins[:, None] * CHANNELS + channels
    tl.store(to, total.to(pooled.dtype.element_ty), exists)


@triton.jit
def _span(start, size, points, cells, POOLED: tl.constexpr):
    """Return the first and the last cell that a box reads along an axis."""
    first = tl.floor(_position(start, size, tl.maximum(points, 1), 0, 0))
    last = tl.floor(_position(start, size, tl.maximum(points, 1), POOLED - 1, points - 1)) + 1
    first = tl.minimum(tl.maximum(first, 0.0), cells - 1.0)
    last = tl.minimum(tl.maximum(last, 0.0), cells - 1.0)
    return first.to(tl.int32), last.to(tl.int32)


@triton.jit
def _bins_at(low, high, start, size, POOLED: tl.constexpr):
    """Return the range of bins that may have points within one cell of the cells `low` to `high`.

    Points outside of the map count for its outermost cells, but are at most one cell away, too.
    """
    # Bins so small that rounding matters are all taken.
    tiny = size < 0.01
    divisor = tl.maximum(size, 0.01)
    first = tl.where(tiny, 0.0, tl.floor((low - 1.0 - start) / divisor))
    last = tl.where(tiny, POOLED - 1.0, tl.floor((high + 1.0 - start) / divisor))
    first = tl.minimum(tl.maximum(first, 0.0), POOLED)
    last = tl.minimum(tl.maximum(last, -1.0), POOLED - 1.0)
    return first.to(tl.int32), last.to(tl.int32) + 1


@triton.jit
def _weight(cell, start, size, points, cells, bin):
    """Return the sum of the weights of a bin's points for a cell, along one axis."""
    weight = cell * 0.0
    for point in range(points):
        at = _position(start, size, points, bin, point)
        inside = (at >= -1.0) & (at <= cells)
        at = tl.minimum(tl.maximum(at, 0.0), cells - 1.0)
        weight += tl.where(inside, tl.maximum(1.0 - tl.abs(cell - at), 0.0), 0.0)
    return weight


@triton.jit
def _backward(
    grad_pooled, grads, heights, widths, scales, boxes_K4, batch_K, level_K,
    CHANNELS: tl.constexpr, POOLED: tl.constexpr, SAMPLING: tl.constexpr, ALIGNED: tl.constexpr,
    SPLIT: tl.constexpr, BLOCK_CELLS: tl.constexpr, BLOCK_CHANNELS: tl.constexpr,
):  # fmt: skip
    """Add the gradients of one RoI to each `SPLIT`-th row of its cells, `BLOCK_CELLS` at a time."""
    roi = tl.program_id(0) // SPLIT
    channels = tl.program_id(1) * BLOCK_CHANNELS + tl.arange(0, BLOCK_CHANNELS)

    level = tl.load(level_K + roi)
    height = _of_level(level, heights)
    width = _of_level(level, widths)
    scale = _of_level(level, scales)
    box = boxes_K4 + roi * 4
    x0, size_x, points_x = _bins(tl.load(box), tl.load(box + 2), scale, POOLED, SAMPLING, ALIGNED)
    y0, size_y, points_y = _bins(tl.load(box + 1), tl.load(box + 3), scale, POOLED, SAMPLING, ALIGNED)
    image = _of_level(level, grads) + tl.load(batch_K + roi).to(tl.int64) * height * width * CHANNELS
    grad_pooled += roi.to(tl.int64) * (POOLED * POOLED * CHANNELS)
    share = 1.0 / tl.maximum(points_y * points_x, 1)

    first_y, last_y = _span(y0, size_y, points_y, height, POOLED)
    first_x, last_x = _span(x0, size_x, points_x, width, POOLED)
    for y in range(first_y + tl.program_id(0) % SPLIT, last_y + 1, SPLIT):
        first_row, end_row = _bins_at(y, y, y0, size_y, POOLED)
        for x in range(first_x, last_x + 1, BLOCK_CELLS):
            cells = x + tl.arange(0, BLOCK_CELLS)
            first_column, end_column = _bins_at(x, x + BLOCK_CELLS - 1, x0, size_x, POOLED)
            total = tl.zeros([BLOCK_CELLS, BLOCK_CHANNELS], tl.float32)
            for column in range(first_column, end_column):
                over_rows = tl.zeros([BLOCK_CHANNELS], tl.float32)
                for row in range(first_row, end_row):
                    grad = tl.load(
                        grad_pooled + (row * POOLED + column) * CHANNELS + channels, channels < CHANNELS, 0.0
                    )
                    weight = _weight(y * 1.0, y0, size_y, points_y, height, row) * share
                    over_rows += weight * grad.to(tl.float32)
                weights = _weight(cells.to(tl.float32), x0, size_x, points_x, width, column)
                total += weights[:, None] * over_rows[None, :]
            to = image + ((y * width + cells) * CHANNELS)[:, None] + channels[None, :]
            exists = (cells <= last_x)[:, None] & (channels < CHANNELS)[None, :]
            tl.atomic_add(to, total, exists, sem="relaxed")


def _launch(
    kernel: Any, rois: Tensor, programs: int, tensors: Sequence[Tensor], boxes_K4: Tensor, batch_K: Tensor,
    level_K: Tensor, strides: Sequence[float], sampling_ratio: int, aligned: bool, options: dict[str, int],
) -> None:  # fmt: skip
    """Run a kernel with `programs` programs per RoI. `tensors` are the levels, channels last."""
    channels = rois.shape[1]
    block = min(triton.next_power_of_2(channels), MAX_BLOCK_CHANNELS)
    if rois.numel():
        kernel[(len(rois) * programs, triton.cdiv(channels, block))](
            rois,
            tuple(tensors),
            tuple(t.shape[2] for t in tensors),
            tuple(t.shape[3] for t in tensors),
            tuple(1.0 / stride for stride in strides),
            boxes_K4,
            batch_K,
            level_K,
            CHANNELS=channels,
            POOLED=rois.shape[2],
            SAMPLING=sampling_ratio,
            ALIGNED=aligned,
            BLOCK_CHANNELS=block,
            **options,
        )


@torch.library.custom_op("giantdet::roi_align_pyramid", mutates_args=())
def pool(
    levels: Sequence[Tensor], boxes_K4: Tensor, batch_K: Tensor, level_K: Tensor, strides: Sequence[float],
    output_size: int, sampling_ratio: int, aligned: bool,
) -> Tensor:  # fmt: skip
    """Pool each box from its level: `[K, C, o, o]` in the dtype of the levels, channels last in memory.

    `levels` are `[B, C, h, w]` of one dtype (copied unless channels last), `boxes_K4` float32 pixels,
    `batch_K` and `level_K` int64, `strides` pixels per cell. `sampling_ratio` 0 is adaptive.
    """
    levels = [level.contiguous(memory_format=torch.channels_last) for level in levels]
    pooled = _like_pooled(levels, boxes_K4, output_size)
    blocks = triton.cdiv(output_size**2, FORWARD["BLOCK_BINS"])
    _launch(
        _forward, pooled, blocks, levels, boxes_K4.contiguous(), batch_K, level_K, strides, sampling_ratio,
        aligned, FORWARD,
    )  # fmt: skip
    return pooled


def _like_pooled(levels: Sequence[Tensor], boxes_K4: Tensor, output_size: int) -> Tensor:
    shape = (boxes_K4.shape[0], levels[0].shape[1], output_size, output_size)
    return torch.empty(
        shape, dtype=levels[0].dtype, device=levels[0].device, memory_format=torch.channels_last
    )


@pool.register_fake
def _(
    levels: Sequence[Tensor], boxes_K4: Tensor, batch_K: Tensor, level_K: Tensor, strides: Sequence[float],
    output_size: int, sampling_ratio: int, aligned: bool,
) -> Tensor:  # fmt: skip
    return _like_pooled(levels, boxes_K4, output_size)


@torch.library.custom_op("giantdet::roi_align_pyramid_backward", mutates_args=())
def pool_backward(
    grad_pooled: Tensor, boxes_K4: Tensor, batch_K: Tensor, level_K: Tensor, strides: Sequence[float],
    images: int, heights: Sequence[int], widths: Sequence[int], sampling_ratio: int, aligned: bool,
) -> list[Tensor]:  # fmt: skip
    """Return the gradients of the levels, `[images, C, h, w]` in the dtype of `grad_pooled`."""
    grad_pooled = grad_pooled.contiguous(memory_format=torch.channels_last)
    grads = [
        torch.zeros(
            (images, height, width, grad_pooled.shape[1]), dtype=torch.float32, device=grad_pooled.device
        ).permute(0, 3, 1, 2)
        for height, width in zip(heights, widths, strict=True)
    ]
    _launch(
        _backward, grad_pooled, BACKWARD["SPLIT"], grads, boxes_K4.contiguous(), batch_K, level_K, strides,
        sampling_ratio, aligned, BACKWARD,
    )  # fmt: skip
    return [grad.to(grad_pooled.dtype) for grad in grads]


@pool_backward.register_fake
def _(
    grad_pooled: Tensor, boxes_K4: Tensor, batch_K: Tensor, level_K: Tensor, strides: Sequence[float],
    images: int, heights: Sequence[int], widths: Sequence[int], sampling_ratio: int, aligned: bool,
) -> list[Tensor]:  # fmt: skip
    return [
        grad_pooled.new_empty((images, height, width, grad_pooled.shape[1])).permute(0, 3, 1, 2)
        for height, width in zip(heights, widths, strict=True)
    ]


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    levels, boxes_K4, batch_K, level_K, strides, _, *options = inputs
    ctx.save_for_backward(boxes_K4, batch_K, level_K)
    heights, widths = [level.shape[2] for level in levels], [level.shape[3] for level in levels]
    ctx.arguments = strides, levels[0].shape[0], heights, widths, *options


def _differentiate(ctx: Any, grad_pooled: Tensor) -> tuple[Any, ...]:
    grads = pool_backward(grad_pooled, *ctx.saved_tensors, *ctx.arguments)
    return grads, *[None] * 7


pool.register_autograd(_differentiate, setup_context=_setup_context)
