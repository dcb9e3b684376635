"""Semantic head: the class of each pixel (Panoptic Feature Pyramid Networks, Kirillov et al. 2019, figure 3).

Shapes: B images · C classes · H, W the canvas · h, w a quarter of it.
References: detectron2's `SemSegFPNHead`; with batch norms and dropout, mmsegmentation's `FPNHead`.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from giantdet.config.architectures.common import LossDivisor, SemanticHeadConfig
from giantdet.layers.common import ConvBlock
from giantdet.structures import IGNORE

STRIDE = 4
"""Stride of the logits."""


class SemanticPredictions(NamedTuple):
    """Logits at stride 4, and the class that each pixel of the canvas should have."""

    logits_BChw: Tensor  # float32
    labels_BHW: Tensor  # uint8, in [0, C) or IGNORE


class SemanticHead(nn.Module):
    """Maps `[B, channels, H / s, W / s]` of strides 4, 8, 16, ... to logits `[B, C, H / 4, W / 4]`, float32.

    Each level is convolved and doubled in size until it has stride 4; the levels are summed.
    """

    def __init__(
        self, config: SemanticHeadConfig, channels: int, strides: tuple[int, ...], num_classes: int
    ) -> None:
        super().__init__()
        self.levels = nn.ModuleList(_level(config, channels, stride) for stride in strides)
        self.dropout = channel_dropout(config.dropout)
        self.classes = pixel_classifier(config.width, num_classes)

    def forward(self, levels: list[Tensor]) -> Tensor:
        hidden = self.levels[0](levels[0])
        for scale, level in zip(self.levels[1:], levels[1:], strict=True):
            hidden = hidden + scale(level)
        logits_BChw: Tensor = self.classes(self.dropout(hidden)).float()
        return logits_BChw


def pixel_classifier(width: int, num_classes: int) -> nn.Conv2d:
    """Return the 1x1 convolution from `width` channels to logits, as detectron2 initialises it."""
    layer = nn.Conv2d(width, num_classes, 1)
    nn.init.kaiming_normal_(layer.weight, mode="fan_out", nonlinearity="relu")
    assert layer.bias is not None
    nn.init.zeros_(layer.bias)
    return layer


def channel_dropout(probability: float) -> nn.Module:
    """Return dropout of whole channels; with probability 0 a layer that draws no random numbers."""
    return nn.Dropout2d(probability) if probability else nn.Identity()


def _level(config: SemanticHeadConfig, channels: int, stride: int) -> nn.Sequential:
    """Return the layers from `stride` to stride 4; for stride 4, a single convolution."""
    doublings = int(math.log2(stride / STRIDE))
    parts: list[nn.Module] = []
    for i in range(max(1, doublings)):
        inputs = channels if i == 0 else config.width
        parts.append(ConvBlock(inputs, config.width, 3, config.norm, relu=True, init="msra"))
        if doublings:
            parts.append(nn.Upsample(scale_factor=2, mode="bilinear", align_corners=False))
    return nn.Sequential(*parts)


def to_canvas(logits_BChw: Tensor, stride: int = STRIDE) -> Tensor:
    """Return the logits of every pixel of the canvas, bilinear, from logits at `stride`: `[B, C, H, W]`."""
    return F.interpolate(logits_BChw, scale_factor=float(stride), mode="bilinear", align_corners=False)


def labelled(labels_BHW: Tensor) -> Tensor:
    """Return which pixels have a class, bool `[B, H, W]`."""
    return labels_BHW != IGNORE


def pixel_loss(
    logits_BChw: Tensor, labels_BHW: Tensor, divisor: LossDivisor = "labelled", stride: int = STRIDE
) -> Tensor:
    """Return the mean cross-entropy of the canvas's pixels, a scalar, from logits at `stride`.

    The sum over the labelled pixels of the batch is divided by their number (`semantic_seg.py` of detectron2
    0.6), or by the number of all pixels (`cross_entropy_loss.py` of mmsegmentation 1.2, `avg_non_ignore`
    False). The second counts the padding, of which a fixed canvas has more than a batch padded to its largest
    image. Where no pixel is labelled, both are 0 with zero gradients; detectron2's mean is NaN there.
    """
    labelled_BHW = labelled(labels_BHW)
    entropy_BHW = F.cross_entropy(
        to_canvas(logits_BChw, stride), labels_BHW.long(), ignore_index=IGNORE, reduction="none"
    )
    total = torch.where(labelled_BHW, entropy_BHW, 0.0).sum()
    return total / (labelled_BHW.sum().clamp_min(1) if divisor == "labelled" else labels_BHW.numel())


def semantic_loss(p: SemanticPredictions, divisor: LossDivisor = "labelled") -> dict[str, Tensor]:
    """Return `loss_sem_seg`, see `pixel_loss`."""
    return {"loss_sem_seg": pixel_loss(p.logits_BChw, p.labels_BHW, divisor)}
