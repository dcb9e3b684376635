"""Large kernels and context blocks in the pyramid against plain convolutions and loops."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from giantdet.config.architectures import SECTIONS
from giantdet.config.architectures.challenge import ContextConfig, LargeKernelConfig
from giantdet.config.architectures.common import FpnConfig, PartNormConfig
from giantdet.layers.cgbn import CrossGpuBatchNorm
from giantdet.layers.context import GlobalContext, SeparableKernel
from giantdet.layers.fpn import build_fpn
from giantdet.layers.norm import apply_norm

CHANNELS, STRIDES = (4, 6, 8, 10), (4, 8, 16, 32)


def pyramid(plain: bool = False, finest: Any = 2, **config: Any) -> nn.Module:
    torch.manual_seed(0)
    section = FpnConfig.model_validate({"channels": 32, **config})
    if plain:
        return build_fpn(section, (16,), (16,), True, finest)
    return build_fpn(section, CHANNELS, STRIDES, False, finest)


def maps(side: int = 64) -> list[Tensor]:
    return [torch.randn(1, c, side // s, side // s) for c, s in zip(CHANNELS, STRIDES, strict=True)]


@pytest.mark.parametrize("size", [3, 7, 15])
def test_each_output_sees_a_square(size: int) -> None:
    """The gradient of one output is nonzero in exactly size x size inputs around it."""
    torch.manual_seed(0)
    layer = SeparableKernel(2, 3, 4, size)
    x = torch.randn(1, 2, 21, 23, requires_grad=True)
    layer(x)[0, :, 10, 11].sum().backward()
    assert x.grad is not None
    seen = x.grad.abs().sum((0, 1)) > 0
    half = size // 2
    expected = torch.zeros_like(seen)
    expected[10 - half : 11 + half, 11 - half : 12 + half] = True
    assert torch.equal(seen, expected)


def test_equals_one_dense_convolution() -> None:
    """The kernel of the dense convolution is the sum over both orders of the products of their kernels."""
    torch.manual_seed(0)
    layer = SeparableKernel(2, 3, 4, 5, bias=False)
    for order in (layer.tall_first, layer.wide_first):  # the zero padding carries no bias
        nn.init.zeros_(order[0].bias)
    tall, wide = [[conv.weight for conv in order] for order in (layer.tall_first, layer.wide_first)]
    dense = torch.einsum("mciz,omzj->ocij", tall[0], tall[1])
    dense = dense + torch.einsum("mczj,omiz->ocij", wide[0], wide[1])
    x = torch.randn(2, 2, 9, 8)
    torch.testing.assert_close(layer(x), F.conv2d(x, dense, padding=2))


def test_parameters() -> None:
    """2 k m (C_in + C) weights, plus the biases of four convolutions."""
    count = lambda module: sum(p.numel() for p in module.parameters())  # noqa: E731
    assert count(SeparableKernel(10, 24, 32, 15)) == 2 * 15 * 24 * (10 + 32) + 2 * (24 + 32)
    large = pyramid(large_kernel={"size": 15, "width": 24, "levels": [4, 5]})
    ones = pyramid()
    more = sum(2 * 15 * 24 * (c + 32) + 2 * (24 + 32) - 32 * c - 32 for c in CHANNELS[2:])
    assert count(large) - count(ones) == more
    # GCNet: a 1x1 convolution to one channel, two with 32 / 16 channels between them, and a LayerNorm.
    assert count(pyramid(context={})) - count(ones) == (32 + 1) + (32 * 2 + 2) + 2 * 2 + (2 * 32 + 32)


def test_context_is_a_weighted_mean_of_the_map() -> None:
    torch.manual_seed(0)
    block = GlobalContext(8, ContextConfig(reduction=2))
    x = torch.randn(2, 8, 3, 5)
    assert torch.equal(block(x), x), "it does not start as the identity"
    nn.init.normal_(block.transform[-1].weight)
    for b in range(2):
        cells = [x[b, :, i, j] for i in range(3) for j in range(5)]
        shares = torch.stack([block.attention.weight[0, :, 0, 0] @ cell for cell in cells]).exp()
        mean = sum((s * cell for s, cell in zip(shares / shares.sum(), cells, strict=True)), torch.zeros(8))
        first, norm, _, last = block.transform
        hidden = F.layer_norm(first.weight[:, :, 0, 0] @ mean + first.bias, [4], eps=norm.eps)
        added = last.weight[:, :, 0, 0] @ hidden.relu()
        torch.testing.assert_close(block(x)[b], x[b] + added[:, None, None])


@pytest.mark.parametrize("norm", ["none", "batch", "group"])
def test_only_the_selected_levels_change(norm: str) -> None:
    plain, changed = (
        pyramid(norm=norm),
        pyramid(norm=norm, large_kernel={"width": 8}, context={"levels": [4]}),
    )
    theirs, mine = plain.state_dict(), changed.state_dict()
    gone = {key for key in theirs if key.startswith("laterals.3.")}
    assert theirs.keys() - mine.keys() == {
        key for key in gone if key == "laterals.3.0.weight" or norm == "none"
    }
    new = mine.keys() - theirs.keys()
    place = 1 if norm == "none" else 2
    assert all(key.startswith(("laterals.3.0.", f"laterals.2.{place}.")) for key in new)
    assert len(new) > 10
    changed.load_state_dict({key: theirs[key] for key in theirs.keys() - gone}, strict=False)
    features = maps()
    shapes = [tuple(level.shape) for level in changed(features)]
    assert shapes == [tuple(level.shape) for level in plain(features)]


def test_default_keys_are_unchanged() -> None:
    expected = {
        f"{part}.{i}.0.{kind}"
        for part in ("laterals", "outputs")
        for i in range(4)
        for kind in ("weight", "bias")
    }
    assert pyramid().state_dict().keys() == expected


def test_large_kernel_replaces_the_lateral_of_a_level() -> None:
    """P5 computed from the maps by hand: both orders, norm, ReLU, and the output convolution."""
    fpn = pyramid(norm="group", large_kernel={"size": 5, "width": 8})
    c5 = maps(128)[-1]
    kernel, norm, _ = fpn.laterals[-1]
    hidden = kernel.tall_first[1](kernel.tall_first[0](c5)) + kernel.wide_first[1](kernel.wide_first[0](c5))
    assert kernel.tall_first[1].bias is None
    expected = fpn.outputs[-1](norm(hidden).relu())
    torch.testing.assert_close(fpn([*maps(128)[:-1], c5])[3], expected)


def test_batch_norms_follow_the_norm_block() -> None:
    fpn = pyramid(norm="batch", large_kernel={})
    apply_norm(fpn, PartNormConfig(type="local"))
    assert isinstance(fpn.laterals[-1][1], CrossGpuBatchNorm)


@pytest.mark.parametrize("finest", [2, 3])
def test_plain_vits_support_them_too(finest: int) -> None:
    fpn = pyramid(
        plain=True, finest=finest, large_kernel={"levels": [3, 5], "width": 8}, context={"levels": [4]}
    )
    kinds = [
        [
            type(module).__name__
            for module in stage.modules()
            if isinstance(module, SeparableKernel | GlobalContext)
        ]
        for stage in fpn.stages
    ]
    assert kinds == [[], ["SeparableKernel"], ["GlobalContext"], ["SeparableKernel"]][finest - 2 :]
    assert [level.shape[-1] for level in fpn([torch.randn(1, 16, 8, 8)])] == [32, 16, 8, 4, 2][finest - 2 :]


def test_bad_settings_are_named() -> None:
    def problems(kind: str, fpn: dict[str, Any]) -> list[str]:
        return list(SECTIONS[kind].model_validate({"type": kind, "fpn": fpn}).problems())

    assert problems("mask_rcnn", {"large_kernel": {"size": 14}}) == [
        "fpn.large_kernel.size must be odd, got 14"
    ]
    levels = {"context": {"levels": [2]}}
    assert problems("retinanet", levels) == ["fpn.context.levels must be levels from 3 to 5, got [2]"]
    assert not problems("semantic_fpn", levels)
    assert LargeKernelConfig().size == 15
