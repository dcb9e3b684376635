"""Fixtures of the tests that start real processes."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
from tiny import REPO, demo_run, environment, free_port, logs, run_together


@pytest.fixture(scope="session")
def one_host(demo_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run of two ranks, started by the plain deepspeed launcher."""
    output = tmp_path_factory.mktemp("one_host") / "run"
    launcher = [sys.executable, "-m", "deepspeed.launcher.runner", "--num_accelerators", "2"]
    command = [*launcher, f"--master_port={free_port()}", str(REPO / "scripts/train.py")]
    ended = run_together([([*command, *demo_run(demo_data, output)], environment())])
    assert ended[0].code == 0, logs(ended)
    return output
