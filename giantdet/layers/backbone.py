"""Build any timm model as a backbone, with one of three adapters.

- Convolutional and hierarchical models (`Pyramid`): feature maps at strides 4, 8, 16 and 32, from timm's
  `forward_intermediates`. It runs the raw model, so the parameter names match those of its checkpoints
  (`features_only` renames some). Families without BatchNorm (Swin, ConvNeXt, ...) do not normalise the output
  of a stage. They get one LayerNorm per level, as in Swin's and ConvNeXt's detection code.
- Swin: the same, with windows that need not divide the canvas (`swin.py`).
- Plain ViTs: one feature map, windowed attention (`plain_vit.py`).

All images have one fixed size, which is known at construction. Weights are loaded afterwards (`weights.py`),
and BatchNorms are converted afterwards (`norm.py`).
"""

from __future__ import annotations

from typing import Any

from timm.layers import LayerNorm2d, set_fused_attn
from timm.models import is_model_in_modules
from timm.models.resnet import Bottleneck
from torch import Tensor, nn

from giantdet.config.architectures.common import BackboneConfig
from giantdet.errors import InputError
from giantdet.layers.blocks import wrap_blocks
from giantdet.layers.body import Backbone, create_body, freeze, image_statistics, require_multiple
from giantdet.layers.model_names import with_timm_name
from giantdet.layers.plain_vit import PlainViT
from giantdet.layers.swin import pad_before_shift, set_canvas

__all__ = ["Backbone", "build_backbone"]

_PLAIN = {"vision_transformer", "eva", "deit"}
_SWIN = {"swin_transformer", "swin_transformer_v2", "swin_transformer_v2_cr"}
_FIXED_SIZE = {"maxxvit", "gcvit", "hiera"}  # built for one image size, given as img_size
_STRIDES = (4, 8, 16, 32)


def build_backbone(config: BackboneConfig, image_size: tuple[int, int]) -> Backbone:
    """Return a randomly initialised backbone for images of `image_size` (height, width) pixels.

    Raises InputError, a ValueError, for an unknown name, a canvas size that the model cannot take, or an
    option that the model family does not have.
    """
    config = with_timm_name(config)
    name = config.name.partition(".")[0]
    plain = is_model_in_modules(name, _PLAIN)
    if config.stride_in_1x1 and plain:
        raise InputError(_no_bottleneck(config))
    for key in ("position_grid", "relative_positions", "attend_padding"):
        if getattr(config, key) and not plain:
            raise InputError(f"{key} is for plain ViTs, not for '{config.name}'")
    backbone = PlainViT(config, image_size) if plain else Pyramid(config, image_size)
    wrap_blocks(config, backbone.body)
    return backbone


class Pyramid(Backbone):
    """A backbone that returns four feature maps, at strides 4, 8, 16 and 32."""

    def __init__(self, config: BackboneConfig, image_size: tuple[int, int]) -> None:
        super().__init__()
        require_multiple(config, image_size, _STRIDES[-1])
        swin = is_model_in_modules(config.name.partition(".")[0], _SWIN)
        self.timm_args = config.timm_args | _timm_args(config, image_size, swin)
        body = create_body(config, self.timm_args)
        _require_native_size(config, body, self.timm_args, image_size)
        keys = set(body.state_dict())
        self.indices, modules = _levels(config, body)
        self.channels = tuple(body.feature_info[i]["num_chs"] for i in self.indices)
        self.strides, self.is_plain = _STRIDES, False
        self.mean, self.std = image_statistics(body)
        body.prune_intermediate_layers(self.indices, prune_norm=True)
        self.dropped_keys = frozenset(keys - set(body.state_dict()))
        if swin:
            pad_before_shift(body)
        elif "img_size" in self.timm_args or body.pretrained_cfg.get("fixed_input_size"):
            self.one_size = f"backbone '{config.name}'"
        if config.stride_in_1x1:
            _move_strides(config, body)
        self.body = body
        unnormed = not any(isinstance(m, nn.BatchNorm2d) for m in body.modules())
        self.norms = nn.ModuleList(
            LayerNorm2d(c, eps=1e-6) if unnormed else nn.Identity() for c in self.channels
        )
        if config.frozen_stages:
            frozen = _first_stages(config, body, modules)
            freeze(body, lambda name: name in frozen)

    def set_canvas(self, image_size: tuple[int, int]) -> None:
        """See `Backbone.set_canvas`."""
        if "always_partition" in self.timm_args:  # Swin stores the attention masks of one size
            set_canvas(self.body, image_size)

    def forward(self, images_B3HW: Tensor) -> list[Tensor]:
        maps = self.body.forward_intermediates(images_B3HW, indices=self.indices, intermediates_only=True)
        return [norm(level) for norm, level in zip(self.norms, maps, strict=True)]


def _timm_args(config: BackboneConfig, image_size: tuple[int, int], swin: bool) -> dict[str, Any]:
    args: dict[str, Any] = dict(num_classes=0)
    name = config.name.partition(".")[0]
    if swin:
        # With a fixed size timm stores the attention masks of the shifted windows. always_partition keeps
        # the window size also where a map is smaller than a window.
        args |= dict(img_size=image_size, always_partition=True)
        if is_model_in_modules(name, {"swin_transformer_v2_cr"}):
            # By default its window is 1/32 of the image side: 32 for images of 1024 pixels, where the
            # pretrained models have 7 or 12.
            args["window_size"] = config.timm_args.get("window_size", _native_side(name) // 32)
        set_fused_attn(True, experimental=True)  # a global setting of timm; Swin's fused attention needs it
    elif is_model_in_modules(name, _FIXED_SIZE):
        args["img_size"] = image_size
    return args


def _native_side(name: str) -> int:
    from timm.models import get_pretrained_cfg

    weights = get_pretrained_cfg(name)
    return weights.input_size[-1] if weights is not None else 224


def _levels(config: BackboneConfig, body: Any) -> tuple[list[int], list[str]]:
    """Return the index in `feature_info` and the module name of the last map of each stride."""
    if not hasattr(body, "forward_intermediates") or not hasattr(body, "feature_info"):
        raise InputError(f"timm cannot return intermediate maps of backbone '{config.name}': choose another")
    last = {info["reduction"]: i for i, info in enumerate(body.feature_info)}
    missing = [stride for stride in _STRIDES if stride not in last]
    if missing:
        raise InputError(
            f"backbone '{config.name}' has no map of stride {', '.join(map(str, missing))} (it has "
            f"{', '.join(map(str, last))}), and is not a plain ViT: choose another, such as resnet50"
        )
    indices = [last[stride] for stride in _STRIDES]
    return indices, [body.feature_info[i]["module"] for i in indices]


def _require_native_size(
    config: BackboneConfig, body: Any, timm_args: dict[str, Any], image_size: tuple[int, int]
) -> None:
    """Raise InputError if the model works only at its checkpoint's image size and `image_size` differs."""
    native = tuple(body.pretrained_cfg["input_size"][1:])
    if body.pretrained_cfg.get("fixed_input_size") and "img_size" not in timm_args and image_size != native:
        raise InputError(
            f"backbone '{config.name}' works at {native[0]}x{native[1]} only, not at "
            f"{image_size[0]}x{image_size[1]}: choose another backbone, or set data.size to that size"
        )


def _first_stages(config: BackboneConfig, body: nn.Module, modules: list[str]) -> set[str]:
    """Return the parameter names of the first `frozen_stages` stages: the stem, then those of `modules`."""
    names = [name for name, _ in body.named_parameters()]
    count = config.frozen_stages
    module = modules[max(count - 2, 0)]
    inside = [i for i, name in enumerate(names) if name.startswith(module + ".")]
    if not inside:
        raise InputError(
            f"frozen_stages: timm does not list the stages of '{config.name}'; set frozen_stages to 0"
        )
    return set(names[: inside[0] if count == 1 else inside[-1] + 1])


def _move_strides(config: BackboneConfig, body: nn.Module) -> None:
    """Move the stride of each stage from the 3x3 to the 1x1 convolution of its first bottleneck."""
    strided = [m for m in body.modules() if isinstance(m, Bottleneck) and m.conv2.stride == (2, 2)]
    if not strided:
        raise InputError(_no_bottleneck(config))
    for block in strided:
        block.conv1.stride, block.conv2.stride = (2, 2), (1, 1)


def _no_bottleneck(config: BackboneConfig) -> str:
    return f"stride_in_1x1 is for ResNets with bottlenecks with strided 3x3 layers, not for '{config.name}'"
