"""The `"giantdet"` block of a run's JSON, as types.

Each component of the system reads only its own section. The sections of models are in `architectures/`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, WithJsonSchema, field_validator

from giantdet.config.architectures import SECTIONS, ModelConfig
from giantdet.config.architectures.common import NormConfig
from giantdet.config.architectures.mask_rcnn import MaskRcnnConfig
from giantdet.config.classes import Classes
from giantdet.config.datasets import FORMATS, DatasetConfigs
from giantdet.config.section import (
    Auto,
    Fraction,
    Length,
    PathText,
    PositiveFloat,
    PositiveInt,
    Section,
    wish,
)


def _canvas(value: Any) -> Any:
    if isinstance(value, int) and not isinstance(value, bool):
        return value, value
    if not isinstance(value, list | tuple) or len(value) != 2:
        raise wish("one side or [height, width] in pixels")
    return value[0], value[1]


_SIDE_SCHEMA = {"type": "integer", "exclusiveMinimum": 0}
_PAIR_SCHEMA = {"type": "array", "prefixItems": [_SIDE_SCHEMA] * 2, "minItems": 2, "maxItems": 2}
CanvasSize = Annotated[
    tuple[PositiveInt, PositiveInt],
    BeforeValidator(_canvas),
    WithJsonSchema({"anyOf": [_SIDE_SCHEMA, _PAIR_SCHEMA]}),
]
"""(height, width) in pixels; one number is the side of a square."""


class AugmentConfig(Section):
    """Augmentation of training images; every image ends up on the same canvas."""

    flip: Fraction = 0.5
    """Probability of a horizontal flip."""
    vertical_flip: Fraction = 0.0
    """Probability of a vertical flip, for images without an up and down (aerial, microscope)."""
    short_sides: tuple[PositiveInt, ...] | None = None
    """Multi-scale training: the short side, in pixels, is drawn from these. null: the `short_side` of the
    data block."""
    jitter: tuple[float, float] | None = None
    """Large-scale jitter (Ghiasi et al. 2021): range of the random scale, relative to the size that fills the
    canvas; a random crop follows."""
    scale: tuple[float, float] | None = None
    """Range of the random scale, relative to `short_side`; a random crop follows (mmsegmentation's
    RandomResize and RandomCrop). Excludes the two above."""
    crop_class_share: Fraction = 1.0
    """Semantic maps: the crop is drawn again, at most 10 times, while it has one class only or a class with
    this share of its labelled pixels or more. mmsegmentation: 0.75; 1: it is drawn once."""
    photometric: bool = False
    """Change brightness, contrast, saturation and hue at random (data/photometric.py)."""


class SamplingConfig(Section):
    """How often each training image is seen (`data/sampling.py`)."""

    type: Literal["uniform", "repeat_factor"] = "uniform"
    """uniform: once per epoch. repeat_factor: more often with rare classes (Gupta et al. 2019). An image has
    the largest factor max(1, sqrt(threshold / f)) of its classes; f is the share of images with the class."""
    threshold: PositiveFloat = 0.001
    """Share of images below which a class is rare; LVIS: 0.001."""


class DataConfig(Section):
    """Data sets, canvas and loader."""

    train: DatasetConfigs | None = None
    """A data set, or a list of them: the classes are those of the first; the others are matched by name."""
    val: DatasetConfigs | None = None
    """The same for evaluation."""
    classes: Classes | None = None
    """Names and ids of the classes that the model predicts. Training writes them here; if they are given,
    training data with others are refused. null: those of the training data."""
    size: CanvasSize = (1024, 1024)
    """Canvas of every batch in pixels, [height, width] or the side of a square; multiples of 32, or of 64
    with P6 (see docs)."""
    short_side: PositiveInt = 800
    """Images are scaled to this short side in pixels, or less where they would not fit on the canvas."""
    long_side: PositiveInt | None = None
    """Largest long side in pixels after scaling; null: only the canvas limits it."""
    augment: AugmentConfig = AugmentConfig()
    sampling: SamplingConfig = SamplingConfig()
    """How often each training image is seen."""
    max_objects: PositiveInt = 100
    """Ground-truth slots M per image; if an image has more objects, the largest are kept and the others are
    counted in the log."""
    mask_frame: PositiveInt = 112
    """Side S of the bitmap of a target mask; objects of up to S pixels are stored exactly."""
    max_image_pixels: PositiveInt = 178_956_970
    """Files with more pixels are skipped without being read, because small files may decompress to gigabytes.
    The default is Pillow's own limit; a satellite image may need more."""
    workers: Annotated[int, Field(ge=0)] = 2
    """Loader processes per rank."""
    filter_empty: bool = True
    """Do not train on images without objects (detectron2's default). They are still evaluated."""


class AgvmConfig(Section):
    """Adaptive gradient variance modulator (Xue et al., NeurIPS 2022); see `optim/agvm.py`."""

    enabled: bool = False
    """Scale the LR of each module by its gradient variance."""
    rule: Literal["agvm", "uniform", "inverse", "noise_scale", "noise_scale_uniform"] = "agvm"
    """What the factors are computed from (`optim/rules.py`). agvm: the paper; uniform: the geometric mean of
    its factors for all modules; inverse: 1 / its factors; noise_scale: from the LR of `reference_batch`, by
    the noise scale of each module (McCandlish et al. 2018; with Adam, Li et al. 2024); noise_scale_uniform:
    the geometric mean of its factors."""
    reference_batch: PositiveInt | None = None
    """Rules of the noise scale: batch that the LR was chosen for. null: `lr_scaling.reference_batch`."""
    estimator: Literal["half_split", "all_splits"] = "half_split"
    """half_split: two halves of the batch, as in the paper; all_splits: the ratio of two
    expectations over all splits, 1 - E[G_1 G_2] / E|G_1|^2."""
    preconditioned: bool | Auto = "auto"
    """Compare the gradients as Adam would scale them. auto: true for Adam and AdamW."""
    look_ahead: Literal["exact", "released"] = "exact"
    """Second moment of the preconditioner. exact: as Adam computes it; released: as in the authors' code,
    where the square of the current gradient is too small by the square of the number of ranks."""
    interval: PositiveInt = 10
    """Steps from one measurement to the next."""
    momentum: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.97
    """Momentum of the factors' exponential moving average, which starts from 1."""
    start_step: Annotated[int, Field(ge=0)] | Auto = "auto"
    """First step, counted from 0, in which variances are measured and LRs scaled. auto: 100 steps (at most a
    tenth of the run) after the warmup's end, as in the authors' code."""
    stop_step: Annotated[int, Field(ge=0)] | None = None
    """Last such step; null: the last step of the run."""
    clamp: tuple[PositiveFloat, PositiveFloat] = (0.5, 10.0)
    """Bounds of the ratio of variances, before the square root. Rules of the noise scale: bounds of the
    factor."""
    anchor: str = "backbone"
    """Module that the variances of the others are aligned with; its factor is 1."""
    modules: dict[str, tuple[str, ...]] | None = None
    """Patterns of parameter names by module; the first match counts. null: the model's top-level parts."""

    def resolved(self, optimizer: str) -> AgvmConfig:
        """Return the configuration for an optimizer, given by name, with `preconditioned` "auto" replaced."""
        if self.preconditioned != "auto":
            return self
        # This includes the names of DeepSpeed's classes: FusedAdam, DeepSpeedCPUAdam.
        return self.model_copy(update={"preconditioned": "Adam" in optimizer})

    def power(self, optimizer: str) -> float:
        """Return the exponent of the batch in the LR of an optimizer, given by name: 1 for SGD, else 0.5."""
        return 1.0 if "SGD" in optimizer else 0.5

    @property
    def uses_noise_scale(self) -> bool:
        return self.rule in ("noise_scale", "noise_scale_uniform")

    def problems(self, optimizer: str) -> Iterator[str]:
        """Yield what is missing for the rule, with an optimizer given by name; each begins with a key."""
        if not self.uses_noise_scale:
            return
        if self.estimator != "all_splits":
            yield (
                f'rule "{self.rule}" needs agvm.estimator "all_splits": two halves tell little about the '
                "signal in the noise"
            )
        if self.reference_batch is None:
            yield (
                f'rule "{self.rule}" needs agvm.reference_batch or lr_scaling.reference_batch, the batch '
                "that the learning rate was chosen for"
            )
        if not any(name in optimizer for name in ("SGD", "Adam", "Lion")):
            yield f'rule "{self.rule}" is for SGD, Adam, AdamW and Lion, and the optimizer is {optimizer}'


class LrScalingConfig(Section):
    """Scaling of LRs and other values from the batch that they were chosen for to that of the run.

    The rules and their sources are in `config/batch_scaling.py`. kappa is batch / reference_batch.
    """

    reference_batch: PositiveInt | None = None
    """Batch size that the values of the JSON were chosen for; required by every rule."""
    rule: Literal["linear", "sqrt", "none"] = "none"
    """Factor of the LRs. linear: batch / reference_batch (MegDet; Goyal et al. 2017); sqrt: its square root
    (AGVM; LAMB); none: 1."""
    betas: Literal["none", "sde", "beta2_power"] = "none"
    """Adam and AdamW. sde: 1 - kappa (1 - beta) for both betas and eps / sqrt(kappa), together with rule sqrt
    (Malladi et al. 2022); beta2_power: the second beta to the power of kappa."""
    weight_decay: Literal["none", "timescale"] = "none"
    """AdamW, Lion, Muon. timescale: LR x weight decay grows with kappa (after Wang and Aitchison 2024)."""
    ema: Literal["none", "power"] = "none"
    """power: `ema.decay` to the power of kappa (Busbridge et al. 2023)."""
    noise_scale: PositiveFloat | None = None
    """Noise scale B_s of the training in images: `train.epochs`, and what `train.clip_window` and schedule
    give in epochs or images, get (1 + batch / B_s) / (1 + reference_batch / B_s) times as long, for the same
    progress (McCandlish et al. 2018). null: they stay."""


class ParamGroupsConfig(Section):
    """LRs of parts of the model, relative to the optimizer's LR (`optim/param_groups.py`)."""

    layer_decay: Annotated[float, Field(gt=0.0, le=1.0)] | None = None
    """Factor of the LR from each layer of the backbone to the layer below it (ViTDet: 0.7 to 0.9)."""
    lr_multipliers: dict[str, PositiveFloat] = Field(default={})
    """Factor of the LR by module, for example {"backbone": 0.1}."""
    decay_norms_and_biases: bool = False
    """The weight decay applies to all parameters, also to norms, biases and position embeddings, as in
    torch.optim, torchvision's references and mmdetection."""


class EmaConfig(Section):
    """Exponential moving average of the weights; if it is enabled, it is evaluated and exported."""

    enabled: bool = False
    """Keep the average."""
    decay: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.9998
    """Decay per step. It is at most (1 + n) / (10 + n) in step n, so that the initial weights lose their
    influence quickly."""


class TrainConfig(Section):
    """Length, output and behaviour of the run."""

    epochs: PositiveFloat | None = None
    """Length of the run in passes over the training images; give either epochs or steps."""
    steps: PositiveInt | None = None
    """Optimizer steps; give either epochs or steps."""
    clip_window: tuple[Length, Length] | Auto | None = None
    """First and last step, counted from 0, in which gradients are clipped; null: all steps. auto: from 100
    steps before to 100 steps after the warmup's end, as AGVM's authors do."""
    seed: Annotated[int, Field(ge=-(2**63), lt=2**63)] = 0
    """Seed of the initial weights, of the order and augmentation of images, and of all sampling."""
    output: PathText = "runs/run"
    """Folder of the run: checkpoints, metrics.jsonl, config.json, results."""
    resume: bool = True
    """Resume from the newest checkpoint in `output` if there is one."""
    log_every: PositiveInt = 20
    """Steps between two lines of metrics.jsonl."""
    eval_every: Length = 0
    """Steps between evaluations, or a text like "1 epoch" or "90000 images"; 0: at the end only."""
    save_every: Length = 0
    """The same between checkpoints; 0: at the end only."""
    keep: PositiveInt = 2
    """Number of newest checkpoints that are kept."""
    keep_best: bool = True
    """Also save and keep the checkpoint with the best evaluation, by mask AP (box AP without masks)."""
    async_save: bool = False
    """Write checkpoints while training continues; each rank needs CPU memory for a copy of what it saves."""
    report: bool = True
    """Write report.html at the end of `giantdet train` (docs/report.md); it opens the data sets again, in the
    main process alone."""
    export_shard: PositiveFloat = 2.0
    """Largest size of an exported file in GiB; a larger model is written in several files, with an index."""
    export_backbone: bool = True
    """False: exports leave out the weights of a frozen backbone, and name timm's tag or the file that they
    come from (docs/giants.md)."""
    max_skipped_steps: PositiveInt = 10
    """Steps whose gradient is not finite are skipped; this many in a row end the run (exit code 3)."""
    timeout_minutes: PositiveFloat = 30.0
    """Minutes that a rank waits for another before the run ends; must be longer than writing a checkpoint and
    than the part of an evaluation that the main rank does alone."""
    compile: bool = False
    """Compile the whole training pass, at ZeRO-0 to 2: the same results up to rounding and faster on GPUs,
    after some minutes in the first step. At ZeRO-3: `model.backbone.compile_blocks`."""
    cuda_graph: bool = False
    """Capture the training pass as a CUDA graph, at ZeRO-0 to 2: the same results, and faster where a step is
    too short for the host to start its kernels in time, as with two images per GPU."""
    deterministic: bool = False
    """Use deterministic kernels, where PyTorch has them; slower on GPUs."""


class TtaConfig(Section):
    """Multi-scale testing (`engine/tta.py`); the defaults are detectron2's."""

    short_sides: tuple[PositiveInt, ...] = (400, 500, 600, 700, 800, 900, 1000, 1100, 1200)
    """Short sides, in pixels, that images are scaled to."""
    max_side: PositiveInt = 4000
    """Largest long side in pixels; a view that would exceed it is scaled to it."""
    flip: bool = True
    """Show the mirror image of each view, too."""
    merge: Literal["nms", "soft_nms", "wbf"] = "nms"
    """How the boxes of all views are merged within each class. nms; soft_nms: scores decay with overlap
    (Bodla et al. 2017); wbf: weighted boxes fusion (Solovyev et al. 2021)."""
    iou: Fraction | None = None
    """IoU above which boxes of a class belong to one object. null: the model's own `nms_iou`; wbf: 0.55."""
    views_at_a_time: PositiveInt = 3
    """Views of an image that the model takes at a time; they are padded to the largest of them."""

    @field_validator("short_sides")
    @classmethod
    def _some(cls, sides: tuple[int, ...]) -> tuple[int, ...]:
        if not sides:
            raise ValueError("give at least one short side in pixels, such as [800]")
        return sides


Backend = Literal["auto", "pycocotools", "hotcoco"]


class EvalConfig(Section):
    """Evaluation of `data.val`."""

    batch_size: PositiveInt = 1
    """Images per rank and step."""
    max_detections: PositiveInt | None = None
    """Number of detections per image that are scored, the best first: per class by COCO's rules, over all
    classes by LVIS's. Images with more objects need a larger number, here and in the `detections` of the
    model's box head. null: the number of the rules, 100 or 300."""
    backend: Backend = "auto"
    """The library that computes COCO's AP: the same numbers, many times as fast with hotcoco (`pip install
    hotcoco`). auto: hotcoco where it is installed, else pycocotools."""
    window_stride: PositiveInt | None = None
    """Semantic models: scale images to `short_side` whatever their other side is, and slide a window of the
    canvas' size over them with this stride in pixels; logits are averaged where windows overlap. null: scale
    whole images to fit on the canvas."""
    tta: TtaConfig | None = None
    """Multi-scale testing: show each image at several scales and mirrored, and merge the detections; images
    are then processed one by one, whatever `batch_size` is. null: show it once, on the canvas."""


class GiantdetConfig(Section):
    """The `"giantdet"` block."""

    model: ModelConfig = MaskRcnnConfig()
    norm: NormConfig = NormConfig()
    agvm: AgvmConfig = AgvmConfig()
    lr_scaling: LrScalingConfig = LrScalingConfig()
    param_groups: ParamGroupsConfig = ParamGroupsConfig()
    ema: EmaConfig = EmaConfig()
    data: DataConfig = DataConfig()
    train: TrainConfig = TrainConfig()
    eval: EvalConfig = EvalConfig()


UNIONS: dict[tuple[str, ...], tuple[str, Mapping[str, type[Section]]]] = {
    ("model",): ("type", SECTIONS),
    ("data", "train"): ("format", FORMATS),
    ("data", "val"): ("format", FORMATS),
}
"""Where the giantdet block has a section of one of several types: the key that chooses it, and the types."""
