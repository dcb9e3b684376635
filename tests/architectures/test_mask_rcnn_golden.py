"""Mask R-CNN against detectron2's own models: the same weights, the same outputs, losses and gradients."""

from __future__ import annotations

import copy
from pathlib import Path
from types import MethodType
from typing import Any, Literal, NamedTuple

import numpy as np
import pytest
import torch
from golden import BACKBONE, BOX_HEAD, CANVAS, RCNN, RPN, build, golden_step, in_double, load
from golden_compare import (
    as_golden,
    assert_same_detections,
    assert_same_features,
    assert_same_proposals,
    assert_same_step,
    same_boxes,
)
from torch import Tensor

from giantdet.architectures.foreign.detectron2 import DETECTRON2
from giantdet.architectures.mask_rcnn import MaskRcnn
from giantdet.layers.roi_pool import RoiMaps
from giantdet.structures import Batch


class Case(NamedTuple):
    """A golden model: its section, its canvas and the tolerances of its gradient norms."""

    section: dict[str, Any]
    canvas: tuple[int, int] = CANVAS
    norm: Literal["frozen", "local"] = "frozen"
    rel: float = 1e-4
    parameter_rel: float = 1e-4


CASES = {
    "mask_rcnn": Case({**RCNN, "box_head": BOX_HEAD}),
    # Trainable batch norms in the backbone, group norms in pyramid and heads.
    "mask_rcnn_bn_gn": Case(
        {
            **RCNN,
            "backbone": BACKBONE,
            "fpn": {"channels": 64, "norm": "group"},
            "box_head": {**BOX_HEAD, "convs": 2, "fcs": 1, "norm": "group"},
            "mask_head": {**RCNN["mask_head"], "width": 64, "norm": "group"},
        },
        norm="local",
        # detectron2's own float32 rounds the backbone's norms by up to 2.03e-3, single parameters' by 3.8e-3.
        rel=2.2e-3,
        parameter_rel=5e-3,
    ),
    "vitdet": Case(
        {
            **RCNN,
            "backbone": {
                "name": "vit_tiny_patch16_224",
                "timm_args": {"embed_dim": 64, "depth": 4, "num_heads": 4, "final_norm": False},
                "window": 6,
                "global_blocks": 2,
                "position_grid": [14, 14],
                "relative_positions": True,
                "attend_padding": True,
            },
            "fpn": {"channels": 32, "norm": "layer"},
            "rpn": {**RPN, "convs": 2},
            "box_head": {**BOX_HEAD, "convs": 4, "fcs": 1, "norm": "layer", "score_threshold": 0.15},
            "mask_head": {**RCNN["mask_head"], "norm": "layer"},
        },
        canvas=(320, 320),
    ),
}


class Setting(NamedTuple):
    """A rebuilt golden model, with its batch and detectron2's results."""

    name: str
    case: Case
    model: MaskRcnn
    batch: Batch
    arrays: Any


@pytest.fixture(scope="module", params=CASES)
def built(request: pytest.FixtureRequest, golden: Path) -> Setting:
    name, case = request.param, CASES[request.param]
    model = build(golden, name, {"type": "mask_rcnn", **case.section}, canvas=case.canvas, norm=case.norm)
    assert isinstance(model, MaskRcnn)
    if case.norm == "local":
        use_contiguous_images(model)
    batch = load(golden, canvas=case.canvas)
    return Setting(name, case, model, batch, np.load(golden / f"{name}_A.npz"))


def use_contiguous_images(model: MaskRcnn) -> None:
    """Disable the channels-last layout: on the CPU, PyTorch's batch norm sums it less precisely.

    Its statistics of 40,960 values then have errors of 2e-6 instead of 1e-8, which change the logits of the
    RPN by 8e-4.
    """

    def normalise(self: MaskRcnn, images_B3HW: Tensor, sizes_B2: Tensor) -> Tensor:
        return MaskRcnn.normalise(self, images_B3HW, sizes_B2).contiguous()

    model.normalise = MethodType(normalise, model)  # type: ignore[method-assign]


@pytest.fixture
def setting(built: Setting) -> Setting:
    """A copy, because training changes running statistics."""
    return built._replace(model=copy.deepcopy(built.model))


@torch.no_grad()
def test_features(setting: Setting) -> None:
    """Compare the maps of the backbone and the pyramid, and the RPN's outputs for every anchor."""
    model, batch = setting.model.eval(), setting.batch
    maps = model.backbone(model.normalise(batch.images_B3HW, batch.sizes_B2))
    names = ("last_feat",) if model.backbone.is_plain else ("res2", "res3", "res4", "res5")
    assert_same_features(maps, setting.arrays, [f"bottom_up.{name}" for name in names])
    levels = model.fpn(maps)
    assert_same_features(levels, setting.arrays, [f"fpn.p{level}" for level in range(2, 7)])
    for number, level in enumerate(levels, start=2):
        shape = (2, *level.shape[2:], -1)
        for ours, name in zip(model.rpn.head(level), ("logits", "deltas"), strict=True):
            theirs = torch.from_numpy(setting.arrays[f"rpn.p{number}.{name}"])
            # Of wide maps only the deltas of the second anchor are stored.
            first = 4 if name == "deltas" and theirs.shape[1] == 4 else 0
            channels = ours.reshape(shape).permute(0, 3, 1, 2)[:, first : first + theirs.shape[1]]
            torch.testing.assert_close(channels, theirs, atol=1e-4, rtol=1e-4)


def test_proposals(setting: Setting) -> None:
    assert_same_proposals(setting.model, setting.batch, setting.arrays)


@torch.no_grad()
def test_box_head(setting: Setting) -> None:
    model, batch, arrays = setting.model.eval(), setting.batch, setting.arrays
    levels = model.pyramid(batch)
    proposals, _ = model.rpn(levels, batch.sizes_B2, None, batch.seeds_B)
    logits, deltas = model.box_head(model.pool(RoiMaps(levels), proposals.boxes_BN4, 7, 0))
    for i in range(2):
        index_N = same_boxes(proposals.boxes_BN4[i], torch.from_numpy(arrays[f"proposals.{i}.boxes"]))
        for ours, name in ((logits, "logits"), (deltas.flatten(1), "deltas")):
            theirs = torch.from_numpy(arrays[f"roi.{i}.{name}"])
            torch.testing.assert_close(ours.view(2, 100, -1)[i][index_N], theirs, atol=1e-4, rtol=1e-4)


@torch.no_grad()
def test_detections_and_masks(setting: Setting) -> None:
    found = setting.model.eval()(setting.batch).detections
    assert_same_detections(found, setting.batch, setting.arrays)


def trained(setting: Setting, batch: Batch, counts_expected: dict[str, float]) -> dict[str, Tensor]:
    """Return the losses of the first step in detectron2's units, after comparing the sample counts."""
    model = setting.model.train()
    predictions = model(batch)
    counts = {name: float(count) for name, count in model.counts(predictions).items()}
    assert counts["rpn_positive"] == counts_expected["rpn/num_pos_anchors"]
    assert counts["roi_positive"] == counts_expected["roi_head/num_fg_samples"]
    assert counts["mask_slots_used"] == counts["roi_positive"]
    return as_golden(model.losses(predictions, batch), predictions.rpn.valid_BR.shape[1])


@pytest.mark.parametrize("empty", [(), (1,)])
def test_losses_and_gradients(setting: Setting, golden: Path, empty: tuple[int, ...]) -> None:
    expected = golden_step(golden, setting.name, empty)
    setting = setting._replace(model=in_double(setting.model))
    losses = trained(setting, load(golden, *empty, canvas=setting.case.canvas), expected.counts)
    assert_same_step(setting.model, losses, expected, setting.case.rel, setting.case.parameter_rel)
    if "running_stats_after_sum" in expected.whole:
        state = setting.model.state_dict()
        wanted = expected.whole["running_stats_after_sum"]
        names = DETECTRON2.names(wanted)
        sums = {key: float(state[names[key]].double().sum()) for key in wanted}
        assert sums == pytest.approx(wanted, rel=1e-4, abs=1e-5) and len(sums) == 2 * 53
