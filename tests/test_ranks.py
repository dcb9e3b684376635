"""Forked ranks behave like started ones; processes are given up when they hang, not when they are slow."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import tiny
from patience import Patience, cpu_seconds
from tiny import REPO, environment, launch, launch_ok, run_together

SCRIPT = """
import atexit, os, sys, threading, time
atexit.register(print, "atexit")
ends = sys.argv[1 + int(os.environ["RANK"])]
threading.Thread(target=lambda: (time.sleep(0.3), print("thread"))).start()
print(__name__, sys.argv[0], sys.path[0], os.getcwd(), os.environ["WORLD_SIZE"], os.environ.get("ONLY_HERE"))
print("in the other file", file=sys.stderr)
if ends == "signal":
    os.kill(os.getpid(), 9)
if ends == "error":
    raise ValueError("what is wrong")
sys.exit({"code": 7, "words": "words"}.get(ends))
"""


@pytest.fixture
def script(tmp_path: Path) -> Path:
    path = tmp_path / "script.py"
    path.write_text(SCRIPT)
    return path


@pytest.mark.parametrize("fresh", [False, True])
def test_ends_like_python(script: Path, monkeypatch: pytest.MonkeyPatch, fresh: bool) -> None:
    monkeypatch.setenv("ONLY_HERE", "yes")
    ends = launch(script, 5, "well", "error", "code", "words", "signal", fresh=fresh)
    assert [end.code for end in ends] == [0, 1, 7, 1, -9]
    line = f"__main__ {script} {script.parent} {REPO} 5 yes\n"
    assert {end.out for end in ends[:4]} == {f"{line}thread\natexit\n"}
    assert all(end.err.startswith("in the other file\n") for end in ends[:4])
    assert ends[1].err.endswith("ValueError: what is wrong\n") and "line 11, in <module>" in ends[1].err
    assert ends[3].err.endswith("file\nwords\n")


def test_forks_share_imports_and_differ_like_processes(tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(
        "import os, sys\n"
        "print('deepspeed' in sys.modules, os.getsid(0) == os.getpid(), len(os.listdir('/proc/self/task')))\n"
        "print(hash('a'), os.getppid())"
    )
    outs = [end.out.splitlines() for end in launch_ok(script, 3)]
    assert [out[0] for out in outs] == ["True True 1"] * 3
    assert outs[0][1] == outs[2][1] != outs[1][1]
    assert launch_ok(script, 1, fresh=True)[0].out.startswith("False")


def test_variables_read_at_start_need_a_new_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    script = tmp_path / "script.py"
    script.write_text("import sys; print('deepspeed' in sys.modules)")
    assert launch_ok(script, 1)[0].out == "True\n"
    monkeypatch.setenv("MALLOC_MMAP_THRESHOLD_", "65536")
    assert launch_ok(script, 1)[0].out == "False\n"


def test_forks_end_with_the_tests(tmp_path: Path) -> None:
    """However these end: here by SIGKILL, as by the out-of-memory killer."""
    (tmp_path / "rank.py").write_text("import os, time; print(os.getpid(), flush=True); time.sleep(600)")
    code = f"from pathlib import Path; import tiny; tiny.launch(Path('{tmp_path}/rank.py'), 1)"
    temporary = environment(TMPDIR=str(tmp_path))
    tests = subprocess.Popen([sys.executable, "-c", code], env=temporary, cwd=REPO)
    patience = Patience([tests.pid])
    while not (outputs := [path.read_text() for path in tmp_path.glob("*/0.out")]) or not outputs[0]:
        assert not patience.has_ended() and tests.poll() is None
        time.sleep(0.05)
    tests.kill()
    tests.wait()
    rank = Path("/proc") / outputs[0].strip()
    while rank.exists():
        assert not patience.has_ended()
        time.sleep(0.05)


def test_a_hang_is_detected(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One rank waits forever, and has a child that waits in its own session."""
    monkeypatch.setattr(tiny, "Patience", lambda pids: Patience(pids, still=2.0))
    script = tmp_path / "script.py"
    script.write_text(
        "import os, subprocess, time\n"
        "print('before', flush=True)\n"
        "if os.environ['RANK'] == '1':\n"
        "    subprocess.run(['sleep', '600'])\n"
    )
    with pytest.raises(
        AssertionError, match=r"script.py hung\n--- rank 0, exit code 0\nbefore\n(.|\n)*code -9"
    ):
        launch(script, 2)


def test_slow_is_not_hung(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A grandchild in another session works at a low priority, for longer than the idle time-out."""
    monkeypatch.setattr(tiny, "Patience", lambda pids: Patience(pids, still=2.0))
    work = "import time; end = time.monotonic() + 5\nwhile time.monotonic() < end: pass"
    command = [
        sys.executable,
        "-c",
        "import subprocess, sys; subprocess.run(['setsid', 'nice', *sys.argv[1:]])",
    ]
    assert run_together([([*command, sys.executable, "-c", work], environment())])[0].code == 0


def test_ranks_waiting_for_a_failed_rank_are_killed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        tiny, "Patience", lambda pids, still=9.0, limit=9.0: Patience(pids, still=min(still, 1.0))
    )
    script = tmp_path / "script.py"
    script.write_text("import os, sys, time\nsys.exit(3) if os.environ['RANK'] == '0' else time.sleep(600)")
    assert [end.code for end in launch(script, 2)] == [3, -signal.SIGKILL]


def test_cpu_time_of_children_counts() -> None:
    before = cpu_seconds({os.getpid()})
    work = "import time\nwhile time.process_time() < 0.5: pass"
    subprocess.run([sys.executable, "-c", work], check=True)
    assert cpu_seconds({os.getpid()}) - before >= 0.5
