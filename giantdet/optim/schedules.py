"""Learning-rate schedules: pure functions of the step, for the types of the JSON's `scheduler` block.

DeepSpeed's own types (WarmupLR, WarmupDecayLR, WarmupCosineLR, OneCycle, LRRangeTest) have the values of
DeepSpeed 0.19's classes, including the first two steps at the minimum. giantdet's own types are:

- WarmupMultiStepLR: MegDet's schedule, usual for detectors; each milestone multiplies the LR by `gamma`.
- WarmupCosineDecayLR: half a cosine from the warmup's end to `min_ratio` at `total_num_steps`.
- WarmupPolyLR: (1 - progress) ** power, to `min_ratio`; common in semantic segmentation.

Their warmup starts at `warmup_min_ratio` in step 0 and is linear, exponential (AGVM's) or constant.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Callable
from typing import Any

from giantdet.config.schedulers import (
    LRRangeTest,
    OneCycle,
    SchedulerConfig,
    WarmupConfig,
    WarmupCosineDecayLR,
    WarmupCosineLR,
    WarmupDecayLR,
    WarmupLR,
    WarmupMultiStepLR,
    WarmupPolyLR,
)

OfStep = Callable[[int], float]


def lr_function(scheduler: SchedulerConfig, lr: float) -> OfStep:
    """Return the function from an optimizer step (0, 1, 2, ...) to the LR; `lr` is the optimizer's own LR.

    The lengths of the section must be resolved to steps.
    """
    return _BUILDERS[type(scheduler)](scheduler, lr)


def momentum_function(scheduler: SchedulerConfig) -> OfStep | None:
    """Return the function from a step to Adam's first beta, for a OneCycle that cycles it; otherwise None."""
    if not isinstance(scheduler, OneCycle) or not scheduler.cycle_momentum:
        return None
    low, high = scheduler.cycle_min_mom, scheduler.cycle_max_mom
    rate, size = scheduler.decay_mom_rate, _steps(scheduler.decay_step_size)
    cycle, position = _one_cycle(scheduler)

    def momentum(step: int) -> float:
        if step == 0:
            return low  # as DeepSpeed's first step; the cycle itself starts at `high`
        if step <= cycle:
            return high - (high - low) * position(step)
        return high * (1 + rate * (step - cycle) / size) if size else high

    return momentum


def _steps(length: int | str | None) -> int:
    """Return a length of a resolved section, in steps."""
    assert isinstance(length, int), f"{length!r} is not resolved"
    return length


def _number(value: float | str) -> float:
    """Return a number of a resolved section."""
    assert not isinstance(value, str), f"{value!r} is not resolved"
    return value


class LrSchedule:
    """Sets the LRs of an optimizer's groups in each step; for `deepspeed.initialize(lr_scheduler=...)`.

    The function's value divided by `lr` scales each group's own LR, so that the ratios between groups (layer
    decay, modules) do not change. Groups are found by name, because DeepSpeed reorders them.
    """

    def __init__(self, optimizer: Any, function: OfStep, lr: float, momentum: OfStep | None = None) -> None:
        self.optimizer, self.function, self.lr = optimizer, function, lr
        self.momentum = momentum if "betas" in optimizer.defaults else None
        self.base = {group["name"]: group["lr"] for group in optimizer.param_groups}
        self.go_to(0)

    def go_to(self, step: int) -> None:
        """Set the LRs and betas of a step, counted in steps that the optimizer has applied."""
        self.steps = step
        # With an LR of 0 that of every group is 0, whatever the schedule.
        ratio = self.function(self.steps) / self.lr if self.lr else 0.0
        for group in self.optimizer.param_groups:
            group["lr"] = self.base[group["name"]] * ratio
            if self.momentum is not None:
                group["betas"] = (self.momentum(self.steps), 0.99)  # DeepSpeed's second beta

    def step(self, *_: Any, **__: Any) -> None:
        """Go to the next step; called after an optimizer step."""
        self.go_to(self.steps + 1)

    def get_last_lr(self) -> list[float]:
        return [group["lr"] for group in self.optimizer.param_groups]

    def state_dict(self) -> dict[str, int]:
        return {"steps": self.steps}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.go_to(state["steps"])


# giantdet's schedules


def _warmed(scheduler: WarmupConfig, lr: float, decay: OfStep) -> OfStep:
    """Return `lr` x warmup factor x decay, as in detectron2; the decay depends on the step alone."""
    length = _steps(scheduler.warmup_num_steps)
    kind, least = scheduler.warmup_type, _number(scheduler.warmup_min_ratio)

    def function(step: int) -> float:
        if step >= length:
            return lr * decay(step)
        done = step / length
        factor = {"linear": least + (1 - least) * done, "exponential": least ** (1 - done), "constant": least}
        return float(lr * factor[kind] * decay(step))

    return function


def _progress(scheduler: WarmupCosineDecayLR | WarmupPolyLR) -> OfStep:
    """Return the progress of the decay: 0 at the warmup's end, 1 after the last step."""
    first, last = _steps(scheduler.warmup_num_steps), _steps(scheduler.total_num_steps)
    return lambda step: min(1.0, max(0.0, (step - first) / max(1, last - first)))


def _multi_step(scheduler: WarmupMultiStepLR, lr: float) -> OfStep:
    milestones = [_steps(milestone) for milestone in scheduler.milestones]
    gamma = scheduler.gamma
    gammas = gamma if isinstance(gamma, list) else [gamma] * len(milestones)
    factors = [math.prod(gammas[:passed]) for passed in range(len(milestones) + 1)]
    return _warmed(scheduler, lr, lambda step: factors[bisect_right(milestones, step)])


def _cosine_decay(scheduler: WarmupCosineDecayLR, lr: float) -> OfStep:
    least, progress = scheduler.min_ratio, _progress(scheduler)
    return _warmed(scheduler, lr, lambda s: least + (1 - least) * (1 + math.cos(math.pi * progress(s))) / 2)


def _poly(scheduler: WarmupPolyLR, lr: float) -> OfStep:
    least, power, progress = scheduler.min_ratio, scheduler.power, _progress(scheduler)
    return _warmed(scheduler, lr, lambda s: least + (1 - least) * (1 - progress(s)) ** power)


# DeepSpeed's schedules. Their step count is one behind: DeepSpeed steps them after the optimizer, from -1.


def _gamma(scheduler: WarmupLR | WarmupDecayLR | WarmupCosineLR) -> tuple[int, OfStep]:
    """Return the warmup's length and its progress from 0 to 1."""
    length = max(2, _steps(scheduler.warmup_num_steps))
    if scheduler.warmup_type == "log":
        return length, lambda i: math.log(i + 1) / math.log(length)
    return length, lambda i: i / length


def _between(scheduler: WarmupLR | WarmupDecayLR, lr: float) -> tuple[float, float]:
    """Return the LRs at the warmup's start and end."""
    high = scheduler.warmup_max_lr
    return _number(scheduler.warmup_min_lr), lr if high is None else _number(high)


def _warmup(scheduler: WarmupLR, lr: float) -> OfStep:
    low, high = _between(scheduler, lr)
    length, gamma = _gamma(scheduler)

    def function(step: int) -> float:
        i = max(0, step - 1)
        return float(low + (high - low) * (gamma(i) if i < length else 1.0))

    return function


def _warmup_decay(scheduler: WarmupDecayLR, lr: float) -> OfStep:
    low, high = _between(scheduler, lr)
    total, (length, gamma) = _steps(scheduler.total_num_steps), _gamma(scheduler)

    def function(step: int) -> float:
        i = max(0, step - 1)
        left = max(0.0, (total - i) / max(1.0, total - length))
        return float(low + (high - low) * (gamma(i) if i < length else left))

    return function


def _warmup_cosine(scheduler: WarmupCosineLR, lr: float) -> OfStep:
    first, last = _number(scheduler.warmup_min_ratio), scheduler.cos_min_ratio
    total, (length, gamma) = _steps(scheduler.total_num_steps), _gamma(scheduler)

    def function(step: int) -> float:
        i = step - 1
        if i < 0:
            return 0.0
        if i < length:
            return float(lr * (first + (1 - first) * gamma(i)))
        done = min(1.0, (i - length + 1) / max(1, total - length))
        return float(lr * (last + (1 - last) * (1 + math.cos(math.pi * done)) / 2))

    return function


def _one_cycle(scheduler: OneCycle) -> tuple[int, OfStep]:
    """Return the cycle's length, and the position in it, which rises from 0 to 1 and falls back to 0."""
    first = _steps(scheduler.cycle_first_step_size)
    second = first if scheduler.cycle_second_step_size is None else _steps(scheduler.cycle_second_step_size)
    up, down = scheduler.cycle_first_stair_count, scheduler.cycle_second_stair_count
    stairs = (up, up if down is None else down)

    def position(step: int) -> float:
        step %= first + second
        rising = step <= first
        height = step / first if rising else (first + second - step) / second
        count = stairs[0] if rising else stairs[1]
        return math.floor(height * count + 1e-9) / count if count else height

    return first + second, position


def _one_cycle_lr(scheduler: OneCycle, lr: float) -> OfStep:
    low, high = scheduler.cycle_min_lr, scheduler.cycle_max_lr
    rate, size = scheduler.decay_lr_rate, _steps(scheduler.decay_step_size)
    cycle, position = _one_cycle(scheduler)

    def function(step: int) -> float:
        if step <= cycle:
            return float(low + (high - low) * position(step))
        return float(low / (1 + rate * (step - cycle) / size)) if size else float(low)

    return function


def _range_test(scheduler: LRRangeTest, lr: float) -> OfStep:
    low, size = scheduler.lr_range_test_min_lr, _steps(scheduler.lr_range_test_step_size)
    rate, stairs = scheduler.lr_range_test_step_rate, scheduler.lr_range_test_staircase
    return lambda step: float(low * (1 + rate * (step // size if stairs else step / size)))


_BUILDERS: dict[type[SchedulerConfig], Callable[[Any, float], OfStep]] = {
    WarmupMultiStepLR: _multi_step,
    WarmupCosineDecayLR: _cosine_decay,
    WarmupPolyLR: _poly,
    WarmupLR: _warmup,
    WarmupDecayLR: _warmup_decay,
    WarmupCosineLR: _warmup_cosine,
    OneCycle: _one_cycle_lr,
    LRRangeTest: _range_test,
}
