"""Measure what CGBN costs, compared with SyncBatchNorm."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator

import torch
import torch.distributed as dist
from bench_bn import shapes_of_resnet50
from qualify.common import Row, Setting, seconds
from torch import Tensor, nn
from torch.nn.modules._functions import SyncBatchNorm as SyncFunction

from giantdet.distributed import comm
from giantdet.layers.cgbn import CrossGpuBatchNorm


def prepare(setting: Setting) -> None:
    """Count the shapes of ResNet-50's batch norms."""
    global SHAPES
    SHAPES = shapes_of_resnet50(setting.pick(4, 1), setting.pick(800, 64))


def checks(setting: Setting) -> Iterator[Row]:
    """All batch norms of ResNet-50, forward and backward, with the collectives of a group of one rank."""
    comm.start()
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
        # The module itself skips its collectives in a world of one.
        norm = nn.SyncBatchNorm(channels).to(device)

        def sync(x: Tensor) -> Tensor:
            found: Tensor = SyncFunction.apply(
                x, norm.weight, norm.bias, norm.running_mean, norm.running_var, norm.eps, 0.1, group, 1
            )
            return found

        found["SyncBatchNorm"] = sync
    return found
