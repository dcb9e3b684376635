"""The command `plot`: draw losses, AGVM's measurements or a schedule."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from giantdet.commands.arguments import COCO_IMAGES, as_path, at_least
from giantdet.errors import InputError


def add(subparsers: Any) -> None:
    """Add the command and its arguments."""
    parser = subparsers.add_parser("plot", help="draw the losses of a run and AGVM's measurements")
    parser.add_argument("run", type=as_path, nargs="?", help="folder of the run (train.output)")
    parser.add_argument("--output", type=as_path, help="folder for the pictures; default: RUN")
    parser.add_argument(
        "--schedule", type=as_path, metavar="JSON", help="draw the LR schedule of this JSON instead"
    )
    parser.add_argument(
        "--gpus", type=at_least(1), default=1, help="number of GPUs, for --schedule; default: 1"
    )
    coco = f"images per epoch, for --schedule; default: {COCO_IMAGES}, COCO train2017's with objects"
    parser.add_argument("--images", type=at_least(1), default=COCO_IMAGES, help=coco)
    parser.set_defaults(command=run)


def run(options: argparse.Namespace) -> None:
    from giantdet.tools.plots import plot_run, plot_schedule

    if options.schedule is not None:
        from giantdet.config.load import load_run
        from giantdet.config.resolve import resolve

        run = resolve(load_run(options.schedule), options.gpus, options.images)
        print(plot_schedule(run, options.output or Path()))
        return
    if options.run is None:
        raise InputError("plot: name the folder of a run, or a JSON with --schedule")
    metrics, output = options.run / "metrics.jsonl", options.output or options.run
    if not metrics.is_file():
        raise InputError(f"{options.run}: no metrics.jsonl here; name the folder of a run")
    output.mkdir(parents=True, exist_ok=True)
    for picture in plot_run(metrics, output):
        print(picture)
