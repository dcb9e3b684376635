"""Panoptic FPN against detectron2's own model: the same weights, outputs, losses and gradients."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from golden import BOX_HEAD, CANVAS, RCNN, build, golden_step, in_double, load
from golden_compare import as_golden, assert_same_step
from test_trace import Recorder

from giantdet.architectures import build_model, total_loss
from giantdet.architectures.panoptic_fpn import PanopticFpn
from giantdet.config.architectures.common import NormConfig
from giantdet.config.architectures.panoptic_fpn import PanopticFpnConfig, PanopticMergeConfig
from giantdet.config.conventions import CONVENTIONS
from giantdet.evaluation.coco import to_original
from giantdet.evaluation.panoptic import DETECTRON2, merge, panoptic_map
from giantdet.evaluation.rle import decode_mask
from giantdet.evaluation.semantic import whole_image_classes
from giantdet.ops import shapes
from giantdet.structures import IGNORE, Batch

RAW = {
    **RCNN,
    "type": "panoptic_fpn",
    "num_stuff_classes": 6,
    "box_head": BOX_HEAD,
    "semantic_head": {"width": 64},
    "instance_loss_weight": 0.8,
}


LOOSE = PanopticMergeConfig(score=0.3, overlap=0.3, stuff_area=500)


@pytest.fixture(scope="module")
def model(golden: Path) -> PanopticFpn:
    built = build(golden, "panoptic", RAW)
    assert isinstance(built, PanopticFpn)
    return built


@pytest.mark.parametrize("empty", [(), (1,)])
def test_losses_and_gradients(model: PanopticFpn, golden: Path, empty: tuple[int, ...]) -> None:
    expected = golden_step(golden, "panoptic", empty)
    batch = load(golden, *empty)
    model = in_double(model).train()
    predictions = model(batch)
    counts = {name: float(count) for name, count in model.counts(predictions).items()}
    assert counts["rpn_positive"] == expected.counts["rpn/num_pos_anchors"]
    assert counts["roi_positive"] == expected.counts["roi_head/num_fg_samples"]
    assert counts["labelled_pixels"] == float((batch.targets.semantic_BHW != IGNORE).sum() / 2)
    losses = as_golden(model.losses(predictions, batch), predictions.objects.rpn.valid_BR.shape[1])
    # detectron2 applies the instance weight to all losses of the heads except loss_cls.
    losses["loss_cls"] = losses["loss_cls"] / 0.8
    assert_same_step(model, losses, expected)


@torch.no_grad()
def test_outputs(model: PanopticFpn, golden: Path) -> None:
    """Compare detections, their masks at the requested size, and the semantic logits."""
    expected, batch = np.load(golden / "panoptic_A.npz"), load(golden)
    found = model.eval()(batch)
    logits = torch.from_numpy(expected["sem.logits_stride4"])
    torch.testing.assert_close(found.semantic_BCHW, logits, atol=2e-4, rtol=0)
    for i in range(2):
        chosen = found.detections.valid_BD[i]
        scores = found.detections.scores_BD[i][chosen]
        boxes, rles = to_original(found.detections, batch, i)
        assert found.detections.labels_BD[i][chosen].tolist() == expected[f"post.{i}.classes"].tolist()
        torch.testing.assert_close(scores, torch.from_numpy(expected[f"post.{i}.scores"]), atol=2e-4, rtol=0)
        torch.testing.assert_close(boxes, torch.from_numpy(expected[f"post.{i}.boxes"]), atol=1e-2, rtol=0)
        probabilities = found.detections.masks_BDSS[i][chosen]
        theirs = torch.from_numpy(expected[f"det.{i}.mask_probs"]).float()
        torch.testing.assert_close(probabilities, theirs, atol=2e-3, rtol=0)
        assert rles is not None
        areas = torch.tensor([decode_mask(rle).sum() for rle in rles])
        difference = areas - torch.from_numpy(expected[f"post.{i}.mask_areas"])
        assert difference.abs().max() <= 10


def test_no_targets(model: PanopticFpn, golden: Path) -> None:
    """Every parameter has a finite gradient even without an object and a labelled pixel."""
    batch = without_targets(load(golden))
    model.train().zero_grad()
    losses = model.losses(model(batch), batch)
    assert losses["loss_sem_seg"] == losses["loss_mask"] == losses["loss_box_reg"] == 0
    total_loss(losses).backward()  # type: ignore[no-untyped-call]
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None and parameter.grad.isfinite().all(), name


@torch.no_grad()
def test_semantic_loss_over_all_pixels(model: PanopticFpn, golden: Path) -> None:
    batch = load(golden)
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


def test_a_step_never_synchronises_with_the_device(
    model: PanopticFpn, golden: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shapes, "ENABLED", False)  # as on a GPU
    batch = load(golden)
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
    ("name", "rule"),
    [
        ("panoptic", DETECTRON2),
        ("panoptic_loose", LOOSE),
    ],
)
def test_panoptic_maps(model: PanopticFpn, golden: Path, name: str, rule: PanopticMergeConfig) -> None:
    """Objects and stuff are merged as in detectron2."""
    expected, batch = np.load(golden / "panoptic_A.npz"), load(golden)
    found = model.eval()(batch)
    for i in range(2):
        chosen = found.detections.valid_BD[i]
        rles = to_original(found.detections, batch, i)[1]
        assert rles is not None
        masks = torch.stack([decode_mask(rle) for rle in rles])
        scores, labels = found.detections.scores_BD[i][chosen], found.detections.labels_BD[i][chosen]
        semantic = whole_image_classes(found.semantic_BCHW, batch, i)
        merged = merge(masks.numpy(), scores.numpy(), labels.numpy(), semantic.numpy(), 5, rule)
        ids, segments = merged.panoptic
        assert (ids != expected[f"{name}.{i}.ids"]).mean() < 2e-4
        rows = zip(segments, merged.rows, strict=True)
        table = [(s.id, int(s.category < 5), s.category, row) for s, row in rows]
        wanted = expected[f"{name}.{i}.segments"]
        # Stuff is numbered after the object classes here, and from 1 in detectron2.
        assert table == [(n, thing, c if thing else c + 4, row) for n, thing, c, row, _ in wanted.tolist()]
        for number, thing, *_, area in wanted.tolist():
            assert thing or abs((ids == number).sum() - area) <= 5
        whole = panoptic_map(found, batch, i, 5, 11, CONVENTIONS["detectron2"], rule)
        assert whole.segments == segments and (whole.ids_HW == ids).all()
