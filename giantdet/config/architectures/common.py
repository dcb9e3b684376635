"""Sections that the architectures share: pyramid and heads; backbone and batch norms are beside this file.

Defaults are those of detectron2's Mask R-CNN (`configs/Base-RCNN-FPN.yaml`) unless a comment says otherwise.
Boxes and images are measured in pixels of the padded image that the network sees.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Annotated, ClassVar, Literal

from pydantic import Field

from giantdet.config.architectures.backbone import BackboneConfig as BackboneConfig
from giantdet.config.architectures.challenge import ContextConfig, LargeKernelConfig, SamplingConfig
from giantdet.config.architectures.norms import NormConfig as NormConfig
from giantdet.config.architectures.norms import NormPart as NormPart
from giantdet.config.architectures.norms import PartNormConfig as PartNormConfig
from giantdet.config.architectures.panoptic_merge import PanopticMergeConfig
from giantdet.config.classes import Classes, ClassKind
from giantdet.config.conventions import CONVENTIONS, Conventions
from giantdet.config.section import (
    Auto,
    Fraction,
    NonNegative,
    PathText,
    PositiveInt,
    Section,
)

NormName = Literal["none", "batch", "layer", "group"]
"""Norm after a convolution of a pyramid or a head: `batch` is set by the `norm` block, `layer` is ViTDet's
LayerNorm over the channels of each position, `group` GroupNorm (Wu and He 2018)."""

GROUPS = 32
"""Groups of GroupNorm, the field's number."""


def group_norm_problems(norm: NormName, key: str, channels: int) -> Iterator[str]:
    """Yield a message where the `channels`, given by the setting `key`, cannot be divided into groups."""
    if norm == "group" and channels % GROUPS:
        yield f"{key} must be a multiple of {GROUPS}, the groups of GroupNorm, got {channels}"


class FpnConfig(Section):
    """Feature pyramid P2-P6 (Lin et al. 2017; for plain ViTs the simple pyramid of ViTDet)."""

    channels: PositiveInt = 256
    """Channels of every level."""
    norm: NormName = "none"
    """Norm after each FPN convolution; `batch` is set by the `norm` block, `layer` is ViTDet's LayerNorm,
    `group` is GroupNorm of 32 groups."""
    large_kernel: LargeKernelConfig | None = None
    """Large separable kernels; null: 1x1 convolutions."""
    context: ContextConfig | None = None
    """Global context blocks; null: none."""

    def problems(self, finest: int = 2) -> Iterator[str]:
        """Yield messages like those of `ArchitectureConfig.problems`; the pyramid begins at P`finest`."""
        yield from group_norm_problems(self.norm, "fpn.channels", self.channels)
        for part in (self.large_kernel, self.context):
            if part is not None:
                yield from part.problems(finest)


class RpnConfig(Section):
    """Region proposal network (Ren et al. 2015)."""

    anchor_sizes: tuple[float, ...] = (32.0, 64.0, 128.0, 256.0, 512.0)
    """Side of the square anchor on each of P2 to P6, in pixels."""
    anchor_ratios: tuple[float, ...] = (0.5, 1.0, 2.0)
    """Aspect ratios of the anchors, height / width."""
    batch_per_image: PositiveInt = 256
    """Number of anchors per image that are sampled for the loss."""
    positive_fraction: Fraction = 0.5
    """Largest share of positive anchors among those sampled."""
    iou_low: Fraction = 0.3
    """Anchors with a smaller IoU with every object are negative."""
    iou_high: Fraction = 0.7
    """Anchors with at least this IoU with an object are positive, and so is the best anchor of each object.
    Anchors between the two thresholds are ignored."""
    pre_nms_train: PositiveInt = 2000
    """Number of best anchors of each level that enter NMS, in training."""
    pre_nms_test: PositiveInt = 1000
    """The same, in evaluation."""
    post_nms_train: PositiveInt = 1000
    """Number of proposals per image over all levels, in training. torchvision: 2000."""
    post_nms_test: PositiveInt = 1000
    """The same, in evaluation."""
    nms_iou: Fraction = 0.7
    """IoU above which NMS removes the proposal with the lower score."""
    smooth_l1_beta: NonNegative | None = None
    """Error at which the box loss changes from quadratic to linear; 0 is plain L1. None: that of
    `conventions`."""
    allowed_border: NonNegative | None = None
    """Pixels that a trained anchor may reach beyond the image; None: any number. mmdetection's cascade: 0."""
    convs: PositiveInt = 1
    """Number of 3x3 convolutions, each followed by a ReLU. ViTDet: 2."""
    objectness: Literal["sigmoid", "softmax"] = "sigmoid"
    """sigmoid: an anchor has one logit; softmax: two, for an object and for none, as in the paper and in the
    configurations that AGVM's authors released."""
    loss_pass: Literal["dense", "sampled"] = "dense"
    """Which cells the gradient of the RPN passes through. dense: all; sampled: those of the sampled anchors,
    which pass through the head a second time. The losses are the same up to rounding; sampled is
    faster and needs less memory with large canvases, and has a single convolution (docs/benchmarks.md)."""

    def problems(self) -> Iterator[str]:
        """Yield messages like those of `ArchitectureConfig.problems`."""
        sizes, ratios = self.anchor_sizes, self.anchor_ratios
        if len(sizes) != 5 or min(sizes) <= 0:
            yield f"rpn.anchor_sizes must be 5 positive numbers, for P2 to P6, got {list(sizes)}"
        if not ratios or min(ratios) <= 0:
            yield f"rpn.anchor_ratios must be positive numbers, got {list(ratios)}"
        if self.iou_low > self.iou_high:
            yield f"rpn.iou_low ({self.iou_low}) must not exceed iou_high ({self.iou_high})"
        if self.loss_pass == "sampled" and self.convs != 1:
            yield f"rpn.loss_pass must be dense with rpn.convs {self.convs}: sampled has one convolution"


BoxLoss = Literal["smooth_l1", "giou", "diou", "ciou"]


class BaseBoxHeadConfig(Section):
    """Classification and box regression of RoIs: what single and cascaded box heads share."""

    convs: Annotated[int, Field(ge=0)] = 0
    """Number of 3x3 convolutions before the fully connected layers (4 with fcs=1 is 4conv1fc)."""
    fcs: Annotated[int, Field(ge=1)] = 2
    """Number of fully connected layers."""
    width: PositiveInt = 1024
    """Outputs of each fully connected layer."""
    norm: NormName = "none"
    """Norm after each convolution, as in `fpn`."""
    resolution: PositiveInt = 7
    """Side of RoIAlign's output."""
    sampling_ratio: Annotated[int, Field(ge=0)] = 2
    """RoIAlign points per bin and axis. 0: adaptive, detectron2's default, slower (`ops/roi_align.py`)."""
    batch_per_image: PositiveInt = 512
    """Number of RoIs per image that are sampled for the loss."""
    positive_fraction: Fraction = 0.25
    """Largest share of positive RoIs among those sampled; ohem over the batch has no such limit."""
    sampling: SamplingConfig = SamplingConfig()
    loss: BoxLoss = "smooth_l1"
    """Box loss. smooth_l1 compares deltas; giou, diou and ciou compare the decoded boxes (Rezatofighi et al.
    2019, Zheng et al. 2020)."""
    smooth_l1_beta: NonNegative | None = None
    """See `rpn.smooth_l1_beta`; for `"loss": "smooth_l1"`."""
    score_threshold: Fraction = 0.05
    """Detections with a lower score are dropped."""
    nms_iou: Fraction = 0.5
    """IoU above which NMS removes the detection with the lower score, within a class."""
    detections: PositiveInt = 100
    """Maximum number of detections per image."""


class BoxHeadConfig(BaseBoxHeadConfig):
    """Box head of Fast R-CNN."""

    iou: Fraction = 0.5
    """IoU with an object from which a RoI is positive."""
    best_takes_object: bool = False
    """The best proposal of an object, if positive, predicts that object, even where it overlaps another one
    more. mmdetection's Mask R-CNN: true (`match_low_quality`)."""


class MaskHeadConfig(Section):
    """Mask prediction (He et al. 2017)."""

    enabled: bool = True
    """False gives Faster R-CNN."""
    convs: PositiveInt = 4
    """Number of 3x3 convolutions before the upsampling."""
    width: PositiveInt = 256
    """Channels of the convolutions."""
    norm: NormName = "none"
    """Norm after each convolution, as in `fpn`."""
    resolution: PositiveInt = 14
    """Side of the RoIAlign output; the predicted mask has twice this side."""
    sampling_ratio: Annotated[int, Field(ge=0)] = 2
    """As in `box_head`."""
    slots: PositiveInt = 64
    """Maximum number of sampled positive RoIs per image whose mask is trained; on a GPU unused slots are
    computed too. detectron2 trains the masks of all positives, at most 128."""

    def problems(self) -> Iterator[str]:
        """Yield messages like those of `ArchitectureConfig.problems`."""
        if self.enabled:
            yield from group_norm_problems(self.norm, "mask_head.width", self.width)


LossDivisor = Literal["labelled", "all"]
Dropout = Annotated[float, Field(ge=0.0, lt=1.0)]


class SemanticHeadConfig(Section):
    """Classes of pixels from P2 to P5 (Semantic FPN, Kirillov et al. 2019)."""

    width: PositiveInt = 128
    """Channels of the convolutions."""
    norm: Literal["none", "batch", "group"] = "group"
    """Norm layer after each convolution: `group` is GroupNorm of 32 groups, `batch` follows the `norm`
    block."""
    dropout: Dropout = 0.0
    """Probability that training sets a channel to zero before the last convolution. mmsegmentation: 0.1."""
    loss_divisor: LossDivisor = "labelled"
    """Pixels that the summed cross-entropy is divided by. labelled: those with a class, as in detectron2;
    all: all pixels of the canvas, ignored ones and padding too, as in mmsegmentation."""

    def problems(self) -> Iterator[str]:
        """Yield messages like those of `ArchitectureConfig.problems`."""
        yield from group_norm_problems(self.norm, "semantic_head.width", self.width)


class ArchitectureConfig(Section):
    """Keys of every architecture. Each architecture adds its `type`, a literal with its name."""

    type: str
    num_classes: PositiveInt | Auto = "auto"
    """Number of classes without background; auto: the categories of the training annotations."""
    conventions: Literal["detectron2", "torchvision", "mmdetection"] = "detectron2"
    """Reference implementation that is followed where the two differ (config/conventions.py). Weights need
    the conventions that they were trained with."""
    backbone: BackboneConfig = BackboneConfig()
    checkpoint_heads: bool = False
    """Also recompute the activations of the pyramid and the heads in the backward pass."""
    init_weights: PathText | None = None
    """A giantdet export (folder or model.safetensors), or a file of torchvision, detectron2, mmdetection or
    mmsegmentation (docs/weights.md), with the initial weights of the whole model."""

    CLASS_KEYS: ClassVar[Mapping[str, ClassKind]] = {"num_classes": "objects"}
    """The keys that hold a number of classes, and which classes of a data set they count."""

    @property
    def class_keys(self) -> Mapping[str, ClassKind]:
        """Those of `CLASS_KEYS`, and of the parts that are enabled."""
        return self.CLASS_KEYS

    def predicted(self, classes: Classes) -> Classes:
        """Return those of a data set's classes that the model predicts."""
        kinds = set(self.class_keys.values())
        return Classes(
            objects=classes.objects if "objects" in kinds else (),
            semantic=classes.semantic if kinds & {"semantic", "stuff"} else (),
        )

    @property
    def reference(self) -> Conventions:
        """The choices that `conventions` stands for."""
        return CONVENTIONS[self.conventions]

    @property
    def most_detections(self) -> int | None:
        """The maximum number of detections per image; None for a model that predicts no objects."""
        return None

    @property
    def detections_nms_iou(self) -> float | None:
        """The IoU above which NMS removes a detection; None for a model that predicts no objects."""
        return None

    @property
    def merge_rule(self) -> PanopticMergeConfig:
        """How the outputs become a panoptic map."""
        return PanopticMergeConfig()

    def problems(self) -> Iterator[str]:
        """Yield messages about wrong combinations of values; each begins with a path in `giantdet.model`."""
        yield from self.backbone.problems()

    def batch_norms(self) -> dict[NormPart, tuple[str, bool]]:
        """Return, by part of the `norm` block, which section enables its batch norms, and whether it does."""
        raise NotImplementedError
