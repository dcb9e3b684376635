"""The `"giantdet"` block of a run's JSON, as types.

Each component of the system sees its own section only. Defaults are detectron2's Mask R-CNN
(`configs/Base-RCNN-FPN.yaml`) unless a comment says otherwise. Lengths of boxes and images are
pixels of the padded image that the network sees.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from giantdet.config.lengths import LENGTH_PATTERN

Auto = Literal["auto"]
PositiveInt = Annotated[int, Field(gt=0)]
Fraction = Annotated[float, Field(ge=0.0, le=1.0)]
PositiveFloat = Annotated[float, Field(gt=0)]
Length = Annotated[int, Field(ge=0)] | Annotated[str, Field(pattern=LENGTH_PATTERN)]
"""Steps, or a text like "2 epochs" or "90000 images" (config/lengths.py)."""


class Section(BaseModel):
    """Base of all sections: immutable, unknown keys are errors, defaults are checked too."""

    model_config = ConfigDict(
        extra="forbid",
        frozen=True,
        validate_default=True,
        use_attribute_docstrings=True,
        allow_inf_nan=False,
    )


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
    timm_args: dict[str, Any] = {}
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


class BoxHeadConfig(Section):
    """Classification and box regression of RoIs (Fast R-CNN)."""

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
    iou: Fraction = 0.5
    score_threshold: Fraction = 0.05
    nms_iou: Fraction = 0.5
    detections: PositiveInt = 100
    """Detections an image."""


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


class ModelConfig(Section):
    num_classes: PositiveInt | Auto = "auto"
    """Classes without background; auto: the training annotations' categories."""
    conventions: Literal["detectron2", "torchvision"] = "detectron2"
    """Which reference's fine print holds: anchors' rounding, RoIAlign's half-pixel offset, smooth L1
    beta, normalisers, pasting. torchvision's are needed by weights that come from there."""
    backbone: BackboneConfig = BackboneConfig()
    fpn: FpnConfig = FpnConfig()
    rpn: RpnConfig = RpnConfig()
    box_head: BoxHeadConfig = BoxHeadConfig()
    mask_head: MaskHeadConfig = MaskHeadConfig()
    checkpoint_heads: bool = False
    """Recompute the activations of pyramid, box head and mask head in the backward pass, too."""
    init_weights: str | None = None
    """A giantdet export (folder or model.safetensors) to start the whole detector from."""


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
    """Another choice for the box and mask heads."""

    def of(self, part: Literal["backbone", "fpn", "heads"]) -> PartNormConfig:
        """The choice that holds for a part."""
        if part == "backbone":
            return self
        chosen = self.fpn if part == "fpn" else self.heads
        return chosen or (PartNormConfig(type="local") if self.type == "frozen" else self)


class DatasetConfig(Section):
    annotations: str
    """COCO instances JSON."""
    images: str
    """Folder that file names are relative to."""


class AugmentConfig(Section):
    """Training-time geometry. All of it ends on the same canvas."""

    flip: Fraction = 0.5
    """Probability of a horizontal flip."""
    short_sides: tuple[PositiveInt, ...] | None = None
    """Multi-scale: the short side is drawn from these. None: the `short_side` of the data block."""
    jitter: tuple[float, float] | None = None
    """Large-scale jitter (Ghiasi et al. 2021): scale of the canvas-filling size, then a random crop."""


class DataConfig(Section):
    train: DatasetConfig | None = None
    val: DatasetConfig | None = None
    size: tuple[PositiveInt, PositiveInt] = (1024, 1024)
    """Canvas (height, width) of every batch; multiples of 32, or of 64 with P6 (see docs)."""
    short_side: PositiveInt = 800
    """The image is scaled to this short side, or to what fits on the canvas if that is smaller."""
    augment: AugmentConfig = AugmentConfig()
    max_objects: PositiveInt = 100
    """Ground-truth slots M an image; of more objects the largest are kept, the rest is counted."""
    mask_frame: PositiveInt = 112
    """Side S of a target mask's bitmap; objects up to S pixels are stored exactly."""
    workers: Annotated[int, Field(ge=0)] = 2
    """Loader processes a rank."""
    filter_empty: bool = True
    """Leave images without objects out of training (detectron2's default). Evaluation keeps them."""


class AgvmConfig(Section):
    """Adaptive gradient variance modulator (Xue et al., NeurIPS 2022); see `optim/agvm.py`."""

    enabled: bool = False
    estimator: Literal["half_split", "all_splits"] = "half_split"
    """half_split: the paper's, two halves of the batch; all_splits: the expectation over all splits."""
    preconditioned: bool | Auto = "auto"
    """Compare gradients as Adam would scale them. auto: with Adam and AdamW."""
    look_ahead: Literal["exact", "released"] = "exact"
    """Second moment of the preconditioner. released: the authors' code, whose current square is
    under-weighted by the square of the number of ranks."""
    interval: PositiveInt = 10
    """Steps between measurements."""
    momentum: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.97
    """Of the factors' exponential moving average, which starts from 1."""
    start_step: Annotated[int, Field(ge=0)] | Auto = "auto"
    """First step that measures and is scaled, counted from 0. auto: 100 steps (at most a tenth of the run)
    after the warmup's end, as the authors' code."""
    stop_step: Annotated[int, Field(ge=0)] | None = None
    """Last such step."""
    clamp: tuple[PositiveFloat, PositiveFloat] = (0.5, 10.0)
    """Bounds of the ratio of variances, before the square root."""
    anchor: str = "backbone"
    """The module that the others are aligned with; its factor is 1."""
    modules: dict[str, tuple[str, ...]] | None = None
    """Patterns of parameter names by module, the first that fits; None: the detector's parts."""


class LrScalingConfig(Section):
    """The LR of the batch at hand from that of the recipe's batch; all LRs of the JSON are the latter's."""

    reference_batch: PositiveInt | None = None
    """Batch size that the JSON's LRs are meant for; needed by linear and sqrt."""
    rule: Literal["linear", "sqrt", "none"] = "none"
    """LR x batch / reference_batch (MegDet; Goyal et al. 2017), x its root (AGVM; LAMB), or as it stands."""


class ParamGroupsConfig(Section):
    """LRs of parts of the model, as factors of the optimizer's (`optim/param_groups.py`)."""

    layer_decay: Annotated[float, Field(gt=0.0, le=1.0)] | None = None
    """Factor from each layer of the backbone to the one below it (ViTDet: 0.7 to 0.9)."""
    lr_multipliers: dict[str, PositiveFloat] = {}
    """Factor by module: {"backbone": 0.1}."""


class EmaConfig(Section):
    """Exponential moving average of the weights, which is then what is evaluated and exported."""

    enabled: bool = False
    decay: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.9998
    """Per step. In the first steps less, (1 + n) / (10 + n), so that the start is forgotten."""


class TrainConfig(Section):
    epochs: PositiveFloat | None = None
    steps: PositiveInt | None = None
    """Optimizer steps; give either epochs or steps."""
    clip_window: tuple[Length, Length] | Auto | None = None
    """First and last step (from 0) that `gradient_clipping` acts in; None: all. auto: 100 steps before to 100
    after the warmup's end, as AGVM's authors."""
    seed: Annotated[int, Field(ge=-(2**63), lt=2**63)] = 0
    output: str = "runs/run"
    """Folder of the run: checkpoints, metrics.jsonl, config.json, results."""
    resume: bool = True
    """Go on from the newest checkpoint in `output` if there is one."""
    log_every: PositiveInt = 20
    eval_every: Annotated[int, Field(ge=0)] = 0
    """Steps between evaluations; 0: at the end only."""
    save_every: Annotated[int, Field(ge=0)] = 0
    """Steps between checkpoints; 0: at the end only."""
    keep: PositiveInt = 2
    """Checkpoints that stay, the newest."""
    keep_best: bool = True
    """Save and keep the best evaluation's, too, by mask AP (box AP without masks)."""
    async_save: bool = False
    """Write checkpoints while training goes on; needs the CPU's memory for a copy of what a rank saves."""
    export_shard: PositiveFloat = 2.0
    """GiB of an export's file; a larger model is written in several, with an index."""
    max_skipped_steps: PositiveInt = 10
    """Steps whose gradient is not finite are left out; so many in a row end the run (exit code 3)."""
    timeout_minutes: PositiveFloat = 30.0
    """How long a rank waits for another before the run ends: longer than a checkpoint, or what the main rank
    does alone in an evaluation."""
    deterministic: bool = False
    """Deterministic kernels and one thread's order of sums; slower on GPUs."""


class EvalConfig(Section):
    batch_size: PositiveInt = 1
    """Images a rank and step."""


class GiantdetConfig(Section):
    """The `"giantdet"` block."""

    model: ModelConfig = ModelConfig()
    norm: NormConfig = NormConfig()
    agvm: AgvmConfig = AgvmConfig()
    lr_scaling: LrScalingConfig = LrScalingConfig()
    param_groups: ParamGroupsConfig = ParamGroupsConfig()
    ema: EmaConfig = EmaConfig()
    data: DataConfig = DataConfig()
    train: TrainConfig = TrainConfig()
    eval: EvalConfig = EvalConfig()
