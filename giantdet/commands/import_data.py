"""The command `import-data`: make COCO JSONs of annotations in another format."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from giantdet.commands.arguments import as_path
from giantdet.errors import InputError

FORMATS = ("voc", "yolo", "labelme", "via", "cvat", "label-studio", "open-images", "masks", "coco")


def add(subparsers: Any) -> None:
    """Add the command and its arguments."""
    parser = subparsers.add_parser(
        "import-data",
        help="make COCO JSONs of VOC, YOLO, labelme, VIA, CVAT, Label Studio, Open Images or masks",
        description="Read annotations in another format, write OUT/train.json, and OUT/val.json if there "
        "is a validation set, with a summary of what they hold and what was left out (docs/own-data.md).",
    )
    parser.add_argument(
        "format", choices=("auto", *FORMATS), metavar="FORMAT", help=f"auto, {', '.join(FORMATS)}"
    )
    parser.add_argument("source", type=as_path, help="folder or file of the annotations")
    parser.add_argument("output", type=as_path, help="folder to write the JSON files to")
    parser.add_argument(
        "--images", type=as_path, help="folder of the images; default: where the format has them"
    )
    parser.add_argument(
        "--classes", help="names with commas, or a file with a name in each line: these alone, in this order"
    )
    parser.add_argument(
        "--val-share",
        type=_share,
        help="share of the images for validation, such as 0.2; default: as the source",
    )
    parser.add_argument("--seed", type=int, default=0, help="seed of that choice; default: 0")
    parser.add_argument("--copy-images", action="store_true", help="copy the images to OUT/images")
    parser.add_argument("--overwrite", action="store_true", help="replace the files of an earlier import")
    parser.add_argument("--attribute", help="via: the attribute of the regions that is the class")
    parser.add_argument(
        "--difficult",
        choices=("ignore", "object"),
        default="ignore",
        help="voc: ignore difficult objects in training and scores, or take them as objects; default: ignore",
    )
    parser.add_argument(
        "--zero-based", action="store_true", help="voc: pixels are counted from 0, not from 1"
    )
    parser.set_defaults(command=run)


def _share(text: str) -> float:
    value = float(text)
    if not 0 < value < 1:
        raise argparse.ArgumentTypeError("must be between 0 and 1, such as 0.2")
    return value


def run(options: argparse.Namespace) -> None:
    """Import the data set, and print the summary and the next commands."""
    from giantdet.data.importing.convert import Split, convert
    from giantdet.data.importing.scene import Request

    request = Request(
        options.source,
        options.images,
        _names(options.classes),
        options.attribute,
        options.difficult,
        options.zero_based,
    )
    if options.images is not None and not options.images.is_dir():
        raise InputError(f"{options.images}: no such folder of images")
    imported = convert(
        options.format,
        request,
        options.output,
        Split(options.val_share, options.seed),
        options.copy_images,
        options.overwrite,
    )
    print(imported.text())
    train, val = (imported.files.get(name) for name in ("train", "val"))
    if val is None:
        print("no validation set: --val-share 0.2 makes one")
    print(f"next: giantdet validate-data {train or val} {imported.images}")
    if train is not None:
        print(f"      giantdet new run.json --data {train}" + (f" --val {val}" if val is not None else ""))


def _names(text: str | None) -> tuple[str, ...] | None:
    """Return the classes of --classes: names with commas, or the lines of a file."""
    if text is None:
        return None
    path = Path(text).expanduser()
    given = path.read_text(encoding="utf-8-sig").split("\n") if path.is_file() else text.split(",")
    names = tuple(name.strip() for name in given if name.strip())
    if not names or len(set(names)) < len(names):
        raise InputError(f"--classes {text}: name each class once")
    return names
