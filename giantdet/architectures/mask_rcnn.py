"""Mask R-CNN: backbone, pyramid, RPN, box head, mask head, in fixed shapes from end to end.

A plain single-process module: no word of ranks, ZeRO or precision policies in here. Every part runs
in every forward, whatever the images hold, so that no rank of a sharded run waits for another.
Shapes: B images · N proposals · R sampled RoIs · P mask slots · D detections · C classes.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from giantdet.config.types import ModelConfig, NormConfig
from giantdet.errors import InputError
from giantdet.layers.backbone import build_backbone
from giantdet.layers.blocks import recompute
from giantdet.layers.box_head import (
    BoxHead,
    SampledRois,
    sample_rois,
    select_detections,
    training_predictions,
)
from giantdet.layers.fpn import LEVELS, build_fpn
from giantdet.layers.mask_head import MaskHead
from giantdet.layers.norm import apply_norm
from giantdet.layers.rpn import Rpn
from giantdet.ops.masks import mask_targets
from giantdet.ops.roi_align import roi_align_pyramid
from giantdet.structures import Batch, Detections, MaskPredictions, Predictions, Targets

STRIDES = tuple(4 * 2**level for level in range(LEVELS))
# The coarsest level serves the RPN alone; RoIs are read from P2 to P5.
ROI_LEVELS = LEVELS - 1


class Detector(nn.Module):
    """Two-stage detector. In training it returns `Predictions`, in evaluation `Detections`.

    Args:
        config: the model's section of the run's JSON, "auto" values resolved.
        image_size: (height, width) of the canvas, multiples of 32.
    """

    def __init__(self, config: ModelConfig, image_size: tuple[int, int]) -> None:
        super().__init__()
        if config.num_classes == "auto":
            raise InputError(
                "model.num_classes is still 'auto': give a number, or a training set to read it from"
            )
        self.config = config
        self.num_classes = num_classes = int(config.num_classes)
        self.torchvision = config.conventions == "torchvision"
        channels = config.fpn.channels
        self.backbone = build_backbone(config.backbone, image_size)
        self.fpn = build_fpn(
            config.fpn, self.backbone.channels, self.backbone.strides, self.backbone.is_plain
        )
        self.rpn = Rpn(config.rpn, channels, STRIDES, image_size, self.torchvision)
        self.box_head = BoxHead(config.box_head, channels, num_classes)
        self.mask_head = (
            MaskHead(config.mask_head, channels, num_classes) if config.mask_head.enabled else None
        )
        mean, std = self.backbone.mean, self.backbone.std
        self.pixel_scale = tuple(1.0 / (255.0 * s) for s in std)
        self.pixel_shift = tuple(-m / s for m, s in zip(mean, std, strict=True))

    def forward(self, batch: Batch) -> Predictions | Detections:
        levels = self.fpn(self.backbone(self.normalise(batch.images_B3HW, batch.sizes_B2)))
        return self.train_heads(levels, batch) if self.training else self.detect(levels, batch)

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

    def train_heads(self, levels: list[Tensor], batch: Batch) -> Predictions:
        targets = batch.targets
        proposals, rpn = self.rpn(levels, batch.sizes_B2, targets, batch.seeds_B)
        assert rpn is not None
        rois = sample_rois(proposals, targets, self.config.box_head, self.num_classes, batch.seeds_B)
        box_config = self.config.box_head
        features = self.pool(levels, rois.boxes_BR4, box_config.resolution, box_config.sampling_ratio)
        logits, deltas = self.box_head(features)
        box = training_predictions(logits, deltas, rois, targets)
        mask = self.mask_training_predictions(levels, rois, targets) if self.mask_head is not None else None
        return Predictions(rpn=rpn, box=box, mask=mask)

    def mask_training_predictions(
        self, levels: list[Tensor], rois: SampledRois, targets: Targets
    ) -> MaskPredictions:
        """Masks of the first P RoIs: positives come first, in random order."""
        assert self.mask_head is not None
        config = self.config.mask_head
        slots = min(config.slots, rois.positive_BR.shape[1])
        valid_BP, index_BP = rois.positive_BR[:, :slots], rois.index_BR[:, :slots]
        # Adaptive sampling takes a point a cell: an unused slot's box of any size would cost time.
        boxes_BP4 = rois.boxes_BR4[:, :slots].where(valid_BP[..., None], 0.0)
        label_BP = rois.labels_BR[:, :slots].where(valid_BP, 0)
        features = self.pool(levels, boxes_BP4, config.resolution, config.sampling_ratio)
        logits = self.mask_head(features, label_BP.flatten())
        side = logits.shape[-1]
        goals_BPSS = mask_targets(
            targets.masks_BMSS,
            targets.frames_BM4,
            index_BP,
            boxes_BP4,
            side,
            aligned=not self.torchvision,
            binarize=not self.torchvision,
        )
        return MaskPredictions(
            logits_BPSS=logits.reshape(*valid_BP.shape, side, side),
            targets_BPSS=goals_BPSS,
            valid_BP=valid_BP,
        )

    def detect(self, levels: list[Tensor], batch: Batch) -> Detections:
        proposals, _ = self.rpn(levels, batch.sizes_B2, None, batch.seeds_B)
        config = self.config.box_head
        features = self.pool(levels, proposals.boxes_BN4, config.resolution, config.sampling_ratio)
        min_size = 1e-2 if self.torchvision else 0.0
        logits, deltas = self.box_head(features)
        found = select_detections(logits, deltas, proposals, batch.sizes_B2, config, min_size)
        if self.mask_head is None:
            return found
        mask_config = self.config.mask_head
        features = self.pool(levels, found.boxes_BD4, mask_config.resolution, mask_config.sampling_ratio)
        masks = self.mask_head(features, found.labels_BD.flatten()).sigmoid()
        return found._replace(masks_BDSS=masks.reshape(*found.labels_BD.shape, *masks.shape[-2:]))

    def pool(self, levels: list[Tensor], boxes_BR4: Tensor, resolution: int, sampling_ratio: int) -> Tensor:
        """RoIAlign over P2 to P5: `[B*R, C, resolution, resolution]`."""
        return roi_align_pyramid(
            levels[:ROI_LEVELS],
            boxes_BR4,
            STRIDES[:ROI_LEVELS],
            resolution,
            sampling_ratio,
            aligned=not self.torchvision,
        )


def build_detector(
    config: ModelConfig,
    image_size: tuple[int, int],
    norm: NormConfig | None = None,
    images_per_rank: int | None = None,
) -> Detector:
    """The detector of a run, its batch norms converted as the `norm` section says.

    `images_per_rank` is the micro-batch, from which CGBN forms its groups; None: one process (evaluation).
    """
    detector = Detector(config, image_size)
    norm = norm or NormConfig()
    apply_norm(detector.backbone, norm.of("backbone"), images_per_rank)
    apply_norm(detector.fpn, norm.of("fpn"), images_per_rank)
    for head in (detector.rpn, detector.box_head, detector.mask_head):
        if head is not None:
            apply_norm(head, norm.of("heads"), images_per_rank)
    if config.checkpoint_heads:
        for part in (detector.fpn, detector.box_head, detector.mask_head):
            if part is not None:
                recompute(part)
    # Weights stay contiguous: DeepSpeed 0.19 broadcasts them as bytes, and raises for channels-last ones.
    return detector
