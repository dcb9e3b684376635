"""mmsegmentation's Semantic FPN and UPerNet; the names of backbones are those of mmdetection.

Source: the configurations and `models/` of mmsegmentation 1.2.
"""

from __future__ import annotations

from collections.abc import Collection

from giantdet.architectures.foreign.mmdetection import (
    BACKBONE_RULES,
    BLOCK_RULES,
    UNUSED,
    Rules,
    with_merged_patches,
)
from giantdet.architectures.foreign.project import (
    IMAGENET_MEAN,
    IMAGENET_STD,
    Project,
    Settings,
    State,
    renamed,
)

_SEMANTIC_FPN: Rules = (
    (r"^decode_head\.scale_heads\.", "semantic_head.levels."),
    (r"^neck\.lateral_convs\.", "fpn.laterals."),
    (r"^neck\.fpn_convs\.", "fpn.outputs."),
    (r"^decode_head\.", "semantic_head."),
)
_UPERNET: Rules = (
    (r"\.psp_modules\.(\d)\.1\.", r".pooling.scales.\1.1."),
    (r"^decode_head\.bottleneck\.", "decode_head.pooling.merge."),
    (r"\.fpn_bottleneck\.", ".fusion."),
    (r"\.lateral_convs\.", ".laterals."),
    (r"\.fpn_convs\.", ".outputs."),
    # Convolutions with norms that are not numbered.
    (r"\.(merge|fusion)\.conv\.", r".\1.0."),
    (r"\.(merge|fusion)\.(?:bn|gn)\.", r".\1.1."),
)


def _names(keys: Collection[str]) -> dict[str, str]:
    is_upernet = any(".psp_modules." in key for key in keys)
    rules = (*BACKBONE_RULES, *(_UPERNET if is_upernet else _SEMANTIC_FPN), *BLOCK_RULES)
    return {key: renamed(key, ((r"\.conv_seg\.", ".classes."), *rules)) for key in keys}


def _recognises(keys: Collection[str]) -> bool:
    return "decode_head.conv_seg.weight" in keys


def _settings(state: State) -> Settings:
    return Settings({"backbone": {"pixel_mean": IMAGENET_MEAN, "pixel_std": IMAGENET_STD}})


MMSEGMENTATION = Project(
    title="mmsegmentation",
    recognises=_recognises,
    names=_names,
    settings=_settings,
    values=with_merged_patches,
    unused=UNUSED,
)
