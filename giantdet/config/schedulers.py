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
    """Length of the warmup; auto: 5% of the run, at most 500 steps."""
    warmup_type: Literal["linear", "log"] = "log"
    """Shape of the warmup."""


class _WarmupBetween(_DeepSpeedWarmup):
    LRS = ("warmup_min_lr", "warmup_max_lr")

    warmup_min_lr: NonNegative | Auto = 0.0
    """LR at the start of the warmup."""
    warmup_max_lr: NonNegative | Auto | None = None
    """null: the optimizer's LR."""


class WarmupLR(_WarmupBetween):
    """A warmup, then a constant LR."""


class WarmupDecayLR(_WarmupBetween):
    """A warmup, then a linear decay to 0."""

    total_num_steps: Period | Auto = "auto"
    """Length of the schedule, with the warmup; auto: the run."""


class WarmupCosineLR(_DeepSpeedWarmup):
    """A warmup, then a cosine decay."""

    warmup_min_ratio: float | Auto = 0.0
    """Share of the LR at which the warmup starts."""
    cos_min_ratio: float = 1e-4
    """Share of the LR at which the cosine ends."""
    total_num_steps: Period | Auto = "auto"
    """Length of the schedule, with the warmup; auto: the run."""


class OneCycle(SchedulerConfig):
    """The 1cycle schedule (Smith 2018): the LR rises and falls, then decays slowly."""

    LRS = ("cycle_min_lr", "cycle_max_lr")
    LENGTHS = ("cycle_first_step_size", "cycle_second_step_size", "decay_step_size")

    cycle_min_lr: NonNegative
    """LR at the start and at the end of the cycle."""
    cycle_max_lr: NonNegative
    """LR in the middle of the cycle."""
    decay_lr_rate: float = 0.0
    """After the cycle the LR is divided by 1 + this rate x decay steps."""
    cycle_first_step_size: Period = 2000
    """Length of the first half of the cycle."""
    cycle_second_step_size: Period | None = None
    """Length of the second half of the cycle; null: as long as the first."""
    cycle_first_stair_count: Whole = 0
    """Number of stairs of the first half; 0: a ramp."""
    cycle_second_stair_count: Whole | None = None
    """Number of stairs of the second half; null: as in the first."""
    decay_step_size: Length = 0
    """Length of a decay step; 0: the LR does not decay."""
    cycle_momentum: bool = True
    """Also cycle the momentum, against the LR."""
    cycle_min_mom: float = 0.8
    """Lowest momentum."""
    cycle_max_mom: float = 0.9
    """Highest momentum."""
    decay_mom_rate: float = 0.0
    """After the cycle the momentum is multiplied by 1 + this rate x decay steps."""


class LRRangeTest(SchedulerConfig):
    """The LR range test (Smith 2017): the LR grows in every step."""

    LRS = ("lr_range_test_min_lr",)
    LENGTHS = ("lr_range_test_step_size",)

    lr_range_test_min_lr: NonNegative = 1e-3
    """LR at the start."""
    lr_range_test_step_size: Period = 2000
    """Steps from one increase to the next."""
    lr_range_test_step_rate: float = 1.0
    """The LR is multiplied by 1 + this rate x increases."""
    lr_range_test_staircase: bool = False
    """Increase the LR in stairs rather than in every step."""


class WarmupConfig(SchedulerConfig):
    """Base of giantdet's own schedules: a warmup that starts at a fraction of the LR."""

    FROM_DEEPSPEED = False
    LENGTHS = ("warmup_num_steps", "total_num_steps")

    warmup_num_steps: Length | Auto = "auto"
    """Length of the warmup; auto: 5% of the run, at most 500 steps."""
    warmup_type: Literal["linear", "exponential", "constant"] = "linear"
    """Shape of the warmup."""
    warmup_min_ratio: float | Auto = "auto"
    """Share of the LR at which the warmup starts. auto: 0.001, as in detectron2 and mmdetection; if the LR is
    scaled, the share that gives the LR of the reference batch."""


class WarmupMultiStepLR(WarmupConfig):
    """The usual schedule of detectors, also of MegDet: each milestone multiplies the LR by `gamma`."""

    milestones: list[Length]
    """Lengths after which the LR is multiplied by `gamma`, in steps, epochs or images."""
    gamma: float | list[float] = 0.1
    """Factor of the LR: one number, or one for each milestone."""

    def problems(self) -> Iterator[str]:
        """See `SchedulerConfig.problems`."""
        if isinstance(self.gamma, list) and len(self.gamma) != len(self.milestones):
            yield f"gamma has {len(self.gamma)} values for {len(self.milestones)} milestones; give one each"


class WarmupCosineDecayLR(WarmupConfig):
    """A cosine decay from the end of the warmup to `min_ratio` x LR at `total_num_steps`."""

    total_num_steps: Period | Auto = "auto"
    """Length of the schedule, with the warmup; auto: the run."""
    min_ratio: float = 0.0
    """Share of the LR at the end."""


class WarmupPolyLR(WarmupConfig):
    """A polynomial decay, (1 - progress) ** power, to `min_ratio` x LR; usual in semantic segmentation."""

    total_num_steps: Period | Auto = "auto"
    """Length of the schedule, with the warmup; auto: the run."""
    power: float = 0.9
    """Exponent of the decay; 1 is linear."""
    min_ratio: float = 0.0
    """Share of the LR at the end."""


SCHEDULERS: dict[str, type[SchedulerConfig]] = {
    section.__name__: section
    for section in (
        *(WarmupLR, WarmupDecayLR, WarmupCosineLR, OneCycle, LRRangeTest),
        *(WarmupMultiStepLR, WarmupCosineDecayLR, WarmupPolyLR),
    )
}
