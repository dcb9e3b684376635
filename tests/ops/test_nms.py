"""NMS masks against torchvision's list of survivors and detectron2's golden outputs."""

from __future__ import annotations

import pytest
import torch
import torchvision
from torch import Tensor

from giantdet.ops.nms import nms_mask, nms_mask_fixed_point

IMPLEMENTATIONS = pytest.mark.parametrize("nms", [nms_mask, nms_mask_fixed_point])


def as_mask(kept: Tensor, count: int) -> Tensor:
    return torch.zeros(count, dtype=torch.bool).index_fill(0, kept, True)


@IMPLEMENTATIONS
@pytest.mark.parametrize("threshold", [0.5, 0.7])
def test_equal_detectron2(golden, nms, threshold):
    boxes, scores, groups = golden["nms_boxes"], golden["nms_scores"], golden["nms_idxs"]
    keep = nms(boxes[None], scores[None], torch.ones(1, 500, dtype=torch.bool), threshold)[0]
    assert keep.equal(as_mask(golden[f"d2.nms_{threshold}"], 500))
    # One of our groups for each of theirs; each contains all boxes, with those of other groups invalid.
    number = int(groups.max()) + 1
    valid = groups == torch.arange(number)[:, None]
    keep = nms(boxes.expand(number, -1, -1), scores.expand(number, -1), valid, threshold)
    assert not (keep & ~valid).any()
    assert keep.any(0).equal(as_mask(golden[f"d2.batched_nms_{threshold}"], 500))


@IMPLEMENTATIONS
def test_equal_torchvision(nms, random_boxes):
    boxes = random_boxes(4, 300, extent=60.0)
    boxes[1, 50:60, 2:] = boxes[1, 50:60, :2]  # zero area
    boxes[2, 100:110] = boxes[2, 0]  # duplicates of one box
    # Rounded to two digits: of equal scores the earlier box wins.
    scores = (torch.rand(4, 300, generator=torch.Generator().manual_seed(1)) * 100).round() / 100
    valid = torch.rand(4, 300, generator=torch.Generator().manual_seed(2)) < 0.7
    valid[3] = False
    keep = nms(boxes, scores, valid, 0.5)
    for group in range(4):
        slots = valid[group].nonzero()[:, 0]
        kept = torchvision.ops.nms(boxes[group, slots], scores[group, slots], 0.5)
        assert keep[group].equal(as_mask(slots[kept], 300))


def test_number_of_rounds_for_a_chain_of_suppressions():
    """Box i overlaps only i + 1, so every other one survives; n rounds settle chains of n suppressions."""
    left = torch.arange(15.0) * 4
    boxes = torch.stack([left, torch.zeros(15), left + 10, torch.full((15,), 10.0)], dim=1)[None]
    scores, valid = torch.linspace(1, 0.1, 15)[None], torch.ones(1, 15, dtype=torch.bool)
    expected = torch.arange(15)[None] % 2 == 0
    assert nms_mask(boxes, scores, valid, 0.4).equal(expected)
    assert nms_mask_fixed_point(boxes, scores, valid, 0.4).equal(expected)
    assert not nms_mask_fixed_point(boxes, scores, valid, 0.4, rounds=3).equal(expected)


def test_operator_is_sound_and_compiles(random_boxes):
    boxes, scores = random_boxes(2, 50, extent=40.0), torch.rand(2, 50)
    valid = torch.arange(50).expand(2, -1) < 40
    torch.library.opcheck(torch.ops.giantdet.nms_mask.default, (boxes, scores, valid, 0.5))
    compiled = torch.compile(nms_mask, fullgraph=True, backend="aot_eager")
    boxes.requires_grad_()
    assert compiled(boxes, scores, valid, 0.5).equal(nms_mask(boxes, scores, valid, 0.5))


def test_bf16_scores_and_empty_groups(random_boxes):
    boxes, scores = random_boxes(1, 30, extent=20.0), torch.rand(1, 30).bfloat16()
    valid = torch.ones(1, 30, dtype=torch.bool)
    assert nms_mask(boxes, scores, valid, 0.5).equal(nms_mask(boxes, scores.float(), valid, 0.5))
    assert nms_mask(boxes[:, :0], scores[:, :0], valid[:, :0], 0.5).shape == (1, 0)
