"""Features of RoIs from the pyramid P2 to P6. The coarsest level serves the RPN alone (Lin et al. 2017)."""

from __future__ import annotations

from torch import Tensor

from giantdet.layers.fpn import LEVELS, STRIDES
from giantdet.ops.roi_align import roi_align_pyramid

ROI_LEVELS = LEVELS - 1


class RoiPool:
    """RoIAlign over P2 to P5, each box from the level of its size.

    `aligned` and `level_epsilon` are those of `roi_align_pyramid`.
    """

    def __init__(self, aligned: bool, level_epsilon: float) -> None:
        self.aligned, self.level_epsilon = aligned, level_epsilon

    def __call__(
        self, levels: list[Tensor], boxes_BR4: Tensor, resolution: int, sampling_ratio: int
    ) -> Tensor:
        """Return `[B * R, C, resolution, resolution]`; boxes get no gradient."""
        return roi_align_pyramid(
            levels[:ROI_LEVELS],
            boxes_BR4,
            STRIDES[:ROI_LEVELS],
            resolution,
            sampling_ratio,
            self.aligned,
            self.level_epsilon,
        )
