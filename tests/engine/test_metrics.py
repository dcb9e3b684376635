"""metrics.jsonl: means, resumed runs, a loss that is NaN, the plot."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from giantdet.engine.metrics import Metrics, read_metrics
from giantdet.tools.plots import plot_losses


def test_means_over_the_steps_since_the_last_line(tmp_path: Path) -> None:
    metrics = Metrics(tmp_path / "m.jsonl", total_steps=4, first_step=0)
    for step in range(1, 5):
        metrics.add({"loss": torch.tensor(float(step)), "loss_cls": torch.tensor(1.0)}, 3, 0.0)
        metrics.add({"loss": torch.tensor(float(step) + 1), "loss_cls": torch.tensor(2.0)}, 3, 0.0)
        metrics.step()
        if step % 2 == 0:
            metrics.log(step, lr=0.1 * step)
    metrics.write_scores(4, {"box": {"AP": 0.5}}, images_seen=24)
    metrics.close()
    first, second, scores = read_metrics(tmp_path / "m.jsonl")
    assert (first["step"], first["loss"], first["loss_cls"], first["lr"]) == (2, 2.0, 1.5, 0.2)
    assert (second["step"], second["loss"]) == (4, 4.0)
    assert first["images_per_second"] > 0
    assert 0 <= first["data_share"] <= 1
    assert scores == {"step": 4, "scores": {"box": {"AP": 0.5}}}


def test_resumed_run_drops_the_lines_that_it_will_rewrite(tmp_path: Path) -> None:
    path = tmp_path / "m.jsonl"
    # The last line was cut off when its run was killed.
    path.write_text("".join(json.dumps({"step": s, "loss": 1.0}) + "\n" for s in (5, 10, 15)) + '{"step": 2')
    metrics = Metrics(path, total_steps=20, first_step=10)
    metrics.close()
    assert [line["step"] for line in read_metrics(path)] == [5, 10]


def test_run_from_the_start_drops_an_older_run(tmp_path: Path) -> None:
    path = tmp_path / "m.jsonl"
    path.write_text('{"step": 5, "loss": 1.0}\n')
    Metrics(path, total_steps=20, first_step=0).close()
    assert read_metrics(path) == []


def test_a_skipped_step_does_not_count_in_the_means(tmp_path: Path) -> None:
    metrics = Metrics(tmp_path / "m.jsonl", total_steps=4, first_step=0)
    for value, applied in ((1.0, True), (float("nan"), False), (3.0, True)):
        metrics.add({"loss": torch.tensor(value)}, 1, 0.0)
        metrics.step(applied)
    assert metrics.log(3)["loss"] == 2.0
    metrics.add({"loss": torch.tensor(float("inf"))}, 1, 0.0)
    metrics.step(False)
    line = metrics.log(4, skipped_steps=2)
    assert "loss" not in line and line["skipped_steps"] == 2 and line["images_per_second"] > 0
    metrics.close()


def test_monitors_get_the_numbers(tmp_path: Path) -> None:
    class Monitor:
        enabled = True
        events: list[Any] = []  # noqa: RUF012

        def write_events(self, events: list[Any]) -> None:
            self.events += events

    monitor = Monitor()
    metrics = Metrics(tmp_path / "m.jsonl", 4, 0, monitor)
    metrics.add({"loss": torch.tensor(2.0)}, 1, 0.0)
    metrics.step()
    metrics.log(1, images_seen=16, lr=0.5)
    scores = {"box": {"AP": 0.25, "APs": None, "per_class": {"cat": 0.25, "dog": None}}}
    metrics.write_scores(1, scores, images_seen=16)
    metrics.close()
    assert ("giantdet/loss", 2.0, 16) in monitor.events
    assert ("giantdet/lr", 0.5, 16) in monitor.events
    assert monitor.events[-1] == ("giantdet/box/AP", 0.25, 16), "a missing value is not sent"
    assert not any("cat" in name for name, _, _ in monitor.events), "1,203 curves of classes are too many"


def test_metrics_are_json_whatever_the_numbers(tmp_path: Path) -> None:
    """Python's own parser accepts NaN; others refuse the file."""
    metrics = Metrics(tmp_path / "m.jsonl", 4, 0)
    metrics.log(1, lr=float("nan"), norm=float("inf"), nested={"a": [float("-inf"), 1.5, None]})
    metrics.write_scores(1, {"box": {"AP": float("nan"), "per_class": {"cat": None}}}, images_seen=4)
    metrics.close()

    def refused(name: str) -> None:
        raise AssertionError(f"{name} is not JSON")

    first, second = (
        json.loads(line, parse_constant=refused) for line in (tmp_path / "m.jsonl").read_text().splitlines()
    )
    assert (first["lr"], first["norm"], first["nested"]) == (None, None, {"a": [None, 1.5, None]})
    assert second["scores"] == {"box": {"AP": None, "per_class": {"cat": None}}}


@pytest.mark.parametrize("steps", [0, 1, 5])
def test_plot_is_a_picture_whatever_was_logged(tmp_path: Path, steps: int) -> None:
    lines = [{"step": s, "loss": 1.0 / s, "loss_cls": 0.5, "lr": 0.1} for s in range(1, steps + 1)]
    if steps > 1:
        lines[1]["loss"] = lines[1]["lr"] = None
    lines.append({"step": steps, "scores": {}})
    (tmp_path / "m.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    plot_losses(tmp_path / "m.jsonl", tmp_path / "losses.png")
    assert Image.open(tmp_path / "losses.png").width > 100
