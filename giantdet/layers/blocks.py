"""Recompute or compile the repeated blocks of a timm model, one by one.

Blocks are found by the names of their classes, which are similar in all timm families (`Bottleneck`,
`ConvNeXtBlock`, `SwinTransformerBlock`, `EvaBlock`, `InvertedResidual`); the families share no other mark.
timm's own switch for recomputation applies to all blocks or to none.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable
from typing import Any

import torch
from timm.layers import DropPath
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from giantdet.config.architectures.common import BackboneConfig
from giantdet.errors import InputError

_CLASS = re.compile("Block|Bottle2?neck|Residual")
_LEAST_SHARE = 0.5  # of the model's parameters: modules with fewer are not all of its blocks


def blocks_of(config: BackboneConfig, body: nn.Module) -> list[nn.Module]:
    """Return the outermost blocks, in the order of the model.

    Raises InputError, a ValueError, where the blocks of the model family are not known.
    """
    found: list[nn.Module] = []

    def search(module: nn.Module) -> None:
        for child in module.children():
            if _CLASS.search(type(child).__name__):
                found.append(child)
            else:
                search(child)

    search(body)
    inside = sum(p.numel() for block in found for p in block.parameters())
    if inside < _LEAST_SHARE * sum(p.numel() for p in body.parameters()):
        raise InputError(
            f"backbone '{config.name}': its blocks are not known, so they cannot be recomputed or compiled: "
            "set checkpoint_blocks and compile_blocks false"
        )
    return found


def wrap_blocks(config: BackboneConfig, body: nn.Module) -> None:
    """Recompute and compile the blocks as `checkpoint_blocks` and `compile_blocks` say.

    This replaces the `forward` of each block and not the block itself. So parameters keep their names, and
    DeepSpeed's hooks, which gather the weights at ZeRO-3, stay outside of the compiled code.
    """
    every = int(config.checkpoint_blocks)
    if not every and not config.compile_blocks:
        return
    for index, block in enumerate(blocks_of(config, body)):
        if config.compile_blocks:
            block.forward = compiled(block.forward)
        if every and index % every == 0:
            recompute(block)


def recompute(module: nn.Module) -> None:
    """Make a module keep only its inputs in training, and recompute its activations in the backward pass."""
    module.forward = functools.partial(_recomputed, module, module.forward)


def _recomputed(block: nn.Module, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    if not block.training:
        return forward(*args, **kwargs)
    # The reentrant variant drops the gradients of the parameters where no input requires a gradient.
    return checkpoint(forward, *args, use_reentrant=False, **kwargs)


def compiled(forward: Callable[..., Any]) -> Callable[..., Any]:
    """Return a function compiled for each shape of its inputs that occurs."""
    import torch._dynamo.config
    import torch._inductor.config

    # Compiled code then draws the same random numbers for stochastic depth and dropout as eager code.
    torch._inductor.config.fallback_random = True
    # All blocks run the same code object, which is compiled once for each shape and setting.
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, 256)
    return torch.compile(forward, dynamic=False)


class StochasticDepth(nn.Module):
    """Drop the residual branch of randomly chosen images (Huang et al. 2016), as timm's `DropPath` does.

    Input and output: `[B * windows, ...]`; the branch is kept or dropped for all `windows` consecutive rows
    of an image. The probability is a buffer because it differs from block to block: as a Python number it
    would be a constant of the compiled code, and every block would be compiled separately.
    """

    keep: Tensor

    def __init__(self, drop: float) -> None:
        super().__init__()
        self.windows = 1
        self.register_buffer("keep", torch.tensor(1.0 - drop), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        if not self.training:
            return x
        kept_B = torch.bernoulli(self.keep.float().expand(len(x) // self.windows)) / self.keep.float()
        kept = kept_B.repeat_interleave(self.windows).to(x.dtype)
        return x * kept.view(-1, *[1] * (x.ndim - 1))


def set_stochastic_depth(body: nn.Module, wanted: bool) -> None:
    """Replace timm's `DropPath` modules by `StochasticDepth`, or remove them where it is not `wanted`.

    Some families, Swin among them, have a drop probability of 0.1 by default.
    """
    for module in body.modules():
        for name, child in module.named_children():
            if isinstance(child, DropPath) and child.drop_prob:
                setattr(module, name, StochasticDepth(child.drop_prob) if wanted else nn.Identity())
