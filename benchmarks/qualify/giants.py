"""Images/s, share of the matrix rate and memory of ViTDet in bf16 under DeepSpeed, compared with the plan."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from qualify.common import TOY, Row, Setting, freed, peak_gib, profiled, recipe, seconds
from qualify.speed import matmul_rate

from giantdet.architectures import total_loss
from giantdet.config.resolved import ResolvedRun
from giantdet.data.blank import blank_batch
from giantdet.distributed import comm
from giantdet.engine import zero
from giantdet.tools.costs import GIB, RESERVE
from giantdet.tools.machines import MACHINES
from giantdet.tools.measure import run_with
from giantdet.tools.plan import Plan


class Giant(NamedTuple):
    """A detector to measure: the recipe, overrides, and images per step."""

    title: str
    recipe: str
    overrides: tuple[str, ...]
    images: int


COMPILED = "model.backbone.compile_blocks=true"
REAL = (
    Giant("ViTDet-g, 1B", "mask_rcnn_vitdet_giant_32_agvm_adamw", ("agvm.enabled=false", COMPILED), 8),
    Giant("ViTDet-L", "mask_rcnn_vitdet_large_64_adamw", (COMPILED,), 8),
    Giant("ViTDet-L, eager", "mask_rcnn_vitdet_large_64_adamw", (), 8),
    Giant("ViTDet-H", "mask_rcnn_vitdet_huge_64_adamw", (COMPILED,), 8),
)
SMALL = (
    Giant(
        "toy",
        "mask_rcnn_vitdet_base_64_adamw",
        ("model.backbone.name=vit_tiny_patch16_224", 'model.backbone.timm_args={"depth":4}', *TOY),
        1,
    ),
)


def giants(setting: Setting) -> tuple[Giant, ...]:
    return setting.pick(REAL, SMALL)


def resolved(giant: Giant) -> ResolvedRun:
    """Return its run on one rank: two micro-steps, ZeRO-1, no recomputed block."""
    fixed = ("zero_optimization.stage=1", "model.backbone.checkpoint_blocks=false")
    path, overrides = recipe(giant.recipe, *fixed, *giant.overrides)
    return run_with(path, overrides, giant.images, world=1)


class Estimate(NamedTuple):
    """Numbers computed before the GPU is used."""

    run: ResolvedRun
    flops: float
    """FLOPs of the forward and backward pass of a micro-batch."""
    memory: float
    """GiB according to `giantdet plan`, without its reserve."""


ESTIMATES: dict[str, Estimate] = {}


def prepare(setting: Setting) -> None:
    """Count FLOPs and plan the memory, while other groups use the GPU."""
    torch.backends.cudnn.benchmark = True
    comm.start()
    for giant in giants(setting):
        run = resolved(giant)
        plan = Plan(run, 1, MACHINES["h200"], 1.0, 1.0)
        counted, _ = plan.counts[0]
        flops = float(counted.forward + counted.backward) * giant.images
        memory = (plan.own.memory - RESERVE) / GIB
        ESTIMATES[giant.title] = Estimate(run, flops, memory)
        if not READY:
            READY[giant.title] = step = Step(setting, run)
            step()  # compiles the model


def checks(setting: Setting) -> Iterator[Row]:
    rate = matmul_rate(setting)
    for giant in giants(setting):
        try:
            with freed(setting.device):
                yield from measured(setting, giant, rate)
        except torch.OutOfMemoryError as error:
            yield Row(giant.title, False, str(error)[:300])


class Step:
    """A whole optimizer step of a run, without AGVM, on noise images."""

    def __init__(self, setting: Setting, run: ResolvedRun) -> None:
        model = zero.build(run, run.batch.micro).to(setting.device)
        self.engine = zero.initialize(model, run)
        self.engine.train()
        self.accumulation = run.batch.accumulation
        batch = blank_batch(run.giantdet.data, run.batch.micro, model.targets)
        self.batch = batch.to(setting.device)

    def __call__(self) -> None:
        for _ in range(self.accumulation):
            model = self.engine.module
            self.engine.backward(total_loss(model.losses(self.engine(self.batch), self.batch)))
            self.engine.step()


READY: dict[str, Step] = {}


def measured(setting: Setting, giant: Giant, rate: float) -> Iterator[Row]:
    """Run whole optimizer steps of a run under its DeepSpeed engine."""
    estimate, device = ESTIMATES[giant.title], setting.device
    run = estimate.run
    step = READY.pop(giant.title, None) or Step(setting, run)
    each = seconds(step, device, setting.pick(5, 1), warm=setting.pick(2, 1))
    parameters = sum(p.numel() for p in step.engine.module.parameters())
    images = run.batch.total
    share = estimate.flops * run.batch.accumulation / each / rate
    peak = peak_gib(device)
    yield Row(
        giant.title,
        None,
        f"{parameters / 1e6:.0f}M parameters, {images / each:.2f} images/s ({1e3 * each:.0f} ms for "
        f"{images}), {100 * share:.0f}% of the matrix rate, {estimate.flops / giant.images / 1e12:.2f} "
        f"TFLOP per image; {peak:.1f} GiB, planned {estimate.memory:.1f}",
    )
    yield from profiled(setting, giant.title, step)
    step.engine.destroy()
