"""The small steps of a batch norm over several ranks as one CUDA kernel, in Triton.

It replaces some forty PyTorch kernels per layer in `layers/cgbn.py`, whose launches took longer than the
passes over the activations.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK = 128


@triton.jit
def _merge(
    mean_C, invstd_C, count_1, parts, running_mean_C, running_var_C, batches, ranks, channels, eps,
    momentum, MOVES: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Merge the parts of one block of channels, one after the other, in float64."""
    channel = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    exists = channel < channels
    total = tl.zeros([BLOCK], tl.float64)
    mean = tl.zeros([BLOCK], tl.float64)
    squares = tl.zeros([BLOCK], tl.float64)  # squared deviations from the mean, summed
    for rank in range(ranks):
        part = parts + rank * (2 * channels + 1)
        count = tl.load(part + 2 * channels + 0 * channel).to(tl.float64)
        apart = tl.load(part + channel, exists, 0.0).to(tl.float64) - mean
        invstd = tl.load(part + channels + channel, exists, 0.0).to(tl.float64)
        # PyTorch gives a constant channel an invstd of 0 or infinity, by the layout of its input.
        varies = (invstd > 0) & (invstd < float("inf"))
        var = tl.where(varies, 1.0 / tl.where(varies, invstd * invstd, 1.0), 0.0)
        share = count / tl.maximum(total + count, 1.0)
        squares += var * count + apart * apart * total * share
        mean += apart * share
        total += count
    var = squares / tl.maximum(total, 1.0)
    tl.store(mean_C + channel, mean.to(tl.float32), exists)
    tl.store(invstd_C + channel, (1.0 / tl.sqrt(var + eps)).to(tl.float32), exists)
    tl.store(count_1 + 0 * channel, total.to(tl.int32), channel == 0)
    if MOVES:
        moves = exists & (total > 0)
        unbiased = squares / tl.maximum(total - 1.0, 1.0)
        old_mean = tl.load(running_mean_C + channel, moves, 0.0).to(tl.float64)
        old_var = tl.load(running_var_C + channel, moves, 0.0).to(tl.float64)
        tl.store(running_mean_C + channel, (old_mean + momentum * (mean - old_mean)).to(tl.float32), moves)
        tl.store(running_var_C + channel, (old_var + momentum * (unbiased - old_var)).to(tl.float32), moves)
        first = moves & (channel == 0)
        tl.store(batches + 0 * channel, tl.load(batches + 0 * channel, first, 0) + 1, first)


class Moving(NamedTuple):
    """Running statistics, which a forward pass in training moves towards those of its batch."""

    mean_C: Tensor  # float32
    var_C: Tensor  # float32, unbiased
    batches: Tensor  # int64 scalar
    momentum: float


def merge(parts: Tensor, eps: float, moving: Moving | None) -> tuple[Tensor, Tensor, Tensor]:
    """Return mean and 1 / sqrt(variance + eps), `[C]` float32, and count, `[1]` int32; move `moving`.

    `parts` are those of R ranks, `[R, 2 C + 1]` float32: mean, 1 / standard deviation and count (merged as in
    Chan, Golub and LeVeque 1979). A rank may have no values; its mean and deviation are finite, then. Without
    any values the running statistics stay.
    """
    ranks, channels = parts.shape[0], parts.shape[1] // 2
    mean, invstd = parts.new_empty(2, channels).unbind()
    count = torch.empty(1, dtype=torch.int32, device=parts.device)
    running = (mean, mean, count, 0.0) if moving is None else moving  # not read without `MOVES`
    _merge[(triton.cdiv(channels, BLOCK),)](
        mean, invstd, count, parts, *running[:3], ranks, channels, eps, running[3],
        MOVES=moving is not None, BLOCK=BLOCK,
    )  # fmt: skip
    return mean, invstd, count
