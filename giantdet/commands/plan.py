"""The command `plan`: compute memory, communication and time of a run."""

from __future__ import annotations

import argparse
from typing import Any

from giantdet.commands.arguments import COCO_IMAGES, as_path, at_least
from giantdet.tools.machines import MACHINES


def add(subparsers: Any) -> None:
    """Add the command and its arguments."""
    parser = subparsers.add_parser(
        "plan",
        help="compute memory, communication and time of a run on a cluster",
        description="Print the memory per rank and the communication and time per step, for each ZeRO stage "
        "with blocks kept or recomputed.",
    )
    parser.add_argument("config", type=as_path, help="the run's JSON, see ds_configs/")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="dotted overrides of the JSON")
    parser.add_argument("--gpus", type=at_least(1), required=True, help="number of GPUs")
    parser.add_argument("--gpu", default="h100", help=f"GPU type: {', '.join(MACHINES)}; default: h100")
    parser.add_argument(
        "--memory", type=float, metavar="GB", help="memory per GPU, for a type not in the list"
    )
    parser.add_argument("--tflops", type=float, help="dense bf16 peak per GPU, for a type not in the list")
    parser.add_argument(
        "--bandwidth",
        type=float,
        default=50.0,
        metavar="GB/S",
        help="bandwidth of each GPU to the other GPUs; default: 50",
    )
    parser.add_argument(
        "--efficiency", type=float, default=0.4, help="share of the peak that is reached; default: 0.4"
    )
    parser.add_argument(
        "--images", type=at_least(1), default=COCO_IMAGES, help=f"images per epoch; default: {COCO_IMAGES}"
    )
    parser.add_argument(
        "--measure",
        action="store_true",
        help="also find the largest micro-batch by trying, on this machine's GPUs; --memory limits each try",
    )
    parser.set_defaults(command=run)


def run(options: argparse.Namespace) -> None:
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
