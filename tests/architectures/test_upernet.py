"""UPerNet against mmsegmentation's own model, and its behaviour on other backbones and canvases."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from golden import load
from golden_mmseg import build, check_classes, check_maps, check_training, close
from test_semantic import all_ignored, noise, train_step
from test_trace import Recorder
from torch import Tensor, nn

from giantdet.architectures import Architecture, build_model, total_loss
from giantdet.architectures.upernet import UperNet
from giantdet.config.architectures.common import NormConfig
from giantdet.config.architectures.upernet import UperNetConfig
from giantdet.errors import InputError
from giantdet.layers.uper_head import PoolingPyramid
from giantdet.structures import Batch

NAME = "mmseg_upernet"
SECTION = {
    "type": "upernet",
    "loss_divisor": "all",
    "decode_head": {"width": 32, "dropout": 0.0},
    "auxiliary_head": {"width": 16, "dropout": 0.0},
}


@pytest.fixture(scope="module")
def model(golden: Path) -> Architecture:
    return build(golden, NAME, SECTION)


def test_losses_and_gradients(model: UperNet, golden: Path) -> None:
    parts = {name: name for name in ("backbone", "decode_head", "auxiliary_head")}
    check_training(model, golden, NAME, parts)


@torch.no_grad()
def test_maps_and_logits(model: UperNet, golden: Path) -> None:
    batch, arrays = load(golden), np.load(golden / f"mm/{NAME}_A.npz")
    maps = model.eval().maps(batch)
    check_maps(maps, arrays, "backbone")
    assert model.auxiliary_head is not None
    close(model.auxiliary_head(maps[2]), arrays["aux_logits"])
    check_classes(model(batch).semantic_BCHW, arrays)


def tiny(size: tuple[int, int] = (64, 96), norm: NormConfig | None = None, **changes: Any) -> UperNet:
    """A small UPerNet with 3 classes and `changes` to its section."""
    raw: dict[str, Any] = {
        "type": "upernet",
        "num_classes": 3,
        "backbone": {"name": "test_resnet"},
        "decode_head": {"width": 32},
        "auxiliary_head": {"width": 32},
    }
    config = UperNetConfig.model_validate(raw | changes)
    assert not list(config.problems())
    built = build_model(config, size, norm)
    assert isinstance(built, UperNet)
    return built


BACKBONES: dict[str, dict[str, Any]] = {
    "convnext": {"name": "convnext_atto", "timm_args": {"depths": [1, 1, 1, 1], "dims": [8, 8, 16, 16]}},
    "swin": {
        "name": "swin_tiny_patch4_window7_224",
        "timm_args": {"embed_dim": 16, "depths": [1, 1, 2, 1], "num_heads": [1, 1, 2, 2]},
    },
}


@pytest.mark.parametrize("name", BACKBONES)
@pytest.mark.parametrize("size", [(64, 96), (160, 224)])  # C5: smaller than the grid of 6 cells, and larger
def test_backbones(name: str, size: tuple[int, int]) -> None:
    """The parts are AGVM's modules; every parameter is trained, with recomputed activations."""
    model = tiny(size, backbone=BACKBONES[name], checkpoint_heads=True)
    assert [name for name, _ in model.named_children()] == ["backbone", "decode_head", "auxiliary_head"]
    batch = noise(size, classes=3)
    losses = train_step(model, batch)
    assert losses.keys() == {"loss_sem_seg", "loss_sem_seg_aux"}
    assert model.eval()(batch).semantic_BCHW.shape == (2, 3, size[0] // 4, size[1] // 4)


def test_plain_backbones_are_refused() -> None:
    with pytest.raises(InputError, match="'vit_tiny_patch16_224' is a plain ViT") as caught:
        tiny(backbone={"name": "vit_tiny_patch16_224", "timm_args": {"depth": 1}})
    assert "semantic_fpn" in str(caught.value) and "\n" not in str(caught.value)


@torch.no_grad()
@pytest.mark.parametrize("size", [(2, 3), (7, 5), (12, 18)])
def test_pooling(size: tuple[int, int]) -> None:
    """Compare with loops over the cells; a cell reaches from floor(i h / s) to ceil((i + 1) h / s)."""
    height, width = size
    pyramid = PoolingPyramid(4, 8, (1, 2, 3, 6), "none")
    c5 = torch.randn(2, 4, height, width)
    parts = [c5]
    for scale, branch in zip((1, 2, 3, 6), pyramid.scales, strict=True):
        grid = torch.zeros(2, 4, scale, scale)
        for i in range(scale):
            for j in range(scale):
                rows = slice(i * height // scale, -(-(i + 1) * height // scale))
                columns = slice(j * width // scale, -(-(j + 1) * width // scale))
                grid[:, :, i, j] = c5[:, :, rows, columns].mean((2, 3))
        parts.append(F.interpolate(branch[1](grid), size=size, mode="bilinear"))
    torch.testing.assert_close(pyramid(c5), pyramid.merge(torch.cat(parts, 1)))


@pytest.mark.parametrize("divisor", ["labelled", "all"])
def test_no_labelled_pixel(divisor: str) -> None:
    model, batch = tiny(norm=NormConfig(type="local"), loss_divisor=divisor), noise((64, 96), classes=3)
    losses = train_step(model, all_ignored(batch))
    assert losses == {"loss_sem_seg": 0.0, "loss_sem_seg_aux": 0.0}
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None and not parameter.grad.any(), name


def test_a_step_never_synchronises_with_the_device() -> None:
    model, batch = tiny(), noise((64, 96), classes=3)
    with Recorder() as recorder:
        total_loss(model.train().losses(model(batch), batch)).backward()  # type: ignore[no-untyped-call]
        model.eval()(batch)
    assert not recorder.broken and "aten::_adaptive_avg_pool2d" in recorder.names


def test_one_graph() -> None:
    """The forward pass and the losses compile without a graph break and give the same numbers."""
    none = {"width": 32, "dropout": 0.0}
    model, batch = tiny(decode_head=none, auxiliary_head=none).train(), noise((64, 96), classes=3)

    def losses_of() -> dict[str, torch.Tensor]:
        return model.losses(model(batch), batch)

    torch._dynamo.reset()
    compiled = torch.compile(losses_of, backend="eager", fullgraph=True, dynamic=False)()
    torch.testing.assert_close(compiled, losses_of(), rtol=1e-4, atol=1e-5)


def test_one_image_has_no_variance() -> None:
    """Pooled to 1 x 1 there is one value per channel: an input error, but not with GroupNorm."""
    model, batch = tiny(norm=NormConfig(type="local")), one_image(noise((64, 96), classes=3))
    with pytest.raises(InputError, match="one value per channel") as caught:
        train_step(model, batch)
    assert "cgbn" in str(caught.value) and "\n" not in str(caught.value)
    group = {"width": 64, "norm": "group"}
    train_step(tiny(decode_head=group, auxiliary_head=group), batch)


def one_image(batch: Batch) -> Batch:
    """The first image of a batch."""
    first = batch.targets._make(target[:1] for target in batch.targets)
    others = {name: value[:1] for name, value in batch._asdict().items() if isinstance(value, Tensor)}
    return Batch(targets=first, **others)


def test_without_the_auxiliary_head() -> None:
    model = tiny(auxiliary_head={"enabled": False})
    assert train_step(model, noise((64, 96), classes=3)).keys() == {"loss_sem_seg"}
    assert [name for name, _ in model.named_children()] == ["backbone", "decode_head"]


def test_dropout_drops_whole_channels_and_only_in_training() -> None:
    model = tiny(decode_head={"width": 32, "dropout": 0.5})
    dropped = [m for m in model.modules() if isinstance(m, nn.Dropout2d)]
    assert [m.p for m in dropped] == [0.5, 0.1]
    torch.manual_seed(0)
    found = dropped[0].train()(torch.ones(2, 32, 3, 3))
    assert set(found.unique().tolist()) == {0.0, 2.0}
    assert torch.equal(found, found[:, :, :1, :1].expand_as(found))
    batch = noise((64, 96), classes=3)
    first, second = (model.eval()(batch).semantic_BCHW for _ in range(2))
    assert torch.equal(first, second)


def test_settings() -> None:
    config = UperNetConfig.model_validate({"type": "upernet", "decode_head": {"width": 48, "norm": "group"}})
    assert "decode_head.width must be a multiple of 32" in next(config.problems())
    empty = UperNetConfig.model_validate({"type": "upernet", "decode_head": {"pool_scales": []}})
    assert "decode_head.pool_scales" in next(empty.problems())
    none: dict[str, Any] = {"norm": "none"}
    for auxiliary, wanted in ((none, False), ({}, True), ({"enabled": False}, False)):
        raw = {"type": "upernet", "decode_head": none, "auxiliary_head": auxiliary}
        assert UperNetConfig.model_validate(raw).batch_norms()["heads"][1] is wanted
