"""Compare six ways to scale the learning rate with the batch, at small scale: AP over the batch size.

python studies/large_batch.py DATA --weights WEIGHTS --output runs/large_batch --plot docs/large-batch.png
python studies/large_batch.py DATA --weights WEIGHTS --output runs/large_batch --tune

DATA is a COCO-format folder (annotations/instances_{train,val}.json, images/), WEIGHTS a file with ImageNet
weights of tf_efficientnet_lite0. Every run sees the same number of images in the same order; one process
accumulates the batch. The learning rates of batch 32 are tuned (--tune), those of the other batches follow
from the arm's rule. Finished runs are not repeated. Prints Markdown tables.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import statistics
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

EXIT_DIVERGED = 3  # exit code of giantdet train
REPO = Path(__file__).resolve().parents[1]
BATCHES, REFERENCE = (4, 32, 64, 128), 32
OPTIMIZERS: dict[str, dict[str, Any]] = {
    "SGD": {"momentum": 0.9, "weight_decay": 1e-4},
    "AdamW": {"betas": [0.9, 0.999], "weight_decay": 0.05},
    "Lamb": {"betas": [0.9, 0.999], "weight_decay": 0.01},
}
# At the reference batch: the best of --tune.
LEARNING_RATES = {"SGD": 0.02, "AdamW": 1.6e-3, "Lamb": 4e-3}
CANDIDATES = {
    "SGD": (0.005, 0.01, 0.02, 0.04),
    "AdamW": (4e-4, 8e-4, 1.6e-3, 3.2e-3),
    "Lamb": (2e-3, 4e-3, 8e-3),
}
# Arm: its name in the table, optimizer, power of the batch in the LR, whether with AGVM.
ARMS: dict[str, tuple[str, str, float, bool]] = {
    "linear": ("SGD, linear scaling", "SGD", 1.0, False),
    "sqrt": ("SGD, sqrt scaling", "SGD", 0.5, False),
    "agvm_sgd": ("SGD, sqrt scaling, AGVM", "SGD", 0.5, True),
    "adamw": ("AdamW, sqrt scaling", "AdamW", 0.5, False),
    "agvm_adamw": ("AdamW, sqrt scaling, AGVM", "AdamW", 0.5, True),
    "lamb": ("LAMB, sqrt scaling", "Lamb", 0.5, False),
}
SETTINGS: dict[str, Any] = {
    "zero_optimization.stage": 0,
    "gradient_clipping": 5.0,
    "model.backbone.name": "tf_efficientnet_lite0",
    "model.backbone.frozen_stages": 2,
    "norm.type": "frozen",
    "model.rpn.batch_per_image": 64,
    "model.box_head.width": 128,
    "model.box_head.batch_per_image": 32,
    "model.mask_head.enabled": False,
    "data.size": [96, 128],
    "data.short_side": 96,
    "data.workers": 0,
    "train.save_every": 0,
    "train.resume": False,
}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("data", type=Path)
    parser.add_argument("--weights", type=Path, required=True)
    parser.add_argument("--output", type=Path, default=Path("runs/large_batch"))
    parser.add_argument("--arms", nargs="+", choices=ARMS, default=list(ARMS))
    parser.add_argument("--batches", type=int, nargs="+", default=list(BATCHES))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument(
        "--images", type=int, default=3840, help="images that a run sees, repetitions included"
    )
    parser.add_argument("--parallel", type=int, default=2, help="concurrent runs, one core each")
    parser.add_argument("--tune", action="store_true", help="try learning rates at the reference batch")
    parser.add_argument("--read", action="store_true", help="print the tables of existing runs; no training")
    parser.add_argument("--plot", type=Path, help="draw the figure here")
    options = parser.parse_args()
    if options.tune:
        tune(options)
        return
    jobs = [
        (arm, batch, seed)
        for seed in options.seeds
        for batch in options.batches
        for arm in options.arms
        if (arm, batch) != ("linear", REFERENCE)  # all rules agree there
    ]
    if not options.read:
        with ThreadPoolExecutor(options.parallel) as pool:
            list(pool.map(lambda job: train_arm(options, *job), jobs))
    results = {
        (arm, batch): [run for seed in options.seeds if (run := read(folder_of(options, arm, batch, seed)))]
        for arm in options.arms
        for batch in options.batches
    }
    print(table(results, options))
    print(factor_table(results, options))
    if options.plot is not None:
        plot(results, options)


def tune(options: argparse.Namespace) -> None:
    """Print AP over the learning rate at the reference batch, with seed 100, which the study does not use."""
    jobs = [(name, lr) for name, lrs in CANDIDATES.items() for lr in lrs]
    folders = {job: options.output / f"tune_{job[0]}_{job[1]:g}" for job in jobs}
    with ThreadPoolExecutor(options.parallel) as pool:
        list(pool.map(lambda job: train(options, folders[job], REFERENCE, 100, *job, False), jobs))
    print("| optimizer | LR | AP |\n|---|---|---|")
    for (name, lr), folder in folders.items():
        run = read(folder)
        score = format(run["AP"], ".3f") if run else "NaN"
        print(f"| {name} | {lr:g} | {score} |")


def folder_of(options: argparse.Namespace, arm: str, batch: int, seed: int) -> Path:
    arm = "sqrt" if (arm, batch) == ("linear", REFERENCE) else arm
    return Path(options.output / f"{arm}_batch{batch}_seed{seed}")


def train_arm(options: argparse.Namespace, arm: str, batch: int, seed: int) -> None:
    _, optimizer, power, agvm = ARMS[arm]
    lr = LEARNING_RATES[optimizer] * (batch / REFERENCE) ** power
    train(options, folder_of(options, arm, batch, seed), batch, seed, optimizer, lr, agvm)


def train(
    options: argparse.Namespace, folder: Path, batch: int, seed: int, optimizer: str, lr: float, agvm: bool
) -> None:
    """Train one run in one process; log to FOLDER.log."""
    if (folder / "scores.json").exists() or (folder / "diverged").exists():
        return
    steps = options.images // batch
    measured = max(1, steps // 40)  # 40 measurements, or log lines, at each batch size
    settings = SETTINGS | {
        "train_batch_size": batch,
        "train_micro_batch_size_per_gpu": min(16, batch // 2 if agvm else batch),  # AGVM halves micro-batches
        "optimizer": {"type": optimizer, "params": {"lr": lr, **OPTIMIZERS[optimizer]}},
        "scheduler.params.warmup_num_steps": steps // 5,
        "agvm.enabled": agvm,
        "agvm.interval": measured,
        "agvm.momentum": 0.9,
        "model.backbone.init_weights": str(options.weights.resolve()),
        "train.steps": steps,
        "train.log_every": measured,
        "train.seed": seed,
        "train.output": str(folder),
    }
    data = options.data.resolve()
    for split in ("train", "val"):
        settings[f"data.{split}.annotations"] = str(data / f"annotations/instances_{split}.json")
        settings[f"data.{split}.images"] = str(data / "images")
    command = [sys.executable, str(REPO / "scripts/train.py")]
    command += ["--deepspeed_config", str(REPO / "ds_configs/demo.json")]
    command += [f"{key}={json.dumps(value)}" for key, value in settings.items()]
    folder.parent.mkdir(parents=True, exist_ok=True)
    print(f"{folder.name}, LR {lr:.3g}", file=sys.stderr, flush=True)
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(REPO)}
    with (folder.parent / f"{folder.name}.log").open("w") as log:
        code = subprocess.run(command, stdout=log, stderr=subprocess.STDOUT, env=environment).returncode
    if code == EXIT_DIVERGED:
        (folder / "diverged").touch()
    elif code:
        raise RuntimeError(f"{folder.name} failed with exit code {code}; see {folder}.log")


def read(folder: Path) -> dict[str, Any] | None:
    """Return AP and AGVM's values by images seen, or None for a run that diverged or does not exist."""
    if not (folder / "scores.json").exists():
        return None
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    lines = [line for line in lines if "loss" in line]
    batch = json.loads((folder / "config.json").read_text())["train_batch_size"]
    keys = sorted({key for line in lines for key in line if key.startswith("agvm/")})
    return {
        "AP": json.loads((folder / "scores.json").read_text())["box"]["AP"],
        **{key: [(line["step"] * batch, line[key]) for line in lines if key in line] for key in keys},
    }


def table(results: dict[tuple[str, int], list[dict[str, Any]]], options: argparse.Namespace) -> str:
    """Return a table of AP: mean and standard deviation over the finite seeds, and how many diverged."""
    lines = [f"| | {' | '.join(f'batch {b}' for b in options.batches)} |"]
    lines.append("|---" * (len(options.batches) + 1) + "|")
    for arm in options.arms:
        cells = []
        for batch in options.batches:
            runs = results[arm, batch]
            scores = [run["AP"] for run in runs]
            mean = f"{statistics.fmean(scores):.3f}" if scores else ""
            spread = f" ± {statistics.stdev(scores):.3f}" if len(scores) > 1 else ""
            folders = [folder_of(options, arm, batch, seed) for seed in options.seeds]
            lost = sum((folder / "diverged").exists() for folder in folders)
            fewer = f"({len(scores)} seeds)" if len(scores) + lost < len(options.seeds) else ""
            cells.append(" ".join(filter(None, [mean + spread, f"{lost} x NaN" if lost else "", fewer])))
        lines.append(f"| {ARMS[arm][0]} | {' | '.join(cells)} |")
    return "\n".join(lines)


def factor_table(results: dict[tuple[str, int], list[dict[str, Any]]], options: argparse.Namespace) -> str:
    """Return a table of AGVM's factors at the end of a run, mean of the seeds."""
    lines: list[str] = []
    for arm in [arm for arm in options.arms if ARMS[arm][3]]:
        names = [key for key in results[arm, options.batches[0]][0] if key.endswith("/factor")]
        if not lines:
            lines = [
                f"| | batch | {' | '.join(n.split('/')[1] for n in names)} |",
                "|---" * (len(names) + 2) + "|",
            ]
        for batch in options.batches:
            if not results[arm, batch]:
                continue
            means = [statistics.fmean(run[name][-1][1] for run in results[arm, batch]) for name in names]
            lines.append(f"| {ARMS[arm][0]} | {batch} | {' | '.join(f'{m:.2f}' for m in means)} |")
    return "\n".join(lines)


def plot(results: dict[tuple[str, int], list[dict[str, Any]]], options: argparse.Namespace) -> None:
    """Draw AP over the batch, and each module's variance over the images seen for AGVM's arms and batches."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    arms = [arm for arm in options.arms if ARMS[arm][3]]
    figure = pyplot.figure(figsize=(12, 4 + 2.6 * len(arms)), layout="constrained")
    top, *rows = figure.subfigures(1 + len(arms), 1, height_ratios=[4, *[2.6] * len(arms)])
    axis = top.subplots()
    for i, arm in enumerate(options.arms):
        points = [[run["AP"] for run in results[arm, batch]] for batch in options.batches]
        for batch, scores in zip(options.batches, points, strict=True):
            axis.plot([batch] * len(scores), scores, ".", color=f"C{i}", alpha=0.5)
        means = [statistics.fmean(p) if p else math.nan for p in points]
        axis.plot(options.batches, means, color=f"C{i}", label=ARMS[arm][0])
    axis.set_xscale("log", base=2)
    axis.set_xticks(options.batches, [str(batch) for batch in options.batches])
    axis.set(xlabel="batch size", ylabel="box AP, one dot per seed")
    axis.legend(fontsize=8)
    for arm, row in zip(arms, rows, strict=True):
        axes = row.subplots(1, len(options.batches), sharey=True)
        for batch, axis in zip(options.batches, axes, strict=True):
            runs = results[arm, batch]
            for name in [key for key in (runs[0] if runs else {}) if key.endswith("/variance")]:
                columns = list(zip(*(run[name] for run in runs), strict=False))
                images = [column[0][0] for column in columns]
                means = [statistics.fmean(value for _, value in column) for column in columns]
                axis.plot(images, means, label=name.split("/")[1])
            axis.set_title(f"{ARMS[arm][0]}, batch {batch}", fontsize=8)
            axis.set_xlabel("images seen")
        axes[0].set_ylabel("variance, 1 - cos")
        axes[0].legend(fontsize=7)
    figure.savefig(options.plot, dpi=110)


if __name__ == "__main__":
    main()
