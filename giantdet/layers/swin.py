"""Swin (v1, v2, v2-CR) on canvases that are not a multiple of the window size.

timm pads a map to whole windows *after* the cyclic shift, so that a shifted window can contain rows that are
not neighbours (timm issue 2438). Here a block pads *before* the shift, as the authors' detection code,
detectron2 and torchvision do; where the window divides the map, nothing changes. As in their code, the
padding consists of zero tokens after the first norm, and these are attended to: trained weights expect it.

Windows keep their size also on maps that are smaller, where timm would shrink them and resample their bias
table. There is no shift along a side that is at most one window long.
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
    """Make all blocks of a timm Swin pad before the shift; it must be built with `always_partition`."""
    for block in body.modules():
        if type(block) not in _PAD_FIRST:
            continue
        block.built_shift_size = block.shift_size
        _fit(block, block.feat_size if hasattr(block, "feat_size") else block.input_resolution)
        block.__class__ = _PAD_FIRST[type(block)]  # same parameters and keys, only the order of steps differs


def set_canvas(body: Any, image_size: tuple[int, int]) -> None:
    """Let a Swin take images of another (height, width), multiples of 32, in windows of the same size.

    timm's own `set_input_size` resizes the windows with the image, and with them learnt parameters.
    """
    before: tuple[int, int] = tuple(body.patch_embed.img_size)
    body.patch_embed.set_input_size(image_size)
    for block in body.modules():
        if type(block) not in _PAD_FIRST.values():
            continue
        name = "feat_size" if hasattr(block, "feat_size") else "input_resolution"
        stride = before[0] // getattr(block, name)[0]
        size = (image_size[0] // stride, image_size[1] // stride)
        setattr(block, name, size)
        _fit(block, size)
    body.to(next(body.parameters()).device)


def _fit(block: Any, size_hw: tuple[int, int]) -> None:
    """Set the shift, none where a window holds the map, and the attention mask of a block."""
    block.shift_size = tuple(
        0 if side <= window else shift
        for side, window, shift in zip(size_hw, block.window_size, block.built_shift_size, strict=True)
    )
    block._init_buffers()  # recomputes the attention mask for the padded map and the new shift
