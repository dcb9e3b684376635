"""The `model` section of Mask R-CNN, and of Faster R-CNN without its mask head."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Annotated, Literal

from pydantic import Field

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
from giantdet.config.architectures.semantic_branch import SemanticBranchConfig
from giantdet.config.classes import ClassKind
from giantdet.config.section import Auto

StuffClasses = Annotated[int, Field(gt=0, le=254)] | Auto


class TwoStageConfig(ArchitectureConfig):
    """Keys that all two-stage detectors have, whatever their box head."""

    fpn: FpnConfig = FpnConfig()
    rpn: RpnConfig = RpnConfig()
    box_head: BaseBoxHeadConfig = BaseBoxHeadConfig()
    mask_head: MaskHeadConfig = MaskHeadConfig()
    semantic_branch: SemanticBranchConfig = SemanticBranchConfig()
    num_stuff_classes: StuffClasses | None = None
    """Number of classes without objects (sky, road, ...), of which COCO has 53, for a semantic branch that is
    trained on maps; auto: as in the training annotations."""

    @property
    def class_keys(self) -> Mapping[str, ClassKind]:
        """See `ArchitectureConfig.class_keys`."""
        branch = self.semantic_branch
        if not branch.enabled or branch.source != "maps":
            return self.CLASS_KEYS
        return {**self.CLASS_KEYS, "num_stuff_classes": "stuff"}

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
        yield from self.semantic_branch.problems(self.fpn.channels)
        wanted = "num_stuff_classes" in self.class_keys
        if wanted and self.num_stuff_classes is None:
            yield 'num_stuff_classes must be "auto" or a number where semantic_branch.source is maps'
        if not wanted and self.num_stuff_classes is not None:
            yield "num_stuff_classes is for semantic_branch.source maps: leave it out"
        yield from super().problems()

    def batch_norms(self) -> dict[NormPart, tuple[str, bool]]:
        """See `ArchitectureConfig.batch_norms`."""
        norms = {"box_head": self.box_head.norm, "mask_head": "none"}
        if self.mask_head.enabled:
            norms["mask_head"] = self.mask_head.norm
        if self.semantic_branch.enabled:
            norms["semantic_branch"] = self.semantic_branch.norm
        where = " or ".join(f"model.{part}" for part in norms)
        return {
            "fpn": ("model.fpn", self.fpn.norm == "batch"),
            "heads": (where, "batch" in norms.values()),
        }


class RcnnConfig(TwoStageConfig):
    """A two-stage detector with a single box head."""

    box_head: BoxHeadConfig = BoxHeadConfig()


class MaskRcnnConfig(RcnnConfig):
    """Mask R-CNN (He et al. 2017) with FPN."""

    type: Literal["mask_rcnn"] = "mask_rcnn"
