"""Every recipe on a GPU that is not there: training and evaluation on fake CUDA tensors.

Fake tensors have shapes, types and a device, but no content. An operator whose operands are on different
devices or have types that do not fit raises as on a GPU, and so does reading a value on the host and a shape
that depends on data. The Triton operators are represented by their fakes: their kernels need a GPU
(`scripts/qualify_gpu.py`).

The backward pass is not run: without a CUDA driver the autograd engine refuses CUDA tensors, fake ones too,
and so does tracing a joint graph. The calls of the batch norms over several ranks, which choose other kernels
on a GPU, are made one by one.
"""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Callable
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
from giantdet.layers.cgbn import _Normalise
from giantdet.layers.deferred import deferred_init
from giantdet.ops import triton_kernels
from giantdet.tools.count import with_assumed_classes

REPO = Path(__file__).resolve().parents[1]
IMAGES = 2
# Two blocks of each kind instead of dozens: in ViTDet every fourth part of the backbone ends with global
# attention, and in Swin shifted windows alternate with others.
FEWER_BLOCKS: dict[str, dict[str, Any]] = {
    "vit": {"depth": 8},
    "eva": {"depth": 8},
    "swin": {"depths": [2, 2, 2, 2]},
    "convnext": {"depths": [2, 2, 2, 2]},
}


def recipes() -> dict[str, ResolvedRun]:
    """The recipes of distinct models, by name: those of one model in several batch sizes are one."""
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


# Fake tensors accept operands of several types where a GPU's kernels raise.
ONE_TYPE = {"mm", "addmm", "bmm", "baddbmm", "linear", "convolution"}


class Strict(TorchDispatchMode):
    """Raises RuntimeError for operators on several devices, which are copies, and on types that do not fit.

    The host waits for a copy: only one from pinned memory does not, and nothing in a model is there.
    """

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        operands = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        everything = [*operands, *(leaf for leaf in tree_leaves(out) if isinstance(leaf, Tensor))]
        if len({tensor.device.type for tensor in everything}) > 1:
            raise RuntimeError(f"{func} copies between devices")
        if func._schema.name.removeprefix("aten::") in ONE_TYPE and len({t.dtype for t in operands}) > 1:
            raise RuntimeError(f"{func} of {[t.dtype for t in operands]}")
        return out


def built(run: ResolvedRun) -> Architecture:
    """The run's model on the meta device, with the types of weights and buffers under DeepSpeed's engine."""
    config, dtype = run.giantdet, weight_dtype(run)
    with deferred_init():
        model = build_model(config.model, config.data.size, config.norm, IMAGES)
    model = model.to("meta")
    cast_buffers(model, dtype)
    for parameter in model.parameters():  # DeepSpeed casts these alone
        parameter.data = parameter.data.to(dtype)
    return model


def shortened(run: ResolvedRun) -> ResolvedRun:
    """The run with fewer blocks in its backbone."""
    giantdet = run.giantdet
    backbone = giantdet.model.backbone
    fewer = FEWER_BLOCKS.get(re.split("[0-9_]", backbone.name)[0], {})
    backbone = backbone.model_copy(update={"timm_args": {**backbone.timm_args, **fewer}})
    model = giantdet.model.model_copy(update={"backbone": backbone})
    return dataclasses.replace(run, giantdet=giantdet.model_copy(update={"model": model}))


@pytest.mark.parametrize("name", RECIPES)
def test_recipe(name: str) -> None:
    run = shortened(RECIPES[name])
    model = built(run)
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        model = model.to_empty(device="cuda").train()
        batch = empty_batch(run.giantdet.data, IMAGES, model.targets).to("cuda")
        mode.allow_non_fake_inputs = False  # a tensor that did not move with the model would be on the CPU
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
def test_the_dry_run_finds(what: str) -> None:
    with FakeTensorMode(), Strict():
        x = torch.empty(3, 3, device="cuda")
        with pytest.raises(RuntimeError):
            FORBIDDEN[what](x)
