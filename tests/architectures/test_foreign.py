"""Weights of other projects: the zoos' names and shapes, and exports that answer as the golden models do."""

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
from golden_compare import assert_same_detections
from torch import Tensor

from giantdet import cli
from giantdet.config.conventions import CONVENTIONS
from giantdet.export import load_detector
from giantdet.import_weights import import_weights

NAMES = "a,b,c,d,e"


def padded_stem(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The same function with a stem of 64 channels, as timm's is: 56 more, which are zero."""
    stem = "backbone.bottom_up.stem.conv1"
    padded = dict(state)
    for key in [key for key in state if key.startswith(stem)]:
        padded[key] = torch.cat([state[key], torch.zeros(56, *state[key].shape[1:])])
    for name in ("conv1", "shortcut"):
        key = f"backbone.bottom_up.res2.0.{name}.weight"
        padded[key] = torch.cat([state[key], torch.zeros(len(state[key]), 56, 1, 1)], 1)
    return padded


def zoo_file(path: Path, state: dict[str, Tensor], **others: Any) -> Path:
    """A pickle as detectron2's zoo has them: arrays under "model"."""
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
    arguments = [str(file), str(out), "size=[256,320]", "short_side=224", head, *tests, "--classes", NAMES]
    assert cli.main(["import-weights", *arguments]) == 0
    printed = capsys.readouterr().out
    kind = "cascade_mask_rcnn" if name == "cascade" else "mask_rcnn"
    assert f"detectron2, {kind} on resnet50, 5 classes (a, b, ...)" in printed
    assert f"{len(state)} tensors: {len(state) - 2} taken over, 2 left out" in printed
    assert "pixel_mean 123.675, 116.28, 103.53, pixel_std 1, 1, 1" in printed

    model, config = load_detector(out)
    assert config.categories == ((1, "a"), (2, "b"), (3, "c"), (4, "d"), (5, "e"))
    assert config.model.backbone.stride_in_1x1
    for module in model.modules():
        if hasattr(module, "conventions"):
            module.conventions = dataclasses.replace(CONVENTIONS["detectron2"], anchors_in_padding=True)
    batch = load(golden)
    # The golden models took the stored channels for blue, green, red.
    found = model(batch._replace(images_B3HW=batch.images_B3HW.flip(1)))
    assert_same_detections(found.detections, batch, np.load(golden / f"{name}_A.npz"))


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
}


@pytest.mark.parametrize("name", ZOO)
def test_every_tensor_of_the_zoo_has_its_place(golden: Path, name: str, monkeypatch: Any) -> None:
    """import_weights raises for missing, unknown and misshapen tensors; left out ones are reported."""
    keys = json.loads((golden / f"zoo_keys/{name}.json").read_text())["keys"]
    state = {f"model.{key}": torch.zeros(1).expand(shape) for key, shape in keys.items()}
    monkeypatch.setattr("giantdet.import_weights.read_tensors", lambda path: state)
    imported = import_weights(f"{name}.pkl")
    assert f"{imported.config.model.type} {imported.config.model.backbone.name}" == ZOO[name]
    tables = sum(key.endswith("relative_position_index") for key in keys)
    assert f"{len(keys)} tensors: {len(keys) - tables} taken over, {tables} left out\n" in imported.report
