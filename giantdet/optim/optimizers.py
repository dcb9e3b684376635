"""Optimizers by the name in the JSON's `optimizer` block.

DeepSpeed builds Adam, AdamW and SGD (torch.optim's). Lion, LAMB, LARS and Muon are timm's:
DeepSpeed's own Lion and LAMB are CUDA kernels, and its Muon fails at every stage (0.19.8).

LAMB and LARS scale a step by the norm of a weight as a whole, Muon makes its momentum orthogonal. From ZeRO-1
on an optimizer sees flat pieces of many weights joined, so these three need stage 0, where it sees each
weight; config/resolve.py refuses them elsewhere.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch.optim import Optimizer

from giantdet.config.optimizers import OptimizerConfig


def optimizer_factory(config: OptimizerConfig) -> Callable[[list[dict[str, Any]]], Optimizer] | None:
    """What `deepspeed.initialize(optimizer=...)` takes for timm's; None for those that DeepSpeed builds."""
    if not config.FROM_TIMM:
        return None
    from timm import optim

    build, params = getattr(optim, config.name), config.model_dump(exclude_unset=True)
    if config.name == "Lamb":
        params["max_grad_norm"] = None  # gradient_clipping is DeepSpeed's business
    return lambda groups: build(groups, **params)
