"""The `model` section of Cascade Mask R-CNN, and of Cascade R-CNN without its mask head."""

from __future__ import annotations

from typing import Literal

from giantdet.config.architectures.common import BaseBoxHeadConfig
from giantdet.config.architectures.mask_rcnn import TwoStageConfig
from giantdet.config.section import Fraction, PositiveFloat

DeltaWeights = tuple[PositiveFloat, PositiveFloat, PositiveFloat, PositiveFloat]


class CascadeBoxHeadConfig(BaseBoxHeadConfig):
    """Three class-agnostic box heads, each on the boxes of the one before.

    RoIs are sampled for the first stage; the others take all of its slots.
    """

    ious: tuple[Fraction, Fraction, Fraction] = (0.5, 0.6, 0.7)
    """IoU with an object from which a RoI is positive, by stage."""
    delta_weights: tuple[DeltaWeights, DeltaWeights, DeltaWeights] = (
        (10.0, 10.0, 5.0, 5.0),
        (20.0, 20.0, 10.0, 10.0),
        (30.0, 30.0, 15.0, 15.0),
    )
    """Factors of dx, dy, dw and dh in what the heads regress, by stage."""


class CascadeMaskRcnnConfig(TwoStageConfig):
    """Cascade Mask R-CNN (Cai and Vasconcelos 2018) with FPN, with detectron2's choices.

    mmdetection's differ: it samples in every stage, weights the losses of the stages by 1, 0.5 and 0.25,
    averages logits, and has three mask heads.
    """

    type: Literal["cascade_mask_rcnn"]
    conventions: Literal["detectron2"] = "detectron2"
    box_head: CascadeBoxHeadConfig = CascadeBoxHeadConfig()
