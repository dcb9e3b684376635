"""Bitmaps of masks, decoded from the RLE that `evaluation/rle.py` computes."""

from __future__ import annotations

import torch
from torch import Tensor

from giantdet.evaluation.rle import decode_mask, encode_pasted


def paste_masks(
    masks_DSS: Tensor, boxes_D4: Tensor, height: int, width: int, at_pixel_centres: bool = True
) -> Tensor:
    """Return masks of the image, bool `[D, height, width]`."""
    rles = encode_pasted(masks_DSS, boxes_D4, (height, width), at_pixel_centres).records()
    return torch.stack([torch.zeros(height, width, dtype=torch.bool), *map(decode_mask, rles)])[1:]
