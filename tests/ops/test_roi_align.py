"""RoIAlign over the pyramid against detectron2's golden outputs and torchvision, values and gradients."""

from __future__ import annotations

import math

import pytest
import torch
import torchvision
from torch import Tensor
from torch.testing import assert_close
from torchvision.ops import MultiScaleRoIAlign

from giantdet.ops.roi_align import assign_levels, roi_align_pyramid

STRIDES = (4, 8, 16, 32)
SETTINGS = pytest.mark.parametrize(("aligned", "sampling"), [(a, s) for a in (False, True) for s in (0, 2)])


def of_golden_images(pooled: Tensor, batch: Tensor) -> Tensor:
    """Select each RoI's own image: all golden RoIs were pooled from both images."""
    return pooled.view(2, len(batch), *pooled.shape[1:])[batch, torch.arange(len(batch))]


@SETTINGS
@pytest.mark.parametrize("level", [0, 2])
def test_one_level_equals_detectron2(golden, level, aligned, sampling):
    features = golden[f"feat{level}"].clone().requires_grad_()
    boxes = golden["rois"].expand(2, -1, -1)
    pooled = roi_align_pyramid([features], boxes, [STRIDES[level]], 7, sampling, aligned)
    pooled = of_golden_images(pooled, golden["roi_batch"])
    setting = f"aligned{int(aligned)}_sr{sampling}_lvl{level}"
    assert_close(pooled, golden[f"d2.roialign7_{setting}"], rtol=1e-5, atol=1e-5)
    pooled.backward(golden["roi_gradout7"])
    assert_close(features.grad, golden[f"d2.roialign7_grad_{setting}"], rtol=1e-5, atol=2e-5)


def test_pyramid_equals_detectron2(golden):
    levels = [golden[f"feat{i}"] for i in range(4)]
    pooled = roi_align_pyramid(levels, golden["rois"].expand(2, -1, -1), STRIDES, 7, 0, True)
    expected = golden["d2.multiscale_roialign7"]
    assert_close(of_golden_images(pooled, golden["roi_batch"]), expected, rtol=1e-5, atol=1e-5)
    assert assign_levels(golden["rois"], 4).equal(golden["d2.level_map"])


def pyramid(channels: int = 5, canvas: tuple[int, int] = (256, 320)) -> list[Tensor]:
    generator = torch.Generator().manual_seed(3)
    shapes = [(2, channels, canvas[0] // s, canvas[1] // s) for s in STRIDES]
    return [torch.randn(shape, generator=generator) for shape in shapes]


def boxes_of_all_levels() -> Tensor:
    """Random boxes of all sizes, some of them partly outside the canvas of 256 x 320."""
    generator = torch.Generator().manual_seed(4)
    corner = torch.rand(2, 60, 2, generator=generator) * 320 - 40
    size = torch.exp(torch.rand(2, 60, 2, generator=generator) * 5 + 1.6)
    return torch.cat([corner, corner + size], dim=-1)


@pytest.mark.parametrize("sampling", [0, 1, 2, 3])
@pytest.mark.parametrize("size", [7, 14])
def test_pyramid_equals_torchvision(sampling, size):
    levels = [level.requires_grad_() for level in pyramid()]
    boxes = boxes_of_all_levels()
    assert assign_levels(boxes, 4).unique().tolist() == [0, 1, 2, 3]
    pooled = roi_align_pyramid(levels, boxes, STRIDES, size, sampling, aligned=False)
    named = {str(i): level for i, level in enumerate(levels)}
    pooler = MultiScaleRoIAlign(list(named), size, sampling)
    expected = pooler(named, list(boxes), [(256, 320)] * 2)
    assert_close(pooled, expected, rtol=1e-5, atol=1e-5)
    weight = torch.randn(expected.shape, generator=torch.Generator().manual_seed(5))
    got = torch.autograd.grad(pooled, levels, weight)
    assert_close(got, torch.autograd.grad(expected, levels, weight), rtol=1e-4, atol=1e-4)


@SETTINGS
def test_border_rules_equal_torchvision(aligned, sampling):
    """Boxes whose sampling points are on, just inside and just outside the borders of the map."""
    features = pyramid()[2]
    edges = [-40.0, -16.0, -15.9, -8.0, -0.1, 0.0, 0.1, 8.0, 247.0, 256.0, 264.0, 272.0, 300.0]
    pairs = [(a, b) for a in edges for b in edges if a <= b]
    boxes = torch.tensor([[x0, y0, x1, y1] for x0, x1 in pairs for y0, y1 in pairs[::7]])
    pooled = roi_align_pyramid([features], boxes.expand(2, -1, -1), [16], 7, sampling, aligned)
    expected = torchvision.ops.roi_align(features, [boxes, boxes], 7, 1 / 16, sampling, aligned)
    assert_close(pooled, expected, rtol=1e-5, atol=1e-5)


@SETTINGS
def test_degenerate_boxes_are_finite(aligned, sampling):
    boxes = torch.tensor([[0.0, 0, 0, 0], [9, 9, 3, 3], [-1e6, -1e6, 1e3, 1e3], [1e5, 1e5, 2e5, 2e5]])
    if sampling == 0:
        boxes = boxes[[0, 1, 3]].clamp(max=1e5)  # the cost of adaptive sampling grows with the box
    levels = [level.requires_grad_() for level in pyramid()]
    pooled = roi_align_pyramid(levels, boxes.expand(2, -1, -1), STRIDES, 7, sampling, aligned)
    pooled.square().sum().backward()
    assert pooled.isfinite().all()
    assert all(level.grad is not None and level.grad.isfinite().all() for level in levels)


def test_nan_boxes_give_zeros():
    boxes = torch.full((2, 3, 4), float("nan"))
    assert (roi_align_pyramid(pyramid(), boxes, STRIDES, 7, 2, True) == 0).all()


@pytest.mark.parametrize("sampling", [0, 2])
def test_bf16_is_computed_in_float32(sampling):
    levels = [level.bfloat16() for level in pyramid()]
    boxes = boxes_of_all_levels().requires_grad_()
    leaves = [level.clone().requires_grad_() for level in levels]
    pooled = roi_align_pyramid(leaves, boxes, STRIDES, 7, sampling, True)
    assert pooled.dtype == torch.bfloat16
    exact = roi_align_pyramid([level.float() for level in levels], boxes, STRIDES, 7, sampling, True)
    assert_close(pooled, exact.bfloat16(), rtol=0, atol=0)
    pooled.float().sum().backward()
    assert boxes.grad is None and leaves[0].grad.dtype == torch.bfloat16


@pytest.mark.parametrize("sampling", [0, 2])
def test_compiles_with_gradients(sampling):
    levels, boxes = [level.requires_grad_() for level in pyramid()], boxes_of_all_levels()
    compiled = torch.compile(roi_align_pyramid, fullgraph=True, backend="aot_eager")
    got = compiled(levels, boxes, STRIDES, 7, sampling, True)
    expected = roi_align_pyramid(levels, boxes, STRIDES, 7, sampling, True)
    assert_close(got, expected, rtol=1e-6, atol=1e-6)
    weight = torch.randn(expected.shape, generator=torch.Generator().manual_seed(5))
    gradients = [torch.autograd.grad(y, levels, weight) for y in (got, expected)]
    assert_close(*gradients, rtol=1e-5, atol=1e-5)


def test_levels_at_the_thresholds():
    side = torch.tensor([0.0, 111.9, 112.0, 223.9, 224.0, 447.9, 448.0, 1e5, float("nan"), float("inf")])
    boxes = torch.stack([torch.zeros(10), torch.zeros(10), side, side], dim=1)
    assert assign_levels(boxes, 4)[:8].tolist() == [0, 0, 1, 1, 2, 2, 3, 3]
    assert ((assign_levels(boxes, 4) >= 0) & (assign_levels(boxes, 4) < 4)).all()


def test_levels_as_in_mmdetection() -> None:
    """floor(log2(sqrt(area) / 56 + 1e-6)): a box just too small for a level still belongs to it."""
    sides = [30.0, 56.0, 112 * (1 - 2e-6), 112 * (1 - 4e-7), 112.0, 200.0, 224.0, 300.0, 448.0, 2000.0]
    expected = [min(max(math.floor(math.log2(side / 56 + 1e-6)), 0), 3) for side in sides]
    boxes = torch.tensor([[0.0, 0.0, side, side] for side in sides])
    assert assign_levels(boxes, 4, epsilon=1e-6 / 4).tolist() == expected
    detectron2 = assign_levels(boxes, 4).tolist()
    assert [i for i in range(len(sides)) if detectron2[i] != expected[i]] == [3]
