"""Measure each part of MegDet's challenge system alone against the same detector without it: AP and time.

python studies/challenge.py DATA         # trains the parts that studies/challenge.csv lacks; prints the table
python studies/challenge.py DATA --read  # prints the table only

DATA holds dsb2018_nuclei/ (annotations/instances_{train,val}.json, images/) and weights/, see WEIGHTS. Every
part is trained with the same seeds, images, order and number of steps as its base, on one thread. Runs go
seed by seed and are not repeated, so that an interrupted study has complete comparisons. Times are CPU
seconds of the process, which depend less than elapsed time on what else the machine does.
"""

from __future__ import annotations

import argparse
import csv
import json
import math
import multiprocessing
import shutil
import statistics
import sys
import time
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from giantdet.cli import main as giantdet
from giantdet.config.load import load_run
from giantdet.engine.train import train

REPO = Path(__file__).resolve().parents[1]
SET = "dsb2018_nuclei"
WEIGHTS = "tf_efficientnet_lite0/tf_efficientnet_lite0_fp16.safetensors"
SETTINGS: dict[str, Any] = {
    "train_batch_size": 4,
    "train_micro_batch_size_per_gpu": 4,
    "zero_optimization.stage": 0,
    "gradient_clipping": 5.0,
    "scheduler.params.warmup_num_steps": 20,
    "model.backbone.name": "tf_efficientnet_lite0",
    "model.backbone.frozen_stages": 2,
    "model.rpn.batch_per_image": 64,
    "model.box_head.width": 128,
    "model.box_head.batch_per_image": 64,
    "model.box_head.detections": 100,
    "norm.type": "frozen",
    "data.size": [192, 192],
    "data.short_side": 192,
    "data.max_objects": 100,
    "data.mask_frame": 32,
    "data.workers": 0,
    "train.steps": 100,
    "train.resume": False,
}
OHEM = {"model.box_head.sampling": {"type": "ohem"}}
OHEM_IMAGE = {"model.box_head.sampling": {"type": "ohem", "over": "image"}}
LARGE_KERNEL = {"model.fpn.large_kernel": {"width": 64}}
CONTEXT = {"model.fpn.context": {}}
SEMANTIC = {"model.semantic_branch": {"enabled": True, "source": "masks", "width": 64}}
EMBED = {"model.semantic_branch": {"enabled": True, "source": "masks", "width": 64, "embed": True}}
TOGETHER = OHEM | LARGE_KERNEL | CONTEXT | EMBED
SIDES = ["160", "192", "224"]
TTA = ["--tta", "--tta-sides", *SIDES]
NUMBERS = ("box_AP", "box_AP50", "mask_AP", "mask_AP50")
COLUMNS = ("part", "seed", *NUMBERS, "seconds_per_step", "seconds_per_image")
BASE = "base"
ALL_SEEDS = "all"  # an ensemble has the models of all seeds


class Part(NamedTuple):
    """One row of the table. A part without `settings` is only evaluated, with the models of `BASE`."""

    name: str
    settings: dict[str, Any] | None = None
    evaluation: tuple[str, ...] = ()


PARTS: dict[str, Part] = {
    BASE: Part("base", {}),
    "ohem": Part("OHEM over the batch", OHEM),
    "large_kernel": Part("large kernel on C5", LARGE_KERNEL),
    "context": Part("context on C5", CONTEXT),
    "semantic": Part("semantic branch", SEMANTIC),
    "dilated": Part("dilated last stage", {"model.backbone.output_stride": 16}),
    "deformable": Part("deformable convolution in C5", {"model.backbone.deformable_stages": [5]}),
    "tta_nms": Part("6 views, NMS", None, tuple(TTA)),
    "tta_wbf": Part("6 views, WBF", None, (*TTA, "--tta-merge", "wbf")),
    "ohem_image": Part("OHEM per image", OHEM_IMAGE),
    "embed": Part("semantic branch, embedded", EMBED),
    "together": Part("OHEM, large kernel, context, embedded branch", TOGETHER),
}
ENSEMBLES = {
    "ensemble_nms": Part("ensemble of the seeds, NMS", None, ("--fuse", "nms")),
    "ensemble_wbf": Part("ensemble of the seeds, WBF", None, ("--fuse", "wbf")),
}
Row = dict[str, Any]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("data", type=Path)
    parser.add_argument("--output", type=Path, default=Path("runs/challenge"))
    parser.add_argument("--csv", type=Path, default=REPO / "studies/challenge.csv")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--read", action="store_true", help="print the tables; no training")
    options = parser.parse_args()
    if not options.read:
        for seed in options.seeds:
            for name in options.parts:
                measure(options, name, PARTS[name], str(seed))
        if BASE in options.parts:
            for name, part in ENSEMBLES.items():
                measure(options, name, part, ALL_SEEDS)
    print(table(rows(options.csv)))


def measure(options: argparse.Namespace, name: str, part: Part, seed: str) -> None:
    """Add the row of a run to the CSV, unless it is there already. The run gets its own process."""
    if any((row["part"], row["seed"]) == (name, seed) for row in rows(options.csv)):
        return
    print(f"{time.strftime('%H:%M:%S')} {name}, seed {seed}", file=sys.stderr, flush=True)
    context = multiprocessing.get_context("fork")  # torch and DeepSpeed are imported once
    parent, child = context.Pipe(duplex=False)
    process = context.Process(target=run, args=(options, name, part, seed, child))
    process.start()
    child.close()
    try:
        row = parent.recv()
    except EOFError:
        raise SystemExit(f"{name}, seed {seed} failed; see {folder_of(options, name, seed)}.log") from None
    process.join()
    new = not options.csv.exists()
    with options.csv.open("a", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
        if new:
            writer.writeheader()
        writer.writerow(row)


def run(options: argparse.Namespace, name: str, part: Part, seed: str, answer: Any) -> None:
    """Train or evaluate in this process, its output in FOLDER.log, and send the row."""
    folder = folder_of(options, name, seed)
    folder.mkdir(parents=True, exist_ok=True)
    with folder.with_suffix(".log").open("w") as log:
        sys.stdout = sys.stderr = log
        row = (
            trained(options, part, seed, folder)
            if part.settings is not None
            else evaluated(options, part, seed, folder)
        )
    answer.send({"part": name, "seed": seed} | {k: round(v, 5) for k, v in row.items()})


def folder_of(options: argparse.Namespace, name: str, seed: str) -> Path:
    return Path(options.output / f"{name}_seed{seed}")


def trained(options: argparse.Namespace, part: Part, seed: str, folder: Path) -> Row:
    """Train a part with the package's own loop and return its scores and times."""
    assert part.settings is not None
    settings = SETTINGS | part.settings | val(options)
    settings |= {
        "data.train.annotations": str(annotations(options, "train")),
        "data.train.images": str(options.data / SET / "images"),
        "model.backbone.init_weights": str(options.data / "weights" / WEIGHTS),
        "train.seed": int(seed),
        "train.output": str(folder),
    }
    ends: list[float] = []
    train(
        load_run(REPO / "ds_configs/demo.json", [f"{k}={json.dumps(v)}" for k, v in settings.items()]),
        after_step=lambda: ends.append(time.process_time()),
    )
    evaluation = time.process_time() - ends[-1]
    shutil.rmtree(folder / "checkpoints")
    steps = [after - before for before, after in pairwise(ends)]
    return scores(options, folder / "results.json", evaluation) | {
        "seconds_per_step": statistics.median(steps)
    }


def evaluated(options: argparse.Namespace, part: Part, seed: str, folder: Path) -> Row:
    """Evaluate exported models of the base as `giantdet eval` does and return the scores and the time."""
    seeds = [str(s) for s in options.seeds] if seed == ALL_SEEDS else [seed]
    exports = [str(folder_of(options, BASE, s) / "export") for s in seeds]
    results = folder / "results.json"
    where = [
        "--annotations",
        str(annotations(options, "val")),
        "--images",
        str(options.data / SET / "images"),
    ]
    started = time.process_time()
    code = giantdet(["eval", *exports, *where, "--workers", "0", "--results", str(results), *part.evaluation])
    if code:
        raise SystemExit(code)
    return scores(options, results, time.process_time() - started)


def annotations(options: argparse.Namespace, split: str) -> Path:
    return Path(options.data / SET / f"annotations/instances_{split}.json")


def val(options: argparse.Namespace) -> dict[str, str]:
    images = options.data / SET / "images"
    return {"data.val.annotations": str(annotations(options, "val")), "data.val.images": str(images)}


def scores(options: argparse.Namespace, results: Path, seconds: float) -> Row:
    """Return pycocotools' AP and AP50 of a results file, and the seconds per image."""
    truth = COCO(annotations(options, "val"))
    row: Row = {"seconds_per_image": seconds / len(truth.imgs)}
    for task, kind in (("box", "bbox"), ("mask", "segm")):
        found = COCOeval(truth, truth.loadRes(str(results)), kind)
        found.evaluate()
        found.accumulate()
        found.summarize()
        row |= {f"{task}_AP": found.stats[0], f"{task}_AP50": found.stats[1]}
    return row


def rows(path: Path) -> list[Row]:
    """Return the rows of the CSV, numbers as floats; no rows if there is no file."""
    if not path.exists():
        return []
    with path.open(newline="") as file:
        lines = list(csv.DictReader(file))
    texts = ("part", "seed")
    return [{k: v if k in texts else float(v) for k, v in line.items() if v} for line in lines]


def table(found: list[Row]) -> str:
    """Return a Markdown table: means over the seeds, and paired differences to the base with their errors."""
    lines = [
        "| part | seeds | box AP | difference | AP50 | mask AP | difference | AP50 | step | evaluation |",
        "|---" * 10 + "|",
    ]
    by_part = {name: {row["seed"]: row for row in found if row["part"] == name} for name in PARTS | ENSEMBLES}
    for name, part in (PARTS | ENSEMBLES).items():
        own, base = by_part[name], by_part[BASE]
        if not own:
            continue
        ensemble = ALL_SEEDS in own
        # An ensemble is one evaluation: it is compared with the mean of its members.
        pairs = [(own[s], base[s]) for s in own if s in base] or [(own[ALL_SEEDS], mean_row(base))]
        cells = [part.name, "1 ensemble" if ensemble else str(len(own))]
        for task in ("box", "mask"):
            key = f"{task}_AP"
            differences = [mine[key] - other[key] for mine, other in pairs]
            cells += [
                f"{statistics.fmean(row[key] for row in own.values()):.3f}",
                "" if name == BASE else with_error(differences),
                f"{statistics.fmean(row[f'{key}50'] for row in own.values()):.3f}",
            ]
        for key in ("seconds_per_step", "seconds_per_image"):
            cells.append(relative(pairs, key, name == BASE))
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def mean_row(seeds: dict[str, Row]) -> Row:
    keys = [key for key in COLUMNS if key not in ("part", "seed")]
    return {key: statistics.fmean(row[key] for row in seeds.values()) for key in keys}


def with_error(differences: list[float]) -> str:
    """Return the mean and its standard error; without an error for one value."""
    mean = f"{statistics.fmean(differences):+.3f}"
    if len(differences) < 2:
        return mean
    return f"{mean} ± {statistics.stdev(differences) / math.sqrt(len(differences)):.3f}"


def relative(pairs: list[tuple[Row, Row]], key: str, is_base: bool) -> str:
    """Return a time of the base in seconds, or of a part relative to it."""
    if key not in pairs[0][0]:
        return ""
    own = statistics.fmean(mine[key] for mine, _ in pairs)
    return f"{own:.2f} s" if is_base else f"x {own / statistics.fmean(other[key] for _, other in pairs):.2f}"


if __name__ == "__main__":
    main()
