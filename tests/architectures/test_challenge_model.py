"""OHEM, large kernels, context and a semantic branch in one model: one graph, recomputation, counts."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from test_every_architecture import build, losses_and_gradients, run_of
from tiny import MODELS
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils.flop_counter import FlopCounterMode

from giantdet.architectures import total_loss
from giantdet.engine.faster import _Flat
from giantdet.structures import IGNORE, Batch
from giantdet.tools.count import count


def section(kind: str) -> dict[str, Any]:
    model = MODELS[kind]
    return {
        **model,
        "fpn": {"channels": 16, "large_kernel": {"width": 8}, "context": {}},
        "box_head": {**model["box_head"], "sampling": {"type": "ohem"}},
        "semantic_branch": {"enabled": True, "convs": 1, "width": 16, "norm": "batch", "embed": True},
    }


def test_compiles_to_one_graph(demo_data: Path) -> None:
    """Forward pass and losses, with and without objects."""
    torch._dynamo.reset()
    changes = {"giantdet__norm": {"type": "frozen"}, "giantdet__model": section("cascade_mask_rcnn")}
    changes["giantdet__model"]["box_head"]["loss"] = "ciou"
    changes["giantdet__model"]["semantic_branch"]["norm"] = "group"
    changes["giantdet__model"]["semantic_branch"]["width"] = 32
    changes["giantdet__model"]["fpn"]["channels"] = 32
    run, batch = run_of(demo_data, "cascade_mask_rcnn", **changes)
    model, counter = build(run), CompileCounterWithBackend("eager")
    state = copy.deepcopy(model.state_dict())

    def losses_of(given: Batch) -> dict[str, Tensor]:
        return model.losses(model(given), given)

    compiled = torch.compile(losses_of, backend=counter, fullgraph=True, dynamic=False)
    nothing = batch.targets._replace(
        valid_BM=torch.zeros_like(batch.targets.valid_BM),
        semantic_BHW=torch.full_like(batch.targets.semantic_BHW, IGNORE),
    )
    for given in (batch, batch._replace(targets=nothing)):
        mine = compiled(given)
        model.load_state_dict(state)
        for name, loss in losses_of(given).items():
            torch.testing.assert_close(mine[name], loss, atol=1e-5, rtol=1e-5, msg=name)
    assert counter.frame_count == 1
    torch._dynamo.reset()


@pytest.mark.parametrize("kind", ["mask_rcnn", "cascade_mask_rcnn"])
def test_recomputation_changes_nothing(demo_data: Path, kind: str) -> None:
    """Losses, gradients and running statistics, with a batch norm in the box head that OHEM runs twice."""
    own = section(kind)
    own["box_head"] = {**own["box_head"], "convs": 1, "norm": "batch"}
    run, batch = run_of(demo_data, kind, giantdet__model=own)
    losses, tensors, _ = losses_and_gradients(run, batch)
    again = run_of(demo_data, kind, giantdet__model={**own, "checkpoint_heads": True})[0]
    mine, found, _ = losses_and_gradients(again, batch)
    assert mine == pytest.approx(losses, rel=1e-6) and found.keys() == tensors.keys()
    for key, tensor in tensors.items():
        torch.testing.assert_close(found[key], tensor, rtol=1e-4, atol=1e-6, msg=key)


@pytest.mark.parametrize("changes", [{}, {"mask_head": {"enabled": False}}, section("mask_rcnn")])
def test_flat_pass_of_cuda_graphs(demo_data: Path, changes: dict[str, Any]) -> None:
    """The flat pass takes and returns tensors: same predictions and same structure, whatever the heads."""
    run, batch = run_of(demo_data, "mask_rcnn", giantdet__model={**MODELS["mask_rcnn"], **changes})
    losses, model = {}, build(run)
    state = copy.deepcopy(model.state_dict())
    flat = _Flat(model, batch)
    assert all(isinstance(tensor, Tensor) for tensor in flat(*flat.tensors_of(batch)))
    for name, predict in (("flat", flat.predictions), ("plain", model.predict)):
        model.load_state_dict(state)
        predictions = predict(batch)
        losses[name] = {key: float(loss.detach()) for key, loss in model.losses(predictions, batch).items()}
    assert losses["flat"] == losses["plain"]


def test_plan_counts_the_parts(demo_data: Path) -> None:
    """FLOPs equal those of a real step; each part adds some, OHEM to the forward pass only."""
    kind = "mask_rcnn"
    run, batch = run_of(demo_data, kind, giantdet__model=section(kind))
    model = build(run)
    with FlopCounterMode(display=False) as flops:
        loss = total_loss(model.losses(model(batch), batch))
        forward = flops.get_total_flops()
        loss.backward()  # type: ignore[no-untyped-call]
    counted = count(run, 2)
    assert (counted.forward, counted.backward) == (forward, flops.get_total_flops() - forward)
    for part in ("box_head", "semantic_branch"):
        without = section(kind) | {part: MODELS[kind].get(part, {})}
        less = count(run_of(demo_data, kind, giantdet__model=without)[0], 2)
        assert less.forward < counted.forward
        assert (less.backward == counted.backward) == (part == "box_head")
