"""UPerNet (Unified Perceptual Parsing for Scene Understanding, Xiao et al. 2018): backbone and semantic head.

The head has its own pyramid, so there is no `fpn`. A plain ViT has one map where the head needs four; for
those, `semantic_fpn` builds ViTDet's simple pyramid.

Shapes: B images · C classes of pixels · h, w a quarter of the canvas.
Reference: mmsegmentation's `EncoderDecoder` with `UPerHead` and the auxiliary `FCNHead`. The backbone of its
ResNet-50, `ResNetV1c`, is timm's `resnet50c`. Its losses are divided by all pixels: `"loss_divisor": "all"`.
"""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor, nn

from giantdet.architectures.base import Architecture, mean_counts
from giantdet.architectures.class_layers import ClassLayer
from giantdet.config.architectures.common import NormPart
from giantdet.config.architectures.upernet import UperNetConfig
from giantdet.errors import InputError
from giantdet.layers.blocks import recompute
from giantdet.layers.semantic_head import labelled, pixel_loss
from giantdet.layers.uper_head import AuxiliaryHead, UperHead
from giantdet.structures import Batch, Outputs

AUXILIARY_LEVEL = 2
"""Index of C4 in the backbone's maps."""


class Predictions(NamedTuple):
    """Logits of both heads, and the class that each pixel of the canvas should have."""

    logits_BChw: Tensor  # float32, stride 4
    auxiliary_BChw: Tensor | None  # float32, stride of C4; None without the auxiliary head
    labels_BHW: Tensor  # uint8, in [0, C) or IGNORE


class UperNet(Architecture):
    """Classes of pixels; see `Architecture` for the arguments. Raises InputError for plain ViTs too."""

    def __init__(self, config: UperNetConfig, image_size: tuple[int, int]) -> None:
        super().__init__(config, image_size)
        if self.backbone.is_plain:
            raise InputError(
                f"upernet needs four backbone maps, and '{config.backbone.name}' is a plain ViT with one: "
                "choose a hierarchical backbone, such as swin_tiny_patch4_window7_224, or type semantic_fpn"
            )
        channels, self.auxiliary_stride = self.backbone.channels, self.backbone.strides[AUXILIARY_LEVEL]
        self.loss_divisor, self.auxiliary_weight = config.loss_divisor, config.auxiliary_head.loss_weight
        self.decode_head = UperHead(config.decode_head, channels, self.num_classes)
        self.auxiliary_head: AuxiliaryHead | None = None
        if config.auxiliary_head.enabled:
            self.auxiliary_head = AuxiliaryHead(
                config.auxiliary_head, channels[AUXILIARY_LEVEL], self.num_classes
            )
        if config.checkpoint_heads:
            for head in self._heads():
                recompute(head)

    @property
    def targets(self) -> frozenset[str]:
        """See `Architecture.targets`."""
        return frozenset({"semantic"})

    @property
    def tasks(self) -> tuple[str, ...]:
        """See `Architecture.tasks`."""
        return ("semantic",)

    def maps(self, batch: Batch) -> list[Tensor]:
        """Return the backbone's maps C2 to C5, `[B, ., H / s, W / s]`."""
        maps: list[Tensor] = self.backbone(self.normalise(batch.images_B3HW, batch.sizes_B2))
        return maps

    def predict(self, batch: Batch) -> Predictions:
        """Return the logits of both heads and the classes of all pixels; see `Architecture.predict`."""
        maps = self.maps(batch)
        auxiliary = self.auxiliary_head(maps[AUXILIARY_LEVEL]) if self.auxiliary_head is not None else None
        return Predictions(self.decode_head(maps), auxiliary, batch.targets.semantic_BHW)

    def answer(self, batch: Batch) -> Outputs:
        """Return logits at stride 4; see `Architecture.answer`."""
        return Outputs(semantic_BCHW=self.decode_head(self.maps(batch)))

    def losses(self, predictions: Predictions, batch: Batch) -> dict[str, Tensor]:
        """Return `loss_sem_seg`, and the weighted `loss_sem_seg_aux`; see `pixel_loss`."""
        p, divisor = predictions, self.loss_divisor
        losses = {"loss_sem_seg": pixel_loss(p.logits_BChw, p.labels_BHW, divisor)}
        if p.auxiliary_BChw is not None:
            auxiliary = pixel_loss(p.auxiliary_BChw, p.labels_BHW, divisor, self.auxiliary_stride)
            losses["loss_sem_seg_aux"] = self.auxiliary_weight * auxiliary
        return losses

    def counts(self, predictions: Predictions) -> dict[str, Tensor]:
        """Return the number of pixels that have a class."""
        return mean_counts({"labelled_pixels": labelled(predictions.labels_BHW).flatten(1)})

    def class_layers(self) -> tuple[ClassLayer, ...]:
        """See `Architecture.class_layers`."""
        heads = ("decode_head", "auxiliary_head")
        return tuple(ClassLayer(f"{head}.classes.", "semantic") for head in heads)

    def norm_parts(self) -> dict[NormPart, tuple[nn.Module, ...]]:
        """See `Architecture.norm_parts`."""
        return {"heads": self._heads()}

    def _heads(self) -> tuple[nn.Module, ...]:
        return tuple(head for head in (self.decode_head, self.auxiliary_head) if head is not None)
