"""ViTDet's options for plain ViTs against attention in float64, token by token."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from test_plain_vit import Operators
from timm.layers import Attention
from torch import Tensor

from giantdet.config.architectures.common import BackboneConfig
from giantdet.config.architectures.mask_rcnn import MaskRcnnConfig
from giantdet.errors import InputError
from giantdet.layers.backbone import build_backbone
from giantdet.layers.plain_vit import PlainViT
from giantdet.layers.relative_attention import RelativeAttention
from giantdet.layers.weights import load_backbone_weights

SMALL = {"embed_dim": 8, "depth": 2, "num_heads": 2}


def build(size: tuple[int, int] = (80, 64), **options: Any) -> PlainViT:
    """A ViT with two blocks, one of them windowed; relative positions are random, not zero."""
    torch.manual_seed(0)
    config = BackboneConfig(
        name="vit_tiny_patch16_224", timm_args=SMALL, **{"window": 3, "global_blocks": 1, **options}
    )
    backbone = build_backbone(config, size)
    assert isinstance(backbone, PlainViT)
    for key, parameter in backbone.named_parameters():
        if "rel_pos" in key:
            torch.nn.init.normal_(parameter, std=0.5)
        elif key.endswith("bias"):
            torch.nn.init.normal_(parameter, std=0.3)
    return backbone.eval()


def attend(attn: Any, x_hwC: Tensor, valid_hw: Tensor) -> Tensor:
    """Attention of one window, one query and one key at a time; invalid keys are skipped."""
    height, width, _ = x_hwC.shape
    heads = attn.num_heads
    q, k, v = attn.qkv(x_hwC).unflatten(-1, (3, heads, -1)).unbind(2)
    out = torch.zeros_like(q)
    cells = [(y, x) for y in range(height) for x in range(width)]
    for y, x in cells:
        logits, values = [], []
        for row, column in (cell for cell in cells if valid_hw[cell]):
            logit = (q[y, x] * k[row, column]).sum(-1) / q.shape[-1] ** 0.5
            if isinstance(attn, RelativeAttention):
                logit = logit + q[y, x] @ attn.rel_pos_h[y - row + height - 1]
                logit = logit + q[y, x] @ attn.rel_pos_w[x - column + width - 1]
            logits.append(logit)
            values.append(v[row, column])
        out[y, x] = (torch.stack(logits).softmax(0)[..., None] * torch.stack(values)).sum(0)
    return attn.proj(out.flatten(-2))


@torch.no_grad()
@pytest.mark.parametrize(("positions", "attended"), [(True, True), (True, False), (False, True)])
def test_equals_a_loop_over_tokens(positions: bool, attended: bool) -> None:
    """5 x 4 tokens in windows of 3 x 3, padded at two sides, followed by one global block."""
    vit = build(relative_positions=positions, attend_padding=attended).double()
    images = torch.randn(2, 3, 80, 64, dtype=torch.float64)
    body = vit.body
    maps = body.patch_embed(images) + body.pos_embed[:, 1:].reshape(1, 5, 4, -1)
    for block, (rows, columns) in zip(body.blocks, ((3, 3), (5, 4)), strict=True):
        normed = F.pad(block.norm1(maps), (0, 0, 0, -4 % columns, 0, -5 % rows))
        inside = torch.zeros(normed.shape[1:3], dtype=torch.bool)
        inside[:5, :4] = True
        result = torch.full_like(normed, torch.nan)
        for image in range(2):
            for top in range(0, normed.shape[1], rows):
                for left in range(0, normed.shape[2], columns):
                    window = (slice(top, top + rows), slice(left, left + columns))
                    valid = inside[window] | attended
                    result[image][window] = attend(block.attn, normed[image][window], valid)
        maps = maps + result[:, :5, :4]
        maps = maps + block.mlp(block.norm2(maps))
    expected = body.norm(maps).permute(0, 3, 1, 2)
    torch.testing.assert_close(vit(images)[0], expected, atol=1e-9, rtol=1e-9)


@torch.no_grad()
def test_without_tables_nothing_changes() -> None:
    """Relative positions of zero give timm's attention."""
    plain, relative = build(), build(relative_positions=True)
    relative.load_state_dict(plain.state_dict(), strict=False)
    for key in relative.added_keys:
        relative.body.get_parameter(key).zero_()
    assert len(relative.added_keys) == 4
    images = torch.randn(2, 3, 80, 64)
    torch.testing.assert_close(relative(images)[0], plain(images)[0], atol=1e-5, rtol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("grid", [(3, 7), (5, 4)])
def test_positions_of_another_grid(grid: tuple[int, int]) -> None:
    """Tables are interpolated in the forward pass, or used directly if their grid is that of the canvas."""
    vit, own = build(position_grid=grid), build()
    assert vit.body.pos_embed.shape == (1, 1 + grid[0] * grid[1], 8)
    torch.nn.init.normal_(vit.body.pos_embed)
    state = vit.state_dict()
    table = state["body.pos_embed"][:, 1:].reshape(1, *grid, 8).permute(0, 3, 1, 2)
    resized = F.interpolate(table, (5, 4), mode="bicubic") if grid != (5, 4) else table
    placed = torch.cat([torch.zeros(1, 1, 8), resized.permute(0, 2, 3, 1).reshape(1, 20, 8)], 1)
    own.load_state_dict(state | {"body.pos_embed": placed})
    images = torch.randn(1, 3, 80, 64)
    torch.testing.assert_close(vit(images)[0], own(images)[0], atol=1e-5, rtol=1e-5)


def test_every_parameter_gets_a_gradient() -> None:
    options = {"relative_positions": True, "attend_padding": True, "position_grid": (3, 3)}
    vit = build(**options).train()
    vit(torch.randn(1, 3, 80, 64))[0].square().sum().backward()
    for key, parameter in vit.named_parameters():
        assert parameter.grad is not None and parameter.grad.any(), key
    torch._dynamo.reset()
    compiled = torch.compile(vit, backend="eager", fullgraph=True)
    images = torch.randn(1, 3, 80, 64)
    torch.testing.assert_close(compiled(images)[0], vit(images)[0])
    torch._dynamo.reset()
    out = build(**options).bfloat16()(torch.randn(1, 3, 80, 64).bfloat16())[0]
    assert out.dtype == torch.bfloat16 and out.isfinite().all()


@pytest.mark.parametrize("attended", [True, False])
def test_one_fused_kernel_per_block_and_no_new_tables(attended: bool) -> None:
    vit = build(relative_positions=True, attend_padding=attended).train()
    images = torch.randn(2, 3, 80, 64)
    vit(images)
    with Operators() as operators:
        vit(images)
    counts = operators.counts
    assert sum(n for op, n in counts.items() if op.startswith("_scaled_dot_product")) == 2
    assert not {"_softmax", "_safe_softmax", "arange", "eye", "zeros", "repeat"} & counts.keys()


def test_weights_may_lack_the_tables(tmp_path: Path) -> None:
    """A classifier's weights lack them: everything else is loaded, and the tables stay zero."""
    source = build(window=3)
    save_file(source.body.state_dict(), tmp_path / "vit.safetensors")
    config = BackboneConfig(
        name="vit_tiny_patch16_224",
        timm_args=SMALL,
        window=3,
        global_blocks=1,
        relative_positions=True,
        init_weights=str(tmp_path / "vit.safetensors"),
    )
    vit = build_backbone(config, (80, 64))
    load_backbone_weights(vit, config)
    state = vit.body.state_dict()
    for key, value in source.body.state_dict().items():
        assert torch.equal(state.pop(key), value)
    assert set(state) == set(vit.added_keys) and not any(table.any() for table in state.values())


def test_unsupported_models_are_refused() -> None:
    for key, value in (("relative_positions", True), ("attend_padding", True), ("position_grid", (2, 2))):
        with pytest.raises(InputError, match=f"{key} is for plain ViTs, not for 'test_resnet'"):
            build_backbone(BackboneConfig(name="test_resnet", **{key: value}), (64, 64))
        section = {"backbone": {"name": "vit_tiny_patch16_224", "window": 0, key: value}}
        (problem,) = MaskRcnnConfig.model_validate(section).problems()
        assert problem.startswith(f"backbone.{key} needs windows")
    eva = BackboneConfig(name="eva02_tiny_patch14_224", relative_positions=True)
    with pytest.raises(InputError, match="for the attention of ViT and DeiT, not for EvaAttention"):
        build_backbone(eva, (64, 64))
    dinov3 = BackboneConfig(name="vit_small_patch16_dinov3", position_grid=(2, 2))
    with pytest.raises(InputError, match="has no absolute positions"):
        build_backbone(dinov3, (64, 64))
    gated = Attention(8, num_heads=2, gated=True)
    with pytest.raises(InputError, match="for the attention of ViT and DeiT"):
        RelativeAttention(gated, (2, 2))
