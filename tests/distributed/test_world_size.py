"""One training on 1, 2 and 4 ranks, and runs that change their number of ranks and ZeRO stage on the way.

Global batch 8 in micro-batches of 2 throughout: each batch norm and each step sees the same images.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from tiny import set_path, tiny_run

from giantdet.checkpoint.files import SavedTensors, scan
from giantdet.engine.metrics import read_metrics

STEPS = 4
# (ranks, {run: (ZeRO stage, last step)}), one launch after another. A run that exists is resumed.
# Each number of ranks resumes from each other one.
LAUNCHES: list[tuple[int, dict[str, tuple[int, int]]]] = [
    (1, {"a": (1, 1), "b": (3, 1), "sgd1": (1, 10)}),
    (
        2,
        {"straight": (2, 4), "a": (2, 2), "c": (3, 2), "d": (0, 2), "bf16": (2, 2), "sgd2": (1, 10)}
        | {"straight_cgbn": (2, 4), "cgbn": (1, 2)},
    ),
    (4, {"a": (3, 3), "b": (1, 2), "d": (2, 4), "bf16": (3, 3), "cgbn": (3, 4), "sgd4": (1, 10)}),
    (1, {"a": (1, 4), "c": (0, 4), "other_batch": (2, 7), "float32": (1, 3)}),
    (2, {"b": (3, 4)}),
]
# Runs that start from the second step of another run.
COPIES = {"other_batch": "d", "float32": "bf16"}


def settings_of(run: str) -> dict[str, Any]:
    settings: dict[str, Any] = {
        "train_batch_size": 8,
        "train_micro_batch_size_per_gpu": 2,
        "gradient_accumulation_steps": "auto",
        # eps: far above rounding noise, which would otherwise be amplified to steps as large as the LR
        "optimizer": {"type": "AdamW", "params": {"lr": 0.002, "weight_decay": 0.05, "eps": 1e-4}},
        "giantdet__agvm": {"enabled": True, "estimator": "all_splits", "start_step": 0, "interval": 1},
        "giantdet__ema": {"enabled": True, "decay": 0.5},
        "giantdet__train__save_every": 1,
        "giantdet__train__keep": 10,
        "giantdet__model__backbone__frozen_stages": 1,
        "giantdet__data__val": None,
    }
    if run.startswith("sgd"):
        return settings | {
            "optimizer": {"type": "SGD", "params": {"lr": 0.02, "momentum": 0.9, "weight_decay": 1e-4}},
            "giantdet__norm": {"type": "frozen"},
            "giantdet__lr_scaling": {"reference_batch": 16, "rule": "linear"},
            "giantdet__agvm": {"enabled": False},
            "giantdet__ema": {"enabled": True, "decay": 0.0},
            "giantdet__train__save_every": 0,
        }
    if run == "other_batch":
        return settings | {
            "train_batch_size": 3,
            "train_micro_batch_size_per_gpu": 3,
            "giantdet__lr_scaling": {"reference_batch": 8, "rule": "linear"},
            "giantdet__agvm": {"enabled": False},
        }
    if "cgbn" in run:
        settings |= {"giantdet__norm": {"type": "cgbn", "bn_size": 4}, "giantdet__agvm": {"enabled": False}}
    return settings | {"bf16__enabled": run == "bf16"}


def write_runs(
    folder: Path, number: int, hops: dict[str, tuple[int, int]], data: Path, weights: Path
) -> list[Path]:
    """Write the JSON files of a launch; all runs start from the same weights, at ZeRO-3 too."""
    files = []
    for run, (stage, steps) in hops.items():
        if run in COPIES:
            shutil.copytree(folder / COPIES[run] / "checkpoints/step_2", folder / run / "checkpoints/step_2")
        raw = tiny_run(data, folder / run, **settings_of(run), zero_optimization__stage=stage)
        if not (folder / run).exists():  # a resumed run must load everything, frozen weights too
            set_path(raw, "giantdet.model.init_weights", str(weights))
        set_path(raw, "giantdet.train.steps", steps)
        files.append(folder / f"{run}_{number}.json")
        files[-1].write_text(json.dumps(raw))
    return files


@pytest.fixture(scope="module")
def runs(trained: Path) -> Path:
    return trained / "world"


def _losses(run: Path) -> list[float]:
    return [line["loss"] for line in read_metrics(run / "metrics.jsonl") if "loss" in line]


def _weights(run: Path) -> dict[str, torch.Tensor]:
    return load_file(run / "export/model.safetensors")


def _contents(checkpoint: Path) -> dict[str, torch.Tensor]:
    """All tensors of a checkpoint, assembled by hand; each element must be in exactly one file.

    Except running statistics, which each rank has of its own: their mean.
    """
    shapes = {name: p["shape"] for name, p in SavedTensors(checkpoint).state["parameters"].items()}
    found: dict[str, torch.Tensor] = {}
    written: dict[str, torch.Tensor] = {}
    buffers: dict[str, list[torch.Tensor]] = {}
    for path in sorted(checkpoint.glob("rank_*.safetensors")):
        with safe_open(path, "pt") as file:
            for key in file.keys():  # noqa: SIM118
                if key.startswith("buffer/"):
                    buffers.setdefault(key, []).append(file.get_tensor(key))
                    continue
                part, first, name = file.get_tensor(key), int(file.metadata()[key]), key.split("/", 1)[1]
                size = 1 if part.dim() == 0 else torch.Size(shapes[name]).numel()
                whole = found.setdefault(key, torch.zeros(size, dtype=part.dtype))
                whole[first : first + part.numel()] = part.flatten()
                count = written.setdefault(key, torch.zeros(size, dtype=torch.int32))
                count[first : first + part.numel()] += 1
    assert [key for key, count in written.items() if not count.eq(1).all()] == []
    means = {key: torch.stack(every).double().mean(0).to(every[0].dtype) for key, every in buffers.items()}
    return found | means


def test_ranks_and_accumulation_train_the_same(runs: Path) -> None:
    """4 ranks, 2 ranks with 2 micro-steps, 1 rank with 4: ten steps of SGD."""
    losses = {world: _losses(runs / f"sgd{world}") for world in (1, 2, 4)}
    assert len(losses[1]) == 10 and losses[1][-1] < losses[1][0]
    assert losses[4] == pytest.approx(losses[1], rel=1e-5)
    assert losses[2] == pytest.approx(losses[1], rel=1e-5)
    for world in losses:
        # With decay 0 the average equals the weights of the last step, whatever the number of micro-steps.
        run = runs / f"sgd{world}"
        trained = SavedTensors(run / "checkpoints/step_10")
        for name, weight in _weights(run).items():
            if not trained.has("buffer", name):
                assert torch.equal(weight.flatten(), trained.read("weight", name, 0, weight.numel())), name


HOPS = [(run, ranks, *hop) for ranks, hops in LAUNCHES for run, hop in hops.items() if "s" not in run]


@pytest.mark.parametrize("run", ["a", "b", "c", "d", "bf16", "cgbn"])
def test_loaded_state_equals_saved_state(runs: Path, run: str) -> None:
    """Weights, moments, step counts, averages, running statistics: bit for bit, before any step."""
    saved = runs / run / "checkpoints"
    resumed = sorted(path.name for path, _ in scan(runs / run / "again"))
    assert resumed == sorted(f"step_{steps}" for name, _, _, steps in HOPS if name == run)[:-1]
    for name in resumed:
        before, after = _contents(saved / name), _contents(runs / run / "again" / name)
        kinds = {key.split("/")[0] for key in before}
        assert kinds == {"weight", "exp_avg", "exp_avg_sq", "step", "ema", "buffer"}
        assert before.keys() == after.keys()
        assert [key for key in before if not torch.equal(before[key], after[key])] == []
        one, other = (SavedTensors(runs / run / folder / name).state for folder in ("checkpoints", "again"))
        assert (one["ranks"], one["zero_stage"]) != (other["ranks"], other["zero_stage"])
        same = ("step", "images", "agvm", "ema_steps", "parameters")
        assert {key: one[key] for key in same} == {key: other[key] for key in same}
        if run not in ("bf16", "cgbn"):
            assert len(set(one["agvm"]["factors"].values())) > 2
        frozen = [n for n in one["parameters"] if f"weight/{n}" in before and f"ema/{n}" not in before]
        assert len(frozen) == 3


@pytest.mark.parametrize("run", ["a", "b", "c", "d", "cgbn"])
def test_a_run_on_changing_ranks_equals_the_straight_run(runs: Path, run: str) -> None:
    """Losses agree to 1e-5; averaged weights within the bounds of test_zero.py, for the same reasons."""
    straight = runs / ("straight_cgbn" if run == "cgbn" else "straight")
    assert len(_losses(straight)) == STEPS
    assert _losses(runs / run) == pytest.approx(_losses(straight), rel=1e-5)
    mine, theirs = _weights(runs / run), _weights(straight)
    names = [name for name in mine if not name.endswith(("running_mean", "running_var", "tracked"))]
    distances = torch.cat([(mine[name] - theirs[name]).abs().flatten() for name in names])
    assert distances.max() < 1e-4 and distances.gt(2e-6).float().mean() < 0.01
    assert torch.cat([theirs[name].flatten() for name in names]).abs().max() > 0.1


def test_float32_resumes_bf16(runs: Path) -> None:
    before, after = (_contents(runs / name / "step_2") for name in ("bf16/checkpoints", "float32/again"))
    assert before.keys() == after.keys()
    assert [key for key in before if not torch.equal(before[key], after[key])] == []
    types = {
        p["dtype"] for p in SavedTensors(runs / "float32/checkpoints/step_3").state["parameters"].values()
    }
    assert types == {"float32"} and len(_losses(runs / "float32")) == 1


def test_another_batch_size_resumes_at_the_images_seen(runs: Path) -> None:
    """16 images are 5 steps of 3 and one more image; the LR follows the batch size."""
    run = runs / "other_batch"
    lines = read_metrics(run / "metrics.jsonl")
    assert [line["step"] for line in lines] == [6, 7]
    assert lines[0]["lr"] == pytest.approx(0.002 * 3 / 8)
    manifests = {path.name: manifest for path, manifest in scan(run / "checkpoints")}
    assert {name: m["images"] for name, m in manifests.items() if m} == {
        "step_2": 16,
        "step_6": 18,
        "step_7": 21,
    }
    assert (
        "16 images in 2 steps are 5 steps of this run's batch of 3; 1 of them are seen again"
        in (runs.parent / "3.err").read_text()
    )
