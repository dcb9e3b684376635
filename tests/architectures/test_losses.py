"""Losses against sums over the ragged selection, written as loops, and against detectron2's golden values."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import torchvision
from torch import Tensor

from giantdet.architectures.mask_rcnn import Predictions, mask_rcnn_losses, sample_counts
from giantdet.config.conventions import CONVENTIONS
from giantdet.layers.box_head import BoxPredictions, box_losses
from giantdet.layers.mask_head import MaskPredictions, mask_loss
from giantdet.layers.rpn import RpnPredictions, rpn_losses

B, R, C, P, S = 3, 7, 4, 3, 6


def make(seed: int = 0, valid: bool = True) -> Predictions:
    """Random predictions; image 1 has nothing, and invalid slots contain large numbers."""
    g = torch.Generator().manual_seed(seed)
    randn = lambda *shape: torch.randn(*shape, generator=g)  # noqa: E731
    valid_BR = (torch.rand(B, R, generator=g) > 0.3) & valid
    valid_BR[1] = False
    positive_BR = (torch.rand(B, R, generator=g) > 0.5) & valid_BR
    waste = lambda x, keep: torch.where(keep.view(*keep.shape, *[1] * (x.ndim - keep.ndim)), x, 50.0)  # noqa: E731
    labels_BR = torch.randint(0, C, (B, R), generator=g).where(positive_BR, C)
    valid_BP = positive_BR[:, :P]
    return Predictions(
        rpn=RpnPredictions(
            waste(randn(B, R), valid_BR),
            waste(randn(B, R, 4), positive_BR),
            randn(B, R, 4),
            positive_BR,
            valid_BR,
        ),
        box=BoxPredictions(
            waste(randn(B, R, C + 1), valid_BR),
            waste(randn(B, R, 4), positive_BR),
            randn(B, R, 4),
            labels_BR,
            positive_BR,
            valid_BR,
            waste(randn(B, R, 4), positive_BR),
            randn(B, R, 4),
        ),
        mask=MaskPredictions(
            waste(randn(B, P, S, S), valid_BP), torch.rand(B, P, S, S, generator=g), valid_BP
        ),
    )


def smooth_l1(x: float, beta: float) -> float:
    return (
        abs(x)
        if abs(x) >= beta and beta == 0
        else (0.5 * x * x / beta if abs(x) < beta else abs(x) - beta / 2)
    )


def by_loops(p: Predictions, conventions: str) -> dict[str, float]:
    """Compute the losses from the formulas, one image and slot at a time."""
    beta = 1 / 9 if conventions == "torchvision" else 0.0
    sums = dict.fromkeys(("loss_rpn_cls", "loss_rpn_loc", "loss_cls", "loss_box_reg", "loss_mask"), 0.0)
    sampled, masks = 0, 0
    assert p.mask is not None
    for b in range(B):
        for r in range(R):
            if p.rpn.valid_BR[b, r]:
                sampled += 1
                probability = torch.sigmoid(p.rpn.objectness_BR[b, r].double())
                right = probability if p.rpn.positive_BR[b, r] else 1 - probability
                sums["loss_rpn_cls"] -= float(right.log())
                logits = p.box.logits_BRC1[b, r].double()
                sums["loss_cls"] -= float(logits.softmax(0)[p.box.labels_BR[b, r]].log())
            if p.rpn.positive_BR[b, r]:
                for part, name in ((p.rpn, "loss_rpn_loc"), (p.box, "loss_box_reg")):
                    for k in range(4):
                        x = float(part.deltas_BR4[b, r, k]) - float(part.target_deltas_BR4[b, r, k])
                        sums[name] += smooth_l1(x, beta)
        for slot in range(P):
            if p.mask.valid_BP[b, slot]:
                masks += 1
                probability = p.mask.logits_BPSS[b, slot].double().sigmoid()
                goal = p.mask.targets_BPSS[b, slot].double()
                entropy = -(goal * probability.log() + (1 - goal) * (1 - probability).log())
                sums["loss_mask"] += float(entropy.mean())
    anchors = {"detectron2": B * R, "torchvision": sampled, "mmdetection": 0}[conventions]
    if conventions == "mmdetection":  # at least one of each kind in every image
        for b in range(B):
            positives = sum(bool(p.rpn.positive_BR[b, r]) for r in range(R))
            negatives = sum(bool(p.rpn.valid_BR[b, r]) for r in range(R)) - positives
            anchors += max(positives, 1) + max(negatives, 1)
    divisors = (anchors, anchors, sampled, sampled, masks)
    return {name: value / max(n, 1) for (name, value), n in zip(sums.items(), divisors, strict=True)}


@pytest.mark.parametrize("conventions", ["detectron2", "torchvision", "mmdetection"])
@pytest.mark.parametrize("seed", range(3))
def test_against_loops(conventions: str, seed: int) -> None:
    predictions = make(seed)
    losses = mask_rcnn_losses(predictions, CONVENTIONS[conventions])
    expected = by_loops(predictions, conventions)
    assert losses.keys() == expected.keys()
    for name, loss in losses.items():
        assert expected[name] > 0
        assert float(loss) == pytest.approx(expected[name], rel=1e-5), name


@pytest.mark.parametrize("conventions", ["detectron2", "torchvision", "mmdetection"])
def test_nothing_valid_is_zero_with_zero_gradients(conventions: str) -> None:
    predictions = make(valid=False)
    leaves: list[Tensor] = [
        predictions.rpn.objectness_BR,
        predictions.rpn.deltas_BR4,
        predictions.box.logits_BRC1,
        predictions.box.deltas_BR4,
        predictions.mask.logits_BPSS,  # type: ignore[union-attr]
    ]
    for leaf in leaves:
        leaf.requires_grad_()
    losses = mask_rcnn_losses(predictions, CONVENTIONS[conventions])
    assert [float(loss) for loss in losses.values()] == [0.0] * 5
    sum(losses.values(), torch.zeros(())).backward()
    for leaf in leaves:
        assert leaf.grad is not None and not leaf.grad.any()


def test_invalid_slots_get_no_gradient() -> None:
    predictions = make()
    predictions.box.logits_BRC1.requires_grad_()
    predictions.box.deltas_BR4.requires_grad_()
    sum(
        box_losses(predictions.box, CONVENTIONS["detectron2"].smooth_l1_beta).values(), torch.zeros(())
    ).backward()
    logits_grad, deltas_grad = predictions.box.logits_BRC1.grad, predictions.box.deltas_BR4.grad
    assert logits_grad is not None and deltas_grad is not None
    assert torch.equal(logits_grad.any(-1), predictions.box.valid_BR)
    assert torch.equal(deltas_grad.any(-1), predictions.box.positive_BR)


def test_without_mask_head() -> None:
    losses = mask_rcnn_losses(make()._replace(mask=None), CONVENTIONS["detectron2"])
    assert losses.keys() == {"loss_rpn_cls", "loss_rpn_loc", "loss_cls", "loss_box_reg"}


def test_detectron2_golden(shared: Path) -> None:
    """`FastRCNNOutputLayers.losses` of detectron2 for 16 RoIs, some of them background, and 80 classes."""
    inputs = np.load(shared / "golden" / "ops_inputs.npz")
    golden = np.load(shared / "golden" / "ops_detectron2.npz")
    labels_BR = torch.from_numpy(inputs["loss_labels_d2"])[None]
    positive_BR = labels_BR < 80
    assert positive_BR.any() and not positive_BR.all()
    deltas = torch.from_numpy(inputs["loss_reg"]).view(1, 16, 80, 4)
    chosen = deltas.gather(2, labels_BR.where(positive_BR, 0)[..., None, None].expand(1, 16, 1, 4))[:, :, 0]
    losses = box_losses(
        BoxPredictions(
            torch.from_numpy(inputs["loss_logits"])[None],
            chosen,
            torch.from_numpy(inputs["loss_reg_target"])[None],
            labels_BR,
            positive_BR,
            torch.ones_like(positive_BR),
            torch.zeros(1, 16, 4),
            torch.zeros(1, 16, 4),
        ),
        CONVENTIONS["detectron2"].smooth_l1_beta,
    )
    assert float(losses["loss_cls"]) == pytest.approx(float(golden["loss_cls"]), rel=1e-5)
    assert float(losses["loss_box_reg"]) == pytest.approx(float(golden["loss_box"]), rel=1e-5)


def test_mask_loss_is_the_mean_over_real_masks(shared: Path) -> None:
    """Equals torch's own mean over the selection, on the golden logits."""
    inputs = np.load(shared / "golden" / "ops_inputs.npz")
    logits = torch.from_numpy(inputs["loss_mask_logits"])[:, 3][None]
    goal = torch.from_numpy(inputs["loss_mask_target"]).float()[None]
    valid_BP = torch.tensor([[True, True, False, True, False, True, True, False]])
    loss = mask_loss(MaskPredictions(logits, goal, valid_BP))["loss_mask"]
    expected = F.binary_cross_entropy_with_logits(logits[valid_BP], goal[valid_BP])
    torch.testing.assert_close(loss, expected)


def test_rpn_loss_is_the_mean_over_a_full_sample() -> None:
    """Every image has positives and negatives; mmdetection counts one where an image lacks a kind."""
    p = make().rpn
    positive_BR = p.positive_BR.clone()
    positive_BR[:, 0], positive_BR[:, 1] = True, False
    p = p._replace(valid_BR=torch.ones_like(p.valid_BR), positive_BR=positive_BR)
    for fine_print in CONVENTIONS.values():
        loss = rpn_losses(p, fine_print)["loss_rpn_cls"]
        expected = F.binary_cross_entropy_with_logits(p.objectness_BR, p.positive_BR.float())
        torch.testing.assert_close(loss, expected)


def test_sample_counts() -> None:
    predictions = make()
    counts = sample_counts(predictions)
    assert float(counts["rpn_positive"]) == pytest.approx(int(predictions.rpn.positive_BR.sum()) / B)
    assert predictions.mask is not None
    assert float(counts["mask_slots_used"]) == pytest.approx(int(predictions.mask.valid_BP.sum()) / B)
    assert counts.keys() == {"rpn_positive", "roi_positive", "mask_slots_used"}


@pytest.mark.parametrize("kind", ["giou", "diou", "ciou"])
def test_iou_losses_of_the_box_head(kind: Any) -> None:
    """detectron2's rule: the sum over decoded positives, divided by the number of all sampled RoIs."""
    box = make().box
    corner = box.boxes_BR4[..., :2]
    sides = box.boxes_BR4[..., 2:].abs() + 1
    box = box._replace(
        boxes_BR4=torch.cat([corner, corner + sides], -1).requires_grad_(),
        target_boxes_BR4=torch.cat([corner + 0.5, corner + 2 * sides], -1),
    )
    # Slots that are not positive may contain anything.
    waste_BR4 = box.boxes_BR4.where(box.positive_BR[..., None], torch.nan)
    loss = box_losses(box._replace(boxes_BR4=waste_BR4), 0.0, kind)["loss_box_reg"]
    functions = {
        "giou": torchvision.ops.generalized_box_iou_loss,
        "diou": torchvision.ops.distance_box_iou_loss,
        "ciou": torchvision.ops.complete_box_iou_loss,
    }
    chosen = (box.boxes_BR4[box.positive_BR], box.target_boxes_BR4[box.positive_BR])
    torch.testing.assert_close(loss, functions[kind](*chosen, reduction="sum") / box.valid_BR.sum())
    loss.backward()  # type: ignore[no-untyped-call]
    gradient = box.boxes_BR4.grad
    assert gradient is not None and torch.equal(gradient.any(-1), box.positive_BR)
