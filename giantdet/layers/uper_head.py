"""Heads of UPerNet (Unified Perceptual Parsing for Scene Understanding, Xiao et al. 2018, figure 4).

Shapes: B images · C classes · W channels of a head · h, w the map of stride 4 · c5 the map of stride 32.
References: mmsegmentation's `UPerHead`, `PPM` and `FCNHead`.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from giantdet.config.architectures.upernet import AuxiliaryHeadConfig, HeadNorm, UperHeadConfig
from giantdet.layers.common import ConvBlock
from giantdet.layers.semantic_head import channel_dropout, pixel_classifier


class PoolingPyramid(nn.Module):
    """Context of the whole image at several scales (PSPNet, Zhao et al. 2017): C5 to `[B, W, h_c5, w_c5]`.

    C5 is averaged to grids of `scales` cells per side, however large the map is; a map smaller than the grid
    is read with overlapping cells. Scale 1 leaves one value per channel and image, so its batch norm needs a
    large batch: with one image per rank, use `cgbn` or `group`.
    """

    def __init__(self, in_channels: int, width: int, scales: tuple[int, ...], norm: HeadNorm) -> None:
        super().__init__()
        self.scales = nn.ModuleList(
            nn.Sequential(nn.AdaptiveAvgPool2d(scale), _block(in_channels, width, 1, norm))
            for scale in scales
        )
        self.merge = _block(in_channels + len(scales) * width, width, 3, norm)

    def forward(self, c5: Tensor) -> Tensor:
        context: Tensor = self.merge(torch.cat([c5, *(_resize(scale(c5), c5) for scale in self.scales)], 1))
        return context


class UperHead(nn.Module):
    """Backbone maps `[B, ., H / s, W / s]` of strides 4, 8, 16, 32 or less to float32 logits `[B, C, h, w]`.

    The pooling pyramid of C5 is the top of a feature pyramid, whose levels are resized to stride 4,
    concatenated and classified together.
    """

    def __init__(self, config: UperHeadConfig, channels: tuple[int, ...], num_classes: int) -> None:
        super().__init__()
        width, norm = config.width, config.norm
        self.pooling = PoolingPyramid(channels[-1], width, config.pool_scales, norm)
        self.laterals = nn.ModuleList(_block(count, width, 1, norm) for count in channels[:-1])
        self.outputs = nn.ModuleList(_block(width, width, 3, norm) for _ in channels[:-1])
        self.fusion = _block(len(channels) * width, width, 3, norm)
        self.dropout = channel_dropout(config.dropout)
        self.classes = pixel_classifier(width, num_classes)

    def forward(self, maps: list[Tensor]) -> Tensor:
        merged = self.pooling(maps[-1])
        levels = [merged]
        for i in range(len(self.laterals) - 1, -1, -1):
            lateral = self.laterals[i](maps[i])
            merged = lateral + _resize(merged, lateral)
            levels.insert(0, self.outputs[i](merged))
        fused = self.fusion(torch.cat([levels[0], *(_resize(level, levels[0]) for level in levels[1:])], 1))
        logits_BChw: Tensor = self.classes(self.dropout(fused)).float()
        return logits_BChw


class AuxiliaryHead(nn.Module):
    """One backbone map `[B, ., h', w']` to float32 logits `[B, C, h', w']`."""

    def __init__(self, config: AuxiliaryHeadConfig, in_channels: int, num_classes: int) -> None:
        super().__init__()
        inputs = (in_channels, *[config.width] * (config.convs - 1))
        self.convs = nn.Sequential(*(_block(count, config.width, 3, config.norm) for count in inputs))
        self.dropout = channel_dropout(config.dropout)
        self.classes = pixel_classifier(config.width, num_classes)

    def forward(self, level: Tensor) -> Tensor:
        logits_BChw: Tensor = self.classes(self.dropout(self.convs(level))).float()
        return logits_BChw


def _block(in_channels: int, out_channels: int, kernel_size: int, norm: HeadNorm) -> ConvBlock:
    return ConvBlock(in_channels, out_channels, kernel_size, norm, relu=True, init="msra")


def _resize(x: Tensor, like: Tensor) -> Tensor:
    """Return `x` bilinearly resized to the height and width of `like`."""
    return F.interpolate(x, size=like.shape[-2:], mode="bilinear", align_corners=False)
