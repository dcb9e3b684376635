"""Count the FLOPs and the memory of a training step by running it on fake tensors.

Fake tensors have shapes and a device but no content. FLOPs are those of PyTorch's counter (2 per
multiply-add, for matrix products, convolutions and attention). Memory is the peak, over forward and backward
pass, of the total size of all tensors that exist at a time: activations, kept or recomputed, losses,
temporary tensors, and one parameter's gradient at a time.
"""

from __future__ import annotations

import dataclasses
import weakref
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count

from giantdet.architectures import Architecture, build_model, total_loss
from giantdet.config.classes import Classes
from giantdet.config.load import RunConfig
from giantdet.config.resolved import ResolvedRun
from giantdet.data.blank import empty_batch
from giantdet.engine.zero import weight_dtype
from giantdet.errors import InputError
from giantdet.layers.deferred import deferred_init
from giantdet.structures import Batch


def _attention(query: Any, key: Any, value: Any, *_: Any, **__: Any) -> int:
    return int(sdpa_flop_count(query, key, value))


def _attention_backward(gradient: Any, query: Any, key: Any, value: Any, *_: Any, **__: Any) -> int:
    return int(sdpa_backward_flop_count(gradient, query, key, value))


# PyTorch's counter knows the fused attention of GPUs; that of CPUs is missing in some versions (2.14.1).
_ATTENTION_ON_CPUS = {
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _attention,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: _attention_backward,
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
    with FakeTensorMode(allow_non_fake_inputs=True):
        # On the CPU, because attention is a fused kernel there, as on GPUs, but not on the meta device.
        model = model.to_empty(device="cpu")
        batch = empty_batch(run.giantdet.data, micro_batch, model.targets)
        for parameter in model.parameters():
            if parameter.requires_grad:  # ZeRO reduces each gradient and frees it as soon as it is complete
                parameter.register_post_accumulate_grad_hook(_drop_gradient)
        with FlopCounterMode(display=False, custom_mapping=_ATTENTION_ON_CPUS) as flops:
            loss = _loss(model, batch)
            forward = flops.get_total_flops()
            loss.backward()
        # A pass of its own: the FLOP counter keeps references to the tensors of recomputed blocks.
        with _Live([*model.parameters(), *model.buffers(), *tree_leaves(batch)]) as live:
            _loss(model, batch).backward()
    return Count(forward, flops.get_total_flops() - forward, live.peak)


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


class _Live(TorchDispatchMode):
    """Tracks the total size of the storages that operations allocate and that still exist, and its peak."""

    def __init__(self, known: list[Any]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.now = self.peak = 0
        self.known: weakref.WeakSet[Any] = weakref.WeakSet()
        self.kept = [t.untyped_storage() for t in known if isinstance(t, Tensor)]
        self.known.update(self.kept)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
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
