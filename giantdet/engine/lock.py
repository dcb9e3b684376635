"""One run at a time in an output folder: a lock that names its host and process.

Two runs in a folder would remove each other's unfinished checkpoints. A lock that a killed run has left is
recognised: on the same host by its process, on another because its beats stop. So a supervisor can start a
run again on other machines.
"""

from __future__ import annotations

import json
import logging
import os
import socket
import threading
import time
from pathlib import Path
from typing import Any

from giantdet.distributed import comm
from giantdet.errors import InputError

logger = logging.getLogger("giantdet")

LOCK = "run.lock"
BEAT = 10.0  # seconds between the beats of a lock
WATCH = 35.0  # seconds without a beat after which a run on another host counts as ended


class OutputLock:
    """The lock of a folder. All ranks create it together; the main rank holds it until `release`.

    Raises InputError on all ranks where another run holds it.
    """

    def __init__(self, folder: Path) -> None:
        self.path = folder / LOCK
        self._beats = 0
        self._done = threading.Event()
        problem = self._acquire() if comm.is_main() else None
        if problem := comm.broadcast_object(problem):
            raise InputError(problem)
        if comm.is_main():
            threading.Thread(target=self._beat, name="output lock", daemon=True).start()

    def release(self) -> None:
        """Remove the lock, unless it is another run's by now."""
        self._done.set()
        if comm.is_main() and _holder(_read(self.path)) == _myself():
            self.path.unlink(missing_ok=True)

    def _acquire(self) -> str | None:
        """Write the lock; return why that is not possible, or None."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        for _ in range(3):
            try:
                with self.path.open("x") as file:
                    json.dump(_myself() | {"beats": 0}, file)
                return None
            except FileExistsError:
                found = _read(self.path)
                if found is not None and _holder(found) != _myself() and _is_alive(found, self.path):
                    return (
                        f"{self.path.parent}: process {found['pid']} on {found['host']} trains in this "
                        "folder; stop it, or set another train.output"
                    )
                self.path.unlink(missing_ok=True)
        return f"{self.path.parent}: another run started in this folder at the same moment"

    def _beat(self) -> None:
        """Write the lock again and again. A new file: other hosts may see a changed one late."""
        while not self._done.wait(BEAT):
            self._beats += 1
            new = self.path.with_name(f"{LOCK}.new")
            try:
                if _holder(_read(self.path)) != _myself():
                    return  # removed by hand, or taken over
                new.write_text(json.dumps(_myself() | {"beats": self._beats}))
                new.replace(self.path)
            except OSError:
                continue  # a full or absent disk: the checkpoints say so


def _myself() -> dict[str, Any]:
    return {"host": socket.gethostname(), "pid": os.getpid(), "started": _start_of(os.getpid())}


def _holder(found: dict[str, Any] | None) -> dict[str, Any] | None:
    return None if found is None else {key: found[key] for key in ("host", "pid", "started")}


def _start_of(pid: int) -> str | None:
    """Return when a process started, in ticks of the kernel's clock; None where there is no such process."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19]
    except (OSError, IndexError):
        return None


def _read(path: Path) -> dict[str, Any] | None:
    try:
        found = json.loads(path.read_text())
        return {key: found[key] for key in ("host", "pid", "started", "beats")}
    except (OSError, ValueError, KeyError, TypeError):
        return None  # not there, or of a process that was killed while it wrote


def _is_alive(found: dict[str, Any], path: Path) -> bool:
    if found["host"] == socket.gethostname():
        return found["started"] is not None and _start_of(int(found["pid"])) == found["started"]
    logger.warning(
        "%s: locked by %s; looking for %g s whether it is still running", path, found["host"], WATCH
    )
    until = time.monotonic() + WATCH
    while time.monotonic() < until:
        time.sleep(1.0)
        if (now := _read(path)) is not None and now != found:
            return True
    return False
