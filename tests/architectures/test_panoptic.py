"""Panoptic FPN against detectron2's own model: the same weights, answers, losses and gradients."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from golden_semantic import (
    BACKBONE,
    CANVAS,
    fill,
    grad_norms,
    load_batch,
    rcnn_names,
    resnet_names,
    semantic_names,
)
from test_trace import Recorder

from giantdet.architectures import build_model, total_loss
from giantdet.architectures.panoptic_fpn import PanopticFpn
from giantdet.config.architectures.common import NormConfig
from giantdet.config.architectures.panoptic_fpn import PanopticFpnConfig
from giantdet.config.conventions import CONVENTIONS
from giantdet.evaluation.coco import to_original
from giantdet.evaluation.panoptic import DETECTRON2, MergeRule, merge, panoptic_map
from giantdet.evaluation.semantic import semantic_classes
from giantdet.structures import IGNORE, Batch

RAW = {
    "type": "panoptic_fpn",
    "num_classes": 5,
    "num_stuff_classes": 6,
    "backbone": {**BACKBONE, "stride_in_1x1": True},
    "fpn": {"channels": 32},
    # Samples larger than there are candidates: everything is taken.
    "rpn": {
        "batch_per_image": 32768,
        "positive_fraction": 1.0,
        "pre_nms_train": 1000,
        "pre_nms_test": 200,
        "post_nms_train": 300,
        "post_nms_test": 100,
    },
    "box_head": {
        "width": 64,
        "sampling_ratio": 0,
        "batch_per_image": 4096,
        "positive_fraction": 1.0,
        "score_threshold": 0.2,
        "detections": 60,
    },
    "mask_head": {"convs": 2, "width": 32, "sampling_ratio": 0},
    "semantic_head": {"width": 64},
    "instance_loss_weight": 0.8,
}


@pytest.fixture(scope="module")
def golden(shared: Path) -> Path:
    return shared / "golden/models"


def our_name(key: str) -> str:
    return semantic_names(rcnn_names(resnet_names(key)))


@pytest.fixture(scope="module")
def model(golden: Path) -> PanopticFpn:
    built = build_model(PanopticFpnConfig.model_validate(RAW), CANVAS, NormConfig(type="frozen"))
    assert isinstance(built, PanopticFpn)
    fill(built, golden, "panoptic", our_name, caffe=True)
    return built


@pytest.mark.parametrize("empty", [None, 1])
def test_losses_and_gradients(model: PanopticFpn, golden: Path, empty: int | None) -> None:
    expected = json.loads((golden / "panoptic_A.json").read_text())
    whole = expected if empty is None else expected["second_image_without_objects"]
    norms = expected["grad_norms"]["total"] if empty is None else whole["grad_norms_total"]
    model.train().zero_grad()
    batch = load_batch(golden, empty)
    predictions = model(batch)
    counts = {name: float(count) for name, count in model.counts(predictions).items()}
    assert counts["rpn_positive"] == whole["counts"]["rpn/num_pos_anchors"]
    assert counts["roi_positive"] == whole["counts"]["roi_head/num_fg_samples"]
    assert counts["labelled_pixels"] == float((batch.targets.semantic_BHW != IGNORE).sum() / 2)
    losses = model.losses(predictions, batch)
    # detectron2 gives the instance weight to all of these but loss_cls, and divides the RPN's by the size
    # of the sample that was asked for, of which there are fewer anchors.
    asked = 32768 / predictions.objects.rpn.valid_BR.shape[1]
    factors = {"loss_cls": 1 / 0.8, "loss_rpn_cls": 1 / asked, "loss_rpn_loc": 1 / asked}
    losses = {name: loss * factors.get(name, 1.0) for name, loss in losses.items()}
    found = {name: float(loss.detach()) for name, loss in losses.items()}
    assert found == pytest.approx(whole["losses"], rel=1e-4)
    total_loss(losses).backward()  # type: ignore[no-untyped-call]
    box = model.box_head
    assert model.mask_head is not None
    parts: dict[str, torch.nn.Module | list[torch.nn.Module]] = {
        "backbone.bottom_up": model.backbone,
        "backbone.fpn": model.fpn,
        "proposal_generator": model.rpn,
        "roi_heads.box_head": box.fcs,
        "roi_heads.box_predictor": [box.classes, box.deltas],
        "roi_heads.mask_head": model.mask_head,
        "sem_seg_head": model.semantic_head,
    }
    assert grad_norms(parts) == pytest.approx(norms, rel=1e-4)
    if empty is None:
        ours = dict(model.named_parameters())
        each = {key: ours[our_name(key)] for key in expected["grad_norm_per_parameter"]}
        assert len(each) == len(ours)
        per_parameter = {key: float(p.grad.norm()) for key, p in each.items() if p.grad is not None}
        assert per_parameter == pytest.approx(expected["grad_norm_per_parameter"], rel=1e-3)


@torch.no_grad()
def test_answers(model: PanopticFpn, golden: Path) -> None:
    """Detections and their masks at the asked size, and the semantic logits."""
    expected, batch = np.load(golden / "panoptic_A.npz"), load_batch(golden)
    found = model.eval()(batch)
    logits = torch.from_numpy(expected["sem.logits_stride4"])
    torch.testing.assert_close(found.semantic_BCHW, logits, atol=2e-4, rtol=0)
    for i in range(2):
        chosen = found.detections.valid_BD[i]
        scores = found.detections.scores_BD[i][chosen]
        boxes, masks = to_original(found.detections, batch, i)
        assert found.detections.labels_BD[i][chosen].tolist() == expected[f"post.{i}.classes"].tolist()
        torch.testing.assert_close(scores, torch.from_numpy(expected[f"post.{i}.scores"]), atol=2e-4, rtol=0)
        torch.testing.assert_close(boxes, torch.from_numpy(expected[f"post.{i}.boxes"]), atol=1e-2, rtol=0)
        probabilities = found.detections.masks_BDSS[i][chosen]
        theirs = torch.from_numpy(expected[f"det.{i}.mask_probs"]).float()
        torch.testing.assert_close(probabilities, theirs, atol=2e-3, rtol=0)
        assert masks is not None
        difference = masks.sum((1, 2)) - torch.from_numpy(expected[f"post.{i}.mask_areas"])
        assert difference.abs().max() <= 10


def test_nothing_to_learn(model: PanopticFpn, golden: Path) -> None:
    """Without an object and a labelled pixel, every parameter has a finite gradient all the same."""
    batch = without_targets(load_batch(golden))
    model.train().zero_grad()
    losses = model.losses(model(batch), batch)
    assert losses["loss_sem_seg"] == losses["loss_mask"] == losses["loss_box_reg"] == 0
    total_loss(losses).backward()  # type: ignore[no-untyped-call]
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None and parameter.grad.isfinite().all(), name


@torch.no_grad()
def test_semantic_loss_over_all_pixels(model: PanopticFpn, golden: Path) -> None:
    batch = load_batch(golden)
    predictions, share = model.train()(batch), (batch.targets.semantic_BHW != IGNORE).float().mean()
    labelled = model.losses(predictions, batch)["loss_sem_seg"]
    config = PanopticFpnConfig.model_validate({**RAW, "semantic_head": {"width": 64, "loss_divisor": "all"}})
    other = build_model(config, CANVAS, NormConfig(type="frozen"))
    torch.testing.assert_close(other.losses(predictions, batch)["loss_sem_seg"], labelled * share)
    batch = without_targets(batch)
    assert other.losses(model(batch), batch)["loss_sem_seg"] == 0


def without_targets(batch: Batch) -> Batch:
    targets = batch.targets
    nothing = targets._replace(
        valid_BM=torch.zeros_like(targets.valid_BM),
        semantic_BHW=torch.full_like(targets.semantic_BHW, IGNORE),
    )
    return batch._replace(targets=nothing)


def test_a_step_never_asks_the_device(model: PanopticFpn, golden: Path) -> None:
    batch = load_batch(golden)
    with Recorder() as recorder:
        total_loss(model.train().losses(model(batch), batch)).backward()  # type: ignore[no-untyped-call]
        model.eval()(batch)
    assert not recorder.broken


def test_masks_are_needed() -> None:
    config = PanopticFpnConfig.model_validate({**RAW, "mask_head": {"enabled": False}})
    assert "mask_head.enabled" in next(config.problems())
    batch = PanopticFpnConfig.model_validate({**RAW, "semantic_head": {"norm": "batch"}})
    assert batch.batch_norms()["heads"] == (
        "model.box_head or model.mask_head or model.semantic_head",
        True,
    )


@torch.no_grad()
@pytest.mark.parametrize(
    ("name", "rule"), [("panoptic", DETECTRON2), ("panoptic_loose", MergeRule(0.3, 0.3, 500))]
)
def test_panoptic_maps(model: PanopticFpn, golden: Path, name: str, rule: MergeRule) -> None:
    """Objects and stuff merged as in detectron2."""
    expected, batch = np.load(golden / "panoptic_A.npz"), load_batch(golden)
    found = model.eval()(batch)
    for i in range(2):
        chosen = found.detections.valid_BD[i]
        masks = to_original(found.detections, batch, i)[1]
        assert masks is not None
        scores, labels = found.detections.scores_BD[i][chosen], found.detections.labels_BD[i][chosen]
        semantic = semantic_classes(found.semantic_BCHW, batch, i)
        merged = merge(masks.numpy(), scores.numpy(), labels.numpy(), semantic.numpy(), 5, rule)
        ids, segments = merged.panoptic
        assert (ids != expected[f"{name}.{i}.ids"]).mean() < 2e-4
        rows = zip(segments, merged.rows, strict=True)
        table = [(s.id, int(s.category < 5), s.category, row) for s, row in rows]
        wanted = expected[f"{name}.{i}.segments"]
        # Stuff is numbered after the objects' classes here, and from 1 there.
        assert table == [(n, thing, c if thing else c + 4, row) for n, thing, c, row, _ in wanted.tolist()]
        for number, thing, *_, area in wanted.tolist():
            assert thing or abs((ids == number).sum() - area) <= 5
        whole = panoptic_map(found, batch, i, 5, 11, CONVENTIONS["detectron2"], rule)
        assert whole.segments == segments and (whole.ids_HW == ids).all()
