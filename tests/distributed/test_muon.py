"""DeepSpeedMuon at every ZeRO stage, compared with torch.optim's Muon (matrices) and AdamW (the rest).

Newton-Schulz iterations amplify rounding, so every tolerance comes from a run with perturbed weights.
Most cases orthogonalise in float32 in both libraries, where that tolerance is tight.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import launch_ok

WORKER = Path(__file__).with_name("worker_muon.py")
PARAMS = {
    "lr": 0.005,
    "adam_lr": 0.001,
    "momentum": 0.9,
    "weight_decay": 0.1,
    "betas": [0.9, 0.95],
    "eps": 1e-4,  # far above rounding noise, which would otherwise be amplified to steps as large as the LR
}


def case(stage: int, **settings: Any) -> dict[str, Any]:
    return {
        "zero_optimization__stage": stage,
        "optimizer": {"type": "DeepSpeedMuon", "params": PARAMS},
        "giantdet__model__rpn__loss_pass": "sampled",
        **settings,
    }


TWICE = {"gradient_accumulation_steps": 2}
OWN = {"float32_iterations": False}
BF16 = {"bf16__enabled": True, **OWN}
SUMS = {"data_types": {"grad_accum_dtype": "fp32"}}
CLIPPED = {"gradient_clipping": 0.5}
CASES: dict[str, dict[str, Any]] = {
    **{f"stage{stage}": case(stage) for stage in range(4)},
    **{f"twice{stage}": case(stage, **TWICE) for stage in (2, 3)},
    "own2": case(2, **OWN),
    **{f"bf16_{stage}": case(stage, **BF16) for stage in (2, 3)},
    "sums1": case(1, **BF16, **SUMS),
    "clipped0": case(0, **CLIPPED),
    "in_parts3": case(3, in_parts=True),
    # Loading the checkpoints of one layout in another, after the cases that save them.
    **{
        f"from_{source}_to_{stage}": case(stage, source=source, steps=6)
        for source, stage in (("stage2", 3), ("stage3", 1), ("stage0", 2), ("stage1", 0))
    },
    "hand_6": case(0, by_hand=0.0, steps=6),
    "hand_6_perturbed": case(0, by_hand=1e-6, steps=6),
}
for name, settings in {"": {}, "_twice": TWICE, "_own": OWN, "_clipped": CLIPPED}.items():
    CASES[f"hand{name}"] = case(0, by_hand=0.0, **settings)
    CASES[f"hand{name}_perturbed"] = case(0, by_hand=1e-6, **settings)
CASES["hand_bf16_perturbed"] = case(0, by_hand=2.0**-9, **OWN)
CASES["hand_start"] = case(0, by_hand=0.0, steps=0)
FOUR: dict[str, dict[str, Any]] = {
    **{f"stage{stage}": case(stage) for stage in (1, 3)},
    "hand": case(0, by_hand=0.0),
    "hand_perturbed": case(0, by_hand=1e-6),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("muon")
    launch_ok(WORKER, 2, folder, json.dumps(CASES))
    return folder


def _found(folder: Path, name: str) -> dict[str, Any]:
    found: dict[str, Any] = torch.load(folder / f"{name}.pt", weights_only=False)
    return found


def _distance(one: dict[str, Any], other: dict[str, Any], part: str = "") -> float:
    """The distance between the weights of a part of the model; in box_head mostly that of matrices."""
    one, other = one["parameters"], other["parameters"]
    assert one.keys() == other.keys()
    return float(torch.cat([(one[n] - other[n]).flatten() for n in one if n.startswith(part)]).norm())


def _check(folder: Path, name: str, hand: str, perturbed: str, margin: float, loss: float = 1e-5) -> None:
    """The run is as close to the reference as a perturbed reference, and that is close."""
    mine, reference, other = (_found(folder, n) for n in (name, hand, perturbed))
    for part in ("", "box_head"):
        assert _distance(mine, reference, part) < margin * _distance(other, reference, part)
    losses = zip(mine["losses"], reference["losses"][-len(mine["losses"]) :], strict=True)
    assert all(one == pytest.approx(two, rel=loss) for one, two in losses)


@pytest.mark.parametrize("name", [name for name in CASES if name.startswith(("stage", "twice"))])
def test_equals_torch(folder: Path, name: str) -> None:
    hand = "hand_twice" if name.startswith("twice") else "hand"
    _check(folder, name, hand, f"{hand}_perturbed", 0.1)
    moved = _distance(_found(folder, "hand"), _found(folder, "hand_start"))
    assert _distance(_found(folder, "hand"), _found(folder, "hand_perturbed")) < 1e-2 * moved


def test_equals_torch_up_to_the_rounding_of_16_bits(folder: Path) -> None:
    """DeepSpeed's iteration differs from torch's, so the two round differently."""
    _check(folder, "own2", "hand_own", "hand_own_perturbed", 6.0, loss=1e-3)


@pytest.mark.parametrize("name", ["bf16_2", "bf16_3", "sums1"])
def test_in_bf16(folder: Path, name: str) -> None:
    _check(folder, name, "hand_own", "hand_bf16_perturbed", 1.5, loss=0.05)


def test_clipping_at_stage_0(folder: Path) -> None:
    _check(folder, "clipped0", "hand_clipped", "hand_clipped_perturbed", 0.1)


def test_four_ranks(tmp_path: Path) -> None:
    launch_ok(WORKER, 4, tmp_path, json.dumps(FOUR))
    for stage in (1, 3):
        _check(tmp_path, f"stage{stage}", "hand", "hand_perturbed", 0.1)


@pytest.mark.parametrize("name", ["stage0", "stage1", "stage2", "stage3", "in_parts3"])
def test_groups(folder: Path, name: str) -> None:
    """Muon updates the linear layers; AdamW, with its own LR, the convolutions, norms and biases."""
    groups = _found(folder, name)["groups"]
    muons = {name: values for name, values in groups.items() if values[0]}
    assert muons == {"box_head/muon": (True, 0.005, 0.1)}
    assert groups["backbone"] == (False, 0.001, 0.1) and groups["box_head/no_decay"] == (False, 0.001, 0.0)
    assert _found(folder, "hand")["muon"] == 4
    assert _found(folder, name)["norm"] is None, "DeepSpeed reports the norm of the updates"


SAVED = [name for name in CASES if not name.startswith(("hand", "from", "twice"))]


@pytest.mark.parametrize("name", SAVED)
def test_checkpoint_is_exact(folder: Path, name: str) -> None:
    resumed = _found(folder, name)["resumed"]
    kinds = {"weight", "ema", "buffer", "momentum_buffer", "exp_avg", "exp_avg_sq", "step"}
    assert resumed["kinds"] == kinds and resumed["different"] == [] and resumed["moved"] == kinds


@pytest.mark.parametrize("name", [name for name in CASES if name.startswith("from")])
def test_checkpoint_of_another_stage(folder: Path, name: str) -> None:
    """The sixth step from a checkpoint of five equals that of a run of six."""
    _check(folder, name, "hand_6", "hand_6_perturbed", 0.1)
