"""Samples: one image on the canvas with its objects; and their collation to a batch of fixed shape."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from giantdet.config.types import DataConfig
from giantdet.data.dataset import Dataset
from giantdet.data.masks import decode_window, object_frames
from giantdet.data.photometric import distort, draw_distortion
from giantdet.data.transforms import (
    Geometry,
    clip_boxes,
    draw_balanced_crop,
    scaled_crop,
    sides_ok,
    transform_boxes,
    transform_semantic,
)
from giantdet.errors import DataError
from giantdet.structures import IGNORE, Batch, Targets

NO_MAP: NDArray[np.uint8] = np.zeros((0, 0), np.uint8)


class Sample(NamedTuple):
    """One image on the canvas with any number of objects."""

    image_hw3: NDArray[np.uint8]  # without the canvas around it
    canvas_hw: tuple[int, int]
    original_hw: tuple[int, int]
    image_id: int
    k: int
    boxes_N4: NDArray[Any]
    labels_N: NDArray[Any]
    masks_NSS: NDArray[np.uint8]
    frames_N4: NDArray[Any]
    counts: dict[str, int]
    bad: tuple[str, ...]  # why images before this one could not be used
    semantic_HW: NDArray[np.uint8]  # [0, 0] if not requested
    window: tuple[int, ...] | None = None  # a row of `Batch.windows_B6`


def make_sample(
    dataset: Dataset,
    i: int,
    k: int,
    config: DataConfig,
    geometry: Geometry,
    targets: frozenset[str],
    rng: np.random.Generator | None = None,
) -> Sample:
    """Return image i of the data set under `geometry`, with the `targets` that are wanted.

    "boxes", "masks", "semantic", or instead of the last "ignored": a map that is 0, and `IGNORE` in regions
    that are neither objects nor background. `rng`, in training, draws what depends on the content: balanced
    crops and colours. Raises `DataError` if the image, a mask or a map is broken, or a requested map does not
    exist.
    """
    semantic = NO_MAP
    if "semantic" in targets:
        found = _semantic_map(dataset, i)
        if rng is not None and config.augment.crop_class_share < 1:
            geometry = draw_balanced_crop(rng, geometry, found, config.augment.crop_class_share)
        semantic = transform_semantic(found, geometry, config.size)
    elif "ignored" in targets:
        semantic = transform_semantic(_ignored_map(dataset, i), geometry, config.size)
    image = scaled_crop(dataset.read_image(i), geometry, exact=rng is None)
    if rng is not None and config.augment.photometric:
        image = distort(image, draw_distortion(rng))
    objects = dataset.objects(i)
    boxes = transform_boxes(objects.boxes_N4, geometry)
    tiny = ~sides_ok(boxes)
    boxes = clip_boxes(boxes, geometry)
    keep = np.flatnonzero(sides_ok(boxes)) if "boxes" in targets else np.zeros(0, np.int64)
    slots = config.max_objects
    counts = {
        "tiny_objects": int(tiny.sum()) if "boxes" in targets else 0,
        "dropped_objects": max(len(keep) - slots, 0),
    }
    if len(keep) > slots:
        sides = boxes[keep, 2:] - boxes[keep, :2]
        keep = np.sort(keep[np.argsort(-sides.prod(axis=1), kind="stable")[:slots]])
    if "masks" in targets:
        bitmaps, frames = object_frames(objects, keep, geometry, boxes[keep], config.mask_frame)
    else:
        bitmaps, frames = np.zeros((len(keep), 0, 0), np.uint8), np.zeros((len(keep), 4), np.float32)
    return Sample(
        image,
        config.size,
        geometry.source_hw,
        int(dataset.image_ids[i]),
        k,
        boxes[keep],
        objects.labels_N[keep],
        bitmaps,
        frames,
        counts,
        (),
        semantic,
    )


def _ignored_map(dataset: Dataset, i: int) -> NDArray[np.uint8]:
    height, width = (int(side) for side in dataset.sizes_hw[i])
    found = np.zeros((height, width), np.uint8)
    name = f"of a crowd region in image {dataset.image_ids[i]}"
    for rle in dataset.ignored(i):
        window = (0, 0, height, width)
        found |= decode_window(rle["counts"], (height, width), window, name) * np.uint8(IGNORE)
    return found


def _semantic_map(dataset: Dataset, i: int) -> NDArray[np.uint8]:
    found = dataset.semantic_map(i)
    if found is None:
        raise DataError(f"{dataset.annotations}: there are no semantic maps, which the model needs")
    if found.shape != tuple(dataset.sizes_hw[i]):
        raise DataError(
            f"the semantic map of {dataset.path(i)} has {found.shape} pixels, not the image's size"
        )
    return found


def collate(samples: list[Sample], slots: int, side: int) -> Batch:
    """Return samples of at most `slots` objects as one batch: M = slots, S = side."""
    size = len(samples)
    images_BHW3 = torch.empty((size, *samples[0].canvas_hw, 3), dtype=torch.uint8)
    targets = Targets(
        boxes_BM4=torch.zeros(size, slots, 4),
        labels_BM=torch.zeros(size, slots, dtype=torch.int64),
        valid_BM=torch.zeros(size, slots, dtype=torch.bool),
        masks_BMSS=torch.zeros(size, slots, side, side, dtype=torch.uint8),
        frames_BM4=torch.zeros(size, slots, 4),
        semantic_BHW=torch.from_numpy(np.stack([sample.semantic_HW for sample in samples])),
    )
    for b, sample in enumerate(samples):
        height, width = sample.image_hw3.shape[:2]
        images_BHW3[b, :height, :width] = torch.from_numpy(sample.image_hw3)
        images_BHW3[b, height:], images_BHW3[b, :height, width:] = 0, 0
        n = len(sample.labels_N)
        targets.boxes_BM4[b, :n] = torch.from_numpy(sample.boxes_N4)
        targets.labels_BM[b, :n] = torch.from_numpy(sample.labels_N)
        targets.valid_BM[b, :n] = True
        targets.masks_BMSS[b, :n] = torch.from_numpy(sample.masks_NSS)
        targets.frames_BM4[b, :n] = torch.from_numpy(sample.frames_N4)
    return Batch(
        images_BHW3.permute(0, 3, 1, 2),  # channels last, as models use them
        torch.tensor([s.image_hw3.shape[:2] for s in samples], dtype=torch.float32),
        targets,
        torch.tensor([s.k for s in samples], dtype=torch.int64),
        torch.tensor([s.image_id for s in samples], dtype=torch.int64),
        torch.tensor([s.original_hw for s in samples], dtype=torch.int64),
        None if samples[0].window is None else torch.tensor([s.window for s in samples], dtype=torch.int64),
    )
