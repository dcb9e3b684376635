"""Where shapes may depend on data: in eager mode on the CPU, whose host has no device to wait for."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

# False makes all shapes fixed, as they are on a GPU, for tests.
ENABLED = True


def used_slots(valid_K: Tensor) -> Tensor | None:
    """Return the indices of the slots to compute, of bool `[K]`; None for all, where shapes are fixed.

    The first slot is always among them, since some operators refuse empty inputs.
    """
    if not ENABLED or valid_K.device.type != "cpu" or torch.compiler.is_compiling():
        return None
    return F.pad(valid_K[1:], (1, 0), value=True).nonzero()[:, 0]
