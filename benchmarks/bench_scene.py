"""Inputs of the benchmarks: random images and objects in both sides' formats, and the model's settings."""

from __future__ import annotations

import argparse
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from giantdet.config.architectures.mask_rcnn import MaskRcnnConfig
from giantdet.data.masks import mask_runs, to_frames
from giantdet.data.transforms import Geometry
from giantdet.structures import Batch, Targets

CLASSES = 90


class Scene(NamedTuple):
    """Random images and the objects on them, independent of either side's input format."""

    images_B3HW: Tensor  # uint8
    boxes_BN4: Tensor
    labels_BN: Tensor  # in [0, C)
    bitmaps_BNHW: Tensor  # uint8 0/1


def make_scene(size: int | tuple[int, int], batch: int, objects: int, seed: int = 0) -> Scene:
    """Return blurred noise with filled ellipses of a sixteenth to a half of the image's shorter side.

    `size` is the side of a square, or (height, width).
    """
    generator = torch.Generator().manual_seed(seed)
    height, width = (size, size) if isinstance(size, int) else size

    def rand(*shape: int) -> Tensor:
        return torch.rand(*shape, generator=generator)

    noise = rand(batch, 3, height // 16, width // 16)
    images = nn.functional.interpolate(noise, size=(height, width), mode="bilinear") * 200
    sides = min(height, width) / 2 ** (1 + 3 * rand(batch, objects, 2))
    corner = rand(batch, objects, 2) * (torch.tensor([width, height]) - sides)
    boxes = torch.cat([corner, corner + sides], -1).round()
    center, radius = (boxes[..., 2:] + boxes[..., :2]) / 2, (boxes[..., 2:] - boxes[..., :2]) / 2
    x = ((torch.arange(width) + 0.5 - center[..., :1]) / radius[..., :1]) ** 2
    y = ((torch.arange(height) + 0.5 - center[..., 1:]) / radius[..., 1:]) ** 2
    bitmaps = (y[..., :, None] + x[..., None, :]) <= 1
    for n in range(objects):
        images += bitmaps[:, n, None] * 55 * rand(batch, 3, 1, 1)
    labels = torch.randint(CLASSES, (batch, objects), generator=generator)
    return Scene(images.clamp(0, 255).to(torch.uint8), boxes, labels, bitmaps.to(torch.uint8))


def giantdet_batch(scene: Scene, slots: int, frame: int) -> Batch:
    """Return the scene as giantdet's loader would: `slots` objects per image, masks `frame` cells wide."""
    batch, objects = scene.labels_BN.shape
    height, width = scene.images_B3HW.shape[-2:]
    size = (height, width)
    geometry = Geometry(size, size, (0, 0), size, flip=False)
    masks, frames = np.zeros((batch, slots, frame, frame), np.uint8), np.zeros((batch, slots, 4), np.float32)
    for b in range(batch):
        runs = [mask_runs(bitmap_HW.numpy()) for bitmap_HW in scene.bitmaps_BNHW[b]]
        masks[b, :objects], frames[b, :objects] = to_frames(runs, geometry, scene.boxes_BN4[b].numpy(), frame)

    def pad(values: Tensor) -> Tensor:
        padded = values.new_zeros(batch, slots, *values.shape[2:])
        padded[:, :objects] = values
        return padded

    targets = Targets(
        boxes_BM4=pad(scene.boxes_BN4),
        labels_BM=pad(scene.labels_BN),
        valid_BM=pad(torch.ones(batch, objects, dtype=torch.bool)),
        masks_BMSS=torch.from_numpy(masks),
        frames_BM4=torch.from_numpy(frames),
    )
    return Batch(
        images_B3HW=scene.images_B3HW,
        sizes_B2=torch.tensor([[float(height), float(width)]]).repeat(batch, 1),
        targets=targets,
        seeds_B=torch.arange(batch),
        image_ids_B=torch.arange(batch),
        original_sizes_B2=torch.tensor([[height, width]]).repeat(batch, 1),
    )


def torchvision_inputs(scene: Scene) -> tuple[list[Tensor], list[dict[str, Tensor]]]:
    """Return the scene in the input format of torchvision's detectors: images in [0, 1], labels from 1."""
    targets = [
        {"boxes": boxes, "labels": labels + 1, "masks": masks}
        for boxes, labels, masks in zip(scene.boxes_BN4, scene.labels_BN, scene.bitmaps_BNHW, strict=True)
    ]
    return list(scene.images_B3HW.float() / 255), targets


def model_config(args: argparse.Namespace) -> MaskRcnnConfig:
    """Return the model's settings, torchvision's where the two differ, so that both do the same work."""
    return MaskRcnnConfig.model_validate(
        {
            "num_classes": CLASSES,
            "conventions": "torchvision",
            "backbone": {"name": args.backbone},
            "rpn": {"post_nms_train": 2000, "loss_pass": "sampled"},
            "box_head": {"batch_per_image": args.rois},
            "mask_head": {"slots": args.mask_slots},
        }
    )
