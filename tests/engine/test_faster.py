"""Faster training passes: what they refuse, compiled against eager, and the requirements of a CUDA graph."""

from __future__ import annotations

import copy
import functools
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import MODELS, tiny_run
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only

from giantdet.architectures import Architecture, build_model, total_loss
from giantdet.config.load import parse_run
from giantdet.config.resolve import resolve
from giantdet.config.resolved import ResolvedRun
from giantdet.data.dataset import Dataset, open_dataset
from giantdet.data.loader import train_loader
from giantdet.engine.faster import compile_training
from giantdet.errors import ConfigError
from giantdet.ops import shapes
from giantdet.structures import IGNORE, Batch


def run_of(
    data: Path, kind: str = "mask_rcnn", has_gpu: bool = True, **changes: Any
) -> tuple[ResolvedRun, Dataset]:
    run = parse_run(tiny_run(data, data, kind, **changes))
    assert run.giantdet.data.train is not None
    dataset = open_dataset(run.giantdet.data.train)
    return resolve(run, 1, len(dataset), dataset.classes, has_gpu=has_gpu), dataset


def model_and_batches(data: Path, kind: str, **changes: Any) -> tuple[Architecture, list[Batch]]:
    """A model, two batches of its data set, and the first batch without objects and labelled pixels."""
    run, dataset = run_of(data, kind, **changes)
    torch.manual_seed(0)
    model = build_model(run.giantdet.model, run.giantdet.data.size, run.giantdet.norm).train()
    loader = train_loader(dataset, run.giantdet.data, 2, seed=3, targets=model.targets)
    batches = [next(loader), next(loader)]
    targets = batches[0].targets
    nothing = targets._make(map(torch.zeros_like, targets))
    nothing = nothing._replace(semantic_BHW=torch.full_like(targets.semantic_BHW, IGNORE))
    return model, [*batches, batches[0]._replace(targets=nothing)]


GRAPH = {"giantdet__train__cuda_graph": True}
REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "compile at ZeRO-3": (
        {"giantdet__train__compile": True, "zero_optimization__stage": 3},
        r"giantdet.train.compile needs all weights in place.*stage is 3; take stage 2, or .*compile_blocks",
    ),
    "graph at ZeRO-3": (
        {**GRAPH, "zero_optimization__stage": 3},
        r"giantdet.train.cuda_graph needs all weights in place.*stage is 3; take stage 2",
    ),
    "graph with CGBN": (
        {**GRAPH, "giantdet__norm": {"type": "cgbn", "bn_size": 2}},
        r"giantdet.train.cuda_graph does not work with giantdet.norm.type cgbn; switch one off",
    ),
    "graph with CGBN in a part": (
        {
            **GRAPH,
            "giantdet__norm": {"type": "frozen", "heads": {"type": "cgbn", "bn_size": 2}},
            "giantdet__model__box_head": {**MODELS["mask_rcnn"]["box_head"], "convs": 1, "norm": "batch"},
        },
        r"giantdet.train.cuda_graph does not work with giantdet.norm.type cgbn; switch one off",
    ),
    "graph with recomputed blocks": (
        {**GRAPH, "giantdet__model__backbone__checkpoint_blocks": 2},
        r"giantdet.train.cuda_graph does not work with giantdet.model.backbone.checkpoint_blocks; switch",
    ),
    "graph with recomputed heads": (
        {**GRAPH, "giantdet__model__checkpoint_heads": True},
        r"giantdet.train.cuda_graph does not work with giantdet.model.checkpoint_heads; switch one off",
    ),
}


@pytest.mark.parametrize("what", REFUSED)
def test_refused(demo_data: Path, what: str) -> None:
    changes, message = REFUSED[what]
    with pytest.raises(ConfigError, match=message):
        run_of(demo_data, **changes)


def test_a_graph_needs_a_gpu(demo_data: Path) -> None:
    with pytest.raises(ConfigError, match="cuda_graph needs an NVIDIA GPU, and this machine has none"):
        run_of(demo_data, has_gpu=False, **GRAPH)


@pytest.mark.parametrize(
    "changes",
    [
        {**GRAPH, "giantdet__train__compile": True, "zero_optimization__stage": 2},
        {"giantdet__train__compile": True, "giantdet__model__checkpoint_heads": True},
        {"giantdet__train__compile": True, "giantdet__norm": {"type": "cgbn", "bn_size": 2}},
        {"giantdet__model__checkpoint_heads": True, "zero_optimization__stage": 3},
    ],
)
def test_accepted(demo_data: Path, changes: dict[str, Any]) -> None:
    run, _ = run_of(demo_data, **changes)
    assert run.giantdet.train.cuda_graph == (GRAPH.items() <= changes.items())


def test_compiled_pass_equals_eager(demo_data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One graph gives equal losses, gradients and running statistics, with and without objects.

    Inductor takes minutes to compile this model; AOTAutograd, which splits the pass into forward and backward
    functions, takes seconds.
    """
    torch._dynamo.reset()
    eager, batches = model_and_batches(demo_data, "mask_rcnn")
    compiled, counter = copy.deepcopy(eager), CompileCounterWithBackend("aot_eager")
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend=counter))
    compile_training(compiled)
    for batch in batches:
        losses = []
        for model in (eager, compiled):
            model.zero_grad()
            losses.append(model.losses(model(batch), batch))
            total_loss(losses[-1]).backward()  # type: ignore[no-untyped-call]
        for name, loss in losses[0].items():
            torch.testing.assert_close(losses[1][name], loss, rtol=1e-5, atol=1e-6, msg=name)
        for (name, a), b in zip(compiled.named_parameters(), eager.parameters(), strict=True):
            assert a.grad is not None and b.grad is not None, name
            torch.testing.assert_close(a.grad, b.grad, rtol=1e-3, atol=1e-6, msg=name)
    for (name, a), b in zip(compiled.named_buffers(), eager.buffers(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6, msg=name)
    assert counter.frame_count == 1
    with torch.no_grad():  # evaluation is not compiled
        compiled.eval()(batches[0])
    assert counter.frame_count == 1
    torch._dynamo.reset()


class Calls(TorchDispatchMode):
    """Records each operator with everything that a CUDA graph keeps of it: all but the tensors' contents."""

    def __init__(self) -> None:
        super().__init__()
        self.made: list[tuple[str, str]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        # Without the tensors' contents, but with the scalar arguments.
        kept = tree_map_only(Tensor, lambda t: (tuple(t.shape), t.stride(), t.dtype), (args, kwargs, out))
        self.made.append((str(func), str(kept)))
        return out


@pytest.mark.parametrize("kind", MODELS)
def test_all_steps_run_the_same_operators(
    demo_data: Path, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Shapes and scalars are also the same for all images: the first step's graph fits all others."""
    monkeypatch.setattr(shapes, "ENABLED", False)  # as on a GPU
    model, batches = model_and_batches(demo_data, kind)
    assert not torch.equal(batches[0].images_B3HW, batches[1].images_B3HW)
    traces = []
    for batch in batches:
        model.zero_grad()
        with Calls() as calls:
            total_loss(model.losses(model(batch), batch)).backward()  # type: ignore[no-untyped-call]
        traces.append(calls.made)
    assert len(traces[0]) > 300
    for other in traces[1:]:
        assert len(other) == len(traces[0])
        for mine, expected in zip(other, traces[0], strict=True):
            assert mine == expected
