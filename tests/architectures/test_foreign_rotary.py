"""Detectors of EVA-02 and PE-Detection: whole lists of names, and features by formulas written here.

No published file was at hand. Names and formulas are those of their code (`EVA-02/det`, `detectron2_pe`).
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from golden import load_weights
from torch import Tensor

from giantdet.architectures import build_model
from giantdet.config.architectures import SECTIONS
from giantdet.config.classes import Classes
from giantdet.errors import InputError
from giantdet.export import load_weights as load_weights_of
from giantdet.import_weights import import_weights

NET = "backbone.net."
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


def small(golden: Path, kind: str, sizes: Sizes) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """A backbone's tensors, and a detector's with the heads of the golden ViTDet."""
    if kind == "eva02":
        own = with_tables(random_state(eva02_shapes(sizes)), sizes, "blocks", 0, True)
    else:
        own = with_tables(random_state(pe_shapes(sizes)), sizes, "transformer.resblocks", 1, False)
    heads = {key: t for key, t in load_weights(golden, "vitdet").items() if not key.startswith(NET)}
    return own, heads | {f"{NET}{key}": value for key, value in own.items()}


@torch.no_grad()
@pytest.mark.parametrize(
    ("kind", "sizes"),
    [
        ("eva02", Sizes()),
        ("eva02", Sizes(window=4, head=32, reference=14, global_blocks=[0, 3])),
        ("pe", Sizes(positions=25, reference=32, canvas=12, window=5)),
        ("pe", Sizes(positions=26, window=4, scales=False, hidden=130, head=32)),
    ],
    ids=["eva02 padded", "eva02 even", "pe padded", "pe-core even"],
)
def test_features(golden: Path, tmp_path: Path, kind: str, sizes: Sizes) -> None:
    """Windowed and global blocks, padding, positions of another grid; then as initial weights of a run."""
    own, state = small(golden, kind, sizes)
    torch.save({"model": state, "iteration": 3}, tmp_path / "w.pth")
    imported = import_weights(tmp_path / "w.pth", classes="a,b,c,d,e")
    image = torch.randn(3, 16 * sizes.canvas, 16 * sizes.canvas)
    features = {"eva02": eva02_features, "pe": pe_features}[kind]
    expected = features(own, sizes, image)
    found = imported.model.backbone(image[None])[0][0]
    assert expected.std() > 0.5
    torch.testing.assert_close(found.double(), expected, atol=2e-5, rtol=2e-5)
    assert imported.config.size == (16 * sizes.canvas, 16 * sizes.canvas)
    title = {"eva02": "EVA-02", "pe": "PE-Detection"}[kind]
    assert f"w.pth: {title}, mask_rcnn on " in imported.report
    assert f"{len(state)} tensors: {len(state) - 12} taken over, 12 left out\n" in imported.report
    assert f"windows of {sizes.window} patches, global blocks " in imported.report
    assert "code, trained numbers were not (no published file was at hand)" in imported.report

    raw = imported.config.model.model_dump() | {"init_weights": str(tmp_path / "w.pth")}
    config = SECTIONS["mask_rcnn"].model_validate(raw)
    model = build_model(config, (16 * sizes.canvas, 16 * sizes.canvas))
    load_weights_of(model, config)
    assert torch.equal(model.eval().backbone(image[None])[0][0], found)


def zoo(golden: Path, name: str, own: dict[str, Any], width: int) -> dict[str, Tensor]:
    """A detector with the heads of detectron2's ViTDet-B, and its pyramid after a ViT of `width`."""
    keys = json.loads((golden / f"zoo_keys/detectron2_{name}.json").read_text())["keys"]
    state = {}
    for key, shape in keys.items():
        if "simfp" in key:
            shape = [{768: width, 384: width // 2, 192: width // 4}.get(side, side) for side in shape]
        if not key.startswith(NET):
            state[f"model.{key}"] = torch.zeros(()).expand(shape)
    for key, value in own.items():
        state[f"model.{NET}{key}"] = torch.zeros(()).expand(value) if isinstance(value, tuple) else value
    return state


EVA02_L = Sizes(
    **{"width": 1024, "depth": 24, "head": 64, "hidden": 2730, "positions": 197, "canvas": 96, "window": 16},
    global_blocks=[2, 5, 8, 11, 14, 17, 20, 23],
)
EVA02_B = Sizes(
    **{"width": 768, "depth": 12, "head": 64, "hidden": 2048, "positions": 197, "canvas": 96, "window": 32},
    global_blocks=[1, 3, 5, 7, 9, 11],
)
PE_G = Sizes(
    **{"width": 1536, "depth": 50, "head": 96, "hidden": 8960, "positions": 1024, "canvas": 64, "window": 32},
    **{"global_blocks": [12, 24, 36, 49], "reference": 32},
)
PE_CORE_G = Sizes(**{**vars(PE_G), "scales": False})
ZOO: dict[str, tuple[str, Sizes, dict[str, Any]]] = {
    "eva02_L_coco_det_sys_o365": ("cascade_mask_rcnn", EVA02_L, {"name": "eva02_large_patch14_224"}),
    "eva02_B_coco_sys": ("cascade_mask_rcnn", EVA02_B, {"name": "eva02_base_patch14_224"}),
    "eva02_L_m38m_to_o365": ("cascade_mask_rcnn", EVA02_L, {"name": "eva02_large_patch14_224"}),
    "mask_rcnn_PEspatial_G_coco36ep": ("mask_rcnn", PE_G, {"name": "vit_pe_spatial_gigantic_patch14_448"}),
    "mask_rcnn_PEcore_G_coco75ep": (
        "mask_rcnn",
        PE_CORE_G,
        {
            "name": "vit_pe_core_gigantic_patch14_448",
            "timm_args": {"use_post_transformer_norm": False},
        },
    ),
}


def zoo_state(golden: Path, name: str) -> dict[str, Tensor]:
    kind, sizes, _ = ZOO[name]
    if name.startswith("eva02"):
        own = with_tables(eva02_shapes(sizes), sizes, "blocks", 0, True)
    else:
        own = with_tables(pe_shapes(sizes), sizes, "transformer.resblocks", 1, False)
    state = zoo(golden, f"{kind}_vitdet_b_100ep", own, sizes.width)
    if name.endswith("to_o365"):  # 365 classes, and no masks
        state = {key: value for key, value in state.items() if "mask_head" not in key}
        for key in [key for key in state if "cls_score" in key]:
            state[key] = torch.zeros(()).expand(366, *state[key].shape[1:])
    return state


@pytest.mark.parametrize("name", ZOO)
def test_every_tensor_has_its_place(golden: Path, name: str, monkeypatch: Any) -> None:
    """As in test_foreign.py, but the models, of up to 1.9 billion parameters, are not materialised."""
    state = zoo_state(golden, name)
    monkeypatch.setattr("giantdet.import_weights.read_tensors", lambda path: state)
    monkeypatch.setattr("giantdet.import_weights.real_parameters", lambda *_: ())
    kind, sizes, section = ZOO[name]
    imported = import_weights("w.pth")
    tables = 2 * sizes.depth + 4
    assert f"{len(state)} tensors: {len(state) - tables} taken over, {tables} left out\n" in imported.report
    config = imported.config
    assert (config.model.type, config.size, config.short_side) == (
        kind,
        (16 * sizes.canvas,) * 2,
        16 * sizes.canvas,
    )
    raw = config.model.model_dump()
    grid = math.isqrt(sizes.positions)
    expected = {
        "timm_args": {},
        "window": sizes.window,
        "position_grid": (grid, grid),
        "patch_size": 16,
    } | section
    assert {key: raw["backbone"][key] for key in expected} == expected
    assert raw["backbone"]["global_blocks"] in (tuple(sizes.global_blocks), len(sizes.global_blocks))
    assert raw["mask_head"]["enabled"] != name.endswith("to_o365")
    assert raw["box_head"]["norm"] == raw["fpn"]["norm"] == "layer" and raw["rpn"]["convs"] == 2


def test_averaged_weights(golden: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """`ema_state` is preferred, and lacks the tables in the blocks, which the raw weights have."""
    sizes = Sizes()
    _, state = small(golden, "eva02", sizes)
    average = {
        key: value * (1 if "rope" in key else 0.5) for key, value in state.items() if ".attn.rope." not in key
    }
    torch.save({"model": state, "ema_state": average}, tmp_path / "w.pth")
    model = import_weights(tmp_path / "w.pth", classes="a,b,c,d,e").model
    assert torch.equal(model.backbone.body.blocks[0].attn.q_proj.bias, average[f"{NET}blocks.0.attn.q_bias"])
    assert "took the weights under 'ema_state.', not 'model.'" in caplog.text
    torch.save(average, tmp_path / "w.pth")
    with pytest.raises(
        InputError, match=r"EVA-02, but it lacks the .* which tell model.backbone.global_blocks: add"
    ):
        import_weights(tmp_path / "w.pth", classes="a,b,c,d,e")
    imported = import_weights(tmp_path / "w.pth", ["model.backbone.global_blocks=[0,2]"], "a,b,c,d,e")
    assert imported.config.model.backbone.global_blocks == (0, 2) and imported.model.canvas == (128, 128)


def test_what_is_refused(golden: Path, tmp_path: Path) -> None:
    sizes = Sizes()
    _, state = small(golden, "eva02", sizes)
    with_columns_first = state | {
        f"{NET}rope_glb.{key}": t for key, t in tables(sizes.canvas, sizes.head, 16, 0, False).items()
    }
    torch.save(with_columns_first, tmp_path / "w.pth")
    refusal = "w.pth: weights of EVA-02, but its rotary tables are not those that giantdet computes"
    with pytest.raises(InputError, match=refusal):
        import_weights(tmp_path / "w.pth", classes="a,b,c,d,e")
    raw = {"num_classes": 5, "init_weights": str(tmp_path / "w.pth")}
    config = SECTIONS["mask_rcnn"].model_validate(raw)
    with pytest.raises(InputError, match=refusal):
        load_weights_of(build_model(config, (128, 128)), config)
    sigmoid = dict(state)
    for kind in ("weight", "bias"):  # LVIS' classes without a background
        key = f"roi_heads.box_predictor.cls_score.{kind}"
        sigmoid[key] = torch.zeros(1203, *state[key].shape[1:])
        key = f"roi_heads.box_predictor.bbox_pred.{kind}"
        sigmoid[key] = torch.zeros(4 * 1203, *state[key].shape[1:])
    torch.save(sigmoid, tmp_path / "w.pth")
    with pytest.raises(InputError, match="1203 logits"):
        import_weights(tmp_path / "w.pth")


def test_objects365_begins_coco(golden: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """EVA-02's file of Objects365 without masks, in a run of COCO's classes with masks and other windows."""
    _, state = small(golden, "eva02", Sizes())
    state = {key: value for key, value in state.items() if "mask_head" not in key}
    for name, values in (("cls_score", 1), ("bbox_pred", 4)):
        for kind in ("weight", "bias"):
            key = f"roi_heads.box_predictor.{name}.{kind}"
            rows = torch.arange(366.0 if values == 1 else 365.0).repeat_interleave(values)
            state[key] = rows.view(-1, *[1] * (state[key].ndim - 1)) + torch.zeros(
                len(rows), *state[key].shape[1:]
            )
    torch.save(state, tmp_path / "w.pth")
    imported = import_weights(tmp_path / "w.pth").config
    assert imported.categories[0] == (1, "Person") and len(imported.categories) == 365
    raw = imported.model.model_dump() | {"num_classes": 2, "init_weights": str(tmp_path / "w.pth")}
    raw |= {"mask_head": {}, "backbone": raw["backbone"] | {"window": 4, "global_blocks": (0, 3)}}
    config = SECTIONS["mask_rcnn"].model_validate(raw)
    model = build_model(config, (128, 128))
    load_weights_of(model, config, Classes(objects=((1, "chair"), (2, "person"))))
    assert model.box_head.classes.bias.tolist() == [2.0, 0.0, 365.0]
    assert model.box_head.deltas.bias[::4].tolist() == [2.0, 0.0]
    assert "has no mask_head, which starts with new weights" in caplog.text
    warned = "backbone.window 3, not 4; backbone.global_blocks [1, 3], not [0, 3]"
    assert f"weights of EVA-02, trained with {warned}" in caplog.text
