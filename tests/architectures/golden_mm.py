"""Golden models of mmdetection: their weights in our names, and comparisons with what they gave.

Losses and norms of gradients agree to a relative 1e-4. What a change of 1e-6 on every weight moves is in
`mmdet_*_A_noise.json`: losses by up to 3e-5, and the area of a mask by up to 2 pixels.
"""

from __future__ import annotations

import dataclasses
import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from golden import CANVAS, load_weights, narrow_stem
from golden_compare import norm, same_boxes
from pasting import paste_masks
from torch import Tensor
from torch.nn.modules.batchnorm import _BatchNorm

from giantdet.architectures import Architecture, build_model
from giantdet.config.architectures import SECTIONS
from giantdet.config.architectures.common import NormConfig
from giantdet.config.conventions import CONVENTIONS
from giantdet.structures import Batch, Detections

TOLERANCE = 1e-4

_NAMES = (
    (r"^backbone\.patch_embed\.projection", "backbone.body.patch_embed.proj"),
    (r"^backbone\.norm(\d)\.", r"backbone.norms.\1."),
    (r"\.attn\.w_msa\.", ".attn."),
    (r"\.ffn\.layers\.0\.0\.", ".mlp.fc1."),
    (r"\.ffn\.layers\.1\.", ".mlp.fc2."),
    (r"^neck\.lateral_convs\.(\d)\.conv", r"fpn.laterals.\1.0"),
    (r"^bbox_head\.cls_convs\.(\d)\.conv", r"head.class_convs.\1.0"),
    (r"^bbox_head\.reg_convs\.(\d)\.conv", r"head.box_convs.\1.0"),
    (r"^bbox_head\.retina_cls", "head.classes"),
    (r"^bbox_head\.retina_reg", "head.deltas"),
    (r"^rpn_head\.rpn_conv", "rpn.head.conv"),
    (r"^rpn_head\.rpn_cls", "rpn.head.objectness"),
    (r"^rpn_head\.rpn_reg", "rpn.head.deltas"),
    (r"^roi_head\.bbox_head\.(\d\.)?fc_cls", r"box_head.\1classes"),
    (r"^roi_head\.bbox_head\.(\d\.)?fc_reg", r"box_head.\1deltas"),
    (r"^roi_head\.bbox_head\.(\d\.)?shared_fcs", r"box_head.\1fcs"),
    (r"^roi_head\.mask_head\.(\d\.)?convs\.(\d)\.conv", r"mask_head.\1convs.\2.0"),
    (r"^roi_head\.mask_head\.(\d\.)?upsample", r"mask_head.\1upsample"),
    (r"^roi_head\.mask_head\.(\d\.)?conv_logits", r"mask_head.\1masks"),
)


def our_name(key: str, levels: int = 4) -> str:
    """Return our name of a parameter of mmdetection; convolutions of `neck` from `levels` on make P6, P7."""
    for pattern, name in _NAMES:
        key = re.sub(pattern, name, key)

    def of_neck(found: re.Match[str]) -> str:
        number = int(found[1])
        return f"fpn.outputs.{number}.0" if number < levels else f"fpn.top.p{6 + number - levels}"

    key = re.sub(r"^neck\.fpn_convs\.(\d)\.conv", of_neck, key)
    # timm merges patches at the beginning of a stage, mmdetection at the end of the one before.
    key = re.sub(
        r"^backbone\.stages\.(\d)\.downsample",
        lambda found: f"backbone.body.layers.{int(found[1]) + 1}.downsample",
        key,
    )
    key = re.sub(r"^backbone\.stages\.(\d)", r"backbone.body.layers.\1", key)
    return re.sub(r"^backbone\.(?!body|norms)", "backbone.body.", key)


def our_value(key: str, value: Tensor) -> Tensor:
    """Return a weight in our order: of merged patches, mmdetection has channels first, timm pixels."""
    if ".downsample." not in key or not key.startswith("backbone.stages"):
        return value
    *rows, columns = value.shape
    return value.view(*rows, columns // 4, 2, 2).transpose(-3, -1).reshape(*rows, columns)


def build(golden: Path, name: str, raw: dict[str, Any], levels: int = 4) -> Architecture:
    """Return this section's model with the weights of the golden model `name`; anchors cover the padding."""
    model = build_model(
        SECTIONS[raw["type"]].model_validate({**raw, "conventions": "mmdetection"}),
        CANVAS,
        NormConfig(type="local"),
    )
    if raw["backbone"]["name"] == "resnet50":
        narrow_stem(model.backbone.body)
    weights = load_weights(golden, f"mm/{name}").items()
    state = {our_name(key, levels): our_value(key, value) for key, value in weights}
    missing, unexpected = model.load_state_dict(state, strict=False)
    assert not unexpected, unexpected
    assert all(key.endswith(("num_batches_tracked", "head.normalizer")) for key in missing), missing
    for module in model.modules():
        if hasattr(module, "conventions"):
            module.conventions = dataclasses.replace(CONVENTIONS["mmdetection"], anchors_in_padding=True)
    return model


def train(model: Architecture) -> Any:
    """Return the model in training mode, its BatchNorms with their running statistics (`norm_eval`)."""
    for module in model.train().modules():
        if isinstance(module, _BatchNorm):
            module.eval()
    return model


def check_step(
    golden: Path,
    name: str,
    model: Architecture,
    losses: dict[str, Tensor],
    names: dict[str, str],
    levels: int = 4,
) -> None:
    """Assert equal losses, {theirs: ours} in `names`, gradient norms by module for each, and by parameter."""
    expected = json.loads((golden / f"mm/{name}_A.json").read_text())
    found = {theirs: float(losses[ours].detach()) for theirs, ours in names.items()}
    assert found == pytest.approx(expected["losses"], rel=TOLERANCE) and len(found) == len(losses)
    parts = {
        "backbone": "backbone",
        "neck": "fpn",
        "bbox_head": "head",
        "rpn_head": "rpn",
        "roi_head.bbox_head": "box_head",
        "roi_head.mask_head": "mask_head",
    }
    whole = {**{theirs: losses[ours] for theirs, ours in names.items()}, "total": sum(losses.values())}
    for theirs, loss in whole.items():
        model.zero_grad()
        loss.backward(retain_graph=True)
        norms = {
            part: norm(p.grad for p in model.get_submodule(parts[part]).parameters())
            for part in expected["grad_norms"][theirs]
        }
        assert norms == pytest.approx(expected["grad_norms"][theirs], rel=TOLERANCE), theirs
    parameters = dict(model.named_parameters())
    each = {
        key: norm([parameters.pop(our_name(key, levels)).grad]) for key in expected["grad_norm_per_parameter"]
    }
    assert (
        each == pytest.approx(expected["grad_norm_per_parameter"], rel=TOLERANCE, abs=1e-8) and not parameters
    )


def check_detections(found: Detections, batch: Batch, arrays: Any) -> None:
    """Assert equal sets of boxes with classes, scores, and areas of masks at the images' own sizes."""
    for i in range(2):
        valid_D = found.valid_BD[i]
        boxes_D4, labels_D = found.boxes_BD4[i][valid_D], found.labels_BD[i][valid_D]
        theirs = {key: torch.from_numpy(arrays[f"det.{i}.{key}"]) for key in ("boxes", "scores", "classes")}
        index_D = same_boxes(
            boxes_D4.double() + 1e5 * labels_D[:, None],
            theirs["boxes"].double() + 1e5 * theirs["classes"][:, None],
        )
        torch.testing.assert_close(found.scores_BD[i][valid_D][index_D], theirs["scores"], atol=1e-4, rtol=0)
        if found.masks_BDSS is not None:
            height, width = (int(side) for side in batch.sizes_B2[i])
            masks_DSS = found.masks_BDSS[i][valid_D][index_D]
            pasted = paste_masks(masks_DSS, boxes_D4[index_D], height, width)
            areas = pasted.sum((1, 2)) - torch.from_numpy(arrays[f"det.{i}.mask_areas"])
            assert areas.abs().max() <= 2, areas


def check_proposals(model: Any, batch: Batch, arrays: Any) -> None:
    """Assert equal sets of proposals in evaluation, with their scores."""
    with torch.no_grad():
        proposals, _ = model.eval().rpn(model.pyramid(batch), batch.sizes_B2, None, batch.seeds_B)
    for i in range(2):
        index_N = same_boxes(proposals.boxes_BN4[i], torch.from_numpy(arrays[f"proposals.{i}.boxes"]))
        theirs_N = torch.from_numpy(arrays[f"proposals.{i}.scores"])
        ours_N = proposals.scores_BN[i][index_N].sigmoid()
        torch.testing.assert_close(ours_N, theirs_N, atol=1e-4, rtol=0)


def arrays_of(golden: Path, name: str) -> Any:
    """Return the arrays of the golden model."""
    return np.load(golden / f"mm/{name}_A.npz")
