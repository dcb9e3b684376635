"""Models go to a hub and come back, over HTTP; what the card says."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from local_hub import local_hub
from tiny import REPO, tiny_run

from giantdet import cli, load_predictor

PIXELS = np.random.default_rng(1).integers(0, 256, (48, 64, 3), dtype=np.uint8)
SCRIPT = """
import sys, numpy
from giantdet import cli, load_predictor
run, pixels, boxes = sys.argv[1:]
for _ in range(2):  # the second time, the repository exists
    assert cli.main(["push", run, "me/shapes"]) == 0
predictor = load_predictor("hf_hub:me/shapes@main", "cpu")
numpy.save(boxes, predictor(numpy.load(pixels), threshold=0.0).boxes_D4.numpy())
assert cli.main(["predict", "hf_hub:me/none", "docs/demo.jpg"]) == 2
"""


@pytest.fixture
def run_folder(tiny_export: Path, tmp_path: Path) -> Path:
    """A run as training leaves it, with scores."""
    run = tmp_path / "run"
    shutil.copytree(tiny_export, run / "export")
    scores = {"box": {"AP": 0.5125, "AP50": 0.75, "APl": -1.0, "per_class": {"circle": 0.5}}}
    (run / "scores.json").write_text(json.dumps(scores))
    return run


def test_a_model_goes_to_the_hub_and_comes_back(run_folder: Path, tmp_path: Path) -> None:
    pixels, boxes = tmp_path / "pixels.npy", tmp_path / "boxes.npy"
    np.save(pixels, PIXELS)
    environment = {name: value for name, value in os.environ.items() if not name.lower().endswith("_proxy")}
    environment.pop("HF_HUB_OFFLINE", None)
    with local_hub() as (address, repositories):
        environment |= {"HF_ENDPOINT": address, "HF_HOME": str(tmp_path), "HF_TOKEN": "hf_token"}
        command = [sys.executable, "-c", SCRIPT, *map(str, (run_folder, pixels, boxes))]
        ended = subprocess.run(
            command, env=environment, cwd=REPO, capture_output=True, text=True, check=False
        )
    assert ended.returncode == 0, ended.stderr
    assert ended.stdout.splitlines() == [f"{address}/me/shapes"] * 2
    said = [line for line in ended.stderr.splitlines() if line.startswith("giantdet: error")]
    assert len(said) == 1 and "hf_hub:me/none: the hub does not give it" in said[0]
    files = repositories["me/shapes"]
    assert sorted(files) == ["README.md", "config.json", "model.safetensors"]
    for name in ("config.json", "model.safetensors"):
        assert files[name] == (run_folder / "export" / name).read_bytes()
    expected = load_predictor(run_folder, "cpu")(PIXELS, threshold=0.0)
    assert torch.equal(torch.from_numpy(np.load(boxes)), expected.boxes_D4)


def test_the_card(run_folder: Path, capsys: Any) -> None:
    arguments = ["push", str(run_folder), "me/shapes", "--card-only"]
    assert cli.main(arguments) == 0
    card = (run_folder / "export/README.md").read_text()
    assert capsys.readouterr().out.strip() == str(run_folder / "export/README.md")
    assert card.startswith("---\nlibrary_name: giantdet\npipeline_tag: object-detection\n")
    assert 'load_predictor("hf_hub:me/shapes")' in card
    assert "| box | AP | AP50 |\n|---|---|---|\n|  | 0.512 | 0.750 |" in card
    assert "4, with the ids of the training data: circle (1), rectangle (3), triangle (4), star (7)." in card
    assert "## Training" not in card and "license" not in card


def test_the_card_of_a_run_has_its_json_without_paths(run_folder: Path, demo_data: Path, capsys: Any) -> None:
    raw = tiny_run(demo_data, run_folder, giantdet__model__backbone__init_weights="/secret/weights.pth")
    raw |= {"train_batch_size": 2, "about": {"what": "Shapes for a test"}}
    raw["tensorboard"] = {"enabled": False, "output_path": "/secret/monitor"}
    raw["giantdet"]["data"]["classes"] = {"objects": [[1, "circle"]]}
    (run_folder / "config.json").write_text(json.dumps(raw))
    assert cli.main(["push", str(run_folder), "me/shapes", "--card-only"]) == 0
    card = (run_folder / "export/README.md").read_text()
    assert "Shapes for a test.\n" in card
    assert "2 steps with a batch of 2, AdamW with an LR of 0.002 (constant)" in card
    shown = json.loads(card.split("```json")[1].split("```")[0])
    assert shown["giantdet"]["model"]["backbone"]["name"] == "test_resnet"
    for path in ("/secret", str(demo_data), str(run_folder)):
        assert path not in card


def test_what_cannot_be_pushed(run_folder: Path, tmp_path: Path, capsys: Any) -> None:
    assert cli.main(["push", str(tmp_path / "none"), "me/shapes"]) == 2
    assert "not a giantdet export" in capsys.readouterr().err
    assert cli.main(["push", str(run_folder), "me/../shapes"]) == 2
    assert "the hub refuses it" in capsys.readouterr().err
