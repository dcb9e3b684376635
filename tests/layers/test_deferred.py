"""Deferred building against timm's own: equal constants, random weights of the same distribution."""

from __future__ import annotations

import pytest
import timm
import torch
from torch import nn

from giantdet.layers.deferred import LARGE, deferred_init, fill, is_deferred, materialise, real_parameters

FAMILIES = [
    "resnet18",
    "vit_tiny_patch16_224",
    "vit_small_patch14_reg4_dinov2",
    "vit_small_patch16_dinov3",
    "eva02_tiny_patch14_224",
    "swin_tiny_patch4_window7_224",
    "swinv2_cr_tiny_224",
    "convnext_atto",
    "davit_tiny",
    "hiera_tiny_224",
]


@pytest.mark.parametrize("name", FAMILIES)
def test_weights_are_drawn_as_timm_draws_them(name: str) -> None:
    torch.manual_seed(0)
    whole = timm.create_model(name, num_classes=0)
    with deferred_init(3):
        parts = timm.create_model(name, num_classes=0)
    expected, seen = dict(whole.named_parameters()), 0
    for key, parameter in parts.named_parameters():
        reference = expected[key].detach()
        assert parameter.shape == reference.shape and is_deferred(parameter) == (reference.numel() >= LARGE)
        if not is_deferred(parameter):
            continue
        assert parameter.is_meta
        found, std = materialise(parameter, key), float(reference.std())
        seen += 1
        if std == 0.0:
            assert torch.equal(found, reference), key
            continue
        assert float(found.std()) == pytest.approx(std, rel=0.03), key
        # The mean of n draws has a standard error of std / sqrt(n).
        assert abs(float(found.mean() - reference.mean())) < 8 * std / reference.numel() ** 0.5, key
        # Normal, truncated or uniform: distinguished by the mean absolute value.
        assert float(found.abs().mean()) == pytest.approx(float(reference.abs().mean()), rel=0.03), key
    assert seen > 5
    for (key, mine), theirs in zip(parts.named_buffers(), whole.buffers(), strict=True):
        assert torch.equal(mine, theirs), key


def test_values_depend_only_on_seed_and_name() -> None:
    def weights(seed: int) -> nn.Linear:
        with deferred_init(seed):
            return nn.Linear(256, 512)

    torch.manual_seed(5)
    first = materialise(weights(0).weight, "a")
    torch.manual_seed(6)
    deferred = weights(0).weight
    before = torch.get_rng_state()
    again = materialise(deferred, "a")
    assert torch.equal(first, again)
    assert torch.equal(torch.get_rng_state(), before), "the global random state is not changed"
    assert not torch.equal(first, materialise(weights(0).weight, "b"))
    assert not torch.equal(first, materialise(weights(1).weight, "a"))


def test_views_contents_and_requires_grad() -> None:
    class Odd(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table = nn.Parameter(torch.arange(LARGE).float())
            self.frozen = nn.Parameter(torch.ones(2, LARGE), requires_grad=False)
            with torch.no_grad():
                self.frozen[1].fill_(2.0)
                self.frozen.data[:, :10].mul_(3.0)
                self.table.neg_()

    with deferred_init():
        odd = Odd()
    real = list(real_parameters(odd, torch.float32))
    assert odd.table is real[0] and torch.equal(odd.table, -torch.arange(LARGE).float())
    assert not odd.frozen.requires_grad
    assert odd.frozen.unique(return_counts=True)[1].tolist() == [LARGE - 10, LARGE - 10, 10, 10]
    assert odd.frozen[1, 0] == 6.0 and odd.frozen[0, 0] == 3.0 and odd.frozen[1, 10] == 2.0


def test_filled_from_a_checkpoint() -> None:
    with deferred_init():
        linear = nn.Linear(256, 512)
    content = torch.randn(512, 256).half()
    fill(linear.weight, content)
    assert next(iter(real_parameters(linear, torch.bfloat16))).dtype == torch.bfloat16
    assert torch.equal(linear.weight, content.float().bfloat16())


def test_unrecordable_operations_are_refused_and_patches_are_undone() -> None:
    register, draw = nn.Module.register_parameter, nn.init.trunc_normal_
    with pytest.raises(NotImplementedError), deferred_init():
        timm.create_model("swinv2_tiny_window8_256", num_classes=0)
    assert nn.Module.register_parameter is register and nn.init.trunc_normal_ is draw
    assert not is_deferred(nn.Linear(512, 512).weight)
