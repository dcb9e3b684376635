"""Runs that several test files share: starting processes takes longer than training in them."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
from tiny import REPO, demo_run, environment, free_port, launch_ok, logs, run_together

WORKER = Path(__file__).with_name("worker_train.py")


@pytest.fixture(scope="session")
def trained(tmp_path_factory: pytest.TempPathFactory, demo_data: Path, tiny_export: Path) -> Path:
    """The folder with `resume` and `world`: the runs of test_resume.py and test_world_size.py."""
    import test_resume
    import test_world_size

    folder = tmp_path_factory.mktemp("trained")
    resume, world = folder / "resume", folder / "world"
    resume.mkdir()
    world.mkdir()
    for number, (ranks, hops) in enumerate(test_world_size.LAUNCHES):
        files = test_world_size.write_runs(world, number, hops, demo_data, tiny_export)
        if number == test_resume.FIRST_LAUNCH:
            files += test_resume.write_first(resume, demo_data)
        if number == test_resume.SECOND_LAUNCH:
            files += test_resume.write_second(resume, demo_data)
        ended = launch_ok(WORKER, ranks, *files)
        (folder / f"{number}.err").write_text(ended[0].err)
    return folder


@pytest.fixture(scope="session")
def one_host(demo_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run on two ranks, started by the plain deepspeed launcher."""
    output = tmp_path_factory.mktemp("one_host") / "run"
    launcher = [sys.executable, "-m", "deepspeed.launcher.runner", "--num_accelerators", "2"]
    command = [*launcher, f"--master_port={free_port()}", str(REPO / "scripts/train.py")]
    ended = run_together([([*command, *demo_run(demo_data, output)], environment())])
    assert ended[0].code == 0, logs(ended)
    return output
