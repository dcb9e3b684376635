"""Measure the time of a training step and compare it with torchvision's Mask R-CNN of the same network.

python benchmarks/bench.py --threads 2                                                  # the CPU setting
python benchmarks/bench.py --size 1024 --batch 8 --dtype bfloat16     # the setting of one GPU
python benchmarks/bench.py --only giantdet --backbone swin_tiny_patch4_window7_224      # any timm backbone

Both sides use the same pixels, boxes, masks, initial weights, threads, optimizer (SGD with momentum) and
number of RoIs, with all parameters trainable and constant batch norms. They take turns: A B, A B, ... Each
ratio is of two neighbouring steps, and the median of the ratios is reliable even on a shared machine. Plain
PyTorch, without DeepSpeed. On a GPU giantdet computes every mask slot, used or not, torchvision only its real
positives; both counts are printed, and ours must be at least torchvision's. On a GPU each part ends with a
synchronisation; bfloat16 means bf16 weights for giantdet and autocast for torchvision.
"""

from __future__ import annotations

import argparse
import os
import platform
import statistics
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torchvision
from bench_scene import CLASSES, Scene, giantdet_batch, make_scene, model_config, torchvision_inputs
from torch import Tensor, nn
from torchvision.models.detection import MaskRCNN
from torchvision.models.detection.backbone_utils import resnet_fpn_backbone
from torchvision.ops import FrozenBatchNorm2d

from giantdet.architectures import build_model, total_loss
from giantdet.architectures.foreign.torchvision import from_torchvision
from giantdet.architectures.mask_rcnn import MaskRcnn, mask_rcnn_losses, sample_counts
from giantdet.config.conventions import CONVENTIONS
from giantdet.layers.weights import load_strictly

PARTS = ("data", "forward", "backward", "optimizer")
LEARNING_RATE = 1e-5  # the weights hardly move: all steps do the same work


class Side(NamedTuple):
    """One of the two implementations that are compared."""

    name: str
    step: Callable[[], dict[str, float]]  # train one step, return the seconds of each part
    counts: dict[str, float]  # filled by the step: RoIs per image


def torchvision_model(size: int) -> MaskRCNN:
    """Return `maskrcnn_resnet50_fpn` with random weights, constant batch norms, all layers trainable.

    The residual branches are scaled down, as in trained weights; with constants of 1 the maps grow 256-fold
    over the network and boxes leave the image.
    """
    torch.manual_seed(0)
    backbone = resnet_fpn_backbone(
        backbone_name="resnet50", weights=None, norm_layer=FrozenBatchNorm2d, trainable_layers=5
    )
    for name, module in backbone.named_modules():
        if name.endswith("bn3"):
            module.weight.fill_(0.2)
    return MaskRCNN(backbone, CLASSES + 1, min_size=size, max_size=size)


def optimizer_of(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=LEARNING_RATE, momentum=0.9)


class Clock:
    """Times consecutive parts in seconds; on a GPU a part ends when its kernels are done."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.seconds: dict[str, float] = {}
        self.now = self._time()

    def _time(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()

    def lap(self, part: str) -> None:
        now = self._time()
        self.seconds[part], self.now = now - self.now, now


def giantdet_side(scene: Scene, args: argparse.Namespace, state: dict[str, Tensor] | None) -> Side:
    device, dtype = torch.device(args.device), getattr(torch, args.dtype)
    torch.manual_seed(0)
    model: MaskRcnn = build_model(model_config(args), (args.size, args.size))
    if state is not None:
        load_strictly(model, from_torchvision(state, norm_eps=1e-5), "torchvision's weights")
    model = model.to(device, dtype).train()
    optimizer = optimizer_of(model)
    on_host = giantdet_batch(scene, args.max_objects, frame=112)
    counts: dict[str, float] = {}

    def count_masks(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        counts["masks_computed"] = inputs[0].shape[0] / args.batch

    assert model.mask_head is not None
    model.mask_head.register_forward_pre_hook(count_masks)

    def step() -> dict[str, float]:
        torch.backends.cudnn.benchmark = True  # as in `engine/train.py`: shapes are fixed
        clock = Clock(device)
        batch = on_host.to(device)
        clock.lap("data")
        predictions = model(batch)
        losses = mask_rcnn_losses(predictions, CONVENTIONS["torchvision"])
        loss = total_loss(losses)
        clock.lap("forward")
        loss.backward()
        clock.lap("backward")
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        clock.lap("optimizer")
        used = {name: float(count) for name, count in sample_counts(predictions).items()}
        counts.update(
            rois=predictions.box.valid_BR.shape[1],
            positives=used["roi_positive"],
            masks_trained=used["mask_slots_used"],
            loss=float(loss.detach()),
        )
        return clock.seconds

    return Side("giantdet", step, counts)


def torchvision_side(scene: Scene, args: argparse.Namespace, model: MaskRCNN) -> Side:
    device, dtype = torch.device(args.device), getattr(torch, args.dtype)
    model = model.to(device).train()
    model.roi_heads.fg_bg_sampler.batch_size_per_image = args.rois
    optimizer = optimizer_of(model)
    images_on_host, targets_on_host = torchvision_inputs(scene)
    counts: dict[str, float] = {}

    def count_boxes(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        counts["rois"] = inputs[0].shape[0] / args.batch

    def count_masks(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        counts["positives"] = counts["masks_computed"] = counts["masks_trained"] = (
            inputs[0].shape[0] / args.batch
        )

    model.roi_heads.box_head.register_forward_pre_hook(count_boxes)
    model.roi_heads.mask_head.register_forward_pre_hook(count_masks)

    def step() -> dict[str, float]:
        torch.backends.cudnn.benchmark = False  # the shapes in its mask head change in every step
        clock = Clock(device)
        images = [image.to(device) for image in images_on_host]
        targets = [{k: v.to(device) for k, v in target.items()} for target in targets_on_host]
        clock.lap("data")
        with torch.autocast(device.type, torch.bfloat16, enabled=dtype == torch.bfloat16):
            loss = torch.stack([v.float() for v in model(images, targets).values()]).sum()
        clock.lap("forward")
        loss.backward()
        clock.lap("backward")
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        clock.lap("optimizer")
        counts["loss"] = float(loss.detach())
        return clock.seconds

    return Side("torchvision", step, counts)


def cpu_name() -> str:
    try:
        with open("/proc/cpuinfo") as lines:
            return next(line.split(":")[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def describe_machine(device: str) -> str:
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    gpu = f", {torch.cuda.get_device_name()}" if device == "cuda" else ""
    return (
        f"machine: {cpu_name()}, {cores} cores, {torch.get_num_threads()} threads{gpu}\n"
        f"versions: Python {platform.python_version()}, torch {torch.__version__}, "
        f"torchvision {torchvision.__version__}"
    )


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description="Measure the time of a training step, compared with torchvision's."
    )
    parser.add_argument("--size", type=int, default=512, help="side of the square images, a multiple of 64")
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--objects", type=int, default=8, help="objects per image")
    parser.add_argument(
        "--max-objects", type=int, default=100, help="giantdet's ground-truth slots per image"
    )
    parser.add_argument("--rois", type=int, default=512, help="RoIs per image in the box head, on both sides")
    parser.add_argument(
        "--mask-slots", type=int, default=64, help="giantdet's mask slots per image; 64 is a run's default"
    )
    parser.add_argument("--pairs", type=int, default=5)
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--device", choices=["auto", "cpu", "cuda"], default="auto")
    parser.add_argument("--threads", type=int, default=0, help="CPU threads; 0: torch's default")
    parser.add_argument(
        "--backbone", default="resnet50", help="timm's name; for any but resnet50 give --only giantdet"
    )
    parser.add_argument(
        "--agvm", action="store_true", help="measure the cost of AGVM instead, see bench_agvm.py"
    )
    parser.add_argument("--stage", type=int, default=2, help="ZeRO stage for --agvm")
    parser.add_argument(
        "--estimator", default="", help="for --agvm: only estimators whose names contain this text"
    )
    parser.add_argument("--local_rank", "--local-rank", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--only", choices=["giantdet", "torchvision"], default=None)
    args = parser.parse_args()
    if args.size % 64 or args.size <= 0:
        parser.error(f"--size must be a positive multiple of 64, not {args.size}")
    if not 0 < args.objects <= args.max_objects:
        parser.error("--objects must be from 1 to --max-objects")
    if args.backbone != "resnet50" and args.only != "giantdet":
        parser.error(f"torchvision has no '{args.backbone}': add --only giantdet")
    if args.device == "auto":
        args.device = "cuda" if torch.cuda.is_available() else "cpu"
    return args


def line(name: str, seconds: dict[str, float], batch: int) -> str:
    total = sum(seconds.values())
    parts = "  ".join(f"{part} {seconds[part]:.3f}" for part in PARTS)
    return f"{name:<12} {total:7.3f} s  {batch / total:7.2f} images/s   {parts}"


def main() -> None:
    args = parse()
    if args.threads:
        torch.set_num_threads(args.threads)
    if args.agvm:
        import bench_agvm

        bench_agvm.main(args)
        return
    print(describe_machine(args.device))
    print(
        f"setting: {args.backbone}, batch {args.batch}, {args.size}x{args.size}, "
        f"{args.objects} objects per image, {args.dtype}, {args.device}"
    )
    scene = make_scene(args.size, args.batch, args.objects)
    sides: list[Side] = []
    reference = torchvision_model(args.size) if args.backbone == "resnet50" else None
    if args.only != "torchvision":
        sides.append(giantdet_side(scene, args, reference.state_dict() if reference is not None else None))
    if args.only != "giantdet":
        assert reference is not None
        sides.append(torchvision_side(scene, args, reference))

    for _ in range(3 if args.device == "cuda" else 1):
        for side in sides:
            side.step()
    steps: dict[str, list[dict[str, float]]] = {side.name: [] for side in sides}
    for pair in range(args.pairs):
        for side in sides:
            steps[side.name].append(side.step())
            print(f"{pair + 1:>3}  " + line(side.name, steps[side.name][-1], args.batch), flush=True)

    print("counts per image:")
    for side in sides:
        print(f"  {side.name:<12} " + "  ".join(f"{k} {v:g}" for k, v in sorted(side.counts.items())))
    print("medians:")
    for side in sides:
        medians: dict[str, Any] = {p: statistics.median(s[p] for s in steps[side.name]) for p in PARTS}
        print("  " + line(side.name, medians, args.batch))
    if len(sides) == 2:
        totals = [[sum(s.values()) for s in steps[side.name]] for side in sides]
        ratios = [ours / theirs for ours, theirs in zip(*totals, strict=True)]
        print("ratios giantdet / torchvision: " + " ".join(f"{ratio:.3f}" for ratio in ratios))
        print(f"median ratio: {statistics.median(ratios):.3f}")


if __name__ == "__main__":
    main()
