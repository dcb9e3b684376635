"""Arguments that several commands share, and what they stand for."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from giantdet.errors import InputError

if TYPE_CHECKING:
    from giantdet.config.types import GiantdetConfig, TtaConfig

COCO_IMAGES = 117_266


def as_path(text: str) -> Path:
    """Return a path; shells leave the ~ of --output=~/x as it is."""
    return Path(text).expanduser()


def at_least(least: int) -> Callable[[str], int]:
    def number(text: str) -> int:
        if int(text) < least:
            raise argparse.ArgumentTypeError(f"must be at least {least}")
        return int(text)

    return number


def add_pixel_limit(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--max-image-pixels",
        type=at_least(1),
        help="read images of up to this many pixels; default: Pillow's limit, 178956970",
    )


def data_sets(
    options: argparse.Namespace, splits: list[str], usage: str
) -> tuple[dict[str, Any], GiantdetConfig]:
    """Return what describes the data sets of a command, by name, and the giantdet block.

    They are those `splits` of --config, a run's JSON, that are given, or a COCO instances JSON. Raises
    InputError with `usage` without either.
    """
    from giantdet.config.datasets import CocoDatasetConfig
    from giantdet.config.load import load_run
    from giantdet.config.resolve import check_data
    from giantdet.config.types import GiantdetConfig

    both = (options.annotations, options.images)
    if options.config is not None and both == (None, None):
        run = load_run(options.config)
        data = run.giantdet.data
        given = [split for split in splits if getattr(data, split) is not None] or splits[:1]
        check_data(run, given)
        return {f"data.{split}": getattr(data, split) for split in given}, run.giantdet
    if options.config is not None or None in both:
        raise InputError(usage)
    section = CocoDatasetConfig(annotations=str(options.annotations), images=str(options.images))
    return {str(options.annotations): section}, GiantdetConfig()


def add_tta(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group(
        "multi-scale testing",
        "each of these options turns it on; defaults: eval.tta of the export, or 400 to 1200",
    )
    group.add_argument("--tta", action="store_true", help="show images at several scales, and mirrored")
    group.add_argument(
        "--tta-sides", type=at_least(1), nargs="+", metavar="PIXELS", help="short sides of the scaled images"
    )
    group.add_argument("--tta-max-side", type=at_least(1), metavar="PIXELS", help="their largest long side")
    group.add_argument("--tta-merge", choices=("nms", "soft_nms", "wbf"), help="how boxes are merged")
    group.add_argument(
        "--no-tta-flip", dest="tta_flip", action="store_false", help="leave out the mirrored images"
    )


def tta_of(options: argparse.Namespace, exported: TtaConfig | None) -> TtaConfig | None:
    """Return the settings of multi-scale testing: those of the options, else of the export; None without."""
    from pydantic import ValidationError

    from giantdet.config.types import TtaConfig

    names = {"short_sides": options.tta_sides, "max_side": options.tta_max_side, "merge": options.tta_merge}
    given = {name: value for name, value in names.items() if value is not None}
    if not options.tta_flip:
        given["flip"] = False
    if not options.tta and not given:
        return None
    before = (exported or TtaConfig()).model_dump()
    try:
        return TtaConfig.model_validate(before | given)
    except ValidationError as error:
        raise InputError(f"--tta: {error.errors()[0]['msg']}") from None


def add_fuse(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("ensembles")
    group.add_argument(
        "--fuse", choices=("wbf", "nms", "soft_nms"), help="fuse the objects of several models, by class name"
    )
    group.add_argument(
        "--fuse-iou",
        type=float,
        help="IoU above which boxes count as one object; default: 0.55 for wbf, else 0.5",
    )


def fuse_iou(options: argparse.Namespace) -> float | None:
    if options.fuse_iou is not None and not 0 <= options.fuse_iou < 1:
        raise InputError(f"--fuse-iou must be at least 0 and less than 1, got {options.fuse_iou:g}")
    iou: float | None = options.fuse_iou
    return iou
