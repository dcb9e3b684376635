"""Runs of `engine.train.train` on two ranks: stopped and resumed, and evaluated, at every ZeRO stage.

One launch trains 6 steps without a stop and, into other folders, 3 steps; a second launch resumes the latter
up to step 6, one of them from the checkpoint before its newest, which is corrupted. On CPUs in float32 both
must be equal bit for bit: weights, losses, LRs.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from pycocotools.coco import COCO
from safetensors.torch import load_file
from tiny import REPO, launch, logs, mounted, set_path, tiny_run

from giantdet.checkpoint.files import SavedTensors, damage, scan
from giantdet.config.types import DataConfig
from giantdet.data.coco import CocoDataset
from giantdet.engine.evaluate import evaluate
from giantdet.engine.metrics import read_metrics
from giantdet.export import ExportConfig, export_checkpoint, load_detector, read_export_config

STAGES = [0, 1, 2, 3]
FIRST_LAUNCH, SECOND_LAUNCH = 1, 4  # positions among the launches of conftest.py
STEPS, STOP = 6, 3
# Timings, and counts since the process started: they differ from run to run.
CLOCKS = ("images_per_second", "data_share", "memory_gib", "dropped_objects", "tiny_objects")


def _write(path: Path, raw: dict[str, Any]) -> Path:
    path.write_text(json.dumps(raw))
    return path


def settings_of(stage: int) -> dict[str, Any]:
    return {
        "zero_optimization__stage": stage,
        "gradient_accumulation_steps": 2 if stage in (1, 3) else 1,
        "scheduler": {
            "type": "WarmupCosineLR",
            "params": {"total_num_steps": STEPS, "warmup_num_steps": 2, "warmup_type": "linear"},
        },
        "giantdet__train__save_every": 1,
        "giantdet__train__async_save": stage in (1, 3),
        "giantdet__data__augment": {"short_sides": [48, 56, 64]},
        "giantdet__model__backbone__drop_path_rate": 0.3,
        "giantdet__norm": {"type": "cgbn" if stage > 1 else "local"},
        "gradient_clipping": 0.1,
        "giantdet__train__clip_window": [1, 4],
        "giantdet__ema": {"enabled": stage != 1, "decay": 0.5},
        "giantdet__agvm": {
            "enabled": True,
            "estimator": "all_splits" if stage > 1 else "half_split",
            "preconditioned": stage < 3,
            "interval": 2,
            "start_step": 1,
            "momentum": 0.5,
        },
    }


def write_runs(folder: Path, data: Path, steps: dict[str, int]) -> list[Path]:
    """Write the JSON files of the named runs, each with its number of steps, at every stage."""
    files = []
    for stage in STAGES:
        for name, count in steps.items():
            raw = tiny_run(data, folder / f"{name}{stage}", **settings_of(stage))
            set_path(raw, "giantdet.train.steps", count)
            files.append(_write(folder / f"{name}{stage}_{count}.json", raw))
    return files


def write_first(folder: Path, data: Path) -> list[Path]:
    return write_runs(folder, data, {"straight": STEPS, "stopped": STOP})


def write_second(folder: Path, data: Path) -> list[Path]:
    """One byte of the run at stage 2 is flipped: it resumes from step_2 and deletes a partial step_4."""
    for stage in STAGES:
        assert [p.name for p, _ in scan(folder / f"stopped{stage}/checkpoints")] == ["step_2", "step_3"]
    corrupted = folder / "stopped2/checkpoints/step_3/rank_00001.safetensors"
    content = bytearray(corrupted.read_bytes())
    content[len(content) // 2] ^= 1
    corrupted.write_bytes(content)
    shutil.copytree(corrupted.parent, folder / "stopped2/checkpoints/step_4.partial")
    return write_runs(folder, data, {"stopped": STEPS})


@pytest.fixture(scope="module")
def runs(trained: Path) -> Path:
    return trained / "resume"


def _weights(run: Path) -> dict[str, torch.Tensor]:
    return load_file(run / "export/model.safetensors")


def _lines(run: Path) -> list[dict[str, Any]]:
    lines = [line for line in read_metrics(run / "metrics.jsonl") if "loss" in line]
    return [{key: value for key, value in line.items() if key not in CLOCKS} for line in lines]


@pytest.mark.parametrize("stage", STAGES)
def test_resumed_equals_uninterrupted_bit_for_bit(runs: Path, stage: int) -> None:
    straight, stopped = runs / f"straight{stage}", runs / f"stopped{stage}"
    assert [line["step"] for line in _lines(straight)] == list(range(1, STEPS + 1))
    assert len({line["lr"] for line in _lines(straight)}) > 3, "the schedule changes the LR"
    factors = [line["agvm/mask_head/factor"] for line in _lines(straight)]
    assert factors[0] == 1.0 and len(set(factors)) > 2, "AGVM changes the factors"
    assert _lines(stopped) == _lines(straight)
    one, other = _weights(straight), _weights(stopped)
    assert one.keys() == other.keys()
    assert [name for name in one if not torch.equal(one[name], other[name])] == []


def test_corrupted_checkpoint_is_named_and_skipped(runs: Path) -> None:
    """The run resumed from the checkpoint before it equals the straight run, see above."""
    err = (runs.parent / f"{SECOND_LAUNCH}.err").read_text()
    problem = "step_3 is skipped: rank_00001.safetensors has changed since it was written (checksum)"
    assert err.count("is skipped") == err.count(problem) == 1
    for stage in STAGES:
        assert sorted(p.name for p in (runs / f"stopped{stage}/checkpoints").iterdir()) == [
            "step_5",
            "step_6",
        ]
    assert sorted(p.name for p in (runs / "stopped2/again").iterdir()) == ["step_2"]
    assert sorted(p.name for p in (runs / "stopped1/again").iterdir()) == ["step_3"]


def test_a_full_disk_only_fails_the_run_at_its_end(runs: Path, demo_data: Path, tmp_path: Path) -> None:
    """The disk has room for one checkpoint, which stays intact; the run trains to its end and is exported."""
    output = tmp_path / "run"
    settings = {"zero_optimization__stage": 1, "giantdet__data__val": None, "giantdet__train__save_every": 1}
    raw = tiny_run(demo_data, output, **settings, giantdet__train__steps=3)
    one = sum(file.stat().st_size for file in (runs / "straight1/checkpoints/step_6").iterdir())
    with mounted(output / "checkpoints", f"size={one * 3 // 2}"):
        command = ["--deepspeed_config", _write(tmp_path / "run.json", raw)]
        ended = launch(REPO / "scripts/train.py", 2, *command)
        assert [end.code for end in ended] == [2, 2], logs(ended)
        err = ended[0].err
        assert err.count("this checkpoint is not saved; the run continues") == 2
        assert err.count("giantdet: error") == 1 and "Traceback" not in err + ended[1].err
        assert "step_3.partial/rank_0000" in err and "No space left on device" in err
        assert [p.name for p in (output / "checkpoints").iterdir()] == ["step_1"]
        assert damage(output / "checkpoints/step_1") == []
    assert [line.get("failed_saves") for line in _lines(output)] == [None, None, 1]
    assert len(_weights(output)) > 50


@pytest.mark.parametrize("stage", STAGES)
def test_checkpoint_keeps_groups(runs: Path, stage: int) -> None:
    """The names of the groups are saved, so that a resume notices other parameter groups."""
    saved = SavedTensors(runs / f"stopped{stage}/checkpoints/step_{STEPS}").state["groups"]
    assert len(saved) == 10 and all(saved.count(name) == 1 for name in saved)


@pytest.mark.parametrize("stage", STAGES)
def test_exported_checkpoint_equals_exported_engine(runs: Path, stage: int, tmp_path: Path) -> None:
    run = runs / f"straight{stage}"
    config: ExportConfig = read_export_config(run / "export")
    export_checkpoint(run / f"checkpoints/step_{STEPS}", tmp_path, config)
    assert read_export_config(tmp_path) == config
    mine, engine = load_file(tmp_path / "model.safetensors"), _weights(run)
    assert mine.keys() == engine.keys()
    different = [name for name in mine if not torch.equal(mine[name], engine[name])]
    assert different == []


@pytest.mark.parametrize("stage", [0, 3])
def test_two_ranks_evaluate_as_one_process(runs: Path, demo_data: Path, tmp_path: Path, stage: int) -> None:
    """5 images on 2 ranks: one slot is padding."""
    run = runs / f"straight{stage}"
    found = json.loads((run / "results.json").read_text())
    detector, config = load_detector(run / "export")
    dataset = CocoDataset(demo_data / "val.json", demo_data / "val")
    data = DataConfig(size=config.size, short_side=config.short_side, workers=0)
    evaluate(
        detector,
        dataset,
        data,
        1,
        torch.device("cpu"),
        tasks=detector.tasks,
        model_config=config.model,
        classes=config.classes,
        results=tmp_path / "expected.json",
    )
    expected = json.loads((tmp_path / "expected.json").read_text())
    key = lambda r: (r["image_id"], -r["score"])  # noqa: E731
    assert len(found) == len(expected) > 20
    for mine, theirs in zip(sorted(found, key=key), sorted(expected, key=key), strict=True):
        assert mine == theirs
    truth = COCO(str(demo_data / "val.json"))
    assert {r["image_id"] for r in found} <= set(truth.getImgIds())
    assert json.loads((run / "scores.json").read_text())["box"]["AR100"] >= 0
