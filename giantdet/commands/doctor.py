"""The command `doctor`: check hosts and the network between them."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from giantdet.commands.arguments import as_path, at_least


def add(subparsers: Any) -> None:
    """Add the command and its arguments."""
    parser = subparsers.add_parser(
        "doctor",
        help="check versions, accelerators, network between ranks, file system and limits",
        description="Check this machine or, with scripts/doctor.py under a launcher, all hosts and the "
        "network between them. Exit code 1 if a check is BAD.",
    )
    parser.add_argument(
        "--output",
        type=as_path,
        default=Path("runs"),
        help="folder that runs will write to; default: runs",
    )
    parser.add_argument(
        "--mebibytes", type=at_least(1), default=64, help="size of the timed all-reduce; default: 64"
    )
    parser.add_argument(
        "--timeout-minutes", type=float, default=2.0, help="how long to wait for other ranks; default: 2"
    )
    parser.add_argument("--local_rank", "--local-rank", type=int, default=None, help=argparse.SUPPRESS)
    parser.set_defaults(command=run)


def run(options: argparse.Namespace) -> int:
    from giantdet.tools.doctor import doctor

    return doctor(options.output, options.mebibytes, options.timeout_minutes)
