"""Shortcuts of the mask head give the same results as its formulas."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from test_detector import build, dataset, emptied, load, step  # noqa: F401
from torch import Tensor, nn

from giantdet.data.coco import CocoDataset
from giantdet.layers.mask_head import MaskPredictor
from giantdet.ops import shapes


def gradients(detector: nn.Module) -> dict[str, Tensor]:
    return {name: p.grad.clone() for name, p in detector.named_parameters() if p.grad is not None}


@pytest.fixture(params=["mask_rcnn", "cascade_mask_rcnn"])
def kind(request: pytest.FixtureRequest) -> Any:
    return request.param


@pytest.mark.parametrize("empty", [(), (0,), (0, 1)], ids=["full", "one empty", "all empty"])
def test_losses_and_gradients_equal_those_of_all_slots(
    dataset: CocoDataset,  # noqa: F811
    kind: str,
    empty: tuple[int, ...],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    detector, batch = build(kind=kind, mask_head={"slots": 8}), emptied(load(dataset), *empty)
    computed: list[int] = []
    detector.mask_head.register_forward_hook(lambda module, inputs, out: computed.append(len(out)))
    predictions = detector.train()(batch)
    losses, found = step(detector, batch), gradients(detector)
    monkeypatch.setattr(shapes, "ENABLED", False)
    all_losses, all_found = step(detector, batch), gradients(detector)
    masks = predictions.mask if kind == "mask_rcnn" else predictions.masks[0]
    used = masks.valid_BP
    # The first slot is always computed, used or not.
    assert computed == 2 * [int(used.sum() + (~used[0, 0]).sum())] + [used.numel()]
    assert not used.all() and (len(empty) == 2 or int(used.sum()) > 1)
    assert losses.keys() == all_losses.keys() and found.keys() == all_found.keys()
    for name, loss in losses.items():
        torch.testing.assert_close(loss, all_losses[name], rtol=1e-6, atol=0, msg=name)
    for name, gradient in found.items():
        torch.testing.assert_close(gradient, all_found[name], rtol=1e-5, atol=1e-7, msg=name)


def test_batch_norm_keeps_all_slots(dataset: CocoDataset) -> None:  # noqa: F811
    """The statistics are then the same as on a GPU."""
    detector, batch = build(mask_head={"norm": "batch"}), emptied(load(dataset), 0)
    seen: list[int] = []
    detector.mask_head.register_forward_hook(lambda module, inputs, out: seen.append(len(out)))
    valid_BP = detector.train()(batch).mask.valid_BP
    assert not valid_BP.all() and seen == [valid_BP.numel()]


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_predictor_equals_convolution_and_class_selection(layout: torch.memory_format) -> None:
    torch.manual_seed(0)
    predictor = MaskPredictor(6, num_classes=5)
    assert predictor.bias is not None
    nn.init.normal_(predictor.bias)
    features = torch.randn(7, 6, 4, 4).contiguous(memory_format=layout).requires_grad_()
    label = torch.tensor([0, 4, 2, 2, 2, 0, 1])
    weights = torch.randn(7, 4, 4)
    leaves = [features, predictor.weight, predictor.bias]
    logits = predictor(features, label)
    expected = nn.functional.conv2d(features, predictor.weight, predictor.bias)[torch.arange(7), label]
    torch.testing.assert_close(logits, expected)
    mine = torch.autograd.grad((logits * weights).sum(), leaves)
    for gradient, right in zip(mine, torch.autograd.grad((expected * weights).sum(), leaves), strict=True):
        torch.testing.assert_close(gradient, right)
    assert mine[1][3].eq(0).all()  # no RoI is of class 3
