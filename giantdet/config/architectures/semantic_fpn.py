"""The `model` section of Semantic FPN."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import ClassVar, Literal

from giantdet.config.architectures.common import ArchitectureConfig, FpnConfig, NormPart, SemanticHeadConfig
from giantdet.config.classes import ClassKind


class SemanticFpnConfig(ArchitectureConfig):
    """Semantic FPN (Kirillov et al. 2019). `num_classes` are the classes of the semantic maps."""

    type: Literal["semantic_fpn"]
    conventions: Literal["detectron2"] = "detectron2"
    fpn: FpnConfig = FpnConfig()
    semantic_head: SemanticHeadConfig = SemanticHeadConfig()

    CLASS_KEYS: ClassVar[Mapping[str, ClassKind]] = {"num_classes": "semantic"}

    def problems(self) -> Iterator[str]:
        """See `ArchitectureConfig.problems`."""
        yield from self.fpn.problems()
        yield from self.semantic_head.problems()
        yield from super().problems()

    def batch_norms(self) -> dict[NormPart, tuple[str, bool]]:
        """See `ArchitectureConfig.batch_norms`."""
        return {
            "fpn": ("model.fpn", self.fpn.norm == "batch"),
            "heads": ("model.semantic_head", self.semantic_head.norm == "batch"),
        }
