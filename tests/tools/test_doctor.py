"""`giantdet doctor` on this machine: alone, on two ranks, and with two ranks that really differ."""

from __future__ import annotations

import re
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import REPO, Ended, environment, free_port, logs, run_together

from giantdet import cli
from giantdet.tools.doctor import Facts, collect, judge

SCRIPT = str(REPO / "scripts/doctor.py")


def _report(text: str) -> dict[str, str]:
    """Return status, finding and explanation by subject."""
    lines = re.findall(r"^(OK|WARN|BAD) +(\w+(?: \w+)?)  +(.*(?:\n {6}.*)?)$", text, flags=re.MULTILINE)
    return {subject: f"{status} {found}" for status, subject, found in lines}


@pytest.fixture
def alone(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """The environment of a world of one, or a rank of a larger one; what comm.start sets is undone."""
    for name in ("RANK", "LOCAL_RANK"):
        monkeypatch.setenv(name, "0")
    monkeypatch.setenv("WORLD_SIZE", "1")
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.setenv("MASTER_PORT", str(free_port()))
    return monkeypatch


def test_alone(alone: pytest.MonkeyPatch, tmp_path: Path, capsys: Any) -> None:
    assert cli.main(["doctor", "--output", str(tmp_path / "runs")]) == 0
    report = _report(capsys.readouterr().out)
    assert f"torch {torch.__version__.split('+')[0]}" in report["versions"]
    assert report["network"].startswith("OK one rank")
    assert report["output"] == f"OK {tmp_path / 'runs'} can be written"
    assert {"free disk", "shared memory", "open files", "accelerators"} <= report.keys()
    assert list((tmp_path / "runs").iterdir()) == []


def test_unwritable_output(alone: pytest.MonkeyPatch, tmp_path: Path, capsys: Any) -> None:
    (tmp_path / "file").touch()
    assert cli.main(["doctor", "--output", str(tmp_path / "file/runs")]) == 1
    report = _report(capsys.readouterr().out)
    assert report["output"].startswith("BAD") and "Not a directory" in report["output"]


def test_missing_rank(alone: pytest.MonkeyPatch, tmp_path: Path, capsys: Any) -> None:
    alone.setenv("WORLD_SIZE", "2")
    assert cli.main(["doctor", "--output", str(tmp_path), "--timeout-minutes", "0.02"]) == 1
    out = capsys.readouterr().out
    assert "waiting for 2 ranks" in out
    network = _report(out)["network"]
    assert network.startswith("BAD rank 0 on ") and "1/2 clients joined" in network
    assert "were all started, does each host reach 127.0.0.1:" in network


def _two(*commands: list[str], **rank_1: str) -> list[Ended]:
    group = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    more: list[dict[str, str]] = [{}, rank_1]
    ranks = [environment(RANK=str(r), LOCAL_RANK=str(r), **group) | more[r] for r in range(2)]
    return run_together(list(zip(commands, ranks, strict=True)))


def test_two_healthy_ranks(tmp_path: Path) -> None:
    command = [sys.executable, SCRIPT, "--output", str(tmp_path), "--mebibytes", "8"]
    ended = _two(command, command)
    assert [end.code for end in ended] == [0, 0], logs(ended)
    report = _report(ended[0].out)
    assert report["versions"].startswith("OK") and "the same on 2 ranks" in report["versions"]
    assert report["accelerators"].split(" ", 1)[1].startswith("2 ranks on 1 hosts")
    found = re.search(r"all-reduce of 8 MiB in (\S+) ms, (\S+) GB/s", report["gloo"])
    assert found is not None
    milliseconds, bandwidth = map(float, found.groups())
    assert bandwidth == pytest.approx(8 * 2**20 / milliseconds / 1e6, rel=0.01)  # 2 (n - 1) / n is 1
    assert "the same on 2 ranks; a new file is seen after" in report["output"]
    assert not _report(ended[1].out), "only the main rank reports"


def test_two_ranks_that_differ(tmp_path: Path) -> None:
    """Rank 1 has its own folder under the same name, another timm, and few open files."""
    package = tmp_path / "other/timm-0.0.1.dist-info"
    package.mkdir(parents=True)
    (package / "METADATA").write_text("Metadata-Version: 2.1\nName: timm\nVersion: 0.0.1\n")
    homes = [tmp_path / "zero", tmp_path / "one"]
    commands = []
    for home, limit in zip(homes, (4096, 256), strict=True):
        home.mkdir()
        script = (
            f"ulimit -n {limit} && cd {home} && exec {sys.executable} {SCRIPT} --mebibytes 1 --output runs"
        )
        commands.append(["bash", "-c", script])
    ended = _two(*commands, PYTHONPATH=f"{tmp_path / 'other'}:{environment()['PYTHONPATH']}")
    assert [end.code for end in ended] == [1, 1], logs(ended)
    report = _report(ended[0].out)
    assert report["versions"].startswith("BAD timm ") and "0.0.1 on rank 1" in report["versions"]
    assert "Install one version of timm everywhere." in report["versions"]
    assert report["output"].startswith(f"BAD {homes[0] / 'runs'} of rank 0 is not there for rank 1 on ")
    assert "file system that all hosts share" in report["output"]
    assert report["open files"].startswith("WARN at most 256") and "ulimit -n" in report["open files"]
    assert report["gloo"].split(" ", 1)[0] in ("OK", "WARN")
    assert not list(homes[0].glob("runs/.*")), "the doctor's file is deleted"


@pytest.fixture(scope="module")
def here() -> Facts:
    """Facts of a machine with plenty of resources."""
    facts = collect(torch.device("cpu"), REPO)
    return replace(facts, host="a", disk=500.0, shared_memory=8.0, open_files=65536, unmet=[])


@pytest.mark.parametrize(
    ("changes", "subject", "text"),
    [
        ({"disk": 5.0}, "free disk", "WARN 5.0 GiB for the output, on b"),
        ({"disk": 0.5}, "free disk", "BAD 0.5 GiB"),
        ({"shared_memory": 0.0625}, "shared memory", "BAD 0.1 GiB in /dev/shm, on b Loader workers"),
        ({"open_files": 512}, "open files", "WARN at most 512, on b"),
        (
            {"unmet": ["timm>=1.0.20 (here: missing)"]},
            "versions",
            "BAD on b not timm>=1.0.20 (here: missing)",
        ),
        ({"gpus": 8, "device": "H100, 80 GiB"}, "accelerators", "torch sees no GPU on a"),
    ],
)
def test_assessment_of_different_hosts(here: Facts, changes: dict[str, Any], subject: str, text: str) -> None:
    findings = {finding.subject: finding for finding in judge([here, replace(here, host="b", **changes)])}
    finding = findings.pop(subject)
    assert text in f"{finding.status} {finding.found} {finding.advice}"
    assert all(other.status == "OK" for name, other in findings.items() if name != "accelerators")


def test_assessment_of_gpus(here: Facts) -> None:
    gpu = replace(here, gpus=2, device="H100, 80 GiB")
    other = replace(gpu, host="b", device="A100, 40 GiB")
    for facts, status, text in (
        ([gpu, gpu], "OK", "2 ranks on 1 hosts: 2 x H100, 80 GiB"),
        ([gpu, gpu, other, other], "WARN", "2 x H100, 80 GiB, 2 x A100, 40 GiB The slowest"),
        ([gpu, gpu, replace(gpu, host="b")], "WARN", "b has more GPUs than ranks"),
    ):
        finding = judge(facts)[1]
        assert finding.status == status and text in f"{finding.found} {finding.advice}"
