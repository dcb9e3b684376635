"""The command `make-demo-data`: make the data set that the demo trains on."""

from __future__ import annotations

import argparse
from typing import Any

from giantdet.commands.arguments import as_path, at_least


def add(subparsers: Any) -> None:
    """Add the command and its arguments."""
    parser = subparsers.add_parser(
        "make-demo-data", help="make the small data set that scripts/demo.sh trains on"
    )
    parser.add_argument("folder", type=as_path, help="folder to write it to")
    parser.add_argument("--train-images", type=at_least(1), default=2000, help="default: 2000")
    parser.add_argument("--val-images", type=at_least(1), default=200, help="default: 200")
    parser.add_argument(
        "--size", type=at_least(16), default=128, help="side of the square images in pixels; default: 128"
    )
    parser.add_argument("--seed", type=int, default=0, help="random seed; default: 0")
    parser.set_defaults(command=run)


def run(options: argparse.Namespace) -> None:
    from giantdet.data.demo import make_demo

    make_demo(options.folder, options.train_images, options.val_images, options.size, options.seed)
    print(options.folder)
