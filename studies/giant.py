"""Test a large model end to end on this machine: train, stop, resume, export, predict, report the speed.

    python studies/giant.py ds_configs/mask_rcnn_vitdet_dinov2g_64_adamw.json \\
        --annotations instances_train.json --images train/ --output runs/giant [key=value ...]

Every command is one that users would run. Starts from random weights (no downloads) with a short warmup, and
writes report.json: losses, images per second, FLOPs per second as a share of the rate of matrix products of
the same precision on this machine, peak memory. FLOPs are those of forward and backward, not recomputed.
On a CPU reduce the width: model.backbone.timm_args='{"embed_dim": 64, "num_heads": 4}'.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from statistics import fmean
from typing import Any

import torch

from giantdet.config.classes import Classes
from giantdet.config.load import load_run
from giantdet.config.resolve import resolve
from giantdet.engine.metrics import read_metrics
from giantdet.engine.zero import weight_dtype
from giantdet.tools.count import count
from giantdet.tools.plan import with_recompute

REPO = Path(__file__).resolve().parents[1]
MORE = 4  # steps of the resumed run


def main() -> None:
    options = arguments()
    has_gpu = torch.cuda.is_available()
    ranks = options.ranks or max(1, torch.cuda.device_count())
    output: Path = options.output
    settings = [
        "train_batch_size=auto",
        f"train_micro_batch_size_per_gpu={options.micro_batch}",
        "gradient_accumulation_steps=1",
        "lr_scaling.rule=none",
        f"optimizer.params.lr={options.lr}",
        'scheduler={"type": "WarmupLR", "params": {"warmup_num_steps": 5, "warmup_type": "linear"}}',
        "model.backbone.pretrained=false",
        f"data.train.annotations={options.annotations}",
        f"data.train.images={options.images}",
        "data.val=null",
        "train.epochs=null",
        f"train.output={output}",
        "train.log_every=1",
        *options.overrides,
    ]
    run = load_run(options.config, [*settings, f"train.steps={options.steps}"])
    run = resolve(run, ranks, 1000, Classes.numbered(80))
    dtype = weight_dtype(run)
    rate = matrix_rate(dtype, torch.device("cuda" if has_gpu else "cpu"))
    train(
        options, ranks, [*settings, f"train.steps={options.steps}"], ["--profile"] if options.profile else []
    )
    first = read_metrics(output / "metrics.jsonl")
    resumed = train(options, ranks, [*settings, f"train.steps={options.steps + MORE}"], [])
    assert f"resuming after step {options.steps} " in resumed, "the second start did not resume"
    lines = read_metrics(output / "metrics.jsonl")
    assert lines[: len(first)] == first and len(lines) == len(first) + MORE
    predicted = predict(options, output)

    one = count(with_recompute(run, 0), 1)
    losses = [line["loss"] for line in lines]
    late = [line["images_per_second"] for line in first[len(first) // 2 :]]
    reached = fmean(late) / ranks * (one.forward + one.backward)
    shards = sorted(path.name for path in (output / "export").glob("*.safetensors"))
    report = {
        "recipe": Path(options.config).stem,
        "parameters": sum(t["numel"] for t in exported_tensors(output / "export")),
        "ranks": ranks,
        "device": torch.cuda.get_device_name() if has_gpu else "CPU",
        "precision": str(dtype).removeprefix("torch."),
        "zero_stage": run.stage,
        "losses": [round(loss, 4) for loss in losses],
        "loss_first_5": fmean(losses[:5]),
        "loss_last_5": fmean(losses[-5:]),
        "images_per_second": fmean(late),
        "images_per_second_range": [min(late), max(late)],
        "tflop_of_an_image": (one.forward + one.backward) / 1e12,
        "tflops": reached / 1e12,
        "matrix_tflops": rate / 1e12,
        "share_of_matrix_rate": reached / rate,
        "memory_gib": max(line["memory_gib"] for line in lines),
        "shards": shards,
        "predicted_images": predicted,
    }
    (output / "report.json").write_text(json.dumps(report, indent=2) + "\n")
    print(json.dumps(report, indent=2))


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("config", type=Path)
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    parser.add_argument("--annotations", type=Path, required=True, help="COCO instances JSON")
    parser.add_argument("--images", type=Path, required=True, help="folder of its images")
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--micro-batch", type=int, default=1, help="images per rank")
    parser.add_argument("--lr", type=float, default=1e-4)
    parser.add_argument("--ranks", type=int, help="default: all GPUs, or one CPU process")
    parser.add_argument("--port", type=int, default=29_700, help="port of the launcher")
    parser.add_argument("--profile", action="store_true", help="record a few steps of the first run")
    return parser.parse_intermixed_args()


def matrix_rate(dtype: torch.dtype, device: torch.device) -> float:
    """Return the FLOPs per second of one large matrix product, the best of 8 measurements."""
    side = 8192 if device.type == "cuda" else 1024
    a = torch.randn(side, side, device=device, dtype=dtype)
    best = 0.0
    for _ in range(8):
        started = time.perf_counter()
        for _ in range(8):
            a @ a
        if device.type == "cuda":
            torch.cuda.synchronize()
        best = max(best, 8 * 2 * side**3 / (time.perf_counter() - started))
    return best


def train(options: argparse.Namespace, ranks: int, settings: list[str], more: list[str]) -> str:
    launcher = ["-m", "deepspeed.launcher.runner", "--num_accelerators", str(ranks)]
    script = [str(REPO / "scripts/train.py"), "--deepspeed_config", str(options.config)]
    return command([*launcher, "--master_port", str(options.port), *script, *more, *settings])


def predict(options: argparse.Namespace, output: Path) -> int:
    """Predict the first images of the data set in a separate process; return the number of pictures drawn."""
    images = json.loads(options.annotations.read_text())["images"][:2]
    files = [str(options.images / image["file_name"]) for image in images]
    folder = output / "predictions"
    shown = ["--output", str(folder), "--threshold", "0.05"]
    command(["-m", "giantdet.cli", "predict", str(output / "export"), *files, *shown])
    return len(list(folder.glob("*.png")) + list(folder.glob("*.jpg")))


def command(words: list[str]) -> str:
    """Run python with these arguments and return what it printed."""
    environment = os.environ | {"PYTHONPATH": f"{REPO}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"}
    ended = subprocess.run(
        [sys.executable, *words], env=environment, text=True, capture_output=True, check=False
    )
    if ended.returncode:
        sys.exit(f"{' '.join(words)}\n{ended.stdout[-4000:]}\n{ended.stderr[-4000:]}")
    return ended.stdout


def exported_tensors(folder: Path) -> list[dict[str, Any]]:
    from safetensors import safe_open

    found = []
    for path in folder.glob("*.safetensors"):
        with safe_open(path, "pt") as file:
            for name in file.keys():  # noqa: SIM118
                shape = file.get_slice(name).get_shape()
                found.append({"name": name, "numel": int(torch.Size(shape).numel())})
    return found


if __name__ == "__main__":
    main()
