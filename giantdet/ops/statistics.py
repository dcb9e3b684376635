"""Mean and variance of the channels of `[B, C, ...]` activations, their merging over parts of a batch, and
what else the batch norms over several ranks share.
"""

from __future__ import annotations

import torch
from torch import Tensor


def statistics_type(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def local_statistics(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return mean `[C]`, biased variance `[C]` and count `[1]` of each channel; zeros for an empty input."""
    zeros = x.new_zeros(x.shape[1], dtype=statistics_type(x))
    count = zeros.new_full((1,), x.numel() // x.shape[1])
    if x.numel() == 0:
        return zeros, zeros.clone(), count
    # Given running statistics to write to, the kernel computes in their type and not in bf16.
    mean, var = torch.batch_norm_update_stats(x, zeros, zeros.clone(), 0.0)
    return mean, var, count


def merge_statistics(means: Tensor, variances: Tensor, counts: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Merge the statistics of R parts, `[R, C]`, `[R, C]` and `[R, 1]`, to `[C]`, `[C]` and `[1]` in float64.

    Weighted by count and computed from deviations, not from sums of squares (Chan, Golub, LeVeque 1979),
    which is stable for any mean. Variances are biased. Parts may be empty.
    """
    means, variances, counts = means.double(), variances.double(), counts.double()
    total = counts.sum(0)
    share = counts / total.clamp(min=1)
    mean = (share * means).sum(0)
    return mean, (share * (variances + (means - mean).square())).sum(0), total


def refuse_second_derivatives() -> None:
    """Raise RuntimeError in a backward pass with `create_graph`.

    Not `once_differentiable`: autograd skips its error where the gradient has another path, and the result is
    wrong.
    """
    if torch.is_grad_enabled() and not torch.compiler.is_compiling():
        raise RuntimeError(
            "a batch norm over several ranks has no gradients of gradients: call backward() or grad() "
            "without create_graph, or use local or frozen batch norms"
        )


def memory_format(x: Tensor) -> torch.memory_format:
    """Return the layout that batch-norm kernels take x in."""
    for ndim, layout in ((4, torch.channels_last), (5, torch.channels_last_3d)):
        if x.dim() == ndim and x.is_contiguous(memory_format=layout):
            return layout
    return torch.contiguous_format
