"""Every architecture under ZeRO on two ranks, one of them without objects in one step; AGVM's measurements.

Both are compared with the same steps in plain PyTorch in one process.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import MODELS, launch_ok

WORKER = Path(__file__).with_name("worker_architectures.py")
STAGES = range(4)
Found = dict[str, dict[str, Any]]


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory, demo_data: Path) -> Found:
    """The results of all cases, from one launch."""
    cases: dict[str, dict[str, Any]] = {}
    for kind in MODELS:
        own = {"kind": kind, "data": str(demo_data)}
        cases[f"{kind}_hand"] = {**own, "by_hand": True}
        for stage in STAGES:
            cases[f"{kind}_{stage}"] = {**own, "zero_optimization__stage": stage}
        cases[f"{kind}_bf16"] = {**own, "zero_optimization__stage": 3, "bf16__enabled": True}
    folder = tmp_path_factory.mktemp("architectures")
    launch_ok(WORKER, 2, folder, json.dumps(cases))
    return {name: torch.load(folder / f"{name}.pt") for name in cases}


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("kind", MODELS)
def test_stage_equals_plain_pytorch(found: Found, kind: str, stage: int) -> None:
    """Losses agree to 1e-5, weights to a twentieth of one step at LR 2e-3, all but 1 % of them to 2e-6.

    The last bit of a sum can flip a ReLU or the winner of a max pool, whose gradient then goes elsewhere.
    """
    mine, hand = found[f"{kind}_{stage}"], found[f"{kind}_hand"]
    assert mine["losses"] == pytest.approx(hand["losses"], rel=1e-5)
    assert len(set(hand["losses"])) == len(hand["losses"]) > 2
    assert mine["weights"].keys() == hand["weights"].keys()
    distances = {name: (weight - hand["weights"][name]).abs() for name, weight in mine["weights"].items()}
    assert {name: float(d.max()) for name, d in distances.items() if d.max() > 1e-4} == {}
    assert torch.cat([d.flatten() for d in distances.values()]).gt(2e-6).float().mean() < 0.01


@pytest.mark.parametrize("kind", MODELS)
def test_bf16_stays_near_float32(found: Found, kind: str) -> None:
    mine = found[f"{kind}_bf16"]
    assert all(map(math.isfinite, mine["losses"]))
    assert mine["losses"] == pytest.approx(found[f"{kind}_0"]["losses"], rel=0.05)
    assert all(weight.isfinite().all() for weight in mine["weights"].values())


@pytest.mark.parametrize("kind", MODELS)
def test_agvm_measures_the_top_level_parts(found: Found, kind: str) -> None:
    """All parts with parameters; in the step in which a rank has no object, those that trained on both."""
    full, half, last = (step["variances"].keys() for step in found[f"{kind}_hand"]["measured"])
    modules = found[f"{kind}_hand"]["measured"][-1]["factors"].keys()
    assert full == last == modules and half <= modules and len(modules) > 2
    for step, hand in enumerate(found[f"{kind}_hand"]["measured"]):
        for stage in STAGES:
            mine = found[f"{kind}_{stage}"]["measured"][step]
            for key in ("variances", "factors"):
                assert mine[key] == pytest.approx(hand[key], abs=1e-4), (stage, step, key)
    assert len(set(hand["factors"].values())) == len(modules), "no factor moved: the test is vacuous"
