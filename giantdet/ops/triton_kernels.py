"""Which operators use their Triton kernels: those on CUDA tensors, where Triton is installed."""

from __future__ import annotations

import importlib.util

import torch

INSTALLED = importlib.util.find_spec("triton") is not None
# False makes all operators use PyTorch and torchvision, for tests and comparisons.
ENABLED = True


def use_triton(device: torch.device) -> bool:
    """Return whether tensors on `device` go to the Triton kernels."""
    return INSTALLED and ENABLED and device.type == "cuda"
