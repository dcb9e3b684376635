"""Graphs of models, by torch.export and in onnxruntime, against the models themselves."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from tiny import MODELS

from giantdet import cli
from giantdet.architectures import Architecture, build_model
from giantdet.config.architectures import SECTIONS
from giantdet.config.architectures.common import NormConfig
from giantdet.config.types import DataConfig
from giantdet.data.views import image_batch
from giantdet.export import ExportConfig, export_model
from giantdet.graph import exported, save_onnx
from giantdet.ops.nms import nms_mask
from giantdet.ops.roi_align import pooling_by_level
from giantdet.structures import joined

IMAGES = np.random.default_rng(1).integers(0, 256, (2, 48, 64, 3), dtype=np.uint8)


def run_onnx(file: Path, *inputs: torch.Tensor) -> list[np.ndarray]:
    session = onnxruntime.InferenceSession(file, providers=["CPUExecutionProvider"])
    names = [place.name for place in session.get_inputs()]
    return session.run(None, {n: t.numpy() for n, t in zip(names, inputs, strict=True)})


def section_of(kind: str, **changes: Any) -> Any:
    section = SECTIONS[kind].model_validate(MODELS[kind] | changes)
    return section.model_copy(update=dict.fromkeys(section.class_keys, 4))


def model_of(section: Any) -> Architecture:
    torch.manual_seed(0)
    return build_model(section, (64, 64), NormConfig(type="local")).eval()


@pytest.mark.parametrize("kind", MODELS)
def test_graphs_of_all_architectures(kind: str, tmp_path: Path) -> None:
    """Of two images; a Mask R-CNN in ONNX is a part of a Panoptic FPN."""
    model = model_of(section_of(kind))
    data = DataConfig(size=(64, 64), short_side=48)
    batch = joined([image_batch(image, data) for image in IMAGES])
    inputs = batch.images_B3HW, batch.sizes_B2
    with torch.no_grad():
        outputs = model(batch)
    expected: dict[str, Any] = {}
    if outputs.detections is not None:
        boxes, scores, labels, valid, masks = outputs.detections
        assert valid.any()
        expected = {"boxes": boxes, "scores": scores * valid, "labels": labels}
        expected |= {} if masks is None else {"masks": masks}
    if outputs.semantic_BCHW is not None:
        expected["semantic"] = outputs.semantic_BCHW
    with pooling_by_level():
        program = exported(model, (64, 64), batch_size=2)
    found = program.module()(*inputs)
    assert list(found) == list(expected)
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, atol=1e-5, rtol=1e-4)
    if kind == "mask_rcnn":
        return
    save_onnx(program, tmp_path / "model.onnx", {})
    assert [place.name for place in onnx.load(tmp_path / "model.onnx").graph.output] == list(expected)
    in_onnx = run_onnx(tmp_path / "model.onnx", *inputs)
    for (name, value), array in zip(expected.items(), in_onnx, strict=True):
        tolerance = 1e-3 if name in ("boxes", "semantic") else 1e-5
        assert np.abs(array.astype(float) - value.double().numpy()).max() < tolerance, name


def test_nms_in_onnx(tmp_path: Path) -> None:
    """Crowded groups, boxes that are equal, groups without a valid box."""

    class Nms(torch.nn.Module):
        def forward(self, boxes: torch.Tensor, scores: torch.Tensor, valid: torch.Tensor) -> Any:
            return {"keep": nms_mask(boxes, scores, valid, 0.5)}

    generator = torch.Generator().manual_seed(0)
    corners = torch.rand(6, 300, 2, generator=generator) * 40
    boxes = torch.cat([corners, corners + 5 + 20 * torch.rand(6, 300, 2, generator=generator)], -1)
    scores = torch.rand(6, 300, generator=generator).round(decimals=2) - 0.5  # logits, many are equal
    boxes[1, :100] = boxes[1, 100:200]
    valid = torch.rand(6, 300, generator=generator) > 0.3
    valid[2] = False
    program = torch.export.export(Nms(), (boxes, scores, valid))
    save_onnx(program, tmp_path / "nms.onnx", {})
    (keep,) = run_onnx(tmp_path / "nms.onnx", boxes, scores, valid)
    expected = nms_mask(boxes, scores, valid, 0.5)
    assert 0 < expected.sum() < valid.sum()
    assert (keep == expected.numpy()).all()


def test_the_command_writes_both_kinds(tmp_path: Path, capsys: Any) -> None:
    """A Swin, whose fused attention ONNX does not have."""
    small = {"depths": [1, 1, 1, 1], "embed_dim": 24}
    section = section_of(
        "semantic_fpn", backbone={"name": "swin_tiny_patch4_window7_224", "timm_args": small}
    )
    model = model_of(section)
    names = ("sky", "road", "car", "tree")
    config = ExportConfig(
        model=section,
        norm=NormConfig(type="local"),
        size=(64, 64),
        short_side=48,
        categories=(),
        semantic_categories=tuple(enumerate(names)),
    )
    export_model(model, tmp_path / "export", config)
    batch = image_batch(IMAGES[0], config.data_config())
    inputs = batch.images_B3HW, batch.sizes_B2
    expected = model(batch).semantic_BCHW
    assert cli.main(["export-graph", str(tmp_path / "export"), str(tmp_path / "a/model.pt2")]) == 0
    found = torch.export.load(tmp_path / "a/model.pt2").module()(*inputs)
    assert list(found) == ["semantic"] and torch.equal(found["semantic"], expected)
    assert cli.main(["export-graph", str(tmp_path / "export"), str(tmp_path / "model.onnx")]) == 0
    assert capsys.readouterr().out.split() == [str(tmp_path / "a/model.pt2"), str(tmp_path / "model.onnx")]
    (in_onnx,) = run_onnx(tmp_path / "model.onnx", *inputs)
    assert np.abs(in_onnx - expected.detach().numpy()).max() < 1e-3
    metadata = {entry.key: entry.value for entry in onnx.load(tmp_path / "model.onnx").metadata_props}
    assert json.loads(metadata["giantdet"])["semantic_categories"][1] == [1, "road"]
    assert cli.main(["export-graph", str(tmp_path / "export"), str(tmp_path / "model.trt")]) == 2
    assert "ends with .onnx or .pt2" in capsys.readouterr().err
