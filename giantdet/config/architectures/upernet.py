"""The `model` section of UPerNet."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import ClassVar, Literal

from giantdet.config.architectures.common import ArchitectureConfig, Dropout, LossDivisor, NormPart
from giantdet.config.classes import ClassKind
from giantdet.config.section import NonNegative, PositiveInt, Section

HeadNorm = Literal["none", "batch", "group"]


class UperHeadConfig(Section):
    """Pooling pyramid, feature pyramid and classifier (Xiao et al. 2018, figure 4)."""

    width: PositiveInt = 512
    """Channels of all convolutions."""
    norm: HeadNorm = "batch"
    """Norm layer after each convolution: `batch` follows the `norm` block, `group` is GroupNorm of 32
    groups."""
    pool_scales: tuple[PositiveInt, ...] = (1, 2, 3, 6)
    """Sides of the grids that C5 is average-pooled to."""
    dropout: Dropout = 0.1
    """Probability that training sets a channel to zero before the last convolution."""


class AuxiliaryHeadConfig(Section):
    """A second classifier, on C4, that is used in training only (Zhao et al. 2017)."""

    enabled: bool = True
    """Train with a second classifier on C4, which prediction does not use."""
    width: PositiveInt = 256
    """Channels of its convolutions."""
    convs: PositiveInt = 1
    """Number of 3x3 convolutions before the classifier."""
    norm: HeadNorm = "batch"
    """See `decode_head.norm`."""
    dropout: Dropout = 0.1
    """See `decode_head.dropout`."""
    loss_weight: NonNegative = 0.4
    """Weight of its loss."""


class UperNetConfig(ArchitectureConfig):
    """UPerNet (Xiao et al. 2018). `num_classes` are the classes of the semantic maps.

    Defaults are those of mmsegmentation (`configs/_base_/models/upernet_r50.py`), except `loss_divisor`.
    """

    type: Literal["upernet"]
    conventions: Literal["detectron2"] = "detectron2"
    decode_head: UperHeadConfig = UperHeadConfig()
    auxiliary_head: AuxiliaryHeadConfig = AuxiliaryHeadConfig()
    loss_divisor: LossDivisor = "labelled"
    """Pixels that the summed cross-entropies are divided by. labelled: those with a class; all: all pixels of
    the canvas, ignored ones and padding too, as in mmsegmentation."""

    CLASS_KEYS: ClassVar[Mapping[str, ClassKind]] = {"num_classes": "semantic"}

    def problems(self) -> Iterator[str]:
        """See `ArchitectureConfig.problems`."""
        if not self.decode_head.pool_scales:
            yield "decode_head.pool_scales must be positive integers, such as [1, 2, 3, 6], got []"
        for name, head in (("decode_head", self.decode_head), ("auxiliary_head", self.auxiliary_head)):
            if head.norm == "group" and head.width % 32:
                yield f"{name}.width must be a multiple of 32, the groups of its norm, got {head.width}"
        yield from super().problems()

    def batch_norms(self) -> dict[NormPart, tuple[str, bool]]:
        """See `ArchitectureConfig.batch_norms`."""
        auxiliary = self.auxiliary_head.enabled and self.auxiliary_head.norm == "batch"
        is_batch = self.decode_head.norm == "batch" or auxiliary
        return {"heads": ("model.decode_head or model.auxiliary_head", is_batch)}
