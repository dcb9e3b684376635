"""Build any timm model as a backbone, with one of two adapters.

- Convolutional and hierarchical models (`Pyramid`): feature maps at strides 4, 8, 16 and 32, from timm's
  `forward_intermediates`. It runs the raw model, so the parameter names match those of its checkpoints
  (`features_only` renames some). Families without BatchNorm (Swin, ConvNeXt, ...) do not normalise the output
  of a stage. They get one LayerNorm per level, as in Swin's and ConvNeXt's detection code (`level_norms`).
- Plain ViTs: one feature map, windowed attention (`plain_vit.py`).

What single families need beyond that is the table in `families.py`. With `output_stride` the last stages are
dilated, and their maps have the same stride. With `deformable_stages` their 3x3 convolutions are deformable
(`deformable.py`).

All images have one fixed size, which is known at construction. Weights are loaded afterwards (`weights.py`),
and BatchNorms are converted afterwards (`norm.py`).
"""

from __future__ import annotations

from typing import Any

from timm.layers import LayerNorm2d
from timm.models.resnet import Bottleneck
from torch import Tensor, nn

from giantdet.config.architectures.common import BackboneConfig
from giantdet.errors import InputError
from giantdet.layers.blocks import wrap_blocks
from giantdet.layers.body import Backbone, check_name, create_body, freeze, image_statistics, require_multiple
from giantdet.layers.deformable import make_deformable
from giantdet.layers.families import family_of
from giantdet.layers.model_names import with_timm_name
from giantdet.layers.plain_vit import PlainViT

__all__ = ["Backbone", "build_backbone"]

_STRIDES = (4, 8, 16, 32)


def build_backbone(config: BackboneConfig, image_size: tuple[int, int]) -> Backbone:
    """Return a randomly initialised backbone for images of `image_size` (height, width) pixels.

    Raises InputError, a ValueError, for an unknown name, a canvas size that the model cannot take, or an
    option that the model family does not have.
    """
    config = with_timm_name(config)
    check_name(config.name)
    family = family_of(config.name)
    if family.refusal:
        raise InputError(f"backbone '{config.name}' {family.refusal}")
    plain = family.is_plain
    if config.stride_in_1x1 and plain:
        raise InputError(_no_bottleneck(config))
    if config.output_stride != _STRIDES[-1] and plain:
        raise InputError(_no_dilation(config))
    if config.deformable_stages and plain:
        raise InputError(f"deformable_stages is for convolutional backbones, not for '{config.name}'")
    if config.level_norms is not None and plain:
        raise InputError(f"level_norms is for hierarchical backbones, not for '{config.name}'")
    for key in ("position_grid", "relative_positions", "attend_padding"):
        if getattr(config, key) and not plain:
            raise InputError(f"{key} is for plain ViTs, not for '{config.name}'")
    backbone = PlainViT(config, image_size) if plain else Pyramid(config, image_size)
    if config.pixel_mean is not None:
        backbone.mean = _from_255(config.pixel_mean)
    if config.pixel_std is not None:
        backbone.std = _from_255(config.pixel_std)
    if config.frozen:
        backbone.freeze_all()
        config = config.model_copy(update={"checkpoint_blocks": False})  # no activation is kept
    wrap_blocks(config, backbone.body)
    return backbone


def _from_255(values: tuple[float, float, float]) -> tuple[float, float, float]:
    red, green, blue = values
    return red / 255, green / 255, blue / 255


class Pyramid(Backbone):
    """A backbone that returns four feature maps, at strides 4, 8, 16 and 32, or at most `output_stride`."""

    def __init__(self, config: BackboneConfig, image_size: tuple[int, int]) -> None:
        super().__init__()
        require_multiple(config, image_size, _STRIDES[-1])
        family = family_of(config.name)
        self.timm_args = config.timm_args | {"num_classes": 0} | family.timm_args(config, image_size)
        self.strides, self.is_plain = tuple(min(s, config.output_stride) for s in _STRIDES), False
        body = (
            _dilated_body(config, self.timm_args)
            if self.strides != _STRIDES
            else create_body(config, self.timm_args)
        )
        _require_native_size(config, body, self.timm_args, image_size)
        keys = set(body.state_dict())
        self.indices, modules = _levels(config, body, self.strides)
        self.channels = tuple(body.feature_info[i]["num_chs"] for i in self.indices)
        self.mean, self.std = image_statistics(body)
        body.prune_intermediate_layers(self.indices, prune_norm=True)
        self.dropped_keys = frozenset(keys - set(body.state_dict()))
        family.adapt(body)
        self.family = family
        is_fixed = "img_size" in self.timm_args or bool(body.pretrained_cfg.get("fixed_input_size"))
        if is_fixed and family.set_canvas is None:
            self.one_size = f"backbone '{config.name}'"
        if config.stride_in_1x1:
            _move_strides(config, body)
        for stage in sorted(set(config.deformable_stages)):
            inside = _first_stages("deformable_stages", config, body, modules, stage)
            before = _first_stages("deformable_stages", config, body, modules, stage - 1)
            make_deformable(body, inside - before, f"stage {stage} of '{config.name}'")
        self.added_keys = frozenset(set(body.state_dict()) - keys)
        self.body = body
        unnormed = not any(isinstance(m, nn.BatchNorm2d) for m in body.modules())
        normed = unnormed if config.level_norms is None else config.level_norms
        self.norms = nn.ModuleList(
            LayerNorm2d(c, eps=1e-6) if normed else nn.Identity() for c in self.channels
        )
        if config.frozen_stages:
            frozen = _first_stages("frozen_stages", config, body, modules, config.frozen_stages)
            freeze(body, lambda name: name in frozen)

    def set_canvas(self, image_size: tuple[int, int]) -> None:
        """See `Backbone.set_canvas`."""
        if self.family.set_canvas is not None:
            self.family.set_canvas(self.body, image_size)

    def maps(self, images_B3HW: Tensor) -> list[Tensor]:
        """See `Backbone.maps`."""
        maps = self.body.forward_intermediates(images_B3HW, indices=self.indices, intermediates_only=True)
        return [norm(level) for norm, level in zip(self.norms, maps, strict=True)]


def _dilated_body(config: BackboneConfig, timm_args: dict[str, Any]) -> Any:
    """Return a timm model whose last stages are dilated; InputError where its family cannot be."""
    try:
        return create_body(config, timm_args | {"output_stride": config.output_stride})
    except (AssertionError, NotImplementedError) as error:
        raise InputError(_no_dilation(config)) from error
    except InputError as error:
        if "output_stride" in str(error.__cause__):  # the family has no such argument
            raise InputError(_no_dilation(config)) from error
        raise


def _no_dilation(config: BackboneConfig) -> str:
    return (
        f"timm cannot dilate backbone '{config.name}': set output_stride to 32, or choose a ResNet, RegNet, "
        "EfficientNet or ConvNeXt"
    )


def _levels(config: BackboneConfig, body: Any, strides: tuple[int, ...]) -> tuple[list[int], list[str]]:
    """Return the index in `feature_info` and the module name of the last map of each stride.

    In a dilated model, whose last stages have the same stride, these are the last four maps.
    """
    if not hasattr(body, "forward_intermediates") or not hasattr(body, "feature_info"):
        raise InputError(f"timm cannot return intermediate maps of backbone '{config.name}': choose another")
    last = {info["reduction"]: i for i, info in enumerate(body.feature_info)}
    if strides != _STRIDES:
        indices = [*range(len(body.feature_info))][-len(strides) :]
        if tuple(body.feature_info[i]["reduction"] for i in indices) != strides:
            raise InputError(_no_dilation(config))
        return indices, [body.feature_info[i]["module"] for i in indices]
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


def _first_stages(
    key: str, config: BackboneConfig, body: nn.Module, modules: list[str], count: int
) -> set[str]:
    """Return the parameter names of the first `count` stages: the stem, then those of `modules`."""
    names = [name for name, _ in body.named_parameters()]
    module = modules[max(count - 2, 0)]
    inside = [i for i, name in enumerate(names) if name.startswith(module + ".")]
    if not inside:
        raise InputError(f"{key}: timm does not list the stages of '{config.name}'; leave {key} out")
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
