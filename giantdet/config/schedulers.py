"""The `params` of the JSON's `scheduler` block: one section for every schedule (optim/schedules.py).

A new schedule is one class here, a line in SCHEDULERS, and its function in optim/schedules.py. Lengths are in
steps, epochs or images until config/resolve.py converts them to steps. DeepSpeed's own classes also take a
list with one LR per parameter group. Here there are many groups, and `giantdet.param_groups` sets their LRs.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import ClassVar, Literal

from giantdet.config.section import Auto, Length, NonNegative, Period, Section, Whole


class SchedulerConfig(Section):
    """Base of the sections of all schedules."""

    FROM_DEEPSPEED: ClassVar[bool] = True
    """True for DeepSpeed's own types, whose LRs are the same as in DeepSpeed."""
    LRS: ClassVar[tuple[str, ...]] = ()
    """The parameters that are LRs; they are scaled with the optimizer's LR."""
    LENGTHS: ClassVar[tuple[str, ...]] = ()
    """The parameters that are lengths, except milestones."""

    @property
    def name(self) -> str:
        """The schedule's `type` in the JSON."""
        return type(self).__name__

    def problems(self) -> Iterator[str]:
        """Yield messages about wrong combinations of values; each begins with the name of a parameter."""
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
    """A warmup, then a constant LR."""


class WarmupDecayLR(_WarmupBetween):
    """A warmup, then a linear decay to 0."""

    total_num_steps: Period | Auto = "auto"


class WarmupCosineLR(_DeepSpeedWarmup):
    """A warmup, then a cosine decay."""

    warmup_min_ratio: float | Auto = 0.0
    cos_min_ratio: float = 1e-4
    total_num_steps: Period | Auto = "auto"


class OneCycle(SchedulerConfig):
    """The 1cycle schedule (Smith 2018): the LR rises and falls, then decays slowly."""

    LRS = ("cycle_min_lr", "cycle_max_lr")
    LENGTHS = ("cycle_first_step_size", "cycle_second_step_size", "decay_step_size")

    cycle_min_lr: NonNegative
    cycle_max_lr: NonNegative
    decay_lr_rate: float = 0.0
    cycle_first_step_size: Period = 2000
    cycle_second_step_size: Period | None = None
    """Length of the second half of the cycle; None: as long as the first."""
    cycle_first_stair_count: Whole = 0
    cycle_second_stair_count: Whole | None = None
    decay_step_size: Length = 0
    cycle_momentum: bool = True
    cycle_min_mom: float = 0.8
    cycle_max_mom: float = 0.9
    decay_mom_rate: float = 0.0


class LRRangeTest(SchedulerConfig):
    """The LR range test (Smith 2017): the LR grows in every step."""

    LRS = ("lr_range_test_min_lr",)
    LENGTHS = ("lr_range_test_step_size",)

    lr_range_test_min_lr: NonNegative = 1e-3
    lr_range_test_step_size: Period = 2000
    lr_range_test_step_rate: float = 1.0
    lr_range_test_staircase: bool = False


class WarmupConfig(SchedulerConfig):
    """Base of giantdet's own schedules: a warmup that starts at a fraction of the LR."""

    FROM_DEEPSPEED = False
    LENGTHS = ("warmup_num_steps", "total_num_steps")

    warmup_num_steps: Length | Auto = "auto"
    """Length of the warmup; auto: 5% of the run, at most 500 steps."""
    warmup_type: Literal["linear", "exponential", "constant"] = "linear"
    warmup_min_ratio: float | Auto = "auto"
    """Share of the LR at which the warmup starts. auto: 0.001, as in detectron2 and mmdetection; if the LR is
    scaled, the share that gives the LR of the reference batch."""


class WarmupMultiStepLR(WarmupConfig):
    """The usual schedule of detectors, also of MegDet: each milestone multiplies the LR by `gamma`."""

    milestones: list[Length]
    gamma: float | list[float] = 0.1
    """Factor of the LR: one number, or one for each milestone."""

    def problems(self) -> Iterator[str]:
        """See `SchedulerConfig.problems`."""
        if isinstance(self.gamma, list) and len(self.gamma) != len(self.milestones):
            yield f"gamma has {len(self.gamma)} values for {len(self.milestones)} milestones; give one each"


class WarmupCosineDecayLR(WarmupConfig):
    """A cosine decay from the end of the warmup to `min_ratio` x LR at `total_num_steps`."""

    total_num_steps: Period | Auto = "auto"
    min_ratio: float = 0.0


class WarmupPolyLR(WarmupConfig):
    """A polynomial decay, (1 - progress) ** power, to `min_ratio` x LR; usual in semantic segmentation."""

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
