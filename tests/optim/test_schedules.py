"""Schedules against DeepSpeed's own classes, torch's, and mmdetection's formulas."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from deepspeed.runtime import lr_schedules
from torch.optim.lr_scheduler import CosineAnnealingLR, LinearLR, MultiStepLR, PolynomialLR

from giantdet.config.load import parse_run
from giantdet.config.resolve import resolve
from giantdet.config.schedulers import SCHEDULERS, SchedulerConfig
from giantdet.errors import ConfigError
from giantdet.optim.schedules import LrSchedule, lr_function, momentum_function

# What resolve sets for "auto" if it does not depend on a run.
RESOLVED = {"warmup_num_steps": 0, "warmup_min_ratio": 1e-3}


def section(kind: str, params: dict[str, Any]) -> SchedulerConfig:
    known = SCHEDULERS[kind]
    return known.model_validate(params if known.FROM_DEEPSPEED else RESOLVED | params)


STEPS = 60
DEEPSPEED: list[tuple[str, dict[str, Any]]] = [
    ("WarmupLR", {"warmup_num_steps": 10}),
    ("WarmupLR", {"warmup_num_steps": 1, "warmup_type": "linear"}),
    (
        "WarmupLR",
        {"warmup_num_steps": 9, "warmup_min_lr": 0.01, "warmup_max_lr": 0.3, "warmup_type": "linear"},
    ),
    ("WarmupDecayLR", {"total_num_steps": 50, "warmup_num_steps": 7, "warmup_max_lr": 0.2}),
    (
        "WarmupDecayLR",
        {"total_num_steps": 5, "warmup_num_steps": 7, "warmup_max_lr": 0.2, "warmup_type": "linear"},
    ),
    ("WarmupCosineLR", {"total_num_steps": 50, "warmup_num_steps": 10}),
    (
        "WarmupCosineLR",
        {
            "total_num_steps": 50,
            "warmup_num_steps": 8,
            "warmup_min_ratio": 0.2,
            "cos_min_ratio": 0.05,
            "warmup_type": "linear",
        },
    ),
    ("OneCycle", {"cycle_min_lr": 0.01, "cycle_max_lr": 0.1, "cycle_first_step_size": 20}),
    (
        "OneCycle",
        {
            "cycle_min_lr": 0.01,
            "cycle_max_lr": 0.1,
            "cycle_first_step_size": 15,
            "cycle_second_step_size": 10,
            "cycle_first_stair_count": 5,
            "cycle_second_stair_count": 3,
            "decay_step_size": 4,
            "decay_lr_rate": 0.5,
            "decay_mom_rate": 0.01,
            "cycle_min_mom": 0.7,
            "cycle_max_mom": 0.95,
        },
    ),
    (
        "OneCycle",
        {"cycle_min_lr": 0.0, "cycle_max_lr": 1.0, "cycle_first_step_size": 7, "cycle_momentum": False},
    ),
    (
        "LRRangeTest",
        {"lr_range_test_min_lr": 0.001, "lr_range_test_step_size": 5, "lr_range_test_step_rate": 2.0},
    ),
    ("LRRangeTest", {"lr_range_test_step_size": 7, "lr_range_test_staircase": True}),
]


def optimizer_of(*lrs: float) -> torch.optim.AdamW:
    groups = [
        {"params": [torch.nn.Parameter(torch.zeros(1))], "lr": lr, "name": f"group{i}"}
        for i, lr in enumerate(lrs)
    ]
    return torch.optim.AdamW(groups)


def trace(optimizer: torch.optim.Optimizer, schedule: Any) -> list[tuple[float, tuple[float, float]]]:
    """Return the LR and betas of the first group in each optimizer step."""
    seen = []
    for _ in range(STEPS):
        seen.append((optimizer.param_groups[0]["lr"], optimizer.param_groups[0]["betas"]))
        optimizer.step()
        schedule.step()
    return seen


@pytest.mark.parametrize(("kind", "params"), DEEPSPEED)
def test_deepspeeds_types_equal_deepspeeds(kind: str, params: dict[str, Any]) -> None:
    theirs = optimizer_of(0.1)
    reference = trace(theirs, getattr(lr_schedules, kind)(theirs, **params))
    ours = optimizer_of(0.1)
    function, momentum = (
        lr_function(section(kind, params), 0.1),
        momentum_function(section(kind, params)),
    )
    mine = trace(ours, LrSchedule(ours, function, 0.1, momentum))
    assert [lr for lr, _ in mine] == pytest.approx([lr for lr, _ in reference], rel=1e-9, abs=1e-12)
    assert [b for _, betas in mine for b in betas] == pytest.approx([b for _, bs in reference for b in bs])
    assert len({lr for lr, _ in reference}) > 1, "a constant LR makes the test vacuous"


def test_all_of_deepspeeds_types_are_compared() -> None:
    assert {kind for kind, _ in DEEPSPEED} == {
        name for name, section in SCHEDULERS.items() if section.FROM_DEEPSPEED
    }


@pytest.mark.parametrize(("kind", "params"), [*DEEPSPEED[3:10], ("WarmupMultiStepLR", {"milestones": [20]})])
def test_ratios_of_the_groups_are_kept(kind: str, params: dict[str, Any]) -> None:
    optimizer = optimizer_of(0.1, 0.02, 0.4)
    schedule = LrSchedule(optimizer, lr_function(section(kind, params), 0.1), 0.1)
    optimizer.param_groups.reverse()  # groups are identified by name
    for step in range(STEPS):
        lr = lr_function(section(kind, params), 0.1)(step)
        found = {group["name"]: group["lr"] for group in optimizer.param_groups}
        assert found == pytest.approx({"group0": lr, "group1": 0.2 * lr, "group2": 4 * lr})
        optimizer.step()
        schedule.step()


def test_resuming_at_any_step() -> None:
    params = {"milestones": [10, 20], "warmup_num_steps": 5}
    function = lr_function(section("WarmupMultiStepLR", params), 0.1)
    straight = optimizer_of(0.1, 0.05)
    schedule = LrSchedule(straight, function, 0.1)
    for step in range(30):
        other = optimizer_of(0.1, 0.05)
        resumed = LrSchedule(other, function, 0.1)
        resumed.load_state_dict(schedule.state_dict())
        assert [g["lr"] for g in other.param_groups] == [g["lr"] for g in straight.param_groups], step
        straight.step()
        schedule.step()


@pytest.mark.parametrize("warmup_type", ["linear", "exponential", "constant"])
def test_warmup_equals_mmdetections(warmup_type: str) -> None:
    """The formulas of mmcv 1.x, `LrUpdaterHook.get_warmup_lr`, applied to the decayed LR of the step."""
    params = {
        "milestones": [4, 40],
        "warmup_num_steps": 12,
        "warmup_type": warmup_type,
        "warmup_min_ratio": 1e-3,
    }
    function = lr_function(section("WarmupMultiStepLR", params), 0.2)
    for step in range(STEPS):
        regular = 0.2 * 0.1 ** sum(step >= m for m in (4, 40))
        if warmup_type == "constant":
            warm = regular * 1e-3
        elif warmup_type == "linear":
            warm = regular * (1 - (1 - step / 12) * (1 - 1e-3))
        else:
            warm = regular * 1e-3 ** (1 - step / 12)
        assert function(step) == pytest.approx(warm if step < 12 else regular), step


def torch_trace(schedule: Any, optimizer: torch.optim.Optimizer) -> list[float]:
    return [lr for lr, _ in trace(optimizer, schedule)]


def test_decays_equal_torchs() -> None:
    optimizer = optimizer_of(0.3)
    wanted = torch_trace(MultiStepLR(optimizer, [15, 30, 45], gamma=0.1), optimizer)
    function = lr_function(
        section("WarmupMultiStepLR", {"milestones": [15, 30, 45], "warmup_num_steps": 0}),
        0.3,
    )
    assert [function(step) for step in range(STEPS)] == pytest.approx(wanted)

    optimizer = optimizer_of(0.3)
    wanted = torch_trace(CosineAnnealingLR(optimizer, STEPS, eta_min=0.03), optimizer)
    params = {"total_num_steps": STEPS, "warmup_num_steps": 0, "min_ratio": 0.1}
    function = lr_function(section("WarmupCosineDecayLR", params), 0.3)
    assert [function(step) for step in range(STEPS)] == pytest.approx(wanted)

    optimizer = optimizer_of(0.3)
    wanted = torch_trace(PolynomialLR(optimizer, STEPS, power=2.0), optimizer)
    params = {"total_num_steps": STEPS, "warmup_num_steps": 0, "power": 2.0}
    function = lr_function(section("WarmupPolyLR", params), 0.3)
    assert [function(step) for step in range(STEPS)] == pytest.approx(wanted, abs=1e-9)

    optimizer = optimizer_of(0.3)
    wanted = torch_trace(LinearLR(optimizer, 0.25, total_iters=20), optimizer)
    params = {"milestones": [1000], "warmup_num_steps": 20, "warmup_min_ratio": 0.25}
    function = lr_function(section("WarmupMultiStepLR", params), 0.3)
    assert [function(step) for step in range(STEPS)] == pytest.approx(wanted)


def test_megdets_long_policy() -> None:
    """Divided by 10 after epochs 11 and 14, then by 2 after 17 (one step per epoch here)."""
    params = {"milestones": [11, 14, 17], "gamma": [0.1, 0.1, 0.5], "warmup_num_steps": 0}
    function = lr_function(section("WarmupMultiStepLR", params), 0.32)
    assert [function(e) for e in (0, 10, 11, 13, 14, 16, 17)] == pytest.approx(
        [0.32, 0.32, 0.032, 0.032, 0.0032, 0.0032, 0.0016]
    )


def test_values_at_the_ends() -> None:
    params = {"total_num_steps": 50, "warmup_num_steps": 10, "min_ratio": 0.1}
    for kind in ("WarmupCosineDecayLR", "WarmupPolyLR"):
        function = lr_function(section(kind, params), 1.0)
        assert function(0) == pytest.approx(1e-3) and function(10) == 1.0
        assert function(50) == pytest.approx(0.1) and function(10**6) == pytest.approx(0.1)
        assert all(function(s + 1) < function(s) for s in range(10, 50)), kind
    assert math.isclose(
        lr_function(section("WarmupPolyLR", {"total_num_steps": 4, "warmup_num_steps": 9}), 1.0)(9),
        1.0,
    )


@pytest.mark.parametrize("name", ["WarmupMultiStepLR", "WarmupCosineDecayLR", "WarmupPolyLR", "WarmupLR"])
def test_an_lr_of_zero_stays_zero(name: str) -> None:
    params = {"milestones": [5]} if name == "WarmupMultiStepLR" else {"total_num_steps": 9}
    params = {"warmup_num_steps": 3} | ({"warmup_max_lr": 0.0} if name == "WarmupLR" else params)
    optimizer = torch.optim.SGD([{"params": [torch.zeros(1)], "name": "all"}], lr=0.0)
    schedule = LrSchedule(optimizer, lr_function(section(name, params), 0.0), 0.0)
    for _ in range(9):
        assert schedule.get_last_lr() == [0.0]
        schedule.step()


@pytest.mark.parametrize(
    ("name", "params", "key"),
    [
        ("WarmupLR", {"warmup_max_lr": 1e-3}, "warmup_max_lr"),
        ("OneCycle", {"cycle_min_lr": 0.0, "cycle_max_lr": 1e-3}, "cycle_max_lr"),
        ("LRRangeTest", {}, "lr_range_test_min_lr"),
    ],
)
def test_an_lr_of_zero_with_the_schedules_own_lr_is_refused(
    name: str, params: dict[str, Any], key: str
) -> None:
    raw = {
        "train_batch_size": 8,
        "optimizer": {"type": "AdamW", "params": {"lr": 0.0}},
        "scheduler": {"type": name, "params": params},
        "giantdet": {"train": {"steps": 10}},
    }
    with pytest.raises(ConfigError, match=f"lr is 0, and scheduler.params.{key} is 0.001"):
        resolve(parse_run(raw), world_size=1)
