"""A frozen backbone under ZeRO on two ranks: training equals plain PyTorch, and the backbone does not change.

One rank's images contain no object. Each run is saved before its last step, and resumed from other weights.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import launch_ok

WORKER = Path(__file__).with_name("worker_frozen.py")
# Drop path and recomputation only apply to training, and have no effect here.
VIT = {"name": "test_vit", "window": 2, "frozen": True, "drop_path_rate": 0.5, "checkpoint_blocks": True}
RESNET = {"name": "test_resnet", "frozen": True}
# At stage 3 no weight is whole on all ranks, and about two blocks are prefetched.
PARTITIONED = {
    "stage": 3,
    "stage3_param_persistence_threshold": 0,
    "stage3_prefetch_bucket_size": 60_000,
    "stage3_max_reuse_distance": 0,
}
AGVM = {"enabled": True, "anchor": "fpn", "interval": 1, "start_step": 0, "estimator": "all_splits"}


def _case(stage: int, bf16: bool = False, **more: Any) -> dict[str, Any]:
    zero = PARTITIONED if stage == 3 else {"stage": stage}
    own = {"zero_optimization": zero, "giantdet__model__backbone": VIT, "bf16": {"enabled": bf16}}
    return own | more


CASES = {
    "hand": _case(0, by_hand=True),
    "hand_bf16": _case(1, True, by_hand=True),
    "hand_bf16_stage0": _case(0, True, by_hand=True),
    "hand_resnet": _case(0, by_hand=True, giantdet__model__backbone=RESNET),
    **{f"zero{s}{'_bf16' * b}": _case(s, bool(b)) for s in range(4) for b in (0, 1)},
    **{f"zero{s}_resnet": _case(s, giantdet__model__backbone=RESNET) for s in (0, 3)},
    "zero3_agvm": _case(3, giantdet__agvm=AGVM),
}
RUNS = [name for name in CASES if not name.startswith("hand")]


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    folder = tmp_path_factory.mktemp("frozen")
    launch_ok(WORKER, 2, folder, json.dumps(CASES))
    return {name: torch.load(folder / f"{name}.pt", weights_only=False) for name in CASES}


@pytest.mark.parametrize("name", [name for name in RUNS if "agvm" not in name])
def test_losses_and_norms_equal_plain_pytorch(found: dict[str, dict[str, Any]], name: str) -> None:
    hand = "hand" + name[5:] + ("_stage0" if name == "zero0_bf16" else "")
    exactness = 2e-3 if "bf16" in name else 1e-5
    mine, reference = found[name], found[hand]
    assert mine["losses"] == pytest.approx(reference["losses"], rel=exactness)
    if name not in ("zero0", "zero0_resnet"):  # stage 0 in float32 keeps no norm
        assert mine["norms"] == pytest.approx(reference["norms"], rel=10 * exactness)


@pytest.mark.parametrize("name", RUNS)
def test_backbone_is_bit_identical(found: dict[str, dict[str, Any]], name: str) -> None:
    """Both the model and the averaged weights are unchanged."""
    unmoved = found[name]["unmoved"]
    assert all(unmoved) and len(unmoved) > 80
    assert found[name]["modes"] == {False}, "in evaluation mode after engine.train()"


@pytest.mark.parametrize("name", RUNS)
def test_no_training_state_for_the_backbone(found: dict[str, dict[str, Any]], name: str) -> None:
    """No activations, gradients, float32 copies, moments or averages; at stage 3 each rank has half of it."""
    mine, stage = found[name], int(name[4])
    assert mine["saved"] == 0 and mine["gradients"] == [] and mine["linked"] == []
    assert mine["backbone"] > 2 * mine["trained"], "otherwise a share of it could hide in the padding"
    share = mine["trained"] / (2 if stage else 1)
    assert share <= mine["owned"] <= 1.01 * share
    assert 2 * share <= mine["moments"] <= 2 * 1.01 * share
    assert not any(group.startswith("backbone") for group in mine["groups"])
    assert mine["averages"] == ["box_head", "fpn", "mask_head", "rpn"]
    assert mine["held"] == pytest.approx(mine["backbone"] / (2 if stage == 3 else 1), rel=0.01)
    assert mine["dtypes"] == {torch.bfloat16 if "bf16" in name else torch.float32}


@pytest.mark.parametrize("name", ["zero3", "zero3_bf16", "zero3_agvm"])
def test_weights_are_prefetched_and_released(found: dict[str, dict[str, Any]], name: str) -> None:
    """DeepSpeed records the order of modules in the first step, and prefetches from the second on.

    After the forward pass only the positions are still gathered, which the adapter reads from the body.
    """
    mine = found[name]
    assert mine["linears"] == 24 and mine["early"] == [0, 24, 24]
    assert mine["gathered"] == ["body.pos_embed"]


@pytest.mark.parametrize("name", RUNS)
def test_a_resumed_run_continues(found: dict[str, dict[str, Any]], name: str) -> None:
    assert found[name]["resumed"] == pytest.approx(found[name]["losses"][-1], rel=1e-6)


def test_agvm_measures_the_other_modules(found: dict[str, dict[str, Any]]) -> None:
    variances = found["zero3_agvm"]["variances"]
    assert set(variances) == {"fpn", "rpn", "box_head", "mask_head"}
    assert all(0 < variance < 2 for variance in variances.values())
