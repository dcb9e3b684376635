"""DeepSpeed's launcher on two hosts with their own addresses, by scripts/two_hosts.sh; with a network cut.

Skips with the script's reason where such hosts cannot be created.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from patience import wait_until
from tiny import REPO, demo_run, environment, logs, run_together, same_run

SCRIPT = str(REPO / "scripts/two_hosts.sh")


@pytest.fixture(scope="module")
def hosts(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The folder of two running hosts; they are stopped after the tests, however these end."""
    check = subprocess.run(["bash", SCRIPT, "check"], capture_output=True, text=True, check=False)
    if check.returncode != 0:
        pytest.skip(check.stderr.strip())
    folder = tmp_path_factory.mktemp("hosts")
    up = subprocess.Popen(
        ["setpriv", "--pdeathsig", "TERM", "bash", SCRIPT, "up", str(folder)],
        env=environment(),
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        assert up.stdout is not None
        assert "ready" in up.stdout.readline()
        yield folder
    finally:
        up.terminate()
        up.wait(timeout=30)


def _on(hosts: Path, host: str, *command: str) -> list[str]:
    return ["bash", SCRIPT, "on", str(hosts), host, *command]


def test_two_hosts_give_the_same_run_as_one(
    hosts: Path, one_host: Path, demo_data: Path, tmp_path: Path
) -> None:
    launcher = [sys.executable, "-m", "deepspeed.launcher.runner", "--hostfile", str(hosts / "hostfile")]
    launcher += ["--ssh_port=2222", "--master_addr=192.0.2.1", str(REPO / "scripts/train.py")]
    command = _on(hosts, "host1", *launcher, *demo_run(demo_data, tmp_path / "run"))
    ended = run_together([(command, environment(DS_ENV_FILE=str(hosts / "deepspeed_env")))])
    assert ended[0].code == 0, logs(ended)
    assert all(f"{host}: " in ended[0].out + ended[0].err for host in ("host1", "host2"))
    same_run(tmp_path / "run", one_host)


def test_network_cut_stops_both_sides_and_the_supervisor_continues(
    hosts: Path, demo_data: Path, tmp_path: Path
) -> None:
    """host1 resumes the run alone, with the same batch in twice as many micro-steps."""
    run, ranks = tmp_path / "run", tmp_path / "ranks"
    command = [sys.executable, str(REPO / "scripts/supervise.py"), "--hostfile", str(hosts / "hostfile")]
    command += ["--ssh_port=2222", "--answer_seconds=3", "--max_restarts=1", "--"]
    command += ["--enable_each_rank_log", str(ranks), str(REPO / "scripts/train.py")]
    command += [*demo_run(demo_data, run, steps=8), "train.timeout_minutes=0.15", "train.save_every=1"]
    variables = environment(
        DS_ENV_FILE=str(hosts / "deepspeed_env"),
        PDSH_SSH_ARGS_APPEND="-o ServerAliveInterval=2 -o ServerAliveCountMax=3",
    )
    with (tmp_path / "out").open("w+") as out:
        supervisor = subprocess.Popen(
            _on(hosts, "host1", *command),
            env=variables,
            cwd=REPO,
            stdout=out,
            stderr=subprocess.STDOUT,
        )
        try:
            _wait_until_it_trains(run / "metrics.jsonl", supervisor)
            subprocess.run(_on(hosts, "host2", "ip", "link", "set", "eth0", "down"), check=True)
            wait_until(lambda: supervisor.poll() is not None, [supervisor.pid], "end of the supervisor")
            code = supervisor.returncode
        finally:
            supervisor.kill()
            subprocess.run(_on(hosts, "host2", "ip", "link", "set", "eth0", "up"), check=True)
        out.seek(0)
        printed = out.read()
    assert code == 0, printed
    assert "1 of 2 hosts answer, not host2; restart 1 of 1 on host1" in printed
    first = {path.name.split("_")[1]: path.read_text() for path in sorted(ranks.iterdir(), reverse=True)}
    for rank in (0, 1):
        assert (
            f"giantdet: stopped: rank {rank} of 2 on host{rank + 1} lost contact" in first[f"rank{rank}.log"]
        )
    left = subprocess.run(_on(hosts, "host2", "pgrep", "-f", "train.py"), capture_output=True, check=False)
    assert left.returncode == 1, "the rank on host2 exited by itself"
    second = max(ranks.iterdir()).read_text()
    assert "batch 8 = 4 images x 2 accumulated x 1 ranks" in second
    assert "resuming after step " in second, "from a checkpoint of two ranks"
    assert (run / "export/model.safetensors").is_file()


def _wait_until_it_trains(metrics: Path, process: subprocess.Popen[bytes]) -> None:
    def trains() -> bool:
        assert process.poll() is None, "ended before it trained"
        return metrics.is_file() and metrics.read_text().count("\n") > 1

    wait_until(trains, [process.pid], "step was done")
