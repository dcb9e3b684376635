"""The rows of studies/rules.csv, one an evaluation, and what studies/rules.py makes of them."""

from __future__ import annotations

import csv
import math
import statistics
from pathlib import Path
from typing import Any, NamedTuple

REFERENCE = 8  # images per step that the LR is tuned for
TUNE = "tune"  # runs at the reference batch that choose the LR
BASE = "sqrt"  # the arm that the others are compared with
CONTRASTS = (
    ("agvm", BASE),
    ("noise_scale", BASE),
    ("sqrt_long", BASE),
    ("agvm_long", "sqrt_long"),
    ("noise_scale", "sqrt_long"),
    ("agvm", "uniform"),
    ("agvm", "inverse"),
    ("noise_scale", "agvm"),
    ("noise_scale", "noise_scale_uniform"),
    ("noise_scale", "none"),
    ("noise_scale", "double"),
    ("adam_full", BASE),
    ("adam_full_long", "sqrt_long"),
    ("adam_full_long", "noise_scale"),
)
SCORES = {"detection": ("box", "AP"), "cells": ("box", "AP"), "semantic": ("semantic", "mIoU")}
MODULES = ("backbone", "fpn", "rpn", "box_head", "semantic_head")
COLUMNS: tuple[str, ...] = (
    "task",
    "optimizer",
    "arm",
    "batch",
    "seed",
    "lr",
    "images",
    "score",
    "cpu_seconds",
)
COLUMNS += tuple(f"{module}_{value}" for module in MODULES for value in ("factor", "noise_scale"))
TEXTS = ("task", "optimizer", "arm")
Row = dict[str, Any]
STUDENT = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179, 2.160, 2.145)
STUDENT += (2.131, 2.120, 2.110, 2.101, 2.093, 2.086)
"""97.5% quantiles of Student's distribution, by degrees of freedom from 1 on."""


class Job(NamedTuple):
    """One run."""

    task: str
    optimizer: str
    arm: str
    batch: int
    seed: int
    lr: float

    @property
    def label(self) -> str:
        return f"{self.task}_{self.optimizer}_{self.arm}_batch{self.batch}_seed{self.seed}_lr{self.lr:g}"


def append(path: Path, rows: list[Row]) -> None:
    new = not path.exists()
    with path.open("a", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
        if new:
            writer.writeheader()
        writer.writerows(rows)


def read(path: Path) -> list[Row]:
    """Return the rows of the CSV, numbers as numbers; none where there is no file."""
    if not path.exists():
        return []
    whole = ("batch", "seed", "images")
    with path.open(newline="") as file:
        return [
            {k: v if k in TEXTS else int(v) if k in whole else float(v) for k, v in line.items() if v}
            for line in csv.DictReader(file)
        ]


def label_of(row: Row) -> str:
    return Job(**{key: row[key] for key in Job._fields}).label


def select(rows: list[Row], task: str, optimizer: str, arm: str) -> list[Row]:
    keys = (task, optimizer, arm)
    return [row for row in rows if (row["task"], row["optimizer"], row["arm"]) == keys]


def last_rows(rows: list[Row]) -> list[Row]:
    """Return the last row of each run that did not diverge."""
    runs: dict[str, Row] = {label_of(row): row for row in rows}
    return [row for row in runs.values() if not math.isnan(row["score"])]


def by_seed(rows: list[Row]) -> dict[int, float]:
    """Return the last score of each seed's run."""
    return {row["seed"]: row["score"] for row in last_rows(rows)}


# Tables


def table(found: list[Row], names: dict[str, str], task: str, optimizer: str, share: float) -> str:
    """Return a Markdown table of scores, differences to the base seed by seed, and images to the target.

    names: of the arms. share: of the tuned LR's score at the reference batch that is the target.
    """
    runs = {arm: select(found, task, optimizer, arm) for arm in names}
    finals = {arm: by_seed(rows) for arm, rows in runs.items()}
    tuning = sorted((row["lr"], row["score"]) for row in last_rows(select(found, task, optimizer, TUNE)))
    lines = [f"{task}, {optimizer}; tuned at batch {REFERENCE}: "]
    lines[0] += ", ".join(f"{lr:g}: {score:.3f}" for lr, score in tuning)
    lines += ["", f"| | seeds | score | minus {names[BASE]} | images to the target | factors |"]
    lines += ["|---" * 6 + "|"]
    base = finals[BASE]
    target = share * max((score for _, score in tuning), default=math.nan)
    for arm, rows in runs.items():
        if not rows:
            continue
        scores, labels = finals[arm], {label_of(row) for row in rows}
        pairs = [scores[seed] - base[seed] for seed in scores if seed in base]
        lost = len(labels) - len(scores)
        needed = [images_to(target, [r for r in rows if r["seed"] == seed]) for seed in scores]
        reached = [images for images in needed if images is not None]
        cells = [names[arm], str(len(scores)) + (f", {lost} diverged" if lost else "")]
        cells.append(interval([*scores.values()], ".3f"))
        cells.append("" if arm in (BASE, "reference") else interval(pairs, "+.3f"))
        cells.append(
            interval(reached, ".0f") if len(reached) == len(needed) else f"{len(reached)} reached it"
        )
        cells.append(factors(last_rows(rows)))
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join([*lines, f"\nTarget: {target:.3f}. Intervals: 95%, Student's t over the seeds.\n"])


def contrasts(found: list[Row], names: dict[str, str], blocks: list[tuple[str, str]]) -> str:
    """Return a Markdown table of differences between two arms, seed by seed, in each block and over all."""
    heads = [*(f"{task}, {optimizer}" for task, optimizer in blocks), "all"]
    lines = [f"| | {' | '.join(heads)} |", "|---" * (len(heads) + 1) + "|"]
    for one, other in CONTRASTS:
        cells, pooled = [], []
        for block in blocks:
            of_one, of_other = (by_seed(select(found, *block, arm)) for arm in (one, other))
            pairs = [of_one[seed] - of_other[seed] for seed in of_one if seed in of_other]
            pooled += pairs
            cells.append(interval(pairs, "+.3f"))
        lines.append(
            f"| {names[one]} minus {names[other]} | {' | '.join([*cells, interval(pooled, '+.3f')])} |"
        )
    return "\n".join(lines)


def interval(values: list[float], form: str) -> str:
    """Return the mean and half the width of its 95% interval."""
    if not values:
        return ""
    mean = format(statistics.fmean(values), form)
    if len(values) == 1:
        return mean
    quantile = STUDENT[min(len(values) - 1, len(STUDENT)) - 1]
    half = quantile * statistics.stdev(values) / math.sqrt(len(values))
    return f"{mean} ± {format(half, form.replace('+', ''))}"


def images_to(target: float, rows: list[Row]) -> float | None:
    """Return the images after which a run's score first reaches the target, between evaluations linearly."""
    before = (0, 0.0)
    for row in rows:
        if row["score"] >= target:
            share = (target - before[1]) / max(row["score"] - before[1], 1e-9)
            return float(before[0] + share * (row["images"] - before[0]))
        before = (row["images"], row["score"])
    return None


def factors(rows: list[Row]) -> str:
    """Return each module's factor at the end, the mean of the seeds."""
    found = {m: [row[f"{m}_factor"] for row in rows if f"{m}_factor" in row] for m in MODULES}
    return ", ".join(f"{m} {statistics.fmean(values):.2f}" for m, values in found.items() if values)


def plot(found: list[Row], names: dict[str, str], blocks: list[tuple[str, str]], path: Path) -> None:
    """Draw scores, noise scales and LRs over the images seen, a column for each (task, optimizer)."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(
        3, len(blocks), figsize=(4.5 * len(blocks), 10), squeeze=False, layout="constrained"
    )
    for column, (task, optimizer) in enumerate(blocks):
        scores, scales, rates = axes[:, column]
        for number, (arm, name) in enumerate(names.items()):
            color = pyplot.colormaps["tab20"](number)
            curve(scores, select(found, task, optimizer, arm), "score", color, name)
        for number, module in enumerate(MODULES):
            rows = select(found, task, optimizer, BASE)
            curve(scales, rows, f"{module}_noise_scale", f"C{number}", module)
            for arm, style in (("noise_scale", "-"), ("agvm", "--")):
                rows = [
                    {**row, "rate": row[f"{module}_factor"] * (1.0 if arm == "noise_scale" else root(row))}
                    for row in select(found, task, optimizer, arm)
                    if f"{module}_factor" in row
                ]
                curve(rates, rows, "rate", f"C{number}", f"{module}, {names[arm]}", style)
        scores.set_title(f"{task}, {optimizer}")
        scores.set_ylabel(" ".join(SCORES[task]))
        scales.set(ylabel=f"noise scale in images, {names[BASE]}", yscale="log")
        rates.set(xlabel="thousand images seen", ylabel=f"LR, relative to that of batch {REFERENCE}")
        for batch in {row["batch"] for row in found}:
            scales.axhline(batch, color="grey", linestyle=":")
    for row in axes:  # one legend for the columns, beside them
        handles = {}
        for axis in row:
            handles |= dict(zip(*reversed(axis.get_legend_handles_labels()), strict=True))
        row[-1].legend(handles.values(), handles, loc="center left", bbox_to_anchor=(1.0, 0.5), fontsize=8)
    figure.savefig(path, dpi=110)


def root(row: Row) -> float:
    """Return the factor of square-root scaling."""
    return math.sqrt(row["batch"] / REFERENCE)


def curve(axis: Any, rows: list[Row], key: str, color: Any, label: str, style: str = "-") -> None:
    """Draw the mean of the runs over the images, and each run thinly."""
    points: dict[float, list[float]] = {}
    runs: dict[str, list[tuple[float, float]]] = {}
    for row in (row for row in rows if key in row):
        points.setdefault(row["images"] / 1000, []).append(row[key])
        runs.setdefault(label_of(row), []).append((row["images"] / 1000, row[key]))
    if not points:
        return
    for run_points in runs.values():
        axis.plot(*zip(*run_points, strict=True), color=color, alpha=0.25, linewidth=0.7, linestyle=style)
    means = [statistics.fmean(values) for values in points.values()]
    axis.plot(list(points), means, color=color, label=label, linestyle=style)
