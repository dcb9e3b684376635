"""Multi-scale testing in a run at ZeRO-3 on two ranks, against one process."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from tiny import launch_ok, tiny_run

from giantdet import load_predictor
from giantdet.data.demo import make_demo

WORKER = Path(__file__).with_name("worker_train.py")
VALIDATION = 3  # images: one rank gets a batch of padding


def test_ranks_predict_the_same_as_one_process(tmp_path: Path) -> None:
    data = tmp_path / "data"
    make_demo(data, 4, VALIDATION, 64, 0)
    raw = tiny_run(
        data,
        tmp_path / "run",
        zero_optimization__stage=3,
        train_micro_batch_size_per_gpu=1,
        giantdet__train__steps=1,
        giantdet__eval__tta={"short_sides": [48, 80]},
    )
    file = tmp_path / "run.json"
    file.write_text(json.dumps(raw))
    launch_ok(WORKER, 2, file)
    found = json.loads((tmp_path / "run/results.json").read_text())
    predictor = load_predictor(tmp_path / "run/export", "cpu")
    images = json.loads((data / "val.json").read_text())["images"]
    assert len(images) == VALIDATION
    for image in images:
        expected = predictor(data / "val" / image["file_name"], 0.0, tta=predictor.config.tta)
        ours = [result for result in found if result["image_id"] == image["id"]]
        assert len(ours) == len(expected.names) > 0
        assert [r["score"] for r in ours] == pytest.approx(expected.scores_D.tolist(), abs=1e-4)
        assert all("segmentation" in result for result in ours)
