"""Semantic FPN (Kirillov et al. 2019, "Panoptic Feature Pyramid Networks"): backbone, pyramid, semantic head.

Shapes: B images · C classes of pixels · h, w a quarter of the canvas.
References: detectron2's `SemanticSegmentor` with `SemSegFPNHead`, and mmsegmentation's `FPNHead`, which has
batch norms, dropout and another divisor of the loss: `"semantic_head": {"norm": "batch", "dropout": 0.1,
"loss_divisor": "all"}`.
"""

from __future__ import annotations

from torch import Tensor, nn

from giantdet.architectures.base import Architecture, mean_counts
from giantdet.architectures.class_layers import ClassLayer
from giantdet.config.architectures.common import NormPart
from giantdet.config.architectures.semantic_fpn import SemanticFpnConfig
from giantdet.layers.blocks import recompute
from giantdet.layers.fpn import build_fpn
from giantdet.layers.semantic_head import SemanticHead, SemanticPredictions, labelled, semantic_loss
from giantdet.structures import Batch, Outputs

LEVELS = 4
"""P2 to P5."""


class SemanticFpn(Architecture):
    """Classes of pixels; see `Architecture` for the arguments."""

    def __init__(self, config: SemanticFpnConfig, image_size: tuple[int, int]) -> None:
        super().__init__(config, image_size)
        backbone, channels = self.backbone, config.fpn.channels
        self.loss_divisor = config.semantic_head.loss_divisor
        self.fpn = build_fpn(config.fpn, backbone.channels, backbone.strides, backbone.is_plain)
        strides = self.fpn.strides[:LEVELS]
        self.semantic_head = SemanticHead(config.semantic_head, channels, strides, self.num_classes)
        if config.checkpoint_heads:
            recompute(self.fpn)
            recompute(self.semantic_head)

    @property
    def targets(self) -> frozenset[str]:
        """See `Architecture.targets`."""
        return frozenset({"semantic"})

    @property
    def tasks(self) -> tuple[str, ...]:
        """See `Architecture.tasks`."""
        return ("semantic",)

    def logits(self, batch: Batch) -> Tensor:
        """Return the logits, float32 `[B, C, h, w]` at stride 4."""
        levels = self.fpn(self.backbone(self.normalise(batch.images_B3HW, batch.sizes_B2)))
        logits_BChw: Tensor = self.semantic_head(levels[:LEVELS])
        return logits_BChw

    def predict(self, batch: Batch) -> SemanticPredictions:
        """Return the logits and the classes of all pixels; see `Architecture.predict`."""
        return SemanticPredictions(self.logits(batch), batch.targets.semantic_BHW)

    def answer(self, batch: Batch) -> Outputs:
        """Return logits at stride 4; see `Architecture.answer`."""
        return Outputs(semantic_BCHW=self.logits(batch))

    def losses(self, predictions: SemanticPredictions, batch: Batch) -> dict[str, Tensor]:
        """See `semantic_loss`."""
        return semantic_loss(predictions, self.loss_divisor)

    def counts(self, predictions: SemanticPredictions) -> dict[str, Tensor]:
        """Return the number of pixels that have a class."""
        return mean_counts({"labelled_pixels": labelled(predictions.labels_BHW).flatten(1)})

    def class_layers(self) -> tuple[ClassLayer, ...]:
        """See `Architecture.class_layers`."""
        return (ClassLayer("semantic_head.classes.", "semantic"),)

    def norm_parts(self) -> dict[NormPart, tuple[nn.Module, ...]]:
        """See `Architecture.norm_parts`."""
        return {"fpn": (self.fpn,), "heads": (self.semantic_head,)}
