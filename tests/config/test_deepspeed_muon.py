"""What DeepSpeedMuon refuses, in one line, and what a run with it resolves to."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from giantdet.config.load import parse_run
from giantdet.config.optimizers import AdamW, DeepSpeedMuon
from giantdet.config.resolve import resolve
from giantdet.config.resolved import ResolvedRun
from giantdet.errors import ConfigError
from giantdet.optim.optimizers import with_muon
from giantdet.optim.param_groups import parameter_groups


def resolved(stage: int, giantdet: dict[str, Any] | None = None, **deepspeed: Any) -> ResolvedRun:
    zero = {"stage": stage, **deepspeed.pop("zero", {})}
    raw = {
        "train_batch_size": 8,
        "optimizer": {"type": "deepspeedmuon", "params": {"lr": 0.02, "adam_lr": 1e-3}},
        "zero_optimization": zero,
        "giantdet": {"train": {"steps": 9}, **(giantdet or {})},
        **deepspeed,
    }
    return resolve(parse_run(raw), 2)


@pytest.mark.parametrize("stage", range(4))
def test_every_stage(stage: int) -> None:
    run = resolved(stage)
    assert isinstance(run.optimizer, DeepSpeedMuon) and "optimizer" not in run.deepspeed_json()
    assert run.zero.reduce_scatter == (stage != 3), "DeepSpeed's Muon at stage 3 needs all-reduce"
    assert resolved(0, gradient_clipping=1.0).clipping == 1.0


@pytest.mark.parametrize(
    ("stage", "settings", "message"),
    [
        (1, {"gradient_clipping": 1.0}, r"stage 1 DeepSpeed 0\.19\.8 would clip by the norm"),
        (3, {"gradient_clipping": 0.1}, "norm of Muon's updates"),
        (0, {"bf16": {"enabled": True}}, "set the stage to 1, 2 or 3"),
        (2, {"fp16": {"enabled": True}}, "not tested in fp16"),
        (2, {"zero": {"offload_optimizer": {"device": "cpu"}}}, "offload_optimizer: DeepSpeedMuon is not"),
        (3, {"zero": {"offload_param": {"device": "cpu"}}}, "offload_param: DeepSpeedMuon is not tested"),
        (2, {"zero": {"round_robin_gradients": True}}, "not tested with round_robin_gradients"),
        (3, {"zero": {"reduce_scatter": True}}, "cannot combine it with Muon at stage 3"),
        (1, {"giantdet": {"agvm": {"enabled": True, "estimator": "all_splits"}}}, 'set it to "half_split"'),
    ],
)  # fmt: skip
def test_refusals(stage: int, settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        resolved(stage, **settings)


def test_timms_muon_suggests_deepspeeds(stage: int = 2) -> None:
    raw = {"train_batch_size": 8, "optimizer": {"type": "Muon", "params": {"lr": 0.02}}}
    raw |= {"zero_optimization": {"stage": stage}, "giantdet": {"train": {"steps": 9}}}
    with pytest.raises(ConfigError, match="or DeepSpeedMuon"):
        resolve(parse_run(raw), 2)


def test_groups_are_split_and_keep_their_ratios() -> None:
    model = nn.ModuleDict({"body": nn.Sequential(nn.Conv2d(3, 4, 3), nn.Linear(4, 5), nn.LayerNorm(5))})
    model["body"].table = nn.Parameter(torch.zeros(7, 4))
    groups = parameter_groups(model, 0.1, 0.02, lr_multipliers={"body": 0.5})
    assert with_muon(model, groups, AdamW(lr=0.02)) == groups
    found = with_muon(model, groups, DeepSpeedMuon(lr=0.02, adam_lr=0.001, weight_decay=0.1))
    shapes = {g["name"]: ({tuple(p.shape) for p in g["params"]}, g["lr"], g["use_muon"]) for g in found}
    assert shapes == {
        "body/muon": ({(5, 4)}, pytest.approx(0.01), True),
        "body": ({(4, 3, 3, 3), (7, 4)}, pytest.approx(0.0005), False),
        "body/no_decay": ({(4,), (5,)}, pytest.approx(0.0005), False),
    }
