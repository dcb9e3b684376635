"""Anchors against detectron2's golden outputs and torchvision's generator."""

from __future__ import annotations

import pytest
import torch
from torch.testing import assert_close
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.image_list import ImageList

from giantdet.ops.anchors import base_anchors, beyond_border, centred_in_padding, grid_anchors

STRIDES, SIZES, RATIOS = (4, 8, 16, 32, 64), ((32,), (64,), (128,), (256,), (512,)), (0.5, 1.0, 2.0)


@pytest.mark.parametrize(("grid", "name"), [("grid_hw", "anchors"), ("grid_hw_odd", "anchors_odd")])
def test_equal_detectron2(golden, grid, name):
    grids = [(h, w) for h, w in golden[grid].tolist()]
    levels = grid_anchors((300, 400), grids, STRIDES, SIZES, RATIOS)
    assert [len(level) for level in levels] == [3 * h * w for h, w in grids]
    assert_close(torch.cat(levels), golden[f"d2.{name}"], rtol=0, atol=0)


@pytest.mark.parametrize("canvas", [(256, 256), (320, 416), (800, 1333)])
def test_equal_torchvision(canvas):
    grids = [(-(-canvas[0] // stride), -(-canvas[1] // stride)) for stride in STRIDES]
    generator = AnchorGenerator(SIZES, (RATIOS,) * 5)
    maps = [torch.zeros(1, 1, *grid) for grid in grids]
    expected = generator(ImageList(torch.zeros(1, 3, *canvas), [canvas]), maps)[0]
    got = grid_anchors(canvas, grids, STRIDES, SIZES, RATIOS, rounded=True)
    assert_close(torch.cat(got), expected, rtol=0, atol=0)


def test_base_anchors_have_the_area_and_ratio():
    base = base_anchors((100.0,), RATIOS)
    sides = base[:, 2:] - base[:, :2]
    assert_close(sides.prod(dim=1), torch.full((3,), 1e4))
    assert_close(sides[:, 1] / sides[:, 0], torch.tensor(RATIOS))
    assert base_anchors((32.0,), (0.5,), rounded=True).tolist() == [[-23.0, -11.0, 23.0, 11.0]]


def test_float32_whatever_the_default():
    expected = grid_anchors((320, 416), [(80, 104)], [4], [(32,)], RATIOS)[0]
    torch.set_default_dtype(torch.bfloat16)
    try:
        got = grid_anchors((320, 416), [(80, 104)], [4], [(32,)], RATIOS)[0]
    finally:
        torch.set_default_dtype(torch.float32)
    assert got.dtype == torch.float32
    assert_close(got, expected, rtol=0, atol=0)


def test_wrong_number_of_levels_is_an_error():
    with pytest.raises(ValueError, match="1 levels, 2 strides, 1 sizes"):
        grid_anchors((64, 64), [(16, 16)], [4, 8], [(32,)], RATIOS)


def test_order_by_ratio() -> None:
    """mmdetection's order: [ratio, size] instead of [size, ratio]."""
    sizes, ratios = (8.0, 16.0), (0.5, 1.0, 2.0)
    by_size, by_ratio = (base_anchors(sizes, ratios, by_ratio=order) for order in (False, True))
    assert by_ratio.view(3, 2, 4).equal(by_size.view(2, 3, 4).transpose(0, 1))


def test_anchors_beyond_the_border_and_in_padding() -> None:
    anchors = torch.tensor([[0.0, 0, 20, 10], [-1, 0, 5, 5], [0, -1, 5, 5], [0, 0, 21, 10], [0, 0, 19, 11]])
    sizes = torch.tensor([[11.0, 21.0]])  # height, width
    inside = [bool((a[:2] >= 0).all() and a[2] < 21 and a[3] < 11) for a in anchors]
    assert (~beyond_border(anchors, sizes, 0)[0]).tolist() == inside
    assert not beyond_border(anchors, sizes, 1.5).any()
    centred = torch.tensor([[0.0, 0, 2, 2], [30, 0, 32, 2], [31, 0, 33, 2], [0, 40, 2, 42]])
    assert centred_in_padding(centred, sizes)[0].tolist() == [False, True, True, True]
    assert centred_in_padding(centred, sizes, 32)[0].tolist() == [False, False, True, True]
