"""The command `export-graph`: write a model as ONNX or as a program of torch.export."""

from __future__ import annotations

import argparse
from typing import Any

from giantdet.commands.arguments import as_path, at_least


def add(subparsers: Any) -> None:
    """Add the command and its arguments."""
    parser = subparsers.add_parser(
        "export-graph",
        help="write a model as ONNX or for torch.export",
        description="Write a model as a graph that runs without giantdet; docs/python.md has its inputs.",
    )
    parser.add_argument("export", help="folder of an export or of a run, or hf_hub:OWNER/NAME")
    parser.add_argument("file", type=as_path, help="file to write: .onnx, or .pt2 for torch.export")
    parser.add_argument(
        "--batch-size", type=at_least(1), default=1, help="images that the graph takes; default: 1"
    )
    parser.set_defaults(command=run)


def run(options: argparse.Namespace) -> None:
    from giantdet.graph import export_graph

    print(export_graph(options.export, options.file, options.batch_size))
