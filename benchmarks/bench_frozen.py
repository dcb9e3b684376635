"""Measure a training step of a recipe with a frozen backbone, or with a trained one, on random images.

deepspeed --num_accelerators 2 benchmarks/bench_frozen.py \
    ds_configs/mask_rcnn_vitdet_dinov3_7b_frozen_16_adamw.json --backbone frozen key=value ...

Prints seconds per step, CPU seconds per rank, which depend less on other processes on the machine, and the
peak memory of a rank. Weights are random. The memory of a process on the CPU includes its libraries, whose
part is printed too; so each setting is measured by processes of its own.
"""

from __future__ import annotations

import argparse
import statistics
import time

import torch

from giantdet.architectures import total_loss
from giantdet.config.classes import Classes
from giantdet.config.load import load_run
from giantdet.config.resolve import resolve
from giantdet.data.blank import blank_batch
from giantdet.distributed import comm
from giantdet.engine import zero

SETTINGS = {
    "frozen": ["model.backbone.frozen=true"],
    "recomputed": ["model.backbone.frozen=false", "model.backbone.checkpoint_blocks=true"],
    "kept": ["model.backbone.frozen=false", "model.backbone.checkpoint_blocks=false"],
}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("config", help="a recipe")
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    parser.add_argument("--backbone", choices=SETTINGS, required=True)
    parser.add_argument("--steps", type=int, default=6, help="measured steps, after 2 warm-ups; default: 6")
    parser.add_argument("--local_rank", type=int, default=0, help=argparse.SUPPRESS)
    options = parser.parse_intermixed_args()
    device = comm.start()
    overrides = [
        *("model.backbone.pretrained=false", "train.export_backbone=true", "gradient_accumulation_steps=1"),
        *("train_batch_size=auto", *SETTINGS[options.backbone], *options.overrides),
    ]
    run = load_run(options.config, overrides)
    run = resolve(run, comm.world_size(), 1000, Classes.numbered(80), device.type == "cuda")
    images = run.batch.micro
    empty = zero.peak_memory(device)
    model = zero.build(run, images)
    engine = zero.initialize(model, run)
    engine.train()
    batch = blank_batch(run.giantdet.data, images, model.targets).to(device)
    walls, cpus = [], []
    for _ in range(2 + options.steps):
        comm.barrier()
        wall, cpu = time.perf_counter(), time.process_time()
        engine.backward(total_loss(model.losses(engine(batch), batch)))
        engine.step()
        if device.type == "cuda":
            torch.cuda.synchronize()
        walls.append(time.perf_counter() - wall)
        cpus.append(time.process_time() - cpu)
    peak = comm.mean_over_ranks([zero.peak_memory(device)])[0]
    if comm.is_main():
        numbers = [sum(getattr(p, "ds_numel", p.numel()) for p in part) for part in _parts(model)]
        wall, cpu = (statistics.median(seconds[2:]) for seconds in (walls, cpus))
        print(
            f"backbone {options.backbone}: {numbers[0]:,} parameters, {numbers[1]:,} trained, "
            f"{run.precision}, ZeRO-{run.stage}, {comm.world_size()} ranks x {images} images\n"
            f"{wall:.2f} s per step (fastest {min(walls[2:]):.2f}), {cpu:.2f} CPU seconds per rank, "
            f"{peak:.2f} GiB per rank, {empty:.2f} of it before the model",
            flush=True,
        )
    engine.destroy()
    comm.stop()


def _parts(model: torch.nn.Module) -> tuple[list[torch.nn.Parameter], list[torch.nn.Parameter]]:
    parameters = list(model.parameters())
    return parameters, [p for p in parameters if p.requires_grad]


if __name__ == "__main__":
    main()
