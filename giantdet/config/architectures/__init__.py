"""The sections of the architectures by the name in `model.type`. A new architecture is one line here."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

from pydantic import Discriminator, Tag

from giantdet.config.architectures.cascade_mask_rcnn import CascadeMaskRcnnConfig
from giantdet.config.architectures.common import ArchitectureConfig
from giantdet.config.architectures.mask_rcnn import MaskRcnnConfig
from giantdet.config.architectures.panoptic_fpn import PanopticFpnConfig
from giantdet.config.architectures.retinanet import RetinaNetConfig
from giantdet.config.architectures.semantic_fpn import SemanticFpnConfig
from giantdet.config.architectures.upernet import UperNetConfig

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


def _type_of(section: Any) -> Any:
    """Return the name of a section's architecture; the section is a JSON object or a typed one."""
    return section.get("type", DEFAULT) if isinstance(section, dict) else getattr(section, "type", DEFAULT)


def _union() -> Any:
    tagged: Any = None
    for name, section in SECTIONS.items():
        member = Annotated[section, Tag(name)]  # type: ignore[valid-type]
        tagged = member if tagged is None else tagged | member
    return Annotated[tagged, Discriminator(_type_of)]


# A `model` section of any architecture, distinguished by `type`. Type checkers see the fields that all share.
if TYPE_CHECKING:
    ModelConfig = ArchitectureConfig
else:
    ModelConfig = _union()
