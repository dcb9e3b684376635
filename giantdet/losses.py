"""Losses of the two-stage detector: predictions to a dict of scalars.

Every sum runs over all slots, masked, never over a selection: a batch without one object gives
zeros with clean gradients. Normalisers are local to the rank and micro-batch, as in detectron2,
mmdetection and torchvision (`rpn.py`, `fast_rcnn.py`, `mask_head.py` of detectron2 0.6).
"""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from giantdet.structures import BoxPredictions, MaskPredictions, Predictions, RpnPredictions

Conventions = Literal["detectron2", "torchvision"]


class LossFinePrint(NamedTuple):
    """Where the reference implementations differ."""

    beta: float  # smooth L1's switch; 0 is plain L1
    rpn_over_all_slots: bool  # divide by batch_per_image x images even where fewer anchors were sampled


FINE_PRINT: dict[Conventions, LossFinePrint] = {
    "detectron2": LossFinePrint(beta=0.0, rpn_over_all_slots=True),
    "torchvision": LossFinePrint(beta=1 / 9, rpn_over_all_slots=False),
}


def detector_losses(predictions: Predictions, conventions: Conventions = "detectron2") -> dict[str, Tensor]:
    """The five losses (four without a mask head), unweighted; their sum is what is minimised."""
    fine_print = FINE_PRINT[conventions]
    losses = rpn_losses(predictions.rpn, fine_print) | box_losses(predictions.box, fine_print)
    if predictions.mask is not None:
        losses |= mask_loss(predictions.mask)
    return losses


def total_loss(losses: dict[str, Tensor]) -> Tensor:
    """The sum that is differentiated, a scalar; each loss weighs 1."""
    return torch.stack(list(losses.values())).sum()


def rpn_losses(p: RpnPredictions, fine_print: LossFinePrint) -> dict[str, Tensor]:
    count = p.valid_BR.numel() if fine_print.rpn_over_all_slots else p.valid_BR.sum().clamp_min(1)
    entropy_BR = F.binary_cross_entropy_with_logits(p.objectness_BR, p.positive_BR.float(), reduction="none")
    distance_BR = _box_distance(p.deltas_BR4, p.target_deltas_BR4, fine_print.beta)
    return {
        "loss_rpn_cls": torch.where(p.valid_BR, entropy_BR, 0.0).sum() / count,
        "loss_rpn_loc": torch.where(p.positive_BR, distance_BR, 0.0).sum() / count,
    }


def box_losses(p: BoxPredictions, fine_print: LossFinePrint) -> dict[str, Tensor]:
    count = p.valid_BR.sum().clamp_min(1)
    entropy_BR = F.cross_entropy(p.logits_BRC1.flatten(0, 1), p.labels_BR.flatten(), reduction="none")
    distance_BR = _box_distance(p.deltas_BR4, p.target_deltas_BR4, fine_print.beta)
    return {
        "loss_cls": torch.where(p.valid_BR, entropy_BR.reshape(p.labels_BR.shape), 0.0).sum() / count,
        "loss_box_reg": torch.where(p.positive_BR, distance_BR, 0.0).sum() / count,
    }


def mask_loss(p: MaskPredictions) -> dict[str, Tensor]:
    """Mean binary cross-entropy over the pixels of valid slots."""
    entropy_BPSS = F.binary_cross_entropy_with_logits(p.logits_BPSS, p.targets_BPSS, reduction="none")
    entropy_BP = entropy_BPSS.mean((-2, -1))
    return {"loss_mask": torch.where(p.valid_BP, entropy_BP, 0.0).sum() / p.valid_BP.sum().clamp_min(1)}


def _box_distance(deltas: Tensor, targets: Tensor, beta: float) -> Tensor:
    """Smooth L1 summed over the four coordinates: `[..., 4]` to `[...]`."""
    return F.smooth_l1_loss(deltas, targets, reduction="none", beta=beta).sum(-1)


def sample_counts(predictions: Predictions) -> dict[str, Tensor]:
    """How much of the fixed shapes did work, for the log: means per image, still on the device."""
    counts = {
        "rpn_positive": predictions.rpn.positive_BR,
        "roi_positive": predictions.box.positive_BR,
    }
    if predictions.mask is not None:
        counts["mask_slots_used"] = predictions.mask.valid_BP
    return {name: mask.sum(1, dtype=torch.float32).mean() for name, mask in counts.items()}
