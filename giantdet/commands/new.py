"""The command `new`: write a run's JSON for a data set, a size of model and a machine."""

from __future__ import annotations

import argparse
import os
from typing import Any

from giantdet.commands.arguments import as_path, at_least
from giantdet.errors import InputError
from giantdet.tools.machines import MACHINES, Machine, machine_of


def add(subparsers: Any) -> None:
    """Add the command and its arguments."""
    parser = subparsers.add_parser(
        "new",
        help="write a run's JSON for a data set, a size of model and a machine",
        description="Adapt a recipe to a COCO data set and to a machine, write it as a run's JSON, and print "
        "each value with its reason (docs/own-data.md).",
    )
    parser.add_argument("output", type=as_path, help="JSON to write")
    parser.add_argument("--data", type=as_path, required=True, help="COCO JSON to train on")
    parser.add_argument("--images", type=as_path, help="folder of its images; default: import-data's")
    parser.add_argument("--val", type=as_path, help="COCO JSON to evaluate on; default: val.json beside it")
    parser.add_argument(
        "--size", default="small", help="small, base, large, giant, or the name of a recipe; default: small"
    )
    parser.add_argument("--weights", type=as_path, help="file of the backbone's weights; default: timm's")
    parser.add_argument(
        "--side",
        type=at_least(64),
        metavar="PIXELS",
        help="longest side of the canvas; default: as the recipe",
    )
    parser.add_argument("--gpus", type=at_least(1), help="number of GPUs; default: this machine's, or 1")
    parser.add_argument(
        "--gpu", help=f"cpu, or a GPU type: {', '.join(MACHINES)}; default: that of this machine, or cpu"
    )
    parser.add_argument("--memory", type=float, metavar="GB", help="memory per GPU (or process on CPUs)")
    parser.add_argument("--overwrite", action="store_true", help="replace OUTPUT if it exists")
    parser.set_defaults(command=run)


def run(options: argparse.Namespace) -> None:
    """Write the JSON, and print the values with their reasons and the command to start."""
    if options.output.suffix != ".json":
        raise InputError(f"{options.output}: name a file that ends in .json")
    if options.output.exists() and not options.overwrite:
        raise InputError(f"{options.output} exists; name another file, or add --overwrite")
    if options.weights is not None and not options.weights.exists():
        raise InputError(f"--weights {options.weights}: no such file")
    import json

    from giantdet.tools.new_run import Wishes, new_run

    machine, gpus, is_cpu = _machine(options)
    wishes = Wishes(
        data=options.data,
        images=options.images,
        val=options.val,
        size=options.size,
        weights=options.weights,
        side=options.side,
        gpus=gpus,
        machine=machine,
        is_cpu=is_cpu,
        output=options.output,
    )
    new = new_run(wishes)
    options.output.parent.mkdir(parents=True, exist_ok=True)
    options.output.write_text(json.dumps(new.raw, indent=2) + "\n")
    print(new.text())
    print(f"{options.output}: start it with `{new.raw['about']['command']}`")


def _machine(options: argparse.Namespace) -> tuple[Machine, int, bool]:
    """Return the GPU, their number, and whether there is none."""
    if options.gpu is not None and options.gpu.lower() != "cpu":
        return (
            machine_of(options.gpu, options.memory, 1.0 if options.memory else None),
            options.gpus or 1,
            False,
        )
    import torch

    found = torch.cuda.device_count() if options.gpu is None and torch.cuda.is_available() else 0
    if found:
        properties = torch.cuda.get_device_properties(0)
        memory = options.memory * 1e9 if options.memory else float(properties.total_memory)
        return Machine(properties.name, memory, 100e12), options.gpus or found, False
    gpus = options.gpus or 1
    # Half of the memory, as the loader's processes and the system need some.
    own = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2 / gpus
    return Machine("CPU process", options.memory * 1e9 if options.memory else own, 1e12), gpus, True
