"""All parts of the challenge system in one cascade under ZeRO, on two ranks, one of them without objects.

The reference is the same steps in plain PyTorch in one process.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import MODELS, launch_ok

WORKER = Path(__file__).with_name("worker_architectures.py")
STAGES = (2, 3)
MODEL: dict[str, Any] = {
    **MODELS["cascade_mask_rcnn"],
    "fpn": {"channels": 16, "large_kernel": {"size": 7, "width": 8}, "context": {"levels": [4, 5]}},
    "box_head": {**MODELS["cascade_mask_rcnn"]["box_head"], "sampling": {"type": "ohem"}},
    "semantic_branch": {"enabled": True, "convs": 1, "width": 16, "embed": True},
}


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory, demo_data: Path) -> dict[str, Any]:
    """The results of all cases, from one launch."""
    own = {"kind": "cascade_mask_rcnn", "data": str(demo_data), "giantdet__model": MODEL}
    cases: dict[str, dict[str, Any]] = {"hand": {**own, "by_hand": True}}
    for stage in STAGES:
        cases[str(stage)] = {**own, "zero_optimization__stage": stage}
    cases["bf16"] = {**own, "zero_optimization__stage": 3, "bf16__enabled": True}
    folder = tmp_path_factory.mktemp("challenge")
    launch_ok(WORKER, 2, folder, json.dumps(cases))
    return {name: torch.load(folder / f"{name}.pt") for name in cases}


@pytest.mark.parametrize("stage", STAGES)
def test_stage_equals_plain_pytorch(found: dict[str, Any], stage: int) -> None:
    """Losses, weights and AGVM's variances agree; AGVM's modules include the semantic branch."""
    mine, hand = found[str(stage)], found["hand"]
    assert mine["losses"] == pytest.approx(hand["losses"], rel=1e-5)
    assert len(set(hand["losses"])) == len(hand["losses"]) > 2
    assert mine["weights"].keys() == hand["weights"].keys()
    distances = {name: (weight - hand["weights"][name]).abs() for name, weight in mine["weights"].items()}
    assert {name: float(d.max()) for name, d in distances.items() if d.max() > 1e-4} == {}
    for step, measured in enumerate(hand["measured"]):
        for key in ("variances", "factors"):
            assert mine["measured"][step][key] == pytest.approx(measured[key], abs=1e-4), (step, key)
    assert "semantic_branch" in measured["factors"]


def test_bf16_stays_near_float32(found: dict[str, Any]) -> None:
    assert found["bf16"]["losses"] == pytest.approx(found["2"]["losses"], rel=0.05)
    assert all(weight.isfinite().all() for weight in found["bf16"]["weights"].values())
