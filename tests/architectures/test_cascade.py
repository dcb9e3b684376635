"""Cascade Mask R-CNN against detectron2's own model, and what no golden model has."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from golden import (
    BOX_HEAD,
    RCNN,
    as_golden,
    assert_same_detections,
    assert_same_gradients,
    assert_same_proposals,
    build,
    load,
)
from torch import Tensor
from torch.utils._pytree import tree_flatten

from giantdet.architectures import total_loss
from giantdet.architectures.cascade_mask_rcnn import CascadeMaskRcnn

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
    """What goes into the box heads of a model and what comes out of them."""

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


@torch.no_grad()
def test_proposals(model: CascadeMaskRcnn, golden: Path, arrays: Any) -> None:
    batch = load(golden)
    for training, name in ((False, "proposals"), (True, "train_proposals")):
        model.train(training)
        proposals, _ = model.rpn(model.pyramid(batch), batch.sizes_B2, None, batch.seeds_B)
        assert proposals.valid_BN.all()
        for i in range(2):
            assert_same_proposals(proposals.boxes_BN4[i], proposals.scores_BN[i], arrays, f"{name}.{i}")


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
    expected = json.loads((golden / "cascade_A.json").read_text())
    norms = expected["grad_norms"]
    if empty:
        expected = expected["second_image_without_objects"]
        norms = {"total": expected["grad_norms_total"]}
    batch = load(golden, *empty)
    predictions = model.train()(batch)
    counts = {name: float(count) for name, count in model.counts(predictions).items()}
    wanted = expected["counts"]
    assert counts["rpn_positive"] == wanted["rpn/num_pos_anchors"]
    for k, prefix in enumerate(("", "stage1/", "stage2/")):
        sampled = float(predictions.stages[k].valid_BR.sum()) / 2
        assert counts[f"roi_positive_stage{k}"] == wanted[f"{prefix}roi_head/num_fg_samples"]
        assert sampled - counts[f"roi_positive_stage{k}"] == wanted[f"{prefix}roi_head/num_bg_samples"]
    assert counts["mask_slots_used"] == counts["roi_positive_stage0"]
    losses = as_golden(model.losses(predictions, batch), predictions.rpn.valid_BR.shape[1])
    assert {name: float(loss) for name, loss in losses.items()} == pytest.approx(expected["losses"], rel=1e-4)
    for name, modules in norms.items():
        loss = total_loss(losses) if name == "total" else losses[name]
        assert_same_gradients(model, loss, modules, rel=1e-3)


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
    assert all(t.isfinite().all() for t in tree_flatten(predictions)[0])
