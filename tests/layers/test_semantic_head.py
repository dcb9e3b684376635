"""The semantic head's shapes, and its loss against a loop over pixels."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from giantdet.config.architectures.common import SemanticHeadConfig
from giantdet.layers.semantic_head import SemanticHead, SemanticPredictions, semantic_loss
from giantdet.structures import IGNORE


@pytest.mark.parametrize(
    ("norm", "kind"), [("group", nn.GroupNorm), ("batch", nn.BatchNorm2d), ("none", None)]
)
def test_shapes_and_layers(norm: str, kind: type[nn.Module] | None) -> None:
    head = SemanticHead(SemanticHeadConfig(width=32, norm=norm), 8, (4, 8, 16, 32), 5)
    levels = [torch.randn(2, 8, 32 // scale, 64 // scale) for scale in (1, 2, 4, 8)]
    assert head(levels).shape == (2, 5, 32, 64)
    convs = [m for m in head.modules() if isinstance(m, nn.Conv2d)]
    assert [len([m for m in level.modules() if isinstance(m, nn.Conv2d)]) for level in head.levels] == [
        1,
        1,
        2,
        3,
    ]
    assert all((m.bias is None) == (norm != "none") for m in convs[:-1])
    assert kind is None or len([m for m in head.modules() if isinstance(m, kind)]) == 7


def test_group_norm_needs_a_multiple_of_32() -> None:
    assert "multiple of 32" in next(SemanticHeadConfig(width=48).problems())
    assert not list(SemanticHeadConfig(width=48, norm="batch").problems())


@pytest.mark.parametrize("divisor", ["labelled", "all"])
@pytest.mark.parametrize("share", [0.0, 0.4, 1.0])
def test_loss_of_labelled_pixels(share: float, divisor: Any) -> None:
    logits = torch.randn(2, 3, 4, 6, requires_grad=True)
    labels = torch.randint(0, 3, (2, 16, 24), dtype=torch.uint8)
    labels[torch.rand(labels.shape) < share] = IGNORE
    loss = semantic_loss(SemanticPredictions(logits, labels), divisor)["loss_sem_seg"]
    large = F.interpolate(logits.detach(), size=(16, 24), mode="bilinear").log_softmax(1)
    terms = [
        -float(large[b, int(labels[b, y, x]), y, x])
        for b in range(2)
        for y in range(16)
        for x in range(24)
        if labels[b, y, x] != IGNORE
    ]
    pixels = max(len(terms), 1) if divisor == "labelled" else 2 * 16 * 24
    assert float(loss.detach()) == pytest.approx(sum(terms) / pixels, rel=1e-5)
    loss.backward()  # type: ignore[no-untyped-call]
    assert logits.grad is not None and logits.grad.isfinite().all()
    assert bool(logits.grad.any()) == (share < 1)


def test_dropout_is_off_by_default() -> None:
    levels = [torch.randn(2, 8, 32 // scale, 64 // scale) for scale in (1, 2, 4, 8)]
    for dropout, same in ((0.0, True), (0.5, False)):
        head = SemanticHead(SemanticHeadConfig(width=32, dropout=dropout), 8, (4, 8, 16, 32), 5).train()
        torch.manual_seed(0)
        assert torch.equal(head(levels), head(levels)) is same
        untouched = torch.random.get_rng_state()
        torch.manual_seed(0)
        assert torch.equal(untouched, torch.random.get_rng_state()) is same
