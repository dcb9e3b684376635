"""The progress of a run on stderr: which phase runs, the last losses, and the time that is left.

On a terminal this is a bar that is redrawn in place; in a file or a pipe it is a line of its own every
`EVERY` seconds and at each new phase, so that logs stay readable.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from datetime import timedelta
from typing import TextIO

from tqdm import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm

from giantdet.data.loader import Loader
from giantdet.distributed import comm
from giantdet.structures import Batch

EVERY = 30.0  # seconds between the lines of a log file
_REDRAWN = 0.5  # seconds between changes of the text beside a bar
_RECENT = 50  # steps over which the time of a step is averaged


class Progress:
    """The progress of a whole run, evaluations included.

    The time left is that of the remaining steps, as the last 50 took on average, and of the remaining
    evaluations, as the last one took. Before the first evaluation their number is shown instead. What is
    rare, such as a checkpoint, counts as a part of its step.

    Args:
        total_steps, first_step: length of the run, and number of steps that were done before.
        eval_every: steps between evaluations, 0: one at the end; None: no evaluation.
        stream: where to write; None writes nothing.
        clock: returns seconds.
    """

    def __init__(
        self,
        total_steps: int,
        first_step: int = 0,
        eval_every: int | None = None,
        stream: TextIO | None = sys.stderr,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        self.total, self.done, self.eval_every = total_steps, first_step, eval_every
        self.stream, self.clock = stream, clock
        self.begun = self.since = clock()
        self.step_seconds = 0.0
        self.timed = 0
        self.eval_seconds: float | None = None
        self.eval_begun: float | None = None
        self.values = ""
        self.phase = ""
        self.written = -EVERY
        self.bar: tqdm | None = None
        self.stack = ExitStack()
        if stream is not None and is_terminal(stream):
            form = "{desc}: {percentage:3.0f}%|{bar}| {n_fmt}/{total_fmt}{postfix}"
            self.bar = tqdm(
                total=total_steps, initial=first_step, bar_format=form, dynamic_ncols=True, file=stream
            )
            self.stack.enter_context(logging_redirect_tqdm())  # warnings appear above the bar
            self._show("training")

    def step(self) -> None:
        """Count an optimizer step."""
        now = self.clock()
        # The first step warms up caches and compilers: it counts only until there is a second.
        weight = max(1 / max(self.timed, 1), 1 / _RECENT)
        self.step_seconds += weight * (now - self.since - self.step_seconds)
        self.timed, self.since = self.timed + 1, now
        self.done += 1
        if self.bar is not None:
            self.bar.update()

    def show(self, values: str) -> None:
        """Show the last values, for example the loss."""
        self.values = values
        self._show("training")

    @contextmanager
    def evaluating(self) -> Iterator[None]:
        """Show that an evaluation runs, and measure its time."""
        self.eval_begun = self.clock()
        self._show("evaluating")
        yield
        self.since = self.clock()
        self.eval_seconds, self.eval_begun = self.since - self.eval_begun, None
        self._show("training", in_log=False)

    def batches(self, loader: Loader) -> Iterator[Batch]:
        """Yield the batches of an evaluation, and show how many there were."""
        for number, batch in enumerate(loader, 1):
            yield batch
            self._show("evaluating", f"batch {number}/{loader.steps}")
        self._show("scoring", in_log=False)

    def exporting(self) -> None:
        """Show that the model is being exported."""
        self._show("exporting")

    def seconds_left(self) -> float:
        """Return the seconds that the rest of the run takes, without evaluations before one was measured."""
        evaluation = self.eval_seconds or 0.0
        left = (self.total - self.done) * self.step_seconds + self.evaluations_left * evaluation
        running = 0.0 if self.eval_begun is None else evaluation - (self.clock() - self.eval_begun)
        return left + max(0.0, running)

    @property
    def evaluations_left(self) -> int:
        """The number of evaluations after the steps that remain; see `train.is_due`."""
        if self.eval_every is None or self.done >= self.total:
            return 0
        every = self.eval_every or self.total
        return (self.total - 1) // every - self.done // every + 1

    def close(self) -> None:
        """Write the last line, once."""
        if self.stream is not None and self.done >= self.total:
            self._show("done")
        self.stack.close()
        if self.bar is not None:
            self.bar.close()
        self.stream = None

    def _show(self, phase: str, detail: str = "", in_log: bool = True) -> None:
        """Show the phase if it is a new one, or the last output is old; `in_log`: also in a log file."""
        if self.stream is None:
            return
        is_new, self.phase, now = phase != self.phase, phase, self.clock()
        if self.bar is None and not in_log:
            return
        if not is_new and now - self.written < (EVERY if self.bar is None else _REDRAWN):
            return
        self.written = now
        name = f"{phase} {detail}".strip()
        left = f"in {duration(now - self.begun)}" if phase == "done" else self._left()
        texts = [text for text in (self.values if phase == "training" else "", left) if text]
        if self.bar is not None:
            self.bar.set_description_str(name, refresh=False)
            self.bar.set_postfix_str(", ".join(texts))
        else:
            texts.insert(0, f"step {self.done}/{self.total} ({100 * self.done // max(self.total, 1)}%)")
            print(time.strftime("%H:%M:%S"), f"{name}: {', '.join(texts)}", file=self.stream, flush=True)

    def _left(self) -> str:
        """Return the time left in words."""
        if not self.timed:
            return ""
        unknown = self.evaluations_left if self.eval_seconds is None else 0
        more = f" + {unknown} evaluation{'s' if unknown > 1 else ''}" if unknown else ""
        return f"ETA {duration(self.seconds_left())}{more}"


def is_terminal(stream: TextIO) -> bool:
    """Return whether a bar can be drawn. Some terminals of containers have no columns."""
    try:
        return stream.isatty() and os.get_terminal_size(stream.fileno()).columns > 0
    except OSError:  # something else that stands for a terminal
        return True


def duration(seconds: float) -> str:
    """Return a duration as `1:02:03`, or `2 days, 1:02:03`."""
    return str(timedelta(seconds=round(seconds)))


def shown_batches(loader: Loader) -> Iterator[Batch]:
    """Yield the batches of `giantdet eval`; the main rank shows a bar, or in a log file a line at times."""
    stream = sys.stderr
    if not comm.is_main():
        yield from loader
        return
    if is_terminal(stream):
        yield from tqdm(loader, "evaluating", loader.steps, unit="batch", dynamic_ncols=True)
        return
    begun = written = time.perf_counter()
    for number, batch in enumerate(loader, 1):
        yield batch
        now = time.perf_counter()
        if now - written >= EVERY and loader.steps:
            written, left = now, (now - begun) / number * (loader.steps - number)
            print(f"evaluating: batch {number}/{loader.steps}, ETA {duration(left)}", file=stream, flush=True)


def say(text: str) -> None:
    """Print to stdout at once, above the bar if there is one."""
    tqdm.write(text)
    sys.stdout.flush()
