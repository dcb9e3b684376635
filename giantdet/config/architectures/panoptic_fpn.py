"""The `model` section of Panoptic FPN."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Annotated, ClassVar, Literal

from pydantic import Field

from giantdet.config.architectures.common import NormPart, SemanticHeadConfig
from giantdet.config.architectures.mask_rcnn import RcnnConfig, StuffClasses
from giantdet.config.architectures.panoptic_merge import PanopticMergeConfig
from giantdet.config.classes import ClassKind


class PanopticFpnConfig(RcnnConfig):
    """Panoptic FPN (Kirillov et al. 2019): Mask R-CNN and a semantic head on one pyramid.

    `num_classes` are the classes of objects. In semantic maps, 0 stands for all of them, and the stuff
    classes are numbered from 1.
    """

    type: Literal["panoptic_fpn"]
    semantic_head: SemanticHeadConfig = SemanticHeadConfig()
    num_stuff_classes: StuffClasses = "auto"
    """Number of classes without objects (sky, road, ...), of which COCO has 53; auto: as in the training
    annotations."""
    semantic_loss_weight: Annotated[float, Field(ge=0)] = 0.5
    """Weight of the loss of pixel classes."""
    instance_loss_weight: Annotated[float, Field(ge=0)] = 1.0
    """Weight of the three losses of box and mask head, as in the paper; those of the RPN keep the weight 1.
    detectron2 leaves out loss_cls, too, which makes no difference at its default of 1."""

    merge: PanopticMergeConfig = PanopticMergeConfig()

    CLASS_KEYS: ClassVar[Mapping[str, ClassKind]] = {"num_classes": "objects", "num_stuff_classes": "stuff"}

    @property
    def merge_rule(self) -> PanopticMergeConfig:
        """See `ArchitectureConfig.merge_rule`."""
        return self.merge

    def problems(self) -> Iterator[str]:
        """See `ArchitectureConfig.problems`."""
        if not self.mask_head.enabled:
            yield "mask_head.enabled must be true: panoptic maps are made of masks"
        if self.semantic_branch.enabled:
            yield "semantic_branch.enabled must be false: panoptic_fpn has a semantic head already"
        yield from self.semantic_head.problems()
        yield from super().problems()

    def batch_norms(self) -> dict[NormPart, tuple[str, bool]]:
        """See `ArchitectureConfig.batch_norms`."""
        parts = super().batch_norms()
        where, is_batch = parts["heads"]
        semantic = self.semantic_head.norm == "batch"
        return parts | {"heads": (f"{where} or model.semantic_head", is_batch or semantic)}
