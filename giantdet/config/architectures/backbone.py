"""The `backbone` section: a timm model, its weights, and how a plain ViT attends and takes its positions."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, Any, Literal

from pydantic import Field

from giantdet.config import timm_args
from giantdet.config.section import Fraction, PathText, PositiveFloat, PositiveInt, Section

Channels = tuple[float, float, float]


class BackboneConfig(Section):
    """A timm model as the backbone; `layers/backbone.py` has the three adapters."""

    name: str = "resnet50"
    """Name of a timm model, for example resnet50, convnext_tiny, swin_tiny_patch4_window7_224. Also with
    timm's sources: hf-hub:USER/REPOSITORY, or local-dir:FOLDER with a config.json of timm."""
    pretrained: bool = False
    """Load timm's weights of this name (from the network or timm's cache); see also `init_weights`."""
    init_weights: PathText | None = None
    """Local safetensors or PyTorch file with pretrained weights of this backbone, or a folder of shards.
    Tensors may be nested or have prefixes (state_dict, model_ema, module., backbone.): they are found by the
    names that the model expects."""
    pixel_mean: Channels | None = None
    """Mean of red, green and blue that the weights expect to be subtracted, on the scale 0 to 255. None: that
    of timm's weights of this name."""
    pixel_std: tuple[PositiveFloat, PositiveFloat, PositiveFloat] | None = None
    """Standard deviation to divide by, on the same scale. MSRA's and Caffe's weights: [1, 1, 1]."""
    stride_in_1x1: bool = False
    """ResNet bottlenecks have their stride in the first 1x1 convolution (MSRA and Caffe weights)."""
    frozen_stages: Annotated[int, Field(ge=0, le=5)] = 0
    """Number of stages that are frozen, from the first; 1 is the stem. detectron2's FREEZE_AT."""
    frozen: bool = False
    """Freeze the whole backbone: evaluation mode in training too, and no gradients (docs/giants.md)."""
    output_stride: Literal[8, 16, 32] = 32
    """Stride of the last map: 16 dilates the last stage instead of striding it, 8 the last two (DeepLab).
    Only convolutional families; the weights are the same."""
    deformable_stages: tuple[Annotated[int, Field(ge=2, le=5)], ...] = ()
    """Stages whose 3x3 convolutions are deformable (DCNv2, `layers/deformable.py`), for example [3, 4, 5];
    2 to 5 are the stages of C2 to C5."""
    level_norms: bool | None = None
    """LayerNorm on each map of a hierarchical backbone. None: of those without batch norms, whose stages do
    not end with a norm (Swin, ConvNeXt)."""
    drop_path_rate: Fraction = 0.0
    """Probability that stochastic depth drops the last block; it grows linearly with depth."""
    checkpoint_blocks: bool | PositiveInt = False
    """Recompute activations in the backward pass (less memory, up to a third more time): true for every
    block, 2 for every second block, 3 for every third."""
    compile_blocks: bool = False
    """Compile each block with torch.compile: the same results up to rounding, and faster on GPUs after
    minutes of compilation."""
    timm_args: dict[str, Any] = Field(default={})
    """Further arguments of timm's model, for example {"embed_dim": 64, "num_heads": 4} for a small ViT.
    Those that other keys set, such as img_size, are refused (config/timm_args.py)."""
    window: Annotated[int, Field(ge=0)] = 16
    """Plain ViTs: side of the attention windows in patches; 0 makes all blocks global."""
    global_blocks: PositiveInt | tuple[Annotated[int, Field(ge=0)], ...] = 4
    """Plain ViTs: number of evenly spaced blocks with global attention (ViTDet's 4), or a list of the blocks
    themselves, counted from 0."""
    patch_size: PositiveInt = 16
    """Plain ViTs: the patch embedding is resampled to this size."""
    position_grid: tuple[PositiveInt, PositiveInt] | None = None
    """Plain ViTs with windows: rows and columns of the absolute position embeddings, which are interpolated
    (bicubic) to the canvas in every forward pass; ViTDet: [14, 14]. None: they have the size of the canvas,
    and are interpolated once, when weights are loaded."""
    position_fit: Literal["interpolate", "tile"] = "interpolate"
    """How `position_grid` covers another canvas: interpolate, or tile, which repeats the grid from the top
    left corner (PE-Detection)."""
    relative_positions: bool = False
    """Plain ViTs with windows: learnt relative positions in every block, by rows and by columns (ViTDet)."""
    attend_padding: bool = False
    """Plain ViTs with windows: tokens also attend to the padding of windows that reach beyond the canvas, as
    in ViTDet's code. False masks it."""

    def problems(self) -> Iterator[str]:
        """Yield messages like those of `ArchitectureConfig.problems`."""
        if self.drop_path_rate >= 1:
            yield "backbone.drop_path_rate must be less than 1: it is the share of dropped blocks"
        if self.pretrained and self.init_weights:
            yield (
                "backbone.pretrained and giantdet.model.backbone.init_weights exclude each other; give one"
            )
        frozen = [stage for stage in self.deformable_stages if stage <= self.frozen_stages]
        if frozen:
            yield (
                f"backbone.deformable_stages has stages {frozen}, which frozen_stages {self.frozen_stages} "
                "freezes, so their offsets could not be learnt: leave them out"
            )
        if self.position_fit == "tile" and self.position_grid is None:
            yield 'backbone.position_fit "tile" repeats a grid: set backbone.position_grid to its sides'
        yield from timm_args.problems(self.timm_args)
        for key in ("position_grid", "relative_positions", "attend_padding"):
            if getattr(self, key) and not self.window:
                yield f"backbone.{key} needs windows: set backbone.window to the side of a window in patches"
