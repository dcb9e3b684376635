"""Greedy NMS of many groups as two CUDA kernels, in Triton.

The first packs into bits, for each box, which later boxes it overlaps: `blocked_GKW`, 32 boxes per int32. For
16 images of 2,000 proposals that is 8 MB, where the fixed point of `ops/nms.py` writes a dozen float32
tensors of 256 MB for the IoU and reads a bool one of 64 MB in each of 16 rounds. The second takes one program
per group, which visits the boxes best first, 32 at a time, so that it is greedy NMS itself, exact for chains
of any length.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

WORD = 32  # boxes per int32
BLOCK_ROWS = 64


@triton.jit
def _corner(boxes, index, exists, COLUMN: tl.constexpr):
    return tl.load(boxes + index * 4 + COLUMN, exists, 0.0)


@triton.jit
def _longest(low, high):
    """Return the length of an interval, 0 for a negative one; NaN stays."""
    return tl.maximum(high - low, 0.0, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def _pack_overlaps(
    blocked_GKW, boxes_GK4, boxes_per_group, words, threshold, WORD: tl.constexpr, BLOCK_ROWS: tl.constexpr
):
    """Set the bits of one word of `BLOCK_ROWS` boxes. The arithmetic is that of `pairwise_iou`."""
    group = tl.program_id(1).to(tl.int64)
    word = tl.program_id(0) % words
    first_row = tl.program_id(0) // words * BLOCK_ROWS
    # Words of earlier boxes only are neither written here nor read later.
    if (word + 1) * WORD > first_row:
        boxes = boxes_GK4 + group * boxes_per_group * 4
        rows = (first_row + tl.arange(0, BLOCK_ROWS))[:, None]
        bits = tl.arange(0, WORD)[None, :]
        columns = word * WORD + bits
        is_row = rows < boxes_per_group
        is_column = columns < boxes_per_group
        ax0, bx0 = _corner(boxes, rows, is_row, 0), _corner(boxes, columns, is_column, 0)
        ay0, by0 = _corner(boxes, rows, is_row, 1), _corner(boxes, columns, is_column, 1)
        ax1, bx1 = _corner(boxes, rows, is_row, 2), _corner(boxes, columns, is_column, 2)
        ay1, by1 = _corner(boxes, rows, is_row, 3), _corner(boxes, columns, is_column, 3)
        left = tl.maximum(ax0, bx0, propagate_nan=tl.PropagateNan.ALL)
        right = tl.minimum(ax1, bx1, propagate_nan=tl.PropagateNan.ALL)
        top = tl.maximum(ay0, by0, propagate_nan=tl.PropagateNan.ALL)
        bottom = tl.minimum(ay1, by1, propagate_nan=tl.PropagateNan.ALL)
        overlap = _longest(left, right) * _longest(top, bottom)
        area_a = _longest(ax0, ax1) * _longest(ay0, ay1)
        area_b = _longest(bx0, bx1) * _longest(by0, by1)
        union = tl.maximum(area_a + area_b - overlap, 1e-12, propagate_nan=tl.PropagateNan.ALL)
        is_blocked = (tl.div_rn(overlap, union) > threshold) & (rows < columns) & is_column
        packed = tl.sum(is_blocked.to(tl.int32) << bits, axis=1)
        index = group * boxes_per_group + first_row + tl.arange(0, BLOCK_ROWS)
        exists = first_row + tl.arange(0, BLOCK_ROWS) < boxes_per_group
        tl.store(blocked_GKW + index * words + word, packed, exists)


@triton.jit
def _either(a, b):
    return a | b


@triton.jit
def _scan(
    keep_GK, blocked_GKW, valid_GK, boxes_per_group, words, WORD: tl.constexpr, BLOCK_WORDS: tl.constexpr
):
    """Decide the boxes of one group, best first, a word at a time."""
    group = tl.program_id(0).to(tl.int64)
    keep_GK += group * boxes_per_group
    valid_GK += group * boxes_per_group
    blocked_GKW += group * boxes_per_group * words
    bits = tl.arange(0, WORD)
    columns = tl.arange(0, BLOCK_WORDS)
    removed = tl.zeros([BLOCK_WORDS], tl.int32)
    for word in range(words):
        boxes = word * WORD + bits
        exists = boxes < boxes_per_group
        # Of all 32 boxes, kept or not: so the reads do not wait for the decisions.
        later = exists[:, None] & ((columns > word) & (columns < words))[None, :]
        rows = tl.load(blocked_GKW + boxes[:, None] * words + columns[None, :], later, 0)
        valid = tl.load(valid_GK + boxes, exists, 0).to(tl.int32)
        alive = tl.sum(valid << bits) & ~tl.sum(tl.where(columns == word, removed, 0))
        for bit in tl.static_range(WORD):
            box = word * WORD + bit
            blocks = tl.load(blocked_GKW + box * words + word, box < boxes_per_group, 0)
            alive &= ~tl.where(((alive >> bit) & 1) != 0, blocks, 0)
        kept = ((alive >> bits) & 1) != 0
        tl.store(keep_GK + boxes, kept, exists)
        removed |= tl.reduce(tl.where(kept[:, None], rows, 0), 0, _either)


def keep_sorted(boxes_GK4: Tensor, valid_GK: Tensor, iou_threshold: float) -> Tensor:
    """Return which of G groups of K boxes greedy NMS keeps, `[G, K]` bool.

    Boxes are contiguous float32, best first; invalid ones are not kept and remove none.
    """
    groups, boxes = valid_GK.shape
    keep_GK = torch.empty_like(valid_GK)
    if valid_GK.numel():
        words = triton.cdiv(boxes, WORD)
        blocked_GKW = torch.empty((groups, boxes, words), dtype=torch.int32, device=boxes_GK4.device)
        # A fused multiply-add would round the union differently from PyTorch.
        _pack_overlaps[(triton.cdiv(boxes, BLOCK_ROWS) * words, groups)](
            blocked_GKW, boxes_GK4, boxes, words, iou_threshold, WORD=WORD, BLOCK_ROWS=BLOCK_ROWS,
            enable_fp_fusion=False,
        )  # fmt: skip
        block = triton.next_power_of_2(words)
        _scan[(groups,)](
            keep_GK, blocked_GKW, valid_GK, boxes, words, WORD=WORD, BLOCK_WORDS=block,
            num_warps=min(max(block // 64, 1), 8),
        )  # fmt: skip
    return keep_GK
