"""Measure what AGVM costs in a training step under DeepSpeed."""

from __future__ import annotations

import statistics
from collections.abc import Iterator
from functools import partial

import torch
from qualify.common import TOY, Row, Setting, freed, recipe, seconds

from giantdet.architectures import total_loss
from giantdet.config.types import AgvmConfig
from giantdet.data.blank import blank_batch
from giantdet.distributed import comm
from giantdet.engine import zero
from giantdet.optim.agvm import Agvm
from giantdet.tools.measure import run_with

INTERVAL = 10


def prepare(setting: Setting) -> None:
    """Do nothing: there is nothing to prepare."""


def checks(setting: Setting) -> Iterator[Row]:
    torch.backends.cudnn.benchmark = True
    comm.start()
    for stage, estimator in ((1, "all_splits"), (2, "all_splits"), (2, "half_split")):
        with freed(setting.device):
            yield agvm(setting, stage, estimator)


def agvm(setting: Setting, stage: int, estimator: str) -> Row:
    """Compare a step with a measurement and a step without AGVM, on the same engine."""
    overrides = [f"zero_optimization.stage={stage}", "norm.type=frozen"]
    if setting.toy:
        overrides += ["model.backbone.name=resnet18", *TOY]
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
