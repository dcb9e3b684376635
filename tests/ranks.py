"""Real rank processes without a real start: forked from a process that has imported what they need.

A rank of a test spends seconds on importing torch, timm and DeepSpeed, and often less on its subject. A
`Nursery` imports all that once, starts no thread and joins no group, and then forks: what it forks is a
process of its own, in a session of its own, with its own environment, files and arguments. It runs a script
as `python script.py` would, and ends as python ends: tracebacks, exit codes, signals, atexit.

A fork differs from a start in what python and its libraries read before a script's first line; `can_run` says
where that matters, and tests of launchers and of python's start always start real interpreters.
"""

from __future__ import annotations

import atexit
import ctypes
import gc
import importlib
import os
import pkgutil
import runpy
import signal
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from multiprocessing.connection import Connection, Pipe
from pathlib import Path
from typing import Any, NamedTuple

REPO = Path(__file__).resolve().parents[1]
# Read by the interpreter, by libc or by a library while it is imported: a later change comes too late.
READ_AT_START = ("PYTHON", "OMP_", "KMP_", "MKL_", "GOMP_", "MALLOC_", "LD_", "LC_", "LANG", "TORCH_LOGS")
READ_AT_START += ("DS_ACCELERATOR", "CUDA_")
# Beside giantdet's own modules, what these and DeepSpeed import when they need it first.
IMPORTS = ("torch", "torchvision", "timm", "deepspeed", "deepspeed.runtime.zero.muon.muon_optimizer")
IMPORTS += ("deepspeed.module_inject.auto_ep_layer", "deepspeed.runtime.superoffload.superoffload_stage3")
IMPORTS += ("torch.distributed.nn", "matplotlib.pyplot", "pycocotools.cocoeval", "tiny")
_PR_SET_PDEATHSIG = 1


class Order(NamedTuple):
    """What a forked process is to be."""

    command: Sequence[str]
    environment: dict[str, str]
    out: str
    err: str


class Forked:
    """A process of a nursery, with what tests use of subprocess.Popen."""

    def __init__(self, nursery: Nursery, pid: int) -> None:
        self.nursery, self.pid = nursery, pid
        self.returncode: int | None = None

    def poll(self) -> int | None:
        if self.returncode is None:
            # Until then its number is not given to another process.
            self.returncode = self.nursery.ask(self.pid)
        return self.returncode


class Nursery:
    """The client's side of a process that forks others. It ends with this process, and its forks with it."""

    def __init__(self, environment: dict[str, str]) -> None:
        self.environment = environment
        self.connection, theirs = Pipe()
        self.said = tempfile.TemporaryFile("w+")  # noqa: SIM115
        self.process = subprocess.Popen(
            [sys.executable, __file__, str(theirs.fileno())],
            env=environment,
            cwd=REPO,
            stdin=subprocess.DEVNULL,
            stdout=self.said,
            stderr=self.said,
            pass_fds=[theirs.fileno()],
            start_new_session=True,  # Ctrl-C is the tests' business
        )
        theirs.close()
        atexit.register(self.close)

    def is_ready(self) -> bool:
        """Waits until it has imported all."""
        return self.ask(None) is None

    def can_run(self, command: Sequence[str], environment: dict[str, str]) -> bool:
        """Would a fork be what a start is?"""
        is_script = command[0] == sys.executable and command[1].endswith(".py")
        return is_script and _at_start(environment) == _at_start(self.environment)

    def start(self, order: Order) -> Forked:
        return Forked(self, self.ask(order))

    def ask(self, question: Any) -> Any:
        """For an order the number of a new process, for that number the exit code, or None before the end."""
        try:
            self.connection.send(question)
            return self.connection.recv()
        except (EOFError, OSError):
            self.said.seek(0)
            raise RuntimeError(f"the process that forks ranks has ended:\n{self.said.read()}") from None

    def close(self) -> None:
        self.connection.close()
        self.process.wait()
        self.said.close()


def _at_start(environment: dict[str, str]) -> dict[str, str]:
    return {name: value for name, value in environment.items() if name.startswith(READ_AT_START)}


# From here on: in the process that forks, and in its forks


def _end_with(parent: int) -> None:
    """The kernel ends this process when its parent is gone, whichever way that went."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        os._exit(1)


def _import_all() -> None:
    import giantdet

    for name in IMPORTS:
        importlib.import_module(name)
    for module in pkgutil.walk_packages(giantdet.__path__, "giantdet."):
        importlib.import_module(module.name)
    threads = os.listdir("/proc/self/task")
    assert len(threads) == 1, f"{len(threads)} threads after the imports: a fork would have one of them"
    gc.collect()
    gc.freeze()  # forks share these pages as long as nobody writes to them


def _serve(connection: Connection) -> Order:
    """Answers the client; returns in a forked process only, with its order."""
    while True:
        try:
            question = connection.recv()
        except EOFError:
            sys.exit()
        if question is None:
            connection.send(None)
            continue
        if isinstance(question, int):
            pid, status = os.waitpid(question, os.WNOHANG)
            connection.send(os.waitstatus_to_exitcode(status) if pid else None)
            continue
        server, pid = os.getpid(), os.fork()
        if pid == 0:
            connection.close()
            os.setsid()  # so that what it starts, a compiler say, can be ended with it
            _end_with(server)
            return Order(*question)
        connection.send(pid)


def _become(order: Order) -> None:
    for number, path in ((1, order.out), (2, order.err)):
        file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(file, number)
        os.close(file)
    os.environ.clear()
    os.environ.update(order.environment)
    sys.argv = list(order.command[1:])
    sys.path[0] = str(Path(sys.argv[0]).resolve().parent)


if __name__ == "__main__":
    _end_with(os.getppid())
    _client = Connection(int(sys.argv[1]))
    _import_all()
    _become(_serve(_client))
    runpy.run_path(sys.argv[0], run_name="__main__")
