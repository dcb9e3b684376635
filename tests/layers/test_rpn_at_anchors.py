"""Both ways to compute the RPN's loss, dense or at the cells of sampled anchors: values and gradients."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from giantdet.config.architectures.common import RpnConfig
from giantdet.config.conventions import CONVENTIONS
from giantdet.layers.rpn import Rpn, rpn_losses
from giantdet.layers.rpn_head import RpnHead, SampledRpnHead
from giantdet.structures import Targets

STRIDES = (4, 8, 16, 32, 64)
SIZES = (8.0, 16.0, 32.0, 64.0, 128.0)


@pytest.mark.parametrize("two_logits", [False, True])
def test_sampled_cells_equal_the_dense_pass(two_logits: bool) -> None:
    torch.manual_seed(0)
    shapes = [(8, 9), (4, 5), (2, 3), (1, 1)]
    sampled, dense = SampledRpnHead(6, 3, two_logits), RpnHead(6, 3, two_logits=two_logits)
    for parameter in dense.parameters():  # biases too: they are initialised to zero
        torch.nn.init.normal_(parameter, std=0.3)
    sampled.load_state_dict(dense.state_dict())
    levels = [torch.randn(2, 6, *shape, requires_grad=True) for shape in shapes]
    total = 3 * sum(height * width for height, width in shapes)
    # Every anchor in a random order, including corners, borders and the single cell of the last level.
    index = torch.stack([torch.randperm(total), torch.randperm(total)])
    found = [head.at_anchors(levels, *head.over_levels(levels), index) for head in (dense, sampled)]
    for expected, ours in zip(*found, strict=True):
        assert ours.requires_grad
        torch.testing.assert_close(ours, expected, atol=1e-5, rtol=1e-5)
    assert not any(part.requires_grad for parts in sampled.over_levels(levels) for part in parts)
    weights = [torch.randn_like(part) for part in found[0]]
    gradients = [
        torch.autograd.grad(
            sum((p * w).sum() for p, w in zip(parts, weights, strict=True)), [*levels, *head.parameters()]
        )
        for head, parts in zip((dense, sampled), found, strict=True)
    ]
    for expected, ours in zip(*gradients, strict=True):
        assert expected.abs().max() > 0
        torch.testing.assert_close(ours, expected, atol=1e-4, rtol=1e-4)


def test_two_logits_are_a_softmax_over_object_and_background() -> None:
    """As in mmdetection, each anchor has two channels, the first for an object, with cross-entropy."""
    torch.manual_seed(0)
    head, level = RpnHead(4, 3, two_logits=True), torch.randn(2, 4, 5, 6)
    torch.nn.init.normal_(head.objectness.weight)
    raw = head.objectness(head.conv(level).relu()).permute(0, 2, 3, 1).reshape(-1, 2)
    objectness = head(level)[0].flatten()
    torch.testing.assert_close(objectness.sigmoid(), raw.softmax(1)[:, 0])
    positive = torch.rand(len(raw)) < 0.3
    expected = F.cross_entropy(raw, (~positive).long())
    torch.testing.assert_close(F.binary_cross_entropy_with_logits(objectness, positive.float()), expected)
    assert head.objectness.out_channels == 6 and head.deltas.out_channels == 12


def run(config: dict[str, Any], levels: list[Tensor], targets: Targets) -> dict[str, Tensor]:
    """Return proposals, losses and all gradients of a training step of an RPN with weights of seed 1."""
    rpn = Rpn(
        RpnConfig(anchor_sizes=SIZES, **config), 8, STRIDES, (64, 64), CONVENTIONS["detectron2"]
    ).train()
    torch.manual_seed(1)
    for parameter in rpn.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    inputs = [level.clone().requires_grad_() for level in levels]
    proposals, predictions = rpn(inputs, torch.tensor([[64.0, 64.0], [50.0, 40.0]]), targets, torch.arange(2))
    assert predictions is not None and not proposals.boxes_BN4.requires_grad
    losses = rpn_losses(predictions, CONVENTIONS["detectron2"])
    sum(losses.values(), torch.zeros(())).backward()
    found = {**proposals._asdict(), **losses}
    found |= {f"level {i}": level.grad for i, level in enumerate(inputs)}
    return found | {name: parameter.grad for name, parameter in rpn.named_parameters()}


@pytest.mark.parametrize("objects", [(2, 1), (2, 0), (0, 0)])
def test_losses_and_gradients_of_both_passes(objects: tuple[int, int]) -> None:
    """Images with two objects, one and none; the second image is padded."""
    torch.manual_seed(0)
    levels = [torch.randn(2, 8, -(-64 // stride), -(-64 // stride)) for stride in STRIDES]
    boxes_BM4 = torch.tensor([[3.0, 5.0, 20.0, 24.0], [10.0, 20.0, 38.0, 46.0]]).expand(2, -1, -1)
    valid_BM = torch.arange(2) < torch.tensor(objects)[:, None]
    nothing = torch.zeros(2, 2, 0, 0, dtype=torch.uint8)
    targets = Targets(boxes_BM4, torch.zeros(2, 2).long(), valid_BM, nothing, torch.zeros(2, 2, 4))
    dense, sampled = (run({"loss_pass": each}, levels, targets) for each in ("dense", "sampled"))
    assert dense["loss_rpn_cls"] > 0 and bool(dense["loss_rpn_loc"]) == any(objects)
    assert dense.keys() == sampled.keys() and len(dense) == 16
    for name, expected in dense.items():
        torch.testing.assert_close(sampled[name], expected, atol=1e-5, rtol=1e-4, msg=name)


def test_two_convolutions() -> None:
    """Compare with the convolutions one by one; only the dense pass supports more than one."""
    torch.manual_seed(0)
    head = RpnHead(channels=4, anchors_per_cell=2, convs=2)
    for parameter in head.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    level = torch.randn(2, 4, 5, 3)
    hidden = level
    for name in ("conv", "further_convs.0"):
        layer = head.get_submodule(name)
        hidden = torch.conv2d(hidden, layer.weight, layer.bias, padding=1).relu()
    objectness, deltas = head(level)
    torch.testing.assert_close(objectness.view(2, 5, 3, 2), head.objectness(hidden).permute(0, 2, 3, 1))
    torch.testing.assert_close(deltas.view(2, 5, 3, 8), head.deltas(hidden).permute(0, 2, 3, 1))
    assert list(RpnConfig(convs=2).problems()) == [] == list(RpnConfig(loss_pass="sampled").problems())
    (problem,) = RpnConfig(convs=2, loss_pass="sampled").problems()
    assert problem.startswith("rpn.loss_pass must be dense with rpn.convs 2")
