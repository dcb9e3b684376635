"""Profile a few training steps with PyTorch's profiler: `giantdet train --profile`.

After some warm-up steps, the main rank records a few steps to `profile/trace.json.gz` (for
https://ui.perfetto.dev), and writes the ten most expensive operators to `profile/operators.txt`.
"""

from __future__ import annotations

import os
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile, schedule

SKIPPED, WARMUP, RECORDED = 3, 1, 3
TOP = 10


class Profile:
    """Records a few steps after the first ones, and writes its files after the last of them.

    It runs on the main rank only; `step` does nothing on the others.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        # torch.distributed has not started yet: the rank is that of the launcher's environment variables.
        self.is_done = os.environ.get("RANK", os.environ.get("SLURM_PROCID", "0")) != "0"
        if self.is_done:
            return
        activities = [ProfilerActivity.CPU]
        if torch.cuda.is_available():
            activities.append(ProfilerActivity.CUDA)
        self.profiler = profile(
            activities=activities,
            schedule=schedule(skip_first=SKIPPED, wait=0, warmup=WARMUP, active=RECORDED, repeat=1),
            on_trace_ready=self._write,
            record_shapes=True,
        )
        self.profiler.start()

    def step(self) -> None:
        """Mark the end of an optimizer step."""
        if not self.is_done:
            self.profiler.step()

    def close(self) -> None:
        """Write what has been recorded, if the run ended before the last step to record."""
        if not self.is_done:
            self.profiler.stop()

    def _write(self, profiler: profile) -> None:
        self.is_done = True
        self.folder.mkdir(parents=True, exist_ok=True)
        profiler.export_chrome_trace(str(self.folder / "trace.json.gz"))
        table = operator_table(profiler)
        (self.folder / "operators.txt").write_text(table + "\n")
        print(f"\n{table}\nprofile: {self.folder / 'trace.json.gz'}", flush=True)


def operator_table(profiler: profile) -> str:
    """Return a table of the most expensive operators by their own time, on the GPU if there is one."""
    on_gpu = torch.cuda.is_available()
    events = [event for event in profiler.key_averages() if not event.key.startswith("ProfilerStep")]

    def own(event: object) -> float:  # microseconds
        return float(getattr(event, "self_device_time_total" if on_gpu else "self_cpu_time_total"))

    total = sum(own(event) for event in events) or 1.0
    lines = [f"{'operator':<56}{'own time':>12}{'share':>8}{'calls':>9}"]
    for event in sorted(events, key=own, reverse=True)[:TOP]:
        name = event.key if len(event.key) < 55 else event.key[:52] + "..."
        lines.append(
            f"{name:<56}{own(event) / 1e3 / RECORDED:>9.2f} ms{100 * own(event) / total:>7.1f}%"
            f"{event.count / RECORDED:>9.1f}"
        )
    where = "GPU" if on_gpu else "CPU"
    return "\n".join([*lines, f"{where} time of a step, mean of {RECORDED}: {total / 1e3 / RECORDED:.1f} ms"])
