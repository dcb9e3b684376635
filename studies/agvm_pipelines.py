"""Measure each module's gradient variance in the AGVM paper's pipelines, and draw them side by side.

python studies/agvm_pipelines.py FOLDER [--steps 60] [--plot docs/agvm-pipelines.png]

Trains each pipeline on the generated demo set in FOLDER (created if missing) for some steps of a batch of 32
images, accumulated by one process, and measures the variances of the modules, 1 - cos of the mean gradients
of both halves of the batch, as SGD sees them. Factors are fixed at 1, so that training is the same as without
AGVM. Finished runs are not repeated. Prints a table of the means over the last half of the steps.
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
BACKBONE = {"name": "resnet10t"}
TWO_STAGE = {
    "backbone": BACKBONE,
    "fpn": {"channels": 64},
    "rpn": {"anchor_sizes": [16, 32, 48, 64, 96], "post_nms_train": 200, "post_nms_test": 200},
    "box_head": {"width": 128, "batch_per_image": 64},
    "mask_head": {"width": 64, "convs": 2, "slots": 16},
}
SEMANTIC_HEAD = {"width": 64, "norm": "group"}
PIPELINES: dict[str, dict[str, Any]] = {
    "RetinaNet": {
        "type": "retinanet",
        "backbone": BACKBONE,
        "fpn": {"channels": 64},
        "head": {"convs": 2, "anchor_sizes": [16, 24, 32, 48, 64]},
    },
    "Faster R-CNN": {**TWO_STAGE, "mask_head": {"enabled": False}},
    "Mask R-CNN": TWO_STAGE,
    "Cascade Mask R-CNN": {**TWO_STAGE, "type": "cascade_mask_rcnn"},
    "Semantic FPN": {
        "type": "semantic_fpn",
        "backbone": BACKBONE,
        "fpn": {"channels": 64},
        "semantic_head": SEMANTIC_HEAD,
    },
    "Panoptic FPN": {**TWO_STAGE, "type": "panoptic_fpn", "semantic_head": SEMANTIC_HEAD},
}
BATCH, MICRO = 32, 8
SETTINGS: dict[str, Any] = {
    "train_batch_size": BATCH,
    "train_micro_batch_size_per_gpu": MICRO,
    "gradient_accumulation_steps": "auto",
    "optimizer": {"type": "SGD", "params": {"lr": 0.02, "momentum": 0.9, "weight_decay": 1e-4}},
    "scheduler": {"type": "WarmupMultiStepLR", "params": {"milestones": [], "warmup_num_steps": 10}},
    "gradient_clipping": 5.0,
    "zero_optimization": {"stage": 1},
}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--plot", type=Path, help="draw the figure here")
    options = parser.parse_args()
    data = options.folder / "data"
    if not (data / "panoptic_val.json").exists():
        command = [sys.executable, "-m", "giantdet.cli", "make-demo-data", str(data)]
        subprocess.run([*command, "--train-images", "1000", "--val-images", "8", "--size", "96"], check=True)
    measured: dict[str, dict[str, list[tuple[int, float]]]] = {}
    for name, model in PIPELINES.items():
        output = options.folder / name.lower().replace(" ", "_")
        if not (output / "export/config.json").exists():
            run(name, model, data, output, options.steps)
        measured[name] = read(output)
    print(table(measured, options.steps))
    if options.plot is not None:
        plot(measured, options.plot)


def run(name: str, model: dict[str, Any], data: Path, output: Path, steps: int) -> None:
    """Train one pipeline in one process under the deepspeed launcher; log to OUTPUT.log."""
    source = {
        "format": "coco_panoptic",
        "annotations": str(data / "panoptic_train.json"),
        "images": str(data / "train"),
    }
    agvm = {"enabled": True, "preconditioned": False, "interval": 2, "start_step": 0, "clamp": [1, 1]}
    giantdet = {
        "model": model,
        "norm": {"type": "local"},
        "agvm": agvm,
        "data": {"train": source, "size": [96, 96], "short_side": 96, "max_objects": 20, "workers": 1},
        "train": {"steps": steps, "output": str(output), "log_every": 2},
    }
    file = output.with_suffix(".json")
    file.write_text(json.dumps(SETTINGS | {"giantdet": giantdet}, indent=2))
    command = [sys.executable, "-m", "deepspeed.launcher.runner", "--num_accelerators", "1"]
    command += [str(REPO / "scripts/train.py"), "--deepspeed_config", str(file)]
    print(name, file=sys.stderr, flush=True)
    with output.with_suffix(".log").open("w") as log:
        subprocess.run(command, stdout=log, stderr=subprocess.STDOUT, check=True)


def read(output: Path) -> dict[str, list[tuple[int, float]]]:
    """Return (step, variance) of each module's measurements."""
    found: dict[str, list[tuple[int, float]]] = {}
    for line in map(json.loads, (output / "metrics.jsonl").read_text().splitlines()):
        for key, value in line.items():
            if key.endswith("/variance"):
                found.setdefault(key.split("/")[1], []).append((line["step"], value))
    return found


def table(measured: dict[str, dict[str, list[tuple[int, float]]]], steps: int) -> str:
    modules = list(dict.fromkeys(module for found in measured.values() for module in found))
    lines = [f"| pipeline | {' | '.join(modules)} |", "|---" * (len(modules) + 1) + "|"]
    for name, found in measured.items():
        cells = [
            f"{statistics.fmean(value for step, value in found[module] if step > steps / 2):.3f}"
            if module in found
            else ""
            for module in modules
        ]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def plot(measured: dict[str, dict[str, list[tuple[int, float]]]], path: Path) -> None:
    """Draw the variances of each pipeline over the steps, as running means of five measurements."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot
    from matplotlib.lines import Line2D

    figure, axes = pyplot.subplots(2, 3, figsize=(12, 6), sharex=True, sharey=True, layout="constrained")
    modules = list(dict.fromkeys(module for found in measured.values() for module in found))
    for axis, (name, found) in zip(axes.flat, measured.items(), strict=False):
        for module, points in found.items():
            steps = [step for step, _ in points[4:]]
            means = [statistics.fmean(value for _, value in points[i : i + 5]) for i in range(len(steps))]
            axis.plot(steps, means, color=f"C{modules.index(module)}")
        axis.set_title(name)
    handles = [Line2D([], [], color=f"C{n}") for n in range(len(modules))]
    names = [module.replace("_", " ") for module in modules]
    figure.legend(handles, names, loc="outside upper center", ncols=len(names))
    figure.supxlabel("step")
    figure.supylabel("gradient variance")
    figure.savefig(path, dpi=100)


if __name__ == "__main__":
    main()
