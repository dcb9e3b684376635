"""Small building blocks that pyramids and heads share, with the usual initialisations of detectors."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, Literal

import torch
import torch.nn.functional as F
from timm.layers import LayerNorm2d
from torch import Tensor, nn

from giantdet.config.architectures.common import GROUPS, NormName

_NORMS: dict[NormName, Callable[[int], nn.Module]] = {
    "batch": nn.BatchNorm2d,
    "layer": LayerNorm2d,
    "group": functools.partial(nn.GroupNorm, GROUPS),
}


def make_norm(norm: NormName, channels: int) -> nn.Module:
    """Return the norm layer of a name other than "none"."""
    return _NORMS[norm](channels)


class ConvBlock(nn.Sequential):
    """A convolution, an optional norm and an optional ReLU: `[B, C_in, h, w]` to `[B, C_out, h', w']`.

    `init` is "msra" (He et al. 2015, fan-out, for layers before a ReLU) or "xavier" (uniform, for
    linear layers); these are `c2_msra_fill` and `c2_xavier_fill` of detectron2. A convolution that is
    followed by a norm has no bias.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int,
        norm: NormName = "none",
        relu: bool = False,
        init: Literal["msra", "xavier"] = "xavier",
    ) -> None:
        conv = nn.Conv2d(
            in_channels, out_channels, kernel_size, padding=kernel_size // 2, bias=norm == "none"
        )
        if init == "msra":
            nn.init.kaiming_normal_(conv.weight, mode="fan_out", nonlinearity="relu")
        else:
            nn.init.kaiming_uniform_(conv.weight, a=1)
        if conv.bias is not None:
            nn.init.zeros_(conv.bias)
        layers: list[nn.Module] = [conv]
        if norm != "none":
            layers.append(make_norm(norm, out_channels))
        if relu:
            layers.append(nn.ReLU())
        super().__init__(*layers)


def xavier_linear(in_features: int, out_features: int) -> nn.Linear:
    """Return a linear layer with Xavier-uniform weights and zero bias (detectron2's `c2_xavier_fill`)."""
    layer = nn.Linear(in_features, out_features)
    nn.init.kaiming_uniform_(layer.weight, a=1)
    nn.init.zeros_(layer.bias)
    return layer


def normal_(layer: nn.Conv2d | nn.Linear, std: float) -> None:
    """Initialise a predictor with Gaussian weights of standard deviation `std` and zero bias."""
    nn.init.normal_(layer.weight, std=std)
    if layer.bias is not None:
        nn.init.zeros_(layer.bias)


def gather_slots(values: Tensor, index: Tensor) -> Tensor:
    """Return `values[b, index[b, r]]`, `[B, R, ...]`, of values `[B, N, ...]` and an index `[B, R]`."""
    extra = values.shape[2:]
    expanded = index.reshape(*index.shape, *[1] * len(extra)).expand(*index.shape, *extra)
    return values.gather(1, expanded)


def box_distance(deltas: Tensor, targets: Tensor, beta: float) -> Tensor:
    """Return the smooth L1 loss summed over the four coordinates, `[..., 4]` to `[...]`; `beta` 0 is L1."""
    return F.smooth_l1_loss(deltas, targets, reduction="none", beta=beta).sum(-1)


def scale_gradient(x: Tensor, scale: float) -> Tensor:
    """Return `x` unchanged; its gradient is multiplied by `scale`."""
    scaled: Tensor = _ScaleGradient.apply(x, scale)
    return scaled


class _ScaleGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, scale: float) -> Tensor:
        ctx.scale = scale
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return gradient * ctx.scale, None
