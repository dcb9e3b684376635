"""The `norm` block: how the BatchNorms of a model compute their statistics."""

from __future__ import annotations

from typing import Literal

from giantdet.config.section import PositiveInt, Section

NormPart = Literal["fpn", "heads"]


class PartNormConfig(Section):
    """How the BatchNorms of one part of the model compute their statistics."""

    type: Literal["frozen", "local", "cgbn"] = "frozen"
    """frozen: statistics, scale and bias are constants; local: over each rank's own micro-batch; cgbn: over
    the images of several ranks (`layers/cgbn.py`)."""
    bn_size: PositiveInt = 32
    """cgbn: number of images that are normalised together, micro-batch x ranks; at most those of all ranks.
    MegDet: 32."""


class NormConfig(PartNormConfig):
    """Batch normalisation of the model; `layers/norm.py` converts its BatchNorms.

    `type` and `bn_size` are those of the backbone. The norms of pyramid and heads (`"norm": "batch"` in their
    sections) are the same, or local where the backbone's are frozen: they are not pretrained, and frozen
    statistics of mean 0 and variance 1 would normalise nothing.
    """

    fpn: PartNormConfig | None = None
    """Batch norms of the pyramid, where they differ from the backbone's."""
    heads: PartNormConfig | None = None
    """Batch norms of the heads, where they differ from the backbone's."""

    def of(self, part: Literal["backbone"] | NormPart) -> PartNormConfig:
        """Return the settings of one part."""
        if part == "backbone":
            return self
        chosen = self.fpn if part == "fpn" else self.heads
        return chosen or (PartNormConfig(type="local") if self.type == "frozen" else self)

    def parts(self) -> dict[str, PartNormConfig]:
        """Return the settings of every part by name."""
        return {part: self.of(part) for part in ("backbone", "fpn", "heads")}
