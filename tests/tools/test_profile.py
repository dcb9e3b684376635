"""The profile of a few steps: a valid trace, and a table of the most expensive operators."""

from __future__ import annotations

import gzip
import json
from collections import Counter, defaultdict
from pathlib import Path
from typing import Any

import pytest
import torch

from giantdet.tools.profile import RECORDED, SKIPPED, TOP, WARMUP, Profile


def own_times(trace: dict[str, Any]) -> tuple[dict[str, float], Counter[str]]:
    """Return the ms that each operator of a trace took without those it called, and its number of calls."""
    events = [e for e in trace["traceEvents"] if e.get("cat") == "cpu_op"]
    own: dict[str, float] = defaultdict(float)
    open_calls: list[dict[str, Any]] = []
    for event in sorted(events, key=lambda e: (e["ts"], -e["dur"])):
        while open_calls and open_calls[-1]["ts"] + open_calls[-1]["dur"] <= event["ts"]:
            open_calls.pop()
        if open_calls:
            own[open_calls[-1]["name"]] -= event["dur"] / 1e3
        own[event["name"]] += event["dur"] / 1e3
        open_calls.append(event)
    return own, Counter(e["name"] for e in events)


def test_profile(tmp_path: Path) -> None:
    """The table has the own times of the trace's operators; the steps before are not profiled."""
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
    trace = json.loads(gzip.decompress((tmp_path / "trace.json.gz").read_bytes()))
    own, calls = own_times(trace)
    assert calls["aten::mm"] == 3 * RECORDED and not any("inv" in name for name in own)
    _, *lines, last = (tmp_path / "operators.txt").read_text().splitlines()
    total = sum(own.values())
    text, _, time = last.removesuffix(" ms").rpartition(" ")
    assert text == f"CPU time of a step, mean of {RECORDED}:"
    assert float(time) == pytest.approx(total / RECORDED, abs=0.06)
    assert len(lines) == min(TOP, len(own)) and lines[0].split()[0] == max(own, key=lambda name: own[name])
    for line in lines:
        name, time, _, share, count = line.split()
        assert float(time) == pytest.approx(own[name] / RECORDED, abs=0.006)  # rounded to 0.01 ms
        assert float(share.rstrip("%")) == pytest.approx(100 * own[name] / total, abs=0.06)
        assert float(count) == pytest.approx(calls[name] / RECORDED, abs=0.06)


def test_a_run_that_ends_before_the_profile(tmp_path: Path) -> None:
    profile = Profile(tmp_path)
    torch.ones(3).sum()
    profile.step()
    profile.close()
    assert not (tmp_path / "operators.txt").exists()
