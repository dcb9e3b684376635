"""Weights of other projects: names and shapes in their zoos, and exports that reproduce the golden models."""

from __future__ import annotations

import dataclasses
import json
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from golden import load, load_weights
from golden_compare import assert_same_detections, same_boxes
from golden_mm import arrays_of, check_detections
from golden_mmseg import check_classes
from PIL import Image
from torch import Tensor

from giantdet import cli
from giantdet.architectures import Architecture, build_model
from giantdet.config.architectures.mask_rcnn import MaskRcnnConfig
from giantdet.config.architectures.retinanet import RetinaNetConfig
from giantdet.config.classes import Classes
from giantdet.config.conventions import CONVENTIONS
from giantdet.errors import ConfigError, InputError
from giantdet.export import load_detector
from giantdet.export import load_weights as load_weights_of
from giantdet.import_weights import import_weights

NAMES = "a,b,c,d,e"


DETECTRON2_STEM = (
    ("backbone.bottom_up.stem.conv1.",),
    ("backbone.bottom_up.res2.0.conv1.weight", "backbone.bottom_up.res2.0.shortcut.weight"),
)
MM_STEM = (
    ("backbone.conv1.", "backbone.bn1."),
    ("backbone.layer1.0.conv1.weight", "backbone.layer1.0.downsample.0.weight"),
)


def padded_stem(state: dict[str, Tensor], stem: Any = DETECTRON2_STEM) -> dict[str, Tensor]:
    """Return an equivalent state with timm's stem of 64 channels: the 56 more are zero."""
    outputs, inputs = stem
    padded = dict(state)
    for key in [key for key in state if key.startswith(outputs)]:
        padded[key] = torch.cat([state[key], torch.zeros(56, *state[key].shape[1:])])
    for key in inputs:
        padded[key] = torch.cat([state[key], torch.zeros(len(state[key]), 56, 1, 1)], 1)
    return padded


def cover_padding(model: Architecture, conventions: str) -> None:
    """Place anchors in the padding too, as in the golden models; a fixed canvas leaves them out."""
    for module in model.modules():
        if hasattr(module, "conventions"):
            module.conventions = dataclasses.replace(CONVENTIONS[conventions], anchors_in_padding=True)


def zoo_file(path: Path, state: dict[str, Tensor], **others: Any) -> Path:
    """Write a pickle in the layout of detectron2's zoo: arrays under "model"."""
    content = {"model": {key: value.numpy() for key, value in state.items()}, "__author__": "x", **others}
    path.write_bytes(pickle.dumps(content, protocol=2))
    return path


@torch.no_grad()
@pytest.mark.parametrize("name", ["mask_rcnn", "cascade"])
def test_a_pickle_of_detectron2_gives_an_export_with_its_detections(
    golden: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    statistics = {"pixel_mean": (103.53, 116.28, 123.675), "pixel_std": (1.0, 1.0, 1.0)}
    state = padded_stem(load_weights(golden, name))
    state |= {key: torch.tensor(values)[:, None, None] for key, values in statistics.items()}
    file, out = zoo_file(tmp_path / "model_final_1.pkl", state), tmp_path / "out"
    head = f"model.box_head.score_threshold={0.25 if name == 'cascade' else 0.2}"
    tests = ["model.rpn.pre_nms_test=200", "model.rpn.post_nms_test=100", "model.box_head.detections=60"]
    arguments = [str(file), str(out), "size=[256,320]", "short_side=256", head, *tests, "--classes", NAMES]
    assert cli.main(["import-weights", *arguments]) == 0
    printed = capsys.readouterr().out
    kind = "cascade_mask_rcnn" if name == "cascade" else "mask_rcnn"
    assert f"detectron2, {kind} on resnet50, 5 classes (a, b, ...)" in printed
    assert f"{len(state)} tensors: {len(state) - 2} taken over, 2 left out" in printed
    assert "pixel_mean 123.675, 116.28, 103.53, pixel_std 1, 1, 1" in printed

    model, config = load_detector(out)
    assert config.categories == ((1, "a"), (2, "b"), (3, "c"), (4, "d"), (5, "e"))
    assert config.model.backbone.stride_in_1x1
    cover_padding(model, "detectron2")
    batch = load(golden)
    # The golden models took the stored channels for blue, green, red.
    found = model(batch._replace(images_B3HW=batch.images_B3HW.flip(1)))
    expected = np.load(golden / f"{name}_A.npz")
    assert_same_detections(found.detections, batch, expected)

    # The command finds the same objects in an image that fills the canvas, which has no anchors in padding.
    pixels = np.load(golden / "inputs_A.npz")["image.0"][:, :, ::-1]
    Image.fromarray(np.ascontiguousarray(pixels)).save(tmp_path / "image.png")
    arguments = [str(out), str(tmp_path / "image.png"), "--output", str(tmp_path), "--device", "cpu"]
    assert cli.main(["predict", *arguments, "--threshold", "0", "--no-overlays"]) == 0
    results = json.loads((tmp_path / "results.json").read_text())
    boxes_N4 = torch.tensor([result["bbox"] for result in results])
    boxes_N4[:, 2:] += boxes_N4[:, :2]
    boxes_N4 += 1e3 * (torch.tensor([result["category_id"] for result in results])[:, None] - 1)
    theirs_N4 = torch.from_numpy(expected["det.0.boxes"] + 1e3 * expected["det.0.classes"][:, None])
    same_boxes(boxes_N4, theirs_N4, atol=0.05)


ZOO = {
    "detectron2_mask_rcnn_R_50_FPN_3x": "mask_rcnn resnet50",
    "detectron2_faster_rcnn_R_50_FPN_3x": "mask_rcnn resnet50",
    "detectron2_cascade_mask_rcnn_R_50_FPN_3x": "cascade_mask_rcnn resnet50",
    "detectron2_mask_rcnn_X_101_32x8d_FPN_3x": "mask_rcnn resnext101_32x8d",
    "detectron2_retinanet_R_50_FPN_3x": "retinanet resnet50",
    "detectron2_scratch_mask_rcnn_R_50_FPN_3x_gn": "mask_rcnn resnet50_gn",
    "detectron2_panoptic_fpn_R_50_3x": "panoptic_fpn resnet50",
    "detectron2_semantic_R_50_FPN_1x": "semantic_fpn resnet50",
    "detectron2_mask_rcnn_vitdet_b_100ep": "mask_rcnn vit_base_patch16_224",
    "detectron2_cascade_mask_rcnn_vitdet_b_100ep": "cascade_mask_rcnn vit_base_patch16_224",
    "detectron2_cascade_mask_rcnn_swin_b_in21k_50ep": "cascade_mask_rcnn swin_base_patch4_window7_224",
    "mmdet3_faster-rcnn_r50_fpn_1x_coco": "mask_rcnn resnet50",
    "mmdet3_mask-rcnn_r50_fpn_1x_coco": "mask_rcnn resnet50",
    "mmdet3_mask-rcnn_x101-32x4d_fpn_1x_coco": "mask_rcnn resnext101_32x4d",
    "mmdet3_mask-rcnn_swin-t-p4-w7_fpn_1x_coco": "mask_rcnn swin_tiny_patch4_window7_224",
    "mmdet3_cascade-rcnn_r50_fpn_1x_coco": "cascade_mask_rcnn resnet50",
    "mmdet3_cascade-mask-rcnn_r50_fpn_1x_coco": "cascade_mask_rcnn resnet50",
    "mmdet3_panoptic-fpn_r50_fpn_1x_coco": "panoptic_fpn resnet50",
    "mmdet3_retinanet_r50_fpn_1x_coco": "retinanet resnet50",
    "mmseg1_fpn_r50_4xb2-80k_cityscapes-512x1024": "semantic_fpn resnet50c",
    "mmseg1_upernet_r50_4xb4-80k_ade20k-512x512": "upernet resnet50c",
    "mmseg1_swin-tiny-patch4-window7-in1k-pre_upernet_8xb2-160k_ade20k-512x512": (
        "upernet swin_tiny_patch4_window7_224"
    ),
}


SMALL = ["size=[256,320]", "model.rpn.pre_nms_test=200", "model.rpn.post_nms_test=100"]
SMALL += ["model.box_head.detections=60", "model.box_head.score_threshold=0.2"]


def imported_golden(
    file: Path, state: dict[str, Tensor], overrides: list[str], classes: str = NAMES
) -> Architecture:
    """Import a file as written by `torch.save`, with an optimizer's state beside the weights."""
    content = {"state_dict": state, "optimizer": {"state": {0: {"momentum": torch.ones(3)}}}, "meta": "x"}
    torch.save(content, file)
    return import_weights(file, overrides, classes).model


@torch.no_grad()
def test_vitdet(golden: Path, tmp_path: Path) -> None:
    """Width, depth, heads, windows and canvas are inferred from the shapes."""
    changes = [*SMALL[1:-1], "model.box_head.score_threshold=0.15"]
    model = imported_golden(tmp_path / "w.pth", load_weights(golden, "vitdet"), changes)
    assert model.canvas == (320, 320)
    cover_padding(model, "detectron2")
    batch = load(golden, canvas=(320, 320))
    assert_same_detections(model(batch).detections, batch, np.load(golden / "vitdet_A.npz"))


@torch.no_grad()
@pytest.mark.parametrize("name", ["mmdet_mask_rcnn_swin", "mmdet_cascade_mask_rcnn"])
def test_mmdetection(golden: Path, tmp_path: Path, name: str) -> None:
    state = load_weights(golden, f"mm/{name}")
    if "swin" not in name:
        state = padded_stem(state, MM_STEM)
    model = imported_golden(tmp_path / "w.pth", state, SMALL)
    cover_padding(model, "mmdetection")
    batch = load(golden)
    check_detections(model(batch).detections, batch, arrays_of(golden, name))


@torch.no_grad()
@pytest.mark.parametrize("name", ["mmseg_semantic_fpn", "mmseg_upernet"])
def test_mmsegmentation(golden: Path, tmp_path: Path, name: str) -> None:
    state = load_weights(golden, f"mm/{name}")
    model = imported_golden(tmp_path / "w.pth", state, SMALL[:1], "a,b,c,d,e,f,g")
    check_classes(model(load(golden)).semantic_BCHW, arrays_of(golden, name))


def test_as_initial_weights(golden: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """The same file works as model.init_weights, with a warning about settings that do not match it."""
    file = zoo_file(tmp_path / "w.pkl", padded_stem(load_weights(golden, "retinanet")))
    imported = import_weights(file, SMALL[:1], NAMES)
    raw = imported.config.model.model_dump() | {"init_weights": str(file)}
    for backbone, warned in (({}, False), ({"pixel_std": None, "stride_in_1x1": False}, True)):
        config = RetinaNetConfig.model_validate({**raw, "backbone": raw["backbone"] | backbone})
        model = build_model(config, (256, 320))
        caplog.clear()
        load_weights_of(model, config)
        assert all(
            torch.equal(value, imported.model.state_dict()[key]) for key, value in model.state_dict().items()
        )
        assert ("backbone.pixel_std [1.0, 1.0, 1.0], not [58.395, 57.12, 57.375]" in caplog.text) is warned
        assert ("backbone.stride_in_1x1 True, not False" in caplog.text) is warned


def test_rows_of_coco_are_transferred_by_name(golden: Path, tmp_path: Path, monkeypatch: Any) -> None:
    """A file with 80 classes is taken as COCO's: person is the first, toothbrush the last."""
    state = zoo_state(golden, "detectron2_faster_rcnn_R_50_FPN_3x")
    for name, values in (("cls_score", 1), ("bbox_pred", 4)):
        for kind in ("weight", "bias"):
            key = f"model.roi_heads.box_predictor.{name}.{kind}"
            rows = torch.arange(float(len(state[key]))) // values + 1
            state[key] = rows.view(-1, *[1] * (state[key].ndim - 1)).expand(state[key].shape)
    monkeypatch.setattr("giantdet.export.read_tensors", lambda path: state)
    (tmp_path / "config.json").write_text("{}")  # a config.json of another project
    raw = {"num_classes": 3, "mask_head": {"enabled": False}, "init_weights": str(tmp_path / "w.pkl")}
    config = MaskRcnnConfig.model_validate(raw | {"backbone": {"stride_in_1x1": True}})
    model = build_model(config, (64, 64))
    fresh = model.state_dict()["box_head.deltas.weight"][4:8].clone()
    load_weights_of(model, config, Classes(objects=((1, "toothbrush"), (2, "yeti"), (3, "person"))))
    assert model.box_head.classes.bias.tolist() == [80.0, 0.0, 1.0, 81.0]
    assert model.box_head.deltas.bias[::4].tolist() == [80.0, 0.0, 1.0]
    assert torch.equal(model.box_head.deltas.weight[4:8], fresh)


def zoo_state(golden: Path, name: str) -> dict[str, Tensor]:
    keys = json.loads((golden / f"zoo_keys/{name}.json").read_text())["keys"]
    return {f"model.{key}": torch.zeros(()).expand(shape) for key, shape in keys.items()}


@pytest.mark.parametrize("name", ZOO)
def test_every_tensor_of_the_zoo_is_mapped(golden: Path, name: str, monkeypatch: Any) -> None:
    """import_weights raises on missing, unknown and misshapen tensors; it reports those left out."""
    state = zoo_state(golden, name)
    monkeypatch.setattr("giantdet.import_weights.read_tensors", lambda path: state)
    ade20k = ",".join(map(str, range(150))) if "ade20k" in name else None
    imported = import_weights(f"{name}.pkl", classes=ade20k)
    assert f"{imported.config.model.type} {imported.config.model.backbone.name}" == ZOO[name]
    tables = sum(key.endswith("relative_position_index") for key in state)
    assert f"{len(state)} tensors: {len(state) - tables} taken over, {tables} left out\n" in imported.report


def test_global_blocks_and_logits_are_read(golden: Path, monkeypatch: Any) -> None:
    """Blocks without even spacing, and mmdetection's two logits per anchor with use_sigmoid=False."""
    state = zoo_state(golden, "detectron2_mask_rcnn_vitdet_b_100ep")
    monkeypatch.setattr("giantdet.import_weights.read_tensors", lambda path: state)
    config = import_weights("w").config
    assert (config.size, config.short_side, config.long_side) == ((1024, 1024), 1024, None)
    backbone = config.model.backbone
    assert (backbone.window, backbone.global_blocks, backbone.position_grid) == (14, 4, (14, 14))
    for name in ("rel_pos_h", "rel_pos_w"):
        windowed, whole = (f"model.backbone.net.blocks.{i}.attn.{name}" for i in (10, 11))
        state[windowed], state[whole] = state[whole], state[windowed]
    assert import_weights("w").config.model.backbone.global_blocks == (2, 5, 8, 10)

    state = zoo_state(golden, "mmdet3_faster-rcnn_r50_fpn_1x_coco")
    for name in ("weight", "bias"):
        key = f"model.rpn_head.rpn_cls.{name}"
        state[key] = torch.cat([state[key]] * 2)
    imported = import_weights("w").config
    assert imported.model.model_dump()["rpn"]["objectness"] == "softmax" and imported.long_side == 1333


def test_unsupported_weights_are_refused(golden: Path, monkeypatch: Any) -> None:
    state = zoo_state(golden, "mmdet3_htc_r50_fpn_1x_coco")
    monkeypatch.setattr("giantdet.import_weights.read_tensors", lambda path: state)
    with pytest.raises(InputError, match=r"htc.pth: weights of mmdetection, but it is HTC"):
        import_weights("htc.pth")
    state = zoo_state(golden, "detectron2_faster_rcnn_R_50_FPN_3x")
    state["model.roi_heads.mask_rater.fc1.weight"] = torch.zeros(3)
    del state["model.roi_heads.box_head.fc2.bias"]
    with pytest.raises(InputError) as raised:
        import_weights("w.pkl")
    assert str(raised.value).splitlines() == [
        "cannot load w.pkl of detectron2 as mask_rcnn: 1 missing, 1 unexpected",
        "  1 missing:",
        "    box_head.fcs.1.bias",
        "  1 unexpected:",
        "    roi_heads.mask_rater.fc1.weight",
    ]
    state = zoo_state(golden, "detectron2_retinanet_R_50_FPN_3x")
    state["model.head.cls_subnet.1.weight"] = torch.zeros(256)  # a GroupNorm, which no model of the zoo has
    with pytest.raises(InputError, match=r"cls_subnet.0.weight and head.cls_subnet.1.weight are one tensor"):
        import_weights("w.pkl")
    state = zoo_state(golden, "detectron2_mask_rcnn_vitdet_b_100ep")
    state = {key.replace(".qkv.", ".q_proj."): value for key, value in state.items()}  # no one has this
    with pytest.raises(InputError, match=r"but its backbone is not a ResNet, ResNeXt, Swin or plain ViT"):
        import_weights("w.pkl")
    state = zoo_state(golden, "mmdet3_faster-rcnn_r50_fpn_1x_coco")
    del state["model.neck.fpn_convs.0.conv.weight"]
    with pytest.raises(InputError, match=r"but it has no tensor 'fpn.outputs.0.0.weight'"):
        import_weights("w.pkl")
    state = {"model.stem.conv.weight": torch.zeros(3)}
    with pytest.raises(
        InputError, match=r"w.pkl: no detector of torchvision, EVA-02, PE-Det.*, mmseg.*model.stem"
    ):
        import_weights("w.pkl")


def test_classes(golden: Path, tmp_path: Path, monkeypatch: Any) -> None:
    """Classes are COCO's if the number fits, or given by names, or by a COCO JSON in the order of ids."""
    state = zoo_state(golden, "detectron2_faster_rcnn_R_50_FPN_3x")
    monkeypatch.setattr("giantdet.import_weights.read_tensors", lambda path: state)
    categories = import_weights("w").config.categories
    assert len(categories) == 80 and categories[0] == (1, "person") and categories[-1] == (90, "toothbrush")
    with pytest.raises(InputError, match=r"--classes has 2 classes, the model has 80 \(num_classes\)"):
        import_weights("w", classes="cat, dog")
    with pytest.raises(InputError, match=r"--classes has 1203 classes, the model has 80 \(num_classes\)"):
        import_weights("w", classes="lvis_v1")
    records = [{"id": 1000 - i, "name": f"n{i}", "supercategory": "x"} for i in range(80)]
    (tmp_path / "c.json").write_text(json.dumps({"categories": records}))
    categories = import_weights("w", classes=str(tmp_path / "c.json")).config.categories
    assert categories[0] == (921, "n79") and categories[-1] == (1000, "n0")
    (tmp_path / "c.txt").write_text("\n".join(f"n{i}" for i in range(80)))
    assert import_weights("w", classes=str(tmp_path / "c.txt")).config.categories[1] == (2, "n1")

    state = zoo_state(golden, "mmdet3_panoptic-fpn_r50_fpn_1x_coco")
    config = import_weights("w").config
    assert config.categories[0] == (1, "person") and config.model.merge_rule.score == 0.6
    assert config.semantic_categories[:2] == ((0, "things"), (92, "banner"))
    assert len(config.semantic_categories) == 54
    state = zoo_state(golden, "mmseg1_upernet_r50_4xb4-80k_ade20k-512x512")
    with pytest.raises(InputError, match=r"num_classes 150, which is not COCO's number: name the classes"):
        import_weights("w")
    state = zoo_state(golden, "mmseg1_fpn_r50_4xb2-80k_cityscapes-512x1024")
    assert import_weights("w").config.semantic_categories[-1] == (18, "bicycle")


def test_settings_not_implied_by_names(golden: Path, monkeypatch: Any) -> None:
    """Pixel statistics, strides and channel order of detectron2's zoo, and overrides of them."""
    imagenet = (58.395, 57.12, 57.375)
    for name, std, in_1x1 in (
        ("detectron2_faster_rcnn_R_50_FPN_3x", (1.0, 1.0, 1.0), True),
        ("detectron2_mask_rcnn_X_101_32x8d_FPN_3x", imagenet, False),
        ("detectron2_scratch_mask_rcnn_R_50_FPN_3x_gn", (1.0, 1.0, 1.0), False),
    ):
        state = zoo_state(golden, name)
        monkeypatch.setattr("giantdet.import_weights.read_tensors", {"w": state}.get)
        first = "model.backbone.bottom_up.stem.conv1.weight"
        state[first] = torch.arange(3.0)[:, None, None].expand(state[first].shape)
        imported = import_weights("w")
        backbone = imported.config.model.backbone
        assert (backbone.pixel_std, backbone.stride_in_1x1) == (std, in_1x1)
        assert backbone.pixel_mean == (123.675, 116.28, 103.53)
        assert imported.model.pixel_scale == pytest.approx([1 / s for s in std])
        expected = [-m / s for m, s in zip((123.675, 116.28, 103.53), std, strict=True)]
        assert imported.model.pixel_shift == pytest.approx(expected)
        weight = imported.model.get_parameter("backbone.body.conv1.weight")
        assert weight[0, :, 0, 0].tolist() == [2.0, 1.0, 0.0]
    # Older files contain the statistics, in the order of the channels.
    state = zoo_state(golden, "detectron2_faster_rcnn_R_50_FPN_3x")
    monkeypatch.setattr("giantdet.import_weights.read_tensors", {"w": state}.get)
    for mean, bgr in (((103.0, 116.0, 123.0), True), ((123.0, 116.0, 103.0), False)):
        state["model.pixel_mean"] = torch.tensor(mean)[:, None, None]
        state["model.pixel_std"] = torch.tensor((57.0, 57.0, 58.0) if bgr else (58.0, 57.0, 57.0))
        imported = import_weights("w")
        backbone = imported.config.model.backbone
        assert backbone.pixel_mean == (123, 116, 103) and backbone.pixel_std == (58, 57, 57)
        assert not backbone.stride_in_1x1 and ("turned from blue" in imported.report) == bgr
    first = "model.backbone.bottom_up.stem.conv1.weight"
    state[first] = torch.arange(3.0)[:, None, None].expand(state[first].shape)
    imported = import_weights("w", ["model.backbone.pixel_std=[1,2,3]", "short_side=640"], bgr=False)
    weight = imported.model.get_parameter("backbone.body.conv1.weight")
    assert weight[0, :, 0, 0].tolist() == [0.0, 1.0, 2.0]
    assert imported.config.short_side == 640 and imported.config.model.backbone.pixel_std == (1, 2, 3)
    with pytest.raises(ConfigError, match=r"model.box_head.socre_threshold"):
        import_weights("w", ["model.box_head.socre_threshold=0.3"])
