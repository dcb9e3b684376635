"""Batch normalisation, chosen from outside the model: `apply_norm` converts every BatchNorm of a module.

- `FrozenBatchNorm2d`: statistics, scale and bias are constants (the choice of detectron2 and torchvision for
  fine-tuning with small batches).
- `CrossGpuBatchNorm` (`layers/cgbn.py`): statistics over this rank's own micro-batch (local), or over the
  micro-batches of several ranks (cgbn). Statistics and arithmetic are float32 whatever the type of input and
  weights. PyTorch's own BatchNorm raises on the CPU for bf16 weights with float32 statistics, and its running
  statistics lose their precision where DeepSpeed casts all buffers to bf16.

Both keep the five keys of `BatchNorm2d` in the state dict, so that a checkpoint fits before and after the
conversion. timm's `BatchNormAct2d` includes its activation; both classes apply it too (`drop`, then `act`).
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from giantdet.config.architectures.common import NormConfig, PartNormConfig
from giantdet.distributed import comm
from giantdet.errors import ConfigError
from giantdet.layers.cgbn import (
    CrossGpuBatchNorm,
    Float32Buffers,
    bn_ranks,
    cgbn_group,
    convert_batchnorm,
    replace_batchnorm,
)


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
    def from_batchnorm(cls, norm: _BatchNorm) -> FrozenBatchNorm2d:
        """Return a frozen copy of `norm`."""
        frozen = cls(norm.num_features, norm.eps)
        for name, buffer in list(frozen._buffers.items()):
            source = getattr(norm, name)
            if source is not None and buffer is not None:
                frozen._buffers[name] = source.detach().to(buffer.dtype, copy=True)
        return frozen

    def forward(self, x: Tensor) -> Tensor:
        scale = self.weight * (self.running_var + self.eps).rsqrt()
        bias = self.bias - self.running_mean * scale
        # A single pass over x. `F.batch_norm` needs one pass too, but keeps x for its backward pass.
        x = torch.addcmul(bias.to(x.dtype).view(1, -1, 1, 1), x, scale.to(x.dtype).view(1, -1, 1, 1))
        out: Tensor = self.act(self.drop(x))
        return out

    def extra_repr(self) -> str:
        return f"{self.num_features}, eps={self.eps}"


def moving_norms(model: nn.Module) -> list[_BatchNorm]:
    """Return the batch norms whose running statistics training updates."""
    return [m for m in model.modules() if isinstance(m, _BatchNorm) and m.running_mean is not None]


def apply_norm(module: nn.Module, config: PartNormConfig, images_per_rank: int | None = None) -> nn.Module:
    """Convert every BatchNorm inside `module` to the kind that `config.type` names, in place.

    BatchNorms that are already frozen (those of the `frozen_stages`) stay frozen. Where `images_per_rank` is
    None, cgbn is local. Returns `module`, or its replacement where `module` itself is a BatchNorm.
    """
    if config.type == "frozen":
        return replace_batchnorm(module, FrozenBatchNorm2d.from_batchnorm)
    if config.type == "local" or images_per_rank is None:
        return convert_batchnorm(module)
    return convert_batchnorm(module, cgbn_group(config.bn_size, images_per_rank))


def check_norms(norm: NormConfig, images_per_rank: int, world_size: int) -> None:
    """Raise ConfigError for a `bn_size` that does not fit that many ranks of so many images."""
    parts = {f"norm.{key}": part for key, part in norm if isinstance(part, PartNormConfig)}
    for key, part in ({"norm": norm} | parts).items():
        if part.type == "cgbn":
            try:
                bn_ranks(part.bn_size, images_per_rank, world_size)
            except ConfigError as error:
                raise ConfigError(f"giantdet.{key}: {error}") from None


def norm_summary(module: nn.Module, images_per_rank: int) -> str:
    """Return a summary of a module's batch norms: `20 frozen, 33 over 8 images (4 ranks x 2)`."""
    found: dict[str, int] = {}
    for norm in module.modules():
        kind = ""
        if isinstance(norm, FrozenBatchNorm2d):
            kind = "frozen"
        elif isinstance(norm, CrossGpuBatchNorm):
            ranks = comm.group_size(norm.group)
            kind = f"over {ranks * images_per_rank} images ({ranks} ranks x {images_per_rank})"
            kind = kind if ranks > 1 else f"local, over {images_per_rank} images"
        if kind:
            found[kind] = found.get(kind, 0) + 1
    return ", ".join(f"{number} {kind}" for kind, number in found.items()) or "none"
