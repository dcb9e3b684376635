"""What a trainable model is to everything outside of this folder.

A plain single-process module that knows nothing of ranks, ZeRO, files or COCO. Every part runs in every
forward, whatever the images hold, so that no rank of a partitioned model waits for another.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from giantdet.config.architectures.common import ArchitectureConfig, NormPart
from giantdet.errors import InputError
from giantdet.layers.backbone import build_backbone
from giantdet.layers.body import Backbone
from giantdet.structures import Batch, Outputs


class Architecture(nn.Module):
    """A trainable model. Its top-level children are the modules whose gradient variances AGVM compares.

    Args:
        config: the model's section of the run's JSON, "auto" values resolved.
        image_size: (height, width) of the canvas, multiples of 32.

    Raises InputError where the number of classes is unknown, and for a backbone or canvas that does not fit.
    """

    CLASS_LAYERS: ClassVar[tuple[str, ...]] = ()
    """Prefixes of the parameters whose first dimension counts classes: other classes start them afresh."""

    def __init__(self, config: ArchitectureConfig, image_size: tuple[int, int]) -> None:
        super().__init__()
        if config.num_classes == "auto":
            raise InputError(
                "model.num_classes is still 'auto': give a number, or a training set to read it from"
            )
        self.num_classes = int(config.num_classes)
        self.conventions = config.reference
        self.backbone: Backbone = build_backbone(config.backbone, image_size)
        mean, std = self.backbone.mean, self.backbone.std
        self.pixel_scale = tuple(1.0 / (255.0 * s) for s in std)
        self.pixel_shift = tuple(-m / s for m, s in zip(mean, std, strict=True))

    @property
    def targets(self) -> frozenset[str]:
        """What training needs of a data set: "boxes", "masks", "semantic"."""
        raise NotImplementedError

    @property
    def tasks(self) -> tuple[str, ...]:
        """What it predicts, by the names of the evaluators' scores; the last one is the run's primary one."""
        raise NotImplementedError

    def forward(self, batch: Batch) -> Any:
        """What `losses` takes in training, `Outputs` in evaluation; the shapes are the configuration's."""
        return self.predict(batch) if self.training else self.answer(batch)

    def predict(self, batch: Batch) -> NamedTuple:
        """The predictions that are trained, paired with what they should be."""
        raise NotImplementedError

    def answer(self, batch: Batch) -> Outputs:
        """What the model finds in the images."""
        raise NotImplementedError

    def losses(self, predictions: Any, batch: Batch) -> dict[str, Tensor]:
        """Scalars, whose plain sum is minimised."""
        raise NotImplementedError

    def counts(self, predictions: Any) -> dict[str, Tensor]:
        """How much of the fixed shapes did work, for the log: means per image, still on the device."""
        raise NotImplementedError

    def norm_parts(self) -> dict[NormPart, tuple[nn.Module, ...]]:
        """Which modules the parts of the `norm` block stand for; the backbone is not among them."""
        raise NotImplementedError

    def translate(self, state: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """Weights of another project in this model's names; what is not recognised is returned as it is."""
        return state

    def normalise(self, images_B3HW: Tensor, sizes_B2: Tensor) -> Tensor:
        """uint8 pixels to the backbone's units and dtype; the padding stays exactly zero.

        Channels last: convolutions pass the layout on, and run faster in it on CPUs and in bf16 on GPUs.
        """
        device = images_B3HW.device
        height, width = images_B3HW.shape[-2:]
        rows = torch.arange(height, device=device) < sizes_B2[:, :1]
        columns = torch.arange(width, device=device) < sizes_B2[:, 1:]
        inside_B1HW = (rows[:, :, None] & columns[:, None, :])[:, None]
        # Python scalars, channel by channel: a tensor of constants would be a copy that the GPU waits for.
        channels = zip(images_B3HW.float().unbind(1), self.pixel_scale, self.pixel_shift, strict=True)
        pixels_B3HW = torch.stack([pixels * scale + shift for pixels, scale, shift in channels], 1)
        pixels_B3HW = torch.where(inside_B1HW, pixels_B3HW, 0.0).to(next(self.parameters()).dtype)
        return pixels_B3HW.contiguous(memory_format=torch.channels_last)


def total_loss(losses: dict[str, Tensor]) -> Tensor:
    """The sum that is differentiated, a scalar."""
    return torch.stack(list(losses.values())).sum()


def mean_counts(masks: dict[str, Tensor]) -> dict[str, Tensor]:
    """The mean number of True slots an image of masks `[B, N]`."""
    return {name: mask.sum(1, dtype=torch.float32).mean() for name, mask in masks.items()}
