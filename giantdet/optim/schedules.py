"""Learning-rate schedules: pure functions of the step, by the types of the JSON's `scheduler` block.

DeepSpeed's own types (WarmupLR, WarmupDecayLR, WarmupCosineLR, OneCycle, LRRangeTest) give the values of
DeepSpeed 0.19's classes, their first two steps at the minimum included. Ours are the detection papers':

- WarmupMultiStepLR: MegDet's and the usual one of detectors; the LR falls by `gamma` at each milestone.
- WarmupCosineDecayLR: half a cosine from the warmup's end to `min_ratio` at `total_num_steps`.
- WarmupPolyLR: (1 - progress) ** power, to `min_ratio`; segmentation's habit.

Their warmup is linear, exponential (AGVM's) or constant from `warmup_min_ratio`; step 0 is its first.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Callable, Sequence
from typing import Any

OfStep = Callable[[int], float]


def lr_function(kind: str, params: dict[str, Any], lr: float) -> OfStep:
    """The LR at optimizer step 0, 1, 2, ... where the optimizer's own is `lr`; params are resolved."""
    return _BUILDERS[kind](params, lr)


def momentum_function(kind: str, params: dict[str, Any]) -> OfStep | None:
    """Adam's first beta over the steps for a OneCycle that cycles it; None for all others."""
    if kind != "OneCycle" or not params.get("cycle_momentum", True):
        return None
    low, high = params.get("cycle_min_mom", 0.8), params.get("cycle_max_mom", 0.9)
    rate, size = params.get("decay_mom_rate", 0.0), params.get("decay_step_size", 0)
    cycle, position = _one_cycle(params)

    def momentum(step: int) -> float:
        if step == 0:
            return float(low)  # DeepSpeed's start, before it turns to the other end
        if step <= cycle:
            return float(high - (high - low) * position(step))
        return float(high * (1 + rate * (step - cycle) / size)) if size else float(high)

    return momentum


class LrSchedule:
    """Sets the LRs of an optimizer's groups; what `deepspeed.initialize(lr_scheduler=...)` steps.

    The function's value over `lr` scales each group's own LR, so that the ratios between groups (layer decay,
    modules) stay what they are. Groups are known by name: DeepSpeed reorders them.
    """

    def __init__(self, optimizer: Any, function: OfStep, lr: float, momentum: OfStep | None = None) -> None:
        self.optimizer, self.function, self.lr = optimizer, function, lr
        self.momentum = momentum if "betas" in optimizer.defaults else None
        self.base = {group["name"]: group["lr"] for group in optimizer.param_groups}
        self.go_to(0)

    def go_to(self, step: int) -> None:
        """Set what holds at a step, counted in steps that the optimizer took."""
        self.steps = step
        ratio = self.function(self.steps) / self.lr
        for group in self.optimizer.param_groups:
            group["lr"] = self.base[group["name"]] * ratio
            if self.momentum is not None:
                group["betas"] = (self.momentum(self.steps), 0.99)  # DeepSpeed's second beta

    def step(self, *_: Any, **__: Any) -> None:
        """After an optimizer step."""
        self.go_to(self.steps + 1)

    def get_last_lr(self) -> list[float]:
        return [group["lr"] for group in self.optimizer.param_groups]

    def state_dict(self) -> dict[str, int]:
        return {"steps": self.steps}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.go_to(state["steps"])


# Ours


def _warmed(params: dict[str, Any], lr: float, decay: OfStep) -> OfStep:
    """The warmup's factor times the decay's, which knows the step alone, as detectron2 combines them."""
    length = params.get("warmup_num_steps", 0)
    kind, least = params.get("warmup_type", "linear"), params.get("warmup_min_ratio", 1e-3)

    def function(step: int) -> float:
        if step >= length:
            return lr * decay(step)
        done = step / length
        factor = {"linear": least + (1 - least) * done, "exponential": least ** (1 - done), "constant": least}
        return float(lr * factor[kind] * decay(step))

    return function


def _progress(params: dict[str, Any]) -> OfStep:
    """0 at the warmup's end to 1 at the last step's end."""
    first, last = params.get("warmup_num_steps", 0), params["total_num_steps"]
    return lambda step: min(1.0, max(0.0, (step - first) / max(1, last - first)))


def _multi_step(params: dict[str, Any], lr: float) -> OfStep:
    milestones: Sequence[int] = params["milestones"]
    gamma = params.get("gamma", 0.1)
    gammas = gamma if isinstance(gamma, list) else [gamma] * len(milestones)
    factors = [math.prod(gammas[:passed]) for passed in range(len(milestones) + 1)]
    return _warmed(params, lr, lambda step: factors[bisect_right(milestones, step)])


def _cosine_decay(params: dict[str, Any], lr: float) -> OfStep:
    least, progress = params.get("min_ratio", 0.0), _progress(params)
    return _warmed(params, lr, lambda s: least + (1 - least) * (1 + math.cos(math.pi * progress(s))) / 2)


def _poly(params: dict[str, Any], lr: float) -> OfStep:
    least, power, progress = params.get("min_ratio", 0.0), params.get("power", 0.9), _progress(params)
    return _warmed(params, lr, lambda s: least + (1 - least) * (1 - progress(s)) ** power)


# DeepSpeed's, whose count is one behind: it steps its schedulers after the optimizer, from -1.


def _gamma(params: dict[str, Any]) -> tuple[int, OfStep]:
    """The warmup's length and its progress from 0 to 1."""
    length = max(2, params.get("warmup_num_steps", 1000))
    if params.get("warmup_type", "log") == "log":
        return length, lambda i: math.log(i + 1) / math.log(length)
    return length, lambda i: i / length


def _warmup(params: dict[str, Any], lr: float) -> OfStep:
    low, high = params.get("warmup_min_lr", 0.0), params.get("warmup_max_lr", lr)
    length, gamma = _gamma(params)

    def function(step: int) -> float:
        i = max(0, step - 1)
        return float(low + (high - low) * (gamma(i) if i < length else 1.0))

    return function


def _warmup_decay(params: dict[str, Any], lr: float) -> OfStep:
    low, high = params.get("warmup_min_lr", 0.0), params.get("warmup_max_lr", lr)
    total, (length, gamma) = params["total_num_steps"], _gamma(params)

    def function(step: int) -> float:
        i = max(0, step - 1)
        left = max(0.0, (total - i) / max(1.0, total - length))
        return float(low + (high - low) * (gamma(i) if i < length else left))

    return function


def _warmup_cosine(params: dict[str, Any], lr: float) -> OfStep:
    first, last = params.get("warmup_min_ratio", 0.0), params.get("cos_min_ratio", 1e-4)
    total, (length, gamma) = params["total_num_steps"], _gamma(params)

    def function(step: int) -> float:
        i = step - 1
        if i < 0:
            return 0.0
        if i < length:
            return float(lr * (first + (1 - first) * gamma(i)))
        done = min(1.0, (i - length + 1) / max(1, total - length))
        return float(lr * (last + (1 - last) * (1 + math.cos(math.pi * done)) / 2))

    return function


def _one_cycle(params: dict[str, Any]) -> tuple[int, OfStep]:
    """The cycle's length, and the height in it, from 0 up to 1 and down again."""
    first = params.get("cycle_first_step_size", 2000)
    second = params.get("cycle_second_step_size", first)
    stairs = params.get("cycle_first_stair_count", 0)
    stairs = (stairs, params.get("cycle_second_stair_count", stairs))

    def position(step: int) -> float:
        step %= first + second
        rising = step <= first
        height = step / first if rising else (first + second - step) / second
        count = stairs[0] if rising else stairs[1]
        return math.floor(height * count + 1e-9) / count if count else height

    return first + second, position


def _one_cycle_lr(params: dict[str, Any], lr: float) -> OfStep:
    low, high = params["cycle_min_lr"], params["cycle_max_lr"]
    rate, size = params.get("decay_lr_rate", 0.0), params.get("decay_step_size", 0)
    cycle, position = _one_cycle(params)

    def function(step: int) -> float:
        if step <= cycle:
            return float(low + (high - low) * position(step))
        return float(low / (1 + rate * (step - cycle) / size)) if size else float(low)

    return function


def _range_test(params: dict[str, Any], lr: float) -> OfStep:
    low, size = params.get("lr_range_test_min_lr", 1e-3), params.get("lr_range_test_step_size", 2000)
    rate, stairs = params.get("lr_range_test_step_rate", 1.0), params.get("lr_range_test_staircase", False)
    return lambda step: float(low * (1 + rate * (step // size if stairs else step / size)))


_BUILDERS: dict[str, Callable[[dict[str, Any], float], OfStep]] = {
    "WarmupMultiStepLR": _multi_step,
    "WarmupCosineDecayLR": _cosine_decay,
    "WarmupPolyLR": _poly,
    "WarmupLR": _warmup,
    "WarmupDecayLR": _warmup_decay,
    "WarmupCosineLR": _warmup_cosine,
    "OneCycle": _one_cycle_lr,
    "LRRangeTest": _range_test,
}
