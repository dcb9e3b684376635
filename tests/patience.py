"""Time-outs for processes: give up when they are idle, not when they are slow.

On a busy machine everything takes many times as long as on an idle one, and elapsed time cannot distinguish
that from a hang. A hanging process uses no CPU time; a slow one uses the little that it gets.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterable
from pathlib import Path

TICK = 1 / os.sysconf("SC_CLK_TCK")
# Share of one core: below what a working process gets when forty share two cores, above what a process uses
# that polls while waiting, as launchers do.
WORKING = 0.02
STILL = 120.0  # seconds
LIMIT = 1500.0  # seconds, for endless loops; below pytest's own time-out


class Patience:
    """A time-out that ends when processes and all their descendants have been idle for a while."""

    def __init__(self, pids: Iterable[int], still: float = STILL, limit: float = LIMIT) -> None:
        self.pids, self.still = set(pids), still
        self.end = time.monotonic() + limit
        self.looked = self.since = time.monotonic()
        self.used = cpu_seconds(self.pids)

    def has_ended(self) -> bool:
        now = time.monotonic()
        if now - self.looked < 0.5:
            return False
        self.looked = now
        used = cpu_seconds(self.pids)
        # Less than before: a process ended that nobody waited for, which is activity too.
        if abs(used - self.used) > WORKING * self.still:
            self.since, self.used = now, used
        return now - self.since > self.still or now > self.end


def wait_until(condition: Callable[[], bool], pids: Iterable[int], what: str) -> None:
    """Raise AssertionError if the processes become idle before the condition is met."""
    patience = Patience(pids)
    while not condition():
        assert not patience.has_ended(), f"no {what}"
        time.sleep(0.05)


def cpu_seconds(pids: set[int]) -> float:
    """Return the CPU time of processes, their sessions' processes, and all descendants, even ended ones."""
    rows = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                fields = (entry / "stat").read_text().rpartition(")")[2].split()
            except OSError:  # it has just ended
                continue
            parent, session = int(fields[1]), int(fields[3])
            rows[int(entry.name)] = parent, session, sum(map(int, fields[11:15]))
    found = {pid for pid, (_, session, _) in rows.items() if pid in pids or session in pids}
    while more := {pid for pid, (parent, _, _) in rows.items() if parent in found} - found:
        found |= more
    return TICK * sum(rows[pid][2] for pid in found)
