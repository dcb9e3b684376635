"""Table of what some families of timm models need, by timm's modules; no other code names a family.

A family that is not listed is built as it is, for a canvas of multiples of 32.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from timm.layers import resample_abs_pos_embed, set_fused_attn
from timm.models import get_pretrained_cfg, is_model_in_modules
from torch import Tensor, nn

from giantdet.config.architectures.common import BackboneConfig
from giantdet.layers.swin import pad_before_shift, set_canvas


class Family(NamedTuple):
    """How models of these timm modules are built, changed and loaded."""

    modules: tuple[str, ...]
    is_plain: bool = False
    """A plain ViT, which `plain_vit.py` runs."""
    timm_args: Callable[[BackboneConfig, tuple[int, int]], dict[str, Any]] = lambda config, size: {}
    """Return further arguments of timm's model for a canvas (height, width)."""
    adapt: Callable[[nn.Module], None] = lambda body: None
    """Change the built model in place."""
    set_canvas: Callable[[nn.Module, tuple[int, int]], None] | None = None
    """Let a model that was built for one canvas take another (height, width)."""
    resample: Callable[[Mapping[str, Tensor], Any], Mapping[str, Tensor]] = lambda state, body: state
    """Return weights of another image size for the body's; timm's own filter runs before."""
    refusal: str = ""
    """Why such a model cannot be a backbone, and what to do."""


def family_of(name: str) -> Family:
    """Return the family of a timm model, with or without a tag of weights."""
    name = name.partition(".")[0]
    return next((each for each in FAMILIES if is_model_in_modules(name, set(each.modules))), _ANY)


def _at_image_size(config: BackboneConfig, image_size: tuple[int, int]) -> dict[str, Any]:
    """Return the canvas: windows of MaxViT and GCViT are 1/32 of it, CoAtNet and Hiera have tables for it."""
    return {"img_size": image_size}


def _swin(config: BackboneConfig, image_size: tuple[int, int]) -> dict[str, Any]:
    # With a fixed size timm stores the attention masks of the shifted windows. always_partition keeps the
    # window size also where a map is smaller than a window.
    set_fused_attn(True, experimental=True)  # a global setting of timm; Swin's fused attention needs it
    return {"img_size": image_size, "always_partition": True}


def _swin_cr(config: BackboneConfig, image_size: tuple[int, int]) -> dict[str, Any]:
    # By default its window is 1/32 of the image side: 32 for images of 1024 pixels, where the pretrained
    # models have 7 or 12.
    weights = get_pretrained_cfg(config.name.partition(".")[0])
    native = weights.input_size[-1] if weights is not None else 224
    window = config.timm_args.get("window_size", native // 32)
    return _swin(config, image_size) | {"window_size": window}


def pad_convolutions(body: nn.Module) -> None:
    """Pad the unpadded convolutions and pools of an Inception network, or Xception, by half their kernel.

    Without padding its maps are one to four cells short, and cell i of the map of stride s is centred at
    pixel s * i + c, with c of 5, 13, 21 and 37 in Inception-v4. With it c is 0, as in a ResNet: at the centre
    of the cell's anchors, and less than half a cell from where RoIAlign assumes it. The weights are the
    same, and TensorFlow's Inception-ResNet-v2 for detection is built in this way (`align_feature_maps`).
    """
    for module in body.modules():
        if isinstance(module, nn.Conv2d | nn.MaxPool2d) and module.padding in (0, (0, 0)):
            size = module.kernel_size
            sides = (size, size) if isinstance(size, int) else size
            module.padding = tuple((side - 1) // 2 for side in sides)


def _hiera_positions(state: Mapping[str, Tensor], body: Any) -> Mapping[str, Tensor]:
    """Resample the absolute positions `[1, rows * columns, C]` of a square grid to the body's."""
    key, own = "pos_embed", body.pos_embed
    if key not in state or own is None or own.ndim != 3 or state[key].shape == own.shape:
        return state
    grid = list(body.tokens_spatial_shape)
    return {**state, key: resample_abs_pos_embed(state[key], grid, num_prefix_tokens=0)}


_ANY = Family(())
FAMILIES = (
    Family(("vision_transformer", "eva", "deit"), is_plain=True),
    Family(
        ("swin_transformer", "swin_transformer_v2"),
        timm_args=_swin,
        adapt=pad_before_shift,
        set_canvas=set_canvas,
    ),
    Family(("swin_transformer_v2_cr",), timm_args=_swin_cr, adapt=pad_before_shift, set_canvas=set_canvas),
    Family(("maxxvit", "gcvit"), timm_args=_at_image_size),
    Family(("hiera",), timm_args=_at_image_size, resample=_hiera_positions),
    Family(("inception_v4", "inception_resnet_v2", "xception"), adapt=pad_convolutions),
    Family(
        ("inception_v3",),
        refusal="has pooling without padding inside its blocks, so that its maps do not align: "
        "choose inception_v4",
    ),
    Family(
        ("naflexvit",),
        refusal="takes lists of patches and has no map: choose a vit_* model, such as "
        "vit_base_patch16_siglip_224",
    ),
)
