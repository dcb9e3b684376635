"""Every launcher starts scripts/train.py, with the same result as the plain deepspeed launcher.

Two launcher processes on this machine, each a "host" of one rank; test_two_hosts.py has hosts with their own
addresses. The three runs are launched in parallel: most of their time is spent starting processes.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest
from tiny import REPO, demo_run, environment, free_port, logs, run_together, same_run

from giantdet.distributed import comm

LAUNCHERS = ["deepspeed --no_ssh", "torchrun", "srun"]
VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
Command = tuple[list[str], dict[str, str]]


def _deepspeed(folder: Path, arguments: list[str]) -> list[Command]:
    """`deepspeed --no_ssh` on each of the two hosts of a hostfile."""
    hosts = folder / "hosts"
    hosts.write_text("one slots=1\ntwo slots=1\n")
    launcher = [sys.executable, "-m", "deepspeed.launcher.runner", "--quiet"]
    launcher += ["--hostfile", str(hosts), "--no_ssh"]
    launcher += ["--master_addr=127.0.0.1", f"--master_port={free_port()}"]
    return [([*launcher, f"--node_rank={node}", *arguments], environment()) for node in range(2)]


def _torchrun(arguments: list[str]) -> list[Command]:
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nnodes=2", "--nproc_per_node=1"]
    launcher += ["--rdzv_backend=c10d", f"--rdzv_endpoint=127.0.0.1:{free_port()}", "--rdzv_id=test"]
    return [([*launcher, *arguments], environment()) for _ in range(2)]


def _srun(arguments: list[str]) -> list[Command]:
    """The commands that srun would start, with its environment; address and port are derived from it."""
    job = {
        "SLURM_JOB_ID": str(free_port()),
        "SLURM_STEP_NODELIST": "127.0.0.[1-2]",
        "SLURM_NTASKS": "2",
        "SLURM_STEP_NUM_TASKS": "2",
        "SLURM_LOCALID": "0",
    }
    return [([sys.executable, *arguments], environment(SLURM_PROCID=str(task), **job)) for task in range(2)]


@pytest.fixture(scope="module")
def runs(demo_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder with one run per launcher."""
    folder = tmp_path_factory.mktemp("launchers")
    script = str(REPO / "scripts/train.py")
    of = {name: [script, *demo_run(demo_data, folder / name)] for name in LAUNCHERS}
    commands = _deepspeed(folder, of[LAUNCHERS[0]]) + _torchrun(of[LAUNCHERS[1]]) + _srun(of[LAUNCHERS[2]])
    for _, variables in commands:
        del variables["PYTHONWARNINGS"]  # what users see
    ended = run_together(commands)
    assert all(end.code == 0 for end in ended), logs(ended)
    for number, end in enumerate(ended):
        (folder / f"{LAUNCHERS[number // 2]}.{number % 2}.log").write_text(end.out + end.err)
    return folder


@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_launchers_give_the_same_run(launcher: str, runs: Path, one_host: Path) -> None:
    same_run(runs / launcher, one_host)


# Deprecation warnings of torch.distributed, which DeepSpeed causes; lines of DeepSpeed, of its launcher with
# --quiet; fragments of a bar that redraws itself.
NOISE = ("FutureWarning", "DeprecationWarning", "[INFO]", "[WARNING]", "\r")


@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_the_screen_is_ours(launcher: str, runs: Path) -> None:
    first, second = ((runs / f"{launcher}.{rank}.log").read_text() for rank in range(2))
    assert first.startswith("giantdet: mask_rcnn, test_resnet, ")
    assert "training: step 1/2 (50%), loss " in first and "done: step 2/2 (100%)" in first
    for text in (first, second):
        assert not [word for word in NOISE if word in text], text
    assert "training:" not in second


@pytest.mark.parametrize(
    ("nodes", "first"),
    [
        ("one", "one"),
        ("one,two", "one"),
        ("node[003-010,12]-ib,login", "node003-ib"),
        ("rack[1-2]n[03-04],x", "rack1n03"),
        ("10.0.0.[7,9]", "10.0.0.7"),
    ],
)
def test_master_address_of_srun(nodes: str, first: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """comm.start fails at the missing port, so no process group is joined."""
    _as_task(monkeypatch, SLURM_STEP_NUM_TASKS="8", SLURM_STEP_NODELIST=nodes)
    with pytest.raises(ValueError, match="MASTER_PORT is not set"):
        comm.start()
    assert {name: os.environ.get(name) for name in VARIABLES} == {
        "RANK": "5",
        "WORLD_SIZE": "8",
        "LOCAL_RANK": "1",
        "MASTER_ADDR": first,
        "MASTER_PORT": None,
    }


def test_srun_without_an_address_says_what_to_set(monkeypatch: pytest.MonkeyPatch) -> None:
    _as_task(monkeypatch, SLURM_STEP_NUM_TASKS="8")
    with pytest.raises(ValueError, match="MASTER_ADDR nor SLURM_STEP_NODELIST is set: export rank 0's host"):
        comm.start()


def _as_task(monkeypatch: pytest.MonkeyPatch, **more: str) -> None:
    """Set the environment of an srun task; what comm.start sets is undone after the test."""
    for name in VARIABLES:
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)
    for name, value in {"SLURM_PROCID": "5", "SLURM_LOCALID": "1", **more}.items():
        monkeypatch.setenv(name, value)
