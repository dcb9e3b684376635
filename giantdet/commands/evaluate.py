"""The command `eval`: score a model, or an ensemble, on a data set."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from giantdet.commands.arguments import (
    add_fuse,
    add_pixel_limit,
    add_tta,
    as_path,
    at_least,
    data_sets,
    fuse_iou,
    tta_of,
)
from giantdet.errors import InputError

if TYPE_CHECKING:
    from giantdet.config.types import GiantdetConfig
    from giantdet.data.dataset import Dataset


def add(subparsers: Any) -> None:
    """Add the command and its arguments."""
    parser = subparsers.add_parser("eval", help="score an exported model on a data set")
    parser.add_argument("export", type=as_path, help="folder of a run or of an export, or hf_hub:OWNER/NAME")
    parser.add_argument(
        "members", nargs="*", type=as_path, help="with --fuse: more exports, or results in COCO's format"
    )
    add_pixel_limit(parser)
    parser.add_argument(
        "--annotations", type=as_path, help="COCO instances JSON, or a list of images in its format"
    )
    parser.add_argument("--images", type=as_path, help="folder of its images")
    parser.add_argument(
        "--config",
        type=as_path,
        help="instead of both: a run's JSON, whose data.val may have any format; default: that of the run",
    )
    parser.add_argument("--batch-size", type=at_least(1), default=1, help="images at a time; default: 1")
    parser.add_argument("--workers", type=at_least(0), default=2, help="loader processes; default: 2")
    parser.add_argument(
        "--max-detections",
        type=at_least(1),
        help="detections in an image that are scored, by COCO's rules of each class; default: as --config",
    )
    backends = ("auto", "pycocotools", "hotcoco")
    parser.add_argument("--backend", choices=backends, help="what computes COCO's AP; default: as --config")
    parser.add_argument(
        "--results", type=as_path, help="also write the detections to this file, as COCO results JSON"
    )
    add_tta(parser)
    add_fuse(parser)
    parser.set_defaults(command=run)


def run(options: argparse.Namespace) -> None:
    from giantdet.data.dataset import meet
    from giantdet.distributed import comm
    from giantdet.engine.evaluate import evaluate, warn_of_limits
    from giantdet.engine.progress import shown_batches
    from giantdet.export import load_detector

    if options.members or options.fuse is not None:
        _eval_ensemble(options)
        return
    device = comm.start()
    model, config = load_detector(options.export, device)
    dataset, run_config = _validation_set(options)
    max_detections, max_image_pixels = _limits(options, run_config)
    classes = meet(dataset, config.classes, options.export)
    _prepare_results(options, dataset)
    warn_of_limits(dataset, config.model, max_detections)
    found = evaluate(
        model,
        dataset,
        config.data_config(workers=options.workers, max_image_pixels=max_image_pixels),
        options.batch_size,
        device,
        tasks=model.tasks,
        model_config=config.model,
        classes=classes,
        window_stride=config.window_stride,
        max_detections=max_detections,
        backend=options.backend or run_config.eval.backend,
        results=options.results,
        tta=tta_of(options, config.tta) or run_config.eval.tta,
        batches=shown_batches,
    )
    if comm.is_main():
        print(found.table)
    comm.barrier()


def _eval_ensemble(options: argparse.Namespace) -> None:
    from giantdet.distributed import comm
    from giantdet.engine.run_ensemble import Choice, evaluate_ensemble

    if options.fuse is None or not options.members:
        raise InputError("eval: an ensemble needs several models, and --fuse to say how to fuse them")
    device = comm.start()
    dataset, run_config = _validation_set(options)
    max_detections, max_image_pixels = _limits(options, run_config)
    _prepare_results(options, dataset)
    tta = tta_of(options, None) or run_config.eval.tta
    choice = Choice(options.fuse, options.batch_size, max_image_pixels, tta, fuse_iou(options))
    table = evaluate_ensemble(
        [options.export, *options.members],
        dataset,
        choice,
        device,
        options.workers,
        max_detections,
        options.backend or run_config.eval.backend,
        options.results,
    )
    if comm.is_main():
        print(table)
    comm.barrier()


def _validation_set(options: argparse.Namespace) -> tuple[Dataset, GiantdetConfig]:
    """Open the data set that the options name, and check its files; also return the run's configuration."""
    from giantdet.data.dataset import check_files, open_dataset
    from giantdet.data.images import limit_pixels

    if (options.annotations, options.images, options.config) == (None, None, None):
        options.config = _json_of(options.export)
    usage = "eval: give --annotations and --images, or --config, a run's JSON with data.val"
    data, run_config = data_sets(options, ["val"], usage)
    limit_pixels(_limits(options, run_config)[1])
    (section,) = data.values()
    dataset = open_dataset(section)
    check_files(dataset)
    return dataset, run_config


def _json_of(export: Path) -> Path | None:
    """Return the JSON of the run that an export lies in, or that is named itself; None for other exports."""
    for run in (export, export.parent):
        if (run / "export").is_dir() and (run / "config.json").is_file():
            return run / "config.json"
    return None


def _prepare_results(options: argparse.Namespace, dataset: Dataset) -> None:
    """Make the folder of `--results`, without which a data set must have annotations."""
    from giantdet.distributed import comm

    if not dataset.annotated and options.results is None:
        raise InputError(
            f"{dataset.annotations}: no annotations, so there are no scores; give --results FILE to write "
            "what is found"
        )
    if options.results is not None and comm.is_main():
        options.results.parent.mkdir(parents=True, exist_ok=True)


def _limits(options: argparse.Namespace, config: GiantdetConfig) -> tuple[int | None, int]:
    """Return the detections that are scored and the pixels that are read; options override the run's."""
    return (
        options.max_detections or config.eval.max_detections,
        options.max_image_pixels or config.data.max_image_pixels,
    )
