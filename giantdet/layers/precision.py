"""Models in half precision."""

from __future__ import annotations

import torch
from torch import nn


def cast(model: nn.Module, dtype: torch.dtype) -> None:
    """Cast the weights of a model, in place, as training in that type has them."""
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype)
    cast_buffers(model, dtype)


def cast_buffers(model: nn.Module, dtype: torch.dtype) -> None:
    """Cast the floating-point buffers of other libraries' modules to the type of the weights, in place.

    DeepSpeed 0.19.8 casts parameters only, and in some of timm's modules, EVA's attention among them, a
    buffer is an operand beside weights. giantdet's own modules take care of the types of their buffers.
    """
    for module in model.modules():
        if type(module).__module__.startswith("giantdet."):
            continue
        for name, buffer in module._buffers.items():
            if buffer is not None and buffer.is_floating_point():
                module._buffers[name] = buffer.to(dtype)
