"""Batch normalisation, exchanged from outside: `apply_norm` converts every BatchNorm of a module.

- `FrozenBatchNorm2d`: statistics and affine are constants (detectron2's and torchvision's rule for
  fine-tuning with small batches).
- `LocalBatchNorm2d`: `torch.nn.BatchNorm2d` whose statistics and arithmetic are float32 whatever the
  type of input and weights. The stock one raises on the CPU for bf16 weights beside float32 statistics,
  and loses its running statistics to bf16 where DeepSpeed casts all buffers.

Both keep the five keys of `BatchNorm2d` in the state dict, so that any checkpoint fits before and after.
timm's `BatchNormAct2d` carries its activation; both classes take it over (`drop`, then `act`).

Note: with `checkpoint_blocks` the forward of a block runs twice, and local running statistics move twice a
step (an effective momentum of 0.19 for 0.1). Frozen ones do not move.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from giantdet.config.types import NormConfig


class Float32Buffers(nn.Module):
    """A module whose own float32 buffers stay exact under `.bfloat16()`, `.half()` and `.to(dtype)`.

    DeepSpeed casts whole models. Casting back would bring the type back and not the value, so the
    original is put back in place, on the device that the cast went to.
    """

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        before = {k: b for k, b in self._buffers.items() if b is not None and b.dtype == torch.float32}
        super()._apply(fn, recurse)
        for name, buffer in before.items():
            after = self._buffers[name]
            if after is not None and after.dtype in (torch.bfloat16, torch.float16):
                self._buffers[name] = buffer.to(after.device)
        return self


class FrozenBatchNorm2d(Float32Buffers):
    """y = x * scale + bias, with scale and bias folded in float32 from constant buffers.

    Input and output: [B, C, H, W] of any floating type; the product is in the input's type.
    """

    weight: Tensor
    bias: Tensor
    running_mean: Tensor
    running_var: Tensor

    def __init__(self, num_features: int, eps: float = 1e-5) -> None:
        super().__init__()
        self.num_features, self.eps = num_features, eps
        self.register_buffer("weight", torch.ones(num_features, dtype=torch.float32))
        self.register_buffer("bias", torch.zeros(num_features, dtype=torch.float32))
        self.register_buffer("running_mean", torch.zeros(num_features, dtype=torch.float32))
        self.register_buffer("running_var", torch.ones(num_features, dtype=torch.float32))
        self.register_buffer("num_batches_tracked", torch.tensor(0, dtype=torch.long))
        self.drop: nn.Module = nn.Identity()
        self.act: nn.Module = nn.Identity()

    @classmethod
    def from_batchnorm(cls, norm: nn.BatchNorm2d) -> FrozenBatchNorm2d:
        """The constants of `norm`, copied."""
        frozen = cls(norm.num_features, norm.eps)
        for name, buffer in list(frozen._buffers.items()):
            source = getattr(norm, name)
            if source is not None and buffer is not None:
                frozen._buffers[name] = source.detach().to(buffer.dtype, copy=True)
        return frozen

    def forward(self, x: Tensor) -> Tensor:
        scale = self.weight * (self.running_var + self.eps).rsqrt()
        bias = self.bias - self.running_mean * scale
        # One pass over x, which `F.batch_norm` has too; but that one would keep x for the backward.
        x = torch.addcmul(bias.to(x.dtype).view(1, -1, 1, 1), x, scale.to(x.dtype).view(1, -1, 1, 1))
        return self.act(self.drop(x))

    def extra_repr(self) -> str:
        return f"{self.num_features}, eps={self.eps}"


class LocalBatchNorm2d(Float32Buffers, nn.BatchNorm2d):
    """BatchNorm over this rank's own micro-batch, statistics and arithmetic in float32."""

    def __init__(self, num_features: int, eps: float = 1e-5, momentum: float | None = 0.1) -> None:
        super().__init__(num_features, eps=eps, momentum=momentum)
        self.drop: nn.Module = nn.Identity()
        self.act: nn.Module = nn.Identity()

    @classmethod
    def from_batchnorm(cls, norm: nn.BatchNorm2d) -> LocalBatchNorm2d:
        """Shares the parameters of `norm` (an optimizer that holds them stays right), copies its buffers."""
        if not (norm.affine and norm.track_running_stats and norm.momentum is not None):
            raise ValueError("norm type local needs BatchNorm with affine, running statistics and a momentum")
        local = cls(norm.num_features, norm.eps, norm.momentum)
        local.weight, local.bias = norm.weight, norm.bias
        for name in ("running_mean", "running_var", "num_batches_tracked"):
            buffer = getattr(norm, name).detach()
            local._buffers[name] = buffer.to(
                torch.float32 if buffer.is_floating_point() else buffer.dtype, copy=True
            )
        return local

    def forward(self, x: Tensor) -> Tensor:
        if self.training and self.num_batches_tracked is not None:
            self.num_batches_tracked.add_(1)
        # With float32 weights the kernels take low-precision inputs and compute in float32, without a
        # float32 copy of the activations.
        x = F.batch_norm(
            x,
            self.running_mean,
            self.running_var,
            self.weight.float(),
            self.bias.float(),
            self.training,
            self.momentum if self.momentum is not None else 0.0,
            self.eps,
        )
        return self.act(self.drop(x))


_NORMS: dict[str, Any] = {"frozen": FrozenBatchNorm2d, "local": LocalBatchNorm2d}


def apply_norm(module: nn.Module, config: NormConfig) -> nn.Module:
    """Convert every BatchNorm2d inside `module` to the kind that `config.type` names, in place.

    BatchNorms that are frozen already (stages below `frozen_stages`) stay frozen. Returns `module`, or
    its replacement where `module` itself is a BatchNorm2d.
    """
    return convert_batchnorm(module, _NORMS[config.type].from_batchnorm)


def convert_batchnorm(
    module: nn.Module,
    convert: Callable[[nn.BatchNorm2d], nn.Module],
    select: Callable[[nn.BatchNorm2d], bool] = lambda norm: True,
) -> nn.Module:
    """Replace each BatchNorm2d for which `select` holds by `convert(it)`; activations, train mode follow."""
    if isinstance(module, nn.BatchNorm2d):
        if not select(module):
            return module
        new = convert(module)
        for name in ("drop", "act"):  # of timm's BatchNormAct2d
            if hasattr(module, name):
                setattr(new, name, getattr(module, name))
        return new.train(module.training)
    for name, child in module.named_children():
        new_child = convert_batchnorm(child, convert, select)
        if new_child is not child:
            setattr(module, name, new_child)
    return module
