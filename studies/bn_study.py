"""Repeat MegDet's study of the BN size at small scale: AP over the number of images normalised together.

python studies/bn_study.py DATA [key=value ...] --output runs/bn_study --plot docs/bn-study.png

DATA is a COCO-format folder (annotations/instances_{train,val}.json, images/). For every seed and BN size
there is one run of 8 ranks with 2 images each, as per GPU in the paper: the batch is 16, and only the number
of ranks that share their batch norms changes. Finished runs are not repeated. Prints a Markdown table.

With --semantic it trains Semantic FPN on panoptic annotations (annotations/panoptic_{train,val}.json), with
batch norm in pyramid and head, and compares mIoU and pixel accuracy.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

REPO = Path(__file__).resolve().parents[1]
RANKS, IMAGES = 8, 2
SETTINGS = {
    "train_batch_size": RANKS * IMAGES,
    "train_micro_batch_size_per_gpu": IMAGES,
    "model.backbone.name": "resnet10t",
    "model.fpn.norm": "batch",
    "model.box_head.width": 128,
    "model.box_head.batch_per_image": 64,
    "model.mask_head.enabled": False,
    "data.size": [128, 160],
    "data.short_side": 120,
    "data.workers": 0,
    "train.save_every": 0,
    "train.log_every": 5,
    "norm.type": "cgbn",
}
_NOT_SEMANTIC = [key for key in SETTINGS if key.startswith("model.")]
SEMANTIC_SETTINGS = {key: value for key, value in SETTINGS.items() if key not in _NOT_SEMANTIC} | {
    "model": {
        "type": "semantic_fpn",
        "backbone": {"name": "resnet10t"},
        "fpn": {"channels": 64, "norm": "batch"},
        "semantic_head": {"width": 64, "norm": "batch"},
    },
}
NUMBERS = {"box": ("AP", "AP50"), "semantic": ("mIoU", "pACC")}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("data", type=Path)
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="overrides of the run's JSON")
    parser.add_argument("--output", type=Path, default=Path("runs/bn_study"))
    parser.add_argument("--sizes", type=int, nargs="+", default=[2, 4, 8, 16])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--steps", type=int, default=120)
    parser.add_argument("--semantic", action="store_true", help="Semantic FPN instead of Faster R-CNN")
    parser.add_argument("--plot", type=Path, help="draw the figure here")
    options = parser.parse_args()
    for seed in options.seeds:
        for size in options.sizes:
            folder = options.output / f"bn{size}_seed{seed}"
            if not (folder / "scores.json").exists():
                run(options, size, seed, folder)
    results = {
        size: [read(options.output / f"bn{size}_seed{s}") for s in options.seeds] for size in options.sizes
    }
    print(table(results))
    if "agvm" in " ".join(options.overrides):
        print(variance_table(options))
    if options.plot is not None:
        plot(results, options.plot)


def run(options: argparse.Namespace, size: int, seed: int, folder: Path) -> None:
    """Train one detector under the deepspeed launcher; log to FOLDER.log."""
    data = options.data.resolve()
    settings = (SEMANTIC_SETTINGS if options.semantic else SETTINGS) | {
        "norm.bn_size": size,
        "train.seed": seed,
        "train.steps": options.steps,
        "train.output": str(folder),
    }
    for split in ("train", "val"):
        kind = "panoptic" if options.semantic else "instances"
        settings[f"data.{split}"] = {
            "format": "coco_panoptic" if options.semantic else "coco",
            "annotations": str(data / f"annotations/{kind}_{split}.json"),
            "images": str(data / "images"),
        }
    command = [sys.executable, "-m", "deepspeed.launcher.runner", "--num_accelerators", str(RANKS)]
    command += [str(REPO / "scripts/train.py"), "--deepspeed_config", str(REPO / "ds_configs/demo.json")]
    folder.parent.mkdir(parents=True, exist_ok=True)
    print(f"BN size {size}, seed {seed}", file=sys.stderr, flush=True)
    with folder.with_suffix(".log").open("w") as log:
        given = {override.partition("=")[0] for override in options.overrides}
        ours = [f"{key}={json.dumps(value)}" for key, value in settings.items() if key not in given]
        command += ours + options.overrides
        subprocess.run(command, stdout=log, stderr=subprocess.STDOUT, check=True)


def read(folder: Path) -> dict[str, Any]:
    """Return both numbers, losses by step, and the mean loss of the last fifth of the steps."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    losses = [(line["step"], line["loss"]) for line in lines if "loss" in line]
    late = [loss for step, loss in losses if step > 0.8 * losses[-1][0]]
    scores = json.loads((folder / "scores.json").read_text())
    task = next(task for task in NUMBERS if task in scores)
    first, second = (scores[task][name] for name in NUMBERS[task])
    return {"first": first, "second": second, "losses": losses, "late": statistics.fmean(late), "task": task}


def table(results: dict[int, list[dict[str, Any]]]) -> str:
    names = NUMBERS[next(iter(results.values()))[0]["task"]]
    lines = [f"| BN size | {' | '.join(names)} | loss at the end | {names[0]} of each seed |"]
    lines.append("|---|---|---|---|---|")
    for size, runs in results.items():
        means = " | ".join(spread([r[key] for r in runs]) for key in ("first", "second", "late"))
        each = ", ".join(format(r["first"], ".3f") for r in runs)
        lines.append(f"| {size} | {means} | {each} |")
    return "\n".join(lines)


def variance_table(options: argparse.Namespace) -> str:
    """Return a table of each module's gradient variance, mean of measurements and seeds (AGVM runs)."""
    rows: dict[int, dict[str, float]] = {}
    for size in options.sizes:
        folders = [options.output / f"bn{size}_seed{seed}" for seed in options.seeds]
        lines = [json.loads(line) for f in folders for line in (f / "metrics.jsonl").read_text().splitlines()]
        names = sorted({key for line in lines for key in line if key.endswith("/variance")})
        rows[size] = {name: statistics.fmean(line[name] for line in lines if name in line) for name in names}
    modules = [name.split("/")[1] for name in next(iter(rows.values()))]
    table = [f"| BN size | {' | '.join(modules)} |", "|---" * (len(modules) + 1) + "|"]
    table += [f"| {size} | {' | '.join(f'{v:.3f}' for v in row.values())} |" for size, row in rows.items()]
    return "\n".join(table)


def spread(values: list[float]) -> str:
    deviation = f" ± {statistics.stdev(values):.3f}" if len(values) > 1 else ""
    return f"{statistics.fmean(values):.3f}{deviation}"


def plot(results: dict[int, list[dict[str, Any]]], path: Path) -> None:
    """Draw AP over the BN size (left), each seed and the mean, and the mean loss over the steps (right)."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (left, right) = pyplot.subplots(1, 2, figsize=(10, 4), layout="constrained")
    sizes = list(results)
    for size, runs in results.items():
        left.plot([size] * len(runs), [r["first"] for r in runs], "o", color="tab:blue", alpha=0.5)
        steps = [step for step, _ in runs[0]["losses"]]
        mean = [statistics.fmean(r["losses"][i][1] for r in runs) for i in range(len(steps))]
        right.plot(steps, mean, label=f"BN size {size}")
    means = [statistics.fmean(r["first"] for r in runs) for runs in results.values()]
    left.plot(sizes, means, color="tab:blue")
    task = results[sizes[0]][0]["task"]
    left.set_xscale("log", base=2)
    left.set_xticks(sizes, [str(size) for size in sizes])
    left.set(xlabel="images normalised together", ylabel=f"{task} {NUMBERS[task][0]}, one dot per seed")
    right.set(xlabel="step", ylabel="training loss, mean of the seeds")
    right.legend()
    figure.savefig(path, dpi=110)


if __name__ == "__main__":
    main()
