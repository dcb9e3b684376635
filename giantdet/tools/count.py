"""Count the FLOPs and the memory of a training step by running it on the meta device.

Meta tensors have shapes but no content. FLOPs are those of PyTorch's counter (2 per multiply-add, for matrix
products, convolutions and attention). Memory is the peak, over forward and backward pass, of the total size
of all tensors that exist at a time: activations, kept or recomputed, losses, temporary tensors, and one
parameter's gradient at a time.
"""

from __future__ import annotations

import dataclasses
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple
from unittest import mock

import torch
import torch.nn.functional as F
import torchvision  # noqa: F401  # registers its operators
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only
from torch.utils.flop_counter import flop_registry, sdpa_backward_flop_count, sdpa_flop_count

from giantdet.architectures import Architecture, build_model, total_loss
from giantdet.config.classes import Classes
from giantdet.config.load import RunConfig
from giantdet.config.resolved import ResolvedRun
from giantdet.data.blank import empty_batch
from giantdet.engine.zero import weight_dtype
from giantdet.errors import InputError
from giantdet.layers.deferred import deferred_init
from giantdet.structures import Batch


def _deformable(x: Any, weight: Any, offset: Any, *_: Any, **__: Any) -> int:
    """FLOPs of the convolution alone; the bilinear reading is a few percent of it."""
    return int(2 * offset.shape[0] * offset.shape[2:].numel() * weight.numel())


def _deformable_backward(gradient: Any, x: Any, weight: Any, offset: Any, *_: Any, **__: Any) -> int:
    return 2 * _deformable(x, weight, offset)


# PyTorch's counter does not know the operators of torchvision.
FLOPS: dict[Any, Any] = flop_registry | {
    torch.ops.torchvision.deform_conv2d: _deformable,
    torch.ops.torchvision._deform_conv2d_backward: _deformable_backward,
}


COCO = Classes.numbered(80, 54)
"""As many classes as COCO's panoptic annotations have: 80 of objects, 53 of stuff."""


class Count(NamedTuple):
    """FLOPs and memory of one micro-batch."""

    forward: int
    """FLOPs of the forward pass."""
    backward: int
    """FLOPs of the backward pass, including recomputed blocks."""
    memory: int
    """Bytes at the peak, without weights and accumulated gradients."""


def count(run: ResolvedRun, micro_batch: int) -> Count:
    """Count a forward and backward pass of the run's model with `micro_batch` images, in its precision."""
    try:
        return _count(run, micro_batch)
    except InputError:
        if micro_batch != 1:
            raise
        # A batch norm over one value per channel, as in UPerNet: in the run, others' images take part in it.
        two = _count(run, 2)
        return Count(two.forward // 2, two.backward // 2, two.memory // 2)


def _count(run: ResolvedRun, micro_batch: int) -> Count:
    model = meta_model(run)
    batch = tree_map_only(
        Tensor, lambda t: t.to("meta"), empty_batch(run.giantdet.data, micro_batch, model.targets)
    )
    for parameter in model.parameters():
        if parameter.requires_grad:  # ZeRO reduces each gradient and frees it as soon as it is complete
            parameter.register_post_accumulate_grad_hook(_drop_gradient)
    counter = _Counter([*model.parameters(), *model.buffers(), *tree_leaves(batch)])
    with counter, _fused_attention(counter):
        loss = _loss(model, batch)
        forward = counter.flops
        loss.backward()
    return Count(forward, counter.flops - forward, counter.peak)


def _loss(model: Architecture, batch: Batch) -> Tensor:
    return total_loss(model.losses(model(batch), batch))


def meta_model(run: ResolvedRun) -> Architecture:
    """Return the run's model on the meta device, in training mode and in the run's precision."""
    config = run.giantdet
    with deferred_init():
        model = build_model(config.model, config.data.size, config.norm)
    return model.to("meta").to(weight_dtype(run)).train()


def with_assumed_classes(run: RunConfig) -> RunConfig:
    """Return the run with COCO's numbers of classes where it reads them from annotations."""
    model = run.giantdet.model
    numbers = {
        key: len(getattr(COCO, kind))
        for key, kind in model.class_keys.items()
        if getattr(model, key) == "auto"
    }
    giantdet = run.giantdet.model_copy(update={"model": model.model_copy(update=numbers)})
    return dataclasses.replace(run, giantdet=giantdet)


def _drop_gradient(parameter: nn.Parameter) -> None:
    parameter.grad = None


class _Counter(TorchDispatchMode):
    """Adds up the FLOPs of operators, and tracks the size of the storages that exist, and its peak."""

    def __init__(self, known: list[Any]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.flops = self.now = self.peak = 0
        self.known: weakref.WeakSet[Any] = weakref.WeakSet()
        self.kept = [t.untyped_storage() for t in known if isinstance(t, Tensor)]
        self.known.update(self.kept)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        flops = FLOPS.get(func.overloadpacket)
        if flops is not None:
            self.flops += int(flops(*args, **(kwargs or {}), out_val=result))
        for leaf in result if isinstance(result, tuple | list) else (result,):
            if isinstance(leaf, Tensor):
                self._watch(leaf.untyped_storage())
        return result

    def _watch(self, storage: Any) -> None:
        if storage in self.known:
            return
        self.known.add(storage)
        size = storage.nbytes()
        weakref.finalize(storage, self._gone, size)
        self.now += size
        self.peak = max(self.peak, self.now)

    def _gone(self, size: int) -> None:
        self.now -= size


@contextmanager
def _fused_attention(counter: _Counter) -> Iterator[None]:
    """Count attention as the fused kernels of GPUs and CPUs do it; on the meta device it makes `[N, N]` maps.

    The function is replaced, not handled by a mode: a mode does not see what a backward pass recomputes.
    """

    def attend(
        q: Tensor, k: Tensor, v: Tensor, attn_mask: Tensor | None = None, *_: Any, **__: Any
    ) -> Tensor:
        out: Tensor = _Attention.apply(q, k, v, attn_mask, counter)
        return out

    with mock.patch.object(F, "scaled_dot_product_attention", attend):
        yield


class _Attention(torch.autograd.Function):
    """Outputs of the right shapes, `[B, heads, N, D]`, and what a fused kernel keeps for its backward."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, counter: _Counter) -> Tensor:
        ctx.counter = counter
        counter.flops += sdpa_flop_count(q.shape, k.shape, v.shape)
        out = q.new_empty(*q.shape[:-1], v.shape[-1])
        normalisers = q.new_empty(q.shape[:-1], dtype=torch.float32)
        ctx.save_for_backward(q, k, v, out, normalisers, mask)
        return out

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, _, _, mask = ctx.saved_tensors
        ctx.counter.flops += sdpa_backward_flop_count(gradient.shape, q.shape, k.shape, v.shape)
        of_mask = torch.empty_like(mask) if ctx.needs_input_grad[3] else None
        return torch.empty_like(q), torch.empty_like(k), torch.empty_like(v), of_mask, None
