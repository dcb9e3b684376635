"""CGBN: batch normalisation over the images of several ranks (Peng et al., MegDet, CVPR 2018, section 3.3).

The conversion needs no change of the model and works in any project that has started torch.distributed:

    from giantdet.layers.cgbn import cgbn_group, convert_batchnorm
    model = convert_batchnorm(model, cgbn_group(32, images_per_rank=2))  # over 32 images: 16 ranks
    model = convert_batchnorm(model, process_group)                      # over the ranks of any group

Output, gradients and running statistics are those of BatchNorm over the concatenated batch of the group:
ranks may bring different numbers of images, of different sizes, or none. Each rank describes its values by
count, mean and variance; one all-gather exchanges these in the forward, and one all-reduce the two sums
over the gradient in the backward (the paper's two all-reduces in the forward are sums that cancel badly).
All ranks of a group must take part in every forward and backward, as with any collective.

The passes over the activations are PyTorch's native kernels. Statistics are float32 whatever the type of
input and weights; float64 for float64 inputs.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from giantdet.distributed import comm
from giantdet.errors import ConfigError, InputError
from giantdet.ops.statistics import (
    local_statistics,
    memory_format,
    merge_statistics,
    refuse_second_derivatives,
    statistics_type,
)
from giantdet.ops.triton_kernels import INSTALLED, use_triton

if INSTALLED:
    from giantdet.layers.cgbn_cuda import NormaliseOnGpu
    from giantdet.ops.statistics_triton import Moving


def convert_batchnorm(model: nn.Module, group: comm.Group | None = None) -> nn.Module:
    """Replace every BatchNorm (1d, 2d, 3d, Sync, timm's BatchNormAct2d) of `model` by `CrossGpuBatchNorm`.

    The replacements normalise over the ranks of `group`, or over this rank's own images where it is None.
    Works in place and shares the parameters, so an optimizer that was built before stays valid. Returns
    `model`, or its replacement where `model` itself is a BatchNorm.
    """
    return replace_batchnorm(model, lambda norm: CrossGpuBatchNorm.from_batchnorm(norm, group))


def cgbn_group(bn_size: int, images_per_rank: int) -> comm.Group | None:
    """Return this rank's group of consecutive ranks whose forward passes have `bn_size` images together.

    The group spans at most the whole world; it is None where one rank has that many images. All ranks call
    this, in the same order.

    Raises ConfigError, a ValueError, where no number of ranks fits; it names the sizes that do.
    """
    return comm.subgroup(bn_ranks(bn_size, images_per_rank, comm.world_size()))


def bn_ranks(bn_size: int, images_per_rank: int, world_size: int) -> int:
    """Return the number of ranks that have `bn_size` images together; all ranks where they have fewer.

    Raises ConfigError, a ValueError, where that is not a number of ranks that divides the world.
    """
    ranks, rest = divmod(bn_size, images_per_rank)
    if bn_size >= images_per_rank * world_size:
        return world_size
    if rest or world_size % ranks:
        fitting = [str(r * images_per_rank) for r in range(1, world_size + 1) if world_size % r == 0]
        raise ConfigError(
            f"bn_size {bn_size} does not fit {world_size} ranks of {images_per_rank} "
            f"image{'s' if images_per_rank > 1 else ''}; sizes that fit: {', '.join(fitting)}"
        )
    return ranks


def replace_batchnorm(
    module: nn.Module,
    convert: Callable[[_BatchNorm], nn.Module],
    select: Callable[[_BatchNorm], bool] = lambda norm: True,
    done: dict[nn.Module, nn.Module] | None = None,
) -> nn.Module:
    """Replace each BatchNorm for which `select` holds by `convert(norm)`.

    The replacement takes over the training mode and, from timm's BatchNormAct2d, dropout and activation. A
    BatchNorm that is used in several places gets one replacement; `done` keeps those that were made.
    """
    done = {} if done is None else done
    if module not in done:
        done[module] = _replaced(module, convert, select, done)
    return done[module]


def _replaced(
    module: nn.Module,
    convert: Callable[[_BatchNorm], nn.Module],
    select: Callable[[_BatchNorm], bool],
    done: dict[nn.Module, nn.Module],
) -> nn.Module:
    if isinstance(module, _BatchNorm):
        if not select(module):
            return module
        new = convert(module)
        for name in ("drop", "act"):  # of timm's BatchNormAct2d
            if hasattr(module, name):
                setattr(new, name, getattr(module, name))
        return new.train(module.training)
    for name, child in list(module._modules.items()):  # named_children() leaves out a module's second name
        new_child = None if child is None else replace_batchnorm(child, convert, select, done)
        if new_child is not child:
            setattr(module, name, new_child)
    return module


class Float32Buffers(nn.Module):
    """A module whose own float32 buffers stay exact under `.bfloat16()`, `.half()` and `.to(dtype)`.

    DeepSpeed casts whole models. Casting back would bring the type back and not the value, so the
    original is put back in place, on the device that the cast went to.
    """

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        before = {k: b for k, b in self._buffers.items() if b is not None and b.dtype == torch.float32}
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        for name, buffer in before.items():
            after = self._buffers[name]
            if after is not None and after.dtype in (torch.bfloat16, torch.float16):
                self._buffers[name] = buffer.to(after.device)
        return self


class CrossGpuBatchNorm(Float32Buffers, _BatchNorm):
    """BatchNorm over the concatenated batch of a process group's ranks: `[B, C, ...]` to the same shape.

    `group` None: over this rank's own batch, without any communication. Parameters, buffers and modes are
    `torch.nn.BatchNorm2d`'s (`momentum=None` is a cumulative average); a state dict of either fits the
    other. Unlike there, a single value per channel in a whole group is allowed: its variance is 0.

    `create_graph=True` raises RuntimeError where the norm is over a group: it has no gradients of gradients.

    A forward pass that is recomputed in the backward pass does not update the running statistics: the first
    one has updated them already.
    """

    def __init__(
        self,
        num_features: int,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        affine: bool = True,
        track_running_stats: bool = True,
        group: comm.Group | None = None,
    ) -> None:
        super().__init__(num_features, eps, momentum, affine, track_running_stats)
        self.group = group
        self.drop: nn.Module = nn.Identity()
        self.act: nn.Module = nn.Identity()

    @classmethod
    def from_batchnorm(cls, norm: _BatchNorm, group: comm.Group | None = None) -> Self:
        """Share the parameters of `norm` and copy its buffers, those in 16 bits to float32."""
        new = cls(norm.num_features, norm.eps, norm.momentum, norm.affine, norm.track_running_stats, group)
        new._parameters.update(norm._parameters)
        for name, buffer in norm._buffers.items():
            if buffer is not None:
                is_low = buffer.dtype in (torch.bfloat16, torch.float16)
                buffer = buffer.detach().to(torch.float32 if is_low else buffer.dtype, copy=True)
            new._buffers[name] = buffer
        return new

    def __deepcopy__(self, memo: dict[int, Any]) -> CrossGpuBatchNorm:
        """Return a copy with the same group: process groups cannot be copied."""
        memo[id(self.group)] = self.group
        new = self.__class__.__new__(self.__class__)
        memo[id(self)] = new
        new.__dict__.update(copy.deepcopy(self.__dict__, memo))
        return new

    def forward(self, x: Tensor) -> Tensor:
        if x.dim() < 2 or x.shape[1] != self.num_features:
            raise InputError(f"BatchNorm of {self.num_features} channels got an input of {tuple(x.shape)}")
        dtype = statistics_type(x)
        weight = None if self.weight is None else self.weight.to(dtype)
        bias = None if self.bias is None else self.bias.to(dtype)
        if not self.training and self.running_mean is not None:
            y = F.batch_norm(x, self.running_mean, self.running_var, weight, bias, False, 0.0, self.eps)
        elif self.group is None and x.numel() > 0:
            y = self._normalise_alone(x, weight, bias)
        elif self._has_kernels(x):
            y = self._normalise_on_gpu(x, weight, bias)
        else:
            y, mean, var, count = _Normalise.apply(x, weight, bias, self.eps, self.group)
            if self._moves():
                self._update(mean, var, count)
        out: Tensor = self.act(self.drop(y))
        return out

    def _normalise_alone(self, x: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
        """Normalise over this rank's batch in one fused kernel, which updates the running statistics too."""
        if x.numel() == self.num_features:
            raise InputError(
                f"BatchNorm of {self.num_features} channels got one value per channel, so no variance: use "
                'a micro-batch of at least 2, "norm": {"type": "cgbn"} over several ranks, or GroupNorm'
            )
        mean, var, factor = self.running_mean, self.running_var, self.momentum
        if self._moves():
            assert self.num_batches_tracked is not None
            self.num_batches_tracked.add_(1)
            if factor is None:
                factor = 1.0 / float(self.num_batches_tracked)
        elif mean is not None and var is not None:
            # The kernel saves these for its backward pass, and torch.utils.checkpoint requires that the
            # recomputed forward pass saves as many tensors as the first one.
            mean, var = mean.clone(), var.clone()
        return F.batch_norm(x, mean, var, weight, bias, True, factor or 0.0, self.eps)

    def _has_kernels(self, x: Tensor) -> bool:
        """Return whether `cgbn_cuda.py` normalises x; the operators below are for all other cases."""
        fits = x.dtype != torch.float64 and self.momentum is not None
        return fits and use_triton(x.device) and not torch.compiler.is_compiling()

    def _normalise_on_gpu(self, x: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
        moving = None
        if self._moves():
            assert self.running_mean is not None and self.running_var is not None
            assert self.num_batches_tracked is not None and self.momentum is not None
            moving = Moving(self.running_mean, self.running_var, self.num_batches_tracked, self.momentum)
        x = x.contiguous(memory_format=memory_format(x))
        y: Tensor = NormaliseOnGpu.apply(x, weight, bias, self.eps, self.group, moving)
        return y

    def _moves(self) -> bool:
        return self.training and self.running_mean is not None and not is_recomputing()

    @torch.no_grad()
    def _update(self, mean: Tensor, var: Tensor, count: Tensor) -> None:
        """Update the running statistics on the device, without a branch on the ranks' numbers of images."""
        assert self.running_mean is not None and self.running_var is not None
        assert self.num_batches_tracked is not None
        # A group without an image changes nothing, and is no batch of the cumulative average.
        self.num_batches_tracked.add_((count > 0).squeeze(0))
        batches = self.num_batches_tracked.clamp(min=1).double()
        factor = (count > 0).double() * (self.momentum if self.momentum is not None else batches.reciprocal())
        unbiased = var * count / (count - 1).clamp(min=1)
        for running, new in ((self.running_mean, mean), (self.running_var, unbiased)):
            running.lerp_(new.to(running.dtype), factor.to(running.dtype))

    def extra_repr(self) -> str:
        stock: str = super().extra_repr()  # type: ignore[no-untyped-call]
        return f"{stock}, ranks={comm.group_size(self.group)}"


def is_recomputing() -> bool:
    """Return whether this forward pass runs inside a backward pass, as a recomputed one does."""
    # The autograd engine numbers its runs; torch.utils.checkpoint asks the same function.
    return not torch.compiler.is_compiling() and torch._C._current_graph_task_id() != -1


class _Normalise(torch.autograd.Function):
    """y = (x - mean) / sqrt(var + eps) * weight + bias with the statistics of all ranks of a group.

    Returns y, mean, biased variance and count. Weight and bias get this rank's share of their gradient;
    data parallelism adds the shares up.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, group: comm.Group | None
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        x = x.contiguous(memory_format=memory_format(x))
        parts = comm.all_gather(torch.cat(local_statistics(x)), group)
        channels = x.shape[1]
        merged = merge_statistics(*torch.split(parts, [channels, channels, 1], dim=1))
        mean, var, count = (t.to(parts.dtype) for t in merged)
        if x.numel() == 0:
            y = torch.empty_like(x)
        else:
            y, _, _ = torch.native_batch_norm(x, weight, bias, mean, var, False, 0.0, eps)
        ctx.save_for_backward(x, weight, mean, (var + eps).rsqrt(), count)
        ctx.group = group
        ctx.mark_non_differentiable(mean, var, count)
        return y, mean, var, count

    @staticmethod
    def backward(ctx: Any, dy: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
        refuse_second_derivatives()
        x, weight, mean, invstd, count = ctx.saved_tensors
        dy = dy.contiguous(memory_format=memory_format(x))
        sums = _gradient_sums(dy, x, mean, invstd)
        dbias, dweight = sums.unbind() if weight is not None else (None, None)
        dx = None
        if ctx.needs_input_grad[0]:
            totals = comm.all_reduce(sums.clone(), ctx.group)
            dx = _input_gradient(dy, x, weight, mean, invstd, totals, count)
        return dx, dweight, dbias, None, None


def _gradient_sums(dy: Tensor, x: Tensor, mean: Tensor, invstd: Tensor) -> Tensor:
    """Return `[2, C]`, the gradients of bias and weight: sum of dy and sum of dy (x - mean) invstd."""
    if x.numel() == 0:
        return mean.new_zeros(2, *mean.shape)
    if x.is_cuda:
        dbias, sum_dy_xmu, _, _ = torch.batch_norm_backward_reduce(
            dy, x, mean, invstd, None, True, False, False
        )
        return torch.stack([dbias, sum_dy_xmu * invstd])
    ones = torch.ones_like(mean)
    _, dweight, dbias = torch.ops.aten.native_batch_norm_backward(
        dy, x, ones, None, None, mean, invstd, True, 0.0, [False, True, True]
    )
    return torch.stack([dbias, dweight])


def _input_gradient(
    dy: Tensor, x: Tensor, weight: Tensor | None, mean: Tensor, invstd: Tensor, totals: Tensor, count: Tensor
) -> Tensor:
    """dx = w invstd (dy - sum(dy) / N - xhat sum(dy xhat) / N), with the group's sums and N values."""
    if x.numel() == 0:
        return torch.empty_like(x)
    if x.is_cuda:
        return torch.batch_norm_backward_elemt(
            dy, x, mean, invstd, weight, totals[0], totals[1] / invstd, count.to(torch.int32)
        )
    # As dx = a dy + b x + c, in two passes over the activations.
    a = invstd if weight is None else invstd * weight
    b = -a * invstd * totals[1] / count
    c = -a * totals[0] / count - b * mean
    shape = (1, -1, *[1] * (x.dim() - 2))
    dx = torch.addcmul(c.view(shape), x, b.view(shape))
    return dx.addcmul_(dy, a.view(shape)).to(x.dtype)
