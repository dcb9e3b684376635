"""The values computed by `lr_scaling` reach DeepSpeed's optimizer, on two real ranks."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import launch_ok

WORKER = Path(__file__).with_name("worker_optim.py")
LR, DECAY, EPS = 0.002, 0.05, 1e-4  # EPS: worker_zero's, for an optimizer named "AdamW"
# 2 ranks x 2 images with a reference batch of 2 images: kappa is 2.
SCALING = {"reference_batch": 2, "rule": "sqrt", "betas": "sde", "weight_decay": "timescale"}
ADAM: dict[str, Any] = {"lr": LR, "weight_decay": DECAY, "betas": [0.9, 0.999]}
BY_HAND: dict[str, Any] = {
    "lr": LR * math.sqrt(2),
    "weight_decay": DECAY * math.sqrt(2),
    "betas": [0.8, 0.998],
    "eps": EPS / math.sqrt(2),
}
CASES: dict[str, dict[str, Any]] = {
    **{
        f"scaled{stage}": {
            "zero_optimization__stage": stage,
            "optimizer": {"type": "AdamW", "params": ADAM},
            "giantdet__lr_scaling": SCALING,
        }
        for stage in (0, 2, 3)
    },
    # "adamw": worker_zero does not change its eps.
    "hand": {"by_hand": True, "optimizer": {"type": "adamw", "params": BY_HAND}},
    "hand_unscaled": {"by_hand": True, "optimizer": {"type": "AdamW", "params": ADAM}},
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("scaled")
    launch_ok(WORKER, 2, folder, json.dumps(CASES))
    return folder


def _weights(folder: Path, case: str) -> torch.Tensor:
    found = torch.load(folder / f"{case}.pt", weights_only=False)["parameters"]
    return torch.cat([found[name].flatten() for name in sorted(found)])


@pytest.mark.parametrize("stage", [0, 2, 3])
def test_optimizer_gets_the_scaled_values(folder: Path, stage: int) -> None:
    found = torch.load(folder / f"scaled{stage}.pt", weights_only=False)
    assert all(lr == pytest.approx(LR * math.sqrt(2)) for lr in found["lrs"][0].values())
    assert all(list(betas) == pytest.approx([0.8, 0.998]) for betas in found["betas"][0])
    hand = _weights(folder, "hand")
    wrong = (_weights(folder, "hand_unscaled") - hand).norm()
    assert (_weights(folder, f"scaled{stage}") - hand).norm() < 1e-3 * wrong
