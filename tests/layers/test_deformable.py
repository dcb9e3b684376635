"""Deformable convolutions: the operator by hand, the conversion, weights, and what is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import torch.nn.functional as F
from pydantic import ValidationError
from safetensors.torch import save_file
from tiny import tiny_run
from torch import Tensor, nn

from giantdet.config.architectures.common import BackboneConfig, NormConfig
from giantdet.config.classes import Classes
from giantdet.config.load import parse_run
from giantdet.config.resolve import resolve
from giantdet.errors import InputError
from giantdet.layers.backbone import Backbone, build_backbone
from giantdet.layers.deferred import deferred_init, is_deferred, materialise
from giantdet.layers.deformable import DeformableConv2d
from giantdet.layers.norm import apply_norm
from giantdet.layers.weights import load_backbone_weights
from giantdet.optim.param_groups import parameter_groups
from giantdet.tools.count import count

SIZE = (64, 96)
OPTIONS: tuple[dict[str, Any], ...] = (
    {"padding": 1},
    {"padding": 1, "stride": 2, "bias": False},
    {"padding": 2, "dilation": 2, "groups": 4},
    {"padding": 1, "groups": 8},
)


def build(name: str, **options: Any) -> Backbone:
    torch.manual_seed(0)
    backbone = build_backbone(BackboneConfig(name=name, **options), SIZE)
    for module in backbone.modules():
        if isinstance(module, nn.BatchNorm2d):  # timm zeroes a block's last norm, which hides its layers
            nn.init.ones_(module.weight)
    return backbone


def converted(options: dict[str, Any]) -> tuple[Tensor, nn.Conv2d, DeformableConv2d]:
    torch.manual_seed(1)
    conv = nn.Conv2d(8, 16, 3, **options)
    plain = nn.Conv2d(8, 16, 3, **options)
    plain.load_state_dict(conv.state_dict())
    DeformableConv2d.convert(conv)
    assert isinstance(conv, DeformableConv2d)
    return torch.randn(2, 8, 9, 11), plain, conv


@pytest.mark.parametrize("options", OPTIONS)
def test_starts_as_the_plain_convolution(options: dict[str, Any]) -> None:
    x, plain, conv = converted(options)
    torch.testing.assert_close(conv(x), plain(x))
    assert conv.bfloat16()(x.bfloat16()).dtype == torch.bfloat16


def by_hand(conv: DeformableConv2d, x: Tensor) -> Tensor:
    """Sum over taps of a 1x1 convolution of the map, sampled at the tap plus its offset (equation 1)."""
    height, width = x.shape[2:]
    predicted = F.conv2d(x, conv.offset.weight, conv.offset.bias, conv.stride, conv.padding, conv.dilation)
    rows, columns = predicted.shape[2:]
    out = torch.zeros(len(x), conv.out_channels, rows, columns, dtype=x.dtype)
    for tap in range(9):
        i, j = divmod(tap, 3)
        y = torch.arange(rows)[:, None] * conv.stride[0] - int(conv.padding[0]) + i * conv.dilation[0]
        z = torch.arange(columns)[None] * conv.stride[1] - int(conv.padding[1]) + j * conv.dilation[1]
        y, z = y + predicted[:, 2 * tap], z + predicted[:, 2 * tap + 1]
        grid = torch.stack([(2 * z + 1) / width - 1, (2 * y + 1) / height - 1], -1)
        read = F.grid_sample(x, grid, mode="bilinear", padding_mode="zeros", align_corners=False)
        read = read * (2 / (1 + torch.exp(-predicted[:, 18 + tap])))[:, None]
        out = out + F.conv2d(read, conv.weight[:, :, i : i + 1, j : j + 1], groups=conv.groups)
    return out if conv.bias is None else out + conv.bias[:, None, None]


@pytest.mark.parametrize("options", OPTIONS)
def test_equals_the_definition_with_random_offsets(options: dict[str, Any]) -> None:
    """Compare the output, and the gradients of all parameters and of the input."""
    x, _, conv = converted(options)
    nn.init.normal_(conv.offset.weight, std=0.1)
    assert conv.offset.bias is not None
    nn.init.normal_(conv.offset.bias)
    x.requires_grad_()
    inputs = [x, *conv.parameters()]
    ours, wanted = conv(x), by_hand(conv, x)
    torch.testing.assert_close(ours, wanted, rtol=1e-4, atol=1e-4)
    weight = torch.randn_like(ours)
    for mine, other in zip(
        torch.autograd.grad((ours * weight).sum(), inputs),
        torch.autograd.grad((wanted * weight).sum(), inputs),
        strict=True,
    ):
        assert mine.abs().max() > 0
        torch.testing.assert_close(mine, other, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize(
    ("name", "stages", "count"),
    [
        ("resnet50", [3, 4, 5], 4 + 6 + 3),  # one 3x3 layer per bottleneck
        ("resnet18", [5], 4),
        ("resnext50_32x4d", [2], 3),
        ("res2net50_26w_4s", [5], 9),
        ("regnetx_002", [4, 5], 4 + 7),
        ("efficientnet_lite0", [2], 2),
    ],
)
def test_stages_are_converted_from_outside(name: str, stages: list[int], count: int) -> None:
    """Only 3x3 layers of these stages change; other keys are timm's, and the maps are the plain model's."""
    plain, ours = build(name), build(name, deformable_stages=stages)
    found = [key for key, m in ours.body.named_modules() if isinstance(m, DeformableConv2d)]
    assert len(found) == count
    own = {f"{key}.offset.{part}" for key in found for part in ("weight", "bias")}
    assert ours.added_keys == own
    assert ours.body.state_dict().keys() - own == plain.body.state_dict().keys()
    ours.body.load_state_dict(plain.body.state_dict(), strict=False)
    images = torch.randn(1, 3, *SIZE)
    with torch.no_grad():
        for mine, other in zip(ours.eval()(images), plain.eval()(images), strict=True):
            torch.testing.assert_close(mine, other, rtol=1e-3, atol=1e-4)


def test_stage_4_is_layer3_of_a_resnet() -> None:
    found = {n for n, m in build("resnet50", deformable_stages=[4]).body.named_modules() if "offset" in n}
    assert found == {f"layer3.{i}.conv2.offset" for i in range(6)}


@pytest.mark.parametrize("in_parts", [False, True])
def test_pretrained_weights_load(tmp_path: Path, in_parts: bool) -> None:
    """The offsets keep their zeros even if large weights are created one by one, as at ZeRO-3."""
    source = timm.create_model("resnet10t")
    save_file(source.state_dict(), tmp_path / "w.safetensors")
    config = BackboneConfig(
        name="resnet10t", deformable_stages=(4, 5), init_weights=str(tmp_path / "w.safetensors")
    )
    if in_parts:
        with deferred_init():
            backbone = build_backbone(config, SIZE)
        assert is_deferred(backbone.body.layer4[0].conv2.offset.weight)
    else:
        backbone = build_backbone(config, SIZE)
    load_backbone_weights(backbone, config)
    own = {n: materialise(p, n) if is_deferred(p) else p for n, p in backbone.body.named_parameters()}
    assert sum(".offset." in name for name in own) == 8
    for name, parameter in own.items():
        wanted = torch.zeros_like(parameter) if ".offset." in name else source.get_parameter(name)
        assert torch.equal(parameter, wanted), name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "options", [{}, {"output_stride": 16, "frozen_stages": 2, "checkpoint_blocks": True}]
)
def test_trains(dtype: torch.dtype, options: dict[str, Any]) -> None:
    backbone = build("resnet18", deformable_stages=[3, 4, 5], **options)
    backbone = apply_norm(backbone, NormConfig(type="local")).to(dtype).train()
    with torch.no_grad():
        for name, parameter in backbone.named_parameters():
            if ".offset." in name:
                parameter.normal_(0, 0.05)
    loss = sum(level.float().square().mean() for level in backbone(torch.randn(2, 3, *SIZE, dtype=dtype)))
    loss.backward()  # type: ignore[union-attr]
    free = {name: p.grad for name, p in backbone.named_parameters() if p.requires_grad}
    assert sum(".offset." in name for name in free) == 24
    for name, gradient in free.items():
        assert gradient is not None and gradient.isfinite().all() and gradient.abs().max() > 0, name


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("convnext_atto", "stage 4 of 'convnext_atto' has no 3x3 convolution: leave it out of"),
        ("vit_tiny_patch16_224", "for convolutional backbones, not for 'vit_tiny"),
        ("resnetv2_50x1_bit", r"convolutions of another kind \(StdConv2d\), which cannot be deformable"),
    ],
)
def test_others_are_refused(name: str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        build(name, deformable_stages=[4])


def test_frozen_stages_and_unknown_ones_are_refused() -> None:
    frozen = BackboneConfig(frozen_stages=3, deformable_stages=(3, 4))
    assert "has stages [3], which frozen_stages 3 freezes" in "".join(frozen.problems())
    with pytest.raises(ValidationError, match="deformable_stages"):
        BackboneConfig(deformable_stages=(1,))


def test_offsets_can_have_their_own_learning_rate() -> None:
    """Uses the settings given in docs/backbones.md."""
    modules = {"offsets": ("*.offset.*",), "rest": ("*",)}
    backbone = build("resnet18", deformable_stages=[5])
    groups = parameter_groups(backbone, 0.1, 1.0, modules, None, {"offsets": 0.1})
    slow = {id(p) for group in groups for p in group["params"] if group["lr"] == 0.1}
    assert slow == {id(p) for name, p in backbone.named_parameters() if ".offset." in name} and len(slow) == 8


def test_flops_include_the_convolution_and_its_offsets(demo_data: Path) -> None:
    """The plan's count for a forward and a backward pass."""
    found = {}
    for stages in ([], [5]):
        backbone = {"name": "test_resnet", "deformable_stages": stages}
        run = parse_run(tiny_run(demo_data, demo_data, giantdet__model__backbone=backbone))
        found[len(stages)] = count(resolve(run, 1, 100, Classes.numbered(4), has_gpu=False), 1)
    body = build("test_resnet").body
    layers = [m for name, m in body.layer4.named_modules() if getattr(m, "kernel_size", 0) == (3, 3)]
    # On a map of 2 x 2; the input size of a strided layer does not matter to its output size.
    offsets = sum(2 * 4 * 9 * 27 * layer.in_channels for layer in layers)
    assert found[1].forward - found[0].forward == offsets > 0
    assert found[1].backward - found[0].backward == 2 * offsets
