"""Families of timm models on a canvas other than their own: training, evaluation, weights, alignment."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from tiny import MODEL, REPO
from torch import Tensor, nn

from giantdet.architectures import build_model, total_loss
from giantdet.config.architectures.common import BackboneConfig, NormConfig
from giantdet.config.architectures.mask_rcnn import MaskRcnnConfig
from giantdet.config.types import DataConfig
from giantdet.data.coco import CocoDataset
from giantdet.data.loader import train_loader
from giantdet.data.streams import BOXES_AND_MASKS
from giantdet.errors import InputError
from giantdet.layers.backbone import Backbone, build_backbone
from giantdet.layers.blocks import blocks_of
from giantdet.layers.families import FAMILIES, family_of
from giantdet.layers.weights import load_backbone_weights

CANVAS = (96, 160)
# Delay in pixels of cells at strides 4 and 8 without padding (kernel, stride and padding composed).
LATE = {"inception_v4": (5, 13), "inception_resnet_v2": (9, 13)}


def page_maker() -> Any:
    spec = importlib.util.spec_from_file_location("backbones", REPO / "scripts/backbones.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


PAGE = page_maker()
ROWS = {row.family: row for row in PAGE.ROWS}


@pytest.mark.parametrize("family", ROWS)
def test_a_model_of_the_family_trains_and_evaluates(demo_data: Path, family: str) -> None:
    """A step reaches every weight and lowers the RPN's loss on fixed samples; detections are finite."""
    torch.manual_seed(0)
    backbone = {"name": ROWS[family].small, "timm_args": ROWS[family].timm_args, "window": 4}
    config = MaskRcnnConfig.model_validate({**MODEL, "backbone": backbone, "num_classes": 4})
    model = build_model(config, CANVAS, NormConfig(type="local")).train()
    dataset = CocoDataset(demo_data / "train.json", demo_data / "train")
    data = DataConfig(size=CANVAS, short_side=96, max_objects=8, mask_frame=28, workers=0)
    batch = next(train_loader(dataset, data, 2, seed=3, targets=BOXES_AND_MASKS))
    maps = model.backbone(model.normalise(batch.images_B3HW, batch.sizes_B2))
    wanted = [
        (2, c, CANVAS[0] // s, CANVAS[1] // s)
        for c, s in zip(model.backbone.channels, model.backbone.strides, strict=True)
    ]
    assert [tuple(level.shape) for level in maps] == wanted
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-4)
    losses = []
    for _ in range(2):
        found = model.losses(model(batch), batch)
        optimizer.zero_grad()
        total_loss(found).backward()  # type: ignore[no-untyped-call]
        losses.append(float(found["loss_rpn_cls"].detach()))
        for name, parameter in model.named_parameters():
            assert parameter.grad is not None and parameter.grad.isfinite().all(), name
        optimizer.step()
    assert losses[-1] < losses[0]
    with torch.no_grad():
        detections = model.eval()(batch).detections
    assert detections.boxes_BD4.isfinite().all() and detections.scores_BD.isfinite().all()
    assert len(blocks_of(config.backbone, model.backbone.body)) >= 2


@pytest.mark.parametrize("family", ROWS)
def test_weights_of_the_native_size_load(tmp_path: Path, family: str) -> None:
    """The classifier's file loads; tables of positions are resized to the canvas, other weights are equal."""
    row = ROWS[family]
    source = timm.create_model(row.small, **row.timm_args)
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in source.parameters():
            parameter.normal_()
    state = {key: tensor.contiguous() for key, tensor in source.state_dict().items()}
    save_file(state, tmp_path / "w.safetensors")
    config = BackboneConfig(
        name=row.small, timm_args=row.timm_args, init_weights=str(tmp_path / "w.safetensors"), window=4
    )
    backbone = build_backbone(config, CANVAS)
    load_backbone_weights(backbone, config)
    for name, parameter in backbone.body.named_parameters():
        if parameter.shape == state[name].shape:
            assert torch.equal(parameter, state[name]), name
        else:
            assert "pos_embed" in name or "relative_position_bias_table" in name
            assert parameter.abs().max() > 1


def test_positions_of_hiera_are_interpolated() -> None:
    """A ramp over the columns of the native grid stays a ramp over the canvas's columns."""
    native = timm.create_model("hiera_tiny_224", **ROWS["Hiera"].timm_args)
    backbone = build_backbone(
        BackboneConfig(name="hiera_tiny_224", timm_args=ROWS["Hiera"].timm_args), CANVAS
    )
    ramp = (torch.arange(56) + 0.5) / 56
    table = ramp.expand(56, 56).reshape(1, -1, 1).expand_as(native.pos_embed)
    found = family_of("hiera_tiny_224").resample({"pos_embed": table}, backbone.body)["pos_embed"]
    assert found.shape == backbone.body.pos_embed.shape == (1, 24 * 40, 16)
    middle = found[0, :, 0].view(24, 40)[:, 4:-4]
    torch.testing.assert_close(
        middle, ((torch.arange(40) + 0.5) / 40)[4:-4].expand(24, 32), atol=2e-3, rtol=0
    )


def linear(backbone: Backbone) -> Backbone:
    """Constant positive weights, average pooling and no norms: responses are centred at their cells."""
    for module in backbone.body.modules():
        for name, child in module.named_children():
            if isinstance(child, nn.BatchNorm2d):
                setattr(module, name, nn.Identity())
        if isinstance(module, nn.Conv2d):
            nn.init.constant_(module.weight, 1 / module.weight[0].numel())
            if module.bias is not None:
                nn.init.zeros_(module.bias)
        elif isinstance(module, nn.MaxPool2d):
            pool = (module.kernel_size, module.stride, module.padding)
            module.forward = lambda x, pool=pool: F.avg_pool2d(x, *pool)  # type: ignore[method-assign]
    return backbone.double().eval()


def maps_of(backbone: Backbone, images: Tensor) -> list[Tensor]:
    with torch.no_grad():
        maps: list[Tensor] = backbone.body.forward_intermediates(
            images, indices=backbone.indices, intermediates_only=True
        )
    return maps


@pytest.mark.parametrize("name", ["resnet18", "xception", *LATE])
def test_responses_to_lines_are_at_their_position_in_the_image(name: str) -> None:
    """A vertical and a horizontal line at pixel s * i: cell i of stride s responds, its neighbours equally.

    So cells are centred at the centres of their anchors. Without padding, cells of an Inception are centred
    1.2 to 2.2 cells too far left.
    """
    length, at = 512, 256
    backbone = linear(build_backbone(BackboneConfig(name=name), (64, length)))
    image = torch.zeros(1, 3, 64, length, dtype=torch.float64)
    image[..., at] = 1
    vertical, horizontal = maps_of(backbone, image), maps_of(backbone, image.mT)
    for level, rotated, stride in zip(vertical, horizontal, backbone.strides, strict=True):
        assert level.shape[2:] == rotated.mT.shape[2:] == (64 // stride, length // stride)
        for line in (level.mean((0, 1, 2)), rotated.mean((0, 1, 3))):
            seen = line[at // stride - 3 : at // stride + 4]
            centre = float((seen * torch.arange(-3, 4)).sum() / seen.sum())
            assert abs(centre) < 0.02 and seen.argmax() == 3, (stride, centre)


@pytest.mark.parametrize("name", LATE)
def test_padding_does_not_change_weights_or_inner_cells(name: str) -> None:
    """An unpadded network sees the same in an image that starts c pixels earlier (c: the delay in LATE)."""
    torch.manual_seed(0)
    ours = build_backbone(BackboneConfig(name=name), (192, 192)).eval()
    theirs = timm.create_model(name, num_classes=0).eval()
    assert not theirs.load_state_dict(ours.body.state_dict(), strict=False).missing_keys
    images = torch.randn(1, 3, 192, 192)
    for index, stride, late in zip(ours.indices[:2], ours.strides[:2], LATE[name], strict=True):
        skip = -(-late // stride)
        cut = images[:, :, stride * skip - late :, stride * skip - late :]  # starts `late` before cell `skip`
        run: dict[str, Any] = {"indices": [index], "intermediates_only": True, "stop_early": True}
        with torch.no_grad():
            (wanted,) = theirs.forward_intermediates(cut, **run)
            (found,) = ours.body.forward_intermediates(images, **run)
        inner = slice(7, wanted.shape[2] - 7)
        moved = found[:, :, skip:, skip:][:, :, inner, inner]
        torch.testing.assert_close(moved, wanted[:, :, inner, inner])
        assert moved.numel() and moved.std() > 0


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("inception_v3", "has pooling without padding inside its blocks"),
        ("naflexvit_base_patch16_siglip", "takes lists of patches"),
    ],
)
def test_unsupported_families_say_why(name: str, message: str) -> None:
    with pytest.raises(InputError, match=f"backbone '{name}' {message}.*: choose"):
        build_backbone(BackboneConfig(name=name), CANVAS)


def test_families_do_not_overlap_and_exist() -> None:
    modules = [module for family in FAMILIES for module in family.modules]
    assert len(modules) == len(set(modules))
    assert all(timm.list_models(module=module) for module in modules)


@pytest.mark.parametrize("family", ["ResNet", "Inception-v4", "DaViT"])
def test_page_is_up_to_date(family: str) -> None:
    text = (REPO / "docs/backbones.md").read_text()
    row = ROWS[family]
    assert PAGE.line(row, row.models[0]) in text, "run python scripts/backbones.py"
    assert text.startswith(PAGE.HEAD) and text.endswith(PAGE.NOTES)
    assert text.count("\n| ") == 1 + sum(len(row.models) for row in PAGE.ROWS)
