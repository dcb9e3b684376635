"""Matching against detectron2's golden outputs and torchvision's Matcher."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torchvision.models.detection._utils import Matcher

from giantdet.ops.anchors import grid_anchors
from giantdet.ops.boxes import pairwise_iou
from giantdet.ops.matching import match


def golden_iou(golden: dict[str, Tensor], name: str) -> Tensor:
    if name in ("crafted", "random"):
        return golden[f"iou_case_{name}"]
    if name == "roi":
        return pairwise_iou(golden["gt_boxes"], golden["proposals"])
    grids = [(h, w) for h, w in golden["grid_hw"].tolist()]
    levels = grid_anchors(
        (256, 256), grids, (4, 8, 16, 32, 64), ((32,), (64,), (128,), (256,), (512,)), (0.5, 1.0, 2.0)
    )
    return pairwise_iou(golden["gt_boxes"], torch.cat(levels))


@pytest.mark.parametrize(
    ("name", "key"),
    [
        ("rpn", "match_rpn"),
        ("roi", "match_roi"),
        ("crafted", "match_rpn_crafted"),
        ("random", "match_rpn_random"),
    ],
)
def test_equal_detectron2(golden, name, key):
    iou = golden_iou(golden, name)
    low, high, low_quality = (0.5, 0.5, False) if name == "roi" else (0.3, 0.7, True)
    valid = torch.ones(1, len(iou), dtype=torch.bool)
    index, label = match(iou[None], valid, low, high, low_quality)
    assert index.dtype == torch.int64 and label.dtype == torch.int8
    assert index[0].equal(golden[f"d2.{key}"])
    assert label[0].equal(golden[f"d2.{key}_label"])


@pytest.mark.parametrize("low_quality", [False, True])
def test_equal_torchvision_with_invalid_slots(low_quality):
    generator = torch.Generator().manual_seed(0)
    # Rounded to two digits, so that there are ties.
    iou = (torch.rand(4, 6, 200, generator=generator) * 100).round() / 100
    valid = torch.rand(4, 6, generator=generator) < 0.6
    index, label = match(iou, valid, 0.3, 0.7, low_quality)
    for image in range(4):
        slots = valid[image].nonzero()[:, 0]
        assert 0 < len(slots) < 6
        found = Matcher(0.7, 0.3, low_quality)(iou[image, slots])
        assert label[image].equal(torch.where(found >= 0, 1, found + 1).where(found != -2, -1).to(torch.int8))
        assert index[image][found >= 0].equal(slots[found[found >= 0]])
        assert valid[image, index[image]].all()


def test_no_object_is_all_negative():
    index, label = match(torch.rand(2, 3, 10), torch.zeros(2, 3, dtype=torch.bool), 0.3, 0.7, True)
    assert (index == 0).all() and (label == 0).all()


def test_object_without_overlap_makes_nothing_positive():
    iou = torch.tensor([[[0.0, 0.0, 0.0], [0.1, 0.0, 0.2]]])
    index, label = match(iou, torch.ones(1, 2, dtype=torch.bool), 0.3, 0.7, True)
    assert label.tolist() == [[0, 0, 1]]
    assert index.tolist() == [[1, 0, 1]]


def test_low_quality_ties_are_all_positive_and_keep_their_object():
    iou = torch.tensor([[[0.2, 0.2, 0.1], [0.1, 0.25, 0.9]]])
    index, label = match(iou, torch.ones(1, 2, dtype=torch.bool), 0.3, 0.7, True)
    assert label.tolist() == [[1, 1, 1]]
    assert index.tolist() == [[0, 1, 1]]


def test_input_is_not_modified_and_it_compiles():
    iou, valid = torch.rand(2, 3, 50), torch.tensor([[True, False, True], [False, False, False]])
    before = iou.clone()
    compiled = torch.compile(match, fullgraph=True, backend="aot_eager")
    for got, expected in zip(
        compiled(iou, valid, 0.3, 0.7, True), match(iou, valid, 0.3, 0.7, True), strict=True
    ):
        assert got.equal(expected)
    assert iou.equal(before)


def by_loops(iou: Tensor, low: float, high: float, least: float) -> tuple[list[int], list[int]]:
    """mmdetection's rule for one image: an object gets its best candidates; the last object wins."""
    objects, candidates = iou.shape
    index, label = [], []
    for n in range(candidates):
        best = max(range(objects), key=lambda m: (float(iou[m, n]), -m))
        value = float(iou[best, n])
        index.append(best)
        label.append(1 if value >= high else 0 if value < low else -1)
    for m in range(objects):
        best_value = float(iou[m].max())
        for n in range(candidates):
            if best_value >= least and iou[m, n] == best_value > 0:
                index[n], label[n] = m, 1
    return index, label


@pytest.mark.parametrize("least", [0.0, 0.6])
def test_best_candidates_take_their_object(least: float) -> None:
    generator = torch.Generator().manual_seed(1)
    iou = (torch.rand(3, 5, 60, generator=generator) * 10).round() / 13  # many ties
    iou[:, 0] *= 0.5  # an object whose best candidates are poor
    valid = torch.ones(3, 5, dtype=torch.bool)
    index, label = match(iou, valid, 0.3, 0.7, True, low_quality_iou=least, takes_object=True)
    plain, _ = match(iou, valid, 0.3, 0.7, True, low_quality_iou=least)
    for image in range(3):
        assert (index[image].tolist(), label[image].tolist()) == by_loops(iou[image], 0.3, 0.7, least)
    assert not index.equal(plain)
