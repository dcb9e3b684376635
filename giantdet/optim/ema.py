"""Exponential moving average of the weights, partitioned over the ranks at every ZeRO stage.

timm's and torch's averaging classes keep a whole copy of the model, which may not fit on a rank at ZeRO-3.
Here each rank averages its share of each trainable parameter in float32: its own partition at ZeRO-3, an even
share at the other stages (`optim/fragments.py`). The averaging is torch's (`torch.optim.swa_utils`); the
decay grows in the first steps as TensorFlow's and timm's does.

In bf16 runs the average is that of the bf16 weights that the model computes with.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import get_ema_multi_avg_fn

from giantdet.distributed import comm
from giantdet.optim.fragments import local_share, share_of


class WeightEma:
    """The moving averages of a model's trainable weights; the model may be that of a DeepSpeed engine."""

    def __init__(self, model: nn.Module, decay: float) -> None:
        self.decay, self.steps = decay, 0
        self.parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
        self.shares = {
            name: local_share(p).to(torch.float32, copy=True) for name, p in self.parameters.items()
        }

    @torch.no_grad()
    def update(self) -> None:
        """Add the current weights to the averages; called after each optimizer step."""
        self.steps += 1
        decay = min(self.decay, (1 + self.steps) / (10 + self.steps))
        now = [local_share(p).float() for p in self.parameters.values()]
        get_ema_multi_avg_fn(decay)(list(self.shares.values()), now, self.steps)

    @contextmanager
    def applied(self) -> Iterator[None]:
        """Put the averaged weights into the model, to evaluate or export it, and restore its own on exit.

        All ranks enter and leave the context together.
        """
        kept = {name: local_share(p).clone() for name, p in self.parameters.items()}
        self._write(self.shares)
        try:
            yield
        finally:
            self._write(kept)

    @torch.no_grad()
    def _write(self, shares: dict[str, Tensor]) -> None:
        for name, p in self.parameters.items():
            with _gathered(p):
                full = torch.zeros(p.numel(), dtype=shares[name].dtype, device=p.device)
                first, last = share_of(p)
                full[first:last] = shares[name].to(p.device)
                p.data.copy_(comm.sum_over_ranks_(full).view_as(p))

    def restart(self) -> None:
        """Start again from the current weights."""
        self.steps = 0
        for name, p in self.parameters.items():
            self.shares[name].copy_(local_share(p))


@contextmanager
def _gathered(p: Any) -> Iterator[None]:
    """Gather a whole parameter at ZeRO-3; values written to it inside are kept in the partitions."""
    with ExitStack() as stack:
        if hasattr(p, "ds_id"):
            import deepspeed

            stack.enter_context(deepspeed.zero.GatheredParameters([p], modifier_rank=0))
        yield
