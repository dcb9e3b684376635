"""The `params` of the JSON's `scheduler` block: one section for every schedule (optim/schedules.py).

A new schedule is one class here, a line in SCHEDULERS and its function. Lengths are steps, epochs or images
until config/resolve.py makes steps of them. DeepSpeed's own classes would take a list of LRs, too, one by
position; here parameter groups are many, and their LRs follow from `giantdet.param_groups`.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import ClassVar, Literal

from giantdet.config.section import Auto, Length, NonNegative, Period, Section, Whole


class SchedulerConfig(Section):
    """What every schedule has."""

    FROM_DEEPSPEED: ClassVar[bool] = True
    """A type of DeepSpeed's own, whose values it has."""
    LRS: ClassVar[tuple[str, ...]] = ()
    """Its parameters that are LRs, scaled with the optimizer's."""
    LENGTHS: ClassVar[tuple[str, ...]] = ()
    """Its parameters that are lengths; milestones are beside them."""

    @property
    def name(self) -> str:
        """Its `type` in the JSON."""
        return type(self).__name__

    def problems(self) -> Iterator[str]:
        """Messages about combinations of values, each beginning with a parameter's name."""
        return iter(())


class _DeepSpeedWarmup(SchedulerConfig):
    LENGTHS = ("warmup_num_steps", "total_num_steps")

    warmup_num_steps: Length | Auto = 1000
    warmup_type: Literal["linear", "log"] = "log"


class _WarmupBetween(_DeepSpeedWarmup):
    LRS = ("warmup_min_lr", "warmup_max_lr")

    warmup_min_lr: NonNegative | Auto = 0.0
    warmup_max_lr: NonNegative | Auto | None = None
    """None: the optimizer's LR."""


class WarmupLR(_WarmupBetween):
    """A warmup, then constant."""


class WarmupDecayLR(_WarmupBetween):
    """A warmup, then a line to 0."""

    total_num_steps: Period | Auto = "auto"


class WarmupCosineLR(_DeepSpeedWarmup):
    """A warmup, then half a cosine."""

    warmup_min_ratio: float | Auto = 0.0
    cos_min_ratio: float = 1e-4
    total_num_steps: Period | Auto = "auto"


class OneCycle(SchedulerConfig):
    """Smith 2018: up and down, and then a slow decay."""

    LRS = ("cycle_min_lr", "cycle_max_lr")
    LENGTHS = ("cycle_first_step_size", "cycle_second_step_size", "decay_step_size")

    cycle_min_lr: NonNegative
    cycle_max_lr: NonNegative
    decay_lr_rate: float = 0.0
    cycle_first_step_size: Period = 2000
    cycle_second_step_size: Period | None = None
    """None: as long as the first."""
    cycle_first_stair_count: Whole = 0
    cycle_second_stair_count: Whole | None = None
    decay_step_size: Length = 0
    cycle_momentum: bool = True
    cycle_min_mom: float = 0.8
    cycle_max_mom: float = 0.9
    decay_mom_rate: float = 0.0


class LRRangeTest(SchedulerConfig):
    """Smith 2017: ever larger."""

    LRS = ("lr_range_test_min_lr",)
    LENGTHS = ("lr_range_test_step_size",)

    lr_range_test_min_lr: NonNegative = 1e-3
    lr_range_test_step_size: Period = 2000
    lr_range_test_step_rate: float = 1.0
    lr_range_test_staircase: bool = False


class WarmupConfig(SchedulerConfig):
    """What giantdet's own schedules share: a warmup from a share of the LR."""

    FROM_DEEPSPEED = False
    LENGTHS = ("warmup_num_steps", "total_num_steps")

    warmup_num_steps: Length | Auto = "auto"
    """auto: a twentieth of the run, at most 500 steps."""
    warmup_type: Literal["linear", "exponential", "constant"] = "linear"
    warmup_min_ratio: float | Auto = "auto"
    """auto: 0.001, detectron2's and mmdetection's; where the LR is scaled, the reference batch's LR."""


class WarmupMultiStepLR(WarmupConfig):
    """MegDet's and the usual schedule of detectors: the LR falls by `gamma` at each milestone."""

    milestones: list[Length]
    gamma: float | list[float] = 0.1
    """A number, or one for each milestone."""

    def problems(self) -> Iterator[str]:
        """See `SchedulerConfig.problems`."""
        if isinstance(self.gamma, list) and len(self.gamma) != len(self.milestones):
            yield f"gamma has {len(self.gamma)} values for {len(self.milestones)} milestones; give as many"


class WarmupCosineDecayLR(WarmupConfig):
    """Half a cosine from the warmup's end to `min_ratio` at `total_num_steps`."""

    total_num_steps: Period | Auto = "auto"
    min_ratio: float = 0.0


class WarmupPolyLR(WarmupConfig):
    """(1 - progress) ** power, to `min_ratio`; the habit of segmentation."""

    total_num_steps: Period | Auto = "auto"
    power: float = 0.9
    min_ratio: float = 0.0


SCHEDULERS: dict[str, type[SchedulerConfig]] = {
    section.__name__: section
    for section in (
        *(WarmupLR, WarmupDecayLR, WarmupCosineLR, OneCycle, LRRangeTest),
        *(WarmupMultiStepLR, WarmupCosineDecayLR, WarmupPolyLR),
    )
}
