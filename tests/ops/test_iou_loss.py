"""GIoU, DIoU and CIoU losses against torchvision's: values, gradients and degenerate boxes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torchvision.ops
from torch import Tensor

from giantdet.ops.boxes import decode_deltas, iou_loss

KINDS: Any = {
    "giou": torchvision.ops.generalized_box_iou_loss,
    "diou": torchvision.ops.distance_box_iou_loss,
    "ciou": torchvision.ops.complete_box_iou_loss,
}


def random_boxes(count: int, seed: int) -> Tensor:
    g = torch.Generator().manual_seed(seed)
    corner = torch.rand(count, 2, generator=g) * 100
    return torch.cat([corner, corner + 1 + torch.rand(count, 2, generator=g) * 60], 1)


@pytest.mark.parametrize("kind", KINDS)
def test_equals_torchvision_on_decoded_boxes(kind: Any) -> None:
    """Boxes that overlap their targets, and boxes far away from them."""
    g = torch.Generator().manual_seed(0)
    deltas = torch.randn(400, 4, generator=g) * 3
    rois, near = random_boxes(400, 1), torch.arange(400) < 300
    noise = torch.randn(400, 4, generator=g) * 2
    targets = torch.where(near[:, None], rois + noise.cumsum(0) * 0.01, random_boxes(400, 2))
    gradients, losses = [], []
    for loss_of in (lambda a, b: iou_loss(a, b, kind), KINDS[kind]):
        leaf = deltas.clone().requires_grad_()
        loss = loss_of(decode_deltas(leaf, rois, (10.0, 10.0, 5.0, 5.0)), targets)
        loss.sum().backward()
        assert leaf.grad is not None
        losses.append(loss.detach())
        gradients.append(leaf.grad)
    assert (losses[0] < 0.5).any() and (losses[0] > 1).any()
    torch.testing.assert_close(losses[0], losses[1], atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(gradients[0], gradients[1], atol=1e-6, rtol=1e-4)


@pytest.mark.parametrize("kind", KINDS)
def test_degenerate_boxes_are_finite(kind: Any) -> None:
    """Equal boxes have a loss of 0; points and lines give finite values and gradients."""
    boxes = random_boxes(5, 0)
    torch.testing.assert_close(iou_loss(boxes, boxes, kind), torch.zeros(5), atol=1e-6, rtol=0)
    odd = torch.tensor([[0.0, 0, 0, 0], [3.0, 3, 3, 9], [3.0, 3, 9, 3], [0.0, 0, 4, 4]])
    left = odd.repeat_interleave(4, 0).requires_grad_()
    loss = iou_loss(left, odd.repeat(4, 1), kind)
    loss.sum().backward()
    assert left.grad is not None and loss.isfinite().all() and left.grad.isfinite().all()
    assert iou_loss(torch.zeros(2, 0, 4), torch.zeros(2, 0, 4), kind).shape == (2, 0)
