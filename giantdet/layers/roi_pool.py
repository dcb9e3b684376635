"""Features of RoIs from the pyramid P2 to P6. The coarsest level serves the RPN alone (Lin et al. 2017)."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from giantdet.layers.fpn import LEVELS, STRIDES
from giantdet.ops.roi_align import roi_align_pyramid

ROI_LEVELS = LEVELS - 1


class RoiMaps(NamedTuple):
    """The maps that the features of RoIs are read from."""

    levels: list[Tensor]  # P2 to P6, `[B, C, h, w]`
    embedding_BChw: Tensor | None = None
    """A map of stride 8 whose features are added to those of the levels: the semantic branch's."""


EMBEDDING_STRIDE = 8


class RoiPool:
    """RoIAlign over P2 to P5, each box from the level of its size.

    `aligned` and `level_epsilon` are those of `roi_align_pyramid`.
    """

    def __init__(self, aligned: bool, level_epsilon: float) -> None:
        self.aligned, self.level_epsilon = aligned, level_epsilon

    def __call__(
        self,
        maps: RoiMaps,
        boxes_BR4: Tensor,
        resolution: int,
        sampling_ratio: int,
        image_BR: Tensor | None = None,
    ) -> Tensor:
        """Return `[B * R, C, resolution, resolution]`; boxes get no gradient.

        `image_BR` is the image of each box; None: the row.
        """

        def read(levels: list[Tensor], strides: tuple[int, ...]) -> Tensor:
            return roi_align_pyramid(
                levels,
                boxes_BR4,
                strides,
                resolution,
                sampling_ratio,
                self.aligned,
                self.level_epsilon,
                image_BR,
            )

        features = read(maps.levels[:ROI_LEVELS], STRIDES[:ROI_LEVELS])
        if maps.embedding_BChw is not None:
            features = features + read([maps.embedding_BChw], (EMBEDDING_STRIDE,))
        return features
