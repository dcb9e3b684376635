"""Measure batch norms, forward and backward: CGBN, compared with torch's BatchNorm2d and SyncBatchNorm.

python benchmarks/bench_bn.py                                       # one process
deepspeed --num_accelerators 2 benchmarks/bench_bn.py               # over ranks (or torchrun, srun)

The inputs are those of all batch norms of ResNet-50, once for each layer, on `--images` images of `--size`
pixels per rank. The kinds take turns in every repetition; a ratio compares neighbouring measurements, and the
median of the ratios is the result. In one process, `exchanging` uses the collectives of a group of one.
SyncBatchNorm needs a GPU.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections import Counter

import timm
import torch
import torch.distributed as dist
from torch import Tensor, nn

from giantdet.distributed import comm
from giantdet.layers.cgbn import CrossGpuBatchNorm


def shapes_of_resnet50(images: int, size: int) -> Counter[tuple[int, ...]]:
    """Return how often each input shape of a batch norm occurs."""
    with torch.device("meta"):
        model = timm.create_model("resnet50").eval()
    found: Counter[tuple[int, ...]] = Counter()
    for norm in model.modules():
        if isinstance(norm, nn.BatchNorm2d):
            norm.register_forward_pre_hook(lambda _, inputs: found.update([tuple(inputs[0].shape)]))
    model(torch.empty(images, 3, size, size, device="meta"))
    return found


def kinds(channels: int, device: torch.device) -> dict[str, nn.Module]:
    """Return the norms that are compared; the first is the reference of the ratios."""
    world = comm.world_size()
    norms: dict[str, nn.Module] = {"BatchNorm2d": nn.BatchNorm2d(channels)}
    if world == 1:
        norms["CGBN"] = CrossGpuBatchNorm(channels)
        norms["CGBN, exchanging"] = CrossGpuBatchNorm(channels, group=dist.group.WORLD)
    else:
        norms["CGBN"] = CrossGpuBatchNorm(channels, group=comm.subgroup(world))
    if device.type == "cuda":
        norms["SyncBatchNorm"] = nn.SyncBatchNorm(channels)
    return {name: norm.to(device) for name, norm in norms.items()}


def seconds(norm: nn.Module, x: Tensor, dy: Tensor) -> float:
    """Return the seconds of one forward and backward."""
    comm.barrier()
    started = now(x.device)
    norm(x).backward(dy)
    return now(x.device) - started


def now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--images", type=int, default=2, help="per rank")
    parser.add_argument("--size", type=int, default=512)
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument(
        "--contiguous", action="store_true", help="contiguous inputs instead of channels last"
    )
    parser.add_argument("--repetitions", type=int, default=7)
    parser.add_argument("--threads", type=int, help="default: torch's")
    parser.add_argument("--local_rank", "--local-rank", type=int, help=argparse.SUPPRESS)
    args = parser.parse_args()
    device = comm.start()
    if args.threads:
        torch.set_num_threads(args.threads)
    layout = torch.contiguous_format if args.contiguous else torch.channels_last
    totals: list[Counter[str]] = [Counter() for _ in range(args.repetitions)]
    for shape, layers in shapes_of_resnet50(args.images, args.size).items():
        x = torch.randn(shape, device=device).to(getattr(torch, args.dtype), memory_format=layout)
        dy = torch.randn_like(x)
        x.requires_grad_()
        norms = kinds(shape[1], device)
        for norm in norms.values():
            seconds(norm, x, dy)  # warm-up
        for total in totals:
            for name, norm in norms.items():
                total[name] += layers * seconds(norm, x, dy)
    if comm.is_main():
        print(
            f"{comm.world_size()} ranks on {device.type}, {torch.get_num_threads()} threads, "
            f"{args.images} images of {args.size}, {args.dtype}, {str(layout).removeprefix('torch.')}"
        )
        print("| kind | milliseconds, median | ratio to BatchNorm2d, median (least to most) |\n|---|---|---|")
        for name in totals[0]:
            ratios = sorted(total[name] / total["BatchNorm2d"] for total in totals)
            median = 1e3 * statistics.median(total[name] for total in totals)
            spread = f"{statistics.median(ratios):.3f} ({ratios[0]:.3f} to {ratios[-1]:.3f})"
            print(f"| {name} | {median:.1f} | {spread} |")
    comm.stop()


if __name__ == "__main__":
    main()
