"""The command `export`: write a run's checkpoint as safetensors."""

from __future__ import annotations

import argparse
from typing import Any

from giantdet.commands.arguments import as_path
from giantdet.errors import InputError


def add(subparsers: Any) -> None:
    """Add the command and its arguments."""
    parser = subparsers.add_parser("export", help="export a run's newest checkpoint as safetensors")
    parser.add_argument("run", type=as_path, help="folder of the run (train.output)")
    parser.add_argument("--output", type=as_path, help="default: RUN/export")
    parser.add_argument(
        "--checkpoint", help="name of a checkpoint, for example step_100; default: the newest"
    )
    parser.set_defaults(command=run)


def run(options: argparse.Namespace) -> None:
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
