"""Mask R-CNN against detectron2's own model: the same weights, the same answers, losses and gradients."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from golden import BOX_HEAD, RCNN, build, golden_step, load
from golden_compare import (
    as_golden,
    assert_same_detections,
    assert_same_proposals,
    assert_same_step,
    same_boxes,
)

from giantdet.architectures.mask_rcnn import MaskRcnn


@pytest.fixture(scope="module")
def model(golden: Path) -> MaskRcnn:
    raw = {**RCNN, "type": "mask_rcnn", "box_head": BOX_HEAD}
    built = build(golden, "mask_rcnn", raw)
    assert isinstance(built, MaskRcnn)
    return built


@pytest.fixture(scope="module")
def arrays(golden: Path) -> Any:
    return np.load(golden / "mask_rcnn_A.npz")


def test_proposals(model: MaskRcnn, golden: Path, arrays: Any) -> None:
    assert_same_proposals(model, load(golden), arrays)


@torch.no_grad()
def test_box_head(model: MaskRcnn, golden: Path, arrays: Any) -> None:
    batch = load(golden)
    levels = model.eval().pyramid(batch)
    proposals, _ = model.rpn(levels, batch.sizes_B2, None, batch.seeds_B)
    logits, deltas = model.box_head(model.pool(levels, proposals.boxes_BN4, 7, 0))
    for i in range(2):
        index_N = same_boxes(proposals.boxes_BN4[i], torch.from_numpy(arrays[f"proposals.{i}.boxes"]))
        for ours, name in ((logits, "logits"), (deltas.flatten(1), "deltas")):
            theirs = torch.from_numpy(arrays[f"roi.{i}.{name}"])
            torch.testing.assert_close(ours.view(2, 100, -1)[i][index_N], theirs, atol=1e-3, rtol=1e-4)


@torch.no_grad()
def test_detections_and_masks(model: MaskRcnn, golden: Path, arrays: Any) -> None:
    batch = load(golden)
    assert_same_detections(model.eval()(batch).detections, batch, arrays)


@pytest.mark.parametrize("empty", [(), (1,)])
def test_losses_and_gradients(model: MaskRcnn, golden: Path, empty: tuple[int, ...]) -> None:
    expected = golden_step(golden, "mask_rcnn", empty)
    batch = load(golden, *empty)
    predictions = model.train()(batch)
    counts = {name: float(count) for name, count in model.counts(predictions).items()}
    assert counts["rpn_positive"] == expected.counts["rpn/num_pos_anchors"]
    assert counts["roi_positive"] == expected.counts["roi_head/num_fg_samples"]
    assert counts["mask_slots_used"] == counts["roi_positive"]
    losses = as_golden(model.losses(predictions, batch), predictions.rpn.valid_BR.shape[1])
    assert_same_step(model, losses, expected)
