"""The commands of cli.py, one function each, which take its parsed arguments.

Heavy imports are inside the functions, so that help texts and errors appear at once.
"""

from __future__ import annotations

import argparse
import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from giantdet.errors import InputError

if TYPE_CHECKING:
    from giantdet.config.types import GiantdetConfig


def run_train(options: argparse.Namespace) -> None:
    from giantdet.config.load import load_run

    run = load_run(options.deepspeed_config, options.overrides)
    if options.print_config:
        print_config(run)
        return
    from giantdet.distributed import comm
    from giantdet.engine.faults import listen
    from giantdet.engine.train import train
    from giantdet.tools.plots import plot_run
    from giantdet.tools.profile import Profile

    listen()
    if options.local_rank is not None:
        os.environ.setdefault("LOCAL_RANK", str(options.local_rank))
    output = Path(run.giantdet.train.output)
    profile = Profile(output / "profile") if options.profile else None
    train(run, profile.step if profile is not None else lambda: None)
    if profile is not None:
        profile.close()
    if comm.is_main():
        plot_run(output / "metrics.jsonl", output)


def print_config(run: Any) -> None:
    """Print the run as resolved for the current number of processes, and for the data set if it exists."""
    import torch

    from giantdet.config.datasets import sections
    from giantdet.config.resolve import describe, resolve
    from giantdet.data.dataset import open_dataset
    from giantdet.layers.body import check_name
    from giantdet.layers.model_names import with_timm_name
    from giantdet.layers.norm import check_norms

    check_name(with_timm_name(run.giantdet.model.backbone).name)
    images = classes = None
    data = run.giantdet.data
    parts = [] if data.train is None else [section for _, section in sections(data.train)]
    if data.train is not None and all(source.path.exists() for part in parts for source in part.sources()):
        dataset = open_dataset(data.train)
        images = len(dataset.training_indices(data.filter_empty))
        classes = dataset.classes
    world = int(os.environ.get("WORLD_SIZE", "1"))
    if int(os.environ.get("RANK", "0")) == 0:
        resolved = resolve(run, world, images, classes, torch.cuda.is_available())
        check_norms(resolved.giantdet.norm, resolved.batch.micro, world)
        print(describe(resolved))


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


def run_export(options: argparse.Namespace) -> None:
    from giantdet.checkpoint.files import newest
    from giantdet.config.resolved import load_resolved
    from giantdet.data.dataset import open_dataset
    from giantdet.export import export_checkpoint, export_config

    run = load_resolved(options.run / "config.json")
    classes = run.giantdet.data.classes
    if classes is None:  # a run of version 0.1
        if run.giantdet.data.train is None:
            raise InputError(
                f"{options.run / 'config.json'}: no data.classes, and no data.train to read them from"
            )
        dataset = open_dataset(run.giantdet.data.train)
        print(f"{options.run}: the classes are those of {dataset.annotations} as it is now")
        classes = run.giantdet.model.predicted(dataset.classes)
    folder = options.run / "checkpoints"
    checkpoint = folder / options.checkpoint if options.checkpoint else newest(folder)
    output = options.output or options.run / "export"
    exported = export_config(run, classes)
    export_checkpoint(checkpoint, output, exported, run.giantdet.train.export_shard)
    print(output)


def run_precise_bn(options: argparse.Namespace) -> None:
    from giantdet.config.resolve import check_data
    from giantdet.config.resolved import load_resolved
    from giantdet.data.dataset import open_dataset
    from giantdet.data.loader import train_loader
    from giantdet.distributed import comm
    from giantdet.export import export_model, load_detector
    from giantdet.tools.precise_bn import bn_images, reestimate

    run = load_resolved(options.run / "config.json")
    check_data(run, ["train"])
    data = run.giantdet.data
    assert data.train is not None
    device = comm.start()
    detector, config = load_detector(options.run / "export", device)
    dataset = open_dataset(data.train)
    size = options.batch_size or bn_images(run)
    batches = train_loader(
        dataset,
        data,
        size,
        comm.rank(),
        comm.world_size(),
        seed=run.giantdet.train.seed,
        targets=detector.targets,
    )
    norms = reestimate(detector, batches, options.batches, device)
    batches.close()
    if norms == 0:
        raise InputError(f"{options.run}: the model has no batch norms with running statistics")
    output = options.output or options.run / "export_precise_bn"
    export_model(detector, output, config)
    if comm.is_main():
        images = options.batches * size * comm.world_size()
        print(f"{output}: {norms} batch norms over {images} images, {size} at a time")


def run_plot(options: argparse.Namespace) -> None:
    from giantdet.tools.plots import plot_run, plot_schedule

    if options.schedule is not None:
        from giantdet.config.load import load_run
        from giantdet.config.resolve import resolve

        run = resolve(load_run(options.schedule), options.gpus, options.images)
        print(plot_schedule(run, options.output or Path()))
        return
    if options.run is None:
        raise InputError("plot: name the folder of a run, or a JSON with --schedule")
    metrics, output = options.run / "metrics.jsonl", options.output or options.run
    if not metrics.is_file():
        raise InputError(f"{options.run}: no metrics.jsonl here; name the folder of a run")
    output.mkdir(parents=True, exist_ok=True)
    for picture in plot_run(metrics, output):
        print(picture)


def run_plan(options: argparse.Namespace) -> None:
    from giantdet.config.load import load_run
    from giantdet.tools.machines import machine_of

    machine = machine_of(options.gpu, options.memory, options.tflops)
    from giantdet.tools.plan import make_plan, report

    run = load_run(options.config, ["model.backbone.pretrained=false", *options.overrides])
    bandwidth = options.bandwidth * 1e9
    print(report(make_plan(run, options.gpus, machine, bandwidth, options.efficiency, options.images)))
    if options.measure:
        measure_micro_batch(options)


def measure_micro_batch(options: argparse.Namespace) -> None:
    import torch

    from giantdet.tools.measure import measure

    ranks = max(1, torch.cuda.device_count())
    limit = "" if options.memory is None else f", at most {options.memory:g} GB each"
    print(f"\nOn this machine, {ranks} {'GPU' if torch.cuda.is_available() else 'CPU process'}(s){limit}:")
    memory = options.memory * 1e9 if options.memory else None
    found = measure(options.config, options.overrides, ranks, memory, lambda text: print(text, flush=True))
    print(f"The largest micro-batch is {found}." if found else "Not even one image fits.")


def run_doctor(options: argparse.Namespace) -> int:
    from giantdet.tools.doctor import doctor

    return doctor(options.output, options.mebibytes, options.timeout_minutes)


def run_validate(options: argparse.Namespace) -> int:
    """Report the problems of data sets of any format; the exit code is 1 if there are errors."""
    from giantdet.config.datasets import sections
    from giantdet.data.dataset import CHECKS, open_dataset
    from giantdet.data.images import limit_pixels
    from giantdet.data.validate import format_report

    usage = "validate-data: give a COCO instances JSON and the folder of its images, or --config JSON"
    data, run_config = data_sets(options, ["train", "val"], usage)
    limit_pixels(options.max_image_pixels or run_config.data.max_image_pixels)
    failed = False
    for name, config in data.items():
        parts = sections(config)
        reports = []
        for place, section in parts:
            reports.append(CHECKS[section.format](section))
            print(reports[-1].summary.text(f"{name}{place}"))
            print(format_report(reports[-1].problems))
        has_errors = any(report.has_errors for report in reports)
        if len(parts) > 1 and not has_errors:
            print(open_dataset(config).summary().text(name))  # an error if they do not fit each other
        failed |= has_errors
    return 1 if failed else 0


def run_configs(options: argparse.Namespace) -> None:
    if not options.folder.is_dir():
        raise InputError(f"{options.folder}: no such folder; name the folder of the recipes")
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
