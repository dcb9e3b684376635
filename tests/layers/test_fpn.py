"""The pyramid against torchvision's `FeaturePyramidNetwork` with equal weights."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torchvision.ops import FeaturePyramidNetwork
from torchvision.ops.feature_pyramid_network import LastLevelMaxPool

from giantdet.config.architectures import SECTIONS
from giantdet.config.architectures.common import FpnConfig
from giantdet.layers.fpn import FeaturePyramid, Subsampled, build_fpn

CHANNELS = (8, 12, 16, 20)


def maps(height: int, width: int) -> list[torch.Tensor]:
    return [torch.randn(2, c, height // s, width // s) for c, s in zip(CHANNELS, (4, 8, 16, 32), strict=True)]


@pytest.mark.parametrize("size", [(64, 128), (96, 32)])
def test_equals_torchvision(size: tuple[int, int]) -> None:
    torch.manual_seed(0)
    ours = build_fpn(FpnConfig(channels=10), CHANNELS, (4, 8, 16, 32), is_plain=False)
    assert isinstance(ours, FeaturePyramid)
    theirs = FeaturePyramidNetwork(list(CHANNELS), 10, extra_blocks=LastLevelMaxPool())
    for mine, other in ((ours.laterals, theirs.inner_blocks), (ours.outputs, theirs.layer_blocks)):
        for a, b in zip(mine, other, strict=True):
            nn.init.normal_(a[0].bias)
            b.load_state_dict(a.state_dict())
    features = maps(*size)
    expected = list(theirs({str(i): f for i, f in enumerate(features)}).values())
    levels = ours(features)
    assert len(levels) == len(expected) == 5
    for a, b in zip(levels, expected, strict=True):
        torch.testing.assert_close(a, b)
    assert levels[4].shape[-2:] == (-(-size[0] // 64), -(-size[1] // 64))


def test_initialisation_equals_detectron2s() -> None:
    """`c2_xavier_fill`: uniform within sqrt(3 / fan_in), biases 0."""
    torch.manual_seed(0)
    fpn = FeaturePyramid(FpnConfig(channels=64), CHANNELS, (4, 8, 16, 32), Subsampled())
    for block in (*fpn.laterals, *fpn.outputs):
        weight, bias = block[0].weight, block[0].bias
        bound = (3 / weight[0].numel()) ** 0.5
        assert 0.95 * bound < weight.abs().max() <= bound
        assert not bias.any()


def test_norms_replace_biases() -> None:
    for norm in ("batch", "layer", "group"):
        fpn = FeaturePyramid(FpnConfig(channels=32, norm=norm), CHANNELS, (4, 8, 16, 32), Subsampled())
        for block in (*fpn.laterals, *fpn.outputs):
            assert block[0].bias is None and len(block) == 2
        assert [level.shape[1] for level in fpn(maps(64, 64))] == [32] * 5


@pytest.mark.parametrize("kind", ["mask_rcnn", "retinanet", "semantic_fpn"])
def test_group_norms_need_multiples_of_their_groups(kind: str) -> None:
    """The message names the key that sets the number of channels; unused layers are not checked."""
    head = {"mask_rcnn": "box_head", "retinanet": "head"}.get(kind)
    sections = {"fpn": {"channels": 48, "norm": "group"}}
    (problem,) = _problems(kind, sections)
    assert problem.startswith("fpn.channels must be a multiple of 32, the groups of GroupNorm, got 48")
    assert not _problems(kind, {"fpn": {"channels": 64, "norm": "group"}})
    if head is not None:
        group = {"fpn": {"channels": 48}, head: {"convs": 1, "norm": "group"}}
        assert _problems(kind, group)[0].startswith(f"fpn.channels (with {head}.norm group)")
        assert not _problems(kind, {**group, head: {"convs": 0, "norm": "group"}})
    if kind == "mask_rcnn":
        mask = {"width": 40, "norm": "group"}
        assert _problems(kind, {"mask_head": mask})[0].startswith("mask_head.width must be a multiple of 32")
        assert not _problems(kind, {"mask_head": {**mask, "enabled": False}})


def _problems(kind: str, sections: dict[str, dict[str, object]]) -> list[str]:
    return list(SECTIONS[kind].model_validate({"type": kind, **sections}).problems())


def test_simple_pyramid_has_the_same_strides() -> None:
    pyramid = build_fpn(FpnConfig(channels=8, norm="layer"), (16,), (16,), is_plain=True)
    levels = pyramid([torch.randn(2, 16, 6, 4)])
    assert [tuple(level.shape) for level in levels] == [
        (2, 8, 24, 16),
        (2, 8, 12, 8),
        (2, 8, 6, 4),
        (2, 8, 3, 2),
        (2, 8, 2, 1),
    ]


@pytest.mark.parametrize(("strides", "is_plain"), [((2, 4, 8, 16), False), ((8,), True)])
def test_other_strides_are_refused(strides: tuple[int, ...], is_plain: bool) -> None:
    with pytest.raises(ValueError, match="strides"):
        build_fpn(FpnConfig(), CHANNELS[: len(strides)], strides, is_plain)
