"""Sections on scores: over time, of the last evaluation, by class and by size."""

from __future__ import annotations

import math
from typing import Any

from giantdet.evaluation import EVALUATORS
from giantdet.report.curves import SIZES, Precision, has_masks, precision
from giantdet.report.figures import bars, curves_of_recall, over_steps
from giantdet.report.page import Html, chart, folded, grid, joined, number, paragraph, table
from giantdet.report.run import Missing, Run

SHOWN_CLASSES = 20
"""Classes in a chart: with more, half of them are the best and half the worst."""
FEW = 12
"""Evaluations that are listed without a click."""
_TITLES = {"box": "Boxes", "mask": "Masks", "semantic": "Semantic maps", "panoptic": "Panoptic maps"}
_LEGEND = {
    "box": "AP is the mean over classes and IoUs of 0.50 to 0.95, AP50 that at an IoU of 0.50; s, m and l "
    "are small, medium and large objects; AR10 is the recall with 10 detections in an image.",
    "semantic": "mIoU and mACC are means of the classes that occur, pACC is the part of all pixels.",
    "panoptic": "PQ = SQ · RQ: how well segments fit, and how many are found; th are objects, st is stuff.",
}
_LEGEND["mask"] = _LEGEND["box"]
PRIMARY = {task: name for metric in EVALUATORS for task, name in metric.PRIMARY.items()}
"""The main number of each task."""


def progress(run: Run) -> Html:
    """Return the main number of each task over the evaluations of the run."""
    if not run.evaluated:
        raise Missing("the run was not evaluated (data.val, train.eval_every)")
    tasks = _tasks(run.evaluated[-1]["scores"])
    curves = {}
    for task in tasks:
        points = [(line["step"], line["scores"].get(task, {}).get(PRIMARY[task])) for line in run.evaluated]
        points = [(step, value) for step, value in points if value is not None and value >= 0]
        curves[f"{task} {PRIMARY[task]}"] = ([step for step, _ in points], [value for _, value in points])
    rows = [
        (line["step"], *(number(line["scores"].get(task, {}).get(PRIMARY[task])) for task in tasks))
        for line in run.evaluated[::-1]
    ]
    evaluations = table(["Step", *curves], rows, 0)
    if len(rows) == 1:
        return joined(
            [evaluations, paragraph("One evaluation; train.eval_every sets how often there is one.")]
        )
    svg = over_steps(run.pictures / "scores.png", curves, "score", run.epoch_steps, points=True)
    note = "Still rising at the end: a longer run may gain. Falling while the loss falls: overfitting."
    few = len(rows) <= FEW
    charts = [chart(svg, "By step", note), *([evaluations] if few else [])]
    return joined([grid(charts), Html() if few else folded("All evaluations", evaluations)])


def scores(run: Run) -> Html:
    """Return all numbers of the last evaluation."""
    if not run.scores:
        raise Missing("there is no scores.json with scores: the run was not evaluated")
    parts = []
    for task in _tasks(run.scores):
        numbers = {name: v for name, v in run.scores[task].items() if isinstance(v, (int, float))}
        parts.append(table([_TITLES.get(task, task), *numbers], [["", *map(number, numbers.values())]]))
    return joined([*parts, paragraph(_LEGEND[_tasks(run.scores)[-1]], " –: nothing to score.")])


def classes(run: Run) -> Html:
    """Return the main number by class, and for boxes and masks AP by class and size."""
    tasks = [task for task in _tasks(run.scores) if run.scores[task].get("per_class")]
    if not tasks:
        raise Missing("there are no scores by class")
    by_class = {name: [run.scores[t]["per_class"].get(name) for t in tasks] for name in _names(run, tasks)}
    shown, left_out = extremes(by_class)
    series = [f"{task} {'IoU' if task == 'semantic' else PRIMARY[task]}" for task in tasks]
    charts = []
    if shown:
        svg = bars(run.pictures / "classes.png", shown, series, "score")
        charts.append(chart(svg, "By class", left_out))
    curves = _curves(run)
    if curves:
        sizes = {size: [kind.ap(area=a) for kind in curves.values()] for a, size in enumerate(SIZES, 1)}
        svg = bars(run.pictures / "sizes.png", sizes, [f"{kind} AP" for kind in curves], "AP")
        note = "Small: below 32 × 32 pixels of the original image; medium: below 96 × 96."
        charts.append(chart(svg, "By size of the objects", note))
    counts = run.summaries.get("val", {}).get("objects_per_class", {})
    trained = run.summaries.get("train", {}).get("objects_per_class", {})
    head = ["Class", *series, *(f"{kind} AP {size}" for kind in curves for size in SIZES)]
    head += ["train objects", "val objects"] if counts else []
    rows = []
    for name, values in by_class.items():
        row: list[Any] = [name, *map(number, values)]
        for kind in curves.values():
            k = kind.names_K.index(name) if name in kind.names_K else None
            row += [number(None if k is None else kind.ap(k, a)) for a in (1, 2, 3)]
        rows.append([*row, *([trained.get(name, 0), counts.get(name, 0)] if counts else [])])
    listed = table(head, rows)
    return joined([grid(charts), listed if len(rows) <= SHOWN_CLASSES else folded("All classes", listed)])


def recalls(run: Run) -> Html:
    """Return precision over recall: the mean of the classes, and each class at IoU 0.5."""
    curves = _curves(run, strict=True)
    parts = []
    for kind, found in curves.items():
        means = {f"IoU {iou:.2f}": found.curve(iou) for iou in (0.5, 0.75, 0.9)}
        present = {name: curve for name, curve in means.items() if curve is not None}
        if not present:
            continue
        svg = curves_of_recall(run.pictures / f"precision_recall_{kind}.png", present)
        note = (
            "The area below a curve is AP at that IoU. A curve that ends early: objects that are never found."
        )
        parts.append(chart(svg, f"{_TITLES[kind]}, mean of the classes", note))
        aps = {name: [found.ap(k, iou=0.5)] for k, name in enumerate(found.names_K)}
        chosen, left_out = extremes({name: ap for name, ap in aps.items() if ap[0] is not None}, 6)
        if len(found.names_K) > 1:
            each = {name: found.curve(0.5, found.names_K.index(name)) for name in chosen}
            svg = curves_of_recall(
                run.pictures / f"precision_recall_{kind}_classes.png",
                {name: curve for name, curve in each.items() if curve is not None},
            )
            parts.append(chart(svg, f"{_TITLES[kind]} by class, IoU 0.50", left_out))
    if not parts:
        raise Missing("no object of the validation set counts")
    return grid(parts)


def extremes(values: dict[str, list[float | None]], most: int = SHOWN_CLASSES) -> tuple[dict[str, Any], str]:
    """Return the classes by falling score, and a note; of many classes the best and the worst half.

    Classes without a score are left out.
    """
    scored = {name: row for name, row in values.items() if row[-1] is not None and not math.isnan(row[-1])}
    ordered = sorted(scored, key=lambda name: -float(scored[name][-1] or 0))
    others = len(values) - len(scored)
    note = f"{others} more {'class has' if others == 1 else 'classes have'} no score. " if others else ""
    if len(ordered) > most:
        half = most // 2
        note += f"The best {half} and the worst {half} of {len(ordered)} classes."
        ordered = ordered[:half] + ordered[-half:]
    return {name: scored[name] for name in ordered}, note.strip()


def _names(run: Run, tasks: list[str]) -> list[str]:
    return list(dict.fromkeys(name for task in tasks for name in run.scores[task]["per_class"]))


def _tasks(found: dict[str, Any]) -> list[str]:
    return [task for task in PRIMARY if task in found]


def _curves(run: Run, strict: bool = False) -> dict[str, Precision]:
    """Return the precision of boxes and masks; {} where it cannot be computed, unless it must be."""
    try:
        if run.validation.protocol != "coco":
            raise Missing(f"{run.validation.protocol.upper()} has rules of its own")
        found: dict[str, Precision] = run.remember("curves", lambda: _computed(run))
        return found
    except Missing:
        if strict:
            raise
        return {}


def _computed(run: Run) -> dict[str, Precision]:
    limit, backend = run.max_detections, run.config.giantdet.eval.backend
    kinds = {"box": precision(run.truth, run.results, "bbox", limit, backend)}
    if run.results.rles is not None and has_masks(run.truth) and "mask" in run.scores:
        kinds["mask"] = precision(run.truth, run.results, "segm", limit, backend)
    return kinds
