"""The checks that qualify a GPU pass at toy sizes on the CPU, and report all rows. No time is asserted."""

from __future__ import annotations

import json
import os
import re
import sys
from pathlib import Path

from tiny import REPO, environment, logs, run_together

ROWS = {
    "correct": [
        "versions",
        "NMS",
        "NMS by class",
        "sampling",
        *(f"RoIAlign, {dtype}, {n} points" for dtype in ("float32", "bfloat16") for n in (2, "adaptive")),
        *(
            f"CGBN, {dtype}, {layout}"
            for dtype in ("float32", "bfloat16")
            for layout in ("contiguous_format", "channels_last")
        ),
        "losses, float32",
        "gradients, float32",
        "detections, float32",
        "a step without synchronisation",
        "CUDA graph",
        "losses of 5 steps",
    ],
    "frozen": ["Mask R-CNN R50, two stages frozen, eager, 2 images"],
    "norms": ["batch norms of R50, 4 images of 800"],
    "agvm": ["AGVM, all_splits, ZeRO-1", "AGVM, all_splits, ZeRO-2", "AGVM, half_split, ZeRO-2"],
    "giants": ["toy"],
    "whole": ["demo", "loader"],
}
"""Checks by group, in the order of the report. `speed` is left out: `frozen` runs its code."""
WITHOUT_LIMIT = {"versions", "CUDA graph", *(row for key in ROWS if key != "correct" for row in ROWS[key])}


def test_all_groups_report(tmp_path: Path) -> None:
    command = [sys.executable, str(REPO / "scripts" / "qualify_gpu.py"), "--device", "cpu", "--toy"]
    command += ["--output", str(tmp_path), "--seconds", "1500", "--only", *ROWS]
    (ended,) = run_together([(command, environment())])
    files = "\n".join(f"{path.name}: {path.read_text()[-2000:]}" for path in tmp_path.glob("*.log"))
    assert ended.code == 0, f"{logs([ended])}\n{files}"
    found = [json.loads(line) for line in (tmp_path / "rows.jsonl").read_text().splitlines()]
    expected = [(group, row) for group, rows in ROWS.items() for row in (*rows, f"{group}: group")]
    assert [(row["group"], row["check"]) for row in found] == expected
    for row in found:
        free = row["check"] in WITHOUT_LIMIT or row["check"].endswith(": group")
        assert row["passed"] is (None if free else True), row
    speeds = next(row["found"] for row in found if row["group"] == "giants")
    rate, share = re.search(r"([\d.]+) images/s .* (\d+)% of the matrix rate", speeds).groups()  # type: ignore[union-attr]
    assert float(rate) > 0 and float(share) >= 0


def test_a_failed_group_is_reported(tmp_path: Path) -> None:
    """A group that cannot start fails its row and sets the exit code."""
    command = [sys.executable, str(REPO / "scripts" / "qualify_gpu.py"), "--device", "cpu", "--toy"]
    command += ["--output", str(tmp_path), "--only", "norms"]
    (tmp_path / "torch.py").write_text("raise ImportError('no torch')")
    broken = environment()
    broken["PYTHONPATH"] = f"{tmp_path}{os.pathsep}{broken['PYTHONPATH']}"
    (ended,) = run_together([(command, broken)])
    assert ended.code == 1, logs([ended])
    (row,) = [json.loads(line) for line in (tmp_path / "rows.jsonl").read_text().splitlines()]
    assert row["passed"] is False and "see norms.log" in row["found"]
    assert "no torch" in (tmp_path / "norms.log").read_text()
