"""Proposals against detectron2's golden ones, and sampled anchors against a loop."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from giantdet.config.architectures.common import RpnConfig
from giantdet.config.conventions import CONVENTIONS
from giantdet.layers.rpn import Rpn, select_proposals
from giantdet.ops.anchors import grid_anchors
from giantdet.structures import Targets

LEVELS = range(5)


@pytest.mark.parametrize(("split", "pre_nms"), [("train", 2000), ("test", 1000)])
@pytest.mark.parametrize("images", [1, 2])
def test_proposals_equal_detectron2(shared: Path, split: str, pre_nms: int, images: int) -> None:
    inputs = np.load(shared / "golden" / "ops_inputs.npz")
    golden = np.load(shared / "golden" / "ops_detectron2.npz")
    maps = [torch.from_numpy(inputs[f"rpn_obj{i}"]).expand(images, -1, -1, -1) for i in LEVELS]
    deltas = [torch.from_numpy(inputs[f"rpn_delta{i}"]).expand(images, -1, -1, -1) for i in LEVELS]
    size = (int(inputs["image_hw"][0]), int(inputs["image_hw"][1]))
    anchors = grid_anchors(
        size,
        [(m.shape[2], m.shape[3]) for m in maps],
        inputs["strides"].tolist(),
        [(size,) for size in inputs["sizes"].tolist()],
        inputs["ratios"].tolist(),
    )
    proposals = select_proposals(
        [m.permute(0, 2, 3, 1).flatten(1) for m in maps],
        # [B, K * 4, h, w] with the anchor outermost
        [d.unflatten(1, (-1, 4)).permute(0, 3, 4, 1, 2).reshape(images, -1, 4) for d in deltas],
        anchors,
        torch.tensor([size] * images, dtype=torch.float32),
        pre_nms,
        1000,
        0.7,
        min_size=0.0,
    )
    boxes, scores = (
        torch.from_numpy(golden[f"rpn_{split}_boxes"]),
        torch.from_numpy(golden[f"rpn_{split}_scores"]),
    )
    for b in range(images):
        valid_N = proposals.valid_BN[b]
        assert int(valid_N.sum()) == len(boxes)
        torch.testing.assert_close(proposals.boxes_BN4[b][valid_N], boxes, atol=1e-3, rtol=1e-5)
        torch.testing.assert_close(proposals.scores_BN[b][valid_N], scores)


def test_head_keeps_anchors_and_deltas_together() -> None:
    """Channel k of the objectness and 4k..4k+3 of the deltas belong to anchor k of a cell, rows first."""
    rpn = Rpn(RpnConfig(), 8, (4, 8, 16, 32, 64), (64, 64), CONVENTIONS["detectron2"])
    level = torch.randn(2, 8, 3, 5)
    objectness, deltas = rpn.head(level)
    hidden = F.conv2d(level, rpn.head.conv.weight, rpn.head.conv.bias, padding=1).relu()
    scores, offsets = rpn.head.objectness(hidden), rpn.head.deltas(hidden)
    for y, x, k in ((0, 0, 0), (2, 4, 2), (1, 3, 1)):
        at = (y * 5 + x) * 3 + k
        torch.testing.assert_close(objectness[:, at], scores[:, k, y, x])
        torch.testing.assert_close(deltas[:, at], offsets[:, 4 * k : 4 * k + 4, y, x])


def test_sampled_anchors_against_a_loop() -> None:
    """Compare each sampled anchor's own prediction, its label, and the deltas to its object."""
    torch.manual_seed(0)
    config = RpnConfig(anchor_sizes=(8, 16, 32, 64, 128), batch_per_image=64)
    rpn = Rpn(config, 8, (4, 8, 16, 32, 64), (64, 64), CONVENTIONS["detectron2"]).train()
    for layer in (rpn.head.conv, rpn.head.objectness, rpn.head.deltas):
        torch.nn.init.normal_(layer.weight)
    levels = [torch.randn(2, 8, -(-64 // s), -(-64 // s)) for s in (4, 8, 16, 32, 64)]
    boxes_BM4 = torch.tensor([[[3.0, 5.0, 20.0, 24.0], [30.0, 30.0, 62.0, 60.0]], [[0.0] * 4, [0.0] * 4]])
    valid_BM = torch.tensor([[True, True], [False, False]])
    nothing = torch.zeros(2, 2, 0, 0, dtype=torch.uint8)
    targets = Targets(
        boxes_BM4, torch.zeros(2, 2, dtype=torch.int64), valid_BM, nothing, torch.zeros(2, 2, 4)
    )
    _, found = rpn(levels, torch.tensor([[64.0, 64.0]] * 2), targets, torch.tensor([5, 6]))
    assert found is not None
    anchors_A4 = torch.cat(rpn.anchors(levels))
    objectness, deltas = zip(*(rpn.head(level) for level in levels), strict=True)
    objectness_BA, deltas_BA4 = torch.cat(objectness, 1), torch.cat(deltas, 1)
    assert found.positive_BR[0].any() and not found.positive_BR[1].any()
    assert found.valid_BR.all()
    for b in range(2):
        for r in range(64):
            at = torch.isclose(deltas_BA4[b], found.deltas_BR4[b, r], rtol=1e-5, atol=1e-5).all(1)
            assert int(at.sum()) == 1
            torch.testing.assert_close(objectness_BA[b][at][0], found.objectness_BR[b, r])
            x0, y0, x1, y1 = anchors_A4[at][0].tolist()
            best, best_iou = (0.0, 0.0, 1.0, 1.0), 0.0
            for m in range(2 if b == 0 else 0):
                bx0, by0, bx1, by1 = boxes_BM4[b, m].tolist()
                inner = max(0.0, min(x1, bx1) - max(x0, bx0)) * max(0.0, min(y1, by1) - max(y0, by0))
                iou = inner / ((x1 - x0) * (y1 - y0) + (bx1 - bx0) * (by1 - by0) - inner)
                if iou > best_iou:
                    best, best_iou = (bx0, by0, bx1, by1), iou
            if not found.positive_BR[b, r]:
                assert best_iou < 0.3
                continue
            width, height = x1 - x0, y1 - y0
            expected = [
                ((best[0] + best[2]) - (x0 + x1)) / 2 / width,
                ((best[1] + best[3]) - (y0 + y1)) / 2 / height,
                np.log((best[2] - best[0]) / width),
                np.log((best[3] - best[1]) / height),
            ]
            assert found.target_deltas_BR4[b, r].tolist() == pytest.approx(expected, abs=1e-4)


def test_number_of_sizes_must_match() -> None:
    with pytest.raises(ValueError, match="anchor_sizes has 2 sizes for 5 levels"):
        Rpn(RpnConfig(anchor_sizes=(8.0, 16.0)), 8, (4, 8, 16, 32, 64), (64, 64), CONVENTIONS["detectron2"])
