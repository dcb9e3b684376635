"""Section on the errors of semantic and panoptic maps: which classes' pixels are confused."""

from __future__ import annotations

import json

import numpy as np

from giantdet.report.page import Html, joined, paragraph
from giantdet.report.run import RESULTS, Missing, Run
from giantdet.report.section_detections import matrix_of


def pixels(run: Run) -> Html:
    """Return the confusion matrix of the pixels of semantic maps."""
    if "semantic" not in run.model.tasks:
        raise Missing("the model predicts no semantic maps")
    file = run.folder / RESULTS.replace(".json", "_semantic.json")
    try:
        content = json.loads(file.read_text())
    except (OSError, ValueError):
        raise Missing(f"there is no {file.name}: the run was not evaluated yet") from None
    counts_CX = np.array(content["confusion"], np.int64)
    names = list(content["classes"])
    if not counts_CX[:, -1].any():  # pixels of images that could not be read
        counts_CX, names = counts_CX[:, :-1], names[:-1]
    if not counts_CX.any():
        raise Missing("no image of the validation set has a semantic map")
    rule = paragraph(f"All {int(counts_CX.sum()):,} labelled pixels of the validation images.")
    return joined([rule, matrix_of(run, "confusion_pixels.png", counts_CX, names, "pixels")])
