"""The section of the semantic branch beside the heads of two-stage detectors."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal

from giantdet.config.architectures.common import NormName, group_norm_problems
from giantdet.config.section import NonNegative, PositiveInt, Section


class SemanticBranchConfig(Section):
    """Classes of pixels at stride 8 as a second supervision of the pyramid (HTC, Chen et al. 2019)."""

    enabled: bool = False
    """Train the branch."""
    source: Literal["masks", "boxes", "maps"] = "masks"
    """What pixels are labelled with. masks: the class of the smallest object whose mask covers them (its box,
    if it has no mask), or background; boxes: the same with boxes alone; maps: the data set's semantic maps,
    where all objects are one class (format `coco_panoptic`). Crowd regions and ignored objects are not
    trained on."""
    loss_weight: NonNegative = 0.2
    """Weight of its loss."""
    convs: PositiveInt = 4
    """Number of 3x3 convolutions after the levels are summed at stride 8."""
    width: PositiveInt = 256
    """Channels of its convolutions."""
    norm: NormName = "none"
    """Norm after each convolution, as in `fpn`."""
    embed: bool = False
    """Add an embedding of the branch to the features of RoIs, for box and mask head (HTC). The branch then
    runs in evaluation too."""

    def problems(self, channels: int) -> Iterator[str]:
        """Yield messages like those of `ArchitectureConfig.problems`; the pyramid has `channels`."""
        if self.enabled:
            yield from group_norm_problems(self.norm, "semantic_branch.width", self.width)
            key = "fpn.channels (with semantic_branch.norm group)"
            yield from group_norm_problems(self.norm, key, channels)
