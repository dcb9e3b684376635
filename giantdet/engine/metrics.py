"""The output of a run: its progress, metrics.jsonl and DeepSpeed's monitors.

Losses stay on the device until a line is written; the only host synchronisation is in `Metrics.log`.
"""

from __future__ import annotations

import json
import math
import sys
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from giantdet.config.json_text import json_text
from giantdet.distributed import comm
from giantdet.engine.progress import Progress
from giantdet.evaluation import NOTHING_TO_SCORE, Scores


class Metrics:
    """Collects the scalars of each step and writes their means to a line of metrics.jsonl.

    Args:
        path: metrics.jsonl, appended to; a resumed run removes the lines after its first step.
        total_steps: length of the run in optimizer steps.
        first_step: number of steps that were done before.
        eval_every: see `Progress`.
        monitor: DeepSpeed's monitor, which gets the same numbers and scores; None: no monitor. They are
            logged by the number of images, as DeepSpeed's own values are: W&B drops a value with a smaller x
            than the last one.
    """

    def __init__(
        self,
        path: Path,
        total_steps: int,
        first_step: int,
        monitor: Any = None,
        eval_every: int | None = None,
    ) -> None:
        self.path, self.monitor = path, monitor
        self.sums: dict[str, Tensor] = {}
        self.pending: list[dict[str, Tensor]] = []
        self.count = 0
        self.images = 0
        self.data_seconds = 0.0
        self.since = time.perf_counter()
        if comm.is_main():
            _drop_lines_after(path, first_step)
        stream = sys.stderr if comm.is_main() else None
        self.progress = Progress(total_steps, first_step, eval_every, stream)

    def add(self, scalars: dict[str, Tensor], images: int, data_seconds: float) -> None:
        """Add one micro-step of this rank; nothing is copied from the device."""
        self.pending.append({name: value.detach().float() for name, value in scalars.items()})
        self.images += images
        self.data_seconds += data_seconds

    def step(self, applied: bool = True) -> None:
        """End an optimizer step. A step that was skipped does not count in the means."""
        for scalars in self.pending if applied else ():
            for name, value in scalars.items():
                self.sums[name] = self.sums[name] + value if name in self.sums else value
            self.count += 1
        self.pending.clear()
        self.progress.step()

    def log(self, step: int, images_seen: int = 0, **more: Any) -> dict[str, Any]:
        """Write and return the means since the last line, with the values of `more`. All ranks call it.

        `images_seen` is the number of images that the run has trained on, for the monitor.
        """
        names = list(self.sums)
        # The host synchronisation. There are no names if every step since the last line was skipped.
        values = torch.stack([self.sums[name] for name in names]).tolist() if names else []
        seconds = time.perf_counter() - self.since
        means = comm.mean_over_ranks([*values, float(self.images), self.data_seconds, seconds])
        *sums, images, data_seconds, seconds = means
        line: dict[str, Any] = {"step": step}
        line |= {name: value / self.count for name, value in zip(names, sums, strict=True)}
        line["images_per_second"] = images * comm.world_size() / seconds
        line["data_share"] = data_seconds / seconds
        line |= more
        if comm.is_main():
            self._write(line, images_seen)
        self.sums, self.count, self.images, self.data_seconds = {}, 0, 0, 0.0
        self.since = time.perf_counter()
        return line

    def _write(self, line: dict[str, Any], images_seen: int) -> None:
        self._append(line)
        loss = f"loss {line['loss']:.3f}, " if "loss" in line else ""
        self.progress.show(f"{loss}lr {line.get('lr', 0):.1e}, {line['images_per_second']:.1f} img/s")
        self._monitor(line, images_seen)

    def write_scores(self, step: int, scores: Scores, images_seen: int) -> None:
        """Write the scores of an evaluation, on the main rank. Scores by class go to metrics.jsonl only."""
        if not (scores and comm.is_main()):
            return
        self._append({"step": step, "scores": scores})
        for task, numbers in scores.items():
            found = {f"{task}/{name}": value for name, value in numbers.items() if value != NOTHING_TO_SCORE}
            self._monitor(found, images_seen)

    def _append(self, line: dict[str, Any]) -> None:
        with self.path.open("a") as file:
            file.write(json_text(line) + "\n")

    def _monitor(self, values: dict[str, Any], images_seen: int) -> None:
        if self.monitor is not None and self.monitor.enabled:
            numbers = {name: value for name, value in values.items() if isinstance(value, float)}
            self.monitor.write_events([(f"giantdet/{k}", v, images_seen) for k, v in numbers.items()])

    def close(self) -> None:
        self.progress.close()


def _drop_lines_after(path: Path, step: int) -> None:
    """Remove the lines after `step`: those steps are about to be run again."""
    if path.exists():
        kept = [line for line in path.read_text().splitlines() if _step_of(line) <= step]
        path.write_text("".join(line + "\n" for line in kept))


def _step_of(line: str) -> float:
    """Return the step of a line; infinity for an incomplete line, which a killed run leaves."""
    try:
        return float(json.loads(line)["step"])
    except (ValueError, KeyError, TypeError):
        return math.inf


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """Return the lines of a metrics.jsonl, without an incomplete one, which a killed run leaves."""
    lines = path.read_text(errors="replace").splitlines()
    return [json.loads(line) for line in lines if math.isfinite(_step_of(line))]
