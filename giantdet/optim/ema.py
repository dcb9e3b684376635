"""Exponential moving average of the weights, partitioned over the ranks at every ZeRO stage.

A copy of the model, as timm's and torch's averaging classes keep, has no place at ZeRO-3. Here each rank
averages its share of each trainable parameter in float32: its own partition at ZeRO-3, an even share before.
The averaging is torch's (`torch.optim.swa_utils`), the growing decay TensorFlow's and timm's.

In bf16 runs what is averaged are the bf16 weights that the model computes with.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.optim.swa_utils import get_ema_multi_avg_fn

from giantdet.distributed import comm
from giantdet.optim.moments import even_share

logger = logging.getLogger("giantdet")

_FILE = "ema_rank{}.safetensors"


class WeightEma:
    """Averages of a model's trainable weights; the model may be that of a DeepSpeed engine."""

    def __init__(self, model: nn.Module, decay: float) -> None:
        self.decay, self.steps = decay, 0
        self.parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
        self.shares = {name: _share(p).to(torch.float32, copy=True) for name, p in self.parameters.items()}

    @torch.no_grad()
    def update(self) -> None:
        """After an optimizer step."""
        self.steps += 1
        decay = min(self.decay, (1 + self.steps) / (10 + self.steps))
        now = [_share(p).float() for p in self.parameters.values()]
        get_ema_multi_avg_fn(decay)(list(self.shares.values()), now, self.steps)

    @contextmanager
    def applied(self) -> Iterator[None]:
        """The model with the averaged weights, to evaluate or to export; afterwards it is what it was.

        All ranks enter and leave it together.
        """
        kept = {name: _share(p).clone() for name, p in self.parameters.items()}
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
                first, last = _bounds(p)
                full[first:last] = shares[name].to(p.device)
                p.data.copy_(comm.sum_over_ranks_(full).view_as(p))

    def save(self, folder: Path) -> None:
        """Write this rank's shares into a checkpoint's folder. All ranks call it."""
        tensors = {name: share.cpu().contiguous() for name, share in self.shares.items()}
        save_file(tensors, folder / _FILE.format(comm.rank()), metadata={"steps": str(self.steps)})

    def load(self, folder: Path) -> None:
        """Take up a checkpoint of any number of ranks; where it has no averages, begin with the weights."""
        averages = SavedEma(folder)
        self.steps = averages.steps
        if not averages.found and comm.is_main():
            logger.warning("%s holds no averages of the weights: they begin here", folder)
        for name, p in self.parameters.items():
            if averages.found:
                first, last = _bounds(p)
                self.shares[name].copy_(averages.read(name)[first:last])
            else:
                self.shares[name].copy_(_share(p))


class SavedEma:
    """The averages that a checkpoint's folder holds, read tensor by tensor."""

    def __init__(self, folder: Path) -> None:
        count = len(list(folder.glob(_FILE.format("*"))))
        self.files: list[Any] = [safe_open(folder / _FILE.format(r), "pt") for r in range(count)]
        self.found = count > 0
        self.steps = int(self.files[0].metadata()["steps"]) if self.found else 0

    def names(self) -> set[str]:
        return set(self.files[0].keys()) if self.found else set()

    def read(self, name: str) -> Tensor:
        """The whole flattened average of a parameter. ValueError where the checkpoint has none."""
        if name not in self.names():
            raise ValueError(f"the checkpoint's average of the weights has no {name}")
        return torch.cat([file.get_tensor(name) for file in self.files])


def _bounds(p: Any) -> tuple[int, int]:
    """[first, last) of the flattened parameter that is this rank's."""
    if not hasattr(p, "ds_id"):
        return even_share(p.numel())
    size = p.partition_numel()
    return min(comm.rank() * size, p.ds_numel), min((comm.rank() + 1) * size, p.ds_numel)


def _share(p: Any) -> Tensor:
    """This rank's part of a parameter, flat. ZeRO-3 keeps it, padded, as `ds_tensor`."""
    first, last = _bounds(p)
    flat: Tensor = p.ds_tensor if hasattr(p, "ds_id") else p.data.flatten()
    return flat[: last - first] if hasattr(p, "ds_id") else flat[first:last]


@contextmanager
def _gathered(p: Any) -> Iterator[None]:
    """The whole parameter; what is written to it stays, in ZeRO-3's partitions too."""
    with ExitStack() as stack:
        if hasattr(p, "ds_id"):
            import deepspeed

            stack.enter_context(deepspeed.zero.GatheredParameters([p], modifier_rank=0))
        yield
