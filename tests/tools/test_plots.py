"""The plots of a run and the command that draws them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from PIL import Image

from giantdet import cli
from giantdet.tools.plots import plot_agvm

REPO = Path(__file__).resolve().parents[2]


def write(path: Path, modulated: bool) -> Path:
    """Write ten lines of metrics; AGVM starts measuring at the fifth."""
    lines = []
    for step in range(1, 11):
        line = {"step": step, "loss": 1.0 / step, "lr": 0.1}
        if modulated:
            line |= {"agvm/backbone/factor": 1.0, "agvm/head/factor": 1.0 + 0.1 * max(0, step - 4)}
            if step > 4:
                line |= {"agvm/backbone/variance": 0.5, "agvm/head/variance": 0.2}
        lines.append(json.dumps(line))
    path.mkdir()
    (path / "metrics.jsonl").write_text("\n".join(lines) + "\n")
    return path


def test_command_draws_the_available_metrics(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["plot", str(write(tmp_path / "with", True))]) == 0
    assert (
        cli.main(["plot", str(write(tmp_path / "without", False)), "--output", str(tmp_path / "there")]) == 0
    )
    printed = [Path(line) for line in capsys.readouterr().out.split()]
    assert [p.name for p in printed] == ["losses.png", "agvm.png", "losses.png"]
    for picture in printed:
        with Image.open(picture) as image:
            assert len(image.convert("RGB").getcolors(1_000_000) or []) > 20, "more than an empty frame"


def test_bad_input_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["plot", str(tmp_path)]) == 2
    assert capsys.readouterr().err.count("\n") == 1
    with pytest.raises(ValueError, match="not enabled"):
        plot_agvm(write(tmp_path / "run", False) / "metrics.jsonl", tmp_path / "x.png")


def test_schedule_of_a_recipe(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """MegDet's long policy at batch 256: the paper's epochs in steps, its LRs, warmed up from batch 16's."""
    recipe = REPO / "ds_configs/megdet_resnet50_256_sgd_long.json"
    command = ["plot", "--schedule", str(recipe), "--gpus", "128", "--output", str(tmp_path)]
    assert cli.main([*command, "--images", "2560"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert "batch 256, 180 steps, SGD" in lines[0] and '"milestones": [110, 140, 170]' in lines[1]
    lrs = {int(line.split()[1]): float(line.split()[3]) for line in lines if line.startswith("  step")}
    assert lrs[0] == 0.02 and lrs[45] == 0.32 and lrs[135] == 0.032 and lrs[179] == 0.0016
    with Image.open(lines[-1]) as image:
        assert len(image.convert("RGB").getcolors(1_000_000) or []) > 20
    without = tmp_path / "without.json"
    raw = json.loads(recipe.read_text())
    del raw["scheduler"]
    without.write_text(json.dumps(raw))
    assert cli.main(["plot", "--schedule", str(without)]) == 2
    assert "no scheduler block; the learning rate stays 0.32" in capsys.readouterr().err
    assert cli.main(["plot"]) == 2
    assert "name the folder of a run" in capsys.readouterr().err
