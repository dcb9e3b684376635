"""The `giantdet` command. `giantdet COMMAND --help` says what each one takes.

Heavy imports happen inside the commands, so that help and errors come at once.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

EXIT_BAD_INPUT = 2
EXIT_DIVERGED = 3
COCO_IMAGES = 117_266


def main(arguments: list[str] | None = None) -> int:
    """Run one command; returns its exit code. Bad input: one line on stderr and 2; a loss of NaN: 3."""
    parser = build_parser()
    options = parser.parse_args(arguments)
    logging.basicConfig(level=logging.WARNING, format="giantdet: %(message)s")
    try:
        return int(options.command(options) or 0)
    except BrokenPipeError:
        return 0
    except ValueError as error:
        # ConfigError and DataError are ValueErrors that carry their one line.
        if not _is_user_error(error):
            raise
        _say(f"giantdet: error: {error}")
        return EXIT_BAD_INPUT
    except OSError as error:
        if error.filename is None:
            raise
        _say(f"giantdet: error: {error.filename}: {error.strerror}")
        return EXIT_BAD_INPUT
    except RuntimeError as error:
        if type(error).__name__ != "DivergedError":
            raise
        _say(f"giantdet: stopped: {error}")
        return EXIT_DIVERGED
    finally:
        if "giantdet.distributed.comm" in sys.modules:
            sys.modules["giantdet.distributed.comm"].stop()


def _say(message: str) -> None:
    """To stderr, once: of many ranks that stop for one reason, the main rank says it.

    Before the ranks know one another, it is the first of each machine: files may be missing on one alone.
    """
    if "giantdet.distributed.comm" in sys.modules:
        comm = sys.modules["giantdet.distributed.comm"]
        if comm.world_size() > 1:
            if not comm.said_by_main(message):
                print(message, file=sys.stderr, flush=True)
            return
    if os.environ.get("LOCAL_RANK", "0") == "0":
        print(message, file=sys.stderr, flush=True)


def _is_user_error(error: ValueError) -> bool:
    """Raised by giantdet itself: a ValueError from a library is a bug of ours and keeps its traceback."""
    trace = error.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    return trace is not None and trace.tb_frame.f_globals.get("__name__", "").startswith(
        ("giantdet.", "__main__")
    )


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="giantdet", description="Train detectors of up to billions of parameters under DeepSpeed ZeRO."
    )
    commands = parser.add_subparsers(metavar="COMMAND", required=True)

    train = commands.add_parser(
        "train",
        help="train (one process; start many with deepspeed, torchrun or srun and scripts/train.py)",
        description="Train as a JSON says. With many processes: deepspeed scripts/train.py ...",
    )
    add_run_arguments(train)
    train.set_defaults(command=run_train)

    evaluate = commands.add_parser("eval", help="COCO scores of an export on a data set")
    evaluate.add_argument("export", type=Path, help="folder with model.safetensors and config.json")
    evaluate.add_argument("--annotations", required=True, help="COCO instances JSON")
    evaluate.add_argument("--images", required=True, help="folder of its images")
    evaluate.add_argument("--batch-size", type=_at_least(1), default=1)
    evaluate.add_argument("--workers", type=_at_least(0), default=2)
    evaluate.add_argument("--results", type=Path, help="write COCO results JSON here")
    evaluate.set_defaults(command=run_eval)

    predict = commands.add_parser("predict", help="detect objects in image files")
    predict.add_argument("export", type=Path, help="folder with model.safetensors and config.json")
    predict.add_argument("images", nargs="+", type=Path, help="image files or folders of them")
    predict.add_argument(
        "--output", type=Path, default=Path("predictions"), help="overlays and results.json go here"
    )
    predict.add_argument("--threshold", type=float, default=0.5, help="lowest score to show")
    predict.set_defaults(command=run_predict)

    export = commands.add_parser("export", help="write safetensors from a run's newest checkpoint")
    export.add_argument("run", type=Path, help="folder of the run (train.output)")
    export.add_argument("--output", type=Path, help="default: RUN/export")
    export.add_argument(
        "--checkpoint", help="name of a checkpoint, for example step_100; default: the newest"
    )
    export.set_defaults(command=run_export)

    precise = commands.add_parser(
        "precise-bn",
        help="estimate the running statistics of a run's batch norms anew",
        description="Estimate the running statistics of the batch norms in a run's export anew, over batches "
        "of its training data, and write another export.",
    )
    precise.add_argument("run", type=Path, help="folder of the run (train.output)")
    precise.add_argument("--batches", type=_at_least(1), default=200, help="a process; default: 200")
    precise.add_argument(
        "--batch-size", type=_at_least(1), help="default: the images that training normalised together"
    )
    precise.add_argument("--output", type=Path, help="default: RUN/export_precise_bn")
    precise.set_defaults(command=run_precise_bn)

    plot = commands.add_parser("plot", help="draw the losses of a run, and what AGVM measured and did")
    plot.add_argument("run", type=Path, nargs="?", help="folder of the run (train.output)")
    plot.add_argument("--output", type=Path, help="folder of the pictures; default: RUN")
    plot.add_argument("--schedule", type=Path, metavar="JSON", help="draw the LR that a run's JSON says")
    plot.add_argument("--gpus", type=_at_least(1), default=1, help="for --schedule; default: 1")
    coco = f"of an epoch, for --schedule; default: {COCO_IMAGES}, COCO train2017's with objects"
    plot.add_argument("--images", type=_at_least(1), default=COCO_IMAGES, help=coco)
    plot.set_defaults(command=run_plot)

    validate = commands.add_parser("validate-data", help="report every bad record of a COCO data set")
    validate.add_argument("annotations", help="COCO instances JSON")
    validate.add_argument("images", help="folder of its images")
    validate.set_defaults(command=run_validate)

    configs = commands.add_parser("configs", help="list the recipes of a folder")
    configs.add_argument("folder", nargs="?", type=Path, default=Path("ds_configs"))
    configs.set_defaults(command=run_configs)

    demo = commands.add_parser("make-demo-data", help="make the small data set of scripts/demo.sh")
    demo.add_argument("folder", type=Path)
    demo.add_argument("--train-images", type=_at_least(1), default=2000)
    demo.add_argument("--val-images", type=_at_least(1), default=200)
    demo.add_argument("--size", type=_at_least(16), default=128, help="side of the square images in pixels")
    demo.add_argument("--seed", type=int, default=0)
    demo.set_defaults(command=run_demo_data)
    return parser


def _at_least(least: int) -> Callable[[str], int]:
    def number(text: str) -> int:
        if int(text) < least:
            raise argparse.ArgumentTypeError(f"must be at least {least}")
        return int(text)

    return number


def add_run_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of training, under any launcher."""
    parser.add_argument(
        "--deepspeed_config", "--config", required=True, help="the run's JSON, see ds_configs/"
    )
    parser.add_argument(
        "overrides",
        nargs="*",
        metavar="key=value",
        help="dotted overrides: train.steps=100 zero_optimization.stage=3",
    )
    parser.add_argument("--print-config", action="store_true", help="print the resolved JSON and stop")
    # Launchers pass the local rank in either spelling; the environment says it too.
    parser.add_argument("--local_rank", "--local-rank", type=int, default=None, help=argparse.SUPPRESS)
    parser.add_argument("--deepspeed", action="store_true", help=argparse.SUPPRESS)


def run_train(options: argparse.Namespace) -> None:
    from giantdet.config.load import load_run

    run = load_run(options.deepspeed_config, options.overrides)
    if options.print_config:
        print_config(run)
        return
    from giantdet.engine.train import train

    if options.local_rank is not None:
        os.environ.setdefault("LOCAL_RANK", str(options.local_rank))
    train(run)


def print_config(run: Any) -> None:
    """The run as resolved for this many processes, and for the data set where it is at hand."""
    import torch

    from giantdet.config.resolve import describe, resolve
    from giantdet.data.coco import CocoDataset

    images = classes = None
    data = run.giantdet.data
    if data.train is not None and Path(data.train.annotations).is_file():
        dataset = CocoDataset(data.train.annotations, data.train.images)
        images = len(dataset.training_indices(data.filter_empty))
        classes = dataset.num_classes
    world = int(os.environ.get("WORLD_SIZE", "1"))
    if int(os.environ.get("RANK", "0")) == 0:
        print(describe(resolve(run, world, images, classes, torch.cuda.is_available())))


def run_eval(options: argparse.Namespace) -> None:
    from giantdet.config.types import DataConfig
    from giantdet.data.coco import CocoDataset
    from giantdet.data.loader import eval_loader
    from giantdet.distributed import comm
    from giantdet.engine.evaluate import detect_all, evaluate_results, score_table
    from giantdet.export import load_detector

    device = comm.start()
    detector, config = load_detector(options.export, device)
    dataset = CocoDataset(options.annotations, options.images)
    category_ids = [number for number, _ in config.categories]
    if unknown := set(dataset.category_ids) - set(category_ids):
        raise ValueError(
            f"{options.annotations}: categories {sorted(unknown)} are not among those that {options.export} "
            f"was trained on, {category_ids}"
        )
    data = DataConfig(size=config.size, short_side=config.short_side, workers=options.workers)
    batches = eval_loader(dataset, data, options.batch_size, comm.rank(), comm.world_size())
    results = detect_all(detector, batches, device, category_ids, config.model.conventions)
    if comm.is_main():
        if options.results is not None:
            options.results.parent.mkdir(parents=True, exist_ok=True)
            options.results.write_text(json.dumps(results))
        masks = config.model.mask_head.enabled and dataset.has_masks
        print(score_table(evaluate_results(options.annotations, results, masks)))
    comm.barrier()


def run_predict(options: argparse.Namespace) -> None:
    from giantdet.engine.predict import draw, image_files, load_image, load_predictor, picture_names

    predictor = load_predictor(options.export)
    options.output.mkdir(parents=True, exist_ok=True)
    results = []
    files = image_files(options.images)
    for number, (path, picture) in enumerate(zip(files, picture_names(files, options.output), strict=True)):
        image = load_image(path)
        found = predictor(image, options.threshold)
        draw(image, found).save(picture)
        results += [{"file_name": str(path), **result} for result in found.to_coco(number)]
        print(f"{path}: {len(found.names)} objects, {picture}")
    (options.output / "results.json").write_text(json.dumps(results))
    print(f"results: {options.output / 'results.json'}")


def run_export(options: argparse.Namespace) -> None:
    from giantdet.checkpoint import newest
    from giantdet.config.load import load_run
    from giantdet.data.coco import CocoDataset
    from giantdet.export import export_checkpoint, export_config

    run = load_run(options.run / "config.json")
    if run.giantdet.data.train is None:
        raise ValueError(f"{options.run / 'config.json'}: no data.train, which names the classes")
    dataset = CocoDataset(run.giantdet.data.train.annotations, run.giantdet.data.train.images)
    folder = options.run / "checkpoints"
    checkpoint = folder / options.checkpoint if options.checkpoint else newest(folder)
    output = options.output or options.run / "export"
    export_checkpoint(checkpoint, output, export_config(run, dataset.category_ids, dataset.class_names))
    print(output)


def run_precise_bn(options: argparse.Namespace) -> None:
    from giantdet.config.load import load_run
    from giantdet.config.resolve import check_data
    from giantdet.data.coco import CocoDataset
    from giantdet.data.loader import train_loader
    from giantdet.distributed import comm
    from giantdet.engine.precise_bn import bn_images, reestimate
    from giantdet.export import export_model, load_detector

    run = load_run(options.run / "config.json")
    check_data(run, ["train"])
    data = run.giantdet.data
    assert data.train is not None
    device = comm.start()
    detector, config = load_detector(options.run / "export", device)
    dataset = CocoDataset(data.train.annotations, data.train.images)
    size = options.batch_size or bn_images(run)
    masks = config.model.mask_head.enabled
    batches = train_loader(
        dataset, data, size, comm.rank(), comm.world_size(), seed=run.giantdet.train.seed, masks=masks
    )
    norms = reestimate(detector, batches, options.batches, device)
    batches.close()
    if norms == 0:
        raise ValueError(f"{options.run}: its model has no batch norm with running statistics")
    output = options.output or options.run / "export_precise_bn"
    export_model(detector, output, config)
    if comm.is_main():
        images = options.batches * size * comm.world_size()
        print(f"{output}: {norms} batch norms over {images} images, {size} at a time")


def run_plot(options: argparse.Namespace) -> None:
    from giantdet.engine.plots import plot_run, plot_schedule

    if options.schedule is not None:
        from giantdet.config.load import load_run
        from giantdet.config.resolve import resolve

        run = resolve(load_run(options.schedule), options.gpus, options.images)
        print(plot_schedule(run, options.output or Path()))
        return
    if options.run is None:
        raise ValueError("plot: name the folder of a run, or a JSON with --schedule")
    metrics, output = options.run / "metrics.jsonl", options.output or options.run
    if not metrics.is_file():
        raise ValueError(f"{options.run}: no metrics.jsonl here; name the folder of a run")
    output.mkdir(parents=True, exist_ok=True)
    for picture in plot_run(metrics, output):
        print(picture)


def run_validate(options: argparse.Namespace) -> int:
    from giantdet.data.validate import format_report, validate

    problems = validate(options.annotations, options.images)
    print(format_report(problems))
    return 1 if any(problem.is_error for problem in problems) else 0


def run_configs(options: argparse.Namespace) -> None:
    if not options.folder.is_dir():
        raise ValueError(f"{options.folder}: no such folder; name the one that holds the recipes")
    for path in sorted(options.folder.glob("*.json")):
        try:
            about = json.loads(path.read_text()).get("about", "")
        except (json.JSONDecodeError, UnicodeDecodeError, AttributeError):
            about = "(not a JSON object)"
        text = about.get("what", "") if isinstance(about, dict) else about
        print(f"{path}: {text}")


def run_demo_data(options: argparse.Namespace) -> None:
    from giantdet.data.demo import make_demo

    make_demo(options.folder, options.train_images, options.val_images, options.size, options.seed)
    print(options.folder)


if __name__ == "__main__":
    sys.exit(main())
