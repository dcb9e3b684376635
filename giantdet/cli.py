"""The `giantdet` command: its arguments. What each command does is in commands.py."""

from __future__ import annotations

import argparse
import io
import logging
import os
import sys
from collections.abc import Callable
from pathlib import Path

from giantdet import commands
from giantdet.errors import GiantdetError, InputError, LostContactError

COCO_IMAGES = 117_266


def main(arguments: list[str] | None = None) -> int:
    """Run one command and return its exit code.

    An error of `errors.py` ends it with one line on stderr and that error's code; a bug shows its traceback.
    """
    parser = build_parser()
    options = parser.parse_args(arguments)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # file names need not be UTF-8
    logging.basicConfig(level=logging.WARNING, format="giantdet: %(message)s")
    try:
        return int(options.command(options) or 0)
    except BrokenPipeError:
        return 0
    except GiantdetError as error:
        _say(f"giantdet: {'error' if isinstance(error, InputError) else 'stopped'}: {error}")
        return error.exit_code
    except OSError as error:
        if error.filename is None:
            raise
        _say(f"giantdet: error: {error.filename}: {error.strerror}")
        return InputError.exit_code
    except RuntimeError as error:
        comm = sys.modules.get("giantdet.distributed.comm")
        if comm is None or not comm.is_lost_contact(error):
            raise
        # Each rank says it, as each may know another part of it; after the progress bar, on its own line.
        print(f"\ngiantdet: stopped: {comm.describe_lost_contact(error)}", file=sys.stderr, flush=True)
        return LostContactError.exit_code
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


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="giantdet", description="Train detectors of up to billions of parameters under DeepSpeed ZeRO."
    )
    subparsers = parser.add_subparsers(metavar="COMMAND", required=True)

    train = subparsers.add_parser(
        "train",
        help="train (one process; start many with deepspeed, torchrun or srun and scripts/train.py)",
        description="Train as a JSON says. With many processes: deepspeed scripts/train.py ...",
    )
    add_run_arguments(train)
    train.set_defaults(command=commands.run_train)

    evaluate = subparsers.add_parser("eval", help="COCO scores of an export on a data set")
    evaluate.add_argument("export", type=Path, help="folder with model.safetensors and config.json")
    evaluate.add_argument("--annotations", required=True, help="COCO instances JSON")
    evaluate.add_argument("--images", required=True, help="folder of its images")
    evaluate.add_argument("--batch-size", type=_at_least(1), default=1)
    evaluate.add_argument("--workers", type=_at_least(0), default=2)
    evaluate.add_argument("--results", type=Path, help="write COCO results JSON here")
    evaluate.set_defaults(command=commands.run_eval)

    predict = subparsers.add_parser("predict", help="detect objects in image files")
    predict.add_argument("export", type=Path, help="folder with model.safetensors and config.json")
    predict.add_argument("images", nargs="+", type=Path, help="image files or folders of them")
    predict.add_argument(
        "--output", type=Path, default=Path("predictions"), help="overlays and results.json go here"
    )
    predict.add_argument("--threshold", type=float, default=0.5, help="lowest score to show")
    predict.set_defaults(command=commands.run_predict)

    export = subparsers.add_parser("export", help="write safetensors from a run's newest checkpoint")
    export.add_argument("run", type=Path, help="folder of the run (train.output)")
    export.add_argument("--output", type=Path, help="default: RUN/export")
    export.add_argument(
        "--checkpoint", help="name of a checkpoint, for example step_100; default: the newest"
    )
    export.set_defaults(command=commands.run_export)

    precise = subparsers.add_parser(
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
    precise.set_defaults(command=commands.run_precise_bn)

    plot = subparsers.add_parser("plot", help="draw the losses of a run, and what AGVM measured and did")
    plot.add_argument("run", type=Path, nargs="?", help="folder of the run (train.output)")
    plot.add_argument("--output", type=Path, help="folder of the pictures; default: RUN")
    plot.add_argument("--schedule", type=Path, metavar="JSON", help="draw the LR that a run's JSON says")
    plot.add_argument("--gpus", type=_at_least(1), default=1, help="for --schedule; default: 1")
    coco = f"of an epoch, for --schedule; default: {COCO_IMAGES}, COCO train2017's with objects"
    plot.add_argument("--images", type=_at_least(1), default=COCO_IMAGES, help=coco)
    plot.set_defaults(command=commands.run_plot)

    plan = subparsers.add_parser(
        "plan",
        help="memory, communication and time of a run on a cluster",
        description="Memory of a rank, communication and time of a step, by ZeRO stage and checkpointing.",
    )
    plan.add_argument("config", type=Path, help="the run's JSON, see ds_configs/")
    plan.add_argument("overrides", nargs="*", metavar="key=value", help="dotted overrides of the JSON")
    plan.add_argument("--gpus", type=_at_least(1), required=True)
    plan.add_argument("--gpu", default="h100", help="a100-40, a100, h100, h200, b200; default: h100")
    plan.add_argument("--memory", type=float, metavar="GB", help="of a GPU, for one that is not in the list")
    plan.add_argument("--tflops", type=float, help="dense bf16 peak of a GPU, for one not in the list")
    plan.add_argument(
        "--bandwidth", type=float, default=50.0, metavar="GB/S", help="of each GPU to others; default: 50"
    )
    plan.add_argument("--efficiency", type=float, default=0.4, help="share of the peak; default: 0.4")
    plan.add_argument("--images", type=_at_least(1), default=COCO_IMAGES, help=f"default: {COCO_IMAGES}")
    plan.add_argument(
        "--measure",
        action="store_true",
        help="then find the largest micro-batch by trying, on this machine's GPUs; --memory bounds a try",
    )
    plan.set_defaults(command=commands.run_plan)

    doctor = subparsers.add_parser(
        "doctor",
        help="check versions, accelerators, network between ranks, file system and limits",
        description="Check this machine, or with scripts/doctor.py under a launcher all hosts and what is "
        "between them. Exit code 1 if something is bad.",
    )
    doctor.add_argument(
        "--output", type=Path, default=Path("runs"), help="where runs will write; default: runs"
    )
    doctor.add_argument("--mebibytes", type=_at_least(1), default=64, help="of the all-reduce; default: 64")
    doctor.add_argument(
        "--timeout-minutes", type=float, default=2.0, help="to wait for other ranks; default: 2"
    )
    doctor.add_argument("--local_rank", "--local-rank", type=int, default=None, help=argparse.SUPPRESS)
    doctor.set_defaults(command=commands.run_doctor)

    validate = subparsers.add_parser("validate-data", help="report every bad record of a COCO data set")
    validate.add_argument("annotations", help="COCO instances JSON")
    validate.add_argument("images", help="folder of its images")
    validate.set_defaults(command=commands.run_validate)

    configs = subparsers.add_parser("configs", help="list the recipes of a folder")
    configs.add_argument("folder", nargs="?", type=Path, default=Path("ds_configs"))
    configs.set_defaults(command=commands.run_configs)

    demo = subparsers.add_parser("make-demo-data", help="make the small data set of scripts/demo.sh")
    demo.add_argument("folder", type=Path)
    demo.add_argument("--train-images", type=_at_least(1), default=2000)
    demo.add_argument("--val-images", type=_at_least(1), default=200)
    demo.add_argument("--size", type=_at_least(16), default=128, help="side of the square images in pixels")
    demo.add_argument("--seed", type=int, default=0)
    demo.set_defaults(command=commands.run_demo_data)
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
    parser.add_argument(
        "--profile",
        action="store_true",
        help="record a few steps: a trace and the ten most expensive operators, in OUTPUT/profile/",
    )
    parser.add_argument("--print-config", action="store_true", help="print the resolved JSON and stop")
    # Launchers pass the local rank in either spelling; the environment says it too.
    parser.add_argument("--local_rank", "--local-rank", type=int, default=None, help=argparse.SUPPRESS)
    parser.add_argument("--deepspeed", action="store_true", help=argparse.SUPPRESS)


if __name__ == "__main__":
    sys.exit(main())
