"""Deformable convolutions by a conversion from outside (DCNv2, "Deformable ConvNets v2", Zhu et al. 2019).

`make_deformable` turns the 3x3 convolutions of chosen stages into deformable ones. Each keeps its weight and
bias under the same names, so that pretrained weights fit, and its stride, padding, dilation and groups. It
gets one more convolution, `offset`, that is initialised with zeros.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torchvision
from torch import Tensor, nn

from giantdet.errors import InputError

KERNEL = (3, 3)
TAPS = 9


class DeformableConv2d(nn.Conv2d):
    """A 3x3 convolution that reads its nine taps at learnt offsets, each times a learnt mask.

    `[B, C_in, h, w]` to `[B, C_out, h', w']`. `offset` predicts 18 offsets (y, x of each tap, in cells) and
    9 mask logits per output cell, in the order of mmcv's and detectron2's modulated convolution.

    The mask is 2 * sigmoid, where the paper, mmcv and detectron2 have sigmoid: zero logits then give 1 and
    not 0.5, so that a converted layer starts out as the plain convolution that its weights were trained for,
    and frozen batch norms after it stay valid. With weights of twice the size theirs is the same function.

    Computed in float32, because torchvision's operator does not take bf16.
    """

    offset: nn.Conv2d

    @classmethod
    def convert(cls, conv: nn.Conv2d) -> None:
        """Make a plain 3x3 convolution deformable, in place."""
        assert type(conv) is nn.Conv2d and conv.kernel_size == KERNEL
        conv.__class__ = cls  # the same parameters and names, another forward pass
        shape: Any = (conv.stride, conv.padding, conv.dilation)
        offset = nn.Conv2d(conv.in_channels, 3 * TAPS, KERNEL, *shape)
        assert offset.bias is not None
        nn.init.zeros_(offset.weight)
        nn.init.zeros_(offset.bias)
        conv.offset = offset

    def forward(self, x: Tensor) -> Tensor:
        offset_and_mask = self.offset(x).float()
        out: Tensor = torchvision.ops.deform_conv2d(
            x.float(),
            offset_and_mask[:, : 2 * TAPS],
            self.weight.float(),
            None if self.bias is None else self.bias.float(),
            self.stride,
            self.padding,
            self.dilation,
            mask=2 * offset_and_mask[:, 2 * TAPS :].sigmoid(),
        )
        return out.to(x.dtype)


def make_deformable(body: nn.Module, parameters: Iterable[str], what: str) -> None:
    """Convert the 3x3 convolutions whose weights are among the names `parameters`, in place.

    Raises InputError, which names the stage by `what`, where there is none, or one that is not a plain
    `nn.Conv2d` (with standardised weights, or padding that depends on the input).
    """
    names = set(parameters)
    found = [
        module
        for name, module in body.named_modules()
        if isinstance(module, nn.Conv2d) and module.kernel_size == KERNEL and f"{name}.weight" in names
    ]
    if not found:
        raise InputError(f"{what} has no 3x3 convolution: leave it out of deformable_stages")
    others = sorted({type(m).__name__ for m in found if type(m) is not nn.Conv2d})
    if others or any(isinstance(m.padding, str) for m in found):
        kinds = ", ".join(others) or "padding by name"
        raise InputError(f"{what} has 3x3 convolutions of another kind ({kinds}), which cannot be deformable")
    for conv in found:
        DeformableConv2d.convert(conv)
