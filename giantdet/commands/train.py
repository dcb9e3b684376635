"""The command `train`: one rank of a run, under any launcher."""

from __future__ import annotations

import argparse
import os
from pathlib import Path
from typing import Any


def add(subparsers: Any) -> None:
    """Add the command and its arguments."""
    parser = subparsers.add_parser(
        "train",
        help="train (one process; start many with deepspeed, torchrun or srun and scripts/train.py)",
        description="Train the run of a JSON. With many processes: deepspeed scripts/train.py ...",
    )
    parser.add_argument(
        "--deepspeed_config", "--config", required=True, help="the run's JSON, see ds_configs/"
    )
    parser.add_argument(
        "overrides",
        nargs="*",
        metavar="key=value",
        help="overrides of the JSON by dotted path: train.steps=100 zero_optimization.stage=3; ~key removes "
        "a key",
    )
    parser.add_argument(
        "--profile",
        action="store_true",
        help="record a few steps: writes a trace and the ten most expensive operators to OUTPUT/profile/",
    )
    parser.add_argument("--print-config", action="store_true", help="print the resolved JSON and stop")
    parser.add_argument(
        "--verbose",
        action="store_true",
        help="show DeepSpeed's INFO lines and the deprecation warnings of libraries",
    )
    # Launchers pass the local rank in either spelling; it is also in the environment.
    parser.add_argument("--local_rank", "--local-rank", type=int, default=None, help=argparse.SUPPRESS)
    parser.add_argument("--deepspeed", action="store_true", help=argparse.SUPPRESS)
    parser.set_defaults(command=run)


def run(options: argparse.Namespace) -> None:
    from giantdet.config.load import load_run

    verbosity = ["log_level=info"] if options.verbose else []
    run = load_run(options.deepspeed_config, [*verbosity, *options.overrides])
    if options.print_config:
        print_config(run)
        return
    from giantdet.distributed import comm
    from giantdet.engine.announce import ending
    from giantdet.engine.faults import listen
    from giantdet.engine.train import train
    from giantdet.report.build import report_of_finished
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
    is_main = comm.is_main()
    comm.stop()  # the report takes a while, and no rank has to wait for it
    if is_main:
        plot_run(output / "metrics.jsonl", output)
        if run.giantdet.train.report:
            report_of_finished(output)
        print("\n" + ending(output), flush=True)


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
