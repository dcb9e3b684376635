"""The `model` section of RetinaNet."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, Literal

from pydantic import Field

from giantdet.config.architectures.common import (
    ArchitectureConfig,
    FpnConfig,
    NormName,
    NormPart,
    group_norm_problems,
)
from giantdet.config.section import Fraction, PositiveFloat, PositiveInt, Section


class RetinaHeadConfig(Section):
    """Two towers of convolutions over P3 to P7, for the class scores and boxes of every anchor."""

    convs: Annotated[int, Field(ge=0)] = 4
    """Number of 3x3 convolutions in each tower."""
    norm: NormName = "none"
    """Norm after each convolution, as in `fpn`."""
    anchor_sizes: tuple[float, ...] = (32.0, 64.0, 128.0, 256.0, 512.0)
    """Side of the square anchor on each of P3 to P7, in pixels."""
    anchor_scales: tuple[float, ...] = (1.0, 2 ** (1 / 3), 2 ** (2 / 3))
    """Factors of the anchor size; each level has anchors of all of them."""
    anchor_ratios: tuple[float, ...] = (0.5, 1.0, 2.0)
    """Aspect ratios of the anchors, height / width."""
    iou_low: Fraction = 0.4
    """Anchors with a smaller IoU with every object are negative."""
    iou_high: Fraction = 0.5
    """Anchors with at least this IoU with an object are positive, and so is the best anchor of each object.
    Anchors between the two thresholds are ignored."""
    focal_alpha: Fraction = 0.25
    """Weight of objects in the focal loss; the background's is 1 minus it (Lin et al. 2017)."""
    focal_gamma: Annotated[float, Field(ge=0)] = 2.0
    """Exponent of the focal loss; 0 is cross-entropy."""
    prior: Fraction = 0.01
    """Initial score of every class, set by the bias of the last layer."""
    smooth_l1_beta: Annotated[float, Field(ge=0)] = 0.0
    """Error at which the smooth L1 box loss changes from quadratic to linear; 0 is plain L1."""
    pre_nms: PositiveInt = 1000
    """Number of best (anchor, class) pairs of each level that enter NMS."""
    score_threshold: Fraction = 0.05
    """Detections with a lower score are dropped."""
    nms_iou: Fraction = 0.5
    """IoU above which NMS removes the detection with the lower score, within a class."""
    detections: PositiveInt = 100
    """Maximum number of detections per image."""


class RetinaNetConfig(ArchitectureConfig):
    """RetinaNet (Lin et al. 2017), with detectron2's defaults."""

    type: Literal["retinanet"]
    conventions: Literal["detectron2", "torchvision", "mmdetection"] = "detectron2"
    fpn: FpnConfig = FpnConfig()
    extra_levels_from: Literal["c5", "p5"] | None = None
    """Input of P6: the last map of the backbone (c5) or of the pyramid (p5). null: C5, or P5 over a plain
    ViT, whose only map has stride 16."""
    head: RetinaHeadConfig = RetinaHeadConfig()
    loss_momentum: Annotated[float, Field(ge=0, lt=1)] = 0.9
    """Momentum of the running mean of the number of positive anchors, which divides the losses."""
    loss_normalizer: PositiveFloat = 100.0
    """Initial value of that running mean."""

    @property
    def most_detections(self) -> int | None:
        """See `ArchitectureConfig.most_detections`."""
        return self.head.detections

    @property
    def detections_nms_iou(self) -> float | None:
        """See `ArchitectureConfig.detections_nms_iou`."""
        return self.head.nms_iou

    def problems(self) -> Iterator[str]:
        """See `ArchitectureConfig.problems`."""
        head = self.head
        yield from self.fpn.problems(finest=3)
        if head.convs:
            yield from group_norm_problems(
                head.norm, "fpn.channels (with head.norm group)", self.fpn.channels
            )
        if len(head.anchor_sizes) != 5 or min(head.anchor_sizes) <= 0:
            yield f"head.anchor_sizes must be 5 positive numbers, for P3 to P7, got {list(head.anchor_sizes)}"
        for name, values in (("anchor_scales", head.anchor_scales), ("anchor_ratios", head.anchor_ratios)):
            if not values or min(values) <= 0:
                yield f"head.{name} must be positive numbers, got {list(values)}"
        if head.iou_low > head.iou_high:
            yield f"head.iou_low ({head.iou_low}) must not exceed iou_high ({head.iou_high})"
        if not 0 < head.prior < 1:
            yield f"head.prior must lie between 0 and 1, got {head.prior}"
        yield from super().problems()

    def batch_norms(self) -> dict[NormPart, tuple[str, bool]]:
        """See `ArchitectureConfig.batch_norms`."""
        return {
            "fpn": ("model.fpn", self.fpn.norm == "batch"),
            "heads": ("model.head", self.head.norm == "batch"),
        }
