"""mmdetection's two-stage detectors, RetinaNet and Panoptic FPN; versions 2 and 3 share their names.

Source: the configurations and `models/` of mmdetection 3.3. Nearly all models take red, green, blue; those
called "caffe", whose tensors look the same, do not, and the ResNeXt-101 32x8d does not either.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import torch
from torch import Tensor

from giantdet.architectures.foreign.project import (
    IMAGENET_MEAN,
    IMAGENET_STD,
    Project,
    Replacement,
    Settings,
    State,
    numbers,
    renamed,
)
from giantdet.errors import InputError

Rules = tuple[tuple[str, Replacement], ...]

BACKBONE_RULES: Rules = (
    (r"^backbone\.patch_embed\.projection", "backbone.body.patch_embed.proj"),
    (r"^backbone\.norm(\d)\.", r"backbone.norms.\1."),
    (r"\.attn\.w_msa\.", ".attn."),
    (r"\.ffn\.layers\.0\.0\.", ".mlp.fc1."),
    (r"\.ffn\.layers\.1\.", ".mlp.fc2."),
    # timm merges patches at the beginning of a stage, mmdetection at the end of the one before.
    (
        r"^backbone\.stages\.(\d)\.downsample",
        lambda m: f"backbone.body.layers.{int(m[1]) + 1}.downsample",
    ),
    (r"^backbone\.stages\.(\d)", r"backbone.body.layers.\1"),
    # ResNetV1c: three convolutions, each with a norm.
    (r"^backbone\.stem\.7", "backbone.bn1"),
    (r"^backbone\.stem", "backbone.conv1"),
    (r"^backbone\.(?!body|norms)", "backbone.body."),
)
BLOCK_RULES: Rules = (
    (r"^(?!backbone)(.*)\.(\d+)\.conv\.", r"\1.\2.0."),
    (r"^(?!backbone)(.*)\.(\d+)\.(?:bn|gn)\.", r"\1.\2.1."),
)
"""A convolution and its norm, `conv` and `bn` of a numbered `ConvModule`, are a block here."""
UNUSED = ((r"\.relative_position_index$", "tables that giantdet computes"),)

_RULES: Rules = (
    *BACKBONE_RULES,
    (r"^neck\.lateral_convs\.", "fpn.laterals."),
    (r"^bbox_head\.cls_convs\.", "head.class_convs."),
    (r"^bbox_head\.reg_convs\.", "head.box_convs."),
    (r"^bbox_head\.retina_cls", "head.classes"),
    (r"^bbox_head\.retina_reg", "head.deltas"),
    (r"^rpn_head\.rpn_conv\.0\.conv", "rpn.head.conv"),
    (r"^rpn_head\.rpn_conv\.(\d)\.conv", lambda m: f"rpn.head.further_convs.{int(m[1]) - 1}"),
    (r"^rpn_head\.rpn_conv", "rpn.head.conv"),
    (r"^rpn_head\.rpn_cls", "rpn.head.objectness"),
    (r"^rpn_head\.rpn_reg", "rpn.head.deltas"),
    (r"^roi_head\.bbox_head\.(\d\.)?fc_cls", r"box_head.\1classes"),
    (r"^roi_head\.bbox_head\.(\d\.)?fc_reg", r"box_head.\1deltas"),
    (r"^roi_head\.bbox_head\.(\d\.)?shared_fcs", r"box_head.\1fcs"),
    (r"^roi_head\.bbox_head\.(\d\.)?shared_convs", r"box_head.\1convs"),
    (r"^roi_head\.mask_head\.(\d\.)?convs", r"mask_head.\1convs"),
    (r"^roi_head\.mask_head\.(\d\.)?upsample", r"mask_head.\1upsample"),
    (r"^roi_head\.mask_head\.(\d\.)?conv_logits", r"mask_head.\1masks"),
    # Here the numbers of a level's layers count the upsampling after each convolution.
    (
        r"^semantic_head\.conv_upsample_layers\.(\d)\.conv\.(\d)\.",
        lambda m: f"semantic_head.levels.{m[1]}.{2 * int(m[2])}.",
    ),
    (r"^semantic_head\.conv_logits", "semantic_head.classes"),
    *BLOCK_RULES,
)


def _names(keys: Collection[str]) -> dict[str, str]:
    levels = len(numbers(keys, r"neck\.lateral_convs\.(\d)\."))
    top: Rules = tuple(  # the convolutions after those of the levels make P6 and P7
        (rf"^neck\.fpn_convs\.{levels + i}\.conv\.", f"fpn.top.p{6 + i}.") for i in range(2)
    )
    rules = (*top, (r"^neck\.fpn_convs\.", "fpn.outputs."), *_RULES)
    return {key: renamed(key, rules) for key in keys}


def _recognises(keys: Collection[str]) -> bool:
    heads = ("rpn_head.", "roi_head.", "bbox_head.", "mask_head.")
    return any(key.startswith("neck.") for key in keys) and any(key.startswith(heads) for key in keys)


def with_merged_patches(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return the state with Swin's merged patches in timm's order: by pixel, not by channel."""
    for key, tensor in state.items():
        if key.startswith("backbone.body.layers.") and ".downsample." in key:
            *rows, columns = tensor.shape
            by_pixel = tensor.view(*rows, columns // 4, 2, 2).transpose(-3, -1)
            state[key] = by_pixel.reshape(*rows, columns)
    return state


def _values(state: dict[str, Tensor]) -> dict[str, Tensor]:
    for key in ("semantic_head.classes.weight", "semantic_head.classes.bias"):
        if key in state:  # the class "things" is the last one
            state[key] = torch.cat([state[key][-1:], state[key][:-1]])
    return with_merged_patches(state)


def _settings(state: State) -> Settings:
    if any(".conv_res." in key or key.startswith("roi_head.semantic_head.") for key in state):
        raise InputError("it is HTC, whose mask heads feed each other: giantdet does not support it")
    section: dict[str, Any] = {
        "conventions": "mmdetection",
        "backbone": {"pixel_mean": IMAGENET_MEAN, "pixel_std": IMAGENET_STD},
    }
    if any(key.startswith("roi_head.") for key in state):
        section["box_head"] = section["mask_head"] = {"sampling_ratio": 0}
    if "semantic_head.conv_logits.weight" in state:
        section["merge"] = {"score": 0.6}
    convolution = state.get("backbone.layer1.0.conv2.weight")
    if convolution is None:
        return Settings(section)
    is_32x8d = convolution.shape[:2] == (256, 8)
    return Settings(
        section,
        bgr=is_32x8d,
        assumed="the model is none of those called caffe (for them, see docs/weights.md)",
    )


MMDETECTION = Project(
    title="mmdetection",
    recognises=_recognises,
    names=_names,
    settings=_settings,
    values=_values,
    unused=UNUSED,
)
