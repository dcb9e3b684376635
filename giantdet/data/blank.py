"""Training batches without images, of the shapes that a run's data have: to count, to try and to capture."""

from __future__ import annotations

import torch
from torch import Tensor

from giantdet.config.types import DataConfig
from giantdet.structures import Batch, Targets


def empty_batch(data: DataConfig, images: int, wanted: frozenset[str]) -> Batch:
    """Return an uninitialised training batch with the `wanted` targets of a model."""
    height, width = data.size
    slots = data.max_objects if "boxes" in wanted else 0
    side = data.mask_frame if "masks" in wanted else 0

    def empty(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.empty(images, *shape, dtype=dtype)

    targets = Targets(
        boxes_BM4=empty(slots, 4),
        labels_BM=empty(slots, dtype=torch.int64),
        valid_BM=empty(slots, dtype=torch.bool),
        masks_BMSS=empty(slots, side, side, dtype=torch.uint8),
        frames_BM4=empty(slots, 4),
        semantic_BHW=empty(
            *((height, width) if wanted & {"semantic", "ignored"} else (0, 0)), dtype=torch.uint8
        ),
    )
    return Batch(
        images_B3HW=empty(3, height, width, dtype=torch.uint8),
        sizes_B2=empty(2),
        targets=targets,
        seeds_B=empty(dtype=torch.int64),
        image_ids_B=empty(dtype=torch.int64),
        original_sizes_B2=empty(2, dtype=torch.int64),
    )


def blank_batch(data: DataConfig, images: int, wanted: frozenset[str]) -> Batch:
    """Return a batch of noise that fills the canvas, without objects."""
    batch = empty_batch(data, images, wanted)
    height, width = data.size
    return batch._replace(
        images_B3HW=torch.randint(0, 255, batch.images_B3HW.shape, dtype=torch.uint8),
        sizes_B2=torch.tensor([[float(height), float(width)]]).repeat(images, 1),
        seeds_B=torch.arange(images),
        image_ids_B=torch.arange(images),
        original_sizes_B2=torch.tensor([[height, width]]).repeat(images, 1),
        targets=Targets._make(map(torch.zeros_like, batch.targets)),
    )
