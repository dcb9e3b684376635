"""Box arithmetic against detectron2's golden outputs and torchvision."""

from __future__ import annotations

import math

import pytest
import torch
import torchvision
from torch.testing import assert_close
from torchvision.models.detection._utils import BoxCoder

from giantdet.ops import boxes as box_ops

BOX_WEIGHTS = (10.0, 10.0, 5.0, 5.0)
DEGENERATE = torch.tensor([[0.0, 0, 0, 0], [5, 5, 5, 9], [9, 9, 3, 3], [1e4, 1e4, 1e4, 1e4]])


@pytest.mark.parametrize("name", ["box", "rpn"])
def test_deltas_equal_detectron2(golden, name):
    weights = tuple(golden[f"weights_{name}"].tolist())
    encoded = box_ops.encode_deltas(golden["matched_gt"], golden["proposals"], weights)
    decoded = box_ops.decode_deltas(golden["deltas"], golden["proposals"], weights)
    assert_close(encoded, golden[f"d2.encode_{name}"], rtol=1e-5, atol=1e-5)
    assert_close(decoded, golden[f"d2.decode_{name}"], rtol=1e-6, atol=1e-4)


def test_deltas_of_all_classes_equal_detectron2(golden):
    deltas = golden["deltas_cls"].view(40, 80, 4)
    decoded = box_ops.decode_deltas(deltas, golden["proposals"][:40, None], BOX_WEIGHTS)
    assert_close(decoded.flatten(1), golden["d2.decode_cls"], rtol=1e-6, atol=1e-4)


def test_iou_equals_detectron2(golden):
    iou = box_ops.pairwise_iou(golden["gt_boxes"], golden["proposals"])
    assert_close(iou, golden["d2.iou"], rtol=0, atol=1e-6)


def test_deltas_equal_torchvision(random_boxes):
    boxes, anchors = random_boxes(50), random_boxes(50, seed=1)
    coder = BoxCoder(BOX_WEIGHTS)
    deltas = box_ops.encode_deltas(boxes, anchors, BOX_WEIGHTS)
    assert_close(deltas, coder.encode_single(boxes, anchors), rtol=1e-5, atol=1e-5)
    large = deltas * 20
    expected = coder.decode_single(large, anchors)
    assert (large[:, 2:] / 5 > box_ops.MAX_LOG_SCALE).any(), "the clamp is never reached"
    assert_close(box_ops.decode_deltas(large, anchors, BOX_WEIGHTS), expected, rtol=1e-5, atol=1e-2)


def test_deltas_round_trip(random_boxes):
    boxes, anchors = random_boxes(3, 40), random_boxes(3, 40, seed=1)
    deltas = box_ops.encode_deltas(boxes, anchors, BOX_WEIGHTS)
    assert_close(box_ops.decode_deltas(deltas, anchors, BOX_WEIGHTS), boxes, rtol=0, atol=1e-3)


def test_deltas_of_degenerate_boxes_are_finite():
    boxes, anchors = DEGENERATE[:, None], DEGENERATE[None]
    assert box_ops.encode_deltas(boxes, anchors, BOX_WEIGHTS).isfinite().all()
    assert box_ops.decode_deltas(torch.full((4, 4), 50.0), DEGENERATE, BOX_WEIGHTS).isfinite().all()


def test_deltas_are_float32_from_bf16(random_boxes):
    anchors = random_boxes(20)
    deltas = torch.randn(20, 4, generator=torch.Generator().manual_seed(0)).bfloat16()
    decoded = box_ops.decode_deltas(deltas, anchors, BOX_WEIGHTS)
    assert decoded.dtype == torch.float32
    assert_close(decoded, box_ops.decode_deltas(deltas.float(), anchors, BOX_WEIGHTS), rtol=0, atol=0)


def test_iou_equals_torchvision_in_batches(random_boxes):
    a, b = random_boxes(2, 7), random_boxes(2, 30, seed=1)
    expected = torch.stack([torchvision.ops.box_iou(x, y) for x, y in zip(a, b, strict=True)])
    before = a.clone(), b.clone()
    assert_close(box_ops.pairwise_iou(a, b), expected, rtol=0, atol=1e-6)
    assert_close((a, b), before, rtol=0, atol=0)


def test_iou_of_degenerate_boxes_is_zero(random_boxes):
    everything = torch.cat([DEGENERATE, random_boxes(5), torch.tensor([[0.0, 0, 20, 20]])])
    iou = box_ops.pairwise_iou(DEGENERATE, everything)
    assert (iou == 0).all()
    assert box_ops.pairwise_iou(torch.zeros(0, 4), everything).shape == (0, 10)


def test_area_clip_and_non_empty(random_boxes):
    boxes = random_boxes(2, 20) - 30
    sizes = torch.tensor([[100.0, 150.0], [90.0, 40.0]])
    clipped = box_ops.clip_boxes(boxes, sizes)
    for image, size in enumerate([(100, 150), (90, 40)]):
        expected = torchvision.ops.clip_boxes_to_image(boxes[image], size)
        assert_close(clipped[image], expected, rtol=0, atol=0)
        assert_close(box_ops.box_area(expected), torchvision.ops.box_area(expected))
    flat = clipped.flatten(0, 1)
    keep = torchvision.ops.remove_small_boxes(flat, 1e-6)
    assert 0 < len(keep) < len(flat)
    assert box_ops.non_empty(flat, 0.0).nonzero()[:, 0].equal(keep)
    assert box_ops.box_area(DEGENERATE).tolist() == [0.0] * 4
    assert not box_ops.non_empty(torch.tensor([0.0, 0, 4, 4]), 4.0)


def test_shrinking_is_limited_too() -> None:
    boxes, deltas = torch.tensor([[0.0, 0, 64, 64]]), torch.tensor([[0.0, 0, -9, -1]])
    free, limited = (
        box_ops.decode_deltas(deltas, boxes, (1.0, 1.0, 1.0, 1.0), both) for both in (False, True)
    )
    assert float(free[0, 2] - free[0, 0]) == pytest.approx(64 * math.exp(-9), rel=1e-2)
    assert float(limited[0, 2] - limited[0, 0]) == pytest.approx(64 * 16 / 1000, rel=1e-4)
    torch.testing.assert_close(free[0, 1::2], limited[0, 1::2])
