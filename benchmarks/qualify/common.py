"""Parts that the checks of `scripts/qualify_gpu.py` share: settings, rows, timing, a model and its inputs."""

from __future__ import annotations

import copy
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from bench_scene import CLASSES, giantdet_batch, make_scene
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

from giantdet.architectures import Architecture, build_model, total_loss
from giantdet.config.architectures.mask_rcnn import MaskRcnnConfig
from giantdet.ops import shapes
from giantdet.structures import Batch

REPO = Path(__file__).resolve().parents[2]
shapes.ENABLED = False  # the CPU computes what the GPU does, whose stand-in or reference it is


@dataclass(frozen=True)
class Setting:
    """The device and the size of the checks."""

    device: torch.device
    toy: bool
    """Sizes that a CPU can run in a minute, to test the checks themselves."""
    output: Path

    def pick(self, real: Any, toy: Any) -> Any:
        """Return `real`, or `toy` in a toy run."""
        return toy if self.toy else real


class Row(NamedTuple):
    """One line of the report."""

    check: str
    passed: bool | None
    """None for a measurement without a limit."""
    found: str


def difference(ours: Tensor, reference: Tensor) -> float:
    """Return |ours - reference| / |reference|, in float64 on the CPU; infinite if either is not finite."""
    ours, reference = ours.detach().double().cpu(), reference.detach().double().cpu()
    if not (ours.isfinite().all() and reference.isfinite().all()):
        return float("inf")
    return float((ours - reference).norm() / reference.norm().clamp_min(1e-30))


def synchronise(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def seconds(step: Callable[[], object], device: torch.device, repeats: int, warm: int = 3) -> float:
    """Return the median seconds of `step`, including the end of its kernels."""
    for _ in range(warm):
        step()
    times = []
    for _ in range(repeats):
        synchronise(device)
        started = time.perf_counter()
        step()
        synchronise(device)
        times.append(time.perf_counter() - started)
    return statistics.median(times)


def profiled(setting: Setting, title: str, step: Callable[[], object]) -> Iterator[Row]:
    """Profile three steps: a table of their kernels in a file, and their number and time as a row."""
    if setting.device.type != "cuda":
        return
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA], record_shapes=True) as profiler:
        for _ in range(3):
            step()
        synchronise(setting.device)
    name = "_".join(title.replace(",", "").split())
    averages = profiler.key_averages()
    table = averages.table(sort_by="self_device_time_total", row_limit=60, max_name_column_width=100)
    (setting.output / f"kernels_{name}.txt").write_text(table)
    kernels = [event for event in averages if event.device_type.name == "CUDA"]
    milliseconds = sum(event.self_device_time_total for event in kernels) / 3e3
    launched = sum(event.count for event in kernels) // 3
    yield Row(
        f"{title}: kernels", None, f"{launched} of {milliseconds:.1f} ms in all, see kernels_{name}.txt"
    )


def peak_gib(device: torch.device) -> float:
    return torch.cuda.max_memory_allocated(device) / 2**30 if device.type == "cuda" else 0.0


@contextmanager
def freed(device: torch.device) -> Iterator[None]:
    """Free the allocator's memory before and after."""
    import gc

    for end in (False, True):
        gc.collect()
        if device.type == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats(device)
        if not end:
            yield


def model_and_batch(
    setting: Setting, size: tuple[int, int], images: int, backbone: str = "resnet50", **model: Any
) -> tuple[Architecture, Batch]:
    """Return a Mask R-CNN with random weights and constant batch norms, and a batch of ellipses, on the CPU.

    The residual branches are scaled down, as in trained weights, so that the maps do not grow.
    """
    section = {"num_classes": CLASSES, "backbone": {"name": backbone}, **copy.deepcopy(model)}
    if setting.toy:
        rpn = {"pre_nms_train": 50, "post_nms_train": 50, "pre_nms_test": 50, "post_nms_test": 50}
        section |= {"fpn": {"channels": 16}, "rpn": rpn, "mask_head": {"convs": 1, "width": 16, "slots": 8}}
    torch.manual_seed(0)
    built = build_model(MaskRcnnConfig.model_validate(section), size)
    for name, module in built.named_modules():
        if name.endswith("bn3") or (name.endswith("bn2") and backbone == "resnet18"):
            nn.init.constant_(module.weight, 0.2)
    batch = giantdet_batch(make_scene(size, images, 8), setting.pick(100, 16), frame=112)
    return built.train(), batch


def loss_of(model: Architecture, batch: Batch) -> Tensor:
    return total_loss(model.losses(model(batch), batch))


TOY = (
    "data.size=[128,128]",
    "bf16.enabled=false",
    "model.fpn.channels=16",
    "model.rpn.pre_nms_train=50",
    "model.rpn.post_nms_train=50",
    "model.box_head.batch_per_image=16",
    "model.box_head.width=32",
    "model.mask_head.convs=1",
    "model.mask_head.width=16",
    "model.mask_head.slots=4",
)
"""Overrides that make a recipe of Mask R-CNN small, except for its backbone."""


def recipe(name: str, *overrides: str) -> tuple[Path, list[str]]:
    """Return the path of a recipe and the overrides that make it run without data or weights."""
    return REPO / "ds_configs" / f"{name}.json", ["model.backbone.frozen_stages=0", *overrides]
