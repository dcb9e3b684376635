"""Golden models of mmdetection: their weights under our names, and comparisons with their outputs.

Losses and norms of gradients agree to a relative 1e-4. `mmdet_*_A_noise.json` has the effect of a change of
1e-6 on every weight: losses change by up to 3e-5, and the area of a mask by up to 2 pixels.
"""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from golden import CANVAS, load_weights, narrow_stem
from golden_compare import norm, same_boxes
from pasting import paste_masks
from torch import Tensor

from giantdet.architectures import Architecture, build_model
from giantdet.architectures.foreign.mmdetection import MMDETECTION
from giantdet.config.architectures import SECTIONS
from giantdet.config.architectures.common import NormConfig
from giantdet.config.conventions import CONVENTIONS
from giantdet.structures import Batch, Detections

TOLERANCE = 1e-4


def build(golden: Path, name: str, raw: dict[str, Any]) -> Architecture:
    """Return this section's model with the weights of the golden model `name`; anchors cover the padding."""
    model = build_model(
        SECTIONS[raw["type"]].model_validate({**raw, "conventions": "mmdetection"}),
        CANVAS,
        NormConfig(type="local"),
    )
    if raw["backbone"]["name"] == "resnet50":
        narrow_stem(model.backbone.body)
    state = MMDETECTION.convert(load_weights(golden, f"mm/{name}")).state
    missing, unexpected = model.load_state_dict(state, strict=False)
    assert not unexpected, unexpected
    assert all(key.endswith(("num_batches_tracked", "head.normalizer")) for key in missing), missing
    for module in model.modules():
        if hasattr(module, "conventions"):
            module.conventions = dataclasses.replace(CONVENTIONS["mmdetection"], anchors_in_padding=True)
    return model


def check_step(
    golden: Path,
    name: str,
    model: Architecture,
    losses: dict[str, Tensor],
    names: dict[str, str],
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
    our_names = MMDETECTION.names(expected["grad_norm_per_parameter"])
    each = {key: norm([parameters.pop(ours).grad]) for key, ours in our_names.items()}
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
