"""Measure the time from mask probabilities to COCO's RLE, per image, compared with pasting on whole images.

python benchmarks/bench_masks.py                               # 640 x 480, 100 detections, one thread

Three methods take turns on the same masks and boxes, and each ratio is of two neighbouring images:

- giantdet: `evaluation/pasting.py` computes where masks begin and end in each column, `rle.py` encodes that.
- torchvision: `paste_masks_in_image` makes bitmaps of the image, pycocotools encodes them.
- detectron2: `grid_sample` over the whole image, one mask at a time as on a CPU, then pycocotools. With
  `skip_empty`, its default on CPUs, only the surroundings of the box are sampled into a bitmap of the image.

The RLE of giantdet and of detectron2's way are compared: pixels whose probability is within rounding of the
threshold may differ, and their number is printed.
"""

from __future__ import annotations

import argparse
import platform
import statistics
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from pycocotools import mask as mask_util
from torch import Tensor
from torchvision.models.detection.roi_heads import paste_masks_in_image

from giantdet.evaluation.rle import encode_pasted

Rles = list[dict[str, Any]]


def make_detections(size_hw: tuple[int, int], count: int, seed: int) -> tuple[Tensor, Tensor]:
    """Return masks `[D, 28, 28]`, blurred ellipses, and boxes with sides of 1/32 to 1/2 of the image's."""
    generator = torch.Generator().manual_seed(seed)
    extent_2 = torch.tensor([float(size_hw[1]), float(size_hw[0])])
    sides_D2 = extent_2 / 2 ** (1 + 4 * torch.rand(count, 2, generator=generator))
    corner_D2 = torch.rand(count, 2, generator=generator) * (extent_2 - sides_D2)
    at = (torch.arange(28) + 0.5) / 14 - 1
    noise = F.interpolate(torch.rand(count, 1, 4, 4, generator=generator), size=(28, 28), mode="bilinear")
    masks = (5 * (1 - at**2 - at[:, None] ** 2) + 2 * (noise[:, 0] - 0.5)).sigmoid()
    return masks, torch.cat([corner_D2, corner_D2 + sides_D2], 1)


def giantdet_rles(masks: Tensor, boxes: Tensor, size_hw: tuple[int, int]) -> Rles:
    return encode_pasted(masks, boxes, size_hw, at_pixel_centres=True).records()


def torchvision_rles(masks: Tensor, boxes: Tensor, size_hw: tuple[int, int]) -> Rles:
    pasted = paste_masks_in_image(masks[:, None], boxes, size_hw)[:, 0] > 0.5
    return [_encoded(mask) for mask in pasted]


def detectron2_rles(masks: Tensor, boxes: Tensor, size_hw: tuple[int, int], skip_empty: bool = True) -> Rles:
    height, width = size_hw
    pasted = torch.zeros(len(masks), height, width, dtype=torch.bool)
    for n, (mask, box) in enumerate(zip(masks, boxes, strict=True)):
        x0, y0, x1, y1 = box.tolist()
        left, top, right, bottom = 0, 0, width, height
        if skip_empty:
            left, top = max(int(x0) - 1, 0), max(int(y0) - 1, 0)
            right, bottom = min(int(x1) + 2, width), min(int(y1) + 2, height)
        x = (torch.arange(left, right) + 0.5 - x0) / (x1 - x0) * 2 - 1
        y = (torch.arange(top, bottom) + 0.5 - y0) / (y1 - y0) * 2 - 1
        grid = torch.stack([x.expand(len(y), -1), y[:, None].expand(-1, len(x))], -1)[None]
        soft = F.grid_sample(mask[None, None], grid, align_corners=False)[0, 0]
        pasted[n, top:bottom, left:right] = soft >= 0.5
    return [_encoded(mask) for mask in pasted]


def _encoded(mask_HW: Tensor) -> dict[str, Any]:
    rle = mask_util.encode(np.asfortranarray(mask_HW.numpy().astype(np.uint8)))
    return {"size": rle["size"], "counts": rle["counts"].decode("ascii")}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--height", type=int, default=480)
    parser.add_argument("--width", type=int, default=640)
    parser.add_argument("--detections", type=int, default=100)
    parser.add_argument("--images", type=int, default=20)
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    size_hw = (args.height, args.width)
    print(f"machine: {platform.machine()}, {args.threads} threads")
    print(f"{args.width} x {args.height}, {args.detections} detections, {args.images} images")
    ways: dict[str, Callable[[Tensor, Tensor], Rles]] = {
        "giantdet": lambda m, b: giantdet_rles(m, b, size_hw),
        "torchvision": lambda m, b: torchvision_rles(m, b, size_hw),
        "detectron2": lambda m, b: detectron2_rles(m, b, size_hw),
        "detectron2, whole image": lambda m, b: detectron2_rles(m, b, size_hw, skip_empty=False),
    }
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    differing = 0
    for image in range(-1, args.images):  # the first is a warm-up
        masks, boxes = make_detections(size_hw, args.detections, max(image, 0))
        found: dict[str, Rles] = {}
        for name, way in ways.items():
            start = time.perf_counter()
            found[name] = way(masks, boxes)
            if image >= 0:
                seconds[name].append(time.perf_counter() - start)
        for ours, theirs in zip(found["giantdet"], found["detectron2, whole image"], strict=True):
            both = mask_util.area(mask_util.merge([ours, theirs], intersect=True))
            differing += int(mask_util.area(ours) + mask_util.area(theirs) - 2 * both)
    for name, values in seconds.items():
        ratios = [theirs / ours for theirs, ours in zip(values, seconds["giantdet"], strict=True)]
        print(
            f"{name:<24} {1000 * statistics.median(values):8.1f} ms per image, "
            f"median ratio to giantdet: {statistics.median(ratios):.1f}"
        )
    print(f"pixels that differ from detectron2's: {differing}")


if __name__ == "__main__":
    main()
