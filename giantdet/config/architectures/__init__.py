"""The sections of the architectures by the name in `model.type`. A new architecture is one line here."""

from __future__ import annotations

from typing import TYPE_CHECKING

from giantdet.config.architectures.cascade_mask_rcnn import CascadeMaskRcnnConfig
from giantdet.config.architectures.common import ArchitectureConfig
from giantdet.config.architectures.mask_rcnn import MaskRcnnConfig
from giantdet.config.architectures.panoptic_fpn import PanopticFpnConfig
from giantdet.config.architectures.retinanet import RetinaNetConfig
from giantdet.config.architectures.semantic_fpn import SemanticFpnConfig
from giantdet.config.architectures.upernet import UperNetConfig
from giantdet.config.section import tagged_union

__all__ = ["DEFAULT", "SECTIONS", "ArchitectureConfig", "ModelConfig"]

SECTIONS: dict[str, type[ArchitectureConfig]] = {
    "mask_rcnn": MaskRcnnConfig,
    "cascade_mask_rcnn": CascadeMaskRcnnConfig,
    "panoptic_fpn": PanopticFpnConfig,
    "retinanet": RetinaNetConfig,
    "semantic_fpn": SemanticFpnConfig,
    "upernet": UperNetConfig,
}
DEFAULT = "mask_rcnn"

# A `model` section of any architecture, distinguished by `type`. Type checkers see the fields that all share.
if TYPE_CHECKING:
    ModelConfig = ArchitectureConfig
else:
    ModelConfig = tagged_union(SECTIONS, "type", DEFAULT)
