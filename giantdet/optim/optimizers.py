"""Build the optimizer that the JSON's `optimizer` block names.

DeepSpeed builds Adam, AdamW and SGD (torch.optim's). Lion, LAMB, LARS and Muon are timm's:
DeepSpeed's own Lion and LAMB are CUDA kernels, and its Muon fails at every stage (0.19.8).

LAMB and LARS scale a step by the norm of a whole weight, and Muon orthogonalises its momentum. At ZeRO-1 to 3
an optimizer sees flat partitions of many weights joined together. So these three need stage 0, where it sees
each weight; config/resolve.py refuses them at other stages.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch.optim import Optimizer

from giantdet.config.optimizers import OptimizerConfig


def optimizer_factory(config: OptimizerConfig) -> Callable[[list[dict[str, Any]]], Optimizer] | None:
    """Return a function from parameter groups to one of timm's optimizers; None if DeepSpeed builds it.

    `deepspeed.initialize(optimizer=...)` accepts the function.
    """
    if not config.FROM_TIMM:
        return None
    from timm import optim

    build, params = getattr(optim, config.name), config.model_dump(exclude_unset=True)
    if config.name == "Lamb":
        params["max_grad_norm"] = None  # DeepSpeed clips gradients, as gradient_clipping says
    return lambda groups: build(groups, **params)
