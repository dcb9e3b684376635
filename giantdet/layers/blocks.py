"""The repeated blocks of a timm model, recomputed in the backward pass or compiled, one by one.

timm names the classes of its blocks alike (`Bottleneck`, `ConvNeXtBlock`, `SwinTransformerBlock`, `EvaBlock`,
`InvertedResidual`); there is no other mark that all families share. timm's own switch for recomputation knows
all blocks or none.
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
_LEAST_SHARE = 0.5  # of the model's parameters: with less, what was found are not its blocks


def blocks_of(config: BackboneConfig, body: nn.Module) -> list[nn.Module]:
    """The outermost blocks, in the order of the model. ValueError where the family has none that we know."""
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
            f"backbone '{config.name}': its blocks are not known, so that they can be neither recomputed nor "
            "compiled: set checkpoint_blocks and compile_blocks false"
        )
    return found


def wrap_blocks(config: BackboneConfig, body: nn.Module) -> None:
    """Give the blocks the forward passes that `checkpoint_blocks` and `compile_blocks` ask for.

    What is replaced is each block's `forward` and not the block: parameters keep their names, and DeepSpeed's
    hooks, which gather the weights of ZeRO-3, stay outside of what is compiled.
    """
    every = int(config.checkpoint_blocks)
    if not every and not config.compile_blocks:
        return
    for index, block in enumerate(blocks_of(config, body)):
        if config.compile_blocks:
            block.forward = _compiled(block.forward)
        if every and index % every == 0:
            recompute(block)


def recompute(module: nn.Module) -> None:
    """Keep a module's inputs alone in training, and run its forward pass once more in the backward pass."""
    module.forward = functools.partial(_recomputed, module, module.forward)


def _recomputed(block: nn.Module, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    if not block.training:
        return forward(*args, **kwargs)
    # The reentrant kind drops gradients where the input needs none.
    return checkpoint(forward, *args, use_reentrant=False, **kwargs)


def _compiled(forward: Callable[..., Any]) -> Callable[..., Any]:
    import torch._dynamo.config
    import torch._inductor.config

    # Stochastic depth and dropout draw what they would draw without it.
    torch._inductor.config.fallback_random = True
    # Blocks share one piece of code: compiled once for each shape and setting of theirs.
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, 256)
    return torch.compile(forward, dynamic=False)


class StochasticDepth(nn.Module):
    """Leave out the residual branch of a random part of the images (Huang et al. 2016), as timm's `DropPath`.

    The probability is a tensor: as a number, it would be part of the compiled code, which grows with depth in
    every block. `windows` consecutive rows of a batch belong to one image and share its fate.
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
    """Ours in the place of timm's; off where not wanted (some families, Swin among them, default to 0.1)."""
    for module in body.modules():
        for name, child in module.named_children():
            if isinstance(child, DropPath) and child.drop_prob:
                setattr(module, name, StochasticDepth(child.drop_prob) if wanted else nn.Identity())
