"""The command `precise-bn`: estimate the running statistics of batch norms again."""

from __future__ import annotations

import argparse
from typing import Any

from giantdet.commands.arguments import as_path, at_least
from giantdet.errors import InputError


def add(subparsers: Any) -> None:
    """Add the command and its arguments."""
    parser = subparsers.add_parser(
        "precise-bn",
        help="estimate the running statistics of a run's batch norms again",
        description="Estimate the running statistics of the batch norms in a run's export again, over "
        "batches of its training data, and write another export.",
    )
    parser.add_argument("run", type=as_path, help="folder of the run (train.output)")
    parser.add_argument("--batches", type=at_least(1), default=200, help="batches per process; default: 200")
    parser.add_argument(
        "--batch-size", type=at_least(1), help="default: the images that training normalised together"
    )
    parser.add_argument("--output", type=as_path, help="default: RUN/export_precise_bn")
    parser.set_defaults(command=run)


def run(options: argparse.Namespace) -> None:
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
