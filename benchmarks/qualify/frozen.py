"""The checks of `speed`, with the stem and the first stage frozen, as detectron2 and the recipes train."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from qualify.common import Row, Setting, freed
from qualify.speed import Inputs, faster, inputs, matmul_rate, row, timed, training_step


def prepare(setting: Setting) -> None:
    """See `speed.prepare`."""
    global INPUTS
    INPUTS = inputs(setting, ("conv1", "bn1", "layer1"))


def checks(setting: Setting) -> Iterator[Row]:
    torch.backends.cudnn.benchmark = True
    given: Inputs = INPUTS
    rate = matmul_rate(setting)
    images = len(given.batch.images_B3HW)
    with freed(setting.device):
        each = timed(setting, training_step(given.model, given.batch))
        yield row("two stages frozen, eager", images, each, rate, None, given.flops)
    if setting.device.type == "cuda":
        yield from faster(setting, given, given.batch, rate, None, "two stages frozen, ")
