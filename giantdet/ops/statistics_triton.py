"""The small steps of a batch norm over several ranks as two CUDA kernels, in Triton.

They replace some forty PyTorch kernels per layer in `layers/cgbn.py`, whose launches took longer than the
passes over the activations.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

BLOCK = 128


@triton.jit
def _merge(mean_C, var_C, invstd_C, count_1, parts, ranks, channels, eps, BLOCK: tl.constexpr):
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
    tl.store(var_C + channel, var.to(tl.float32), exists)
    tl.store(invstd_C + channel, (1.0 / tl.sqrt(var + eps)).to(tl.float32), exists)
    tl.store(count_1 + 0 * channel, total.to(tl.float32), channel == 0)


@triton.jit
def _update(
    running_mean_C, running_var_C, batches, mean_C, var_C, count_1, channels, momentum, BLOCK: tl.constexpr
):
    channel = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    count = tl.load(count_1 + 0 * channel)
    moves = (channel < channels) & (count > 0)
    old_mean = tl.load(running_mean_C + channel, moves, 0.0)
    old_var = tl.load(running_var_C + channel, moves, 0.0)
    mean = tl.load(mean_C + channel, moves, 0.0)
    unbiased = tl.load(var_C + channel, moves, 0.0) * (count / tl.maximum(count - 1.0, 1.0))
    tl.store(running_mean_C + channel, old_mean + momentum * (mean - old_mean), moves)
    tl.store(running_var_C + channel, old_var + momentum * (unbiased - old_var), moves)
    first = moves & (channel == 0)
    tl.store(batches + 0 * channel, tl.load(batches + 0 * channel, first, 0) + 1, first)


def merge(parts: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return mean, biased variance and 1 / sqrt(variance + eps), `[C]`, and count `[1]`, all float32.

    `parts` are those of R ranks, `[R, 2 C + 1]` float32: mean, 1 / standard deviation and count (Chan, Golub
    and LeVeque 1979). A rank may have no values; its mean and deviation must be finite, then.
    """
    ranks, channels = parts.shape[0], parts.shape[1] // 2
    merged = parts.new_empty(3 * channels + 1)
    mean, var, invstd, count = merged.split([channels, channels, channels, 1])
    grid = (triton.cdiv(channels, BLOCK),)
    _merge[grid](mean, var, invstd, count, parts, ranks, channels, eps, BLOCK=BLOCK)
    return mean, var, invstd, count


def update(
    running_mean: Tensor, running_var: Tensor, batches: Tensor, mean: Tensor, var: Tensor, count: Tensor,
    momentum: float,
) -> None:  # fmt: skip
    """Move the running statistics towards those of a batch, and count it; without values nothing changes."""
    channels = len(mean)
    grid = (triton.cdiv(channels, BLOCK),)
    _update[grid](running_mean, running_var, batches, mean, var, count, channels, momentum, BLOCK=BLOCK)
