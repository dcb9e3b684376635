"""What the sections of the architectures share: backbone, pyramid, heads, and the choice of batch norms.

Defaults are detectron2's Mask R-CNN (`configs/Base-RCNN-FPN.yaml`) unless a comment says otherwise. Boxes and
images are measured in pixels of the padded image that the network sees.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, Any, Literal

from pydantic import Field

from giantdet.config.conventions import CONVENTIONS, Conventions
from giantdet.config.section import Auto, Fraction, PositiveInt, Section


class BackboneConfig(Section):
    """Any timm model; see `layers/backbone.py` for the three adapters."""

    name: str = "resnet50"
    """timm model name, for example resnet50, convnext_tiny, swin_tiny_patch4_window7_224."""
    pretrained: bool = False
    """Load timm's weights by their tag (needs network or a warm cache); see also `init_weights`."""
    init_weights: str | None = None
    """Local .safetensors or .pth file with ImageNet weights of this backbone, or a folder of shards."""
    stride_in_1x1: bool = False
    """ResNet bottlenecks put their stride into the first 1x1 convolution (MSRA and Caffe weights)."""
    frozen_stages: Annotated[int, Field(ge=0, le=5)] = 0
    """Number of first stages without gradients; 1 is the stem. detectron2's FREEZE_AT."""
    drop_path_rate: Fraction = 0.0
    """Stochastic depth."""
    checkpoint_blocks: bool | PositiveInt = False
    """Recompute activations in the backward pass (less memory, up to a third more time): true in each block,
    2 in every second, 3 in every third."""
    compile_blocks: bool = False
    """torch.compile each block: the same results to rounding, faster on GPUs after minutes of compiling."""
    timm_args: dict[str, Any] = Field(default={})
    """More arguments of timm's model, for example {"embed_dim": 64, "num_heads": 4} for a small ViT."""
    window: Annotated[int, Field(ge=0)] = 16
    """Plain ViTs: side of the attention windows in patches; 0 makes all blocks global."""
    global_blocks: PositiveInt = 4
    """Plain ViTs: number of evenly spaced blocks with global attention (ViTDet's 4)."""
    patch_size: PositiveInt = 16
    """Plain ViTs: the patch embedding is resampled to this size."""


class FpnConfig(Section):
    """Feature pyramid P2-P6 (Lin et al. 2017; for plain ViTs the simple pyramid of ViTDet)."""

    channels: PositiveInt = 256
    norm: Literal["none", "batch", "layer"] = "none"
    """Norm layer after each FPN convolution; `batch` follows the `norm` block, `layer` is ViTDet's."""


class RpnConfig(Section):
    """Region proposal network (Ren et al. 2015)."""

    anchor_sizes: tuple[float, ...] = (32.0, 64.0, 128.0, 256.0, 512.0)
    """Side of the square anchor on P2 to P6, pixels."""
    anchor_ratios: tuple[float, ...] = (0.5, 1.0, 2.0)
    """height / width."""
    batch_per_image: PositiveInt = 256
    """Anchors sampled for the loss."""
    positive_fraction: Fraction = 0.5
    iou_low: Fraction = 0.3
    iou_high: Fraction = 0.7
    pre_nms_train: PositiveInt = 2000
    """Best anchors of each level that enter NMS."""
    pre_nms_test: PositiveInt = 1000
    post_nms_train: PositiveInt = 1000
    """Proposals of an image over all levels. torchvision: 2000."""
    post_nms_test: PositiveInt = 1000
    nms_iou: Fraction = 0.7

    def problems(self) -> Iterator[str]:
        """Messages as those of `ArchitectureConfig.problems`."""
        sizes, ratios = self.anchor_sizes, self.anchor_ratios
        if len(sizes) != 5 or min(sizes) <= 0:
            yield f"rpn.anchor_sizes must be 5 positive numbers, for P2 to P6, got {list(sizes)}"
        if not ratios or min(ratios) <= 0:
            yield f"rpn.anchor_ratios must be positive numbers, got {list(ratios)}"
        if self.iou_low > self.iou_high:
            yield f"rpn.iou_low ({self.iou_low}) must not exceed iou_high ({self.iou_high})"


BoxLoss = Literal["smooth_l1", "giou", "diou", "ciou"]


class BaseBoxHeadConfig(Section):
    """Classification and box regression of RoIs: what single and cascaded box heads share."""

    convs: Annotated[int, Field(ge=0)] = 0
    """3x3 convolutions before the fully connected layers (4 with fcs=1 is 4conv1fc)."""
    fcs: Annotated[int, Field(ge=1)] = 2
    width: PositiveInt = 1024
    norm: Literal["none", "batch", "layer"] = "none"
    resolution: PositiveInt = 7
    sampling_ratio: Annotated[int, Field(ge=0)] = 2
    """RoIAlign points per bin and axis. 0: adaptive, detectron2's default, slower (`ops/roi_align.py`)."""
    batch_per_image: PositiveInt = 512
    """RoIs sampled for the loss."""
    positive_fraction: Fraction = 0.25
    loss: BoxLoss = "smooth_l1"
    """Box loss. smooth_l1 compares deltas; giou, diou and ciou compare the decoded boxes (Rezatofighi et al.
    2019, Zheng et al. 2020)."""
    score_threshold: Fraction = 0.05
    nms_iou: Fraction = 0.5
    detections: PositiveInt = 100
    """Detections an image."""


class BoxHeadConfig(BaseBoxHeadConfig):
    """Box head of Fast R-CNN."""

    iou: Fraction = 0.5
    """IoU with an object from which a RoI is positive."""


class MaskHeadConfig(Section):
    """Mask prediction (He et al. 2017)."""

    enabled: bool = True
    """False gives Faster R-CNN."""
    convs: PositiveInt = 4
    width: PositiveInt = 256
    norm: Literal["none", "batch", "layer"] = "none"
    resolution: PositiveInt = 14
    """RoIAlign output; the mask has twice this side."""
    sampling_ratio: Annotated[int, Field(ge=0)] = 2
    slots: PositiveInt = 64
    """Sampled positives an image that get a mask; each slot is computed, used or not. detectron2
    computes all positives, at most 128."""


class SemanticHeadConfig(Section):
    """Classes of pixels from P2 to P5 (Semantic FPN, Kirillov et al. 2019)."""

    width: PositiveInt = 128
    norm: Literal["none", "batch", "group"] = "group"
    """Norm layer after each convolution: `group` is GroupNorm of 32 groups, `batch` follows the `norm`
    block."""

    def problems(self) -> Iterator[str]:
        """Messages as those of `ArchitectureConfig.problems`."""
        if self.norm == "group" and self.width % 32:
            yield f"semantic_head.width must be a multiple of 32, the groups of its norm, got {self.width}"


NormPart = Literal["fpn", "heads"]


class ArchitectureConfig(Section):
    """What every architecture has. Each adds its `type`, a literal that is its name in the tables."""

    type: str
    num_classes: PositiveInt | Auto = "auto"
    """Classes without background; auto: the training annotations' categories."""
    conventions: Literal["detectron2", "torchvision"] = "detectron2"
    """Which reference implementation is followed where they differ (config/conventions.py). Weights need
    the conventions that they were trained with."""
    backbone: BackboneConfig = BackboneConfig()
    checkpoint_heads: bool = False
    """Recompute the activations of what follows the backbone in the backward pass, too."""
    init_weights: str | None = None
    """A giantdet export (folder or model.safetensors) to start the whole model from."""

    @property
    def reference(self) -> Conventions:
        """The fields that `conventions` stands for."""
        return CONVENTIONS[self.conventions]

    def problems(self) -> Iterator[str]:
        """Messages about combinations of values, each beginning with a path below `giantdet.model`."""
        if self.backbone.drop_path_rate >= 1:
            yield "backbone.drop_path_rate must be less than 1: it is the share of dropped blocks"
        if self.backbone.pretrained and self.backbone.init_weights:
            yield (
                "backbone.pretrained and giantdet.model.backbone.init_weights exclude each other; give one"
            )

    def batch_norms(self) -> dict[NormPart, tuple[str, bool]]:
        """By part of the `norm` block: where its batch norms are switched on, and whether they are."""
        raise NotImplementedError


class PartNormConfig(Section):
    """How the BatchNorms of one part of the model find their statistics."""

    type: Literal["frozen", "local", "cgbn"] = "frozen"
    """frozen: statistics and affine are constants; local: each rank's own micro-batch; cgbn: the images
    of several ranks (`layers/cgbn.py`)."""
    bn_size: PositiveInt = 32
    """cgbn: images that are normalised together, micro-batch x ranks; at most the world's. MegDet's 32."""


class NormConfig(PartNormConfig):
    """Batch normalisation, applied to the model from outside (`layers/norm.py`).

    `type` and `bn_size` are the backbone's. The norms of pyramid and heads (`"norm": "batch"` in their
    sections) are as the backbone's, or local where that is frozen: they start fresh, and constants of mean 0
    and variance 1 would normalise nothing.
    """

    fpn: PartNormConfig | None = None
    """Another choice for the pyramid."""
    heads: PartNormConfig | None = None
    """Another choice for the heads."""

    def of(self, part: Literal["backbone"] | NormPart) -> PartNormConfig:
        """The choice that holds for a part."""
        if part == "backbone":
            return self
        chosen = self.fpn if part == "fpn" else self.heads
        return chosen or (PartNormConfig(type="local") if self.type == "frozen" else self)

    def parts(self) -> dict[str, PartNormConfig]:
        """The choice that holds for every part."""
        return {part: self.of(part) for part in ("backbone", "fpn", "heads")}
