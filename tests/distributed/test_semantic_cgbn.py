"""Semantic models with CGBN on 2 real processes; the comparison is in worker_semantic_cgbn.py."""

from __future__ import annotations

from pathlib import Path

from tiny import launch_ok

WORKER = Path(__file__).with_name("worker_semantic_cgbn.py")


def test_two_ranks_equal_the_whole_batch() -> None:
    for _, out, _ in launch_ok(WORKER, 2):
        assert out.count("PASSED") == 2
