"""Panoptic FPN (Kirillov et al. 2019): Mask R-CNN with a semantic head on its pyramid.

Class 0 of the semantic head stands for all objects ("things"), the others are stuff.
Reference: detectron2's `PanopticFPN`; how both become one map is in `evaluation/panoptic.py`.
"""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor, nn

from giantdet.architectures import mask_rcnn
from giantdet.architectures.base import mean_counts
from giantdet.architectures.class_layers import ClassLayer
from giantdet.architectures.mask_rcnn import MaskRcnn
from giantdet.config.architectures.common import NormPart
from giantdet.config.architectures.panoptic_fpn import PanopticFpnConfig
from giantdet.layers.blocks import recompute
from giantdet.layers.roi_pool import ROI_LEVELS
from giantdet.layers.semantic_head import SemanticHead, SemanticPredictions, labelled, semantic_loss
from giantdet.structures import Batch, Outputs

INSTANCE_LOSSES = ("loss_cls", "loss_box_reg", "loss_mask")


class Predictions(NamedTuple):
    """The predictions that are trained, with their targets."""

    objects: mask_rcnn.Predictions
    semantic: SemanticPredictions


class PanopticFpn(MaskRcnn):
    """Objects with masks, and classes of pixels; see `Architecture` for the arguments."""

    WITHOUT_MASKS = ""

    def __init__(self, config: PanopticFpnConfig, image_size: tuple[int, int]) -> None:
        super().__init__(config, image_size)
        self.semantic_weight, self.instance_weight = config.semantic_loss_weight, config.instance_loss_weight
        self.loss_divisor = config.semantic_head.loss_divisor
        self.semantic_head = SemanticHead(
            config.semantic_head,
            config.fpn.channels,
            self.fpn.strides[:ROI_LEVELS],
            1 + int(config.num_stuff_classes),
        )
        if config.checkpoint_heads:
            recompute(self.semantic_head)

    @property
    def targets(self) -> frozenset[str]:
        """See `Architecture.targets`."""
        return super().targets | {"semantic"}

    @property
    def tasks(self) -> tuple[str, ...]:
        """See `Architecture.tasks`."""
        return (*super().tasks, "semantic", "panoptic")

    def predict(self, batch: Batch) -> Predictions:  # type: ignore[override]
        """Return the predictions of all heads; see `Architecture.predict`."""
        levels = self.pyramid(batch)
        logits_BChw = self.semantic_head(levels[:ROI_LEVELS])
        return Predictions(
            objects=self.predict_objects(levels, batch),
            semantic=SemanticPredictions(logits_BChw, batch.targets.semantic_BHW),
        )

    def answer(self, batch: Batch) -> Outputs:
        """Return detections with masks, and logits at stride 4; see `Architecture.answer`."""
        levels = self.pyramid(batch)
        return Outputs(self.detect(levels, batch), self.semantic_head(levels[:ROI_LEVELS]))

    def losses(self, predictions: Predictions, batch: Batch) -> dict[str, Tensor]:  # type: ignore[override]
        """Return Mask R-CNN's losses and the semantic one, weighted."""
        losses = super().losses(predictions.objects, batch)
        losses |= {name: self.instance_weight * losses[name] for name in INSTANCE_LOSSES}
        semantic = semantic_loss(predictions.semantic, self.loss_divisor)
        return losses | {name: self.semantic_weight * loss for name, loss in semantic.items()}

    def counts(self, predictions: Predictions) -> dict[str, Tensor]:  # type: ignore[override]
        """Return Mask R-CNN's counts, and the number of pixels that have a class."""
        pixels_BX = labelled(predictions.semantic.labels_BHW).flatten(1)
        return super().counts(predictions.objects) | mean_counts({"labelled_pixels": pixels_BX})

    def class_layers(self) -> tuple[ClassLayer, ...]:
        """See `Architecture.class_layers`."""
        return (*super().class_layers(), ClassLayer("semantic_head.classes.", "stuff", before=1))

    def norm_parts(self) -> dict[NormPart, tuple[nn.Module, ...]]:
        """See `Architecture.norm_parts`."""
        parts = super().norm_parts()
        return parts | {"heads": (*parts["heads"], self.semantic_head)}
