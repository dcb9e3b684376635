"""Make the report of a run. A new section is a function, and a line in `SECTIONS`."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path

from giantdet.errors import GiantdetError
from giantdet.report import (
    section_detections,
    section_images,
    section_maps,
    section_scores,
    section_setup,
    section_training,
)
from giantdet.report.page import Html, Section, page, tag
from giantdet.report.run import Missing, Run

logger = logging.getLogger("giantdet")

SECTIONS: tuple[tuple[str, str, str, Callable[[Run], Html]], ...] = (
    ("training", "Losses", "Losses and learning rate", section_training.training),
    ("progress", "Over time", "Scores over time", section_scores.progress),
    ("scores", "Scores", "Scores", section_scores.scores),
    ("classes", "By class", "Scores by class and size", section_scores.classes),
    ("recall", "Recall", "Precision and recall", section_scores.recalls),
    ("confusion", "Confusion", "Confusion matrix", section_detections.confusions),
    ("pixels", "Pixels", "Confusion of pixels", section_maps.pixels),
    ("calibration", "Calibration", "Calibration of the scores", section_detections.calibration),
    ("validation", "Predictions", "Predictions beside the annotations", section_images.validation),
    ("batches", "Training images", "Training images as the model sees them", section_images.batches),
    ("data", "Data", "Data", section_setup.data),
    ("agvm", "AGVM", "AGVM", section_training.agvm),
    ("speed", "Speed", "Speed, memory and what was left out", section_training.speed),
    ("settings", "Settings", "Settings", section_setup.settings),
    ("versions", "Versions", "Versions and machines", section_setup.versions),
)
"""Anchor, short title, title and content of each section, in the order of the page."""


def write_report(folder: Path) -> Path:
    """Write FOLDER/report.html and its pictures in FOLDER/report/, and return the path of the page.

    A section that does not apply, or that fails, is left out, and the page says why. Raises InputError for a
    folder that is not a run.
    """
    run = Run(folder)
    for old in run.pictures.rglob("*.*"):  # of an earlier report, which may have had other sections
        if old.suffix in (".png", ".jpg"):
            old.unlink()
    run.pictures.mkdir(exist_ok=True)
    sections, left_out = [], []
    for name, link, title, make in SECTIONS:
        try:
            sections.append(Section(name, title, link, make(run)))
        except Missing as reason:
            left_out.append((title, str(reason)))
        except Exception as error:
            # A report must not be lost for one of its parts, whatever the files of a run hold.
            text = str(error) if isinstance(error, GiantdetError) else f"{type(error).__name__}: {error}"
            logger.warning("report of %s: no section %r: %s", folder, title, text)
            logger.debug("the section's error", exc_info=error)
            left_out.append((title, f"it could not be made ({text})"))
    try:
        head = section_setup.head(run)
    except Exception as error:
        logger.warning("report of %s: no summary: %s: %s", folder, type(error).__name__, error)
        head = tag("h1", folder.absolute().name)
    file = folder / "report.html"
    unfinished = file.with_suffix(".html.part")
    unfinished.write_text(page(section_setup.title(run), head, sections, left_out), encoding="utf-8")
    unfinished.replace(file)
    return file


def report_of_finished(folder: Path) -> None:
    """Write the report at the end of a run; if that fails, print why and return."""
    try:
        print(f"writing {folder / 'report.html'} (train.report)", flush=True)
        write_report(folder)
    except Exception as error:
        # The run is complete: nothing that happens here may make it fail.
        print(
            f"giantdet: no report ({type(error).__name__}: {error}); later: giantdet report {folder}",
            flush=True,
        )
