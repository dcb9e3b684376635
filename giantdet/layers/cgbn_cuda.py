"""CGBN's passes on a GPU: PyTorch's kernels of SyncBatchNorm, and one of giantdet's own between them.

The arithmetic is that of `layers/cgbn.py`, with a third of the kernels: their launches, not the passes over
the activations, are what batch norms cost on a fast GPU.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from giantdet.distributed import comm
from giantdet.ops.statistics import memory_format, refuse_second_derivatives
from giantdet.ops.statistics_triton import Moving, merge


class NormaliseOnGpu(torch.autograd.Function):
    """Normalise `[B, C, ...]`, float32 or 16 bits, over the ranks of a group; move the running statistics.

    B may be 0. x is contiguous or channels last; weight and bias, `[C]` float32 or None, get this rank's
    share of their gradient.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        eps: float,
        group: comm.Group | None,
        moving: Moving | None,
    ) -> Tensor:
        if x.numel():
            own = list(torch.batch_norm_stats(x, 0.0))
            own.append(own[0].new_full((1,), x.numel() // x.shape[1]))
        else:
            own = [torch.zeros(2 * x.shape[1] + 1, device=x.device)]
        mean, invstd, count = merge(comm.all_gather(torch.cat(own), group), eps, moving)
        ctx.save_for_backward(x, weight, mean, invstd, count)
        ctx.group = group
        if not x.numel():
            return torch.empty_like(x)
        return torch.batch_norm_elemt(x, weight, bias, mean, invstd, eps)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        refuse_second_derivatives()
        x, weight, mean, invstd, count = ctx.saved_tensors
        dy = dy.contiguous(memory_format=memory_format(x))
        dx = dweight = dbias = None
        if x.numel():
            trained = weight is not None
            sum_dy, sum_dy_xmu, dweight, dbias = torch.batch_norm_backward_reduce(
                dy, x, mean, invstd, weight, True, trained, trained
            )
        else:
            sum_dy, sum_dy_xmu = torch.zeros(2, len(mean), device=x.device).unbind()
            dweight, dbias = (sum_dy, sum_dy_xmu) if weight is not None else (None, None)
        if ctx.needs_input_grad[0]:
            sums = comm.all_reduce(torch.cat([sum_dy, sum_dy_xmu]), ctx.group)
            dx = torch.empty_like(x)
            if x.numel():
                sum_dy, sum_dy_xmu = sums.split(len(mean))
                dx = torch.batch_norm_backward_elemt(dy, x, mean, invstd, weight, sum_dy, sum_dy_xmu, count)
        return dx, dweight, dbias, None, None, None
