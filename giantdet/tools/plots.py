"""Plots of a run, from its metrics.jsonl."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

from giantdet.config.resolved import ResolvedRun
from giantdet.engine.metrics import read_metrics
from giantdet.errors import InputError
from giantdet.optim.schedules import lr_function


def plot_run(metrics: Path, folder: Path) -> list[Path]:
    """Draw all plots that a run has data for, losses.png and with AGVM agvm.png, and return their paths."""
    pictures = {"losses.png": plot_losses}
    if any(key.startswith("agvm/") for line in _logged(metrics) for key in line):
        pictures["agvm.png"] = plot_agvm
    for name, draw in pictures.items():
        draw(metrics, folder / name)
    return [folder / name for name in pictures]


def plot_schedule(run: ResolvedRun, folder: Path) -> str:
    """Draw the LR of a resolved run over its steps, `NAME_schedule.png`, and return a summary of the
    schedule.

    Raises InputError, a ValueError, where the run has no scheduler block.
    """
    scheduler, steps, lr = run.scheduler, run.giantdet.train.steps, run.optimizer.lr
    if scheduler is None:
        raise InputError(f"{run.path}: no scheduler block; the learning rate stays {lr}")
    assert steps is not None
    function = lr_function(scheduler, lr)
    name = run.path.stem if run.path is not None else "run"
    title = f"{name}: batch {run.batch.total}, {steps} steps, {run.optimizer.name}"

    plt = _pyplot()
    figure, axis = plt.subplots(figsize=(8, 4))
    shown = sorted({round(i * (steps - 1) / 2000) for i in range(2001)} | set(range(min(steps, 200))))
    axis.plot(shown, [function(step) for step in shown], drawstyle="steps-post")
    axis.set_title(title, fontsize=9)
    axis.set_ylabel("learning rate")
    folder.mkdir(parents=True, exist_ok=True)
    picture = folder / f"{name}_schedule.png"
    _finish(plt, figure, (axis,), picture)

    lines = [title, f"{scheduler.name} {json.dumps(scheduler.given())}"]
    for step in sorted({0, steps // 100, steps // 20, steps // 4, steps // 2, 3 * steps // 4, steps - 1}):
        lines.append(f"  step {step:>7}  LR {function(step):.4g}")
    return "\n".join([*lines, str(picture)])


def plot_losses(path: Path, picture: Path) -> None:
    """Draw the losses of a metrics.jsonl, and the LR below them, into a PNG file."""
    plt = _pyplot()
    lines = _logged(path)
    steps = [line["step"] for line in lines]
    figure, (upper, lower) = plt.subplots(2, 1, sharex=True, figsize=(8, 6), height_ratios=(3, 1))
    for name in [key for key in (lines[0] if lines else {}) if key.startswith("loss")]:
        upper.plot(steps, _values(lines, name), label=name, linewidth=2 if name == "loss" else 1)
    upper.set_ylabel("loss")
    upper.set_yscale("log")
    if lines:
        upper.legend(fontsize=8)
    lower.plot(steps, _values(lines, "lr"), color="black")
    lower.set_ylabel("learning rate")
    _finish(plt, figure, (upper, lower), picture)


def plot_agvm(path: Path, picture: Path) -> None:
    """Draw each module's gradient variance, factor and LR over the steps into a PNG file (AGVM's figure 1).

    Raises InputError, a ValueError, where AGVM was not enabled in the run.
    """
    lines = [line for line in _logged(path) if any(key.startswith("agvm/") for key in line)]
    if not lines:
        raise InputError(f"{path}: no values of AGVM; it was not enabled in this run")
    plt = _pyplot()
    figure, axes = plt.subplots(3, 1, sharex=True, figsize=(8, 9))
    for module in [key.split("/")[1] for key in lines[0] if key.endswith("/factor")]:
        for axis, value in zip(axes, ("variance", "factor", "factor"), strict=True):
            points = [line for line in lines if f"agvm/{module}/{value}" in line]
            scale = _values(points, "lr") if axis is axes[2] else [1.0] * len(points)
            values = [v * s for v, s in zip(_values(points, f"agvm/{module}/{value}"), scale, strict=True)]
            axis.plot([line["step"] for line in points], values, label=module)
    for axis, label in zip(axes, ("variance, 1 - cos", "factor of the LR", "learning rate"), strict=True):
        axis.set_ylabel(label)
    axes[0].legend(fontsize=8)
    _finish(plt, figure, axes, picture)


def _logged(path: Path) -> list[dict[str, Any]]:
    return [line for line in read_metrics(path) if "loss" in line]


def _values(lines: list[dict[str, Any]], name: str) -> list[float]:
    """Return a value of each line; NaN, a gap in the curve, where the file has null or no value."""
    return [math.nan if line.get(name) is None else float(line[name]) for line in lines]


def _pyplot() -> Any:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    return pyplot


def _finish(plt: Any, figure: Any, axes: Any, picture: Path) -> None:
    for axis in axes:
        axis.grid(alpha=0.3)
    axes[-1].set_xlabel("step")
    figure.tight_layout()
    figure.savefig(picture, dpi=110)
    plt.close(figure)
