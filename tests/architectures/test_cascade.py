"""Cascade Mask R-CNN against detectron2's own model, and tests of what no golden model covers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from golden import BOX_HEAD, RCNN, build, golden_step, in_double, load
from golden_compare import as_golden, assert_same_detections, assert_same_proposals, assert_same_step
from test_detector import build as small
from test_detector import dataset, emptied, step  # noqa: F401
from test_detector import load as demo
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils._pytree import tree_flatten

from giantdet.architectures import total_loss
from giantdet.architectures.cascade_mask_rcnn import CascadeMaskRcnn, refined_rois
from giantdet.data.coco import CocoDataset
from giantdet.layers.common import scale_gradient
from giantdet.structures import Batch

STAGES = 3


@pytest.fixture(scope="module")
def model(golden: Path) -> CascadeMaskRcnn:
    raw = {**RCNN, "type": "cascade_mask_rcnn", "box_head": {**BOX_HEAD, "score_threshold": 0.25}}
    built = build(golden, "cascade", raw)
    assert isinstance(built, CascadeMaskRcnn)
    return built


@pytest.fixture(scope="module")
def arrays(golden: Path) -> Any:
    return np.load(golden / "cascade_A.npz")


class Stages:
    """Records the inputs and outputs of a model's box heads."""

    def __init__(self, model: CascadeMaskRcnn, monkeypatch: pytest.MonkeyPatch) -> None:
        self.boxes: list[Tensor] = []
        self.logits: list[Tensor] = []
        self.deltas: list[Tensor] = []
        run = model.stage

        def record(number: int, levels: list[Tensor], boxes_BR4: Tensor) -> tuple[Tensor, Tensor]:
            assert number == len(self.boxes)
            logits, deltas = run(number, levels, boxes_BR4)
            shape = boxes_BR4.shape[:2]
            self.boxes.append(boxes_BR4)
            self.logits.append(logits.reshape(*shape, -1))
            self.deltas.append(deltas.reshape(*shape, -1))
            return logits, deltas

        monkeypatch.setattr(model, "stage", record)


def test_proposals(model: CascadeMaskRcnn, golden: Path, arrays: Any) -> None:
    assert_same_proposals(model, load(golden), arrays)


@torch.no_grad()
def test_detections_and_stages(
    model: CascadeMaskRcnn, golden: Path, arrays: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    batch, stages = load(golden), Stages(model, monkeypatch)
    found = model.eval()(batch).detections
    assert_same_detections(found, batch, arrays)
    for i in range(2):
        theirs = torch.from_numpy(arrays[f"stage0.{i}.boxes_in"])
        index_N = torch.cdist(theirs, stages.boxes[0][i], p=torch.inf).argmin(1)
        for k in range(STAGES):
            for ours, name, atol in (
                (stages.boxes[k], "boxes_in", 1e-2),
                (stages.logits[k], "logits", 2e-3),
                (stages.deltas[k], "deltas", 5e-4),
            ):
                wanted = torch.from_numpy(arrays[f"stage{k}.{i}.{name}"])
                torch.testing.assert_close(ours[i][index_N], wanted, atol=atol, rtol=1e-4)


@pytest.mark.parametrize("empty", [(), (1,)])
def test_losses_and_gradients(model: CascadeMaskRcnn, golden: Path, empty: tuple[int, ...]) -> None:
    expected = golden_step(golden, "cascade", empty)
    batch = load(golden, *empty)
    model = in_double(model).train()
    predictions = model(batch)
    counts = {name: float(count) for name, count in model.counts(predictions).items()}
    wanted = expected.counts
    assert counts["rpn_positive"] == wanted["rpn/num_pos_anchors"]
    for k, prefix in enumerate(("", "stage1/", "stage2/")):
        sampled = float(predictions.stages[k].valid_BR.sum()) / 2
        assert counts[f"roi_positive_stage{k}"] == wanted[f"{prefix}roi_head/num_fg_samples"]
        assert sampled - counts[f"roi_positive_stage{k}"] == wanted[f"{prefix}roi_head/num_bg_samples"]
    assert counts["mask_slots_used"] == counts["roi_positive_stage0"]
    losses = as_golden(model.losses(predictions, batch), predictions.rpn.valid_BR.shape[1])
    # detectron2's own float32 rounds single parameters by 3e-4.
    assert_same_step(model, losses, expected, parameter_rel=5e-4)


def test_a_batch_without_objects_has_clean_gradients(model: CascadeMaskRcnn, golden: Path) -> None:
    batch = load(golden, 0, 1)
    model.train().zero_grad()
    predictions = model(batch)
    losses = model.losses(predictions, batch)
    for name, loss in losses.items():
        assert (loss > 0) == ("cls" in name), name
    total_loss(losses).backward()  # type: ignore[no-untyped-call]
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None and parameter.grad.isfinite().all(), name
    assert all(t.isfinite().all() for t in tree_flatten(predictions)[0] if t is not None)


def test_boxes_without_area_are_dropped_in_training() -> None:
    """A stage's boxes are clipped; those without area, or not finite, are no RoIs of the next stage."""
    boxes_B54 = torch.tensor(
        [[[1, 2, 30, 40], [-9, -9, -1, 5], [70, 1, 90, 9], [5, 5, 99, 99], [torch.nan, 0, 9, 9]]]
    )
    valid_B5 = torch.tensor([[True, True, True, True, True]])
    rois_B54, kept_B5 = refined_rois(boxes_B54.requires_grad_(), valid_B5, torch.tensor([[50.0, 60.0]]))
    assert kept_B5.tolist() == [[True, False, False, True, False]]
    assert rois_B54[0, 0].tolist() == [1, 2, 30, 40] and rois_B54[0, 3].tolist() == [5, 5, 60, 50]
    assert not rois_B54[~kept_B5].any() and not rois_B54.requires_grad
    assert not refined_rois(boxes_B54, ~valid_B5, torch.tensor([[50.0, 60.0]]))[1].any()


def test_scale_gradient() -> None:
    x = torch.randn(5, requires_grad=True)
    y = scale_gradient(x, 0.25)
    assert torch.equal(x, y)
    y.sum().backward()
    assert x.grad is not None and torch.equal(x.grad, torch.full((5,), 0.25))


@pytest.mark.parametrize("loss", ["smooth_l1", "giou", "diou", "ciou"])
@pytest.mark.parametrize("gone", [(), (0, 1)])
def test_every_parameter_gets_a_finite_gradient(
    dataset: CocoDataset,  # noqa: F811
    gone: tuple[int, ...],
    loss: str,
) -> None:
    detector = small(kind="cascade_mask_rcnn", box_head={"loss": loss})
    losses = step(detector, emptied(demo(dataset), *gone))
    assert all(value.isfinite() for value in losses.values())
    for name, parameter in detector.named_parameters():
        assert parameter.grad is not None and parameter.grad.isfinite().all(), name
    for k in range(STAGES):
        assert bool(losses[f"loss_box_reg_stage{k}"]) == (not gone)
        assert losses[f"loss_cls_stage{k}"] > 0


def test_without_masks(dataset: CocoDataset) -> None:  # noqa: F811
    detector, batch = small(kind="cascade_mask_rcnn", mask_head={"enabled": False}), demo(dataset)
    assert detector.targets == {"boxes"} and detector.tasks == ("box",)
    assert "loss_mask" not in step(detector, batch)
    with torch.no_grad():
        found = detector.eval()(batch).detections
    assert found.masks_BDSS is None and found.valid_BD.any()


def test_compiles_to_one_graph(dataset: CocoDataset) -> None:  # noqa: F811
    """Forward and losses compile without a graph break; the same graph handles images without objects.

    test_challenge_model.py covers the conventions of detectron2 and CIoU.
    """
    torch._dynamo.reset()
    detector = small(kind="cascade_mask_rcnn", norm="frozen", conventions="mmdetection").train()
    counter = CompileCounterWithBackend("eager")

    def losses_of(batch: Batch) -> dict[str, Tensor]:
        found: dict[str, Tensor] = detector.losses(detector(batch), batch)
        return found

    compiled = torch.compile(losses_of, backend=counter, fullgraph=True, dynamic=False)
    batch, gradients = demo(dataset), []
    for given in (batch, emptied(batch, 0, 1)):
        for run in (compiled, losses_of):
            detector.zero_grad()
            losses = run(given)
            total_loss(losses).backward()  # type: ignore[no-untyped-call]
            gradients.append({name: p.grad for name, p in detector.named_parameters()})
            gradients[-1] |= {name: loss.detach() for name, loss in losses.items()}
        for name, expected in gradients[-1].items():
            torch.testing.assert_close(gradients[-2][name], expected, atol=1e-5, rtol=1e-5, msg=name)
    assert counter.frame_count == 1
    torch._dynamo.reset()
