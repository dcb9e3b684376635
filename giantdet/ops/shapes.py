"""Where shapes may depend on data: in eager mode on the CPU, whose host has no device to wait for."""

from __future__ import annotations

import torch

# False makes all shapes fixed, as they are on a GPU, for tests.
ENABLED = True


def may_vary(device: torch.device) -> bool:
    """Return whether an operator on `device` may leave out what is not used."""
    return ENABLED and device.type == "cpu" and not torch.compiler.is_compiling()
