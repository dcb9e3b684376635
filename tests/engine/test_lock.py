"""One run at a time in an output folder; real processes hold the lock."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
from tiny import environment

from giantdet.engine import lock
from giantdet.engine.lock import LOCK, OutputLock
from giantdet.errors import InputError

HOLD = """
import sys, time
from pathlib import Path
from giantdet.engine.lock import OutputLock
held = OutputLock(Path(sys.argv[1]))
print("held", flush=True)
time.sleep(600)
"""


@pytest.fixture
def holder(tmp_path: Path) -> subprocess.Popen[str]:
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(tmp_path)], stdout=subprocess.PIPE, text=True, env=environment()
    )
    assert process.stdout is not None and process.stdout.readline() == "held\n"
    yield process
    process.kill()
    process.wait()


def test_the_second_run_is_refused_until_the_first_has_ended(
    holder: subprocess.Popen[str], tmp_path: Path
) -> None:
    with pytest.raises(InputError, match=f"process {holder.pid} on {socket.gethostname()}"):
        OutputLock(tmp_path)
    holder.send_signal(signal.SIGKILL)
    holder.wait()
    assert (tmp_path / LOCK).exists(), "the killed process has left its lock"
    held = OutputLock(tmp_path)
    assert json.loads((tmp_path / LOCK).read_text())["pid"] == os.getpid()
    held.release()
    assert not (tmp_path / LOCK).exists()


def test_a_reused_process_id_does_not_hold_the_lock(tmp_path: Path) -> None:
    about = {"host": socket.gethostname(), "pid": os.getppid(), "started": "1", "beats": 0}
    (tmp_path / LOCK).write_text(json.dumps(about))
    OutputLock(tmp_path).release()


@pytest.mark.parametrize("content", ["", "{", '{"pid": 3}', "[]"])
def test_a_corrupted_lock_is_replaced(tmp_path: Path, content: str) -> None:
    (tmp_path / LOCK).write_text(content)
    OutputLock(tmp_path).release()
    assert not (tmp_path / LOCK).exists()


def test_a_lock_of_another_host(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is respected as long as its heartbeat continues."""
    about = {"host": "elsewhere", "pid": 1, "started": "1", "beats": 0}
    (tmp_path / LOCK).write_text(json.dumps(about))
    monkeypatch.setattr(lock, "WATCH", 60.0)

    def beat(seconds: float) -> None:
        (tmp_path / LOCK).write_text(json.dumps(about | {"beats": 1}))

    with monkeypatch.context() as patched:
        patched.setattr(time, "sleep", beat)
        with pytest.raises(InputError, match="process 1 on elsewhere"):
            OutputLock(tmp_path)
    monkeypatch.setattr(lock, "WATCH", 0.0)
    OutputLock(tmp_path).release()


def test_heartbeats_are_written_and_a_replaced_lock_is_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lock, "BEAT", 0.01)
    held = OutputLock(tmp_path)
    until = time.monotonic() + 60
    while json.loads((tmp_path / LOCK).read_text())["beats"] < 2:
        assert time.monotonic() < until
    other = {"host": "elsewhere", "pid": 1, "started": "1", "beats": 7}
    held._done.set()
    (tmp_path / LOCK).write_text(json.dumps(other))
    held.release()
    assert json.loads((tmp_path / LOCK).read_text()) == other
