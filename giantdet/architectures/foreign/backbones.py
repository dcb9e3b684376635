"""The `backbone` section of a model whose tensors are known: timm's name, and arguments for other sizes."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import timm

from giantdet.architectures.foreign.project import State, numbers
from giantdet.errors import InputError
from giantdet.layers.plain_vit import global_block_indices

BODY = "backbone.body."
_RESNETS: dict[tuple[tuple[int, ...], bool], int] = {
    ((2, 2, 2, 2), False): 18,
    ((3, 4, 6, 3), False): 34,
    ((3, 4, 6, 3), True): 50,
    ((3, 4, 23, 3), True): 101,
    ((3, 8, 36, 3), True): 152,
}
_WIDTHS = (64, 128, 256, 512)
_SWINS: dict[tuple[int, tuple[int, ...]], str] = {
    (96, (2, 2, 6, 2)): "tiny",
    (96, (2, 2, 18, 2)): "small",
    (128, (2, 2, 18, 2)): "base",
    (192, (2, 2, 18, 2)): "large",
}
_SWIN_WINDOWS = {7: "window7_224", 12: "window12_384"}
_VITS = {
    (768, 12): "vit_base_patch16_224",
    (1024, 24): "vit_large_patch16_224",
    (1280, 32): "vit_huge_patch14_224",
}
_EVA02S = {(768, 12): "eva02_base_patch14_224", (1024, 24): "eva02_large_patch14_224"}
_EVA02_HEAD, _EVA02_RATIO = 64, 4 * 2 / 3  # width of a head, and of the MLP by that of the model
_PE_GIANT, _PE_HEAD = (1536, 50, 8960), 96  # width, depth and width of the MLP
_PATCH = 16  # timm's name for other sizes of a plain ViT is that of a model with patches of 16 pixels


def backbone_of(state: State) -> dict[str, Any]:
    """Return the `backbone` section for tensors under giantdet's names.

    Raises InputError for another model than a ResNet, a ResNeXt, a Swin or a plain ViT. The windows of EVA-02
    and PE are in tables that have no place in giantdet's model: their projects add them (`rotary.py`).
    """
    if f"{BODY}layer1.0.conv1.weight" in state:
        return _resnet(state)
    if f"{BODY}blocks.0.mlp.fc1_g.weight" in state:
        return _eva02(state)
    if f"{BODY}blocks.0.attn.qkv.weight" in state:
        return _pe(state) if f"{BODY}norm_pre.weight" in state else _vit(state)
    if f"{BODY}layers.0.blocks.0.attn.relative_position_bias_table" in state:
        return _swin(state)
    raise InputError("its backbone is not a ResNet, ResNeXt, Swin or plain ViT, and others are not read")


def _resnet(state: State) -> dict[str, Any]:
    depths = tuple(len(numbers(state, rf"{BODY}layer{i}\.(\d+)\.")) for i in range(1, 5))
    bottleneck = f"{BODY}layer1.0.conv3.weight" in state
    number = _RESNETS.get((depths, bottleneck))
    if number is None:
        raise InputError(f"its ResNet has {depths} blocks: timm has no such ResNet")
    last = "conv3" if bottleneck else "conv2"
    widths = [len(state[f"{BODY}layer{i}.0.{last}.weight"]) // (4 if bottleneck else 1) for i in range(1, 5)]
    middle = state[f"{BODY}layer1.0.conv2.weight"]
    groups = len(middle) // middle.shape[1]
    group_width = len(middle) * 64 // (widths[0] * groups)
    is_deep = f"{BODY}conv1.0.weight" in state
    args: dict[str, Any] = {} if tuple(widths) == _WIDTHS else {"channels": widths}
    if groups > 1:
        name = f"resnext{number}_{groups}x{group_width}d"
        if not timm.is_model(name):
            name, args = f"resnet{number}", args | {"cardinality": groups, "base_width": group_width}
    elif bottleneck and group_width == 128:
        name = f"wide_resnet{number}_2"
    else:
        name = f"resnet{number}"
        args |= {} if group_width == 64 or not bottleneck else {"base_width": group_width}
    if is_deep:
        stem = len(state[f"{BODY}conv1.0.weight"])
        name += "c" if timm.is_model(f"{name}c") else ""
        args |= {} if name.endswith("c") else {"stem_type": "deep"}
        args |= {} if stem == 32 and name.endswith("c") else {"stem_width": stem}
    group_norm = f"{BODY}bn1.running_var" not in state
    name += "_gn" if group_norm else ""
    if not timm.is_model(name):
        raise InputError(f"its backbone would be timm's {name}, which timm does not have")
    return {"name": name, "timm_args": args, "level_norms": False if group_norm else None}


def _swin(state: State) -> dict[str, Any]:
    width = len(state[f"{BODY}patch_embed.proj.weight"])
    depths = tuple(len(numbers(state, rf"{BODY}layers\.{i}\.blocks\.(\d+)\.")) for i in range(4))
    tables = [state[f"{BODY}layers.{i}.blocks.0.attn.relative_position_bias_table"] for i in range(4)]
    window, heads = (math.isqrt(len(tables[0])) + 1) // 2, [table.shape[1] for table in tables]
    size = _SWINS.get((width, depths))
    name = f"swin_{size}_patch4_{_SWIN_WINDOWS.get(window)}"
    if timm.is_model(name):
        return {"name": name}
    args = {"embed_dim": width, "depths": [*depths], "num_heads": heads, "window_size": window}
    return {"name": "swin_tiny_patch4_window7_224", "timm_args": args}


def _vit(state: State) -> dict[str, Any]:
    """Return the section of ViTDet's plain ViT: windows and global blocks by their relative positions."""
    width = len(state[f"{BODY}patch_embed.proj.weight"])
    depth = len(numbers(state, rf"{BODY}blocks\.(\d+)\."))
    sides = [_side(state, index) for index in range(depth)]
    if None in sides:
        raise InputError("its plain ViT has no relative positions, from which ViTDet's windows are read")
    window = min(side for side in sides if side is not None)
    args: dict[str, Any] = {} if f"{BODY}norm.weight" in state else {"final_norm": False}
    name = _VITS.get((width, depth))
    if name is None:
        heads = width // state[f"{BODY}blocks.0.attn.rel_pos_h"].shape[1]
        name, args = "vit_tiny_patch16_224", args | {"embed_dim": width, "depth": depth, "num_heads": heads}
    section: dict[str, Any] = {
        "name": name,
        "timm_args": args,
        "window": window,
        "global_blocks": chosen_blocks([side != window for side in sides]),
        "relative_positions": True,
    }
    return section | _embedding(state)


def chosen_blocks(is_global: Sequence[bool]) -> int | list[int]:
    """Return `backbone.global_blocks`: their number where they are evenly spaced, otherwise the blocks."""
    chosen = [index for index, value in enumerate(is_global) if value]
    is_even = chosen == sorted(global_block_indices(len(is_global), max(len(chosen), 1)))
    return len(chosen) if is_even else chosen


def _embedding(state: State) -> dict[str, Any]:
    """Return the keys of a plain ViT's patches and absolute positions."""
    section: dict[str, Any] = {}
    if (patch := state[f"{BODY}patch_embed.proj.weight"].shape[2]) != _PATCH:
        section["patch_size"] = patch
    if f"{BODY}pos_embed" in state:
        side = math.isqrt(state[f"{BODY}pos_embed"].shape[1])  # without the class token, if there is one
        section["position_grid"] = (side, side)
    return section


def _eva02(state: State) -> dict[str, Any]:
    width, depth, hidden = _sizes(state, "fc1_g")
    name = _EVA02S.get((width, depth))
    args: dict[str, Any] = {}
    if name is None:
        name = "eva02_base_patch14_224"
        args = {"embed_dim": width, "depth": depth, "num_heads": max(width // _EVA02_HEAD, 1)}
    if hidden != int(width * _EVA02_RATIO):
        args["mlp_ratio"] = _ratio(hidden, width)
    return {"name": name, "timm_args": args} | _embedding(state)


def _pe(state: State) -> dict[str, Any]:
    sizes = width, depth, hidden = _sizes(state, "fc1")
    args: dict[str, Any] = {}
    if sizes != _PE_GIANT:
        args = {"embed_dim": width, "depth": depth, "num_heads": max(width // _PE_HEAD, 1)}
        args["mlp_ratio"] = _ratio(hidden, width)
    name = "vit_pe_spatial_gigantic_patch14_448"
    if f"{BODY}blocks.0.gamma_1" not in state:
        name = "vit_pe_core_gigantic_patch14_448"
        args["use_post_transformer_norm"] = f"{BODY}norm.weight" in state
    tokens = state[f"{BODY}pos_embed"].shape[1]
    if tokens != math.isqrt(tokens) ** 2:
        args["class_token"] = True  # which only the positions still have
    return {"name": name, "timm_args": args} | _embedding(state)


def _sizes(state: State, layer: str) -> tuple[int, int, int]:
    """Return width, depth and width of the MLP, whose first layer is `layer`, of a plain ViT."""
    hidden, width = state[f"{BODY}blocks.0.mlp.{layer}.weight"].shape
    return width, len(numbers(state, rf"{BODY}blocks\.(\d+)\.")), hidden


def _ratio(hidden: int, width: int) -> float:
    """Return the ratio that timm multiplies by the width, and rounds down, to get `hidden`."""
    ratio = hidden / width
    return ratio if int(width * ratio) == hidden else math.nextafter(ratio, math.inf)


def _side(state: State, block: int) -> int | None:
    """Return the side in patches of what a block attends to, or None without relative positions."""
    table = state.get(f"{BODY}blocks.{block}.attn.rel_pos_h")
    return None if table is None else (len(table) + 1) // 2


def canvas_of(state: State) -> int | None:
    """Return the side in pixels of the square canvas of ViTDet's plain ViT; None for other backbones."""
    if f"{BODY}blocks.0.attn.rel_pos_h" not in state:
        return None
    depth = len(numbers(state, rf"{BODY}blocks\.(\d+)\."))
    sides = [_side(state, index) or 0 for index in range(depth)]
    return max(sides) * state[f"{BODY}patch_embed.proj.weight"].shape[2]
