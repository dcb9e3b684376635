"""Sections on the errors of boxes: which classes are confused, and what scores are worth."""

from __future__ import annotations

import numpy as np

from giantdet.report.calibration import reliability
from giantdet.report.figures import matrix, over_thresholds, reliability_diagram
from giantdet.report.matching import IOU, confusion
from giantdet.report.page import Html, chart, code, grid, joined, paragraph, table
from giantdet.report.run import Run

BACKGROUND = "background"
_SHOWN = 40  # classes in the picture of a matrix
_WITH_NUMBERS = 21
_PAIRS = 10


def confusions(run: Run) -> Html:
    """Return the confusion matrix of boxes, with background, and the most frequent confusions."""
    found = run.detections
    threshold = found.thresholds.best
    names = [run.truth.cats[number]["name"] for number in sorted(run.truth.cats)]
    counts_KK = np.zeros((len(names) + 1, len(names) + 1), np.int64)
    for image in found.images:
        counts_KK += confusion(image.above(threshold), len(names))
    rule = paragraph(
        f"Detections with a score of at least {threshold:.2f}, the threshold of the best F1. A detection and "
        f"an object are a pair from an IoU of {IOU} of their boxes, of whatever classes. The row "
        f"“{BACKGROUND}” has detections where no object is, the column “{BACKGROUND}” objects that were not "
        "found."
    )
    return joined([rule, matrix_of(run, "confusion.png", counts_KK, [*names, BACKGROUND], "objects")])


def matrix_of(run: Run, file: str, counts_KX: np.ndarray, names: list[str], unit: str) -> Html:
    """Return the picture of a confusion matrix, the shares of each row, and its largest other entries."""
    rows = counts_KX.shape[0]
    totals_K = counts_KX.sum(1)
    chosen, note = np.arange(counts_KX.shape[1]), ""
    if len(chosen) > _SHOWN:
        # The classes with the most errors, in their order.
        errors_K = totals_K - counts_KX[np.arange(rows), np.arange(rows)]
        chosen = np.sort(np.argsort(-errors_K, kind="stable")[:_SHOWN])
        note = f" The {_SHOWN} of {counts_KX.shape[1]} rows with the most errors."
    true = chosen[chosen < rows]
    shares_KX = counts_KX / np.where(totals_K > 0, totals_K, 1)[:, None]
    svg = matrix(
        run.pictures / file,
        shares_KX[np.ix_(true, chosen)],
        [names[k] for k in true],
        [names[k] for k in chosen],
        texts=len(chosen) <= _WITH_NUMBERS,
    )
    other_KX = counts_KX.copy()
    other_KX[np.arange(rows), np.arange(rows)] = 0
    order = np.argsort(-other_KX, axis=None, kind="stable")[:_PAIRS]
    pairs = [(int(i // counts_KX.shape[1]), int(i % counts_KX.shape[1])) for i in order]
    listed = [
        (names[r], names[c], f"{counts_KX[r, c]:,}", f"{100 * shares_KX[r, c]:.1f} %")
        for r, c in pairs
        if other_KX[r, c]
    ]
    few = len(chosen) <= 12
    note = f"The diagonal is right.{note}"
    picture = chart(svg, "Per cent of each row.", note, scrolls=True, wide=not few)
    errors = table(["True", "Predicted", unit, "of the row"], listed, words=2) if listed else Html()
    return grid([picture, errors])


def calibration(run: Run) -> Html:
    """Return the reliability diagram, and precision, recall and F1 over the threshold."""
    found = run.detections
    bins = reliability(found.scores_N, found.right_N)
    best = found.thresholds
    at = int(best.f1_T.argmax())
    diagram = reliability_diagram(
        run.pictures / "calibration.png", bins.score_Q, bins.precision_Q, bins.counts_Q
    )
    sweep = over_thresholds(
        run.pictures / "thresholds.png",
        best.threshold_T,
        {"precision": best.precision_T, "recall": best.recall_T, "F1": best.f1_T},
        best.best,
    )
    return joined(
        [
            paragraph(
                f"A detection is right if it finds an object of its class with an IoU of at least {IOU}, by "
                f"COCO's rule. Expected calibration error: {bins.error:.3f} over {len(found.scores_N):,} "
                "detections of any score. Points below the dotted line: scores are too high."
            ),
            grid(
                [
                    chart(diagram, "Reliability", "The part of the detections of a score that is right."),
                    chart(
                        sweep,
                        "Threshold",
                        f"F1 is highest at {best.best:.2f}: precision {best.precision_T[at]:.2f}, recall "
                        f"{best.recall_T[at]:.2f}, F1 {best.f1_T[at]:.2f} over all classes together.",
                    ),
                ]
            ),
            paragraph("For predictions: ", code(f"giantdet predict ... --threshold {best.best:.2f}")),
        ]
    )
