"""The command `predict`: detect objects in image files."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from giantdet.commands.arguments import (
    add_fuse,
    add_pixel_limit,
    add_tta,
    as_path,
    at_least,
    fuse_iou,
    tta_of,
)
from giantdet.errors import InputError


def add(subparsers: Any) -> None:
    """Add the command and its arguments."""
    parser = subparsers.add_parser("predict", help="detect objects in image files")
    parser.add_argument("export", type=as_path, help="folder of a run or of an export, or hf_hub:OWNER/NAME")
    parser.add_argument(
        "images",
        nargs="+",
        type=as_path,
        help="image files, or folders of them, also in sub-folders; with --fuse, more exports come first",
    )
    parser.add_argument(
        "--annotations",
        type=as_path,
        help="COCO JSON: predict the images that it lists, in the one folder given, and write their ids",
    )
    add_pixel_limit(parser)
    parser.add_argument(
        "--output",
        type=as_path,
        default=Path("predictions"),
        help="folder for overlays and results.json; default: predictions",
    )
    parser.add_argument(
        "--threshold", type=float, default=0.5, help="lowest score of the detections; default: 0.5"
    )
    parser.add_argument(
        "--tile",
        type=at_least(1),
        metavar="PIXELS",
        help="predict large images in tiles of PIXELS x PIXELS; only for models of objects; default: off",
    )
    parser.add_argument(
        "--tile-overlap", type=float, default=0.2, help="overlap, as a part of a tile's side; default: 0.2"
    )
    parser.add_argument("--device", help="cpu, cuda or cuda:1; default: the GPU if there is one")
    parser.add_argument(
        "--batch-size",
        type=at_least(1),
        default=1,
        help="images (or tiles of one) that the model takes at a time; default: 1",
    )
    parser.add_argument(
        "--no-overlays", dest="overlays", action="store_false", help="write the results without pictures"
    )
    add_tta(parser)
    add_fuse(parser)
    parser.set_defaults(command=run)


def run(options: argparse.Namespace) -> None:
    from giantdet.engine.ensemble import is_member
    from giantdet.engine.inputs import InputImage, image_files, listed_images, picture_names
    from giantdet.engine.predict import load_predictor
    from giantdet.engine.predict_files import predict_files
    from giantdet.engine.results import Results
    from giantdet.engine.run_ensemble import Choice, predict_ensemble

    members = []
    if options.fuse is not None:
        while options.images and is_member(options.images[0]):
            members.append(options.images.pop(0))
        if not members or not options.images:
            raise InputError("predict: with --fuse, give several models or results files, then the images")
        if options.tile is not None:
            raise InputError("predict: --tile and --fuse exclude each other; fuse the results.json of tiles")
    if options.annotations is None:
        files = image_files(options.images, options.output)
        images = [InputImage(number, path) for number, path in enumerate(files)]
    else:
        if len(options.images) != 1:
            raise InputError("predict: with --annotations, give one folder: that of its images")
        images = listed_images(options.annotations, options.images[0])
    pictures = picture_names([image.path for image in images], options.output, options.overlays)
    if options.fuse is not None:
        choice = Choice(
            options.fuse,
            options.batch_size,
            options.max_image_pixels,
            tta_of(options, None),
            fuse_iou(options),
        )
        predict_ensemble(
            [options.export, *members],
            images,
            pictures,
            options.output,
            choice,
            options.device,
            options.threshold,
            options.overlays,
        )
        return
    predictor = load_predictor(options.export, options.device, options.max_image_pixels)
    if options.tile is not None:
        predictor.check_tiles(options.tile, options.tile_overlap)
    tta = tta_of(options, predictor.config.tta)
    if tta is not None:
        predictor.check_tta(options.tile)
    results = Results(options.output, predictor.detector.tasks, predictor.config.classes)
    predict_files(
        predictor,
        images,
        pictures,
        results,
        options.threshold,
        options.tile,
        options.tile_overlap,
        options.batch_size,
        options.overlays,
        tta,
    )
