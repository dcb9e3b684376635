"""Feature pyramids: maps with the same number of channels, P2 to P6 at strides 4 to 64, or P3 to P7.

`FeaturePyramid` is FPN (Lin et al., CVPR 2017) over a hierarchical backbone. `SimplePyramid` is that of
ViTDet (Li et al., ECCV 2022, section 3) over the single map of a plain ViT. Both begin a level with what
`layers/context.py` makes, by default a 1x1 convolution.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
import torch.nn.functional as F
from timm.layers import LayerNorm2d
from torch import Tensor, nn

from giantdet.config.architectures.common import FpnConfig
from giantdet.errors import InputError
from giantdet.layers.common import ConvBlock
from giantdet.layers.context import lateral

LEVELS = 5
TOP_LEVEL = 5
"""Number of the coarsest level that has a backbone map, C5."""
# Of P2 to P6.
STRIDES = tuple(4 * 2**level for level in range(LEVELS))


def build_fpn(
    config: FpnConfig,
    channels: tuple[int, ...],
    strides: tuple[int, ...],
    is_plain: bool,
    finest: Literal[2, 3] = 2,
    top: nn.Module | None = None,
) -> nn.Module:
    """Return the pyramid over backbone maps of these channels and strides; its finest level is P`finest`.

    `top` computes the levels above P5 from C5 (the single map of a plain ViT) and P5; the default is P6, P5
    subsampled by two. Raises InputError where the maps are not at strides 4, 8, 16, 32 (a plain ViT: 16).
    """
    wanted = (16,) if is_plain else (4, 8, 16, 32)
    if strides != wanted:
        raise InputError(f"the pyramid needs backbone maps at strides {wanted}, this backbone has {strides}")
    top = Subsampled() if top is None else top
    if is_plain:
        return SimplePyramid(config, channels[0], finest, top)
    return FeaturePyramid(config, channels[finest - 2 :], top)


class Subsampled(nn.Module):
    """P6 as every second cell of P5, as in detectron2's `LastLevelMaxPool`."""

    def forward(self, c5: Tensor, p5: Tensor) -> list[Tensor]:
        """Return one map of half the size of `p5`, `[B, C, h, w]`, rounded up."""
        return [F.max_pool2d(p5, kernel_size=1, stride=2)]


class TopConvolutions(nn.Module):
    """P6 and P7 by 3x3 convolutions of stride 2, with a ReLU between them (RetinaNet, Lin et al. 2017).

    mmdetection has no ReLU there.
    """

    def __init__(self, in_channels: int, channels: int, from_c5: bool, relu: bool = True) -> None:
        super().__init__()
        self.from_c5, self.relu = from_c5, relu
        self.p6 = nn.Conv2d(in_channels if from_c5 else channels, channels, 3, stride=2, padding=1)
        self.p7 = nn.Conv2d(channels, channels, 3, stride=2, padding=1)
        for layer in (self.p6, self.p7):
            nn.init.kaiming_uniform_(layer.weight, a=1)
            assert layer.bias is not None
            nn.init.zeros_(layer.bias)

    def forward(self, c5: Tensor, p5: Tensor) -> list[Tensor]:
        """Return P6 and P7: maps of half and a quarter of the size of C5, rounded up."""
        p6 = self.p6(c5 if self.from_c5 else p5)
        return [p6, self.p7(F.relu(p6) if self.relu else p6)]


def add_upsampled(fine: Tensor, coarse: Tensor) -> Tensor:
    """Return `fine` `[B, C, 2 h, 2 w]` plus `coarse` `[B, C, h, w]`, upsampled to the nearest neighbour."""
    total: Tensor = _AddUpsampled.apply(fine, coarse)
    return total


class _AddUpsampled(torch.autograd.Function):
    """Adds by broadcasting over cells of 2 x 2: the upsampled map is never written.

    The backward pass of `F.interpolate` adds atomically once torch.compile has made a kernel of it.
    """

    @staticmethod
    def forward(ctx: Any, fine: Tensor, coarse: Tensor) -> Tensor:
        cells = fine.unflatten(3, (-1, 2)).unflatten(2, (-1, 2)) + coarse[:, :, :, None, :, None]
        total: Tensor = cells.flatten(4, 5).flatten(2, 3)
        return total

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, Tensor]:
        upper, lower = dy[:, :, ::2], dy[:, :, 1::2]
        return dy, upper[..., ::2] + upper[..., 1::2] + lower[..., ::2] + lower[..., 1::2]


class FeaturePyramid(nn.Module):
    """FPN: a top-down pathway with lateral connections, one level for each map, and the levels of `top`."""

    def __init__(self, config: FpnConfig, channels: tuple[int, ...], top: nn.Module) -> None:
        super().__init__()
        finest = TOP_LEVEL + 1 - len(channels)
        self.laterals = nn.ModuleList(
            lateral(config, level, count) for level, count in enumerate(channels, finest)
        )
        self.outputs = nn.ModuleList(
            ConvBlock(config.channels, config.channels, 3, config.norm) for _ in channels
        )
        self.top = top

    def forward(self, maps: list[Tensor]) -> list[Tensor]:
        """Return the levels `[B, C, ., .]`, finest first, of backbone maps `[B, C_l, H / s_l, W / s_l]`.

        Maps finer than the finest level are not used.
        """
        maps = maps[-len(self.laterals) :]
        merged = self.laterals[-1](maps[-1])
        levels = [self.outputs[-1](merged)]
        for i in range(len(maps) - 2, -1, -1):
            merged = add_upsampled(self.laterals[i](maps[i]), merged)
            levels.insert(0, self.outputs[i](merged))
        return [*levels, *self.top(maps[-1], levels[-1])]


class SimplePyramid(nn.Module):
    """ViTDet's pyramid: one map rescaled by transposed convolutions or pooling, and the levels of `top`."""

    def __init__(self, config: FpnConfig, width: int, finest: Literal[2, 3], top: nn.Module) -> None:
        super().__init__()

        def tail(level: int, channels: int) -> list[nn.Module]:
            return [
                lateral(config, level, channels),
                ConvBlock(config.channels, config.channels, 3, config.norm),
            ]

        def up(channels: int) -> nn.Module:
            return nn.ConvTranspose2d(channels, channels // 2, kernel_size=2, stride=2)

        stages = [
            nn.Sequential(
                up(width), LayerNorm2d(width // 2), nn.GELU(), up(width // 2), *tail(2, width // 4)
            ),
            nn.Sequential(up(width), *tail(3, width // 2)),
            nn.Sequential(*tail(4, width)),
            nn.Sequential(nn.MaxPool2d(2), *tail(TOP_LEVEL, width)),
        ]
        self.stages = nn.ModuleList(stages[finest - 2 :])
        self.top = top

    def forward(self, maps: list[Tensor]) -> list[Tensor]:
        """Return the levels `[B, C, ., .]`, finest first, of one map `[B, width, H / 16, W / 16]`."""
        levels = [stage(maps[0]) for stage in self.stages]
        return [*levels, *self.top(maps[0], levels[-1])]
