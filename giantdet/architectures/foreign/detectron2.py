"""detectron2's models: its zoo (`configs/`) and ViTDet's (`projects/ViTDet`).

Sources: the configurations and `modeling/` of detectron2 0.6. Channels are blue, green, red except in
ViTDet's project. The zoo's ResNets begin with MSRA's weights: standard deviation 1, strides in the 1x1
convolutions. With GroupNorm in the backbone, strides are in the 3x3 convolutions; so they are in its
ResNeXt-101, whose standard deviations are ImageNet's.
"""

from __future__ import annotations

import re
from collections.abc import Collection
from typing import Any

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

_TOWERS = {"cls": "class_convs", "bbox": "box_convs"}
_SWIN = "backbone.bottom_up.patch_embed."
_VIT = "backbone.net."


def _name(key: str, finest: int) -> str:
    """Return giantdet's name of a parameter; `finest` is the pyramid's first level, 2 or 3."""
    rules: tuple[tuple[str, Replacement], ...] = (
        (r"^backbone\.bottom_up\.stem\.conv1\.norm", "backbone.body.bn1"),
        (r"^backbone\.bottom_up\.stem\.conv1", "backbone.body.conv1"),
        (r"^backbone\.bottom_up\.(res\d.*)\.conv(\d)\.norm\.", r"backbone.bottom_up.\1.bn\2."),
        (r"\.shortcut\.norm\.", ".downsample.1."),
        (r"\.shortcut\.", ".downsample.0."),
        (r"^backbone\.net\.", "backbone.body."),
        (r"^backbone\.top_block", "fpn.top"),
        # Swin: patches are merged at the end of a stage, in timm at the beginning of the next one.
        (
            r"^backbone\.bottom_up\.layers\.(\d)\.downsample",
            lambda m: f"backbone.body.layers.{int(m[1]) + 1}.downsample",
        ),
        (r"^backbone\.bottom_up\.norm(\d)\.", r"backbone.norms.\1."),
        (r"^backbone\.bottom_up\.(layers|patch_embed)\.", r"backbone.body.\1."),
        (r"^head\.cls_score", "head.classes"),
        (r"^head\.bbox_pred", "head.deltas"),
        (r"^proposal_generator\.rpn_head\.objectness_logits", "rpn.head.objectness"),
        (r"^proposal_generator\.rpn_head\.anchor_deltas", "rpn.head.deltas"),
        (r"^proposal_generator\.rpn_head\.conv\.conv0", "rpn.head.conv"),
        (
            r"^proposal_generator\.rpn_head\.conv\.conv(\d)",
            lambda m: f"rpn.head.further_convs.{int(m[1]) - 1}",
        ),
        (r"^proposal_generator\.rpn_head", "rpn.head"),
        (r"^roi_heads\.box_predictor\.(\d\.)?cls_score", r"box_head.\1classes"),
        (r"^roi_heads\.box_predictor\.(\d\.)?bbox_pred", r"box_head.\1deltas"),
        (r"^roi_heads\.mask_head\.deconv", "mask_head.upsample"),
        (r"^roi_heads\.mask_head\.predictor", "mask_head.masks"),
        (r"^sem_seg_head\.predictor", "semantic_head.classes"),
        (r"^head\.(cls|bbox)_subnet\.(\d+)", lambda m: f"head.{_TOWERS[m[1]]}.{int(m[2]) // 2}.0"),
        (r"^backbone\.fpn_lateral(\d)", lambda m: f"fpn.laterals.{int(m[1]) - finest}.0"),
        (r"^backbone\.fpn_output(\d)", lambda m: f"fpn.outputs.{int(m[1]) - finest}.0"),
        (r"^backbone\.bottom_up\.res(\d)", lambda m: f"backbone.body.layer{int(m[1]) - 1}"),
        (r"^roi_heads\.box_head\.(\d\.)?fc(\d)", lambda m: f"box_head.{m[1] or ''}fcs.{int(m[2]) - 1}"),
        (r"^roi_heads\.mask_head\.mask_fcn(\d)", lambda m: f"mask_head.convs.{int(m[1]) - 1}.0"),
        (r"^roi_heads\.box_head\.(\d\.)?conv(\d)", lambda m: f"box_head.{m[1] or ''}convs.{int(m[2]) - 1}.0"),
        (r"^backbone\.simfp_(\d)\.(\d)", _simple_pyramid_name),
        (r"^sem_seg_head\.p(\d)\.(\d)", lambda m: f"semantic_head.levels.{int(m[1]) - 2}.{m[2]}.0"),
        # A convolution and its norm are a block here.
        (r"\.0\.norm\.", ".1."),
    )
    return renamed(key, rules)


def _simple_pyramid_name(key: re.Match[str]) -> str:
    """Return the name of a layer of ViTDet's simple pyramid, `simfp_LEVEL.LAYER`."""
    level, layer = int(key[1]), int(key[2])
    rescaling = {2: 4, 3: 1, 4: 0, 5: 1}[level]  # number of layers before the convolutions
    return f"fpn.stages.{level - 2}.{layer}" + (".0" if layer >= rescaling else "")


def _names(keys: Collection[str]) -> dict[str, str]:
    finest = min(numbers(keys, r"backbone\.fpn_lateral(\d)"), default=2)
    return {key: _name(key, finest) for key in keys}


def _recognises(keys: Collection[str]) -> bool:
    return any(key.startswith(("backbone.bottom_up.", _VIT)) for key in keys) and any(
        key.startswith(("proposal_generator.", "roi_heads.", "head.", "sem_seg_head.")) for key in keys
    )


def _settings(state: State) -> Settings:
    section: dict[str, Any] = {"conventions": "detectron2"}
    if any(key.startswith("roi_heads.") for key in state):
        section["box_head"] = section["mask_head"] = {"sampling_ratio": 0}
    backbone: dict[str, Any] = {"pixel_mean": IMAGENET_MEAN, "pixel_std": IMAGENET_STD}
    section["backbone"] = backbone
    if any(key.startswith(_VIT) for key in state):
        return Settings(section | {"backbone": backbone | {"attend_padding": True}}, affine_norm="layer")
    if any(key.startswith(_SWIN) for key in state):
        return Settings(section, affine_norm="layer")
    convolution = state.get("backbone.bottom_up.res2.0.conv2.weight")
    is_resnext = convolution is not None and len(convolution) != convolution.shape[1]
    bgr, assumed = True, "the pixels, channels (blue first) and strides were those of the zoo's models"
    if "pixel_std" in state:  # older files; in the order of the channels: of usual images, red is brightest
        mean, std = ([float(value) for value in state[key].flatten()] for key in ("pixel_mean", "pixel_std"))
        bgr, order = mean[0] <= mean[-1], -1 if mean[0] <= mean[-1] else 1
        backbone |= {"pixel_mean": tuple(mean[::order]), "pixel_std": tuple(std[::order])}
        assumed = f"the first channel was {'blue' if bgr else 'red'}, as pixel_mean suggests"
    else:
        backbone["pixel_std"] = IMAGENET_STD if is_resnext else (1.0, 1.0, 1.0)
    has_batch_norm = "backbone.bottom_up.stem.conv1.norm.running_var" in state
    backbone["stride_in_1x1"] = not is_resnext and has_batch_norm and max(backbone["pixel_std"]) == 1
    return Settings(section, bgr=bgr, assumed=assumed)


DETECTRON2 = Project(
    title="detectron2",
    recognises=_recognises,
    names=_names,
    settings=_settings,
    unused=(
        (r"^pixel_(mean|std)$", "statistics of pixels, taken over as backbone.pixel_mean and pixel_std"),
        (r"anchor_generator\.cell_anchors\.", "anchors, which giantdet computes"),
        (r"\.relative_position_index$|\.attn_mask$", "tables that giantdet computes"),
    ),
)
