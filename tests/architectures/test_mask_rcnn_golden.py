"""Mask R-CNN against detectron2's own model: the same weights, the same answers, losses and gradients."""

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
    assert_same_gradient_of_each_parameter,
    assert_same_gradients,
    assert_same_proposals,
    build,
    load,
)

from giantdet.architectures import total_loss
from giantdet.architectures.mask_rcnn import MaskRcnn


@pytest.fixture(scope="module")
def model(golden: Path) -> MaskRcnn:
    raw = {**RCNN, "type": "mask_rcnn", "box_head": {**BOX_HEAD, "score_threshold": 0.2}}
    built = build(golden, "mask_rcnn", raw)
    assert isinstance(built, MaskRcnn)
    return built


@pytest.fixture(scope="module")
def arrays(golden: Path) -> Any:
    return np.load(golden / "mask_rcnn_A.npz")


@torch.no_grad()
def test_proposals_and_box_head(model: MaskRcnn, golden: Path, arrays: Any) -> None:
    model.eval()
    batch = load(golden)
    levels = model.pyramid(batch)
    proposals, _ = model.rpn(levels, batch.sizes_B2, None, batch.seeds_B)
    assert proposals.valid_BN.all()
    logits, deltas = model.box_head(model.pool(levels, proposals.boxes_BN4, 7, 0))
    for i in range(2):
        index_N = assert_same_proposals(
            proposals.boxes_BN4[i], proposals.scores_BN[i], arrays, f"proposals.{i}"
        )
        for ours, name in ((logits, "logits"), (deltas.flatten(1), "deltas")):
            theirs = torch.from_numpy(arrays[f"roi.{i}.{name}"])
            torch.testing.assert_close(ours.view(2, 100, -1)[i][index_N], theirs, atol=1e-3, rtol=1e-4)


@torch.no_grad()
def test_proposals_in_training(model: MaskRcnn, golden: Path, arrays: Any) -> None:
    batch = load(golden)
    model.train()
    proposals, _ = model.rpn(model.pyramid(batch), batch.sizes_B2, None, batch.seeds_B)
    for i in range(2):
        assert_same_proposals(proposals.boxes_BN4[i], proposals.scores_BN[i], arrays, f"train_proposals.{i}")


@torch.no_grad()
def test_detections_and_masks(model: MaskRcnn, golden: Path, arrays: Any) -> None:
    batch = load(golden)
    found = model.eval()(batch).detections
    assert_same_detections(found, batch, arrays)


@pytest.mark.parametrize("empty", [(), (1,)])
def test_losses_and_gradients(model: MaskRcnn, golden: Path, empty: tuple[int, ...]) -> None:
    expected = json.loads((golden / "mask_rcnn_A.json").read_text())
    norms = expected["grad_norms"]
    if empty:
        expected = expected["second_image_without_objects"]
        norms = {"total": expected["grad_norms_total"]}
    batch = load(golden, *empty)
    predictions = model.train()(batch)
    counts = {name: float(count) for name, count in model.counts(predictions).items()}
    assert counts["rpn_positive"] == expected["counts"]["rpn/num_pos_anchors"]
    assert counts["roi_positive"] == expected["counts"]["roi_head/num_fg_samples"]
    assert counts["mask_slots_used"] == counts["roi_positive"]
    losses = as_golden(model.losses(predictions, batch), predictions.rpn.valid_BR.shape[1])
    assert {name: float(loss) for name, loss in losses.items()} == pytest.approx(expected["losses"], rel=1e-4)
    for name, wanted in norms.items():
        loss = total_loss(losses) if name == "total" else losses[name]
        assert_same_gradients(model, loss, wanted, rel=1e-4)
    if not empty:  # the last one was the total
        assert_same_gradient_of_each_parameter(model, expected["grad_norm_per_parameter"], rel=1e-4)
