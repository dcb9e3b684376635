"""Real rank processes without the cost of starting Python: forked from a process that has done the imports.

A rank of a test spends seconds on importing torch, timm and DeepSpeed, and often less on the test itself. A
`ForkServer` imports all that once, starts no thread, joins no group, and then forks. Each fork is a process
in its own session, with its own environment, files and arguments. It runs a script as `python script.py`
would, and ends as Python does: tracebacks, exit codes, signals, atexit.

A fork differs from a new process in what Python and its libraries read before a script's first line;
`can_run` checks where that matters. Tests of launchers and of Python's start always start new interpreters.
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
# Read by the interpreter, by libc or by a library during its import: a later change has no effect.
READ_AT_START = ("PYTHON", "OMP_", "KMP_", "MKL_", "GOMP_", "MALLOC_", "LD_", "LC_", "LANG", "TORCH_LOGS")
READ_AT_START += ("DS_ACCELERATOR", "CUDA_")
# Modules that giantdet and DeepSpeed import lazily.
IMPORTS = ("torch", "torchvision", "timm", "deepspeed", "deepspeed.runtime.zero.muon.muon_optimizer")
IMPORTS += ("deepspeed.module_inject.auto_ep_layer", "deepspeed.runtime.superoffload.superoffload_stage3")
IMPORTS += ("torch.distributed.nn", "matplotlib.pyplot", "pycocotools.cocoeval", "tiny")
_PR_SET_PDEATHSIG = 1


class ForkRequest(NamedTuple):
    """The command, environment and output files of a process to fork."""

    command: Sequence[str]
    environment: dict[str, str]
    out: str
    err: str


class Forked:
    """A process of a fork server, with the part of subprocess.Popen's interface that tests use."""

    def __init__(self, server: ForkServer, pid: int) -> None:
        self.server, self.pid = server, pid
        self.returncode: int | None = None

    def poll(self) -> int | None:
        if self.returncode is None:
            # Until it is reaped, its id is not given to another process.
            self.returncode = self.server.ask(self.pid)
        return self.returncode


class ForkServer:
    """The client of a process that forks others. The server ends with this process, and its forks with it."""

    def __init__(self, environment: dict[str, str]) -> None:
        self.environment = environment
        self.connection, theirs = Pipe()
        self.output = tempfile.TemporaryFile("w+")  # noqa: SIM115
        self.process = subprocess.Popen(
            [sys.executable, __file__, str(theirs.fileno())],
            env=environment,
            cwd=REPO,
            stdin=subprocess.DEVNULL,
            stdout=self.output,
            stderr=self.output,
            pass_fds=[theirs.fileno()],
            start_new_session=True,  # Ctrl-C is handled by the tests
        )
        theirs.close()
        atexit.register(self.close)

    def is_ready(self) -> bool:
        """Wait until all imports are done."""
        return self.ask(None) is None

    def can_run(self, command: Sequence[str], environment: dict[str, str]) -> bool:
        """Return whether a fork behaves like a new process for this command."""
        is_script = command[0] == sys.executable and command[1].endswith(".py")
        return is_script and _at_start(environment) == _at_start(self.environment)

    def start(self, request: ForkRequest) -> Forked:
        return Forked(self, self.ask(request))

    def ask(self, message: Any) -> Any:
        """Send a request to get the new process's id, or an id to get its exit code (None while it runs)."""
        try:
            self.connection.send(message)
            return self.connection.recv()
        except (EOFError, OSError):
            self.output.seek(0)
            raise RuntimeError(f"the process that forks ranks has ended:\n{self.output.read()}") from None

    def close(self) -> None:
        self.connection.close()
        self.process.wait()
        self.output.close()


def _at_start(environment: dict[str, str]) -> dict[str, str]:
    return {name: value for name, value in environment.items() if name.startswith(READ_AT_START)}


# From here on: code that runs in the server and in its forks


def _end_with(parent: int) -> None:
    """Have the kernel kill this process when its parent ends, for whatever reason."""
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
    assert len(threads) == 1, f"{len(threads)} threads after the imports: a fork would keep only one of them"
    gc.collect()
    gc.freeze()  # forks share these pages until one of them writes to them


def _serve(connection: Connection) -> ForkRequest:
    """Answer the client; return only in a forked process, with its request."""
    while True:
        try:
            message = connection.recv()
        except EOFError:
            sys.exit()
        if message is None:
            connection.send(None)
            continue
        if isinstance(message, int):
            pid, status = os.waitpid(message, os.WNOHANG)
            connection.send(os.waitstatus_to_exitcode(status) if pid else None)
            continue
        server, pid = os.getpid(), os.fork()
        if pid == 0:
            connection.close()
            os.setsid()  # so that its children, such as a compiler, can be ended with it
            _end_with(server)
            return ForkRequest(*message)
        connection.send(pid)


def _become(request: ForkRequest) -> None:
    for number, path in ((1, request.out), (2, request.err)):
        file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(file, number)
        os.close(file)
    os.environ.clear()
    os.environ.update(request.environment)
    sys.argv = list(request.command[1:])
    sys.path[0] = str(Path(sys.argv[0]).resolve().parent)


if __name__ == "__main__":
    _end_with(os.getppid())
    _client = Connection(int(sys.argv[1]))
    _import_all()
    _become(_serve(_client))
    runpy.run_path(sys.argv[0], run_name="__main__")
