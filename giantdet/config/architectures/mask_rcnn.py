"""The `model` section of Mask R-CNN, and of Faster R-CNN without its mask head."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal

from giantdet.config.architectures.common import (
    ArchitectureConfig,
    BaseBoxHeadConfig,
    BoxHeadConfig,
    FpnConfig,
    MaskHeadConfig,
    NormPart,
    RpnConfig,
    group_norm_problems,
)


class TwoStageConfig(ArchitectureConfig):
    """What the two-stage detectors have in common, whatever their box head."""

    fpn: FpnConfig = FpnConfig()
    rpn: RpnConfig = RpnConfig()
    box_head: BaseBoxHeadConfig = BaseBoxHeadConfig()
    mask_head: MaskHeadConfig = MaskHeadConfig()

    @property
    def most_detections(self) -> int | None:
        """See `ArchitectureConfig.most_detections`."""
        return self.box_head.detections

    @property
    def detections_nms_iou(self) -> float | None:
        """See `ArchitectureConfig.detections_nms_iou`."""
        return self.box_head.nms_iou

    def problems(self) -> Iterator[str]:
        """See `ArchitectureConfig.problems`."""
        yield from self.fpn.problems()
        yield from self.rpn.problems()
        yield from self.box_head.sampling.problems()
        if self.box_head.convs:
            yield from group_norm_problems(
                self.box_head.norm, "fpn.channels (with box_head.norm group)", self.fpn.channels
            )
        yield from self.mask_head.problems()
        yield from super().problems()

    def batch_norms(self) -> dict[NormPart, tuple[str, bool]]:
        """See `ArchitectureConfig.batch_norms`."""
        heads = (self.box_head.norm, self.mask_head.norm if self.mask_head.enabled else "none")
        return {
            "fpn": ("model.fpn", self.fpn.norm == "batch"),
            "heads": ("model.box_head or model.mask_head", "batch" in heads),
        }


class RcnnConfig(TwoStageConfig):
    """A two-stage detector with a single box head."""

    box_head: BoxHeadConfig = BoxHeadConfig()


class MaskRcnnConfig(RcnnConfig):
    """Mask R-CNN (He et al. 2017) with FPN."""

    type: Literal["mask_rcnn"] = "mask_rcnn"
