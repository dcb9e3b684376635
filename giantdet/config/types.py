"""The `"giantdet"` block of a run's JSON, as types.

Each component of the system sees its own section only. The sections of models are in `architectures/`.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from giantdet.config.architectures import ModelConfig
from giantdet.config.architectures.common import NormConfig
from giantdet.config.architectures.mask_rcnn import MaskRcnnConfig
from giantdet.config.section import Auto, Fraction, Length, PositiveFloat, PositiveInt, Section


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

    def resolved(self, optimizer: str) -> AgvmConfig:
        """Return the configuration for an optimizer of that name, without an "auto" in `preconditioned`."""
        if self.preconditioned != "auto":
            return self
        # The names of DeepSpeed's and torch's classes count too: FusedAdam, DeepSpeedCPUAdam.
        return self.model_copy(update={"preconditioned": "Adam" in optimizer})


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
    lr_multipliers: dict[str, PositiveFloat] = Field(default={})
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
    """Write checkpoints while training continues; needs the CPU's memory for a copy of what a rank saves."""
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

    model: ModelConfig = MaskRcnnConfig()
    norm: NormConfig = NormConfig()
    agvm: AgvmConfig = AgvmConfig()
    lr_scaling: LrScalingConfig = LrScalingConfig()
    param_groups: ParamGroupsConfig = ParamGroupsConfig()
    ema: EmaConfig = EmaConfig()
    data: DataConfig = DataConfig()
    train: TrainConfig = TrainConfig()
    eval: EvalConfig = EvalConfig()
