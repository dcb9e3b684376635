"""Feature pyramids: P2 to P6 with the same number of channels, strides 4 to 64.

`FeaturePyramid` is FPN (Lin et al., CVPR 2017) over a hierarchical backbone, `SimplePyramid` is
ViTDet's (Li et al., ECCV 2022, section 3) over the one map of a plain ViT. P6 is P5 subsampled by
two, as in detectron2's and torchvision's Mask R-CNN.
"""

from __future__ import annotations

import torch.nn.functional as F
from timm.layers import LayerNorm2d
from torch import Tensor, nn

from giantdet.config.types import FpnConfig
from giantdet.errors import InputError
from giantdet.layers.common import ConvBlock

LEVELS = 5


def build_fpn(
    config: FpnConfig, channels: tuple[int, ...], strides: tuple[int, ...], is_plain: bool
) -> nn.Module:
    """The pyramid over backbone maps of these channels and strides.

    Raises ValueError where the maps are not at strides 4, 8, 16, 32 (or 16 for a plain ViT).
    """
    wanted = (16,) if is_plain else (4, 8, 16, 32)
    if strides != wanted:
        raise InputError(f"the pyramid needs backbone maps at strides {wanted}, this backbone has {strides}")
    return SimplePyramid(config, channels[0]) if is_plain else FeaturePyramid(config, channels)


def _subsample(p5: Tensor) -> Tensor:
    return F.max_pool2d(p5, kernel_size=1, stride=2)


class FeaturePyramid(nn.Module):
    """Top-down pathway with lateral connections: maps at strides 4..32 to P2..P6."""

    def __init__(self, config: FpnConfig, channels: tuple[int, ...]) -> None:
        super().__init__()
        self.laterals = nn.ModuleList(ConvBlock(c, config.channels, 1, config.norm) for c in channels)
        self.outputs = nn.ModuleList(
            ConvBlock(config.channels, config.channels, 3, config.norm) for _ in channels
        )

    def forward(self, maps: list[Tensor]) -> list[Tensor]:
        """`[B, C_l, H / s_l, W / s_l]` for s = 4, 8, 16, 32 to five `[B, C, ., .]`, finest first."""
        merged = self.laterals[-1](maps[-1])
        levels = [self.outputs[-1](merged)]
        for i in range(len(maps) - 2, -1, -1):
            merged = self.laterals[i](maps[i]) + F.interpolate(merged, scale_factor=2.0, mode="nearest")
            levels.insert(0, self.outputs[i](merged))
        return [*levels, _subsample(levels[-1])]


class SimplePyramid(nn.Module):
    """ViTDet's pyramid: four scalings of the last map (transposed convolutions up, pooling down)."""

    def __init__(self, config: FpnConfig, width: int) -> None:
        super().__init__()

        def tail(channels: int) -> list[nn.Module]:
            return [
                ConvBlock(channels, config.channels, 1, config.norm),
                ConvBlock(config.channels, config.channels, 3, config.norm),
            ]

        def up(channels: int) -> nn.Module:
            return nn.ConvTranspose2d(channels, channels // 2, kernel_size=2, stride=2)

        self.stages = nn.ModuleList(
            [
                nn.Sequential(
                    up(width), LayerNorm2d(width // 2), nn.GELU(), up(width // 2), *tail(width // 4)
                ),
                nn.Sequential(up(width), *tail(width // 2)),
                nn.Sequential(*tail(width)),
                nn.Sequential(nn.MaxPool2d(2), *tail(width)),
            ]
        )

    def forward(self, maps: list[Tensor]) -> list[Tensor]:
        """One `[B, width, H / 16, W / 16]` to five `[B, C, ., .]` at strides 4 to 64."""
        levels = [stage(maps[0]) for stage in self.stages]
        return [*levels, _subsample(levels[-1])]
