"""Features of RoIs from the pyramid P2 to P6. P6 serves the RPN alone (Lin et al. 2017)."""

from __future__ import annotations

from torch import Tensor

from giantdet.ops.roi_align import roi_align_pyramid

ROI_LEVELS = 4


class RoiPool:
    """RoIAlign over P2 to P5, each box from the level of its size.

    `strides` are those of the pyramid's levels. With a dilated backbone P4 and P5 may have the same: a box is
    assigned by its size all the same, because the levels differ in receptive field. `aligned` and
    `level_epsilon` are those of `roi_align_pyramid`.
    """

    def __init__(self, strides: tuple[int, ...], aligned: bool, level_epsilon: float) -> None:
        self.strides, self.aligned, self.level_epsilon = strides[:ROI_LEVELS], aligned, level_epsilon

    def __call__(
        self, levels: list[Tensor], boxes_BR4: Tensor, resolution: int, sampling_ratio: int
    ) -> Tensor:
        """Return `[B * R, C, resolution, resolution]`; boxes get no gradient."""
        return roi_align_pyramid(
            levels[:ROI_LEVELS],
            boxes_BR4,
            self.strides,
            resolution,
            sampling_ratio,
            self.aligned,
            self.level_epsilon,
        )
