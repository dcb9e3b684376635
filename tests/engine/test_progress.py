"""Progress on stderr: the time left against sums by hand, lines in log files, a bar on a terminal."""

from __future__ import annotations

import fcntl
import io
import logging
import pty
import struct
import termios
from collections.abc import Iterator

import pytest

from giantdet.engine import progress as module
from giantdet.engine.progress import EVERY, Progress, duration, is_terminal, shown_batches
from giantdet.engine.train import is_due


class Clock:
    """A clock that stands still until it is told to go on."""

    now = 100.0

    def __call__(self) -> float:
        return self.now

    def wait(self, seconds: float) -> None:
        self.now += seconds


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


class Batches(list[int]):
    """Stands for a loader."""

    @property
    def steps(self) -> int:
        return len(self)


def lines(stream: io.StringIO) -> list[str]:
    """The lines without their time of day."""
    return [line.split(" ", 1)[1] for line in stream.getvalue().splitlines()]


@pytest.mark.parametrize("every", [0, 1, 3, 4, 10, 25])
@pytest.mark.parametrize("first", [0, 4, 9, 10])
def test_evaluations_left_are_those_of_the_loop(every: int, first: int) -> None:
    progress = Progress(10, first, every, None)
    for step in range(first, 11):
        assert progress.evaluations_left == sum(is_due(s, every, 10) for s in range(step + 1, 11)), step
        progress.step()


def test_the_time_left_is_that_of_steps_and_evaluations() -> None:
    clock = Clock()
    progress = Progress(100, 0, 20, None, clock)
    clock.wait(50)  # the first step compiles
    progress.step()
    assert progress.seconds_left() == 99 * 50
    for _ in range(19):
        clock.wait(2)
        progress.step()
    assert progress.seconds_left() == pytest.approx(80 * 2), "the first step no longer counts"
    with progress.evaluating():
        clock.wait(30)
    assert progress.seconds_left() == pytest.approx(80 * 2 + 4 * 30), "an evaluation is no step"
    clock.wait(2)
    progress.step()
    assert progress.seconds_left() == pytest.approx(79 * 2 + 4 * 30)
    with progress.evaluating():
        clock.wait(10)
        assert progress.seconds_left() == pytest.approx(79 * 2 + 4 * 30 + 20), "this one is a third through"


def test_steps_that_become_slower_are_noticed() -> None:
    clock = Clock()
    progress = Progress(1000, 0, None, None, clock)
    for seconds, steps in ((1, 200), (3, 300)):
        for _ in range(steps):
            clock.wait(seconds)
            progress.step()
    assert progress.seconds_left() == pytest.approx(500 * 3, rel=0.01)


def test_a_log_file_has_whole_lines_at_intervals() -> None:
    clock, stream = Clock(), io.StringIO()
    progress = Progress(100, 0, 50, stream, clock)
    for step in range(1, 101):
        clock.wait(5)
        progress.step()
        progress.show(f"loss {step}")
        if step % 50 == 0:
            with progress.evaluating():
                for _ in progress.batches(Batches([1, 2, 3])):  # type: ignore[arg-type]
                    clock.wait(20)
    progress.exporting()
    progress.close()
    progress.close()
    text = lines(stream)
    assert "\r" not in stream.getvalue()
    assert text[0] == "training: step 1/100 (1%), loss 1, ETA 0:08:15 + 2 evaluations"
    assert text[1] == "training: step 7/100 (7%), loss 7, ETA 0:07:45 + 2 evaluations", f"{EVERY} s later"
    evaluating = [line for line in text if line.startswith("evaluating")]
    assert evaluating == [
        "evaluating: step 50/100 (50%), ETA 0:04:10 + 1 evaluation",
        "evaluating batch 2/3: step 50/100 (50%), ETA 0:04:10 + 1 evaluation",
        "evaluating: step 100/100 (100%), ETA 0:01:00",
        "evaluating batch 2/3: step 100/100 (100%), ETA 0:00:20",
    ]
    assert text[-2:] == [
        "exporting: step 100/100 (100%), ETA 0:00:00",
        "done: step 100/100 (100%), in 0:10:20",
    ]
    assert len(text) < 620 / EVERY + 8


def test_a_terminal_has_one_bar_with_the_phase() -> None:
    clock, stream = Clock(), Terminal()
    progress = Progress(4, 2, 1, stream, clock)
    clock.wait(5)
    progress.step()
    progress.show("loss 1.5")
    with progress.evaluating():
        seen = list(progress.batches(Batches([7, 8])))  # type: ignore[arg-type]
    after = len(stream.getvalue())
    clock.wait(5)
    progress.bar.refresh()  # type: ignore[union-attr]
    progress.close()
    shown = stream.getvalue()
    assert seen == [7, 8]
    assert "training:  75%|" in shown[after:] and "evaluat" not in shown[after:]
    assert "training:  75%|" in shown and "| 3/4, loss 1.5, ETA 0:00:05 + 1 evaluation" in shown
    assert shown.index("training:") < shown.index("evaluating:") < shown.index("scoring:")
    assert shown.count("\n") == 1, "the bar stays in its line"
    assert "done" not in shown, "the run was stopped"


def test_a_terminal_without_columns_gets_lines() -> None:
    """As some containers have one: a bar would have no room."""
    _, terminal = pty.openpty()
    with open(terminal, "w") as stream:
        assert stream.isatty() and not is_terminal(stream)
        size = struct.pack("HHHH", 24, 80, 0, 0)
        fcntl.ioctl(terminal, termios.TIOCSWINSZ, size)
        assert is_terminal(stream)


def test_nothing_is_written_without_a_stream(capsys: pytest.CaptureFixture[str]) -> None:
    progress = Progress(1, 0, 0, None)
    progress.step()
    progress.show("loss")
    progress.close()
    assert capsys.readouterr() == ("", "")


def test_warnings_do_not_break_the_bar(monkeypatch: pytest.MonkeyPatch) -> None:
    """A warning clears the bar, has its own line, and the bar is drawn again."""
    stream = Terminal()
    monkeypatch.setattr("sys.stderr", stream)
    handler = logging.StreamHandler(stream)
    logging.getLogger().addHandler(handler)
    try:
        progress = Progress(2, 0, None, stream)
        logging.getLogger("giantdet").warning("an image is left out")
        progress.close()
        assert handler in logging.getLogger().handlers
    finally:
        logging.getLogger().removeHandler(handler)
    assert "\ran image is left out\n" in stream.getvalue()


def test_an_evaluation_alone_in_a_log_file(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    clock = Clock()
    monkeypatch.setattr(module.time, "perf_counter", clock)

    def slow() -> Iterator[int]:
        for number in range(4):
            clock.wait(20)
            yield number

    class Loader:
        steps = 4

        def __iter__(self) -> Iterator[int]:
            return slow()

    assert list(shown_batches(Loader())) == [0, 1, 2, 3]  # type: ignore[arg-type,comparison-overlap]
    assert capsys.readouterr().err.splitlines() == [
        "evaluating: batch 2/4, ETA 0:00:40",
        "evaluating: batch 4/4, ETA 0:00:00",
    ]


def test_durations() -> None:
    assert [duration(s) for s in (0.4, 59.6, 3723, 90_000)] == [
        "0:00:00",
        "0:01:00",
        "1:02:03",
        "1 day, 1:00:00",
    ]
