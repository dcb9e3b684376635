"""torchvision's Faster R-CNN, Mask R-CNN and RetinaNet with a ResNet-FPN, versions 1 and 2.

In torchvision the background is class 0, in detectron2 and giantdet the last class. The fully connected
layers read RoI features in the order (channel, y, x) in both projects. Files from before torchvision 0.12, in
which the layers of RPN and mask head have other names, and those of RetinaNet from before 0.13 are read too.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
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

_EPS = 1e-5  # of the batch norms in timm's ResNets
_MARK = "backbone.fpn.inner_blocks."
_CLASSES = "head.classification_head.cls_logits.weight"
_MODERN_TOWER = "head.classification_head.conv.0.0.weight"

_RULES: tuple[tuple[str, Replacement], ...] = (
    (r"^backbone\.fpn\.(inner|layer)_blocks\.(\d)\.(weight|bias)$", r"backbone.fpn.\1_blocks.\2.0.\3"),
    (r"^backbone\.fpn\.inner_blocks\.", "fpn.laterals."),
    (r"^backbone\.fpn\.layer_blocks\.", "fpn.outputs."),
    (r"^backbone\.fpn\.extra_blocks\.", "fpn.top."),
    (r"^rpn\.head\.conv\.(weight|bias)$", r"rpn.head.conv.0.0.\1"),
    (r"^rpn\.head\.conv\.(\d)\.0\.", lambda m: f"rpn.head.{_rpn_convolution(int(m[1]))}."),
    (r"^rpn\.head\.cls_logits\.", "rpn.head.objectness."),
    (r"^rpn\.head\.bbox_pred\.", "rpn.head.deltas."),
    (r"^roi_heads\.box_head\.fc6\.", "box_head.fcs.0."),
    (r"^roi_heads\.box_head\.fc7\.", "box_head.fcs.1."),
    (r"^roi_heads\.box_head\.(\d)\.([01])\.", r"box_head.convs.\1.\2."),
    (r"^roi_heads\.box_predictor\.cls_score\.", "box_head.classes."),
    (r"^roi_heads\.box_predictor\.bbox_pred\.", "box_head.deltas."),
    (r"^roi_heads\.mask_head\.mask_fcn(\d)\.", lambda m: f"mask_head.convs.{int(m[1]) - 1}.0."),
    (r"^roi_heads\.mask_head\.(\d)\.([01])\.", r"mask_head.convs.\1.\2."),
    (r"^roi_heads\.mask_predictor\.conv5_mask\.", "mask_head.upsample."),
    (r"^roi_heads\.mask_predictor\.mask_fcn_logits\.", "mask_head.masks."),
    (r"^head\.classification_head\.conv\.", "head.class_convs."),
    (r"^head\.classification_head\.cls_logits\.", "head.classes."),
    (r"^head\.regression_head\.conv\.", "head.box_convs."),
    (r"^head\.regression_head\.bbox_reg\.", "head.deltas."),
)

_CLASS_ORDER: dict[str, Callable[[Tensor], Tensor]] = {
    "box_head.classes.": lambda t: torch.cat([t[1:], t[:1]]),
    "box_head.deltas.": lambda t: t[4:],
    "mask_head.masks.": lambda t: t[1:],
}


def _rpn_convolution(number: int) -> str:
    return "conv" if number == 0 else f"further_convs.{number - 1}"


def _recognises(keys: Collection[str]) -> bool:
    return any(key.startswith(_MARK) for key in keys)


def _names(keys: Collection[str]) -> dict[str, str]:
    # The fully connected layers of version 2 follow the convolutions: `box_head.5` after 0 to 3.
    linear = r"^roi_heads\.box_head\.(\d+)\.(weight|bias)$"
    places = {number: place for place, number in enumerate(numbers(keys, linear))}
    rules: tuple[tuple[str, Replacement], ...] = (
        (linear, lambda m: f"box_head.fcs.{places[int(m[1])]}.{m[2]}"),
        *_RULES,
    )
    if _CLASSES in keys and _MODERN_TOWER not in keys:  # convolutions counted with their ReLUs
        tower = r"^(head\.(?:classification|regression)_head\.conv)\.(\d)\.(weight|bias)$"
        rules = ((tower, lambda m: f"{m[1]}.{int(m[2]) // 2}.0.{m[3]}"), *rules)
    return {key: renamed(key, rules) for key in keys}


def _values(state: dict[str, Tensor], norm_eps: float | None = None) -> dict[str, Tensor]:
    for key, tensor in state.items():
        for prefix, reorder in _CLASS_ORDER.items():
            if key.startswith(prefix):
                state[key] = reorder(tensor).contiguous()
    if norm_eps is None:
        norm_eps = _EPS if any(key.endswith("num_batches_tracked") for key in state) else 0.0
    _fold_eps(state, norm_eps)
    return state


def _fold_eps(state: dict[str, Tensor], eps: float) -> None:
    """Replace the weights so that weight / sqrt(var + eps) = weight' / sqrt(var + 1e-5), in place."""
    if eps == _EPS:
        return
    for key in [key for key in state if key.endswith(".running_var")]:
        variance, name = state[key].double(), key.removesuffix("running_var") + "weight"
        factor = ((variance + _EPS) / (variance + eps).clamp_min(torch.finfo(torch.float32).tiny)).sqrt()
        state[name] = (state[name].double() * factor).to(state[name].dtype)


def _settings(state: State) -> Settings:
    section: dict[str, Any] = {
        "conventions": "torchvision",
        "backbone": {"pixel_mean": IMAGENET_MEAN, "pixel_std": IMAGENET_STD},
    }
    if _CLASSES in state:
        section["head"] = {"detections": 300}
    return Settings(section)


TORCHVISION = Project(
    title="torchvision", recognises=_recognises, names=_names, settings=_settings, values=_values
)


def from_torchvision(state: Mapping[str, Tensor], norm_eps: float | None = None) -> dict[str, Tensor]:
    """Return torchvision's weights under giantdet's names; unknown keys keep theirs.

    Use them with `model.conventions: "torchvision"`, with which they were trained.

    `norm_eps` is the epsilon of the batch norms that the weights were trained with. torchvision sets it to
    0 for its COCO weights of the first version (`overwrite_eps` in `mask_rcnn.py`), but the files do not
    contain it. None means 0 for frozen norms (their files have no `num_batches_tracked`), and 1e-5 otherwise.
    Where the epsilon is not 1e-5, the weights of the norms are scaled so that their outputs are the same with
    1e-5.
    """
    return _values({name: state[key] for key, name in _names(state).items()}, norm_eps)
