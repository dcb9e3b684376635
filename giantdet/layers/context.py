"""Lateral connections of a pyramid with a wide view: large separable kernels, and context of the whole map.

Shapes: B images · C channels · h, w a level's map.
Sources: Peng et al. 2017 ("Large Kernel Matters", GCN), figure 2 B; Cao et al. 2019 ("GCNet"), figure 4 d.
"""

from __future__ import annotations

from torch import Tensor, nn

from giantdet.config.architectures.challenge import ContextConfig, LargeKernelConfig
from giantdet.config.architectures.common import FpnConfig, NormName
from giantdet.layers.common import ConvBlock, make_norm


def lateral(config: FpnConfig, level: int, in_channels: int) -> nn.Sequential:
    """Return the layers from C`level` to the pyramid's channels, `[B, C_in, h, w]` to `[B, C, h, w]`.

    A 1x1 convolution, or a large kernel, and the context block where the level has one. The names of their
    parameters do not depend on what follows them.
    """
    large, context = config.large_kernel, config.context
    layers: nn.Sequential
    if large is not None and level in large.levels:
        layers = large_kernel(large, in_channels, config.channels, config.norm)
    else:
        layers = ConvBlock(in_channels, config.channels, 1, config.norm)
    if context is not None and level in context.levels:
        layers.append(GlobalContext(config.channels, context))
    return layers


def large_kernel(config: LargeKernelConfig, in_channels: int, channels: int, norm: NormName) -> nn.Sequential:
    """Return GCN's block without its boundary refinement: separable convolution, norm if any, ReLU.

    The norm is that of the pyramid. The ReLU follows the sum, as in Megvii's light_head_rcnn.
    """
    layers: list[nn.Module] = [
        SeparableKernel(in_channels, config.width, channels, config.size, bias=norm == "none")
    ]
    if norm != "none":
        layers.append(make_norm(norm, channels))
    return nn.Sequential(*layers, nn.ReLU())


class SeparableKernel(nn.Module):
    """The sum of a k x 1 and a 1 x k convolution in both orders: `[B, C_in, h, w]` to `[B, C, h, w]`.

    Each output sees k x k positions, with 2 k width (C_in + C) weights instead of k^2 C_in C.
    """

    def __init__(self, in_channels: int, width: int, channels: int, size: int, bias: bool = True) -> None:
        super().__init__()

        def conv(inputs: int, outputs: int, tall: bool, bias: bool) -> nn.Conv2d:
            kernel, padding = ((size, 1), (size // 2, 0)) if tall else ((1, size), (0, size // 2))
            layer = nn.Conv2d(inputs, outputs, kernel, padding=padding, bias=bias)
            nn.init.kaiming_uniform_(layer.weight, a=1)
            if layer.bias is not None:
                nn.init.zeros_(layer.bias)
            return layer

        self.tall_first = nn.Sequential(
            conv(in_channels, width, True, True), conv(width, channels, False, bias)
        )
        self.wide_first = nn.Sequential(
            conv(in_channels, width, False, True), conv(width, channels, True, bias)
        )

    def forward(self, x: Tensor) -> Tensor:
        total: Tensor = self.tall_first(x) + self.wide_first(x)
        return total


class GlobalContext(nn.Module):
    """GCNet's block: one attention-weighted mean of the map, transformed and added at all positions.

    `[B, C, h, w]` to the same shape. Its last convolution begins at zero, so that the block begins as the
    identity (mmcv's `ContextBlock`). The mean runs over the whole canvas, padding included.
    """

    def __init__(self, channels: int, config: ContextConfig) -> None:
        super().__init__()
        width = max(1, channels // config.reduction)
        self.attention = nn.Conv2d(channels, 1, 1)
        last = nn.Conv2d(width, channels, 1)
        self.transform = nn.Sequential(
            nn.Conv2d(channels, width, 1), nn.LayerNorm([width, 1, 1]), nn.ReLU(), last
        )
        nn.init.kaiming_normal_(self.attention.weight, nonlinearity="relu")
        nn.init.zeros_(last.weight)
        for layer in (self.attention, last):
            assert layer.bias is not None
            nn.init.zeros_(layer.bias)

    def forward(self, x: Tensor) -> Tensor:
        share_B1X = self.attention(x).flatten(2).float().softmax(-1).to(x.dtype)
        context_BC1 = x.flatten(2) @ share_B1X.mT
        out: Tensor = x + self.transform(context_BC1[..., None])
        return out
