"""Meta's PE-Detection: Mask R-CNN on the Perception Encoder (PE-core-G, PE-spatial-G), on detectron2's code.

Bolya et al. 2025, "Perception Encoder". Source: facebookresearch/perception_models, `apps/detection/
detectron2_pe`: ViTDet with a norm before the blocks, rotary positions (columns first, scaled to the
32 x 32 patches of pretraining), LayerScale in PE-spatial, and no norm after the last block. Absolute
positions are tiled over the canvas. The configurations ask for learnt relative positions, which the blocks
ignore. The heads are detectron2's.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

from giantdet.architectures.foreign.detectron2 import DETECTRON2
from giantdet.architectures.foreign.project import Project, Replacement, Settings, State
from giantdet.architectures.foreign.rotary import NET, UNUSED, further_names, rotary_of

_BLOCKS = "transformer.resblocks"
_HEAD_WIDTH, _REFERENCE = 96, 32
_PIXELS = (127.0, 127.0, 127.0)
_RULES: tuple[tuple[str, Replacement], ...] = (
    (r"^backbone\.body\.conv1\.", "backbone.body.patch_embed.proj."),
    (r"^backbone\.body\.positional_embedding$", "backbone.body.pos_embed"),
    (r"^backbone\.body\.ln_pre\.", "backbone.body.norm_pre."),
    (r"^backbone\.body\.transformer\.resblocks\.", "backbone.body.blocks."),
    (r"^(backbone\.body\.blocks\.\d+)\.ln_([12])\.", r"\1.norm\2."),
    (r"^(backbone\.body\.blocks\.\d+)\.ls_([12])\.gamma$", r"\1.gamma_\2"),
    (r"^(backbone\.body\.blocks\.\d+\.attn)\.in_proj_(weight|bias)$", r"\1.qkv.\2"),
    (r"^(backbone\.body\.blocks\.\d+\.attn)\.out_proj\.", r"\1.proj."),
    (r"^(backbone\.body\.blocks\.\d+\.mlp)\.c_fc\.", r"\1.fc1."),
    (r"^(backbone\.body\.blocks\.\d+\.mlp)\.c_proj\.", r"\1.fc2."),
)


def _recognises(keys: Collection[str]) -> bool:
    return f"{NET}{_BLOCKS}.0.attn.in_proj_weight" in keys and DETECTRON2.recognises(keys)


def _names(keys: Collection[str]) -> dict[str, str]:
    return further_names(keys, _RULES)


def _settings(state: State) -> Settings:
    width, _, patch, _ = state[f"{NET}conv1.weight"].shape
    rotary = rotary_of(state, _BLOCKS, False, _HEAD_WIDTH, _REFERENCE, patch, width)
    backbone: dict[str, Any] = {"pixel_mean": _PIXELS, "pixel_std": _PIXELS, "position_fit": "tile"}
    assumed = "pixels (x - 127) / 127 and positions tiled over the canvas"
    return rotary.settings(state, "PE", assumed, backbone)


PE = Project(
    title="PE-Detection",
    recognises=_recognises,
    names=_names,
    settings=_settings,
    unused=UNUSED,
)
