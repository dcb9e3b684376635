"""Sections of parts of MegDet's challenge system (Peng et al. 2018) that pyramids and box heads share.

`docs/challenge.md` describes them; `config/architectures/semantic_branch.py` has the third part.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, Literal

from pydantic import Field

from giantdet.config.section import PositiveInt, Section

PyramidLevel = Annotated[int, Field(ge=2, le=5)]


class LargeKernelConfig(Section):
    """Large separable kernels instead of 1x1 ones, from the backbone to the pyramid (Peng et al. 2017)."""

    size: PositiveInt = 15
    """Side of the kernel, odd: a tall and a wide convolution of this length in both orders, summed."""
    width: PositiveInt = 256
    """Channels between the two convolutions."""
    levels: tuple[PyramidLevel, ...] = (5,)
    """Levels that have one, 2 to 5. Each finer one costs four times as much."""

    def problems(self, finest: int) -> Iterator[str]:
        """Yield messages like those of `ArchitectureConfig.problems`, for a pyramid from P`finest` on."""
        if self.size % 2 == 0:
            yield f"fpn.large_kernel.size must be odd, got {self.size}"
        yield from _level_problems("large_kernel", self.levels, finest)


class ContextConfig(Section):
    """Context of the whole map, added to a level before the top-down pathway (GCNet, Cao et al. 2019)."""

    reduction: PositiveInt = 16
    """Channels of the level per channel between the block's two convolutions."""
    levels: tuple[PyramidLevel, ...] = (5,)
    """Levels that have one, 2 to 5; the top-down pathway hands it down to finer ones."""

    def problems(self, finest: int) -> Iterator[str]:
        """Yield messages like those of `ArchitectureConfig.problems`, for a pyramid from P`finest` on."""
        yield from _level_problems("context", self.levels, finest)


def _level_problems(name: str, levels: tuple[int, ...], finest: int) -> Iterator[str]:
    if not levels or min(levels) < finest:
        yield f"fpn.{name}.levels must be levels from {finest} to 5, got {list(levels)}"


class SamplingConfig(Section):
    """Which RoIs the box head is trained on."""

    type: Literal["random", "ohem"] = "random"
    """random: `positive_fraction` of them positive, as in Fast R-CNN; ohem: those with the largest losses
    (`layers/ohem.py`), for which all proposals pass through the head once more, without a graph."""
    over: Literal["batch", "image"] = "batch"
    """ohem: batch takes the largest classification + box losses of the whole micro-batch, without a quota
    of positives (Megvii); image the largest classification losses of each image, positives and negatives
    in the numbers of random sampling (mmdetection's `OHEMSampler`)."""

    def problems(self) -> Iterator[str]:
        """Yield messages like those of `ArchitectureConfig.problems`."""
        if self.type == "random" and self.over != "batch":
            yield 'box_head.sampling.over is for {"type": "ohem"}: leave it out, or set sampling.type to ohem'
