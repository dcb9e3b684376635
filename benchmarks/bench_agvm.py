"""Measure what AGVM adds to a training step under DeepSpeed; started as `bench.py --agvm`.

deepspeed --num_accelerators 2 benchmarks/bench.py --agvm --size 256 --threads 1

Steps with a measurement and steps without AGVM take turns on the same engine. Over an interval of 10 steps
AGVM costs a tenth of the difference.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from bench_scene import giantdet_batch, make_scene, model_config

from giantdet.architectures import build_model, total_loss
from giantdet.architectures.mask_rcnn import mask_rcnn_losses
from giantdet.config.conventions import CONVENTIONS
from giantdet.config.types import AgvmConfig
from giantdet.distributed import comm
from giantdet.optim.agvm import Agvm
from giantdet.optim.param_groups import parameter_groups
from giantdet.structures import Batch

INTERVAL = 10
FORMS: dict[str, tuple[str, dict[str, Any]]] = {
    "all_splits, SGD": ("SGD", {"estimator": "all_splits"}),
    "half_split, SGD": ("SGD", {"estimator": "half_split"}),
    "all_splits, AdamW": ("AdamW", {"estimator": "all_splits"}),
    "half_split, AdamW": ("AdamW", {"estimator": "half_split"}),
}


def start(args: argparse.Namespace, optimizer: str) -> Any:
    import deepspeed

    torch.manual_seed(0)
    model = build_model(model_config(args), (args.size, args.size))
    params = {"lr": 1e-6} | ({"torch_adam": True} if optimizer == "AdamW" else {})
    config = {
        "train_micro_batch_size_per_gpu": args.batch,
        "zero_optimization": {"stage": args.stage},
        "zero_allow_untested_optimizer": True,
        "optimizer": {"type": optimizer, "params": params},
        "bf16": {"enabled": args.dtype == "bfloat16"},
    }
    groups = parameter_groups(model, 1e-4, 1e-6)
    return deepspeed.initialize(model=model, model_parameters=groups, config=config)[0]


def seconds(engine: Any, batch: Batch, agvm: Agvm | None) -> float:
    """Return the seconds of one whole step."""
    comm.barrier()
    started = _now(engine.device)
    losses = mask_rcnn_losses(engine(batch), CONVENTIONS["detectron2"])
    engine.backward(total_loss(losses))
    if agvm is not None:
        agvm.observe()
        agvm.scale()
    engine.step()
    if agvm is not None:
        agvm.state_dict()  # all_splits finishes its measurement after the step
    return _now(engine.device) - started


def peak_of(step: Callable[[], object], device: torch.device) -> int:
    """Return the peak memory of a step in bytes: of the allocator on a GPU, of the process on a CPU."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        step()
        return torch.cuda.max_memory_allocated(device)
    Path("/proc/self/clear_refs").write_text("5")  # Linux: reset the peak memory
    step()
    status = Path("/proc/self/status").read_text()
    return 1024 * int(next(line for line in status.splitlines() if line.startswith("VmHWM")).split()[1])


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def main(args: argparse.Namespace) -> None:
    device = comm.start()
    scene = make_scene(args.size, args.batch, args.objects, seed=comm.rank())
    batch = giantdet_batch(scene, args.max_objects, frame=112).to(device)
    if comm.is_main():
        print(
            f"{comm.world_size()} ranks, ZeRO-{args.stage}, batch {args.batch} per rank, {args.size} pixels"
        )
        print(
            f"| estimator | step | measured step | ratio, least to most | at interval {INTERVAL} "
            "| memory of a measured step |"
        )
        print("|---|---|---|---|---|---|")
    for name, (optimizer, settings) in FORMS.items():
        if args.estimator not in name:
            continue
        engine = start(args, optimizer)
        parameters = sum(
            p.ds_numel if hasattr(p, "ds_numel") else p.numel() for p in engine.module.parameters()
        )
        seconds(engine, batch, None)
        plain_peak = peak_of(lambda engine=engine: seconds(engine, batch, None), device)
        agvm = Agvm(engine, AgvmConfig(enabled=True, interval=1, start_step=0, **settings))
        peak = peak_of(lambda engine=engine, agvm=agvm: seconds(engine, batch, agvm), device)
        agvm.close()
        pairs = []
        for _ in range(args.pairs + 1):
            plain = seconds(engine, batch, None)
            agvm = Agvm(engine, AgvmConfig(enabled=True, interval=1, start_step=0, **settings))
            pairs.append((plain, seconds(engine, batch, agvm)))
            agvm.close()
        ratios = sorted(measured / plain for plain, measured in pairs[1:])
        medians = [statistics.median(column) for column in zip(*pairs[1:], strict=True)]
        cost = (statistics.median(ratios) - 1) / INTERVAL
        if comm.is_main():
            print(
                f"| {name} | {medians[0]:.3f} s | {medians[1]:.3f} s | {statistics.median(ratios):.3f} "
                f"({ratios[0]:.3f} to {ratios[-1]:.3f}) | {100 * cost:+.2f}% "
                f"| {(peak - plain_peak) / parameters:+.1f} bytes per parameter |",
                flush=True,
            )
        engine.destroy()
    comm.stop()
