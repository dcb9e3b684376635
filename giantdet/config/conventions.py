"""The choices in which the reference implementations differ, as one frozen dataclass for each of them.

Sources: detectron2 0.6 (`modeling/`, `layers/mask_ops.py`), torchvision 0.25 (`models/detection/`) and
mmdetection 3.3 (`models/`).
"""

from __future__ import annotations

from dataclasses import dataclass, replace

DeltaWeights = tuple[float, float, float, float]


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

    anchors_by_ratio: bool = False
    """The anchors of a cell are ordered by ratio, then by size; if False, by size, then by ratio."""
    trained_padding: int = 0
    """Anchors are trained up to the image's sides rounded up to a multiple of this; 0: wherever they are
    proposed."""
    clamps_shrinking: bool = False
    """Predicted changes of width and height are limited in both directions; if False, only upwards."""
    best_anchor_iou: float = 0.0
    """IoU that the best anchor of an object needs to be positive in the RPN where it is below `iou_high`."""
    best_anchor_takes_object: bool = False
    """The best anchor of an object predicts that object; if False, the object that it overlaps most."""
    rpn_loss_counts_missing: bool = False
    """In the divisor of the RPN's losses, an image without sampled positives counts one, and so does an image
    without sampled negatives."""
    roi_level_epsilon: float = 1e-8
    """Added to sqrt(area) / 224 of a RoI before the logarithm that gives its pyramid level."""
    retina_running_mean: bool = True
    """RetinaNet's losses are divided by a running mean of the number of positive anchors; if False, by the
    number itself, at least 1 per image."""
    retina_mean_of_images: bool = False
    """Without the running mean: each image's losses are divided by its own number of positive anchors, and
    averaged; if False, their sum is divided by the sum of the numbers."""
    retina_relu_before_p7: bool = True
    """RetinaNet has a ReLU between P6 and P7."""
    retina_clips_before_nms: bool = False
    """RetinaNet clips boxes to the image before NMS; if False, after it."""
    cascade_samples_each_stage: bool = False
    """Each stage of a cascade samples RoIs, from the boxes of the one before and the objects; if False, only
    the first one does, and the others take all of its slots."""
    cascade_mask_heads: bool = False
    """Each stage has a mask head, and their probabilities are averaged; if False, there is one, trained on
    the RoIs of the first stage."""
    cascade_averages_logits: bool = False
    """The logits of the stages are averaged; if False, their softmax scores."""
    cascade_scales_gradients: bool = True
    """Each stage's gradient into the features is divided by the number of stages."""
    cascade_loss_weights: tuple[float, float, float] = (1.0, 1.0, 1.0)
    """Weights of the stages' losses."""
    cascade_delta_weights: tuple[DeltaWeights, DeltaWeights, DeltaWeights] = (
        (10.0, 10.0, 5.0, 5.0),
        (20.0, 20.0, 10.0, 10.0),
        (30.0, 30.0, 15.0, 15.0),
    )
    """Factors of dx, dy, dw and dh in what the stages regress."""

    def beta(self, chosen: float | None) -> float:
        """Return the beta of a smooth L1 loss: the one that a section chooses, or else `smooth_l1_beta`."""
        return self.smooth_l1_beta if chosen is None else chosen


DETECTRON2 = Conventions(
    rounded_anchors=False,
    anchors_in_padding=False,
    min_proposal_size=0.0,
    min_detection_size=0.0,
    aligned_rois=True,
    smooth_l1_beta=0.0,
    rpn_loss_over_all_slots=True,
    binary_mask_targets=True,
    pastes_at_pixel_centres=True,
)

CONVENTIONS: dict[str, Conventions] = {
    "detectron2": DETECTRON2,
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
        anchors_by_ratio=True,
        retina_running_mean=False,
        retina_mean_of_images=True,
        retina_clips_before_nms=True,
    ),
    "mmdetection": replace(
        DETECTRON2,
        rpn_loss_over_all_slots=False,
        anchors_by_ratio=True,
        trained_padding=32,
        clamps_shrinking=True,
        best_anchor_iou=0.3,
        best_anchor_takes_object=True,
        rpn_loss_counts_missing=True,
        roi_level_epsilon=1e-6 / 4,  # 1e-6 of sqrt(area) / 56
        retina_running_mean=False,
        retina_relu_before_p7=False,
        retina_clips_before_nms=True,
        cascade_samples_each_stage=True,
        cascade_mask_heads=True,
        cascade_averages_logits=True,
        cascade_scales_gradients=False,
        cascade_loss_weights=(1.0, 0.5, 0.25),
        # The inverse of mmdetection's standard deviations.
        cascade_delta_weights=(
            (10.0, 10.0, 5.0, 5.0),
            (20.0, 20.0, 10.0, 10.0),
            (1 / 0.033, 1 / 0.033, 1 / 0.067, 1 / 0.067),
        ),
    ),
}
