"""Checks of every architecture in one process: recomputation, one graph, and the counts of the plan."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import MODELS, tiny_run
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils.flop_counter import FlopCounterMode

from giantdet.architectures import Architecture, build_model, total_loss
from giantdet.config.load import parse_run
from giantdet.config.resolve import resolve
from giantdet.config.resolved import ResolvedRun
from giantdet.data.dataset import open_dataset
from giantdet.data.loader import train_loader
from giantdet.ops import shapes
from giantdet.structures import IGNORE, Batch
from giantdet.tools.count import COCO, count
from giantdet.tools.machines import MACHINES
from giantdet.tools.plan import make_plan, report


def run_of(data: Path, kind: str, **changes: Any) -> tuple[ResolvedRun, Batch]:
    """A resolved run of one architecture, and its first batch."""
    run = parse_run(tiny_run(data, data, kind, **changes))
    assert run.giantdet.data.train is not None
    dataset = open_dataset(run.giantdet.data.train)
    resolved = resolve(run, 1, len(dataset), dataset.classes, has_gpu=False)
    batch = next(train_loader(dataset, run.giantdet.data, 2, seed=3, targets=build(resolved).targets))
    return resolved, batch


def build(run: ResolvedRun) -> Architecture:
    torch.manual_seed(0)
    return build_model(run.giantdet.model, run.giantdet.data.size, run.giantdet.norm).train()


RECOMPUTED: dict[str, dict[str, Any]] = {
    "blocks": {"giantdet__model__backbone__checkpoint_blocks": True},
    "every second block": {"giantdet__model__backbone__checkpoint_blocks": 2},
    "heads": {"giantdet__model__checkpoint_heads": True},
}


def losses_and_gradients(run: ResolvedRun, batch: Batch) -> tuple[dict[str, Any], dict[str, Tensor], int]:
    """Return losses, gradients, and the bytes that the graph keeps for the backward pass."""
    kept = 0

    def hold(tensor: Tensor) -> Tensor:
        nonlocal kept
        kept += tensor.nbytes
        return tensor

    model = build(run)
    with torch.autograd.graph.saved_tensors_hooks(hold, lambda tensor: tensor):
        losses = model.losses(model(batch), batch)
        total = total_loss(losses)
    total.backward()  # type: ignore[no-untyped-call]
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    buffers = {name: buffer.clone() for name, buffer in model.named_buffers()}
    return {name: float(loss.detach()) for name, loss in losses.items()}, gradients | buffers, kept


@pytest.mark.parametrize("kind", MODELS)
def test_recomputation_changes_nothing_but_memory(demo_data: Path, kind: str) -> None:
    """Losses, gradients and running statistics are equal up to rounding."""
    run, batch = run_of(demo_data, kind)
    losses, tensors, kept = losses_and_gradients(run, batch)
    assert len(tensors) > 50 and all(tensor.isfinite().all() for tensor in tensors.values())
    for name, changes in RECOMPUTED.items():
        mine = losses_and_gradients(run_of(demo_data, kind, **changes)[0], batch)
        assert mine[0] == pytest.approx(losses, rel=1e-6), name
        assert mine[1].keys() == tensors.keys()
        for key, tensor in tensors.items():
            torch.testing.assert_close(mine[1][key], tensor, rtol=1e-4, atol=1e-6, msg=f"{name}: {key}")
        assert mine[2] < 0.97 * kept, name


# Tracing takes seconds: these are compiled in their own test files.
COMPILED_ELSEWHERE = ("mask_rcnn", "cascade_mask_rcnn", "semantic_fpn", "upernet")


@pytest.mark.parametrize("kind", [kind for kind in MODELS if kind not in COMPILED_ELSEWHERE])
def test_compiles_to_one_graph(demo_data: Path, kind: str) -> None:
    """Forward pass and losses, with and without objects and labelled pixels."""
    torch._dynamo.reset()
    run, batch = run_of(demo_data, kind, giantdet__norm={"type": "frozen"})
    model, counter = build(run), CompileCounterWithBackend("eager")
    state = copy.deepcopy(model.state_dict())

    def losses_of(given: Batch) -> dict[str, Tensor]:
        return model.losses(model(given), given)

    compiled = torch.compile(losses_of, backend=counter, fullgraph=True, dynamic=False)
    targets = batch.targets
    nothing = targets._replace(
        valid_BM=torch.zeros_like(targets.valid_BM),
        semantic_BHW=torch.full_like(targets.semantic_BHW, IGNORE),
    )
    for given in (batch, batch._replace(targets=nothing)):
        model.load_state_dict(state)  # RetinaNet's normalizer changes in each step
        mine = compiled(given)
        model.load_state_dict(state)
        for name, loss in losses_of(given).items():
            torch.testing.assert_close(mine[name], loss, atol=1e-5, rtol=1e-5, msg=name)
    assert counter.frame_count == 1
    torch._dynamo.reset()


@pytest.mark.parametrize("kind", MODELS)
def test_plan_counts_the_model(demo_data: Path, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Parameters of each part, and the FLOPs of a real step with real images, are as planned."""
    monkeypatch.setattr(shapes, "ENABLED", False)  # as on a GPU
    frozen = {"giantdet__model__backbone__frozen_stages": 2, "train_micro_batch_size_per_gpu": 2}
    run, batch = run_of(demo_data, kind, **frozen)
    model = build(run)
    with FlopCounterMode(display=False) as flops:
        loss = total_loss(model.losses(model(batch), batch))
        forward = flops.get_total_flops()
        loss.backward()  # type: ignore[no-untyped-call]
    counted = count(run, 2)
    assert (counted.forward, counted.backward) == (forward, flops.get_total_flops() - forward)
    assert counted.backward > 0.5 * forward > 0
    one = count(run, 1)  # works although a batch norm has a single value per channel
    assert 2 * one.forward == counted.forward and 2 * one.backward == counted.backward

    # Otherwise the plan would count again for every choice of recomputation.
    monkeypatch.setattr("giantdet.tools.plan.count", lambda run, images: counted)
    changed = parse_run(tiny_run(demo_data, demo_data, kind, **frozen))
    plan = make_plan(changed, 2, MACHINES["h100"], 1e9, 0.5, 12)
    assumed = run.giantdet.model.model_copy(
        update={key: len(getattr(COCO, which)) for key, which in run.giantdet.model.class_keys.items()}
    )
    built = build_model(assumed, run.giantdet.data.size, run.giantdet.norm)
    parameters = list(built.parameters())
    assert plan.parameters == sum(p.numel() for p in parameters)
    assert plan.trainable == sum(p.numel() for p in parameters if p.requires_grad) < plan.parameters
    rows = {line.split()[0]: line.split()[1:] for line in report(plan).splitlines() if line}
    for name, part in built.named_children():
        numbers = [sum(p.numel() for p in part.parameters() if every or p.requires_grad) for every in (1, 0)]
        assert rows[name] == [f"{number:,}" for number in numbers]
