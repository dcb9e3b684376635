"""The `model` section of Cascade Mask R-CNN, and of Cascade R-CNN without its mask head."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal

from giantdet.config.architectures.common import BaseBoxHeadConfig
from giantdet.config.architectures.mask_rcnn import TwoStageConfig
from giantdet.config.section import Fraction, NonNegative, PositiveFloat

DeltaWeights = tuple[PositiveFloat, PositiveFloat, PositiveFloat, PositiveFloat]


class CascadeBoxHeadConfig(BaseBoxHeadConfig):
    """Three class-agnostic box heads, each on the boxes of the one before."""

    ious: tuple[Fraction, Fraction, Fraction] = (0.5, 0.6, 0.7)
    """IoU with an object from which a RoI is positive, by stage."""
    delta_weights: tuple[DeltaWeights, DeltaWeights, DeltaWeights] | None = None
    """Factors of dx, dy, dw and dh in what the heads regress, by stage. null: those of `conventions`."""
    loss_weights: tuple[NonNegative, NonNegative, NonNegative] | None = None
    """Weights of the losses, by stage. null: those of `conventions`."""


class CascadeMaskRcnnConfig(TwoStageConfig):
    """Cascade Mask R-CNN (Cai and Vasconcelos 2018) with FPN."""

    type: Literal["cascade_mask_rcnn"]
    conventions: Literal["detectron2", "mmdetection"] = "detectron2"
    box_head: CascadeBoxHeadConfig = CascadeBoxHeadConfig()

    def problems(self) -> Iterator[str]:
        """See `ArchitectureConfig.problems`."""
        sampling = self.box_head.sampling
        if sampling.type == "ohem" and sampling.over == "batch" and self.reference.cascade_samples_each_stage:
            yield (
                'box_head.sampling.over must be "image" with conventions mmdetection, whose stages sample '
                "the RoIs of each image again"
            )
        yield from super().problems()
