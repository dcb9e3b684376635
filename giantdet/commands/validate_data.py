"""The command `validate-data`: report bad records and files of data sets."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from giantdet.commands.arguments import add_pixel_limit, as_path, data_sets

if TYPE_CHECKING:
    from giantdet.data.dataset import Dataset

PICTURES = 12
"""Images that --pictures draws."""


def add(subparsers: Any) -> None:
    """Add the command and its arguments."""
    parser = subparsers.add_parser(
        "validate-data",
        help="report every bad record and file of data sets",
        description="Report every bad record and file of a COCO data set, or of data.train and data.val of a "
        "run. Exit code 1 if there are errors.",
    )
    parser.add_argument("annotations", type=as_path, nargs="?", help="COCO instances JSON")
    parser.add_argument("images", type=as_path, nargs="?", help="folder of its images")
    parser.add_argument(
        "--config",
        type=as_path,
        help="instead of both: a run's JSON, whose data.train and data.val may have any format",
    )
    parser.add_argument(
        "--pictures",
        type=as_path,
        metavar="FOLDER",
        help=f"also draw the annotations of {PICTURES} images of each data set to this folder",
    )
    add_pixel_limit(parser)
    parser.set_defaults(command=run)


def run(options: argparse.Namespace) -> int:
    """Report the problems of data sets of any format; the exit code is 1 if there are errors."""
    from giantdet.config.datasets import sections
    from giantdet.data.dataset import CHECKS, open_dataset
    from giantdet.data.images import limit_pixels
    from giantdet.data.validate import format_report

    usage = "validate-data: give a COCO instances JSON and the folder of its images, or --config JSON"
    data, run_config = data_sets(options, ["train", "val"], usage)
    limit_pixels(options.max_image_pixels or run_config.data.max_image_pixels)
    failed = False
    for name, config in data.items():
        parts = sections(config)
        reports = []
        for place, section in parts:
            reports.append(CHECKS[section.format](section))
            print(reports[-1].summary.text(f"{name}{place}"))
            print(format_report(reports[-1].problems))
        has_errors = any(report.has_errors for report in reports)
        failed |= has_errors
        if has_errors or (len(parts) == 1 and options.pictures is None):
            continue
        dataset = open_dataset(config)  # an error if its parts do not fit each other
        if len(parts) > 1:
            print(dataset.summary().text(name))
        if options.pictures is not None:
            folder = name.removeprefix("data.") if options.config else Path(name).stem
            _draw(dataset, options.pictures / folder)
    return 1 if failed else 0


def _draw(dataset: Dataset, folder: Path) -> None:
    """Draw the annotations of images from all over the data set, which keep their file names."""
    from giantdet.engine.draw import draw
    from giantdet.engine.found import truth_of

    folder.mkdir(parents=True, exist_ok=True)
    step = max(len(dataset) // PICTURES, 1)
    for i in range(0, len(dataset), step)[:PICTURES]:
        picture = draw(dataset.read_image(i), truth_of(dataset, i), scores=False)
        picture.save(folder / f"{i}_{dataset.path(i).stem}.png")
    print(f"pictures: {folder}")
