"""Batches of one image for prediction: on the canvas, in windows, or at several scales and mirrored.

Scales and flips are those of multi-scale testing, as in detectron2's `DatasetMapperTTA`: for each short side
a view and its mirror image, resized with Pillow's bilinear filter. As in `GeneralizedRCNNWithTTA`, a few
views at a time are padded to the largest of them.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
from numpy.typing import NDArray

from giantdet.config.types import DataConfig, TtaConfig
from giantdet.data.transforms import Geometry, draw_geometry, transform_image, window_row, windows
from giantdet.structures import Batch, Targets


def views_of(size_hw: tuple[int, int], config: TtaConfig) -> list[Geometry]:
    """Return the views of an image of (height, width), as many for every image."""
    views = []
    for short_side in config.short_sides:
        resized = _resized(size_hw, short_side, config.max_side)
        for flip in (False, True) if config.flip else (False,):
            views.append(Geometry(size_hw, resized, (0, 0), resized, flip))
    return views


def _resized(size_hw: tuple[int, int], short_side: int, max_side: int) -> tuple[int, int]:
    """Return the size with this short side, or a smaller one by `max_side` (ResizeShortestEdge)."""
    height, width = size_hw
    scale = short_side / min(height, width)
    # The short side is a whole number before the limit of the other one is applied.
    new = [short_side, scale * width] if height < width else [scale * height, short_side]
    if max(new) > max_side:
        new = [side * max_side / max(new) for side in new]
    return max(int(new[0] + 0.5), 1), max(int(new[1] + 0.5), 1)


def passes_of(views: list[Geometry], views_at_a_time: int) -> list[list[Geometry]]:
    """Return the views in the groups that the model takes at a time."""
    return [views[first : first + views_at_a_time] for first in range(0, len(views), views_at_a_time)]


def view_batch(pixels_HW3: NDArray[np.uint8], views: list[Geometry], multiple: int, number: int) -> Batch:
    """Return views of one image as a batch without targets.

    The canvas is the smallest one, of sides that are multiples of `multiple`, that holds all of them.
    """
    sides = [max(view.size_hw[axis] for view in views) for axis in (0, 1)]
    canvas = (-(-sides[0] // multiple) * multiple, -(-sides[1] // multiple) * multiple)
    images = np.stack([transform_image(pixels_HW3, view, canvas, exact=True) for view in views])
    count = len(views)
    return Batch(
        images_B3HW=torch.from_numpy(images).permute(0, 3, 1, 2),
        sizes_B2=torch.tensor([view.size_hw for view in views], dtype=torch.float32),
        targets=no_targets(count),
        seeds_B=torch.zeros(count, dtype=torch.int64),
        image_ids_B=torch.full((count,), number),
        original_sizes_B2=torch.tensor([view.source_hw for view in views]),
    )


def image_batch(pixels_HW3: NDArray[np.uint8], config: DataConfig) -> Batch:
    """Return a batch of one image, scaled to the canvas as in evaluation, without targets."""
    (batch,) = image_batches(pixels_HW3, config, None)
    return batch


def image_batches(
    pixels_HW3: NDArray[np.uint8], config: DataConfig, window_stride: int | None, number: int = 0
) -> Iterator[Batch]:
    """Yield batches of one view of an image as in evaluation, without targets: the image, or its windows.

    `number` is the id of the image in them.
    """
    size_hw = (pixels_HW3.shape[0], pixels_HW3.shape[1])
    if window_stride is None:
        views = [draw_geometry(np.random.default_rng(0), size_hw, config, training=False)]
    else:
        views = windows(size_hw, config, window_stride)
    for n, view in enumerate(views):
        canvas = transform_image(pixels_HW3, view, config.size, exact=True)
        row = None if window_stride is None else torch.tensor([window_row(views, n)])
        yield Batch(
            images_B3HW=torch.from_numpy(canvas).permute(2, 0, 1)[None],
            sizes_B2=torch.tensor([view.size_hw], dtype=torch.float32),
            targets=no_targets(1),
            seeds_B=torch.zeros(1, dtype=torch.int64),
            image_ids_B=torch.tensor([number]),
            original_sizes_B2=torch.tensor([size_hw]),
            windows_B6=row,
        )


def whole_image(pixels_HW3: NDArray[np.uint8], number: int) -> Batch:
    """Return an image as it is, for `MultiScale`; `number` is its id."""
    size_hw = (pixels_HW3.shape[0], pixels_HW3.shape[1])
    return Batch(
        images_B3HW=torch.from_numpy(pixels_HW3).permute(2, 0, 1)[None],
        sizes_B2=torch.tensor([size_hw], dtype=torch.float32),
        targets=no_targets(1),
        seeds_B=torch.zeros(1, dtype=torch.int64),
        image_ids_B=torch.tensor([number]),
        original_sizes_B2=torch.tensor([size_hw]),
    )


def no_targets(batch: int) -> Targets:
    """Return the targets of a batch with zero slots per image."""
    return Targets(
        boxes_BM4=torch.zeros(batch, 0, 4),
        labels_BM=torch.zeros(batch, 0, dtype=torch.int64),
        valid_BM=torch.zeros(batch, 0, dtype=torch.bool),
        masks_BMSS=torch.zeros(batch, 0, 0, 0, dtype=torch.uint8),
        frames_BM4=torch.zeros(batch, 0, 4),
    )
