"""The profile of a few steps: a valid trace, and a table of the most expensive operators."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import torch

from giantdet.tools.profile import RECORDED, SKIPPED, TOP, WARMUP, Profile


def test_profile(tmp_path: Path) -> None:
    """Three products of large matrices per step are the cost; the steps before are not profiled."""
    profile = Profile(tmp_path)
    large, small = torch.randn(400, 400), torch.randn(4)
    for step in range(SKIPPED + WARMUP + RECORDED + 2):
        for _ in range(3):
            large @ large
        for operator in (torch.sin, torch.cos, torch.exp, torch.tanh, torch.abs, torch.neg, torch.sqrt):
            operator(small)
        if step < SKIPPED + WARMUP:
            torch.linalg.inv(large)
        profile.step()
        assert profile.is_done == (step >= SKIPPED + WARMUP + RECORDED - 1)
    profile.close()
    lines = (tmp_path / "operators.txt").read_text().splitlines()
    assert len(lines) <= TOP + 2 and "CPU time of a step" in lines[-1]
    name, _, unit, share, calls = lines[1].split()
    assert (name, unit, float(calls)) == ("aten::mm", "ms", 3.0) and 50 < float(share.rstrip("%")) <= 100
    assert not any("inv" in line for line in lines)
    trace = json.loads(gzip.decompress((tmp_path / "trace.json.gz").read_bytes()))
    names = {event.get("name") for event in trace["traceEvents"]}
    assert "aten::mm" in names and not any("inv" in str(name) for name in names)


def test_a_run_that_ends_before_the_profile(tmp_path: Path) -> None:
    profile = Profile(tmp_path)
    torch.ones(3).sum()
    profile.step()
    profile.close()
    assert not (tmp_path / "operators.txt").exists()
