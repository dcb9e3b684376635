"""The command `push`: upload a model to the Hugging Face hub."""

from __future__ import annotations

import argparse
from typing import Any

from giantdet.commands.arguments import as_path


def add(subparsers: Any) -> None:
    """Add the command and its arguments."""
    parser = subparsers.add_parser(
        "push",
        help="upload a model to the Hugging Face hub",
        description="Upload the export of a run with a model card (scores, classes, the run's JSON), for "
        'load_predictor("hf_hub:OWNER/NAME"). Log in with `hf auth login` or the variable HF_TOKEN.',
    )
    parser.add_argument("run", type=as_path, help="folder of a run, or of an export")
    parser.add_argument("repository", metavar="OWNER/NAME", help="repository, which is made if it is new")
    parser.add_argument("--private", action="store_true", help="make a new repository private")
    parser.add_argument("--revision", help="branch to upload to; default: main")
    parser.add_argument(
        "--card-only",
        action="store_true",
        help="only write the card, README.md in the export's folder, to be edited before it is uploaded",
    )
    parser.set_defaults(command=run)


def run(options: argparse.Namespace) -> None:
    from giantdet.tools.hub import push, write_card

    if options.card_only:
        print(write_card(options.run, options.repository))
    else:
        print(push(options.run, options.repository, options.private, options.revision))
