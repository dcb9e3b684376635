"""Sections on the steps of a run: losses and LR, speed and memory, what was skipped, AGVM."""

from __future__ import annotations

import math

from giantdet.report.figures import over_steps, panels
from giantdet.report.page import Html, chart, grid, joined, paragraph, table
from giantdet.report.run import Missing, Run

_COUNTED = {
    "skipped_steps": "steps skipped, because their gradient was not finite",
    "dropped_objects": "objects left out, beyond data.max_objects",
    "tiny_objects": "objects left out, narrower than a pixel after scaling",
    "replaced_images": "images replaced, which could not be used",
    "worker_restarts": "restarts of loader processes",
    "failed_saves": "checkpoints that could not be saved",
}
"""Counters of a log line; they count from the start of the process."""
_WHOLE = (*_COUNTED, "step")


def training(run: Run) -> Html:
    """Return the losses, the LR and the norm of the gradient over the steps."""
    if not run.logged:
        raise Missing("metrics.jsonl has no lines yet")
    names = [name for name in run.logged[-1] if name.startswith("loss")]
    losses = {name: run.series(name) for name in names}
    parts = [
        chart(
            over_steps(run.pictures / "losses.png", losses, "loss", run.epoch_steps, log=True, thick="loss"),
            "Losses",
            "Means of all ranks since the line before. The thick line is the sum.",
        )
    ]
    for key, label, note in (
        ("lr", "learning rate", "The highest of all parameter groups."),
        (
            "grad_norm",
            "norm of the gradient",
            "Before clipping. Rare peaks are usual, a rising trend is not.",
        ),
    ):
        steps, values = run.series(key)
        if any(map(math.isfinite, values)):
            svg = over_steps(
                run.pictures / f"{key}.png",
                {label: (steps, values)},
                label,
                run.epoch_steps,
                log=key == "grad_norm",
            )
            parts.append(chart(svg, label.capitalize(), note))
    return grid(parts)


def speed(run: Run) -> Html:
    """Return throughput, the time spent on data, peak memory, and counts of what was left out."""
    if not run.logged:
        raise Missing("metrics.jsonl has no lines yet")
    parts = []
    for key, label, title, note in (
        ("images_per_second", "images/s", "Throughput", "All ranks together, evaluations included."),
        ("data_share", "share of the time", "Waiting for data", "Near 0 is good; else raise data.workers."),
        ("memory_gib", "GiB", "Peak memory of the main rank", "Since the start of the process."),
    ):
        steps, values = run.series(key)
        if any(map(math.isfinite, values)):
            svg = over_steps(run.pictures / f"{key}.png", {label: (steps, values)}, label)
            parts.append(chart(svg, title, note))
    counted = [
        (meaning, f"{run.logged[-1][key]:g}") for key, meaning in _COUNTED.items() if run.logged[-1].get(key)
    ]
    if not run.logged[-1].get("skipped_steps"):
        counted.insert(0, ("steps skipped, because their gradient was not finite", "0"))
    return joined([grid(parts), table(["Counted since the last start", ""], counted)])


def agvm(run: Run) -> Html:
    """Return each module's gradient variance, the factor of its LR, and that LR."""
    keys = list(dict.fromkeys(key for line in run.logged for key in line if key.startswith("agvm/")))
    modules = [key.split("/")[1] for key in keys if key.endswith("/factor")]
    if not modules:
        raise Missing("agvm.enabled is false")
    variance = {module: run.series(f"agvm/{module}/variance") for module in modules}
    factor = {module: run.series(f"agvm/{module}/factor") for module in modules}
    rate = {}
    for module in modules:
        lines = [line for line in run.logged if line.get(f"agvm/{module}/factor") is not None]
        rate[module] = (
            [line["step"] for line in lines],
            [line[f"agvm/{module}/factor"] * (line["lr"] or math.nan) for line in lines],
        )
    groups = {"variance, 1 − cos": variance, "factor": factor, "learning rate": rate}
    svg = panels(run.pictures / "agvm.png", groups)
    last = [(m, *(f"{values[m][1][-1]:.3g}" for values in (variance, factor, rate))) for m in modules]
    return joined(
        [
            paragraph(
                "AGVM scales the learning rate of each module so that the variances of the gradients agree. "
                "Factors that stay at a limit of agvm.clamp say that it cannot."
            ),
            grid([chart(svg, "By module")]),
            table(["Module, at the end", "variance", "factor", "learning rate"], last),
        ]
    )
