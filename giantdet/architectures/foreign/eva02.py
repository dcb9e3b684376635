"""EVA-02's detectors: Cascade R-CNN and Cascade Mask R-CNN of `EVA-02/det`, on detectron2's code.

Fang et al. 2023, "EVA-02: A Visual Representation for Neon Genesis". Source: baaivision/EVA,
`EVA-02/det/detectron2/modeling/backbone/vit.py` and `projects/ViTDet/configs/eva2_*`: ViTDet with
rotary positions beside the absolute ones (rows first, scaled to the 16 x 16 patches of pretraining), SwiGLU
with a norm within, no bias of the keys, and no norm after the last block. The heads are detectron2's.
"""

from __future__ import annotations

from collections.abc import Collection

from giantdet.architectures.foreign.detectron2 import DETECTRON2
from giantdet.architectures.foreign.project import Project, Replacement, Settings, State
from giantdet.architectures.foreign.rotary import NET, UNUSED, further_names, rotary_of

_HEAD_WIDTH, _REFERENCE = 64, 16
_RULES: tuple[tuple[str, Replacement], ...] = (
    (r"^(backbone\.body\.blocks\.\d+\.attn)\.([qv])_bias$", r"\1.\2_proj.bias"),
    (r"^(backbone\.body\.blocks\.\d+\.mlp)\.w1\.", r"\1.fc1_g."),
    (r"^(backbone\.body\.blocks\.\d+\.mlp)\.w2\.", r"\1.fc1_x."),
    (r"^(backbone\.body\.blocks\.\d+\.mlp)\.w3\.", r"\1.fc2."),
    (r"^(backbone\.body\.blocks\.\d+\.mlp)\.ffn_ln\.", r"\1.norm."),
)


def _recognises(keys: Collection[str]) -> bool:
    return f"{NET}blocks.0.attn.q_proj.weight" in keys and DETECTRON2.recognises(keys)


def _names(keys: Collection[str]) -> dict[str, str]:
    return further_names(keys, _RULES)


def _settings(state: State) -> Settings:
    width, _, patch, _ = state[f"{NET}patch_embed.proj.weight"].shape
    rotary = rotary_of(state, "blocks", True, _HEAD_WIDTH, _REFERENCE, patch, width)
    return rotary.settings(state, "EVA-02", "ImageNet's pixel statistics", {})


EVA02 = Project(
    title="EVA-02",
    recognises=_recognises,
    names=_names,
    settings=_settings,
    unused=UNUSED,
)
