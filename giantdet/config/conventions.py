"""The choices in which the reference implementations differ, as one frozen dataclass for each of them.

Sources: detectron2 0.6 (`modeling/`, `layers/mask_ops.py`) and torchvision 0.25 (`models/detection/`).
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Conventions:
    """The choices of one reference implementation."""

    rounded_anchors: bool
    """Anchor sides are rounded to whole pixels, and the stride of a level is image // grid, not its nominal
    stride."""
    anchors_in_padding: bool
    """Anchors centred in the padding are trained and proposed. detectron2 pads a batch to its largest image
    and keeps them too; a fixed canvas may have more padding, so here they are left out."""
    min_proposal_size: float
    """Pixels that both sides of a proposal must exceed."""
    min_detection_size: float
    """Pixels that both sides of a detection must exceed."""
    aligned_rois: bool
    """RoIAlign shifts its boxes by half a pixel, to align them with pixel centres."""
    smooth_l1_beta: float
    """Error at which the smooth L1 box losses change from quadratic to linear; 0 is plain L1."""
    rpn_loss_over_all_slots: bool
    """The RPN's losses are divided by the size of the sample, even if fewer anchors could be sampled."""
    binary_mask_targets: bool
    """Mask targets are 1 where at least half of a pixel is covered, otherwise 0; if False, they are the
    covered share."""
    pastes_at_pixel_centres: bool
    """Predicted masks are interpolated at pixel centres; if False, boxes are rounded to pixels first."""


CONVENTIONS: dict[str, Conventions] = {
    "detectron2": Conventions(
        rounded_anchors=False,
        anchors_in_padding=False,
        min_proposal_size=0.0,
        min_detection_size=0.0,
        aligned_rois=True,
        smooth_l1_beta=0.0,
        rpn_loss_over_all_slots=True,
        binary_mask_targets=True,
        pastes_at_pixel_centres=True,
    ),
    "torchvision": Conventions(
        rounded_anchors=True,
        anchors_in_padding=True,
        min_proposal_size=1e-3,
        min_detection_size=1e-2,
        aligned_rois=False,
        smooth_l1_beta=1 / 9,
        rpn_loss_over_all_slots=False,
        binary_mask_targets=False,
        pastes_at_pixel_centres=False,
    ),
}
