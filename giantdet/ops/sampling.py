"""Random choice of anchors and RoIs for the losses, as a pure function of the sample.

Fast R-CNN draws a fixed number with at most a fixed fraction of positives (Girshick 2015). Here the draw
depends only on the sample's number in the training stream, through a counter-based hash (Salmon et al. 2011,
"Parallel random numbers: as easy as 1, 2, 3"): it is the same on any number of ranks, on any device, in eager
and compiled code, and after a resume.
"""

from __future__ import annotations

import torch
from torch import Tensor

_MASK = 0xFFFFFFFF


def _mix(x: Tensor) -> Tensor:
    """MurmurHash3's finaliser (Appleby): a bijection of 32-bit numbers, held in int64, with full avalanche.

    Multipliers above 2^31 are replaced by their negative equivalents modulo 2^32, so that no product
    overflows int64: overflow is undefined in the C++ that `torch.compile` generates.
    """
    x = x ^ (x >> 16)
    x = (x * (0x85EBCA6B - (1 << 32))) & _MASK
    x = x ^ (x >> 13)
    x = (x * (0xC2B2AE35 - (1 << 32))) & _MASK
    return x ^ (x >> 16)


def uniform_noise(seeds_B: Tensor, count: int, salt: int) -> Tensor:
    """Return uniform numbers in [0, 1) for positions 0 to count - 1 of each seed, `[B, count]` float32.

    `seeds_B` are int64 (all 64 bits are used); `salt` distinguishes the uses of one seed (RPN, box head). A
    position's number does not depend on `count` and has 24 random bits.
    """
    low_B, high_B = seeds_B & _MASK, (seeds_B >> 32) & _MASK
    # Two keys of 32 bits; with one, two samples could be shifted copies of each other.
    key_B = _mix((_mix((low_B + 0x9E3779B9 * (2 * salt + 1)) & _MASK) + high_B) & _MASK)
    other_B = _mix((_mix(low_B ^ 0x5BD1E995) + _mix(high_B ^ 0x2545F491) + 0x7F4A7C15 * salt) & _MASK)
    position_N = torch.arange(count, dtype=torch.int64, device=seeds_B.device)
    bits_BN = _mix(_mix(position_N ^ key_B[:, None]) ^ other_B[:, None])
    return (bits_BN >> 8).to(torch.float32) * 2.0**-24


def sample(
    label_BN: Tensor, noise_BN: Tensor, num: int, positive_fraction: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Choose `num` of N candidates: `(index_BR int64, positive_BR bool, valid_BR bool)`, R = min(num, N).

    `label_BN` is 1 (positive), 0 (negative) or less (never chosen); `noise_BN` in [0, 1) orders the
    candidates, the largest first. At most int(num * positive_fraction) positives come first, negatives fill
    up to `num`, and the remaining slots are invalid.
    """
    total = min(num, label_BN.shape[1])
    most = min(int(num * positive_fraction), total)
    # No candidate's key is below 0, so -1 marks those that must not be chosen.
    noise_BN = noise_BN.float()
    key_BP, positive_index_BP = torch.where(label_BN == 1, noise_BN, -1.0).topk(most, dim=1)
    key_BR, negative_index_BR = torch.where(label_BN == 0, noise_BN, -1.0).topk(total, dim=1)

    positives_B1 = (key_BP >= 0).sum(dim=1, keepdim=True)
    negatives_B1 = (key_BR >= 0).sum(dim=1, keepdim=True)
    slot_R = torch.arange(total, device=label_BN.device)
    positive_BR = slot_R < positives_B1
    valid_BR = slot_R < positives_B1 + negatives_B1
    # Both lists concatenated; slot r is positive r, or else negative r - positives.
    candidates = torch.cat([positive_index_BP, negative_index_BR], dim=1)
    source_BR = torch.where(positive_BR, slot_R, most + (slot_R - positives_B1).clamp_min(0))
    return candidates.gather(1, source_BR), positive_BR, valid_BR
