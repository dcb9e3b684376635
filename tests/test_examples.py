"""The examples of the documentation run unchanged."""

from __future__ import annotations

import re
import shutil
from pathlib import Path
from typing import Any

from tiny import REPO, launch_ok


def test_agvm_in_a_foreign_loop() -> None:
    example = REPO / "docs/agvm_example.py"
    assert len(example.read_text().splitlines()) <= 60
    lines = [line for line in launch_ok(example, 2)[0].out.splitlines() if line.startswith("step ")]
    losses = [float(line.split()[3]) for line in lines]
    assert losses[-1] < 0.3 * losses[0]
    factors = [re.search(r"agvm/decoder/factor': '([\d.]+)'", line) for line in lines]
    assert factors[0] and factors[-1] and factors[0][1] == "1.000" != factors[-1][1]


def test_the_page_about_python(tiny_export: Path, demo_data: Path, tmp_path: Path, monkeypatch: Any) -> None:
    """All of its Python runs, block after block, on a run of the demo's classes."""
    shutil.copytree(tiny_export, tmp_path / "runs/mine/export")
    shutil.copytree(demo_data, tmp_path / "data")
    shutil.copy(sorted((demo_data / "val").iterdir())[1], tmp_path / "image.jpg")
    monkeypatch.chdir(tmp_path)
    blocks = re.findall(r"```python\n(.*?)```", (REPO / "docs/python.md").read_text(), re.DOTALL)
    assert len(blocks) >= 6 and len(blocks[0].strip().splitlines()) <= 7
    names: dict[str, Any] = {}
    for block in blocks:
        exec(block.replace("threshold=0.5", "threshold=0.0"), names)
    assert len(names["found"].names) > 0 and len(names["many"]) == 3
    assert len(names["coco_results"]) == len(names["found"].names)
    assert names["boxes"].shape == (1, 10, 4) and names["masks"][0].shape[:2] == (1, 10)
    for file in ("picture.jpg", "compared.png", "model.onnx"):
        assert (tmp_path / file).stat().st_size > 1000
