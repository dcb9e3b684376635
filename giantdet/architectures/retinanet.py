"""RetinaNet (Lin et al. 2017, "Focal Loss for Dense Object Detection"): backbone, pyramid P3 to P7, one head.

Shapes: B images · A anchors of all levels · M ground-truth slots · C classes · D detections.
References: detectron2's `RetinaNet`, and mmdetection's and torchvision's where their `Conventions` differ.
One deliberate difference: anchors centred in the padding are neither trained nor scored, because a fixed
canvas may have more padding than a batch that is padded to its largest image.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torchvision.ops import sigmoid_focal_loss

from giantdet.architectures.base import Architecture, mean_counts
from giantdet.architectures.class_layers import ClassLayer
from giantdet.config.architectures.common import NormPart
from giantdet.config.architectures.retinanet import RetinaHeadConfig, RetinaNetConfig
from giantdet.errors import InputError
from giantdet.layers.blocks import recompute
from giantdet.layers.cgbn import Float32Buffers
from giantdet.layers.common import ConvBlock, box_distance, gather_slots, normal_
from giantdet.layers.fpn import TopConvolutions, build_fpn
from giantdet.ops.anchors import centred_in_padding, grid_anchors
from giantdet.ops.boxes import clip_boxes, decode_deltas, encode_deltas, non_empty, pairwise_iou
from giantdet.ops.matching import match
from giantdet.ops.nms import class_nms_mask
from giantdet.structures import Batch, Detections, Outputs, Targets

DELTA_WEIGHTS = (1.0, 1.0, 1.0, 1.0)


class Predictions(NamedTuple):
    """The predictions that are trained, with their targets, for every anchor."""

    logits_BAC: Tensor  # float32
    deltas_BA4: Tensor  # float32
    labels_BA: Tensor  # int64 in [0, C], C is background
    target_deltas_BA4: Tensor  # float32
    positive_BA: Tensor  # bool
    valid_BA: Tensor  # bool; False where the anchor is ignored


class RetinaHead(Float32Buffers):
    """The head: levels `[B, channels, h, w]` to class logits `[B, A_l, C]` and deltas `[B, A_l, 4]`, float32.

    It also has the running mean of the number of positive anchors per micro-batch, which divides the losses.
    """

    normalizer: Tensor

    def __init__(self, config: RetinaHeadConfig, channels: int, num_classes: int, normalizer: float) -> None:
        super().__init__()
        self.num_classes = num_classes
        anchors = len(config.anchor_scales) * len(config.anchor_ratios)
        self.class_convs, self.box_convs = (
            nn.Sequential(
                *(ConvBlock(channels, channels, 3, config.norm, relu=True) for _ in range(config.convs))
            )
            for _ in range(2)
        )
        self.classes = nn.Conv2d(channels, anchors * num_classes, 3, padding=1)
        self.deltas = nn.Conv2d(channels, anchors * 4, 3, padding=1)
        for layer in [*self.modules()]:
            if isinstance(layer, nn.Conv2d):
                normal_(layer, std=0.01)
        assert self.classes.bias is not None
        nn.init.constant_(self.classes.bias, -math.log((1 - config.prior) / config.prior))
        self.register_buffer("normalizer", torch.full((), normalizer, dtype=torch.float32))

    def forward(self, levels: list[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        logits = [self.classes(self.class_convs(level)) for level in levels]
        deltas = [self.deltas(self.box_convs(level)) for level in levels]
        return (
            [_by_anchor(level, self.num_classes) for level in logits],
            [_by_anchor(level, 4) for level in deltas],
        )


def _by_anchor(level: Tensor, values: int) -> Tensor:
    """Return `[B, h * w * K, values]`, float32, of `[B, K * values, h, w]`."""
    return level.permute(0, 2, 3, 1).reshape(len(level), -1, values).float()


class RetinaNet(Architecture):
    """One-stage detector; see `Architecture` for the arguments."""

    OWN_STATE = frozenset({"head.normalizer"})

    def __init__(self, config: RetinaNetConfig, image_size: tuple[int, int]) -> None:
        super().__init__(config, image_size)
        self.config, self.image_size = config, image_size
        backbone, channels = self.backbone, config.fpn.channels
        source = config.extra_levels_from or ("p5" if backbone.is_plain else "c5")
        if source == "c5" and backbone.is_plain:
            raise InputError('model.extra_levels_from: a plain ViT has no C5; give "p5", or leave it out')
        relu = self.conventions.retina_relu_before_p7
        top = TopConvolutions(backbone.channels[-1], channels, source == "c5", relu)
        self.fpn = build_fpn(
            config.fpn, backbone.channels, backbone.strides, backbone.is_plain, finest=3, top=top
        )
        self.head = RetinaHead(config.head, channels, self.num_classes, config.loss_normalizer)
        if config.checkpoint_heads:
            recompute(self.fpn)
            recompute(self.head)

    @property
    def targets(self) -> frozenset[str]:
        """See `Architecture.targets`."""
        return frozenset({"boxes"})

    @property
    def tasks(self) -> tuple[str, ...]:
        """See `Architecture.tasks`."""
        return ("box",)

    def pyramid(self, pixels_B3HW: Tensor) -> list[Tensor]:
        """Return P3 to P7, `[B, channels, h, w]`, of normalised images."""
        levels: list[Tensor] = self.fpn(self.backbone(pixels_B3HW))
        return levels

    def heads(self, batch: Batch) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
        """Return the logits `[B, A_l, C]`, deltas `[B, A_l, 4]` and anchors `[A_l, 4]` of every level."""
        levels = self.pyramid(self.normalise(batch.images_B3HW, batch.sizes_B2))
        logits, deltas = self.head(levels)
        return logits, deltas, self.anchors(levels)

    def anchors(self, levels: list[Tensor]) -> list[Tensor]:
        """Return the anchors of each level, float32 `[A_l, 4]` in pixels."""
        head, rounded = self.config.head, self.conventions.rounded_anchors
        sizes = [[size * scale for scale in head.anchor_scales] for size in head.anchor_sizes]
        if rounded:  # torchvision cuts off the fractions of the sizes, too
            sizes = [[float(int(size)) for size in level] for level in sizes]
        found = grid_anchors(
            self.image_size,
            [(level.shape[-2], level.shape[-1]) for level in levels],
            self.fpn.strides,
            sizes,
            head.anchor_ratios,
            rounded=rounded,
            device=levels[0].device,
            by_ratio=self.conventions.anchors_by_ratio,
        )
        return list(found)

    def ignored(self, anchors_A4: Tensor, sizes_B2: Tensor) -> Tensor:
        """Return bool `[B, A]`, True for anchors that are neither trained nor scored."""
        outside_BA = centred_in_padding(anchors_A4, sizes_B2)
        return torch.zeros_like(outside_BA) if self.conventions.anchors_in_padding else outside_BA

    def predict(self, batch: Batch) -> Predictions:
        """Return predictions and targets of all anchors; see `Architecture.predict`."""
        logits, deltas, anchors = self.heads(batch)
        anchors_A4 = torch.cat(anchors)
        untrained_BA = self.ignored(anchors_A4, batch.sizes_B2)
        if self.conventions.trained_padding:
            untrained_BA = centred_in_padding(anchors_A4, batch.sizes_B2, self.conventions.trained_padding)
        label_BA, labels_BA, target_deltas_BA4 = self.match(anchors_A4, untrained_BA, batch.targets)
        return Predictions(
            logits_BAC=torch.cat(logits, 1),
            deltas_BA4=torch.cat(deltas, 1),
            labels_BA=labels_BA,
            target_deltas_BA4=target_deltas_BA4,
            positive_BA=label_BA == 1,
            valid_BA=label_BA >= 0,
        )

    def match(
        self, anchors_A4: Tensor, ignored_BA: Tensor, targets: Targets
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return the targets of each anchor: label `[B, A]`, class `[B, A]` and deltas `[B, A, 4]`.

        The label is 1 (positive), 0 (negative) or -1 (ignored).
        """
        head = self.config.head
        iou_BMA = pairwise_iou(targets.boxes_BM4, anchors_A4).masked_fill_(ignored_BA[:, None], 0.0)
        index_BA, label_BA = match(
            iou_BMA,
            targets.valid_BM,
            head.iou_low,
            head.iou_high,
            allow_low_quality=True,
            takes_object=self.conventions.best_anchor_takes_object,
        )
        label_BA = label_BA.masked_fill(ignored_BA, -1)
        positive_BA = label_BA == 1
        labels_BA = targets.labels_BM.gather(1, index_BA).where(positive_BA, self.num_classes)
        # Negatives have no target box; with the anchor itself as the target the encoding is finite.
        boxes_BA4 = gather_slots(targets.boxes_BM4, index_BA).where(positive_BA[..., None], anchors_A4)
        return label_BA, labels_BA, encode_deltas(boxes_BA4, anchors_A4, DELTA_WEIGHTS)

    def losses(self, predictions: Predictions, batch: Batch) -> dict[str, Tensor]:
        """Return `retinanet_losses`; in training, first update the running mean of positive anchors."""
        normalizer = self.head.normalizer
        if not self.conventions.retina_running_mean:
            positives_B = predictions.positive_BA.sum(1).clamp_min(1)
            mean_of_images = self.conventions.retina_mean_of_images
            return retinanet_losses(
                predictions, self.config.head, positives_B if mean_of_images else positives_B.sum()
            )
        if self.training:
            with torch.no_grad():
                positives = predictions.positive_BA.sum().clamp_min(1).to(normalizer.dtype)
                normalizer.lerp_(positives, 1 - self.config.loss_momentum)
        return retinanet_losses(predictions, self.config.head, normalizer.clone())

    def counts(self, predictions: Predictions) -> dict[str, Tensor]:
        """Return the mean number of positive anchors per image."""
        return mean_counts({"anchors_positive": predictions.positive_BA})

    def class_layers(self) -> tuple[ClassLayer, ...]:
        """See `Architecture.class_layers`."""
        anchors = len(self.config.head.anchor_scales) * len(self.config.head.anchor_ratios)
        return (ClassLayer("head.classes.", blocks=anchors),)

    def norm_parts(self) -> dict[NormPart, tuple[nn.Module, ...]]:
        """See `Architecture.norm_parts`."""
        return {"fpn": (self.fpn,), "heads": (self.head,)}

    def answer(self, batch: Batch) -> Outputs:
        """Return detections without masks; see `Architecture.answer`."""
        config = self.config.head
        boxes, scores, labels = [], [], []
        for logits_BAC, deltas_BA4, anchors_A4 in zip(*self.heads(batch), strict=True):
            scores_BAC = logits_BAC.sigmoid().masked_fill(
                self.ignored(anchors_A4, batch.sizes_B2)[..., None], 0.0
            )
            pairs_BX = scores_BAC.flatten(1)
            score_BK, index_BK = pairs_BX.topk(min(config.pre_nms, pairs_BX.shape[1]))
            anchor_BK = index_BK // self.num_classes
            boxes.append(
                decode_deltas(
                    gather_slots(deltas_BA4, anchor_BK),
                    anchors_A4[anchor_BK],
                    DELTA_WEIGHTS,
                    self.conventions.clamps_shrinking,
                )
            )
            scores.append(score_BK)
            labels.append(index_BK % self.num_classes)
        boxes_BK4, score_BK, label_BK = torch.cat(boxes, 1), torch.cat(scores, 1), torch.cat(labels, 1)
        valid_BK = (score_BK > config.score_threshold) & score_BK.isfinite() & boxes_BK4.isfinite().all(-1)
        if self.conventions.retina_clips_before_nms:
            boxes_BK4 = clip_boxes(boxes_BK4, batch.sizes_B2)
            valid_BK &= non_empty(boxes_BK4)
        # In detectron2, NMS compares whole boxes; they are clipped to the image afterwards.
        whole_BK4 = boxes_BK4.where(valid_BK[..., None], 0.0)
        whole_BK4 = whole_BK4 - whole_BK4.amin((1, 2), keepdim=True)
        extent_B = whole_BK4.amax((1, 2))
        keep_BK = class_nms_mask(
            whole_BK4, score_BK, label_BK, valid_BK, self.num_classes, extent_B, config.nms_iou
        )
        score_BD, best_BD = score_BK.where(keep_BK, -1.0).topk(min(config.detections, score_BK.shape[1]))
        boxes_BD4 = clip_boxes(gather_slots(boxes_BK4, best_BD), batch.sizes_B2)
        valid_BD = (score_BD > 0) & non_empty(boxes_BD4)
        return Outputs(
            Detections(
                boxes_BD4=boxes_BD4.where(valid_BD[..., None], 0.0),
                scores_BD=score_BD.where(valid_BD, 0.0),
                labels_BD=label_BK.gather(1, best_BD).where(valid_BD, 0),
                valid_BD=valid_BD,
                masks_BDSS=None,
            )
        )


def retinanet_losses(p: Predictions, config: RetinaHeadConfig, normalizer: Tensor) -> dict[str, Tensor]:
    """Return the focal and box loss over all anchors, scalars divided by `normalizer`.

    With a normalizer of each image, `[B]`, the means of the images' losses.

    Focal loss: Lin et al. 2017. Reference: `retinanet.py` of detectron2 0.6.
    """
    classes_C = torch.arange(p.logits_BAC.shape[-1], device=p.labels_BA.device)
    goal_BAC = (p.labels_BA[..., None] == classes_C).to(p.logits_BAC.dtype)
    focal_BA = sigmoid_focal_loss(p.logits_BAC, goal_BAC, config.focal_alpha, config.focal_gamma).sum(-1)
    distance_BA = box_distance(p.deltas_BA4, p.target_deltas_BA4, config.smooth_l1_beta)
    return {
        "loss_cls": _normalised(torch.where(p.valid_BA, focal_BA, 0.0), normalizer),
        "loss_box_reg": _normalised(torch.where(p.positive_BA, distance_BA, 0.0), normalizer),
    }


def _normalised(loss_BA: Tensor, normalizer: Tensor) -> Tensor:
    if normalizer.ndim == 0:
        return loss_BA.sum() / normalizer
    return (loss_BA.sum(1) / normalizer).mean()
