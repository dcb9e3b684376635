"""The command `report`: the HTML page of a run."""

from __future__ import annotations

import argparse
from typing import Any

from giantdet.commands.arguments import as_path


def add(subparsers: Any) -> None:
    """Add the command and its arguments."""
    parser = subparsers.add_parser(
        "report",
        help="write a run's losses, scores, errors and pictures as one HTML page",
        description="Write RUN/report.html and its pictures in RUN/report/. Training does this at its "
        "end; the command also works while a run trains, or after it has stopped.",
    )
    parser.add_argument("run", type=as_path, help="folder of the run (train.output)")
    parser.add_argument(
        "--no-evaluate",
        dest="evaluate",
        action="store_false",
        help="if the run has no predictions for data.val, do without them; default: RUN/export makes them",
    )
    parser.add_argument("--device", help="for that: cpu, cuda or cuda:1; default: the GPU if there is one")
    parser.set_defaults(command=run)


def run(options: argparse.Namespace) -> None:
    from giantdet.report.build import write_report
    from giantdet.report.predictions import predict_validation, why_not_predicted
    from giantdet.report.run import RESULTS

    if options.evaluate and not list(options.run.glob(RESULTS.replace(".json", "*.json"))):
        reason = why_not_predicted(options.run)
        if reason is None:
            print(f"{options.run} has no {RESULTS}: its export predicts data.val", flush=True)
            predict_validation(options.run, options.device)
        else:
            print(f"{options.run} has no {RESULTS}, and {reason}: the page has no predictions", flush=True)
    print(write_report(options.run))
