"""The commands that run exported models, `eval` and `predict`, as in commands.py."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from giantdet.commands import data_sets
from giantdet.errors import InputError

if TYPE_CHECKING:
    from giantdet.config.types import GiantdetConfig, TtaConfig
    from giantdet.data.dataset import Dataset


def run_eval(options: argparse.Namespace) -> None:
    from giantdet.data.dataset import meet
    from giantdet.distributed import comm
    from giantdet.engine.evaluate import evaluate, warn_of_limits
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
        tta=_tta(options, config.tta) or run_config.eval.tta,
        progress=True,
    )
    if comm.is_main():
        print(found.table)
    comm.barrier()


def _eval_ensemble(options: argparse.Namespace) -> None:
    from giantdet.distributed import comm
    from giantdet.engine.run_ensemble import Choice, evaluate_ensemble

    if options.fuse is None or not options.members:
        raise InputError("eval: an ensemble is several models and --fuse, which says how they are fused")
    device = comm.start()
    dataset, run_config = _validation_set(options)
    max_detections, max_image_pixels = _limits(options, run_config)
    _prepare_results(options, dataset)
    tta = _tta(options, None) or run_config.eval.tta
    choice = Choice(options.fuse, options.batch_size, max_image_pixels, tta, _fuse_iou(options))
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


def _fuse_iou(options: argparse.Namespace) -> float | None:
    if options.fuse_iou is not None and not 0 <= options.fuse_iou < 1:
        raise InputError(f"--fuse-iou is an IoU in [0, 1), not {options.fuse_iou:g}")
    iou: float | None = options.fuse_iou
    return iou


def _validation_set(options: argparse.Namespace) -> tuple[Dataset, GiantdetConfig]:
    """Open the data set that the options name, and check its files; also return the run's configuration."""
    from giantdet.data.dataset import check_files, open_dataset
    from giantdet.data.images import limit_pixels

    usage = "eval: give --annotations and --images, or --config, a run's JSON with data.val"
    data, run_config = data_sets(options, ["val"], usage)
    limit_pixels(_limits(options, run_config)[1])
    (section,) = data.values()
    dataset = open_dataset(section)
    check_files(dataset)
    return dataset, run_config


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


def _limits(options: argparse.Namespace, config: GiantdetConfig) -> tuple[int, int]:
    """Return the detections that are scored and the pixels that are read; options override the run's."""
    return (
        options.max_detections or config.eval.max_detections,
        options.max_image_pixels or config.data.max_image_pixels,
    )


def _tta(options: argparse.Namespace, exported: TtaConfig | None) -> TtaConfig | None:
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


def run_predict(options: argparse.Namespace) -> None:
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
            raise InputError("predict: with --annotations, give one folder, that of its images")
        images = listed_images(options.annotations, options.images[0])
    pictures = picture_names([image.path for image in images], options.output, options.overlays)
    if options.fuse is not None:
        choice = Choice(
            options.fuse,
            options.batch_size,
            options.max_image_pixels,
            _tta(options, None),
            _fuse_iou(options),
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
    tta = _tta(options, predictor.config.tta)
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
