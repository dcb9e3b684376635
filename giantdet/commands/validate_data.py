"""The command `validate-data`: report bad records and files of data sets."""

from __future__ import annotations

import argparse
from typing import Any

from giantdet.commands.arguments import add_pixel_limit, as_path, data_sets


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
        if len(parts) > 1 and not has_errors:
            print(open_dataset(config).summary().text(name))  # an error if they do not fit each other
        failed |= has_errors
    return 1 if failed else 0
