"""Compare rules of the learning rate at a large batch: AGVM, its controls, and the noise scale.

python studies/rules.py --bccd DATA     # trains what studies/rules.csv does not have; prints the tables
python studies/rules.py --read --plot docs/rules.png

Faster R-CNN and Semantic FPN on generated scenes of 64 x 64 pixels (giantdet/data/demo.py), and Faster R-CNN
on blood cells (BCCD: a folder in COCO's format, annotations/instances_{train,val}.json and images/), whose
photographs are shrunk to 85 x 64 pixels first; SGD and AdamW.

The LR is tuned at the reference batch of 8 images, with a seed that the study does not use. At the large
batch it follows from the arm's rule alone. All runs of a task see the same number of images. One process
accumulates micro-batches of 8 images at both batches, so that batch norms see 8 images in all runs.

Each run has a folder of its own. Its evaluations become rows of the CSV once it has finished, and a run that
the CSV has is not repeated: the same command continues a study that was cut off. Runs go block by block
(task and optimizer) and seed by seed, the most informative first, with low priority (--nice).
"""

from __future__ import annotations

import argparse
import json
import math
import os
import shutil
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

from PIL import Image
from rules_report import (
    BASE,
    MODULES,
    REFERENCE,
    SCORES,
    TUNE,
    Job,
    Row,
    append,
    contrasts,
    label_of,
    last_rows,
    plot,
    read,
    select,
    table,
)

EXIT_DIVERGED = 3  # exit code of giantdet train
REPO = Path(__file__).resolve().parents[1]
MICRO, SIZE = REFERENCE, 64
TUNING_SEED = 100
POINTS = 12  # evaluations of a run
BACKBONE = {"name": "test_resnet", "pretrained": False}  # 0.4 million weights, four levels
RPN = {
    "anchor_sizes": [8, 12, 20, 32, 64],
    "batch_per_image": 32,
    "pre_nms_train": 100,
    "pre_nms_test": 100,
    "post_nms_train": 50,
    "post_nms_test": 50,
}


def faster_rcnn(detections: int) -> dict[str, Any]:
    """Return the model section of a Faster R-CNN that keeps so many detections of an image."""
    return {
        "type": "mask_rcnn",
        "backbone": BACKBONE,
        "fpn": {"channels": 32},
        "rpn": RPN,
        "box_head": {"width": 64, "batch_per_image": 32, "detections": detections},
        "mask_head": {"enabled": False},
    }


SEMANTIC_FPN = {
    "type": "semantic_fpn",
    "backbone": BACKBONE,
    "fpn": {"channels": 32},
    "semantic_head": {"width": 32},
}


class Task(NamedTuple):
    """A model, and what its images need."""

    model: dict[str, Any]
    width: int = SIZE
    max_objects: int = 20


TASKS: dict[str, Task] = {
    "detection": Task(faster_rcnn(30)),
    "cells": Task(faster_rcnn(60), width=96, max_objects=40),
    "semantic": Task(SEMANTIC_FPN),
}
OPTIMIZERS: dict[str, dict[str, Any]] = {
    "AdamW": {"betas": [0.9, 0.999], "weight_decay": 0.05},
    "SGD": {"momentum": 0.9, "weight_decay": 1e-4},
}
# The first LRs to try, unless the CSV has as many; further ones, by factors of 2, while the best is the
# smallest or the largest.
CANDIDATES = {"AdamW": (5e-4, 1e-3, 2e-3), "SGD": (0.01, 0.02, 0.04)}


class Arm(NamedTuple):
    """How the LR of the reference batch becomes that of a large batch: keys of `lr_scaling` and `agvm`."""

    name: str
    scaling: dict[str, Any]
    agvm: dict[str, Any]
    optimizers: tuple[str, ...] = ("AdamW", "SGD")
    lr_factor: float = 1.0
    warmup: float = 0.1  # share of the run


HELD = {"clamp": [1, 1]}  # factors of 1
SQRT = {"rule": "sqrt"}
ADAM_FULL = SQRT | {"betas": "beta2_power", "weight_decay": "timescale"}
ARMS: dict[str, Arm] = {
    "reference": Arm("batch 8", {}, HELD),
    BASE: Arm("square root", SQRT, HELD),
    "agvm": Arm("square root, AGVM", SQRT, {"rule": "agvm"}),
    "noise_scale": Arm("noise scale", {}, {"rule": "noise_scale", "clamp": [0.25, 16]}),
    "noise_scale_uniform": Arm(
        "noise scale, uniform", {}, {"rule": "noise_scale_uniform", "clamp": [0.25, 16]}
    ),
    "uniform": Arm("square root, uniform", SQRT, {"rule": "uniform"}),
    "inverse": Arm("square root, inverse AGVM", SQRT, {"rule": "inverse"}),
    "none": Arm("LR of batch 8", {}, HELD),
    "double": Arm("twice the LR of batch 8", {}, HELD, lr_factor=2.0),
    "linear": Arm("linear", {"rule": "linear"}, HELD, ("SGD",)),
    "linear_long": Arm("linear, long warmup", {"rule": "linear"}, HELD, ("SGD",), warmup=0.3),
    "sqrt_long": Arm("square root, long warmup", SQRT, HELD, warmup=0.3),
    "agvm_long": Arm("square root, long warmup, AGVM", SQRT, {"rule": "agvm"}, warmup=0.3),
    "adam_full": Arm("square root, beta2 and decay", ADAM_FULL, HELD, ("AdamW",)),
    "adam_full_long": Arm(
        "square root, long warmup, beta2 and decay", ADAM_FULL, HELD, ("AdamW",), warmup=0.3
    ),
}
FIRST = (
    "reference",
    BASE,
    "agvm",
    "noise_scale",
    "noise_scale_uniform",
    "uniform",
    "inverse",
    "none",
    "double",
)
LAST = ("linear", "linear_long", "sqrt_long", "agvm_long", "adam_full", "adam_full_long")  # after all blocks


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--output", type=Path, default=Path("runs/rules"))
    parser.add_argument("--csv", type=Path, default=REPO / "studies/rules.csv")
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=list(TASKS))
    parser.add_argument("--bccd", type=Path, help="folder of the task cells")
    parser.add_argument("--optimizers", nargs="+", choices=OPTIMIZERS, default=list(OPTIMIZERS))
    parser.add_argument("--arms", nargs="+", choices=ARMS, default=[*FIRST, *LAST])
    parser.add_argument("--batch", type=int, default=128, help="the large batch")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--images", type=int, default=38_400, help="images that a run sees, with repetitions")
    parser.add_argument("--train-images", type=int, default=4000, help="images of the training set")
    parser.add_argument("--val-images", type=int, default=300)
    parser.add_argument("--parallel", type=int, default=2, help="concurrent runs, one core each")
    parser.add_argument("--nice", type=int, default=10, help="how far to lower the priority, 0 to 19")
    parser.add_argument(
        "--target",
        type=float,
        default=0.6,
        help="share of the tuned LR's score at batch 8 that images are counted to",
    )
    parser.add_argument("--read", action="store_true", help="print the tables; no training")
    parser.add_argument("--plot", type=Path, help="draw the figure here")
    options = parser.parse_args()
    if not options.read:
        os.nice(options.nice)
        study(options)
    found = [row for row in read(options.csv) if row["batch"] in (REFERENCE, options.batch)]
    names = {name: arm.name for name, arm in ARMS.items()}
    blocks = [(task, optimizer) for task in options.tasks for optimizer in options.optimizers]
    blocks = [b for b in blocks if any((row["task"], row["optimizer"]) == b for row in found)]
    for block in blocks:
        print(table(found, names, *block, options.target))
    print(contrasts(found, names, blocks))
    if options.plot is not None:
        plot(found, names, blocks, options.plot)


# Running


def study(options: argparse.Namespace) -> None:
    """Train all runs that the CSV does not have."""
    data = options.output / "data"
    if "cells" in options.tasks and not (data / "cells").exists():
        if options.bccd is None:
            raise SystemExit("the task cells needs --bccd; name the other tasks by --tasks to leave it out")
        shrink(options.bccd, data / "cells")
    if options.tasks != ["cells"] and not (data / "semantic_val").exists():
        counts = ["--train-images", str(options.train_images), "--val-images", str(options.val_images)]
        command = [sys.executable, "-m", "giantdet.cli", "make-demo-data", str(data), *counts]
        subprocess.run([*command, "--size", str(SIZE)], check=True, env=environment())
    for arms in (FIRST, LAST):
        for task in options.tasks:
            for optimizer in options.optimizers:
                lr = tuned(options, task, optimizer)
                jobs = [
                    Job(task, optimizer, arm, REFERENCE if arm == "reference" else options.batch, seed, lr)
                    for seed in options.seeds
                    for arm in arms
                    if arm in options.arms and optimizer in ARMS[arm].optimizers
                ]
                run_all(options, jobs)


def shrink(source: Path, folder: Path) -> None:
    """Write the images of a COCO-format folder with a height of `SIZE`, and their annotations."""
    partial = folder.with_suffix(".partial")
    (partial / "images").mkdir(parents=True, exist_ok=True)
    for split in ("train", "val"):
        content = json.loads((source / f"annotations/instances_{split}.json").read_text())
        factors = {}
        for image in content["images"]:
            with Image.open(source / "images" / image["file_name"]) as opened:
                small = opened.convert("RGB").resize((round(opened.width * SIZE / opened.height), SIZE))
            factors[image["id"]] = (small.width / image["width"], small.height / image["height"])
            image |= {"width": small.width, "height": small.height}
            image["file_name"] = str(Path(image["file_name"]).with_suffix(".png"))
            small.save(partial / "images" / image["file_name"])
        for entry in content["annotations"]:
            x, y = factors[entry["image_id"]]
            entry["bbox"] = [v * f for v, f in zip(entry["bbox"], (x, y, x, y), strict=True)]
            entry["area"] = entry["area"] * x * y
        (partial / f"{split}.json").write_text(json.dumps(content))
    partial.rename(folder)


def tuned(options: argparse.Namespace, task: str, optimizer: str) -> float:
    """Return the best LR of the reference batch."""
    known = {row["lr"] for row in select(read(options.csv), task, optimizer, TUNE)}
    candidates = CANDIDATES[optimizer]
    rates = sorted(known if len(known) >= len(candidates) else candidates)
    while True:
        run_all(options, [Job(task, optimizer, TUNE, REFERENCE, TUNING_SEED, lr) for lr in rates])
        rows = select(read(options.csv), task, optimizer, TUNE)
        scores = {
            lr: max((r["score"] for r in last_rows(rows) if r["lr"] == lr), default=0.0) for lr in rates
        }
        best = max(scores, key=lambda lr: scores[lr])
        if rates[0] < best < rates[-1] or len(rates) > 8:
            return best
        rates = sorted([*rates, best / 2 if best == rates[0] else best * 2])


def run_all(options: argparse.Namespace, jobs: list[Job]) -> None:
    lock = threading.Lock()
    known = {label_of(row) for row in read(options.csv)}
    with ThreadPoolExecutor(options.parallel) as pool:
        list(pool.map(lambda job: run(options, job, lock), [job for job in jobs if job.label not in known]))


def run(options: argparse.Namespace, job: Job, lock: threading.Lock) -> None:
    """Train one run in one process, its output in FOLDER.log, and append its rows to the CSV."""
    folder = options.output / job.label
    done = folder.with_suffix(folder.suffix + ".done")  # CPU seconds
    if not done.exists():
        shutil.rmtree(folder, ignore_errors=True)
        folder.parent.mkdir(parents=True, exist_ok=True)
        file = Path(f"{folder}.json")
        file.write_text(json.dumps(config_of(options, job, folder), indent=2))
        command = [sys.executable, "-m", "giantdet.cli", "train", "--config", str(file)]
        print(f"{time.strftime('%H:%M:%S')} {job.label}", file=sys.stderr, flush=True)
        with Path(f"{folder}.log").open("w") as log:
            process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, env=environment())
            _, status, usage = os.wait4(process.pid, 0)
        code = os.waitstatus_to_exitcode(status)
        if code not in (0, EXIT_DIVERGED):
            raise RuntimeError(f"{job.label} failed with exit code {code}; see {folder}.log")
        for heavy in ("checkpoints", "export"):
            shutil.rmtree(folder / heavy, ignore_errors=True)
        done.write_text(f"{usage.ru_utime + usage.ru_stime:.0f}")
    with lock:
        append(options.csv, rows_of(job, folder, float(done.read_text()), options.images))


def environment() -> dict[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(REPO), "DS_ACCELERATOR": "cpu"}


def config_of(options: argparse.Namespace, job: Job, folder: Path) -> dict[str, Any]:
    """Return the JSON of a run."""
    arm, task = ARMS["reference" if job.arm == TUNE else job.arm], TASKS[job.task]
    data = options.output.resolve() / "data"
    steps = options.images // job.batch
    every = max(1, steps // POINTS)
    warmup = max(1, round(arm.warmup * steps))
    # Factors follow over a tenth of the run; the paper's momentum of 0.97 would need thousands of steps.
    agvm = {
        "enabled": job.batch > MICRO,  # the reference batch is a single micro-batch, which has no variance
        "estimator": "all_splits",
        "interval": max(1, steps // 100),
        "momentum": 0.9,
        "start_step": warmup,
        **arm.agvm,
    }
    return {
        "train_batch_size": job.batch,
        "train_micro_batch_size_per_gpu": MICRO,
        "gradient_accumulation_steps": "auto",
        "optimizer": {
            "type": job.optimizer,
            "params": {"lr": job.lr * arm.lr_factor, **OPTIMIZERS[job.optimizer]},
        },
        "scheduler": {
            "type": "WarmupCosineDecayLR",
            "params": {"warmup_num_steps": warmup, "warmup_min_ratio": 1e-3},
        },
        "gradient_clipping": 5.0,
        "zero_optimization": {"stage": 0},
        "giantdet": {
            "model": task.model,
            "norm": {"type": "local"},
            "lr_scaling": {"reference_batch": REFERENCE, **arm.scaling},
            "agvm": agvm,
            "data": {
                "train": split_of(job.task, data, "train"),
                "val": split_of(job.task, data, "val"),
                "size": [SIZE, task.width],
                "short_side": SIZE,
                "max_objects": task.max_objects,
                "workers": 0,
            },
            "train": {
                "steps": steps,
                "seed": job.seed,
                "output": str(folder.resolve()),
                "log_every": every,
                "eval_every": every,
                "keep_best": False,
                "resume": False,
                "report": False,
            },
            "eval": {"batch_size": 8},
        },
    }


def split_of(task: str, data: Path, split: str) -> dict[str, Any]:
    if task == "cells":
        return {"annotations": str(data / f"cells/{split}.json"), "images": str(data / "cells/images")}
    if task == "detection":
        return {"annotations": str(data / f"{split}.json"), "images": str(data / split)}
    labels, classes = data / f"semantic_{split}", data / "semantic_classes.json"
    return {
        "format": "semantic_png",
        "images": str(data / split),
        "labels": str(labels),
        "classes": str(classes),
    }


# Rows


def rows_of(job: Job, folder: Path, cpu_seconds: float, images: int) -> list[Row]:
    """Return the rows of a run, one an evaluation; a run that diverged ends with a row without a score."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    logged = {line["step"]: line for line in lines if "loss" in line}
    task, name = SCORES[job.task]
    head = {**job._asdict(), "cpu_seconds": cpu_seconds}
    found: list[Row] = []
    for line in (line for line in lines if "scores" in line):
        step = line["step"]
        row = head | {"images": step * job.batch, "score": round(line["scores"][task][name], 5)}
        for module in MODULES:
            for column, key in (("factor", "factor"), ("noise_scale", "mean_noise_scale")):
                value = logged.get(step, {}).get(f"agvm/{module}/{key}")
                row |= {} if value is None else {f"{module}_{column}": round(value, 4)}
        found.append(row)
    if not found or found[-1]["images"] < images // job.batch * job.batch:
        found.append(head | {"images": images, "score": math.nan})
    return found


if __name__ == "__main__":
    main()
