"""Detectors of EVA-02 and PE-Detection: whole lists of names, and features by formulas written here.

No published file was at hand. Names and formulas are those of their code (`EVA-02/det`, `detectron2_pe`).
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from golden import load_weights
from rotary_models import (
    Sizes,
    eva02_features,
    eva02_shapes,
    pe_features,
    pe_shapes,
    random_state,
    tables,
    with_tables,
)
from torch import Tensor

from giantdet.architectures import build_model
from giantdet.config.architectures import SECTIONS
from giantdet.config.classes import Classes
from giantdet.errors import InputError
from giantdet.export import load_weights as load_weights_of
from giantdet.import_weights import import_weights

NET = "backbone.net."


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
    assert "has no mask_head; new weights for it" in caplog.text
    warned = "backbone.window 3, not 4; backbone.global_blocks [1, 3], not [0, 3]"
    assert f"weights of EVA-02, trained with {warned}" in caplog.text
