"""Every recipe on a GPU that does not exist: training and evaluation on fake CUDA tensors.

Fake tensors have shapes, types and a device, but no content. An operator whose operands are on different
devices or have incompatible types raises as on a GPU, and so does reading a value on the host or a
data-dependent shape. The Triton operators are represented by their fakes: their kernels need a GPU
(`scripts/qualify_gpu.py`).

The backward pass is not run: without a CUDA driver the autograd engine refuses CUDA tensors, including fake
ones, and so does tracing a joint graph. (A graph traced on the CPU contains the CPU's kernels: replayed on
fake CUDA tensors it says nothing about the GPU's.) The backward functions of giantdet's own GPU operators are
called directly.
"""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Callable, Iterable, ValuesView
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch._subclasses import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from giantdet.architectures import Architecture, build_model
from giantdet.config.load import load_run
from giantdet.config.resolve import resolve
from giantdet.config.resolved import ResolvedRun
from giantdet.data.blank import empty_batch
from giantdet.engine.zero import cast_buffers, weight_dtype
from giantdet.layers import cgbn
from giantdet.layers.deferred import deferred_init
from giantdet.ops import triton_kernels
from giantdet.tools.count import with_assumed_classes

REPO = Path(__file__).resolve().parents[1]
IMAGES = 2
# Two blocks of each kind instead of dozens: in ViTDet every quarter of the backbone ends with global
# attention, and in Swin shifted windows alternate with others.
FEWER_BLOCKS: dict[str, dict[str, Any]] = {
    "vit": {"depth": 8},
    "eva": {"depth": 8},
    "swin": {"depths": [2, 2, 2, 2]},
    "convnext": {"depths": [2, 2, 2, 2]},
}


def recipes() -> dict[str, ResolvedRun]:
    """The recipes of distinct models, by name: recipes that differ only in batch size count once."""
    found: dict[str, tuple[str, ResolvedRun]] = {}
    for path in sorted((REPO / "ds_configs").glob("*.json")):
        run = resolve(with_assumed_classes(load_run(path)), 1, 10**6)
        model, norm, data = run.giantdet.model, run.giantdet.norm, run.giantdet.data
        kinds = {part: config.type for part, config in norm.parts().items()}
        found.setdefault(
            json.dumps([model.model_dump(mode="json"), kinds, data.size, run.precision]), (path.stem, run)
        )
    return dict(found.values())


RECIPES = recipes()


# Operators for which fake tensors accept operands of several types, but a GPU's kernels raise.
ONE_TYPE = {"mm", "addmm", "bmm", "baddbmm", "linear", "convolution"}


def tensors_in(values: Iterable[Any]) -> list[Tensor]:
    """Return the tensors of nested lists and tuples."""
    found: list[Tensor] = []
    for value in values:
        if isinstance(value, Tensor):
            found.append(value)
        elif isinstance(value, list | tuple | ValuesView):
            found += tensors_in(value)
    return found


class Strict(TorchDispatchMode):
    """Raises RuntimeError for operators across devices, which are copies, and on incompatible types.

    The host waits for a copy unless it is from pinned memory, and no tensor of a model is pinned.
    """

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        operands = tensors_in([args, (kwargs or {}).values()])
        if len({tensor.device.type for tensor in [*operands, *tensors_in([out])]}) > 1:
            raise RuntimeError(f"{func} copies between devices")
        if func._schema.name.removeprefix("aten::") in ONE_TYPE and len({t.dtype for t in operands}) > 1:
            raise RuntimeError(f"{func} of {[t.dtype for t in operands]}")
        return out


def built(run: ResolvedRun) -> Architecture:
    """Return the run's model on the meta device, with the dtypes that it has under DeepSpeed's engine."""
    config, dtype = run.giantdet, weight_dtype(run)
    with deferred_init():
        model = build_model(config.model, config.data.size, config.norm, IMAGES)
    model = model.to("meta")
    cast_buffers(model, dtype)
    for parameter in model.parameters():  # DeepSpeed casts only these
        parameter.data = parameter.data.to(dtype)
    return model


def shortened(run: ResolvedRun) -> ResolvedRun:
    """Return the run with fewer blocks in its backbone."""
    giantdet = run.giantdet
    backbone = giantdet.model.backbone
    fewer = FEWER_BLOCKS.get(re.split("[0-9_]", backbone.name)[0], {})
    changes: dict[str, Any] = {"timm_args": {**backbone.timm_args, **fewer}}
    if "depth" in fewer and isinstance(backbone.global_blocks, tuple):
        changes["global_blocks"] = (3, 7)
    backbone = backbone.model_copy(update=changes)
    model = giantdet.model.model_copy(update={"backbone": backbone})
    return dataclasses.replace(run, giantdet=giantdet.model_copy(update={"model": model}))


@pytest.mark.parametrize("name", RECIPES)
def test_recipe(name: str) -> None:
    run = shortened(RECIPES[name])
    model = built(run)
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        model = model.to_empty(device="cuda").train()
        batch = empty_batch(run.giantdet.data, IMAGES, model.targets).to("cuda")
        mode.allow_non_fake_inputs = False  # a tensor left on the CPU would not be fake
        with Strict():
            losses = model.losses(model(batch), batch)
            with torch.no_grad():
                outputs = model.eval()(batch)
    assert losses and all(loss.shape == () and loss.requires_grad for loss in losses.values())
    leaves = [leaf for leaf in tree_leaves(outputs) if leaf is not None]
    assert {leaf.dtype for leaf in leaves} <= {torch.float32, torch.int64, torch.bool}
    for tensor in [*losses.values(), *leaves]:
        assert tensor.device.type == "cuda"
    assert {loss.dtype for loss in losses.values()} == {torch.float32}


FORBIDDEN: dict[str, Callable[[Tensor], Any]] = {
    "read a value": lambda x: x.sum().item(),
    "branch on a value": lambda x: bool(x.any()),
    "select by a mask": lambda x: x[x > 0],
    "mix devices": lambda x: x + torch.ones(3),
    "mix types": lambda x: F.linear(x.bfloat16(), x),
    "upload a constant": lambda x: x * torch.tensor([1.0, 2.0, 3.0], device="cuda"),
    "download": lambda x: x.cpu(),
}


@pytest.mark.parametrize("what", FORBIDDEN)
def test_the_dry_run_detects(what: str) -> None:
    with FakeTensorMode(), Strict():
        x = torch.empty(3, 3, device="cuda")
        with pytest.raises(RuntimeError):
            FORBIDDEN[what](x)


class Context(SimpleNamespace):
    """Stores what an autograd function saves between its forward and backward pass."""

    def save_for_backward(self, *tensors: Tensor | None) -> None:
        self.saved_tensors = tensors

    def mark_non_differentiable(self, *tensors: Tensor) -> None:
        pass


class BatchNormKernels(Strict):
    """Stands in for PyTorch's CUDA kernels of batch norms, which have no fakes, and checks their operands.

    The dtypes and layouts are those that aten/src/ATen/native/cuda/Normalization.cu checks or assumes.
    """

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        answer = getattr(self, func._schema.name.removeprefix("aten::"), None)
        return super().__torch_dispatch__(func, types, args, kwargs) if answer is None else answer(*args)

    def batch_norm_stats(self, x: Tensor, eps: float) -> tuple[Tensor, Tensor]:
        assert x.numel() > 0
        return tuple(x.new_empty(x.shape[1], dtype=torch.float32) for _ in range(2))

    def batch_norm_update_stats(self, x: Tensor, mean: Tensor, var: Tensor, momentum: float) -> Any:
        self._assert_per_channel(x, mean, var)
        return self.batch_norm_stats(x, 0.0)

    def batch_norm_elemt(
        self, x: Tensor, weight: Tensor | None, bias: Tensor | None, mean: Tensor, invstd: Tensor, eps: float
    ) -> Tensor:
        self._assert_per_channel(x, weight, bias, mean, invstd)
        return torch.empty_like(x)

    def batch_norm_backward_reduce(
        self, dy: Tensor, x: Tensor, mean: Tensor, invstd: Tensor, weight: Tensor | None, *wanted: bool
    ) -> tuple[Tensor | None, ...]:
        assert (dy.dtype, dy.shape, dy.stride()) == (x.dtype, x.shape, x.stride())
        self._assert_per_channel(x, mean, invstd, weight)
        return tuple(torch.empty_like(mean) if each else None for each in (wanted[0], *wanted))

    def batch_norm_backward_elemt(
        self, dy: Tensor, x: Tensor, mean: Tensor, invstd: Tensor, weight: Tensor | None, *sums: Tensor
    ) -> Tensor:
        *sums_C, count = sums
        assert (dy.dtype, dy.shape, dy.stride()) == (x.dtype, x.shape, x.stride())
        assert len(sums_C) == 2
        self._assert_per_channel(x, mean, invstd, weight, *sums_C)
        assert count.dtype == torch.int32 and count.device == x.device
        return torch.empty_like(x)

    @staticmethod
    def _assert_per_channel(x: Tensor, *vectors: Tensor | None) -> None:
        for each in vectors:
            if each is not None:
                found = (each.dtype, each.shape, each.device, each.is_contiguous())
                assert found == (torch.float32, x.shape[1:2], x.device, True)


def merged(parts: Tensor, eps: float, moving: Any) -> tuple[Tensor, Tensor, Tensor]:
    """Stand in for the Triton kernel between the passes, with one rank and 8 channels."""
    assert (parts.dtype, parts.shape, parts.is_contiguous()) == (torch.float32, (1, 17), True)
    count = torch.empty(1, dtype=torch.int32, device=parts.device)
    return parts.new_empty(8), parts.new_empty(8), count


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("images", [2, 0])
def test_cgbn(
    images: int, layout: torch.memory_format, dtype: torch.dtype, fused: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Forward and backward over the ranks of a group, with and without Triton's kernel in between."""
    function: Any = cgbn._Normalise
    if fused:
        pytest.importorskip("triton")
        from giantdet.layers import cgbn_cuda

        function = cgbn_cuda.NormaliseOnGpu
        monkeypatch.setattr(cgbn_cuda, "merge", merged)
    with FakeTensorMode(), BatchNormKernels(), torch.no_grad():
        x = torch.empty(images, 8, 6, 10, device="cuda", dtype=dtype).contiguous(memory_format=layout)
        for weight, bias in ((torch.ones(8, device="cuda"), torch.zeros(8, device="cuda")), (None, None)):
            context = Context(needs_input_grad=(True, True, True))
            more = (None,) if fused else ()  # the running statistics
            answer = function.forward(context, x, weight, bias, 1e-5, None, *more)
            y, *statistics = [answer] if fused else answer
            # The gradient arrives in the layout of the next layer.
            dy = torch.empty(x.shape, device="cuda", dtype=dtype)
            dx, dweight, dbias, *rest = function.backward(context, dy)
            assert set(rest) == {None} and isinstance(dx, Tensor)
            for found in (y, dx):
                assert (found.shape, found.dtype, found.device) == (x.shape, x.dtype, x.device)
                assert images == 0 or found.is_contiguous(memory_format=layout)
            if not fused:
                assert [tuple(each.shape) for each in statistics] == [(8,), (8,), (1,)]
            for each in (*statistics, *([dweight, dbias] if weight is not None else [])):
                assert each is not None and (each.dtype, each.device) == (torch.float32, x.device)
            if weight is not None:
                assert dweight.shape == dbias.shape == (8,)
            else:
                assert dweight is dbias is None


@pytest.mark.skipif(not triton_kernels.INSTALLED, reason="needs Triton")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_roi_align(dtype: torch.dtype) -> None:
    """The Triton operator's backward uses what its forward saved, and returns the levels' gradients."""
    from giantdet.ops import roi_align_triton

    strides = [4.0, 8.0]
    with FakeTensorMode(), Strict(), torch.no_grad():
        levels = [torch.empty(2, 8, side, 2 * side, device="cuda", dtype=dtype) for side in (16, 8)]
        boxes_K4 = torch.empty(5, 4, device="cuda")
        batch_K = torch.empty(5, dtype=torch.int64, device="cuda")
        inputs = (levels, boxes_K4, batch_K, batch_K, strides, 7, 2, True)
        pooled = roi_align_triton.pool(*inputs)
        context = Context()
        roi_align_triton._setup_context(context, inputs, pooled)
        gradients, *rest = roi_align_triton._differentiate(context, torch.empty_like(pooled))
    assert rest == [None] * 7
    assert (pooled.shape, pooled.dtype, pooled.device.type) == ((5, 8, 7, 7), dtype, "cuda")
    for gradient, level in zip(gradients, levels, strict=True):
        assert (gradient.shape, gradient.dtype, gradient.device) == (level.shape, dtype, level.device)
