"""The data passed between the parts: batches in, outputs out.

Everything is a `NamedTuple` of tensors whose shapes depend on the configuration alone (B, M, N, R,
D and the canvas H x W are settings, never counts of what an image happens to hold). Named tuples
are plain pytrees, so data loaders pin them, ZeRO-3 finds the tensors in them, and `torch.compile`
and CUDA graphs see through them.

Shape legend, used in the names of all files:
B images · M ground-truth slots · A anchors · N proposals · R sampled RoIs · P mask slots
D detections · C classes (without background) · S side of a mask frame · H, W the padded canvas

Boxes are float32 xyxy in pixels of the padded image. A slot that holds nothing is False in its
`valid` mask and carries zeros elsewhere.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

IGNORE = 255
"""Semantic class of pixels without a label, and of the padding."""


class Targets(NamedTuple):
    """Ground truth of a batch, empty in what the model does not ask for (M, S or H is 0).

    Crowd regions are left out, as detectron2 and torchvision do. The frame of an object without a mask has no
    extent.
    """

    boxes_BM4: Tensor  # float32
    labels_BM: Tensor  # int64 in [0, C)
    valid_BM: Tensor  # bool
    masks_BMSS: Tensor  # uint8 coverage, 0 to 255, in the object's own frame
    frames_BM4: Tensor  # float32 xyxy, the window of the image that the S x S bitmap covers
    semantic_BHW: Tensor = torch.zeros(0, 0, 0, dtype=torch.uint8)  # class of each pixel, or IGNORE


class Batch(NamedTuple):
    """One micro-batch of one rank."""

    images_B3HW: Tensor  # uint8 RGB, zero in the padding
    sizes_B2: Tensor  # float32 (height, width) of each image before padding
    targets: Targets
    seeds_B: Tensor  # int64, number of the sample in the training stream: seeds its RoI sampling
    image_ids_B: Tensor  # int64, the data set's own id; -1 where the slot only fills up the batch
    original_sizes_B2: Tensor  # int64 (height, width) of the file, EXIF rotation applied
    windows_B6: Tensor | None = None
    """int64; what part of an image the canvas shows: (top, left) in the scaled image, (height, width) of that
    image, number of the window and how many the image has. None: all of it."""

    def to(self, device: torch.device | str) -> Batch:
        """Return the batch on `device`; asynchronous from pinned memory."""

        def move(tensor: Tensor) -> Tensor:
            return tensor.to(device, non_blocking=True)

        return self._replace(
            images_B3HW=move(self.images_B3HW),
            sizes_B2=move(self.sizes_B2),
            targets=Targets._make(map(move, self.targets)),
            seeds_B=move(self.seeds_B),
            image_ids_B=move(self.image_ids_B),
            original_sizes_B2=move(self.original_sizes_B2),
        )


def joined(batches: Sequence[Batch]) -> Batch:
    """Return batches of one canvas and as many slots as one batch; all have windows, or none has."""
    windows = [batch.windows_B6 for batch in batches if batch.windows_B6 is not None]
    return Batch(
        images_B3HW=torch.cat([batch.images_B3HW for batch in batches]),
        sizes_B2=torch.cat([batch.sizes_B2 for batch in batches]),
        targets=Targets._make(map(torch.cat, zip(*(batch.targets for batch in batches), strict=True))),
        seeds_B=torch.cat([batch.seeds_B for batch in batches]),
        image_ids_B=torch.cat([batch.image_ids_B for batch in batches]),
        original_sizes_B2=torch.cat([batch.original_sizes_B2 for batch in batches]),
        windows_B6=torch.cat(windows) if windows else None,
    )


class Detections(NamedTuple):
    """Objects found in a batch, best first."""

    boxes_BD4: Tensor  # float32, pixels of the padded image, clipped to each image
    scores_BD: Tensor  # float32 in [0, 1]
    labels_BD: Tensor  # int64 in [0, C)
    valid_BD: Tensor  # bool
    masks_BDSS: Tensor | None  # float32 probabilities in the frame of the box

    def to(self, device: torch.device | str) -> Detections:
        """Return the detections on `device`."""
        moved = [None if tensor is None else tensor.to(device) for tensor in self]
        return Detections._make(moved)


class Outputs(NamedTuple):
    """The outputs of a model in evaluation; None for what it does not predict."""

    detections: Detections | None = None
    semantic_BCHW: Tensor | None = None
    """float32 logits of all classes at stride 4 of the canvas; callers resize them."""
