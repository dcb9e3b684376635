"""What CGBN costs beside SyncBatchNorm, and AGVM in a training step."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator
from functools import partial

import torch
import torch.distributed as dist
from bench_bn import shapes_of_resnet50
from qualify.common import Row, Setting, freed, recipe, seconds
from torch import Tensor, nn
from torch.nn.modules._functions import SyncBatchNorm as SyncFunction

from giantdet.architectures import total_loss
from giantdet.config.types import AgvmConfig
from giantdet.data.blank import blank_batch
from giantdet.distributed import comm
from giantdet.engine import zero
from giantdet.layers.cgbn import CrossGpuBatchNorm
from giantdet.optim.agvm import Agvm
from giantdet.tools.measure import run_with

INTERVAL = 10


def prepare(setting: Setting) -> None:
    """Count the shapes of ResNet-50's batch norms."""
    global SHAPES
    SHAPES = shapes_of_resnet50(setting.pick(4, 1), setting.pick(800, 64))


def checks(setting: Setting) -> Iterator[Row]:
    torch.backends.cudnn.benchmark = True
    comm.start()
    yield from batch_norms(setting)
    for stage, estimator in ((1, "all_splits"), (2, "all_splits"), (2, "half_split")):
        with freed(setting.device):
            yield agvm(setting, stage, estimator)


def batch_norms(setting: Setting) -> Iterator[Row]:
    """All batch norms of ResNet-50, forward and backward, with the collectives of a group of one rank."""
    device, dtype = setting.device, setting.pick(torch.bfloat16, torch.float32)
    totals: dict[str, list[float]] = {}
    repetitions = setting.pick(7, 2)
    for shape, layers in SHAPES.items():
        x = torch.randn(shape, device=device).to(dtype, memory_format=torch.channels_last)
        dy, channels = torch.randn_like(x), shape[1]
        x.requires_grad_()
        for name, norm in kinds(channels, setting).items():
            times = [seconds(step_of(norm, x, dy), device, 1, warm=2 * (i == 0)) for i in range(repetitions)]
            total = totals.setdefault(name, [0.0] * repetitions)
            totals[name] = [a + layers * b for a, b in zip(total, times, strict=True)]
    medians = {name: 1e3 * statistics.median(times) for name, times in totals.items()}
    text = ", ".join(f"{name} {ms:.2f} ms" for name, ms in medians.items())
    passed = None
    if "SyncBatchNorm" in medians:
        passed = medians["CGBN"] <= 1.02 * medians["SyncBatchNorm"]
    yield Row("batch norms of R50, 4 images of 800", passed, text)


def step_of(norm: Callable[[Tensor], Tensor], x: Tensor, dy: Tensor) -> Callable[[], None]:
    return lambda: norm(x).backward(dy)


def kinds(channels: int, setting: Setting) -> dict[str, Callable[[Tensor], Tensor]]:
    device, group = setting.device, dist.group.WORLD
    found: dict[str, Callable[[Tensor], Tensor]] = {
        "BatchNorm2d": nn.BatchNorm2d(channels).to(device),
        "CGBN, local": CrossGpuBatchNorm(channels).to(device),
        "CGBN": CrossGpuBatchNorm(channels, group=group).to(device),
    }
    if device.type == "cuda":
        # The module itself leaves out its collectives in a world of one.
        norm = nn.SyncBatchNorm(channels).to(device)

        def sync(x: Tensor) -> Tensor:
            found: Tensor = SyncFunction.apply(
                x, norm.weight, norm.bias, norm.running_mean, norm.running_var, norm.eps, 0.1, group, 1
            )
            return found

        found["SyncBatchNorm"] = sync
    return found


def agvm(setting: Setting, stage: int, estimator: str) -> Row:
    """A step with a measurement beside a step without AGVM, on the same engine."""
    overrides = [f"zero_optimization.stage={stage}", "norm.type=frozen"]
    if setting.toy:
        overrides += [
            "data.size=[128,128]",
            "model.backbone.name=resnet18",
            "model.box_head.batch_per_image=16",
            "bf16.enabled=false",
        ]
    path, overrides = recipe("mask_rcnn_resnet50_16_sgd", *overrides)
    run = run_with(path, overrides, setting.pick(8, 1), world=1)
    device = setting.device
    model = zero.build(run, run.batch.micro).to(device)
    engine = zero.initialize(model, run)
    engine.train()
    batch = blank_batch(run.giantdet.data, run.batch.micro, model.targets).to(device)

    def step(measured: Agvm | None = None) -> None:
        for _ in range(run.batch.accumulation):
            engine.backward(total_loss(model.losses(engine(batch), batch)))
            if measured is not None:
                measured.observe()
                measured.scale()
            engine.step()

    config = AgvmConfig(enabled=True, interval=1, start_step=0, estimator=estimator)
    plain, with_agvm = [], []
    rounds = setting.pick(5, 1)
    for _ in range(rounds):
        plain.append(seconds(step, device, setting.pick(3, 1), warm=1))
        measuring = Agvm(engine, config)
        with_agvm.append(seconds(partial(step, measuring), device, setting.pick(3, 1), warm=1))
        measuring.close()
    ratios = sorted(b / a for a, b in zip(plain, with_agvm, strict=True))
    cost = 100 * (statistics.median(ratios) - 1) / INTERVAL
    engine.destroy()
    return Row(
        f"AGVM, {estimator}, ZeRO-{stage}",
        None,
        f"step {1e3 * statistics.median(plain):.1f} ms, with a measurement "
        f"{statistics.median(ratios):.3f} ({ratios[0]:.3f} to {ratios[-1]:.3f}) times: "
        f"{cost:+.2f}% at an interval of {INTERVAL}",
    )
