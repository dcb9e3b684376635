"""CGBN on 2 and 4 real processes, one of them without images; the cases are in worker_cgbn.py."""

from __future__ import annotations

from pathlib import Path

import pytest
from tiny import launch_ok

WORKER = Path(__file__).with_name("worker_cgbn.py")


@pytest.mark.parametrize("world", [2, 4])
def test_equals_batchnorm_over_the_concatenated_batch(world: int) -> None:
    for _, out, _ in launch_ok(WORKER, world):
        assert out.count("PASSED") == 31
