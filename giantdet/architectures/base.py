"""The interface of all trainable models.

A model is a plain single-process module that does not depend on ranks, ZeRO, files or COCO. Every part runs
in every forward pass, whatever the images contain, so that the collectives of a partitioned model match.
"""

from __future__ import annotations

from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from giantdet.architectures.class_layers import ClassLayer
from giantdet.config.architectures.common import ArchitectureConfig, NormPart
from giantdet.errors import InputError
from giantdet.layers.backbone import build_backbone
from giantdet.layers.body import Backbone
from giantdet.structures import Batch, Detections, Outputs


class Architecture(nn.Module):
    """A trainable model. Its top-level children are the modules whose gradient variances AGVM compares.

    Args:
        config: the model's section of the run's JSON, "auto" values resolved.
        image_size: (height, width) of the canvas, multiples of 32.

    Raises InputError where the number of classes is unknown, and for a backbone or canvas that does not fit.
    """

    WITHOUT_MASKS: ClassVar[str] = ""
    """Advice for training on a data set without masks, as the end of an error message."""
    OWN_STATE: ClassVar[frozenset[str]] = frozenset()
    """Names of buffers that other projects' models do not have."""
    OPTIONAL_PARTS: ClassVar[tuple[str, ...]] = ()
    """Top-level modules that initial weights may lack altogether; they then start with new weights."""

    def __init__(self, config: ArchitectureConfig, image_size: tuple[int, int]) -> None:
        super().__init__()
        for key in config.class_keys:
            if getattr(config, key) == "auto":
                raise InputError(
                    f"model.{key} is still 'auto': give a number, or a training set to read it from"
                )
        self.num_classes = int(config.num_classes)
        self.conventions = config.reference
        self.canvas = image_size
        self.backbone: Backbone = build_backbone(config.backbone, image_size)
        mean, std = self.backbone.mean, self.backbone.std
        self.pixel_scale = tuple(1.0 / (255.0 * s) for s in std)
        self.pixel_shift = tuple(-m / s for m, s in zip(mean, std, strict=True))

    def add_optional_parts(self, state: dict[str, Tensor]) -> list[str]:
        """Add this model's own tensors of each of `OPTIONAL_PARTS` that `state` lacks; return their names."""
        own = self.state_dict()
        added = []
        for part in self.OPTIONAL_PARTS:
            missing = {key: tensor for key, tensor in own.items() if key.startswith(f"{part}.")}
            if missing and not any(key.startswith(f"{part}.") for key in state):
                state |= missing
                added.append(part)
        return added

    @property
    def targets(self) -> frozenset[str]:
        """The targets that training needs, of "boxes", "masks", "semantic" and "ignored"."""
        raise NotImplementedError

    @property
    def tasks(self) -> tuple[str, ...]:
        """The tasks that the model is scored on, by the evaluators' names; the last is the primary one."""
        raise NotImplementedError

    def forward(self, batch: Batch, found: Detections | None = None) -> Any:
        """Return the input of `losses` in training, and `Outputs` in evaluation.

        Their shapes depend only on the configuration and the number of images. In evaluation, with the boxes
        and classes of objects that were `found`, the outputs are these objects with their masks.
        """
        if found is not None:
            return Outputs(self.masks_of(batch, found))
        return self.predict(batch) if self.training else self.answer(batch)

    def set_canvas(self, image_size: tuple[int, int]) -> None:
        """Take images on another canvas from now on, for evaluation at several scales.

        Raises InputError for a backbone that is built for one size.
        """
        if image_size == self.canvas:
            return
        if self.backbone.one_size:
            raise InputError(f"{self.backbone.one_size} is built for one image size")
        self.backbone.set_canvas(image_size)
        self.canvas = image_size
        for module in self.modules():
            if hasattr(module, "image_size"):
                setattr(module, "image_size", image_size)  # noqa: B010 - mypy takes attributes for modules

    def predict(self, batch: Batch) -> NamedTuple:
        """Return the predictions that are trained, with their targets."""
        raise NotImplementedError

    def answer(self, batch: Batch) -> Outputs:
        """Return the outputs for the images, such as detections."""
        raise NotImplementedError

    def masks_of(self, batch: Batch, found: Detections) -> Detections:
        """Return the objects with mask probabilities in their boxes; only for models of masks."""
        raise NotImplementedError

    def losses(self, predictions: Any, batch: Batch) -> dict[str, Tensor]:
        """Return the losses, scalars whose sum is minimised."""
        raise NotImplementedError

    def counts(self, predictions: Any) -> dict[str, Tensor]:
        """Return numbers of used slots for the log: means per image, on the device."""
        raise NotImplementedError

    def norm_parts(self) -> dict[NormPart, tuple[nn.Module, ...]]:
        """Return the modules of each part of the `norm` block, except the backbone."""
        raise NotImplementedError

    def class_layers(self) -> tuple[ClassLayer, ...]:
        """Return the layers whose rows belong to classes, which initial weights are matched with by name."""
        raise NotImplementedError

    def normalise(self, images_B3HW: Tensor, sizes_B2: Tensor) -> Tensor:
        """Return uint8 images normalised for the backbone, `[B, 3, H, W]` in its dtype; the padding is zero.

        `sizes_B2` is (height, width) of each image in pixels, without padding. The result is channels-last:
        convolutions keep this layout, and are faster in it on CPUs and in bf16 on GPUs.
        """
        device = images_B3HW.device
        height, width = images_B3HW.shape[-2:]
        rows = torch.arange(height, device=device) < sizes_B2[:, :1]
        columns = torch.arange(width, device=device) < sizes_B2[:, 1:]
        inside_B1HW = (rows[:, :, None] & columns[:, None, :])[:, None]
        # Python scalars, channel by channel: copying a tensor of constants to the GPU would synchronise.
        channels = zip(images_B3HW.float().unbind(1), self.pixel_scale, self.pixel_shift, strict=True)
        pixels_B3HW = torch.stack([pixels * scale + shift for pixels, scale, shift in channels], 1)
        pixels_B3HW = torch.where(inside_B1HW, pixels_B3HW, 0.0).to(next(self.parameters()).dtype)
        return pixels_B3HW.contiguous(memory_format=torch.channels_last)


def total_loss(losses: dict[str, Tensor]) -> Tensor:
    """Return the sum of the losses, the scalar that is differentiated."""
    return torch.stack(list(losses.values())).sum()


def mean_counts(masks: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return the mean number of True slots per image, of bool masks `[B, N]`."""
    return {name: mask.sum(1, dtype=torch.float32).mean() for name, mask in masks.items()}
