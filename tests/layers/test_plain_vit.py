"""Plain ViTs against timm's own forward pass and against attention in float64, window by window."""

from __future__ import annotations

from collections import Counter

import pytest
import timm
import torch
from timm.layers import apply_rot_embed_cat
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from giantdet.config.architectures.common import BackboneConfig
from giantdet.errors import InputError
from giantdet.layers.backbone import build_backbone
from giantdet.layers.plain_vit import PlainViT, from_windows, global_block_indices, to_windows


def build(name: str, size: tuple[int, int], **options: object) -> PlainViT:
    torch.manual_seed(0)
    backbone = build_backbone(BackboneConfig(name=name, **options), size)  # type: ignore[arg-type]
    assert isinstance(backbone, PlainViT)
    with torch.no_grad():  # layer scales of 1e-5 would hide every block from the comparison
        for key, parameter in backbone.named_parameters():
            if "gamma" in key:
                parameter.uniform_(0.5, 1.0)
    return backbone.eval()


@pytest.mark.parametrize(
    "name",
    [
        "vit_tiny_patch16_224",
        "eva02_tiny_patch14_224",
        "vit_small_patch16_dinov3",
        "deit_tiny_distilled_patch16_224",
        "vit_small_patch14_reg4_dinov2",
        "vit_small_patch16_rope_mixed_224",
    ],
)
def test_global_mode_equals_timm(name: str) -> None:
    size = (64, 96)
    ours = build(name, size, window=0)
    theirs = timm.create_model(
        name, num_classes=0, img_size=size, patch_size=16, dynamic_img_size=True
    ).eval()
    missing = theirs.load_state_dict(ours.body.state_dict(), strict=False).missing_keys
    assert all(key.startswith("fc_norm") for key in missing)
    images = torch.randn(2, 3, *size)
    with torch.no_grad():
        expected = theirs.forward_intermediates(images, indices=1, norm=True, intermediates_only=True)

        out = ours(images)
    assert len(out) == 1
    assert torch.equal(out[0], expected[-1])
    assert out[0].shape == (2, ours.channels[0], 4, 6) and ours.strides == (16,) and ours.is_plain


def softmax_attention(block, x_NC: Tensor) -> Tensor:  # type: ignore[no-untyped-def]
    """timm's `Attention` written out for one window."""
    attn = block.attn
    q, k, v = (
        part.reshape(len(x_NC), attn.num_heads, -1).transpose(0, 1)
        for part in attn.qkv(x_NC).chunk(3, dim=-1)
    )
    weights = (q @ k.transpose(1, 2) / q.shape[-1] ** 0.5).exp()
    return attn.proj(((weights / weights.sum(-1, keepdim=True)) @ v).transpose(0, 1).reshape(len(x_NC), -1))


@pytest.mark.parametrize(
    ("size", "window", "chosen"),
    [((64, 96), 2, 3), ((80, 112), 3, (0, 4, 5)), ((48, 48), 16, 3)],
)
def test_windows_equal_a_loop_over_windows(
    size: tuple[int, int], window: int, chosen: int | tuple[int, ...]
) -> None:
    """The reference cuts windows out of the map, so it needs neither padding nor masks."""
    vit = build("vit_tiny_patch16_224", size, window=window, global_blocks=chosen).double()
    whole = (3, 7, 11) if isinstance(chosen, int) else chosen
    images = torch.randn(2, 3, *size, dtype=torch.float64)
    body = vit.body
    assert vit.global_blocks == set(whole)
    height, width = size[0] // 16, size[1] // 16
    with torch.no_grad():
        maps = body.patch_embed(images) + body.pos_embed[:, 1:].reshape(1, height, width, -1)
        for index, block in enumerate(body.blocks):
            step = max(height, width) if index in whole else window
            normed, attended = block.norm1(maps), torch.full_like(maps, float("nan"))
            for image in range(2):
                for top in range(0, height, step):
                    for left in range(0, width, step):
                        cut = normed[image, top : top + step, left : left + step]
                        out = softmax_attention(block, cut.flatten(0, 1)).view_as(cut)
                        attended[image, top : top + step, left : left + step] = out
            maps = maps + attended
            maps = maps + block.mlp(block.norm2(maps))
        expected = body.norm(maps).permute(0, 3, 1, 2)
        out = vit(images)[0]
    torch.testing.assert_close(out, expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("name", ["eva02_tiny_patch14_224", "vit_small_patch16_dinov3"])
def test_rotary_positions_start_at_the_corner_of_each_window(name: str) -> None:
    size, window = (80, 64), 3
    vit = build(name, size, window=window, global_blocks=4).double()
    rope = timm.create_model(name, num_classes=0, img_size=size, patch_size=16, dynamic_img_size=True).rope
    half = vit.body.blocks[0].attn.rotate_half
    table = rope.eval().get_embed(shape=(window, window)).double().view(window, window, -1)
    whole = rope.get_embed(shape=(5, 4)).double().view(5, 4, -1)
    images = torch.randn(1, 3, *size, dtype=torch.float64)
    body = vit.body
    with torch.no_grad():
        maps = body.patch_embed(images)
        if body.pos_embed is not None:
            maps = maps + body.pos_embed[:, 1:].reshape(1, 5, 4, -1)
        for index, block in enumerate(body.blocks):
            step, angles = (5, whole) if index in (2, 5, 8, 11) else (window, table)
            normed, attended = block.norm1(maps), torch.full_like(maps, float("nan"))
            for top in range(0, 5, step):
                for left in range(0, 4, step):
                    cut = normed[0, top : top + step, left : left + step]
                    turn = angles[: cut.shape[0], : cut.shape[1]].reshape(-1, angles.shape[-1])
                    attended[0, top : top + step, left : left + step] = rotated_attention(
                        block.attn, cut.flatten(0, 1), turn, half
                    ).view_as(cut)
            scale1 = 1.0 if block.gamma_1 is None else block.gamma_1
            scale2 = 1.0 if block.gamma_2 is None else block.gamma_2
            maps = maps + scale1 * attended
            maps = maps + scale2 * block.mlp(block.norm2(maps))
        expected = body.norm(maps).permute(0, 3, 1, 2)
        out = vit(images)[0]
    torch.testing.assert_close(out, expected, rtol=1e-8, atol=1e-8)


def rotated_attention(attn, x_NC: Tensor, turn: Tensor, half: bool) -> Tensor:  # type: ignore[no-untyped-def]
    zeros = torch.zeros(attn.qkv.out_features // 3, dtype=x_NC.dtype)
    bias = zeros.repeat(3) if attn.q_bias is None else torch.cat([attn.q_bias, zeros, attn.v_bias])
    qkv = (x_NC @ attn.qkv.weight.T + bias).chunk(3, dim=-1)
    q, k, v = (part.reshape(len(x_NC), attn.num_heads, -1).transpose(0, 1) for part in qkv)
    q, k = (apply_rot_embed_cat(part, turn, half=half) for part in (q, k))
    weights = (q @ k.transpose(1, 2) / q.shape[-1] ** 0.5).softmax(-1)
    return attn.proj((weights @ v).transpose(0, 1).reshape(len(x_NC), -1))


def test_windows_round_trip() -> None:
    x = torch.randn(2, 5, 7, 3)
    windows = to_windows(x, 4)
    assert windows.shape == (2 * 2 * 2, 16, 3)
    assert torch.equal(windows[5].view(4, 4, 3)[:, :3], x[1, 0:4, 4:7])  # second image, first row, right
    assert torch.equal(from_windows(windows, 4, 2, 5, 7), x)


def test_global_blocks_are_spaced_as_in_vitdet() -> None:
    assert global_block_indices(12, 4) == {2, 5, 8, 11}  # ViTDet-B
    assert global_block_indices(24, 4) == {5, 11, 17, 23}  # ViTDet-L
    assert global_block_indices(32, 4) == {7, 15, 23, 31}  # ViTDet-H
    assert global_block_indices(7, 4) == {0, 2, 4, 6}
    assert global_block_indices(3, 4) == {0, 1, 2}
    assert global_block_indices(50, (12, 24, 36, 49)) == {12, 24, 36, 49}  # PE-Detection


def test_global_blocks_beyond_the_last() -> None:
    with pytest.raises(InputError, match=r"global_blocks names \[12\]; .* has blocks 0 to 11"):
        build("vit_tiny_patch16_224", (64, 64), window=2, global_blocks=(3, 12))


def test_every_trainable_parameter_of_windowed_mode_gets_a_gradient() -> None:
    for name in ("vit_small_patch14_reg4_dinov2", "vit_small_patch16_dinov3"):
        vit = build(name, (64, 64), window=2, frozen_stages=2).train()
        vit(torch.randn(1, 3, 64, 64))[0].square().sum().backward()
        frozen = {key for key, p in vit.body.named_parameters() if not p.requires_grad}
        without = {key for key, p in vit.body.named_parameters() if p.grad is None}
        assert frozen == without
        blocks = {int(key.split(".")[1]) for key in frozen if key.startswith("blocks.")}
        assert blocks == {0, 1, 2} and "patch_embed.proj.weight" in frozen and "norm.weight" not in frozen
        assert not any("token" in key for key in vit.body.state_dict())


def test_rope_tables_stay_float32_in_bfloat16_models() -> None:
    vit = build("eva02_tiny_patch14_224", (64, 64), window=2)
    table = vit.rope_window.clone()  # type: ignore[union-attr]
    vit.bfloat16()
    assert vit.rope_window is not None and torch.equal(vit.rope_window, table)
    assert vit(torch.randn(1, 3, 64, 64).bfloat16())[0].dtype == torch.bfloat16


def test_canvas_must_fit_the_patches() -> None:
    with pytest.raises(ValueError, match="multiples of 16, not 64x72"):
        build_backbone(BackboneConfig(name="vit_tiny_patch16_224"), (64, 72))


class Operators(TorchDispatchMode):
    """Counts the operators that run inside."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        self.counts[func.overloadpacket.__name__] += 1
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(
    "name",
    [
        "vit_tiny_patch16_224",
        "eva02_tiny_patch14_224",
        "vit_small_patch16_dinov3",
        "vit_small_patch16_rope_mixed_224",
    ],
)
def test_no_table_or_mask_is_created_in_a_step(name: str) -> None:
    """On a canvas with padded windows. Learnt frequencies need two sines and two cosines, and no more."""
    backbone = build(name, (96, 64), window=4).train()
    images = torch.randn(2, 3, 96, 64)
    backbone(images)
    with Operators() as operators:
        backbone(images)
    counts = operators.counts
    made = (
        "arange",
        "linspace",
        "meshgrid",
        "zeros",
        "ones",
        "full",
        "scalar_tensor",
        "where",
        "masked_fill",
    )
    assert {op: counts[op] for op in (*made, "repeat", "_to_copy", "upsample_bicubic2d") if counts[op]} == {}
    learnt = 2 if "mixed" in name else 0
    assert (counts["sin"], counts["cos"]) == (learnt, learnt)
    attention = sum(n for op, n in counts.items() if op.startswith("_scaled_dot_product"))
    assert attention == 12 and counts["_softmax"] == 0
