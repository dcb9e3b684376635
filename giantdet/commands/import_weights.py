"""The command `import-weights`: make an export of weights of other projects."""

from __future__ import annotations

import argparse
from typing import Any

from giantdet.commands.arguments import as_path
from giantdet.errors import InputError


def add(subparsers: Any) -> None:
    """Add the command and its arguments."""
    parser = subparsers.add_parser(
        "import-weights",
        help="convert weights of torchvision, detectron2, mmdetection or mmsegmentation to an export",
        description="Find out what a file of weights of another project is, print what matches and what does "
        "not, and write an export that predicts (docs/weights.md).",
    )
    parser.add_argument("file", type=as_path, help=".pth, .pkl or safetensors file of the other project")
    parser.add_argument("output", type=as_path, help="folder to write model.safetensors and config.json to")
    parser.add_argument(
        "overrides",
        nargs="*",
        metavar="key=value",
        help="dotted overrides of config.json, for example short_side=640",
    )
    parser.add_argument(
        "--classes",
        help="COCO JSON with the categories, file with one name per line, comma-separated names, lvis_v1 or "
        "objects365_v2; default: COCO's, if the model has as many classes",
    )
    parser.add_argument(
        "--channels",
        choices=("rgb", "bgr"),
        help="order of the channels that the weights expect; default: the project's default",
    )
    parser.set_defaults(command=run)


def run(options: argparse.Namespace) -> None:
    from giantdet.export import export_model
    from giantdet.export_folder import CONFIG
    from giantdet.import_weights import import_weights

    if options.output.exists() and any(options.output.iterdir()) and not (options.output / CONFIG).is_file():
        raise InputError(f"{options.output}: is a folder of other files; name a new one")
    bgr = None if options.channels is None else options.channels == "bgr"
    imported = import_weights(options.file, options.overrides, options.classes, bgr)
    print(imported.report)
    export_model(imported.model, options.output, imported.config)
    print(f"{options.output}: run it with `giantdet predict {options.output} IMAGES`")
