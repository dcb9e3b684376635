"""The tables of optimizers and schedulers against the libraries that they stand for."""

from __future__ import annotations

import inspect
from typing import Any

import pytest
import timm.optim
import torch
from deepspeed.runtime import lr_schedules

from giantdet.config import plugins

OURS = {"WarmupMultiStepLR", "WarmupCosineDecayLR", "WarmupPolyLR"}


@pytest.mark.parametrize("name", plugins.DEEPSPEED_SCHEDULERS)
def test_parameters_of_deepspeeds_schedulers(name: str) -> None:
    parameters = inspect.signature(getattr(lr_schedules, name).__init__).parameters
    accepted = set(parameters) - {"self", "optimizer", "last_batch_iteration"}
    assert set(plugins.SCHEDULERS[name]) == accepted
    required = {n for n in accepted if parameters[n].default is inspect.Parameter.empty}
    # total_num_steps is filled in by resolve.
    assert required - {"total_num_steps"} == set(plugins.SCHEDULER_REQUIRED.get(name, ()))


def test_schedulers_are_all_of_deepspeeds_and_ours() -> None:
    assert set(plugins.SCHEDULERS) - set(plugins.DEEPSPEED_SCHEDULERS) == OURS
    theirs = {lr_schedules.LR_RANGE_TEST, lr_schedules.ONE_CYCLE, lr_schedules.WARMUP_LR}
    theirs |= {lr_schedules.WARMUP_DECAY_LR, lr_schedules.WARMUP_COSINE_LR}
    assert set(plugins.DEEPSPEED_SCHEDULERS) == theirs == set(lr_schedules.VALID_LR_SCHEDULES)


def test_parameters_of_optimizers() -> None:
    own = {"torch_adam", "adam_w_mode", "fp32_optimizer_states"}  # taken out by DeepSpeed's engine
    libraries: dict[str, Any] = {name: torch.optim for name in ("Adam", "AdamW", "SGD")}
    libraries |= {name: timm.optim for name in plugins.TIMM_OPTIMIZERS}
    assert set(libraries) == set(plugins.OPTIMIZERS)
    for name, library in libraries.items():
        accepted = set(inspect.signature(getattr(library, name)).parameters)
        assert set(plugins.OPTIMIZERS[name]) - own <= accepted, name
    assert set(plugins.WHOLE_WEIGHT_OPTIMIZERS) < set(plugins.TIMM_OPTIMIZERS)
