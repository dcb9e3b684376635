"""AGVM at every ZeRO stage on real processes, compared with a brute force over each shard's gradient."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from deepspeed.accelerator import get_accelerator
from tiny import REPO, launch_ok

WORKER = Path(__file__).with_name("worker_agvm.py")
Results = Callable[[int, str], dict[str, Any]]
SGD = {"optimizer": "SGD", "params": {"lr": 0.1, "momentum": 0.9, "weight_decay": 1e-4}}
ADAMW = {
    "optimizer": "AdamW",
    "params": {"lr": 0.01, "betas": [0.9, 0.99], "eps": 1e-6, "weight_decay": 0.05},
}
AGVM = {"enabled": True, "interval": 2, "start_step": 2, "momentum": 0.5}


def agvm(**more: Any) -> dict[str, Any]:
    return {"agvm": AGVM | more}


def case(optimizer: dict[str, Any], stage: int, estimator: str, **more: Any) -> dict[str, Any]:
    own = (
        "rule",
        "reference_batch",
        "preconditioned",
        "interval",
        "start_step",
        "stop_step",
        "look_ahead",
        "momentum",
    )
    settings = {key: more.pop(key) for key in list(more) if key in own}
    return {**optimizer, "stage": stage, **agvm(estimator=estimator, **settings), **more}


FORMS = {
    "sgd_half": (SGD, "half_split", {}),
    "sgd_all": (SGD, "all_splits", {}),
    "adamw_half": (ADAMW, "half_split", {}),
    "adamw_all": (ADAMW, "all_splits", {}),
    "adamw_all_raw": (ADAMW, "all_splits", {"preconditioned": False}),
}
TWO: dict[str, dict[str, Any]] = {}
for form, (optimizer, estimator, more) in FORMS.items():
    for stage in range(4):
        TWO[f"{form}{stage}"] = case(optimizer, stage, estimator, **more)
        TWO[f"{form}{stage}_accumulate_clip"] = case(
            optimizer, stage, estimator, accumulation=4, clip=0.3, wide=3, **more
        )


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Results:
    """A function that returns a case's results; each world is launched once, with all of its cases."""
    folder, found = tmp_path_factory.mktemp("agvm"), set()

    def result(world: int, name: str) -> dict[str, Any]:
        if world not in found:
            found.add(world)
            (folder / str(world)).mkdir()
            cases = MORE[world] | (TWO | HALF | golden_cases(REPO.parent / "shared") if world == 2 else {})
            launch_ok(WORKER, world, folder / str(world), json.dumps(cases))
        content: dict[str, Any] = torch.load(folder / str(world) / f"{name}.pt")
        return content

    return result


def assert_equal(found: dict[str, Any], tolerance: float = 1e-4) -> None:
    moved = False
    for step, (mine, hand) in enumerate(zip(found["deepspeed"], found["hand"], strict=True)):
        for key in ("variances", "factors"):
            assert mine[key] == pytest.approx(hand[key], abs=tolerance), (step, key)
        for name, weight in hand["weights"].items():
            torch.testing.assert_close(mine["weights"][name], weight, atol=2e-5, rtol=1e-3)
        moved = moved or any(abs(f - 1) > 0.01 for f in hand["factors"].values())
    assert moved, "no factor moved away from 1: the test is vacuous"


@pytest.mark.parametrize("name", TWO)
def test_equals_brute_force(results: Results, name: str) -> None:
    assert_equal(results(2, name))


def test_stages_agree(results: Results) -> None:
    for form in FORMS:
        for suffix in ("", "_accumulate_clip"):
            first = results(2, f"{form}0{suffix}")["deepspeed"]
            for stage in (1, 2, 3):
                for a, b in zip(first, results(2, f"{form}{stage}{suffix}")["deepspeed"], strict=True):
                    assert a["variances"] == pytest.approx(b["variances"], abs=1e-4)
                    assert a["factors"] == pytest.approx(b["factors"], abs=1e-4)


def test_schedules_never_see_the_factors(results: Results) -> None:
    """After each step the groups have their original LR again."""
    for name in TWO:
        for record in results(2, name)["deepspeed"]:
            assert set(record["lr"].values()) == {TWO[name]["params"]["lr"]}, name


NOISE_SCALE = {"rule": "noise_scale", "reference_batch": 4, "accumulation": 2}
PAIRS = {"norm_ranks": 2, "without_objects": 1, "accumulation": 2, "clip": 0.3, "wide": 3}
MORE: dict[int, dict[str, dict[str, Any]]] = {
    1: {
        "halves_of_micro_batches": case(ADAMW, 2, "half_split", accumulation=4),
        "all_splits": case(SGD, 3, "all_splits", accumulation=4),
    },
    2: {
        "adam_from_step_0": case(ADAMW, 2, "half_split", start_step=0, interval=1),
        "adam_from_step_0_stage_3": case(ADAMW, 3, "all_splits", start_step=0, interval=1),
        "every_step": case(SGD, 1, "all_splits", start_step=0, interval=1),
        "stop": case(SGD, 2, "half_split", stop_step=5),
        "frozen_module": case(ADAMW, 2, "half_split", frozen=True),
        "frozen_module_stage_3": case(ADAMW, 3, "all_splits", frozen=True),
        "resumed": case(ADAMW, 2, "half_split", resume_after=4),
        "resumed_norms": case(SGD, 3, "all_splits", resume_after=4),
        **{f"window{s}": case(SGD, s, "all_splits", clip=0.3, clip_range=[3, 5]) for s in range(4)},
        **{f"blocks{s}": case(ADAMW, s, "half_split", checkpoint_blocks=True) for s in range(4)},
        **{f"blocks_norms{s}": case(SGD, s, "all_splits", checkpoint_blocks=True) for s in range(4)},
        **{f"offload{s}": case(ADAMW, s, "half_split", offload=True) for s in (1, 2, 3)},
        "uniform": case(SGD, 2, "half_split", rule="uniform"),
        "inverse": case(ADAMW, 1, "all_splits", rule="inverse"),
        "noise_scale_sgd": case(SGD, 1, "all_splits", **NOISE_SCALE),
        "noise_scale_uniform": case(SGD, 2, "all_splits", **NOISE_SCALE | {"rule": "noise_scale_uniform"}),
        "noise_scale_adamw": case(ADAMW, 3, "all_splits", resume_after=4, **NOISE_SCALE),
        "offload_norms": case(ADAMW, 3, "all_splits", offload=True, preconditioned=False),
    },
    3: {
        "odd_world": case(ADAMW, 2, "half_split", accumulation=2),
        "odd_world_stage_3": case(SGD, 3, "half_split", accumulation=2),
        "odd_world_all_splits": case(ADAMW, 3, "all_splits"),
    },
    4: {
        "adamw_half2": case(ADAMW, 2, "half_split"),
        "adamw_half3": case(ADAMW, 3, "half_split", accumulation=4, clip=0.3),
        "sgd_all1": case(SGD, 1, "all_splits", accumulation=4),
        "sgd_all3": case(SGD, 3, "all_splits", clip=0.3),
        "adamw_all0": case(ADAMW, 0, "all_splits"),
        # Batch norms over pairs of ranks, which are the shards; the second rank has no objects.
        **{f"pairs_sgd{stage}": case(SGD, stage, "all_splits", **PAIRS) for stage in range(4)},
        **{f"pairs_adamw{stage}": case(ADAMW, stage, "all_splits", **PAIRS) for stage in range(4)},
    },
}


@pytest.mark.parametrize(("world", "name"), [(world, name) for world in MORE for name in MORE[world]])
def test_world_sizes_and_corner_cases(results: Results, world: int, name: str) -> None:
    assert_equal(results(world, name))


GOLDEN = {
    "ws2_sgd_float64": {"optimizer": "SGD", "params": {"lr": 0.1, "momentum": 0.9, "weight_decay": 1e-4}},
    "ws2_sgd_clip": {
        "optimizer": "SGD",
        "params": {"lr": 0.1, "momentum": 0.9, "weight_decay": 1e-4},
        "clip": 0.25,
        "clip_range": [3, 10],
    },
    "ws2_adam_float64": {"optimizer": "Adam", "params": {"lr": 0.01, "betas": [0.9, 0.99]}},
    "ws2_adamw_mom05": {
        "optimizer": "AdamW",
        "params": {"lr": 0.01, "betas": [0.9, 0.99], "weight_decay": 0.05},
    },
}


@pytest.mark.parametrize("stage", range(4))
@pytest.mark.parametrize("name", GOLDEN)
def test_traces_of_the_released_code(shared: Path, results: Results, name: str, stage: int) -> None:
    """Similarities, factors and weights equal those of the authors' hook (in float64), at every stage."""
    trace = json.loads((shared / f"golden/{name}.json").read_text())
    modules = ("backbone", "neck", "head")
    for mine, theirs in zip(results(2, f"{name}{stage}")["deepspeed"], trace["steps"], strict=True):
        where = theirs["iter"]
        if theirs["similarities"] is not None:
            found_ones = [mine["variances"][m] for m in modules]
            assert found_ones == pytest.approx(theirs["similarities"], abs=1e-5), where
        assert [mine["factors"][m] for m in modules] == pytest.approx(theirs["scale_factors"], abs=1e-5), (
            where
        )
        for weight, total in theirs["param_sum"].items():
            assert float(mine["weights"][weight].double().sum()) == pytest.approx(total, abs=1e-4), where


def golden_cases(shared: Path) -> dict[str, dict[str, Any]]:
    """The cases of the golden traces at every stage; empty if the traces are missing."""
    cases: dict[str, dict[str, Any]] = {}
    for name in GOLDEN if (shared / "golden").is_dir() else ():
        trace = json.loads((shared / f"golden/{name}.json").read_text())
        settings = {
            "enabled": True,
            "interval": trace["case"]["hook"]["lr_update_interval"],
            "start_step": trace["case"]["hook"]["lr_update_start_iter"],
            "momentum": trace["case"]["hook"]["momentum"],
            "look_ahead": "released",
        }
        for stage in range(4):
            cases[f"{name}{stage}"] = {
                **GOLDEN[name],
                "stage": stage,
                "agvm": settings,
                "golden": str(shared / "golden/inputs_ws2.npz"),
                "steps": len(trace["steps"]),
            }
    return cases


HALF = {
    f"{name}{stage}_{accumulation}": case(
        ADAMW, stage, name, precision="bf16", accumulation=accumulation, wide=3
    )
    for name in ("half_split", "all_splits")
    for stage in range(4)
    for accumulation in (1, 4)
}
if get_accelerator().is_fp16_supported():  # not by all CPUs
    # The loss is multiplied by 256: a sum that is not divided again is far off.
    HALF |= {
        f"fp16_{form}{stage}": case(
            optimizer, stage, estimator, precision="fp16", accumulation=2, clip=0.3, wide=3, **more
        )
        for form, (optimizer, estimator, more) in FORMS.items()
        for stage in (1, 2, 3)
    }


@pytest.mark.parametrize("name", HALF)
def test_half_precision_stays_near_float32(results: Results, name: str) -> None:
    found = results(2, name)
    for mine, hand in zip(found["deepspeed"], found["hand"], strict=True):
        assert mine["variances"] == pytest.approx(hand["variances"], abs=0.1)
        assert mine["factors"] == pytest.approx(hand["factors"], abs=0.1)


def test_invalid_settings_give_one_line_that_says_what_to_do() -> None:
    _, out, _ = launch_ok(WORKER.with_name("worker_agvm_errors.py"), 1)[0]
    found = [line for line in out.splitlines() if line.startswith("REFUSED")]
    words = ["needs two ranks", 'take "all_splits"', "agvm.anchor 'backbone'", "name the groups"]
    words += ["no pattern fits", "lower bound first", 'needs agvm.estimator "all_splits"']
    words += ["needs agvm.reference_batch"]
    assert len(found) == len(words)
    assert all(word in line for word, line in zip(words, found, strict=True)), found
