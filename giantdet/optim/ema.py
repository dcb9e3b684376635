"""Exponential moving average of the weights, partitioned over the ranks at every ZeRO stage.

A copy of the model, as timm's and torch's averaging classes keep, has no place at ZeRO-3. Here each rank
averages its share of each trainable parameter in float32: its own partition at ZeRO-3, an even share before
(`optim/fragments.py`).
The averaging is torch's (`torch.optim.swa_utils`), the growing decay TensorFlow's and timm's.

In bf16 runs what is averaged are the bf16 weights that the model computes with.
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
    """Averages of a model's trainable weights; the model may be that of a DeepSpeed engine."""

    def __init__(self, model: nn.Module, decay: float) -> None:
        self.decay, self.steps = decay, 0
        self.parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
        self.shares = {
            name: local_share(p).to(torch.float32, copy=True) for name, p in self.parameters.items()
        }

    @torch.no_grad()
    def update(self) -> None:
        """After an optimizer step."""
        self.steps += 1
        decay = min(self.decay, (1 + self.steps) / (10 + self.steps))
        now = [local_share(p).float() for p in self.parameters.values()]
        get_ema_multi_avg_fn(decay)(list(self.shares.values()), now, self.steps)

    @contextmanager
    def applied(self) -> Iterator[None]:
        """The model with the averaged weights, to evaluate or to export; afterwards it is what it was.

        All ranks enter and leave it together.
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
    """The whole parameter; what is written to it stays, in ZeRO-3's partitions too."""
    with ExitStack() as stack:
        if hasattr(p, "ds_id"):
            import deepspeed

            stack.enter_context(deepspeed.zero.GatheredParameters([p], modifier_rank=0))
        yield
