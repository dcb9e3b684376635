"""RetinaNet, Mask R-CNN and Cascade Mask R-CNN against mmdetection's own models with the same weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from golden import BACKBONE, BOX_HEAD, RPN, load, with_frozen_statistics
from golden_compare import assert_same_features
from golden_mm import arrays_of, build, check_detections, check_proposals, check_step

RCNN: dict[str, Any] = {
    "num_classes": 5,
    "fpn": {"channels": 32},
    "rpn": RPN,
    "box_head": BOX_HEAD,
    "mask_head": {"convs": 2, "width": 32, "sampling_ratio": 0, "slots": 400},
}
RETINANET = {
    "type": "retinanet",
    "num_classes": 5,
    "backbone": BACKBONE,
    "fpn": {"channels": 32},
    "head": {"convs": 2, "detections": 60},
}
SWIN = {
    "name": "swin_tiny_patch4_window7_224",
    "timm_args": {"embed_dim": 32, "depths": [2, 2, 2, 2], "num_heads": [1, 2, 4, 8]},
}
CASCADE_BOX_HEAD = {**BOX_HEAD, "smooth_l1_beta": 1.0}
CASCADE_RPN = {**RPN, "smooth_l1_beta": 1 / 9, "allowed_border": 0}


def test_retinanet(golden: Path) -> None:
    name = "mmdet_retinanet"
    model, batch, arrays = build(golden, name, RETINANET), load(golden), arrays_of(golden, name)
    with torch.no_grad():
        maps = model.eval().backbone(model.normalise(batch.images_B3HW, batch.sizes_B2))
        assert_same_features(maps, arrays, [f"backbone.{i}" for i in range(4)])
        assert_same_features(model.fpn(maps), arrays, [f"neck.{i}" for i in range(5)])
        found = model(batch).detections
    check_detections(found, batch, arrays)
    model = with_frozen_statistics(model)
    losses = model.losses(model(batch), batch)
    names = {"loss_cls": "loss_cls", "loss_bbox": "loss_box_reg"}
    check_step(golden, name, model, losses, names)


def test_mask_rcnn_on_swin(golden: Path) -> None:
    name = "mmdet_mask_rcnn_swin"
    box_head = {**BOX_HEAD, "best_takes_object": True}
    model = build(golden, name, {**RCNN, "type": "mask_rcnn", "backbone": SWIN, "box_head": box_head})
    batch, arrays = load(golden), arrays_of(golden, name)
    with torch.no_grad():
        maps = model.eval().backbone(model.normalise(batch.images_B3HW, batch.sizes_B2))
        assert_same_features(maps, arrays, [f"backbone.{i}" for i in range(4)])
    check_proposals(model, batch, arrays)
    with torch.no_grad():
        check_detections(model.eval()(batch).detections, batch, arrays)
    model = with_frozen_statistics(model)
    losses = model.losses(model(batch), batch)
    names = {
        "loss_rpn_cls": "loss_rpn_cls",
        "loss_rpn_bbox": "loss_rpn_loc",
        "loss_cls": "loss_cls",
        "loss_bbox": "loss_box_reg",
        "loss_mask": "loss_mask",
    }
    check_step(golden, name, model, losses, names)


def test_cascade(golden: Path) -> None:
    name = "mmdet_cascade_mask_rcnn"
    raw = {**RCNN, "type": "cascade_mask_rcnn", "backbone": BACKBONE, "rpn": CASCADE_RPN}
    model = build(golden, name, {**raw, "box_head": CASCADE_BOX_HEAD})
    batch, arrays = load(golden), arrays_of(golden, name)
    check_proposals(model, batch, arrays)
    with torch.no_grad():
        check_detections(model.eval()(batch).detections, batch, arrays)
    model = with_frozen_statistics(model)
    losses = model.losses(model(batch), batch)
    names = {"loss_rpn_cls": "loss_rpn_cls", "loss_rpn_bbox": "loss_rpn_loc"}
    for stage in range(3):
        for theirs, ours in (
            ("loss_cls", "loss_cls"),
            ("loss_bbox", "loss_box_reg"),
            ("loss_mask", "loss_mask"),
        ):
            names[f"s{stage}.{theirs}"] = f"{ours}_stage{stage}"
    check_step(golden, name, model, losses, names)
