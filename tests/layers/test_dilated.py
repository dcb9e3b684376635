"""Dilated last stages against torchvision's; everything after them follows the strides."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
import torchvision
from tiny import MODELS
from torch import Tensor, nn

from giantdet.architectures import build_model
from giantdet.config.architectures import SECTIONS
from giantdet.config.architectures.common import BackboneConfig, FpnConfig
from giantdet.errors import InputError
from giantdet.layers.backbone import Backbone, build_backbone
from giantdet.layers.fpn import FeaturePyramid, Subsampled, build_fpn
from giantdet.layers.roi_pool import RoiMaps, RoiPool

SIZE = (64, 96)
SWIN, VIT = "swin_tiny_patch4_window7_224", "vit_tiny_patch16_224"


def build(name: str, output_stride: int, size: tuple[int, int] = SIZE, **options: Any) -> Backbone:
    torch.manual_seed(0)
    return build_backbone(BackboneConfig(name=name, output_stride=output_stride, **options), size)


@pytest.mark.parametrize(("output_stride", "dilated"), [(16, [False, False, True]), (8, [False, True, True])])
def test_equals_torchvision(output_stride: int, dilated: list[bool]) -> None:
    ours = build("resnet50", output_stride).eval()
    theirs = torchvision.models.resnet50(weights=None, replace_stride_with_dilation=dilated).eval()
    theirs.load_state_dict(ours.body.state_dict(), strict=False)
    images = torch.randn(1, 3, *SIZE)
    with torch.no_grad():
        maps = ours(images)
        x: Tensor = theirs.maxpool(theirs.relu(theirs.bn1(theirs.conv1(images))))
        for level, stage in zip(maps, ("layer1", "layer2", "layer3", "layer4"), strict=True):
            x = getattr(theirs, stage)(x)
            torch.testing.assert_close(level, x, rtol=1e-4, atol=1e-5)
    wanted = tuple(min(stride, output_stride) for stride in (4, 8, 16, 32))
    assert ours.strides == wanted
    assert [tuple(m.shape[2:]) for m in maps] == [(SIZE[0] // s, SIZE[1] // s) for s in wanted]


@pytest.mark.parametrize("name", ["resnext50_32x4d", "regnetx_002", "efficientnet_lite0", "convnext_atto"])
def test_every_second_cell_equals_the_strided_model(name: str) -> None:
    """The definition of atrous convolution: equal weights give the same map, plus the cells in between."""
    dilated, strided = build(name, 16).eval(), build(name, 32).eval()
    assert dilated.state_dict().keys() == strided.state_dict().keys()
    dilated.load_state_dict(strided.state_dict())
    images = torch.randn(1, 3, *SIZE)
    with torch.no_grad():
        fine, coarse = dilated(images), strided(images)
    for level in range(3):
        assert torch.equal(fine[level], coarse[level])
    torch.testing.assert_close(fine[3][:, :, ::2, ::2], coarse[3], rtol=1e-4, atol=1e-5)
    assert not torch.equal(fine[3][:, :, 1::2, 1::2], fine[3][:, :, ::2, ::2])


def centre_of_cells(backbone: Backbone, size: tuple[int, int]) -> list[float]:
    """How far right of s * i pixels the middle cell i of each map is centred, for constant weights."""
    for module in backbone.body.modules():
        for name, child in module.named_children():
            if "Norm" in type(child).__name__:
                setattr(module, name, nn.Identity())
    for module in backbone.body.modules():
        if isinstance(module, nn.Conv2d | nn.Linear):
            nn.init.constant_(module.weight, 1 / module.weight[0].numel())
            if module.bias is not None:
                nn.init.zeros_(module.bias)
        elif isinstance(module, nn.MaxPool2d):  # average pooling: the same centre, a gradient everywhere
            pool = (module.kernel_size, module.stride, module.padding)
            module.forward = lambda x, pool=pool: F.avg_pool2d(x, *pool)  # type: ignore[method-assign]
    images = torch.ones(1, 3, *size, requires_grad=True)
    maps = backbone.body.forward_intermediates(images, indices=backbone.indices, intermediates_only=True)
    found = []
    for level, stride in zip(maps, backbone.strides, strict=True):
        middle = size[1] // stride // 2
        (gradient,) = torch.autograd.grad(level[0, :, -1, middle].sum(), images, retain_graph=True)
        weight = gradient.double().abs().sum((0, 1, 2))
        centre = ((torch.arange(size[1]) + 0.5) * weight).sum() / weight.sum()
        found.append(float(centre) - stride * middle)
    return found


def test_where_cells_are_centred() -> None:
    """A ResNet's cell i is at pixel s * i, its anchors' centre; ConvNeXt's in the middle of its s pixels.

    ConvNeXt's dilated 2x2 layer reads this cell and the next, so the map is half a cell further right: no
    further from where RoIAlign assumes it (s / 2) than a ResNet's.
    """
    size = (32, 1024)
    for output_stride in (32, 16):
        assert centre_of_cells(build("resnet50", output_stride, size), size) == pytest.approx(
            [0.5] * 4, abs=0.01
        )
    assert centre_of_cells(build("convnext_atto", 32, size), size) == pytest.approx([2, 4, 8, 16], abs=0.1)
    assert centre_of_cells(build("convnext_atto", 16, size), size) == pytest.approx([2, 4, 8, 16], abs=0.1)


@pytest.mark.parametrize("output_stride", [16, 8])
def test_pyramid_adds_maps_of_one_stride_cell_by_cell(output_stride: int) -> None:
    strides, channels = tuple(min(s, output_stride) for s in (4, 8, 16, 32)), (3, 5, 7, 9)
    torch.manual_seed(0)
    fpn = build_fpn(FpnConfig(channels=8), channels, strides, is_plain=False)
    maps = [torch.randn(2, c, 64 // s, 96 // s) for c, s in zip(channels, strides, strict=True)]
    levels = fpn(maps)
    assert isinstance(fpn, FeaturePyramid)
    assert fpn.strides == (*strides, 2 * output_stride)
    assert [tuple(level.shape[2:]) for level in levels] == [(64 // s, 96 // s) for s in fpn.strides]
    laterals = [lateral(m) for lateral, m in zip(fpn.laterals, maps, strict=True)]
    fine = laterals[3] + laterals[2]  # [..., 4, 6] at stride 16
    torch.testing.assert_close(levels[2], fpn.outputs[2](fine))
    above = fine if output_stride == 8 else fine.repeat_interleave(2, 2).repeat_interleave(2, 3)
    torch.testing.assert_close(levels[1], fpn.outputs[1](laterals[1] + above))
    torch.testing.assert_close(levels[4], levels[3][:, :, ::2, ::2])


def test_rois_read_their_own_position() -> None:
    """Cells contain their own position, so a bin gives its centre in pixels, on every level."""
    strides = FeaturePyramid(FpnConfig(), (1, 1, 1, 1), (4, 8, 16, 16), Subsampled()).strides
    assert strides == (4, 8, 16, 16, 32)
    maps = []
    for level, stride in enumerate(strides):
        y, x = ((torch.arange(1024 // stride) + 0.5) * stride for _ in range(2))
        position = torch.stack([*torch.meshgrid(y, x, indexing="ij"), torch.full((len(y), len(x)), level)])
        maps.append(position[None].float())
    sides = torch.tensor([50.0, 150.0, 300.0, 600.0])
    corner = torch.tensor([101.0, 57.0])
    boxes = torch.cat([corner.expand(4, 2), corner + sides[:, None]], 1)
    pooled = RoiPool(strides, aligned=True, level_epsilon=1e-8)(RoiMaps(maps), boxes[None], 7, 2)
    steps = (torch.arange(7) + 0.5) / 7
    for side, found, level in zip(sides, pooled, range(4), strict=True):
        torch.testing.assert_close(found[2], torch.full((7, 7), float(level)))
        torch.testing.assert_close(found[0], (corner[1] + side * steps)[:, None].expand(7, 7))
        torch.testing.assert_close(found[1], (corner[0] + side * steps)[None].expand(7, 7))


@pytest.mark.parametrize("kind", [kind for kind in MODELS if kind != "upernet"])
def test_anchors_and_heads_follow(kind: str) -> None:
    """A level with w cells has anchors centred at multiples of W / w pixels, all within the canvas."""
    section = {**MODELS[kind], "backbone": {"name": "test_resnet", "output_stride": 16}, "num_classes": 3}
    section |= {"num_stuff_classes": 2} if kind == "panoptic_fpn" else {}
    model = build_model(SECTIONS[kind].model_validate(section), (128, 128))
    levels = model.fpn(model.backbone(torch.randn(1, 3, 128, 128)))
    sides = [32, 16, 8, 8, 4, 2]
    if kind == "semantic_fpn":
        assert model.semantic_head(levels[:4]).shape == (1, 3, 32, 32)
        return
    sides = sides[1:] if kind == "retinanet" else sides[:5]
    assert [level.shape[2] for level in levels] == sides
    anchors = model.anchors(levels) if kind == "retinanet" else model.rpn.anchors(levels)
    for side, anchors_A4 in zip(sides, anchors, strict=True):
        x = ((anchors_A4[:, 0] + anchors_A4[:, 2]) / 2).round(decimals=3)
        assert x.unique().tolist() == [i * 128 / side for i in range(side)]


@pytest.mark.parametrize("name", [SWIN, VIT, "inception_v4", "hrnet_w18_small"])
def test_families_that_cannot_be_dilated_are_named(name: str) -> None:
    with pytest.raises(InputError, match=f"timm cannot dilate backbone '{name}': set output_stride to 32"):
        build(name, 16)


def test_the_frozen_stages_are_the_same() -> None:
    frozen = [
        {
            name
            for name, p in build("resnet18", stride, frozen_stages=4).body.named_parameters()
            if not p.requires_grad
        }
        for stride in (32, 16)
    ]
    assert frozen[0] == frozen[1] and "layer3.0.conv1.weight" in frozen[0]
