"""Pyramids against timm's features_only and torchvision's Swin; options; finite gradients in all families."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import torchvision
from safetensors.torch import load_file
from torch import Tensor, nn

from giantdet.config.architectures.common import BackboneConfig, NormConfig
from giantdet.layers.backbone import Backbone, build_backbone
from giantdet.layers.norm import FrozenBatchNorm2d, apply_norm
from giantdet.layers.weights import load_backbone_weights

SWIN = "swin_tiny_patch4_window7_224"


def build(name: str, size: tuple[int, int], seed: int = 0, **options: Any) -> Backbone:
    torch.manual_seed(seed)
    return build_backbone(BackboneConfig(name=name, **options), size)


@pytest.mark.parametrize(
    ("name", "size", "channels"),
    [
        ("resnet18", (64, 96), (64, 128, 256, 512)),
        ("convnext_atto", (64, 96), (40, 80, 160, 320)),
        (SWIN, (224, 224), (96, 192, 384, 768)),
        ("tf_efficientnet_lite0", (64, 96), (24, 40, 112, 320)),
    ],
)
def test_equals_timm_features_only(name: str, size: tuple[int, int], channels: tuple[int, ...]) -> None:
    ours = build(name, size).eval()
    theirs = timm.create_model(name, features_only=True).eval()
    for a, b in zip(theirs.state_dict().values(), ours.body.state_dict().values(), strict=True):
        a.copy_(b)  # features_only renames keys but keeps their order
    images = torch.randn(2, 3, *size)
    with torch.no_grad():
        levels = ours.body.forward_intermediates(images, indices=ours.indices, intermediates_only=True)
        expected = theirs(images)[-4:]
        out = ours(images)
    for level, wanted, map_, norm, stride, width in zip(
        levels, expected, out, ours.norms, ours.strides, channels, strict=True
    ):
        wanted = wanted.permute(0, 3, 1, 2) if name == SWIN else wanted
        assert torch.equal(level, wanted)
        assert map_.shape == (2, width, size[0] // stride, size[1] // stride)
        if isinstance(norm, nn.Identity):
            assert torch.equal(map_, wanted)
        else:
            assert map_.mean(1).abs().max() < 1e-4
            torch.testing.assert_close(
                map_.var(1, unbiased=False), torch.ones_like(map_[:, 0]), rtol=0, atol=0.02
            )
    assert ours.channels == channels and ours.strides == (4, 8, 16, 32) and not ours.is_plain


def torchvision_swin(body: Any) -> nn.Module:
    """torchvision's Swin-T, which pads before it shifts, with timm's weights."""
    model = torchvision.models.swin_t(weights=None).eval()
    pairs = [(model.features[0][0], body.patch_embed.proj), (model.features[0][2], body.patch_embed.norm)]
    for i, layer in enumerate(body.layers):
        if i:
            merge = model.features[2 * i]
            pairs += [(merge.norm, layer.downsample.norm), (merge.reduction, layer.downsample.reduction)]
        for block, ours in zip(model.features[2 * i + 1], layer.blocks, strict=True):
            table = block.attn.relative_position_bias_table
            table.data.copy_(ours.attn.relative_position_bias_table)
            pairs += [(block.norm1, ours.norm1), (block.norm2, ours.norm2)]
            pairs += [(block.attn.qkv, ours.attn.qkv), (block.attn.proj, ours.attn.proj)]
            pairs += [(block.mlp[0], ours.mlp.fc1), (block.mlp[3], ours.mlp.fc2)]
    for module, source in pairs:
        module.load_state_dict(source.state_dict())
    return model


@pytest.mark.parametrize("size", [(224, 224), (96, 160), (128, 64)])
def test_swin_equals_torchvision_at_any_size(size: tuple[int, int]) -> None:
    ours = build(SWIN, size).eval()
    with torch.no_grad():
        for name, parameter in ours.named_parameters():
            if "bias" in name:  # zero biases and tables would hide how the padding is treated
                parameter.normal_(0, 0.5)
        images = torch.randn(2, 3, *size)
        levels = ours.body.forward_intermediates(images, indices=ours.indices, intermediates_only=True)
        x: Tensor = images
        for index, part in enumerate(torchvision_swin(ours.body).features):
            x = part(x)
            if index % 2:
                torch.testing.assert_close(levels[index // 2], x.permute(0, 3, 1, 2), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", [SWIN, "swinv2_tiny_window8_256", "swinv2_cr_tiny_224"])
def test_shifted_windows_see_no_wrapped_neighbours(name: str) -> None:
    """The first row must not depend on rows beyond its window (timm issue 2438), in any shifted block."""
    body = build(name, (160, 160)).eval().body
    stages = body.stages if "cr" in name else body.layers
    tested = 0
    for stage, side in zip(stages, (40, 20, 10, 5), strict=True):
        for block in stage.blocks:
            if any(block.shift_size):
                maps = torch.randn(1, side, side, block.norm1.normalized_shape[0], requires_grad=True)
                attention = block._shifted_window_attn if "cr" in name else block._attn
                attention(maps)[:, 0].sum().backward()
                assert maps.grad is not None
                assert maps.grad[:, block.window_size[0] :].abs().max() < 1e-20
                assert maps.grad[:, 0].abs().max() > 1e-6
                tested += 1
    assert tested >= 5


def test_stochastic_depth_follows_the_configuration() -> None:
    """timm's default for Swin is 0.1."""
    images = torch.randn(16, 3, 64, 64)
    for rate, same in ((0.0, True), (0.9, False)):
        backbone = build(SWIN, (64, 64), drop_path_rate=rate).train()
        with torch.no_grad():
            assert torch.equal(backbone(images)[-1], backbone(images)[-1]) is same


def test_stride_in_1x1_with_msra_weights(shared: Path) -> None:
    file = shared / "data/weights/resnet50_msra/resnet50_msra_stride1x1_fp16.safetensors"
    config = BackboneConfig(name="resnet50", stride_in_1x1=True, init_weights=str(file))
    ours = build_backbone(config, (64, 96))
    load_backbone_weights(ours, config)
    apply_norm(ours, NormConfig()).train()
    plain = timm.create_model("resnet50")
    plain.load_state_dict(load_file(file), strict=True)
    for layer in (plain.layer2, plain.layer3, plain.layer4):
        layer[0].conv1.stride, layer[0].conv2.stride = (2, 2), (1, 1)
    images = torch.randn(1, 3, 64, 96)
    with torch.no_grad():
        expected = plain.eval().forward_intermediates(images, indices=[1, 2, 3, 4], intermediates_only=True)
        out = ours(images)
    assert ours.mean == (0.485, 0.456, 0.406)
    for a, b in zip(out, expected, strict=True):
        assert a.isfinite().all() and b.abs().max() > 0.1
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-3)


def test_statistics_and_norms_of_other_weights() -> None:
    """Pixels in the range 0 to 255; LayerNorms on the maps, or not, whatever the norms of the backbone."""
    given = build("resnet18", (64, 64), pixel_mean=(102.0, 51.0, 0.0), pixel_std=(1.0, 255.0, 51.0))
    assert given.mean == pytest.approx((0.4, 0.2, 0.0)) and given.std == pytest.approx((1 / 255, 1.0, 0.2))
    swin = {"timm_args": {"embed_dim": 16, "depths": [1, 1, 1, 1], "num_heads": [1, 1, 1, 1]}}
    for name, options in (("resnet18", {}), (SWIN, swin)):
        for chosen, normed in ((True, True), (False, False), (None, name == SWIN)):
            norms = build(name, (64, 64), level_norms=chosen, **options).norms
            assert all(isinstance(norm, nn.Identity) is not normed for norm in norms)
    with pytest.raises(ValueError, match="level_norms is for hierarchical backbones, not for 'test_vit'"):
        build("test_vit", (64, 64), level_norms=True)


def test_stride_in_1x1_needs_bottlenecks() -> None:
    for name in ("resnet18", "convnext_atto", "vit_tiny_patch16_224"):
        with pytest.raises(ValueError, match=f"stride_in_1x1 .* not for '{name}'"):
            build(name, (64, 64), stride_in_1x1=True)


def test_frozen_stages_of_resnet_equal_detectron2s() -> None:
    """FREEZE_AT=2 freezes stem and res2, including their BatchNorms."""
    prefixes = [("conv1", "bn1"), ("layer1",), ("layer2",), ("layer3",), ("layer4",)]
    for count in range(6):
        body = build("resnet18", (64, 64), frozen_stages=count).body
        frozen = {name.split(".")[0] for name, p in body.named_parameters() if not p.requires_grad}
        norms = {n.split(".")[0] for n, m in body.named_modules() if isinstance(m, FrozenBatchNorm2d)}
        free = {name.split(".")[0] for name, p in body.named_parameters() if p.requires_grad}
        # A frozen BatchNorm has no parameters left, so its stage is recognised by `norms`.
        wanted = {prefix for stage in prefixes[:count] for prefix in stage}
        assert frozen | norms == wanted and not free & wanted
        assert free == {prefix for stage in prefixes[count:] for prefix in stage}


def test_frozen_stages_of_swin_and_convnext() -> None:
    for name, stem, stage in ((SWIN, "patch_embed", "layers"), ("convnext_atto", "stem", "stages")):
        body = build(name, (64, 64), frozen_stages=3).body
        frozen = {".".join(n.split(".")[:2]) for n, p in body.named_parameters() if not p.requires_grad}
        free = {".".join(n.split(".")[:2]) for n, p in body.named_parameters() if p.requires_grad}
        assert free == {f"{stage}.2", f"{stage}.3"}
        assert {n for n in frozen if not n.startswith(stem)} == {f"{stage}.0", f"{stage}.1"}


def saved_bytes(backbone: Backbone, images: Tensor) -> int:
    """Bytes of activations kept for the backward pass, which is run too."""
    total = 0

    def pack(tensor: Tensor) -> Tensor:
        nonlocal total
        total += tensor.numel() * tensor.element_size()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = sum(level.square().mean() for level in backbone(images))
    kept = total
    loss.backward()  # type: ignore[union-attr]
    return kept


@pytest.mark.parametrize(
    "name", ["resnet18", "convnext_atto", SWIN, "vit_tiny_patch16_224", "eva02_tiny_patch14_224"]
)
def test_checkpointing_saves_memory_and_changes_no_gradient(name: str) -> None:
    images = torch.randn(1, 3, 64, 64)
    results, kept = [], []
    for checkpoint in (False, True):
        backbone = build(name, (64, 64), window=3, checkpoint_blocks=checkpoint)
        apply_norm(backbone, NormConfig()).train()
        kept.append(saved_bytes(backbone, images))
        results.append({n: p.grad for n, p in backbone.named_parameters()})
    assert kept[1] < 0.6 * kept[0]
    for key, grad in results[0].items():
        assert grad is not None
        torch.testing.assert_close(results[1][key], grad, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    "name",
    [
        "resnet18",
        "convnext_atto",
        SWIN,
        "swinv2_tiny_window8_256",
        "swinv2_cr_tiny_224",
        "davit_tiny",
        "vit_tiny_patch16_224",
        "eva02_tiny_patch14_224",
        "vit_small_patch14_reg4_dinov2",
        "vit_small_patch16_dinov3",
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_family_trains(name: str, dtype: torch.dtype) -> None:
    """One member of each family in the recipes: all parameters get finite gradients, in bf16 too."""
    backbone = apply_norm(build(name, (64, 96), window=3), NormConfig(type="local")).train().to(dtype)
    out = backbone(torch.randn(2, 3, 64, 96, dtype=dtype))
    assert [tuple(level.shape[2:]) for level in out] == [(64 // s, 96 // s) for s in backbone.strides]
    sum(level.float().square().mean() for level in out).backward()  # type: ignore[union-attr]
    for key, parameter in backbone.named_parameters():
        assert parameter.grad is not None and parameter.grad.isfinite().all(), key
        assert parameter.dtype == dtype


@pytest.mark.parametrize("name", ["resnet18", SWIN, "eva02_tiny_patch14_224"])
def test_compiles_to_one_graph(name: str) -> None:
    backbone = apply_norm(build(name, (64, 96), window=3), NormConfig()).train()
    images = torch.randn(1, 3, 64, 96)
    with torch.no_grad():
        expected = backbone(images)
        out = torch.compile(backbone, fullgraph=True, backend="eager")(images)
    for a, b in zip(out, expected, strict=True):
        torch.testing.assert_close(a, b)


def test_image_statistics_come_from_the_weights() -> None:
    assert build("resnet18", (64, 64)).std == (0.229, 0.224, 0.225)
    assert build("tf_efficientnet_lite0", (64, 64)).mean == (0.5, 0.5, 0.5)
    assert build("vit_tiny_patch16_224", (64, 64)).mean == (0.5, 0.5, 0.5)


@pytest.mark.parametrize(
    ("name", "size", "message"),
    [
        ("resnet5o", (64, 64), r"unknown backbone 'resnet5o'; nearest: .*resnet50"),
        ("swin_tiny", (64, 64), r"unknown backbone 'swin_tiny'; nearest: swin_tiny_patch4_window7_224"),
        ("ViT-Small", (64, 64), r"unknown backbone 'ViT-Small'; nearest: .*vit_small_patch16_224"),
        (
            "resnet50.nonsense",
            (64, 64),
            r"unknown weights tag of backbone 'resnet50.nonsense'; known: .*resnet50\.a1",
        ),
        ("resnet18", (64, 80), "multiples of 32, not 64x80"),
        ("mixer_s32_224", (224, 224), "no map of stride 4, 8, 16"),
        ("mvitv2_tiny", (256, 256), "works at 224x224 only"),
    ],
)
def test_errors_name_the_cause(name: str, size: tuple[int, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build(name, size)
