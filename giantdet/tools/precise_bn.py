"""Precise BN: re-estimate the running statistics over many batches, with fixed weights.

The running statistics after training are averages over its last steps, in which the weights still changed.
Here every batch norm gets the mean and variance of its input over N batches, as if they were one batch (Wu,
Johnson: Rethinking "Batch" in BatchNorm, 2021, section 3). Batches are as large as those that training
normalised together.
"""

from __future__ import annotations

from collections.abc import Iterable
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn

from giantdet.config.resolved import ResolvedRun
from giantdet.distributed import comm
from giantdet.layers.cgbn import bn_ranks
from giantdet.layers.norm import moving_norms
from giantdet.ops.statistics import local_statistics, merge_statistics
from giantdet.structures import Batch


@torch.no_grad()
def reestimate(model: nn.Module, batches: Iterable[Batch], number: int, device: Any) -> int:
    """Replace the running statistics of every BatchNorm by those of `number` training batches per rank.

    The statistics of all ranks are merged, weighted by count. All ranks call this. The model stays in
    training mode. Returns the number of batch norms, 0 where all are frozen or have no running statistics.
    """
    norms = moving_norms(model)
    if not norms:
        return 0
    found: dict[nn.Module, tuple[Tensor, ...]] = {}

    def collect(norm: nn.Module, inputs: tuple[Tensor]) -> None:
        new = local_statistics(inputs[0])
        if norm in found:
            new = merge_statistics(*map(torch.stack, zip(found[norm], new, strict=True)))
        found[norm] = new

    hooks = [norm.register_forward_pre_hook(collect) for norm in norms]
    model.train()
    for batch in islice(batches, number):
        model(batch.to(device))
    for hook in hooks:
        hook.remove()
    world = comm.subgroup(comm.world_size())
    for norm in norms:
        assert norm.running_mean is not None and norm.running_var is not None
        mean, var, count = merge_statistics(*(comm.all_gather(part, world) for part in found[norm]))
        norm.running_mean.copy_(mean)
        norm.running_var.copy_(var * count / (count - 1).clamp(min=1))
    return len(norms)


def bn_images(run: ResolvedRun) -> int:
    """Return how many images a resolved run normalises together: the largest number in its `norm` block."""
    batch, micro, accumulation = run.batch
    world = batch // (micro * accumulation)
    parts = run.giantdet.norm.parts().values()
    ranks = [bn_ranks(part.bn_size, micro, world) for part in parts if part.type == "cgbn"]
    return micro * max(ranks, default=1)
