"""Backbones of EVA-02's and PE's detectors, written from the formulas of their code: tensors and features.

Sources: baaivision/EVA, `EVA-02/det/detectron2/modeling/backbone`, and `pev1_det.py` of facebookresearch's
`detectron2_pe`. Nothing here uses giantdet or timm.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

State = dict[str, Tensor]
Project = Callable[[Tensor], tuple[Tensor, ...]]
Attention = Callable[[Tensor], Tensor]


def tables(side: int, head: int, reference: int, offset: int, rows_first: bool) -> dict[str, Tensor]:
    """The tables of their `VisionRotaryEmbeddingFast`, token by token."""
    angles = []
    for row in range(side):
        for column in range(side):
            places = (row, column) if rows_first else (column, row)
            for place in places:
                for k in range(head // 4):
                    angles += [(place / side * reference + offset) * 10000 ** (-4 * k / head)] * 2
    whole = torch.tensor(angles).view(side * side, head)
    return {"freqs_cos": whole.cos(), "freqs_sin": whole.sin()}


class Sizes:
    """Of a backbone; the defaults are small, and windows of 3 patches do not divide a canvas of 8."""

    def __init__(self, **others: Any) -> None:
        self.width, self.depth, self.head, self.hidden = 64, 4, 16, 170
        self.window, self.canvas, self.patch = 3, 8, 16
        self.positions, self.global_blocks, self.reference = 26, [1, 3], 16
        self.scales = True
        vars(self).update(others)

    def attended(self, block: int) -> tuple[int, str]:
        """Side in patches of what a block attends to, and the name of its table."""
        is_global = block in self.global_blocks
        return (self.canvas, "rope_glb") if is_global else (self.window, "rope_win")


def with_tables(
    state: dict[str, Any], sizes: Sizes, blocks: str, offset: int, rows_first: bool
) -> dict[str, Any]:
    made = {
        name: tables(side, sizes.head, sizes.reference, offset, rows_first)
        for name, side in (("rope_win", sizes.window), ("rope_glb", sizes.canvas))
    }
    for index in range(sizes.depth):
        own = made["rope_glb" if index in sizes.global_blocks else "rope_win"]
        state |= {f"{blocks}.{index}.attn.rope.{key}": table for key, table in own.items()}
    return state | {f"{name}.{key}": table for name in made for key, table in made[name].items()}


def linear(name: str, outputs: int, inputs: int) -> dict[str, tuple[int, ...]]:
    return {f"{name}.weight": (outputs, inputs), f"{name}.bias": (outputs,)}


def norm(name: str, width: int) -> dict[str, tuple[int, ...]]:
    return {f"{name}.weight": (width,), f"{name}.bias": (width,)}


def eva02_shapes(sizes: Sizes) -> dict[str, tuple[int, ...]]:
    width, hidden = sizes.width, sizes.hidden
    shapes: dict[str, tuple[int, ...]] = {
        "pos_embed": (1, sizes.positions, width),
        "patch_embed.proj.weight": (width, 3, sizes.patch, sizes.patch),
        "patch_embed.proj.bias": (width,),
    }
    for index in range(sizes.depth):
        block = f"blocks.{index}."
        shapes |= norm(f"{block}norm1", width) | norm(f"{block}norm2", width)
        shapes |= {f"{block}attn.{name}_bias": (width,) for name in "qv"}
        shapes |= {f"{block}attn.{name}_proj.weight": (width, width) for name in "qkv"}
        shapes |= linear(f"{block}attn.proj", width, width)
        shapes |= linear(f"{block}mlp.w1", hidden, width) | linear(f"{block}mlp.w2", hidden, width)
        shapes |= norm(f"{block}mlp.ffn_ln", hidden) | linear(f"{block}mlp.w3", width, hidden)
    return shapes


def pe_shapes(sizes: Sizes) -> dict[str, tuple[int, ...]]:
    width, hidden = sizes.width, sizes.hidden
    shapes: dict[str, tuple[int, ...]] = {
        "positional_embedding": (1, sizes.positions, width),
        "conv1.weight": (width, 3, sizes.patch, sizes.patch),
        **norm("ln_pre", width),
    }
    for index in range(sizes.depth):
        block = f"transformer.resblocks.{index}."
        shapes |= {
            f"{block}attn.in_proj_weight": (3 * width, width),
            f"{block}attn.in_proj_bias": (3 * width,),
        }
        shapes |= linear(f"{block}attn.out_proj", width, width)
        shapes |= norm(f"{block}ln_1", width) | norm(f"{block}ln_2", width)
        shapes |= linear(f"{block}mlp.c_fc", hidden, width) | linear(f"{block}mlp.c_proj", width, hidden)
        if sizes.scales:
            shapes |= {f"{block}ls_{number}.gamma": (width,) for number in (1, 2)}
    return shapes


def random_state(shapes: dict[str, tuple[int, ...]]) -> dict[str, Tensor]:
    """Values that make every tensor matter; those of norms are about 1."""
    torch.manual_seed(0)
    state = {}
    for key, shape in shapes.items():
        spread = 0.3 if len(shape) == 1 else 1.0 if "pos" in key else shape[0] ** -0.5
        state[key] = spread * torch.randn(shape)
        if key.endswith(
            ("norm1.weight", "norm2.weight", "ln.weight", "1.gamma", "ln_1.weight", "ln_pre.weight")
        ):
            state[key] += 1
    return state


def attention(project: Project, side: int, state: State, table: str, out: str, heads: int) -> Attention:
    """Attention within windows of `side`, those at the right and the bottom filled up with zeros."""
    cos, sin = (state[f"{table}.freqs_{name}"].double()[:, ::2] for name in ("cos", "sin"))

    def of_tokens(x_NC: Tensor) -> Tensor:
        q, k, v = (part.unflatten(-1, (heads, -1)).transpose(0, 1) for part in project(x_NC))
        pairs = (torch.view_as_complex(t.unflatten(-1, (-1, 2)).contiguous()) for t in (q, k))
        q, k = (torch.view_as_real(pair * torch.complex(cos, sin)).flatten(-2) for pair in pairs)
        weights = (q @ k.mT / math.sqrt(q.shape[-1])).softmax(-1)
        return affine((weights @ v).transpose(0, 1).flatten(1), state, out)

    def of_map(x_hwC: Tensor) -> Tensor:
        result = torch.empty_like(x_hwC)
        for top in range(0, len(x_hwC), side):
            for left in range(0, x_hwC.shape[1], side):
                inside = x_hwC[top : top + side, left : left + side]
                rows, columns, channels = inside.shape
                window = x_hwC.new_zeros(side, side, channels)
                window[:rows, :columns] = inside
                answer = of_tokens(window.flatten(0, 1)).view(side, side, channels)
                result[top : top + side, left : left + side] = answer[:rows, :columns]
        return result

    return of_map


def affine(x: Tensor, state: State, name: str) -> Tensor:
    return F.linear(x, state[f"{name}.weight"], state[f"{name}.bias"])


def normed(x: Tensor, state: State, name: str, eps: float) -> Tensor:
    return F.layer_norm(x, x.shape[-1:], state[f"{name}.weight"], state[f"{name}.bias"], eps)


def eva02_features(state: State, sizes: Sizes, image: Tensor) -> Tensor:
    w = {key: value.double() for key, value in state.items()}
    x = F.conv2d(image.double()[None], w["patch_embed.proj.weight"], w["patch_embed.proj.bias"], sizes.patch)
    grid = math.isqrt(sizes.positions)
    table = w["pos_embed"][0, 1:].view(1, grid, grid, -1).permute(0, 3, 1, 2)
    x = x + F.interpolate(table, size=x.shape[2:], mode="bicubic", align_corners=False)
    x = x[0].permute(1, 2, 0)
    for index in range(sizes.depth):
        block = f"blocks.{index}."

        def project(t: Tensor, attn: str = f"{block}attn.") -> tuple[Tensor, ...]:
            biases = {"q": w[f"{attn}q_bias"], "k": None, "v": w[f"{attn}v_bias"]}
            return tuple(F.linear(t, w[f"{attn}{name}_proj.weight"], bias) for name, bias in biases.items())

        side, table_name = sizes.attended(index)
        attend = attention(project, side, w, table_name, f"{block}attn.proj", sizes.width // sizes.head)
        x = x + attend(normed(x, w, f"{block}norm1", 1e-6))
        y = normed(x, w, f"{block}norm2", 1e-6)
        gate, value = affine(y, w, f"{block}mlp.w1"), affine(y, w, f"{block}mlp.w2")
        y = normed(gate * gate.sigmoid() * value, w, f"{block}mlp.ffn_ln", 1e-6)
        x = x + affine(y, w, f"{block}mlp.w3")
    return x.permute(2, 0, 1)


def pe_features(state: State, sizes: Sizes, image: Tensor) -> Tensor:
    w = {key: value.double() for key, value in state.items()}
    x = F.conv2d(image.double()[None], w["conv1.weight"], None, sizes.patch)[0].permute(1, 2, 0)
    grid = math.isqrt(sizes.positions)
    positions = w["positional_embedding"][0, sizes.positions - grid * grid :]
    place = torch.arange(sizes.canvas) % grid
    x = normed(x + positions[place[:, None] * grid + place], w, "ln_pre", 1e-5)
    for index in range(sizes.depth):
        block = f"transformer.resblocks.{index}."

        def project(t: Tensor, attn: str = f"{block}attn.in_proj_") -> tuple[Tensor, ...]:
            return F.linear(t, w[f"{attn}weight"], w[f"{attn}bias"]).chunk(3, -1)

        scales = [w.get(f"{block}ls_{number}.gamma", torch.ones(())) for number in (1, 2)]
        side, table_name = sizes.attended(index)
        attend = attention(project, side, w, table_name, f"{block}attn.out_proj", sizes.width // sizes.head)
        x = x + scales[0] * attend(normed(x, w, f"{block}ln_1", 1e-5))
        y = affine(normed(x, w, f"{block}ln_2", 1e-5), w, f"{block}mlp.c_fc")
        x = x + scales[1] * affine(F.gelu(y), w, f"{block}mlp.c_proj")
    return x.permute(2, 0, 1)
