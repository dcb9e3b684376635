"""The sections of optimizers and schedulers against the libraries that implement them."""

from __future__ import annotations

import inspect
from typing import Any

import pytest
import timm.optim
import torch
from deepspeed.runtime import lr_schedules

from giantdet.config.optimizers import OPTIMIZERS
from giantdet.config.schedulers import SCHEDULERS

OURS = {"WarmupMultiStepLR", "WarmupCosineDecayLR", "WarmupPolyLR"}
DEEPSPEEDS = [name for name, section in SCHEDULERS.items() if section.FROM_DEEPSPEED]


@pytest.mark.parametrize("name", DEEPSPEEDS)
def test_parameters_of_deepspeeds_schedulers(name: str) -> None:
    parameters = inspect.signature(getattr(lr_schedules, name).__init__).parameters
    accepted = set(parameters) - {"self", "optimizer", "last_batch_iteration"}
    fields = SCHEDULERS[name].model_fields
    assert set(fields) == accepted
    required = {n for n in accepted if parameters[n].default is inspect.Parameter.empty}
    # total_num_steps is set by resolve.
    assert required - {"total_num_steps"} == {n for n, field in fields.items() if field.is_required()}


def test_schedulers_are_deepspeeds_and_ours() -> None:
    assert set(SCHEDULERS) - set(DEEPSPEEDS) == OURS
    theirs = {lr_schedules.LR_RANGE_TEST, lr_schedules.ONE_CYCLE, lr_schedules.WARMUP_LR}
    theirs |= {lr_schedules.WARMUP_DECAY_LR, lr_schedules.WARMUP_COSINE_LR}
    assert set(DEEPSPEEDS) == theirs == set(lr_schedules.VALID_LR_SCHEDULES)


def test_parameters_of_optimizers() -> None:
    own = {"torch_adam", "adam_w_mode", "fp32_optimizer_states"}  # removed by DeepSpeed's engine
    built_by = {name: section.BUILT_BY for name, section in OPTIMIZERS.items()}
    assert {name for name, by in built_by.items() if by == "deepspeed"} == {"Adam", "AdamW", "SGD"}
    assert {name for name, by in built_by.items() if by == "giantdet"} == {"DeepSpeedMuon"}
    for name, section in OPTIMIZERS.items():
        if section.BUILT_BY == "giantdet":
            continue
        library: Any = timm.optim if section.BUILT_BY == "timm" else torch.optim
        accepted = inspect.signature(getattr(library, name)).parameters
        assert set(section.model_fields) - own <= set(accepted), name
        for key in set(section.model_fields) - own - {"lr", "weight_decay"}:
            assert section.model_fields[key].default == accepted[key].default, f"{name}.{key}"
        assert section.BUILT_BY == "timm" or not section.WHOLE_WEIGHTS


def test_defaults_of_deepspeeds_muon() -> None:
    from deepspeed.runtime.zero.muon.original_muon import NS_METHODS, MuonWithAuxAdam

    weight = torch.nn.Parameter(torch.zeros(2, 2))
    muon = MuonWithAuxAdam([{"params": [weight], "use_muon": True}]).param_groups[0]
    adam = MuonWithAuxAdam([{"params": [weight], "use_muon": False}]).param_groups[0]
    fields = OPTIMIZERS["DeepSpeedMuon"].model_fields
    for group, keys in ((muon, ("momentum", "ns_method")), (adam, ("betas", "eps"))):
        assert {key: fields[key].default for key in keys} == {key: group[key] for key in keys}
    assert set(NS_METHODS) == {"gram", "standard"}
