"""Swin (v1, v2, v2-CR) on canvases that the window does not divide.

timm pads a map to whole windows *after* the cyclic shift, so that shifted windows join rows that are no
neighbours (timm issue 2438). Here a block pads *before* the shift, as the authors' detection code,
detectron2 and torchvision do; where the window divides the map, nothing changes. Like theirs, our padding
is zero tokens after the first norm, and they do take part in the attention: trained weights expect it.

Windows keep their side, at small maps too, where timm would shrink them and resample their bias table;
along a side that is one window long there is no shift.
"""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from timm.models.swin_transformer import SwinTransformerBlock
from timm.models.swin_transformer_v2 import SwinTransformerV2Block
from timm.models.swin_transformer_v2_cr import SwinTransformerV2CrBlock
from torch import Tensor


def _pad_to_windows(x_BHWC: Tensor, window: tuple[int, int]) -> Tensor:
    height, width = x_BHWC.shape[1:3]
    return F.pad(x_BHWC, (0, 0, 0, -width % window[1], 0, -height % window[0]))


class _PadFirstBlock(SwinTransformerBlock):
    def _attn(self, x: Tensor) -> Tensor:
        padded = _pad_to_windows(x, self.window_size)
        attended: Tensor = super()._attn(padded)  # type: ignore[no-untyped-call]
        return attended[:, : x.shape[1], : x.shape[2]]


class _PadFirstV2Block(SwinTransformerV2Block):
    def _attn(self, x: Tensor) -> Tensor:
        padded = _pad_to_windows(x, self.window_size)
        attended: Tensor = super()._attn(padded)
        return attended[:, : x.shape[1], : x.shape[2]]


class _PadFirstV2CrBlock(SwinTransformerV2CrBlock):
    def _shifted_window_attn(self, x: Tensor) -> Tensor:
        padded = _pad_to_windows(x, self.window_size)
        attended: Tensor = super()._shifted_window_attn(padded)  # type: ignore[no-untyped-call]
        return attended[:, : x.shape[1], : x.shape[2]]


_PAD_FIRST: dict[type, type] = {
    SwinTransformerBlock: _PadFirstBlock,
    SwinTransformerV2Block: _PadFirstV2Block,
    SwinTransformerV2CrBlock: _PadFirstV2CrBlock,
}


def pad_before_shift(body: Any) -> None:
    """Turn all blocks of a timm Swin that was built with `always_partition` into ones that pad first."""
    for block in body.modules():
        if type(block) not in _PAD_FIRST:
            continue
        size = block.feat_size if hasattr(block, "feat_size") else block.input_resolution
        block.shift_size = tuple(
            0 if side <= window else shift
            for side, window, shift in zip(size, block.window_size, block.shift_size, strict=True)
        )
        block._init_buffers()  # the mask of the padded map, for the shift that is left
        block.__class__ = _PAD_FIRST[type(block)]  # same parameters and keys, only the order of steps differs
