"""Files of version 0.1, before a model had a `type`: its run is resumed, and its export predicts the same.

That version wrote `fixtures/run_of_0_1` in four steps on the demo set of `demo_data`: config.json, the
checkpoint of step 2, the losses of all steps, the export after step 4 and its COCO results.
"""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tiny import REPO, environment, logs, run_together

from giantdet.config.load import load_run
from giantdet.config.types import DataConfig
from giantdet.data.coco import CocoDataset
from giantdet.engine.evaluate import evaluate
from giantdet.engine.metrics import read_metrics
from giantdet.export import load_detector

FIXTURE = Path(__file__).resolve().parents[1] / "fixtures/run_of_0_1"


def test_a_run_is_resumed(demo_data: Path, tmp_path: Path) -> None:
    """Steps 3 and 4 from the checkpoint of step 2: the same losses and weights up to rounding."""
    output = tmp_path / "run"
    shutil.copytree(FIXTURE / "checkpoints", output / "checkpoints")
    overrides = [f"train.output={output}", f"data.train.images={demo_data / 'train'}"]
    overrides += [f"data.train.annotations={demo_data / 'train.json'}"]
    overrides += [f"data.val.annotations={demo_data / 'val.json'}", f"data.val.images={demo_data / 'val'}"]
    command = [sys.executable, str(REPO / "scripts/train.py"), "--config", str(FIXTURE / "config.json")]
    ended = run_together([([*command, *overrides], environment())], fresh=False)
    assert ended[0].code == 0, logs(ended)
    assert "step 2" in ended[0].out
    found = {line["step"]: line for line in read_metrics(output / "metrics.jsonl") if "loss" in line}
    wanted = {line["step"]: line for line in read_metrics(FIXTURE / "metrics.jsonl")}
    assert sorted(found) == [3, 4]
    for step, line in found.items():
        for name in (name for name in line if name.startswith("loss")):
            assert line[name] == pytest.approx(wanted[step][name], rel=1e-4), f"{name} of step {step}"
    mine, theirs = (load_file(run / "export/model.safetensors") for run in (output, FIXTURE))
    assert mine.keys() == theirs.keys()
    for name, tensor in mine.items():
        torch.testing.assert_close(tensor, theirs[name], atol=1e-4, rtol=1e-3, msg=name)


def test_an_export_predicts(demo_data: Path, tmp_path: Path) -> None:
    model, config = load_detector(FIXTURE / "export")
    assert config.model.type == "mask_rcnn"
    results = tmp_path / "results.json"
    evaluate(
        model,
        CocoDataset(demo_data / "val.json", demo_data / "val"),
        DataConfig(size=config.size, short_side=config.short_side, workers=0),
        1,
        torch.device("cpu"),
        tasks=model.tasks,
        model_config=config.model,
        classes=config.classes,
        results=results,
    )
    found, wanted = json.loads(results.read_text()), json.loads((FIXTURE / "results.json").read_text())
    assert len(found) == len(wanted) > 20
    for mine, theirs in zip(found, wanted, strict=True):
        assert (mine["image_id"], mine["category_id"]) == (theirs["image_id"], theirs["category_id"])
        assert mine["score"] == pytest.approx(theirs["score"], abs=1e-5)
        assert mine["bbox"] == pytest.approx(theirs["bbox"], abs=1e-2)


def test_a_resolved_json_stays_valid() -> None:
    run = load_run(FIXTURE / "config.json")
    assert run.giantdet.model.type == "mask_rcnn"
    assert run.giantdet.train.steps == 4
