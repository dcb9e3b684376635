"""Optimizers, schedules, clipping in a window and averages of the weights, at every ZeRO stage.

Real processes are compared with plain PyTorch in one process; images of odd ranks contain no object.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import launch_ok
from worker_optim import STEPS

from giantdet.checkpoint.files import SavedTensors, scan
from giantdet.config.schedulers import SCHEDULERS
from giantdet.optim.schedules import lr_function

WORKER = Path(__file__).with_name("worker_optim.py")
TRAIN = Path(__file__).with_name("worker_train.py")

# eps: far above rounding noise, which would otherwise be amplified to steps as large as the LR.
OPTIMIZERS: dict[str, dict[str, Any]] = {
    "SGD": {"lr": 0.01, "momentum": 0.9, "weight_decay": 0.01, "nesterov": True},
    "Lion": {"lr": 1e-5, "betas": [0.9, 0.99], "weight_decay": 0.1},
    "Lamb": {"lr": 0.002, "betas": [0.9, 0.999], "eps": 1e-4, "weight_decay": 0.01},
    "Lars": {"lr": 0.1, "momentum": 0.9, "weight_decay": 0.01},
    "Muon": {"lr": 3e-3, "momentum": 0.9, "weight_decay": 0.01},
}
STAGES = {name: [0] if name in ("Lamb", "Lars", "Muon") else [0, 1, 2, 3] for name in OPTIMIZERS}
RATIO = {"warmup_min_ratio": 1e-3}  # what resolve() fills in; the expected LRs are computed without it
SCHEDULES: dict[str, dict[str, Any]] = {
    "WarmupLR": {"warmup_num_steps": 2, "warmup_max_lr": 0.01},
    "WarmupDecayLR": {"warmup_num_steps": 2, "total_num_steps": 5},
    "WarmupCosineLR": {"warmup_num_steps": 2, "total_num_steps": 5},
    "OneCycle": {"cycle_min_lr": 0.001, "cycle_max_lr": 0.01, "cycle_first_step_size": 2},
    "LRRangeTest": {"lr_range_test_min_lr": 0.001, "lr_range_test_step_size": 1},
    "WarmupMultiStepLR": {"warmup_num_steps": 2, "milestones": [3], "warmup_type": "exponential", **RATIO},
    "WarmupCosineDecayLR": {"warmup_num_steps": 2, "total_num_steps": 5, **RATIO},
    "WarmupPolyLR": {"warmup_num_steps": 2, "total_num_steps": 5, **RATIO},
}
LR = 0.002
GROUPS = {"layer_decay": 0.5, "lr_multipliers": {"fpn": 3.0}}
WINDOW: dict[str, Any] = {"gradient_clipping": 0.5, "giantdet__train__clip_window": [1, 1]}


def _optimizer(name: str) -> dict[str, Any]:
    # Muon orthogonalises in bf16, which amplifies the rounding of small gradients. The RPN's dense pass sums
    # gradients over all cells, in another order on two ranks than on one.
    sampled = {"giantdet__model__rpn__loss_pass": "sampled"} if name == "Muon" else {}
    return {"optimizer": {"type": name, "params": OPTIMIZERS[name]}, **sampled}


# Other ways in which DeepSpeed stores weights and states.
OFFLOAD = {"offload_optimizer": {"device": "cpu"}}
LAYOUTS: dict[str, dict[str, Any]] = {
    "round_robin": {"zero_optimization": {"stage": 2, "round_robin_gradients": True}},
    "aligned": {"zero_optimization": {"stage": 2, "parameter_alignment": True}},
    "sub_groups": {"zero_optimization": {"stage": 3, "sub_group_size": 3000}},
    "offload2": {"zero_optimization": {"stage": 2, **OFFLOAD}},
    "offload3": {"zero_optimization": {"stage": 3, **OFFLOAD, "offload_param": {"device": "cpu"}}},
}
IN_BF16: dict[str, dict[str, Any]] = {
    **{f"Adam{stage}_bf16": {"zero_optimization__stage": stage} for stage in (0, 2, 3)},
    "Adam1_float32_sums": {"zero_optimization__stage": 1, "data_types": {"grad_accum_dtype": "fp32"}},
}

CASES: dict[str, dict[str, Any]] = {
    **{f"hand_{name}": {"by_hand": True, **_optimizer(name)} for name in OPTIMIZERS},
    **{
        f"{name}{stage}": {"zero_optimization__stage": stage, **_optimizer(name)}
        for name, stages in STAGES.items()
        for stage in stages
    },
    **{f"{name}_bf16": {"bf16__enabled": True, **_optimizer(name)} for name in ("Lamb", "Lars", "Muon")},
    **{
        f"{name}{stage}": {
            "steps": 5,
            "zero_optimization__stage": stage,
            "scheduler": {"type": name, "params": params},
            "giantdet__param_groups": GROUPS,
        }
        for name, params in SCHEDULES.items()
        for stage in (range(4) if name in ("WarmupDecayLR", "OneCycle") else (3,))
    },
    "hand_window": {"by_hand": True, **WINDOW},
    **{f"window{stage}": {"zero_optimization__stage": stage, **WINDOW} for stage in range(4)},
    "window_bf16": {"zero_optimization__stage": 1, "bf16__enabled": True, **WINDOW},
    **{name: {**layout, **_optimizer("SGD")} for name, layout in LAYOUTS.items()},
    **{name: {**case, "bf16__enabled": True} for name, case in IN_BF16.items()},
    "hand_unclipped": {"by_hand": True},
    "hand_start": {"by_hand": True, "steps": 0},
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("optim")
    launch_ok(WORKER, 2, folder, json.dumps(CASES))
    return folder


def _found(folder: Path, case: str) -> dict[str, Any]:
    found: dict[str, Any] = torch.load(folder / f"{case}.pt", weights_only=False)
    return found


def _distances(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> torch.Tensor:
    assert one.keys() == other.keys()
    return torch.cat([(tensor - other[name]).abs().flatten() for name, tensor in one.items()])


@pytest.mark.parametrize(("name", "stage"), [(n, s) for n, stages in STAGES.items() for s in stages])
def test_optimizer_equals_plain_pytorch(folder: Path, name: str, stage: int) -> None:
    mine, reference = _found(folder, f"{name}{stage}"), _found(folder, f"hand_{name}")
    distances = _distances(mine["parameters"], reference["parameters"])
    moved = _distances(reference["parameters"], _found(folder, "hand_start")["parameters"])
    assert moved.mean() > 1e-6, "nothing was learnt: the test is vacuous"
    assert distances.max() < 1e-2 * moved.max() and distances.mean() < 1e-4 * moved.mean()


@pytest.mark.parametrize("name", ["Lamb", "Lars", "Muon"])
def test_optimizers_that_need_whole_weights_work_in_bf16(folder: Path, name: str) -> None:
    """Stage 0 in bf16 keeps one float32 weight per weight of the model, so norms are of whole weights."""
    mine, reference = _found(folder, f"{name}_bf16"), _found(folder, f"hand_{name}")
    assert mine["shapes"] == sorted(tuple(w.shape) for w in reference["parameters"].values())
    start = _found(folder, "hand_start")["parameters"]
    step = torch.cat([(w - start[n]).flatten() for n, w in mine["parameters"].items()])
    wanted = torch.cat([(w - start[n]).flatten() for n, w in reference["parameters"].items()])
    assert torch.cosine_similarity(step, wanted, dim=0) > 0.7


# Two types at all stages, the others at 3.
SCHEDULE_CASES = [(n, s) for n in SCHEDULES for s in range(4) if f"{n}{s}" in CASES]


@pytest.mark.parametrize(("name", "stage"), SCHEDULE_CASES)
def test_schedule_keeps_the_groups_ratios(folder: Path, name: str, stage: int) -> None:
    lrs = _found(folder, f"{name}{stage}")["lrs"]
    function = lr_function(SCHEDULERS[name].model_validate(SCHEDULES[name]), LR)
    layers = sorted({key.split("/")[1] for key in lrs[0] if key.startswith("backbone/layer")})
    assert len(layers) >= 4 and layers[0] == "layer_00"
    for step, found in enumerate(lrs):
        lr = function(step)
        wanted = {}
        for key in found:
            part, *rest = key.split("/")
            depth = len(layers) - layers.index(rest[0]) if part == "backbone" else 0
            wanted[key] = lr * 0.5**depth * (3.0 if part == "fpn" else 1.0)
        assert found == pytest.approx(wanted, rel=1e-6), step


def test_one_cycle_moves_the_momentum(folder: Path) -> None:
    for stage in range(4):
        betas = [step[0] for step in _found(folder, f"OneCycle{stage}")["betas"]]
        assert [b for b, _ in betas] == pytest.approx([0.8, 0.85, 0.8, 0.85, 0.9])


@pytest.mark.parametrize("stage", range(4))
def test_clipping_in_a_window(folder: Path, stage: int) -> None:
    mine, reference = _found(folder, f"window{stage}"), _found(folder, "hand_window")
    unclipped = _found(folder, "hand_unclipped")
    distances = _distances(mine["parameters"], reference["parameters"])
    assert distances.max() < 1e-4 and distances.gt(2e-6).float().mean() < 0.01
    assert _distances(reference["parameters"], unclipped["parameters"]).max() > 1e-3


@pytest.mark.parametrize("case", ["SGD0", "SGD1", "SGD2", "SGD3", "window0", "window1", "window2", "window3"])
def test_average_of_the_weights(folder: Path, case: str) -> None:
    mine, reference = _found(folder, case), _found(folder, "hand_window" if "w" in case else "hand_SGD")
    distances = _distances(mine["averages"], reference["averages"])
    assert distances.max() < 1e-4 and distances.gt(2e-6).float().mean() < 0.01
    assert _distances(mine["averages"], mine["parameters"]).max() > 1e-4
    assert _distances(mine["restored"], mine["parameters"]).max() == 0.0


def test_average_in_bf16(folder: Path) -> None:
    mine = _found(folder, "window_bf16")
    assert _distances(mine["restored"], mine["parameters"]).max() == 0.0
    for average in mine["averages"].values():
        assert torch.equal(average, average.bfloat16().float()), "the model computes in bf16"
    kept = SavedTensors(folder / f"window_bf16/step_{STEPS}")
    finer = torch.cat([kept.read("ema", n, 0, p.numel()) for n, p in mine["averages"].items()])
    assert not torch.equal(finer, finer.bfloat16().float()), "the average itself is float32"


BY_STAGE = [f"{name}{stage}" for name, stages in STAGES.items() for stage in stages]


@pytest.mark.parametrize("case", [*BY_STAGE, *LAYOUTS, *IN_BF16, "Lamb_bf16", "Muon_bf16"])
def test_checkpoint_holds_every_optimizers_state(folder: Path, case: str) -> None:
    """An engine that takes one more step and goes back is bit-identical; one process can read the file."""
    found, saved = _found(folder, case), SavedTensors(folder / case / "step_3")
    resumed = found["resumed"]
    states = {"SGD": {"momentum_buffer"}, "Lars": {"momentum_buffer"}, "Lion": {"exp_avg"}}
    states |= {name: {"exp_avg", "exp_avg_sq"} for name in ("Adam", "AdamW", "Lamb")}
    states["Muon"] = {"momentum_buffer", "exp_avg", "exp_avg_sq"}
    expected = {"weight", "ema", "buffer"} | states[saved.state["optimizer"]]
    assert resumed["kinds"] - {"step", "use_muon"} == expected
    assert resumed["different"] == [] and resumed["moved"] == resumed["kinds"] - {"use_muon"}
    # keep: 1, plus the best
    assert [path.name for path, _ in scan(folder / case)] == ["step_2", "step_3"]
    for name, weight in found["parameters"].items():
        dtype = getattr(torch, saved.state["parameters"][name]["dtype"])
        master, average = (saved.read(kind, name, 0, weight.numel()) for kind in ("weight", "ema"))
        assert torch.equal(master.view_as(weight).to(dtype).float(), weight), name
        assert torch.equal(average.view_as(weight).to(dtype).float(), found["averages"][name]), name
