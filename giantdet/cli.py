"""The `giantdet` command: its arguments. commands.py and its neighbours implement them."""

from __future__ import annotations

import argparse
import io
import logging
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path

from giantdet import commands, model_commands, weight_commands
from giantdet.errors import GiantdetError, InputError, LostContactError
from giantdet.tools.machines import MACHINES

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
    except KeyboardInterrupt:
        _say("giantdet: stopped: Ctrl-C")
        return 128 + signal.SIGINT
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
        # Each rank prints, as each may know another part of the reason; on its own line, after the progress
        # bar.
        print(f"\ngiantdet: stopped: {comm.describe_lost_contact(error)}", file=sys.stderr, flush=True)
        return LostContactError.exit_code
    finally:
        if "giantdet.distributed.comm" in sys.modules:
            sys.modules["giantdet.distributed.comm"].stop()


def _say(message: str) -> None:
    """Print to stderr, once: if many ranks stop for one reason, only the main rank prints it.

    Before the ranks are connected, the first rank of each machine prints: a file may be missing on one
    machine only.
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
        description="Train the run of a JSON. With many processes: deepspeed scripts/train.py ...",
    )
    add_run_arguments(train)
    train.set_defaults(command=commands.run_train)

    evaluate = subparsers.add_parser("eval", help="score an exported model on a data set")
    evaluate.add_argument("export", type=_path, help="folder with model.safetensors and config.json")
    evaluate.add_argument(
        "members", nargs="*", type=_path, help="with --fuse: more exports, or results in COCO's format"
    )
    _add_pixel_limit(evaluate)
    evaluate.add_argument(
        "--annotations", type=_path, help="COCO instances JSON, or a list of images in its format"
    )
    evaluate.add_argument("--images", type=_path, help="folder of its images")
    evaluate.add_argument(
        "--config", type=_path, help="instead of both: a run's JSON, whose data.val is of any format"
    )
    evaluate.add_argument("--batch-size", type=_at_least(1), default=1, help="images at a time; default: 1")
    evaluate.add_argument("--workers", type=_at_least(0), default=2, help="loader processes; default: 2")
    evaluate.add_argument(
        "--max-detections",
        type=_at_least(1),
        help="detections in an image that are scored, by COCO's rules of each class; default: as --config",
    )
    backends = ("auto", "pycocotools", "hotcoco")
    evaluate.add_argument("--backend", choices=backends, help="what computes COCO's AP; default: as --config")
    evaluate.add_argument(
        "--results", type=_path, help="also write the detections to this file, as COCO results JSON"
    )
    _add_tta(evaluate)
    _add_fuse(evaluate)
    evaluate.set_defaults(command=model_commands.run_eval)

    predict = subparsers.add_parser("predict", help="detect objects in image files")
    predict.add_argument("export", type=_path, help="folder with model.safetensors and config.json")
    predict.add_argument(
        "images",
        nargs="+",
        type=_path,
        help="image files, or folders of them, also in sub-folders; with --fuse, more exports come first",
    )
    predict.add_argument(
        "--annotations",
        type=_path,
        help="COCO JSON: predict the images that it lists, in the one folder given, and write their ids",
    )
    _add_pixel_limit(predict)
    predict.add_argument(
        "--output",
        type=_path,
        default=Path("predictions"),
        help="folder for overlays and results.json; default: predictions",
    )
    predict.add_argument(
        "--threshold", type=float, default=0.5, help="lowest score of the detections; default: 0.5"
    )
    predict.add_argument(
        "--tile",
        type=_at_least(1),
        metavar="PIXELS",
        help="predict large images in tiles of PIXELS x PIXELS; only for models of objects; default: off",
    )
    predict.add_argument(
        "--tile-overlap", type=float, default=0.2, help="overlap, as a part of a tile's side; default: 0.2"
    )
    predict.add_argument("--device", help="cpu, cuda or cuda:1; default: the GPU if there is one")
    predict.add_argument(
        "--batch-size",
        type=_at_least(1),
        default=1,
        help="images (or tiles of one) that the model takes at a time; default: 1",
    )
    predict.add_argument(
        "--no-overlays", dest="overlays", action="store_false", help="write the results without pictures"
    )
    _add_tta(predict)
    _add_fuse(predict)
    predict.set_defaults(command=model_commands.run_predict)

    export = subparsers.add_parser("export", help="export a run's newest checkpoint as safetensors")
    export.add_argument("run", type=_path, help="folder of the run (train.output)")
    export.add_argument("--output", type=_path, help="default: RUN/export")
    export.add_argument(
        "--checkpoint", help="name of a checkpoint, for example step_100; default: the newest"
    )
    export.set_defaults(command=commands.run_export)

    precise = subparsers.add_parser(
        "precise-bn",
        help="estimate the running statistics of a run's batch norms again",
        description="Estimate the running statistics of the batch norms in a run's export again, over "
        "batches of its training data, and write another export.",
    )
    precise.add_argument("run", type=_path, help="folder of the run (train.output)")
    precise.add_argument(
        "--batches", type=_at_least(1), default=200, help="batches per process; default: 200"
    )
    precise.add_argument(
        "--batch-size", type=_at_least(1), help="default: the images that training normalised together"
    )
    precise.add_argument("--output", type=_path, help="default: RUN/export_precise_bn")
    precise.set_defaults(command=commands.run_precise_bn)

    plot = subparsers.add_parser("plot", help="draw the losses of a run and AGVM's measurements")
    plot.add_argument("run", type=_path, nargs="?", help="folder of the run (train.output)")
    plot.add_argument("--output", type=_path, help="folder for the pictures; default: RUN")
    plot.add_argument(
        "--schedule", type=_path, metavar="JSON", help="draw the LR schedule of this JSON instead"
    )
    plot.add_argument(
        "--gpus", type=_at_least(1), default=1, help="number of GPUs, for --schedule; default: 1"
    )
    coco = f"images per epoch, for --schedule; default: {COCO_IMAGES}, COCO train2017's with objects"
    plot.add_argument("--images", type=_at_least(1), default=COCO_IMAGES, help=coco)
    plot.set_defaults(command=commands.run_plot)

    plan = subparsers.add_parser(
        "plan",
        help="compute memory, communication and time of a run on a cluster",
        description="Print the memory per rank and the communication and time per step, for each ZeRO stage "
        "with blocks kept or recomputed.",
    )
    plan.add_argument("config", type=_path, help="the run's JSON, see ds_configs/")
    plan.add_argument("overrides", nargs="*", metavar="key=value", help="dotted overrides of the JSON")
    plan.add_argument("--gpus", type=_at_least(1), required=True, help="number of GPUs")
    plan.add_argument("--gpu", default="h100", help=f"GPU type: {', '.join(MACHINES)}; default: h100")
    plan.add_argument("--memory", type=float, metavar="GB", help="memory per GPU, for a type not in the list")
    plan.add_argument("--tflops", type=float, help="dense bf16 peak per GPU, for a type not in the list")
    plan.add_argument(
        "--bandwidth",
        type=float,
        default=50.0,
        metavar="GB/S",
        help="bandwidth of each GPU to the other GPUs; default: 50",
    )
    plan.add_argument(
        "--efficiency", type=float, default=0.4, help="share of the peak that is reached; default: 0.4"
    )
    plan.add_argument(
        "--images", type=_at_least(1), default=COCO_IMAGES, help=f"images per epoch; default: {COCO_IMAGES}"
    )
    plan.add_argument(
        "--measure",
        action="store_true",
        help="also find the largest micro-batch by trying, on this machine's GPUs; --memory limits each try",
    )
    plan.set_defaults(command=commands.run_plan)

    doctor = subparsers.add_parser(
        "doctor",
        help="check versions, accelerators, network between ranks, file system and limits",
        description="Check this machine or, with scripts/doctor.py under a launcher, all hosts and the "
        "network between them. Exit code 1 if a check is BAD.",
    )
    doctor.add_argument(
        "--output", type=_path, default=Path("runs"), help="folder that runs will write to; default: runs"
    )
    doctor.add_argument(
        "--mebibytes", type=_at_least(1), default=64, help="size of the timed all-reduce; default: 64"
    )
    doctor.add_argument(
        "--timeout-minutes", type=float, default=2.0, help="how long to wait for other ranks; default: 2"
    )
    doctor.add_argument("--local_rank", "--local-rank", type=int, default=None, help=argparse.SUPPRESS)
    doctor.set_defaults(command=commands.run_doctor)

    validate = subparsers.add_parser(
        "validate-data",
        help="report every bad record and file of data sets",
        description="Report every bad record and file of a COCO data set, or of data.train and data.val of a "
        "run. Exit code 1 if there are errors.",
    )
    validate.add_argument("annotations", type=_path, nargs="?", help="COCO instances JSON")
    validate.add_argument("images", type=_path, nargs="?", help="folder of its images")
    validate.add_argument(
        "--config",
        type=_path,
        help="instead of both: a run's JSON, whose data.train and data.val are of any format",
    )
    _add_pixel_limit(validate)
    validate.set_defaults(command=commands.run_validate)

    configs = subparsers.add_parser("configs", help="list the recipes of a folder")
    configs.add_argument("folder", nargs="?", type=_path, default=Path("ds_configs"))
    configs.set_defaults(command=commands.run_configs)

    demo = subparsers.add_parser(
        "make-demo-data", help="make the small data set that scripts/demo.sh trains on"
    )
    demo.add_argument("folder", type=_path, help="folder to write it to")
    demo.add_argument("--train-images", type=_at_least(1), default=2000, help="default: 2000")
    demo.add_argument("--val-images", type=_at_least(1), default=200, help="default: 200")
    demo.add_argument(
        "--size", type=_at_least(16), default=128, help="side of the square images in pixels; default: 128"
    )
    demo.add_argument("--seed", type=int, default=0, help="random seed; default: 0")
    demo.set_defaults(command=commands.run_demo_data)
    weight_commands.add_import_weights(subparsers)
    return parser


def _path(text: str) -> Path:
    """Return a path; shells leave the ~ of --output=~/x as it is."""
    return Path(text).expanduser()


def _add_pixel_limit(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--max-image-pixels",
        type=_at_least(1),
        help="read images of up to this many pixels; default: Pillow's limit, 178956970",
    )


def _add_tta(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group(
        "multi-scale testing",
        "each of these options turns it on; defaults: eval.tta of the export, or 400 to 1200",
    )
    group.add_argument("--tta", action="store_true", help="show images in several scales, and mirrored")
    group.add_argument(
        "--tta-sides", type=_at_least(1), nargs="+", metavar="PIXELS", help="short sides of the scaled images"
    )
    group.add_argument("--tta-max-side", type=_at_least(1), metavar="PIXELS", help="their largest long side")
    group.add_argument("--tta-merge", choices=("nms", "soft_nms", "wbf"), help="how boxes are merged")
    group.add_argument(
        "--no-tta-flip", dest="tta_flip", action="store_false", help="leave out the mirrored images"
    )


def _add_fuse(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("ensembles")
    group.add_argument(
        "--fuse", choices=("wbf", "nms", "soft_nms"), help="fuse the objects of several models, by class name"
    )
    group.add_argument(
        "--fuse-iou",
        type=float,
        help="IoU from which boxes are of one object; default: 0.55 for wbf, else 0.5",
    )


def _at_least(least: int) -> Callable[[str], int]:
    def number(text: str) -> int:
        if int(text) < least:
            raise argparse.ArgumentTypeError(f"must be at least {least}")
        return int(text)

    return number


def add_run_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of training under any launcher."""
    parser.add_argument(
        "--deepspeed_config", "--config", required=True, help="the run's JSON, see ds_configs/"
    )
    parser.add_argument(
        "overrides",
        nargs="*",
        metavar="key=value",
        help="overrides of the JSON by dotted path: train.steps=100 zero_optimization.stage=3",
    )
    parser.add_argument(
        "--profile",
        action="store_true",
        help="record a few steps: writes a trace and the ten most expensive operators to OUTPUT/profile/",
    )
    parser.add_argument("--print-config", action="store_true", help="print the resolved JSON and stop")
    # Launchers pass the local rank in either spelling; it is also in the environment.
    parser.add_argument("--local_rank", "--local-rank", type=int, default=None, help=argparse.SUPPRESS)
    parser.add_argument("--deepspeed", action="store_true", help=argparse.SUPPRESS)


if __name__ == "__main__":
    sys.exit(main())
