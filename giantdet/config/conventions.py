"""Where the reference implementations differ: one frozen dataclass, made here once and handed down.

Sources: detectron2 0.6 (`modeling/`, `layers/mask_ops.py`) and torchvision 0.25 (`models/detection/`).
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Conventions:
    """The choices of one reference implementation."""

    rounded_anchors: bool
    """Anchors have sides of whole pixels, and a level's stride is image // grid, not its nominal one."""
    anchors_in_padding: bool
    """Anchors centred in the padding are trained and proposed. detectron2 pads a batch to its largest image
    and keeps them too; a fixed canvas may have more padding, so that here they are left out."""
    min_proposal_size: float
    """Pixels that both sides of a proposal must exceed."""
    min_detection_size: float
    """Pixels that both sides of a detection must exceed."""
    aligned_rois: bool
    """RoIAlign shifts its boxes by half a pixel, so that bins lie on pixel centres."""
    smooth_l1_beta: float
    """Where the box losses turn from a square to a line; 0 is plain L1."""
    rpn_loss_over_all_slots: bool
    """The RPN's losses are divided by the slots of the sample, also where fewer anchors were found for it."""
    binary_mask_targets: bool
    """Mask targets are 0 or 1, at least half covered; otherwise the covered share."""
    pastes_at_pixel_centres: bool
    """Masks are interpolated at pixel centres; otherwise boxes are rounded to whole pixels first."""


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
